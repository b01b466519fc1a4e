/* Reading out of a mapping of the peer's memory: nothing is asked of the peer once it has handed over its descriptors. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "pull_internal.h"
#include "pull_wire.h"

enum { LOOK_MS = 20, ANSWER_MS = 10000 };

/* ---- the descriptors, from the peer's host by a unix socket ---- */

/* 1 when `fd` has `events`; 0 when the peer is over or `patience_ms` have passed. */
static int wait_for(pdkv_source *source, int fd, short events, int patience_ms)
{
    for (int waited = 0; waited < patience_ms && !atomic_load(&source->over); waited += LOOK_MS) {
        struct pollfd look = {.fd = fd, .events = events};
        if (poll(&look, 1, LOOK_MS) > 0)
            return 1;
    }
    return 0;
}

/* Abstract sockets belong to a network namespace: one of another namespace is not there, as is a dead peer's. */
static int dial(pdkv_source *source)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    size_t length = strnlen(source->address.host, sizeof(name.sun_path) - 1);
    memcpy(name.sun_path + 1, source->address.host, length);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000L};
    for (int waited = 0; waited < ANSWER_MS && !atomic_load(&source->over); waited += LOOK_MS) {
        if (connect(fd, (struct sockaddr *)&name, size) == 0)
            return fd;
        if (errno != EAGAIN) /* its queue is full: it has others to answer first */
            break;
        nanosleep(&pause, NULL);
    }
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Fills `fds` with what came along; returns how many, or -1. */
static int receive_fds(int socket_fd, int *fds)
{
    union {
        char bytes[CMSG_SPACE(PDKV_MAX_MEMORIES * sizeof(int))];
        struct cmsghdr aligned;
    } control;
    pdkv_welcome welcome;
    struct iovec answer = {.iov_base = &welcome, .iov_len = sizeof(welcome)};
    struct msghdr message = {
        .msg_iov = &answer, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t got = recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header == NULL || header->cmsg_type != SCM_RIGHTS)
        return -1;
    int count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(fds, CMSG_DATA(header), (size_t)count * sizeof(int));
    if (got == sizeof(welcome) && welcome.greeting == PDKV_GREETING)
        return count;
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return -1;
}

static int ask_for_fds(pdkv_source *source, int *fds)
{
    pdkv_hello hello = {.greeting = PDKV_GREETING};
    memcpy(hello.token, source->address.token, sizeof(hello.token));
    source->life_fd = dial(source);
    if (source->life_fd < 0)
        return -1;
    if (send(source->life_fd, &hello, sizeof(hello), MSG_NOSIGNAL) == sizeof(hello)
        && wait_for(source, source->life_fd, POLLIN, ANSWER_MS))
        return receive_fds(source->life_fd, fds);
    errno = ETIMEDOUT;
    return -1;
}

/* ---- or from /proc, where the peer's process can be seen ---- */

static int open_fds(pdkv_source *source, int *fds)
{
    int pid = source->address.pid;
    source->life_fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (source->life_fd < 0)
        return -1;
    for (size_t i = 0; i < source->num_memories; i++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, source->memories[i].fd);
        fds[i] = open(path, O_RDONLY | O_CLOEXEC);
        if (fds[i] >= 0)
            continue;
        int error = errno;
        while (i-- > 0)
            close(fds[i]);
        errno = error;
        return -1;
    }
    return (int)source->num_memories;
}

static int get_fds(pdkv_source *source, int *fds)
{
    int count = ask_for_fds(source, fds);
    if (count >= 0 || atomic_load(&source->over))
        return count;
    int socket_error = errno;
    if (source->life_fd >= 0)
        close(source->life_fd);
    source->life_fd = -1;
    if (source->address.pid > 0)
        count = open_fds(source, fds);
    if (count < 0) {
        char by_socket[64], by_proc[64] = "it is in another process namespace";
        const char *told = strerror_r(socket_error, by_socket, sizeof(by_socket));
        const char *also = source->address.pid > 0 ? strerror_r(errno, by_proc, sizeof(by_proc)) : by_proc;
        pdkv_lose(source, "the peer's memory cannot be had: by its socket: %s; by /proc: %s", told, also);
    }
    return count;
}

/* ---- the mapping ---- */

