/* Reads of a peer's memory by threads of our own, without the GIL: out of a mapping of it on the same host, or over
 * TCP streams. The puller is the reading side, the host (pull_host.h) is the side that is read.
 *
 * Threads: every function below is called by the transport's owner thread. Each peer has its own reading threads, which
 * sleep while there is nothing to read; how many copy at the same time is bounded for the whole puller.
 */
#ifndef PDKV_PULL_H
#define PDKV_PULL_H

#include "reads.h"

enum { PDKV_TOKEN_SIZE = 32, PDKV_MAX_MEMORIES = 64, PDKV_HOSTNAME_SIZE = 256 };

typedef struct pdkv_puller pdkv_puller;

typedef struct pdkv_pull_limits {
    unsigned streams;     /* threads of one peer, and its TCP connections */
    unsigned copies;      /* threads that copy out of mappings at the same time, over all peers */
    uint64_t slice_bytes; /* most bytes between two looks at whether the peer was closed */
} pdkv_pull_limits;

/* How one memory of a peer is found. */
typedef struct pdkv_far_memory {
    uint64_t length;
    uint64_t inode; /* mapped only: of the memfd */
    int fd;         /* mapped only: the number it has in the peer's process */
} pdkv_far_memory;

/* Where a peer's host listens, and what proves that we may read. */
typedef struct pdkv_far_address {
    unsigned char token[PDKV_TOKEN_SIZE];
    char host[PDKV_HOSTNAME_SIZE]; /* TCP: name or number; mapped: name of the abstract unix socket */
    int port;                      /* TCP; 0 = mapped */
    int pid;                       /* mapped: of the peer's process if it can be seen from here, else 0 */
} pdkv_far_address;

/* A GPU, or what stands in for one (pull_device.h). NULL with a reason in `error`. `delay_us`: of each copy. */
typedef struct pdkv_device pdkv_device;
pdkv_device *pdkv_device_cuda(char *error, size_t error_size);
pdkv_device *pdkv_device_emulated(unsigned delay_us, char *error, size_t error_size);
int pdkv_device_adopt(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error, size_t error_size);
/* Whether a thread gets buffers of `slot_bytes` and a queue of copies. Opens and closes them on a thread of its own. */
int pdkv_device_try(pdkv_device *device, size_t slot_bytes, char *error, size_t error_size);
void pdkv_device_destroy(pdkv_device *device); /* after the puller and the host that use it */

/* NULL when threads, memory or descriptors are short. */
pdkv_puller *pdkv_puller_create(pdkv_pull_limits limits);

/* All destinations lie on this device: what comes over TCP is staged, in slices of `slice_bytes` from here on. Before the
 * first destination and peer. */
void pdkv_puller_use_device(pdkv_puller *puller, pdkv_device *device, uint64_t slice_bytes);

/* Makes a range a legal destination. 0, or -1 when memory is short. */
int pdkv_puller_add_destination(pdkv_puller *puller, uint64_t address, uint64_t length);

/* Copies everything; returns the new peer's id, or -1 when memory or threads are short. */
int64_t pdkv_puller_connect(pdkv_puller *puller, const pdkv_far_address *address, const pdkv_far_memory *memories,
                            size_t num_memories);

/* Final: batches that are not complete end as cancelled, each once no thread writes for it any more. Does not wait. */
void pdkv_puller_close_peer(pdkv_puller *puller, int64_t peer);

/* Copies the spans; returns the new read's id, or -1 when memory is short. */
int64_t pdkv_puller_submit(pdkv_puller *puller, int64_t peer, const pdkv_spans *spans);

/* All completions since the last call, oldest first; each is freed by the caller with free(). */
pdkv_done *pdkv_puller_poll(pdkv_puller *puller);
int pdkv_puller_fileno(const pdkv_puller *puller);

/* Whether a read from this peer has completed well. */
int pdkv_puller_has_carried(pdkv_puller *puller, int64_t peer);

/* Closes all peers, waits for their threads, frees everything. */
void pdkv_puller_destroy(pdkv_puller *puller);

#endif
