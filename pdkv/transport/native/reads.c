/* See reads.h. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "reads.h"

void pdkv_fail(pdkv_done *done, int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    done->status = status;
    vsnprintf(done->error, sizeof(done->error), format, arguments);
    va_end(arguments);
}

/* ---- completions ---- */

void pdkv_signal(int fd)
{
    uint64_t one = 1;
    ssize_t written = write(fd, &one, sizeof(one)); /* fails only when the counter is full, and then it is readable */
    (void)written;
}

int pdkv_done_open(pdkv_done_queue *queue)
{
    queue->first = queue->last = NULL;
    queue->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (queue->fd < 0)
        return -1;
    pthread_mutex_init(&queue->lock, NULL);
    return 0;
}

void pdkv_done_close(pdkv_done_queue *queue)
{
    for (pdkv_done *done = queue->first, *next; done != NULL; done = next) {
        next = done->next;
        free(done);
    }
    close(queue->fd);
    pthread_mutex_destroy(&queue->lock);
}

void pdkv_done_add(pdkv_done_queue *queue, pdkv_done *done)
{
    done->next = NULL;
    pthread_mutex_lock(&queue->lock);
    int was_empty = queue->first == NULL;
    if (was_empty)
        queue->first = done;
    else
        queue->last->next = done;
    queue->last = done;
    if (was_empty)
        pdkv_signal(queue->fd);
    pthread_mutex_unlock(&queue->lock);
}

pdkv_done *pdkv_done_take(pdkv_done_queue *queue)
{
    uint64_t count;
    pthread_mutex_lock(&queue->lock);
    pdkv_done *done = queue->first;
    queue->first = queue->last = NULL;
    if (done != NULL) {
        ssize_t got = read(queue->fd, &count, sizeof(count));
        (void)got;
    }
    pthread_mutex_unlock(&queue->lock);
    return done;
}

/* ---- spans ---- */

void *pdkv_new_batch(size_t size, size_t copy, const pdkv_spans *spans)
{
    const int64_t *sources[4] = {spans->memory, spans->remote, spans->local, spans->length};
    size_t count = spans->count, head = (size + sizeof(int64_t) - 1) / sizeof(int64_t) * sizeof(int64_t);
    char *batch = malloc(head + 4 * count * sizeof(int64_t));
    if (batch == NULL)
        return NULL;
    memset(batch, 0, head);
    int64_t *own = (int64_t *)(batch + head);
    for (size_t i = 0; count > 0 && i < 4; i++)
        memcpy(own + i * count, sources[i], count * sizeof(int64_t));
    *(pdkv_spans *)(batch + copy) = (pdkv_spans){count, own, own + count, own + 2 * count, own + 3 * count};
    return batch;
}

int64_t pdkv_find_range(const pdkv_range *ranges, size_t count, uint64_t address, uint64_t length)
{
    for (size_t i = 0; i < count; i++) {
        const pdkv_range *range = &ranges[i];
        if (address >= range->address && length <= range->length
            && address - range->address <= range->length - length)
            return (int64_t)i;
    }
    return -1;
}

/* Why a span is refused; NULL when it is not. */
static const char *fault_of(const pdkv_spans *spans, size_t i, const pdkv_bounds *bounds)
{
    int64_t memory = spans->memory[i], remote = spans->remote[i], length = spans->length[i];
    if (memory < 0 || (uint64_t)memory >= bounds->num_far)
        return "the peer has no such memory";
    if (length <= 0)
        return "the length is not positive";
    if (remote < 0 || (uint64_t)length > bounds->far[memory]
        || (uint64_t)remote > bounds->far[memory] - (uint64_t)length)
        return "the range lies outside the peer's memory";
    if (pdkv_find_range(bounds->near, bounds->num_near, (uint64_t)spans->local[i], (uint64_t)length) < 0)
        return "the destination lies outside registered memory";
    return NULL;
}

int pdkv_check_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, pdkv_done *done)
{
    for (size_t i = 0; i < spans->count; i++) {
        const char *fault = fault_of(spans, i, bounds);
        if (fault == NULL)
            continue;
        pdkv_fail(done, PDKV_FAILED, "span %zu (memory %lld, offset %lld, %lld bytes): %s", i,
                  (long long)spans->memory[i], (long long)spans->remote[i], (long long)spans->length[i], fault);
        return -1;
    }
    return 0;
}
