/* See pull_host.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pull_host.h"
#include "pull_outbox.h"
#include "pull_wire.h"

enum {
    MOST_GUESTS = 4096,
    MOST_STRANGERS = 64, /* connections that have not shown the token */
    HELLO_S = 5,
    PAUSE_MS = 50,
    IDLE_S = 2,
    UNANSWERED = 4,
    UNACKNOWLEDGED_MS = 20000, /* also ends a puller that is stopped and takes nothing */
};

typedef struct pdkv_host_memory {
    char *base;
    uint64_t length;
    int fd;
} pdkv_host_memory;

/* A connection; freed by its own thread. */
typedef struct pdkv_guest {
    struct pdkv_guest *next;
    pdkv_host *host;
    int fd; /* closed under the host's lock */
} pdkv_guest;

struct pdkv_host {
    int listener, wake;
    unsigned char token[PDKV_TOKEN_SIZE];
    pthread_t accepting;
    pthread_mutex_t lock;
    pthread_cond_t left;
    /* under the lock */
    pdkv_guest *guests;
    unsigned num_guests, num_strangers;
    int closing;
    pdkv_host_memory memories[PDKV_MAX_MEMORIES];
    size_t num_memories;
    pdkv_device *device; /* that all memory lies on; NULL = the host's own */
    size_t slot_bytes;
};

/* ---- the greeting ---- */

static int receive_all(int fd, void *bytes, size_t size)
{
    for (char *at = bytes; size > 0;) {
        ssize_t got = recv(fd, at, size, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return -1;
        at += got;
        size -= (size_t)got;
    }
    return 0;
}

/* Takes as long for a token that is nearly right as for one that is all wrong. */
static int is_token(const unsigned char *shown, const unsigned char *token)
{
    unsigned char differs = 0;
    for (size_t i = 0; i < PDKV_TOKEN_SIZE; i++)
        differs |= shown[i] ^ token[i];
    return differs == 0;
}

/* The descriptors of all memories into `control`; 0 when some memory has none, or this is no unix socket. */
static size_t put_fds(pdkv_host *host, int fd, struct cmsghdr *control)
{
    int domain = 0, fds[PDKV_MAX_MEMORIES];
    socklen_t size = sizeof(domain);
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size);
    if (domain != AF_UNIX || host->num_memories == 0)
        return 0;
    for (size_t i = 0; i < host->num_memories; i++) {
        fds[i] = host->memories[i].fd;
        if (fds[i] < 0)
            return 0;
    }
    size_t bytes = host->num_memories * sizeof(int);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(bytes);
    memcpy(CMSG_DATA(control), fds, bytes);
    return CMSG_SPACE(bytes);
}

static int welcome(pdkv_host *host, int fd)
{
    union {
        char bytes[CMSG_SPACE(PDKV_MAX_MEMORIES * sizeof(int))];
        struct cmsghdr header;
    } control;
    pdkv_hello hello;
    memset(&control, 0, sizeof(control));
    if (receive_all(fd, &hello, sizeof(hello)) != 0 || hello.greeting != PDKV_GREETING
        || !is_token(hello.token, host->token))
        return -1;
    pthread_mutex_lock(&host->lock);
    pdkv_welcome answer = {.greeting = PDKV_GREETING, .num_memories = host->num_memories};
    struct iovec part = {.iov_base = &answer, .iov_len = sizeof(answer)};
    size_t extra = put_fds(host, fd, &control.header);
    pthread_mutex_unlock(&host->lock);
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = extra ? control.bytes : NULL, .msg_controllen = extra};
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)sizeof(answer) ? 0 : -1;
}

/* ---- requests ---- */

/* 0 with the bytes a span names; -1 when they are not all inside one memory. */
static int find_bytes(pdkv_host *host, const pdkv_wire_span *span, struct iovec *part)
{
    pthread_mutex_lock(&host->lock);
    int inside = span->memory < host->num_memories && span->length > 0;
    const pdkv_host_memory *memory = inside ? &host->memories[span->memory] : NULL;
    inside = inside && span->length <= memory->length && span->offset <= memory->length - span->length;
    if (inside)
        *part = (struct iovec){.iov_base = memory->base + span->offset, .iov_len = span->length};
    pthread_mutex_unlock(&host->lock);
    return inside ? 0 : -1;
}

/* `outbox`: NULL when memory can be sent from where it lies. */
static int answer_request(pdkv_host *host, int fd, pdkv_outbox *outbox)
{
    pdkv_request request;
    pdkv_wire_span spans[PDKV_WIRE_SPANS];
    struct iovec parts[PDKV_WIRE_SPANS];
    if (receive_all(fd, &request, sizeof(request)) != 0 || request.num_spans - 1 >= PDKV_WIRE_SPANS)
        return -1;
    if (receive_all(fd, spans, request.num_spans * sizeof(spans[0])) != 0)
        return -1;
    for (size_t i = 0; i < request.num_spans; i++)
        if (find_bytes(host, &spans[i], &parts[i]) != 0)
            return -1;
    return outbox ? pdkv_outbox_add(outbox, parts, request.num_spans) : pdkv_send_parts(fd, parts, request.num_spans);
}

static int is_asked(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 0) > 0;
}