/* Why a descriptor is not the memory that the peer described; NULL when it is. Without the seal the peer could shrink
 * it, and a read beyond its end would kill this process. */
static const char *fault_of(const pdkv_far_memory *memory, int fd)
{
    struct stat about;
    if (fstat(fd, &about) != 0 || !S_ISREG(about.st_mode) || about.st_ino != memory->inode)
        return "is not the memory that it described";
    if (about.st_size < 0 || (uint64_t)about.st_size < memory->length)
        return "is shorter than it said";
    int seals = fcntl(fd, F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK) ? NULL : "is not sealed against shrinking";
}

static int map_all(pdkv_source *source)
{
    int fds[PDKV_MAX_MEMORIES];
    int count = get_fds(source, fds);
    if (count < 0)
        return -1;
    int missing = (size_t)count < source->num_memories;
    if (missing)
        pdkv_lose(source, "the peer handed over %d of %zu memories", count, source->num_memories);
    for (size_t i = 0; !missing && i < source->num_memories; i++) {
        const char *fault = fault_of(&source->memories[i], fds[i]);
        void *map = fault ? MAP_FAILED : mmap(NULL, source->memories[i].length, PROT_READ, MAP_SHARED, fds[i], 0);
        if (map != MAP_FAILED) {
            source->maps[i] = map;
            continue;
        }
        pdkv_lose(source, "the peer's memory %zu %s", i, fault ? fault : "cannot be mapped");
        missing = 1;
    }
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return missing ? -1 : 0;
}

void pdkv_unmap(pdkv_source *source)
{
    for (size_t i = 0; source->maps != NULL && i < source->num_memories; i++)
        if (source->maps[i] != NULL)
            munmap((void *)source->maps[i], source->memories[i].length);
}

/* ---- the threads ---- */

/* The first thread maps; the others wait for it. 0 when there is something to copy from. */
static int open_source(pdkv_stream *stream)
{
    pdkv_source *source = stream->source;
    int failed = 0;
    if (stream == source->streams)
        failed = map_all(source);
    pthread_mutex_lock(&source->puller->lock);
    if (stream == source->streams) {
        source->opened = !failed;
        pthread_cond_broadcast(&source->work);
    }
    while (!source->opened && !atomic_load(&source->over))
        pthread_cond_wait(&source->work, &source->puller->lock);
    int usable = source->opened && !atomic_load(&source->over);
    pthread_mutex_unlock(&source->puller->lock);
    return usable ? 0 : -1;
}

static int begin_copy(pdkv_source *source)
{
    pdkv_puller *puller = source->puller;
    pthread_mutex_lock(&puller->lock);
    while (puller->copying >= puller->limits.copies && !atomic_load(&source->over))
        pthread_cond_wait(&puller->may_copy, &puller->lock);
    int may = !atomic_load(&source->over);
    puller->copying += (unsigned)may;
    pthread_mutex_unlock(&puller->lock);
    return may;
}

static void end_copy(pdkv_puller *puller)
{
    pthread_mutex_lock(&puller->lock);
    puller->copying--;
    pthread_cond_signal(&puller->may_copy);
    pthread_mutex_unlock(&puller->lock);
}

/* The mapping outlives the peer, so nothing but this tells of its death. */
static int is_alive(const pdkv_source *source)
{
    struct pollfd look = {.fd = source->life_fd, .events = POLLIN};
    return poll(&look, 1, 0) == 0;
}

static void copy_slice(const pdkv_source *source, pdkv_slice slice)
{
    for (pdkv_piece piece; pdkv_next_piece(&slice, &piece);)
        pdkv_copy(piece.local, source->maps[piece.memory] + piece.remote, piece.length);
}

void pdkv_run_mapped(pdkv_stream *stream)
{
    pdkv_source *source = stream->source;
    pdkv_slice slice;
    if (open_source(stream) != 0)
        return;
    while (pdkv_take_slice(source, source->puller->limits.slice_bytes, 1, &slice)) {
        if (!is_alive(source)) {
            pdkv_lose(source, "the peer has ended");
        } else if (begin_copy(source)) {
            copy_slice(source, slice);
            end_copy(source->puller);
        }
        pdkv_return_slice(source, &slice);
    }
}
