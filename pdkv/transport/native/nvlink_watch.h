/* A thread that waits until reads have ended, and tells their owner. It knows nothing of Python, for a thread of Python's that
 * has slept for milliseconds takes a tenth of one to get going. */
#ifndef PDKV_NVLINK_WATCH_H
#define PDKV_NVLINK_WATCH_H

#include "nvlink_posting.h"

typedef struct pdkv_watch pdkv_watch;

/* A read on the GPU's streams. Its completion's status is CUDA's result. */
typedef struct pdkv_awaited {
    pdkv_done done; /* first */
    struct pdkv_awaited *next;
    unsigned num_events;
    void *events[PDKV_STREAMS];
    uint64_t bytes;
    int has_tables; /* reads by the kernel have a speed of their own */
    int64_t begun_ns;
} pdkv_awaited;

/* Starts a thread that adds to `queue`; both arguments outlive it. NULL when the system has none. */
pdkv_watch *pdkv_watch_start(const pdkv_gpu *gpu, pdkv_done_queue *queue);

/* Takes over `awaited`, which malloc made. Reads are awaited one after another, in this order. */
void pdkv_watch_add(pdkv_watch *watch, pdkv_awaited *awaited);

/* No more will be added: the thread ends when all that was has ended. Harmless twice. */
void pdkv_watch_stop(pdkv_watch *watch);

/* After a stop: waits for the thread, and frees. */
void pdkv_watch_join(pdkv_watch *watch);

#endif