/* Begins the copies of all that is asked before it sends what was copied: the copies hide behind the wire. */
static void answer_staged(pdkv_host *host, int fd, pdkv_device *device)
{
    pdkv_outbox outbox = {.fd = fd, .slot_bytes = host->slot_bytes};
    if (pdkv_stage_open(device, outbox.slot_bytes, &outbox.stage) != 0)
        return;
    for (int failed = 0; !failed;)
        failed = outbox.count > 0 && !is_asked(fd) ? pdkv_outbox_send(&outbox) : answer_request(host, fd, &outbox);
    pdkv_stage_close(outbox.stage);
}

/* Until the connection is over. */
static void answer_requests(pdkv_host *host, int fd)
{
    pthread_mutex_lock(&host->lock);
    pdkv_device *device = host->device;
    pthread_mutex_unlock(&host->lock);
    if (device != NULL)
        answer_staged(host, fd, device);
    else
        while (answer_request(host, fd, NULL) == 0)
            ;
}

/* ---- guests ---- */

static void set_option(int fd, int level, int name, int value)
{
    setsockopt(fd, level, name, &value, sizeof(value)); /* refused by unix sockets, which need none of it */
}

static void patience(int fd, long seconds)
{
    struct timeval limit = {.tv_sec = seconds};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
}

static void leave(pdkv_guest *guest)
{
    pdkv_host *host = guest->host;
    pthread_mutex_lock(&host->lock);
    for (pdkv_guest **link = &host->guests; *link != NULL; link = &(*link)->next) {
        if (*link == guest) {
            *link = guest->next;
            break;
        }
    }
    close(guest->fd);
    host->num_guests--;
    pthread_cond_signal(&host->left); /* the last touch of the host: destroy waits for the count under the lock */
    pthread_mutex_unlock(&host->lock);
    free(guest);
}

static void *serve(void *argument)
{
    pdkv_guest *guest = argument;
    pdkv_host *host = guest->host;
    patience(guest->fd, HELLO_S);
    int refused = welcome(host, guest->fd);
    pthread_mutex_lock(&host->lock);
    host->num_strangers--;
    pthread_mutex_unlock(&host->lock);
    patience(guest->fd, 0);
    if (!refused)
        answer_requests(host, guest->fd);
    leave(guest);
    return NULL;
}

static void admit(pdkv_host *host, int fd)
{
    pdkv_guest *guest = calloc(1, sizeof(*guest));
    pthread_attr_t detached;
    pthread_t thread;
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, IDLE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, IDLE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, UNANSWERED);
    set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_mutex_lock(&host->lock);
    int full = host->closing || host->num_guests >= MOST_GUESTS || host->num_strangers >= MOST_STRANGERS;
    if (guest != NULL && !full) {
        *guest = (pdkv_guest){.next = host->guests, .host = host, .fd = fd};
        if (pthread_create(&thread, &detached, serve, guest) == 0) {
            host->guests = guest;
            host->num_guests++;
            host->num_strangers++;
            guest = NULL;
            fd = -1;
        }
    }
    pthread_mutex_unlock(&host->lock);
    pthread_attr_destroy(&detached);
    free(guest);
    if (fd >= 0)
        close(fd);
}

static void *accept_guests(void *argument)
{
    pdkv_host *host = argument;
    struct pollfd looks[2] = {{.fd = host->wake, .events = POLLIN}, {.fd = host->listener, .events = POLLIN}};
    for (;;) {
        poll(looks, 2, -1);
        if (looks[0].revents)
            return NULL;
        int fd = accept4(host->listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            admit(host, fd);
        else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM)
            poll(looks, 1, PAUSE_MS); /* until somebody gives a descriptor back */
    }
}

/* ---- the host ---- */

pdkv_host *pdkv_host_create(int listener, const unsigned char *token)
{
    pdkv_host *host = calloc(1, sizeof(*host));
    if (host == NULL)
        return NULL;
    host->wake = eventfd(0, EFD_CLOEXEC);
    host->listener = listener;
    memcpy(host->token, token, sizeof(host->token));
    pthread_mutex_init(&host->lock, NULL);
    pthread_cond_init(&host->left, NULL);
    if (host->wake >= 0 && pthread_create(&host->accepting, NULL, accept_guests, host) == 0)
        return host;
    if (host->wake >= 0)
        close(host->wake);
    free(host);
    return NULL;
}

void pdkv_host_use_device(pdkv_host *host, pdkv_device *device, size_t slot_bytes)
{
    pthread_mutex_lock(&host->lock);
    host->device = device;
    host->slot_bytes = slot_bytes;
    pthread_mutex_unlock(&host->lock);
}

int pdkv_host_add_memory(pdkv_host *host, uint64_t address, uint64_t length, int fd)
{
    pthread_mutex_lock(&host->lock);
    int full = host->num_memories == PDKV_MAX_MEMORIES;
    if (!full)
        host->memories[host->num_memories++] = (pdkv_host_memory){(char *)(uintptr_t)address, length, fd};
    pthread_mutex_unlock(&host->lock);
    return full ? -1 : 0;
}

void pdkv_host_destroy(pdkv_host *host)
{
    uint64_t one = 1;
    ssize_t told = write(host->wake, &one, sizeof(one));
    (void)told;
    pthread_join(host->accepting, NULL);
    pthread_mutex_lock(&host->lock);
    host->closing = 1;
    for (pdkv_guest *guest = host->guests; guest != NULL; guest = guest->next)
        shutdown(guest->fd, SHUT_RDWR);
    while (host->num_guests > 0)
        pthread_cond_wait(&host->left, &host->lock);
    pthread_mutex_unlock(&host->lock);
    close(host->listener);
    close(host->wake);
    pthread_cond_destroy(&host->left);
    pthread_mutex_destroy(&host->lock);
    free(host);
}
