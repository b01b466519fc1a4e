/* One UCX worker, owned by one native thread: commands in, completions out; the caller never waits for the network.
 *
 * Threads: every function below is called by the transport's owner thread, without the GIL. All UCX calls happen on the
 * engine's thread, which sleeps on the worker's event descriptor whenever there is nothing to do.
 */
#ifndef PDKV_UCX_ENGINE_H
#define PDKV_UCX_ENGINE_H

#include "reads.h"

enum { PDKV_PATH_SIZE = 256 };

typedef struct pdkv_engine pdkv_engine;

typedef struct pdkv_setting {
    const char *name; /* without "UCX_" */
    const char *value;
    int refused; /* out: this UCX does not know it */
} pdkv_setting;

typedef struct pdkv_limits {
    size_t window_spans; /* most gets of one peer in flight */
    size_t window_bytes; /* most bytes of one peer in flight, one span aside */
    /* How long the thread goes on looking after the last event before it sleeps. A sleeper costs the other side a
     * system call for every packet; one that lingers past the gaps of a stream costs none. */
    unsigned linger_us;
    /* How long a close waits for the gets in flight before it uses force. UCX (1.14 to 1.22) aborts the *target* when
     * an endpoint breaks while it answers an emulated get: whoever leaves lets the answers come in first. */
    unsigned drain_ms;
} pdkv_limits;

typedef struct pdkv_memory {
    uint64_t address;
    uint64_t length;
    const void *key;
    size_t key_size;
} pdkv_memory;

/* NULL with a message in `error` when UCX cannot start. */
pdkv_engine *pdkv_engine_create(const char *library, pdkv_setting *settings, size_t num_settings, pdkv_limits limits,
                                char *error, size_t error_size);

const char *pdkv_engine_version(const pdkv_engine *engine);
const void *pdkv_engine_address(const pdkv_engine *engine, size_t *size);

/* Registers memory and returns its packed key in a malloc'ed buffer that the caller frees; NULL with `error`. */
void *pdkv_engine_register(pdkv_engine *engine, uint64_t address, uint64_t length, int on_host, size_t *key_size,
                           char *error, size_t error_size);

/* What stands for the pidfd of a peer's process that cannot be watched, and of one that has ended before. */
enum { PDKV_UNWATCHED = -1, PDKV_ENDED = -2 };

/* Copies everything but `life_fd`, which is the engine's when this has succeeded; returns the new peer's id, or -1 when
 * memory is short. */
int64_t pdkv_engine_connect(pdkv_engine *engine, const void *address, size_t address_size,
                            const pdkv_memory *memories, size_t num_memories, int life_fd);
void pdkv_engine_close_peer(pdkv_engine *engine, int64_t peer);

/* Copies the spans; returns the new read's id, or -1 when memory is short. */
int64_t pdkv_engine_submit(pdkv_engine *engine, int64_t peer, const pdkv_spans *spans);

/* All completions since the last call, oldest first; each is freed by the caller with free(). */
pdkv_done *pdkv_engine_poll(pdkv_engine *engine);
int pdkv_engine_fileno(const pdkv_engine *engine);

/* What UCX says about how the longest read so far travelled, and what it connected to the peer, as in
 * "rc_mlx5/mlx5_0:1, rc_mlx5/mlx5_1:1"; "" before the first. PDKV_PATH_SIZE bytes each. */
void pdkv_engine_path(pdkv_engine *engine, int64_t peer, char *path, char *lanes);

/* Closes peers, memory, worker and context, and ends the thread. */
void pdkv_engine_destroy(pdkv_engine *engine);

#endif
