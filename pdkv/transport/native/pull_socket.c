/* Reading over TCP: each of a peer's streams asks for slices ahead of the bytes, and receives them where they belong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pull_internal.h"
#include "pull_landing.h"
#include "pull_wire.h"

enum {
    AHEAD = 8, /* slices asked for and not yet here: the window of one stream */
    LOOK_MS = 20,
    CONNECT_MS = 5000,
    IDLE_S = 2, /* a peer that sends nothing is asked for a sign of life after, and every, so many seconds */
    UNANSWERED = 4,
    UNACKNOWLEDGED_MS = 10000,
};

/* ---- the connection ---- */

static void set_option(int fd, int level, int name, int value)
{
    setsockopt(fd, level, name, &value, sizeof(value)); /* a stream without is slower or later to notice, no worse */
}

/* Death without a word (a host that lost power, a cut link) ends the connection in some 10 s. A peer that is stopped
 * still acknowledges: that is for the deadline of whoever reads. */
static void tune(int fd)
{
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, IDLE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, IDLE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, UNANSWERED);
    set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS);
}

/* 0 when `fd` has `events` in time and the peer is not over; else an errno. */
static int wait_for(pdkv_source *source, int fd, short events)
{
    for (int waited = 0; waited < CONNECT_MS; waited += LOOK_MS) {
        struct pollfd look = {.fd = fd, .events = events};
        if (atomic_load(&source->over))
            return ECANCELED;
        if (poll(&look, 1, LOOK_MS) > 0)
            return 0;
    }
    return ETIMEDOUT;
}

static int dial(pdkv_source *source, const struct addrinfo *at, int *fd)
{
    *fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0)
        return errno;
    tune(*fd);
    int error = connect(*fd, at->ai_addr, at->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS && (error = wait_for(source, *fd, POLLOUT)) == 0) {
        socklen_t size = sizeof(error);
        getsockopt(*fd, SOL_SOCKET, SO_ERROR, &error, &size);
    }
    if (error != 0)
        close(*fd);
    return error;
}

/* 0 when the host took the token. */
static int greet(pdkv_source *source, int fd)
{
    pdkv_hello hello = {.greeting = PDKV_GREETING};
    pdkv_welcome welcome;
    memcpy(hello.token, source->address.token, sizeof(hello.token));
    if (send(fd, &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello))
        return errno;
    for (size_t got = 0; got < sizeof(welcome);) {
        int error = wait_for(source, fd, POLLIN);
        ssize_t more = error ? 0 : recv(fd, (char *)&welcome + got, sizeof(welcome) - got, 0);
        if (more <= 0)
            return error ? error : EACCES;
        got += (size_t)more;
    }
    return welcome.greeting == PDKV_GREETING ? 0 : EPROTO;
}

/* The stream's connection, blocking from here on; -1 after telling why there is none. */
static int open_stream(pdkv_stream *stream)
{
    pdkv_source *source = stream->source;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    char port[16];
    int fd = -1, error = EHOSTUNREACH;
    snprintf(port, sizeof(port), "%d", source->address.port);
    int unresolved = getaddrinfo(source->address.host, port, &hints, &found);
    if (unresolved) {
        pdkv_lose(source, "%s: %s", source->address.host, gai_strerror(unresolved));
        return -1;
    }
    for (struct addrinfo *at = found; at != NULL && error != 0 && error != ECANCELED; at = at->ai_next) {
        error = dial(source, at, &fd);
        if (error == 0 && (error = greet(source, fd)) != 0)
            close(fd);
    }
    freeaddrinfo(found);
    if (error != 0) {
        char text[64];
        const char *why = error == EACCES ? "the host does not know us" : strerror_r(error, text, sizeof(text));
        pdkv_lose(source, "cannot connect to %s port %s: %s", source->address.host, port, why);
        return -1;
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    pthread_mutex_lock(&source->puller->lock);
    stream->fd = fd; /* from here on whoever ends the peer shuts it down */
    int over = atomic_load(&source->over);
    pthread_mutex_unlock(&source->puller->lock);
    return over ? -1 : 0;
}

static void close_stream(pdkv_stream *stream)
{
    pthread_mutex_lock(&stream->source->puller->lock);
    if (stream->fd >= 0)
        close(stream->fd);
    stream->fd = -1;
    pthread_mutex_unlock(&stream->source->puller->lock);
}

/* ---- slices ---- */

typedef struct pdkv_asked {
    pdkv_slice whole; /* as it was taken */
    pdkv_slice rest;  /* not received yet */
} pdkv_asked;

static int send_all(int fd, const void *bytes, size_t size)
{
    for (const char *at = bytes; size > 0;) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        at += sent;
        size -= (size_t)sent;
    }
    return 0;
}

