/* Puts a batch of spans on a GPU's streams, part by part: each part is looked at, laid out and launched before the next is
 * touched, so that the first bytes move while the last spans have not been read. Calls NVIDIA's driver by the addresses
 * that its owner gives. */
#ifndef PDKV_NVLINK_POSTING_H
#define PDKV_NVLINK_POSTING_H

#include "spans.h"

/* The driver as far as a posting needs it: functions by the names of CUDA's manual, without the "cu". Each returns 0, or
 * CUDA's result. */
typedef struct pdkv_gpu {
    void *context, *kernel;
    unsigned threads;        /* of a block of the kernel */
    unsigned copy_flags;     /* of batches of copies */
    int tells_failed_index;  /* memcpy_batch has CUDA 12's form, of one argument more */
    int (*push_context)(void *);
    int (*pop_context)(void **);
    void *memcpy_batch; /* NULL where there is none: then no span may be a row */
    int (*memcpy_to_device)(uint64_t, const void *, size_t, void *);
    int (*launch_kernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                         void **);
    int (*record_event)(void *, void *);
    int (*query_event)(void *);
    int (*wait_for_event)(void *);
} pdkv_gpu;

/* The functions, by address, in the order of the struct. */
void pdkv_set_calls(pdkv_gpu *gpu, const uint64_t addresses[8]);

/* How a batch is divided. */
typedef struct pdkv_pace {
    int64_t long_bytes;           /* spans from here on are rows, and go to the copy engines */
    int64_t piece_bytes;          /* most that a warp copies at a time, where there is much */
    int64_t few_bytes;            /* of less than this pieces are an eighth as long */
    size_t first_rows, first_fragments, times, most; /* spans of the first part, growth, largest part */
    unsigned blocks;              /* of one kernel, at most */
    unsigned row_streams;         /* how many of the streams rows take turns on */
} pdkv_pace;

enum { PDKV_STREAMS = 2 };

typedef struct pdkv_table {
    int64_t *numbers; /* room for `capacity` pieces of three numbers, page-locked; NULL = none */
    uint64_t device;  /* as much on the GPU */
    size_t capacity;
} pdkv_table;

typedef enum pdkv_posted {
    PDKV_POSTED,      /* all of it */
    PDKV_WANTS_TABLE, /* give one and call again */
    PDKV_BAD_SPAN,    /* a part that has one is not read, nor what comes after it */
    PDKV_REFUSED,     /* by the driver: `code` of `call` */
    PDKV_PEER_ENDED,  /* nothing was read */
} pdkv_posted;

typedef struct pdkv_posting {
    const pdkv_gpu *gpu;
    const pdkv_bounds *bounds;
    const int64_t *bases; /* where this GPU reads each far memory */
    pdkv_pace pace;
    pdkv_spans spans;
    void *streams[PDKV_STREAMS];
    int life; /* readable when the peer's process has ended */
    /* what it has come to */
    unsigned used; /* bit n: stream n has something of it */
    unsigned turn;
    size_t next, size; /* the next part */
    uint64_t bytes;    /* of all parts so far */
    int64_t begun_ns;  /* by CLOCK_MONOTONIC */
    pdkv_cutter cutter;
    int cutting;
    pdkv_table table; /* given, and not used yet */
    int code;
    const char *call;
} pdkv_posting;

/* For another batch; all of it is read by the posting, where it lies. */
void pdkv_begin(pdkv_posting *posting, pdkv_spans spans);

/* Goes on until it has ended or wants a table. Whatever it returns, the stream's events tell when what was put there has
 * ended. */
pdkv_posted pdkv_post(pdkv_posting *posting);

/* Records `events[n]` on stream n where it was used. 0 or the driver's result. */
int pdkv_mark(pdkv_posting *posting, void *const *events);

/* CLOCK_MONOTONIC. */
int64_t pdkv_now_ns(void);

#endif
