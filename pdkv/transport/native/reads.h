/* What every native reader takes from its owner and hands back: spans of a batch in, completions out. */
#ifndef PDKV_READS_H
#define PDKV_READS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { PDKV_OK = 0, PDKV_FAILED = 1, PDKV_CANCELLED = 2 };

enum { PDKV_ERROR_SIZE = 200 };

/* The end of one read. Readers begin their batches with it, so that the completion is the batch. */
typedef struct pdkv_done {
    struct pdkv_done *next;
    int64_t read;
    int status;
    char error[PDKV_ERROR_SIZE];
} pdkv_done;

void pdkv_fail(pdkv_done *done, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- completions, from any thread to the owner's ---- */

typedef struct pdkv_done_queue {
    pthread_mutex_t lock;
    pdkv_done *first, *last;
    int fd; /* readable exactly while the queue is not empty */
} pdkv_done_queue;

/* 0, or -1 when descriptors are short. A queue that was opened is closed; what is in it is freed. */
int pdkv_done_open(pdkv_done_queue *queue);
void pdkv_done_close(pdkv_done_queue *queue);

void pdkv_done_add(pdkv_done_queue *queue, pdkv_done *done);

/* All since the last call, oldest first; each is freed by the caller with free(). */
pdkv_done *pdkv_done_take(pdkv_done_queue *queue);

/* Makes an eventfd readable. */
void pdkv_signal(int fd);

/* ---- spans ---- */

typedef struct pdkv_spans {
    size_t count;
    const int64_t *memory, *remote, *local, *length; /* `count` each */
} pdkv_spans;

/* A zeroed batch of `size` bytes, with a copy of the spans behind it in the same allocation; NULL when memory is short.
 * `copy` is where the batch keeps them. */
void *pdkv_new_batch(size_t size, size_t copy, const pdkv_spans *spans);

typedef struct pdkv_range {
    uint64_t address, length;
} pdkv_range;

/* The number of the range that holds all of these bytes, or -1. */
int64_t pdkv_find_range(const pdkv_range *ranges, size_t count, uint64_t address, uint64_t length);

/* What spans may touch: far memories by length, near ones by range. */
typedef struct pdkv_bounds {
    const uint64_t *far;
    size_t num_far;
    const pdkv_range *near;
    size_t num_near;
} pdkv_bounds;

/* 0, or -1 after failing `done` with the first span that is refused, and why. */
int pdkv_check_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, pdkv_done *done);

#endif