static int ask_for(int fd, pdkv_slice slice)
{
    struct {
        pdkv_request request;
        pdkv_wire_span spans[PDKV_WIRE_SPANS];
    } frame;
    size_t count = 0;
    for (pdkv_piece piece; pdkv_next_piece(&slice, &piece); count++)
        frame.spans[count] = (pdkv_wire_span){(uint64_t)piece.memory, piece.remote, piece.length};
    frame.request.num_spans = count;
    return send_all(fd, &frame, sizeof(frame.request) + count * sizeof(frame.spans[0]));
}

/* Drops `bytes` from the slice's front. */
static void skip(pdkv_slice *slice, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t left = (uint64_t)slice->batch->spans.length[slice->span] - slice->skip;
        uint64_t passed = left < bytes ? left : bytes;
        bytes -= passed;
        slice->bytes -= passed;
        slice->skip += passed;
        if (passed == left) {
            slice->skip = 0;
            slice->span++;
        }
    }
}

static int lost(pdkv_source *source, ssize_t got)
{
    char text[64];
    const char *why = got == 0 ? "it closed the connection" : strerror_r(errno, text, sizeof(text));
    pdkv_lose(source, "the peer is gone: %s", why);
    return -1;
}

/* Receives until the slice is where it belongs; 0, or -1 when the connection is over. */
static int receive(pdkv_source *source, int fd, pdkv_slice *rest)
{
    struct iovec parts[PDKV_WIRE_SPANS];
    while (rest->bytes > 0) {
        pdkv_slice walk = *rest;
        size_t count = 0;
        for (pdkv_piece piece; count < PDKV_WIRE_SPANS && pdkv_next_piece(&walk, &piece); count++)
            parts[count] = (struct iovec){.iov_base = piece.local, .iov_len = piece.length};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        if (atomic_load(&source->over)) /* what lies in the kernel's buffer can still be received after a shutdown */
            return -1;
        ssize_t got = recvmsg(fd, &message, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return lost(source, got);
        skip(rest, (uint64_t)got);
    }
    return 0;
}

/* Receives a slice for a device. While nothing comes, slices that came before are given back: a peer that stops amid
 * one must not hold up others. */
static int receive_staged(pdkv_landing *landing, int fd, const pdkv_slice *slice)
{
    pdkv_source *source = landing->source;
    char *at = pdkv_landing_place(landing);
    for (uint64_t left = slice->bytes; left > 0;) {
        if (atomic_load(&source->over))
            return -1;
        ssize_t got = recv(fd, at, left, landing->count > 0 ? MSG_DONTWAIT : MSG_WAITALL);
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            pdkv_landing_settle(landing);
        else if (got <= 0 && !(got < 0 && errno == EINTR))
            return lost(source, got);
        at += got > 0 ? got : 0;
        left -= got > 0 ? (uint64_t)got : 0;
    }
    pdkv_landing_begin(landing, slice);
    return 0;
}

/* Keeps up to AHEAD slices asked for; returns how many there are now, or -1 when the connection is over. Waits for work
 * when there is none, unless `busy`. */
static int ask_ahead(pdkv_stream *stream, pdkv_asked *asked, int first, int count, int busy)
{
    pdkv_source *source = stream->source;
    for (pdkv_slice slice; count < AHEAD; count++) {
        if (!pdkv_take_slice(source, source->puller->limits.slice_bytes, count == 0 && !busy, &slice))
            break;
        asked[(first + count) % AHEAD] = (pdkv_asked){.whole = slice, .rest = slice};
        if (ask_for(stream->fd, slice) == 0)
            continue;
        pdkv_lose(source, "the peer is gone: it takes no requests");
        return count + 1;
    }
    return count;
}

/* Receives the slice that was asked for first and gives it back, at once or when it has landed. */
static int fetch(pdkv_stream *stream, pdkv_landing *landing, pdkv_asked *asked)
{
    if (landing->stage != NULL)
        return receive_staged(landing, stream->fd, &asked->whole);
    if (receive(stream->source, stream->fd, &asked->rest) != 0)
        return -1;
    pdkv_return_slice(stream->source, &asked->whole);
    return 0;
}

void pdkv_run_socket(pdkv_stream *stream)
{
    pdkv_source *source = stream->source;
    pdkv_device *device = source->puller->device;
    pdkv_landing landing = {.source = source};
    pdkv_asked asked[AHEAD];
    int first = 0, count = 0;
    if (open_stream(stream) == 0 && (device == NULL || pdkv_landing_open(&landing, source, device) == 0)) {
        while ((count = ask_ahead(stream, asked, first, count, landing.count > 0)) > 0 || landing.count > 0) {
            if (count == 0) {
                pdkv_landing_settle(&landing);
                continue;
            }
            if (fetch(stream, &landing, &asked[first]) != 0)
                break;
            first = (first + 1) % AHEAD;
            count--;
        }
    }
    close_stream(stream); /* before what it was to receive is given back: nothing lands afterwards */
    if (landing.stage != NULL)
        pdkv_landing_close(&landing);
    for (; count > 0; count--, first = (first + 1) % AHEAD)
        pdkv_return_slice(source, &asked[first].whole);
}
