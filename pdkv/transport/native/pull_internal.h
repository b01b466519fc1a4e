/* What the files of the puller share: its structures and who may touch them. */
#ifndef PDKV_PULL_INTERNAL_H
#define PDKV_PULL_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "pull.h"

enum { PDKV_SLICE_SPANS = 512 }; /* most spans of a slice: what one request and one recvmsg carry */

typedef struct pdkv_source pdkv_source;
typedef struct pdkv_pull pdkv_pull;
typedef struct pdkv_stream pdkv_stream;

/* A submitted batch. The arrays are constant; the rest is under the puller's lock. */
struct pdkv_pull {
    pdkv_done done; /* first: the completion is the batch */
    pdkv_pull *next;  /* in its peer's queue */
    pdkv_spans spans;
    size_t next_span; /* first span not wholly handed to a thread */
    uint64_t skip;    /* bytes of it that were */
    unsigned slices;  /* handed to threads and not yet returned */
};

/* Consecutive bytes of a batch, on their way through one thread. */
typedef struct pdkv_slice {
    pdkv_pull *batch;
    size_t span;
    uint64_t skip;
    uint64_t bytes;
} pdkv_slice;

/* One run of bytes of a slice. */
typedef struct pdkv_piece {
    int64_t memory;
    uint64_t remote;
    char *local;
    uint64_t length;
} pdkv_piece;

struct pdkv_stream {
    pdkv_source *source;
    pthread_t thread;
    int fd; /* TCP: its connection, -1 before and after; guarded by the puller's lock for whoever shuts it down */
};

/* A peer. `memories`, `address`: constant. `maps`, `life_fd`: written by the opening thread before `opened`. The rest is
 * under the puller's lock. */
struct pdkv_source {
    pdkv_puller *puller;
    pdkv_source *next; /* all of the puller's, whose threads are to be joined */
    int64_t id;
    pdkv_far_address address;
    pdkv_far_memory *memories;
    uint64_t *lengths; /* of memories */
    size_t num_memories;
    const char **maps; /* mapped: where each memory begins here */
    int life_fd;       /* mapped: hangs up or becomes readable when the peer's process ends */
    pthread_cond_t work;
    pdkv_pull *first, *last; /* batches with spans left to hand out */
    pdkv_pull *taken;        /* batches wholly handed out, not complete */
    int opened, carried;
    atomic_int over;     /* lost or closed: threads take nothing more and leave */
    int status;          /* what batches end as once it is over */
    char why[PDKV_ERROR_SIZE];
    unsigned num_threads, num_left; /* started; ended */
    pdkv_stream *streams;
};

struct pdkv_puller {
    pdkv_pull_limits limits;
    pthread_mutex_t lock;
    pthread_cond_t may_copy;
    unsigned copying;
    pdkv_done_queue done;
    pdkv_device *device; /* that all destinations lie on, set before any peer; NULL = the host's own memory */
    /* owner thread only */
    pdkv_range *destinations;
    size_t num_destinations;
    pdkv_source **table; /* by id; NULL once closed */
    size_t num_peers, table_size;
    pdkv_source *sources; /* open, and closed with threads that have not been joined */
    int64_t next_read;
};

/* Waits for work. 1 with a slice; 0 when the peer is over, or when nothing is there and `wait` is 0. */
int pdkv_take_slice(pdkv_source *source, uint64_t most_bytes, int wait, pdkv_slice *slice);

/* Gives a slice back: its bytes are there, or nothing writes to them any more. */
void pdkv_return_slice(pdkv_source *source, const pdkv_slice *slice);

/* Walks a slice: the piece at its front, cut to what is left. 0 when it is empty. */
int pdkv_next_piece(pdkv_slice *slice, pdkv_piece *piece);

/* Ends the peer: what is queued fails, the threads leave. */
void pdkv_lose(pdkv_source *source, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Loops of a peer's threads; each returns when the peer is over. */
void pdkv_run_mapped(pdkv_stream *stream);
void pdkv_run_socket(pdkv_stream *stream);
void pdkv_unmap(pdkv_source *source);

/* Copies; past the caches where that is faster. */
void pdkv_copy(char *to, const char *from, uint64_t length);

#endif
