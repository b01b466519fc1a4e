/* What the files of the engine share: its structures and who may touch them. */
#ifndef PDKV_UCX_INTERNAL_H
#define PDKV_UCX_INTERNAL_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "ucx_api.h"
#include "ucx_engine.h"

typedef struct pdkv_peer pdkv_peer;
typedef struct pdkv_batch pdkv_batch;

/* A get in flight. */
typedef struct pdkv_slot {
    struct pdkv_slot *next_free;
    pdkv_batch *batch;
    size_t length;
} pdkv_slot;

/* A submitted batch; engine thread only, once queued. `done` is what the owner gets in the end. */
struct pdkv_batch {
    pdkv_done done; /* first: the completion is the batch */
    pdkv_batch *next;
    pdkv_peer *peer;
    pdkv_spans spans; /* cut short where nothing more is to be posted */
    size_t next_span; /* first span not yet posted */
    size_t in_flight;
};

typedef struct pdkv_remote_memory {
    uint64_t address;
    void *key;
    ucp_rkey_h rkey; /* engine thread */
} pdkv_remote_memory;

struct pdkv_peer {
    pdkv_engine *engine;
    pdkv_peer *next; /* engine thread: the list of all peers */
    int64_t id;
    void *address;
    pdkv_remote_memory *memories;
    uint64_t *lengths; /* of memories; constant, for the owner */
    size_t num_memories;
    int life_fd; /* pidfd of its process, or PDKV_UNWATCHED or PDKV_ENDED; constant */
    /* engine thread */
    ucp_worker_h worker; /* the peer's own, see ucx_peer.c; NULL once it is over */
    int worker_fd;
    ucp_ep_h ep;
    int draining;              /* closing, and waiting for `flush` and the gets in flight, until `drain_until_s` */
    double drain_until_s;
    ucs_status_ptr_t flush;    /* request of the flush that ends the draining */
    ucs_status_ptr_t closing;  /* request of the endpoint's close */
    int lost;                  /* UCX reported the peer dead: close the endpoint, fail what comes */
    int closed_by_owner;       /* close_peer was called: cancel what is left, then free the peer */
    char why[PDKV_ERROR_SIZE]; /* why it was lost */
    pdkv_batch *first, *last;  /* batches with spans left to post */
    pdkv_slot *slots, *free_slots;
    size_t in_flight, bytes_in_flight;
    size_t longest_read; /* that `path` describes */
    int is_mapped;       /* some read was a copy out of memory that is mapped here */
    size_t life_slot;    /* in poll_fds, of `life_fd`; 0 = it is not among them */
    /* under engine->lock */
    char path[PDKV_PATH_SIZE], lanes[PDKV_PATH_SIZE];
};

typedef enum { PDKV_CONNECT, PDKV_CLOSE_PEER, PDKV_SUBMIT, PDKV_REGISTER, PDKV_STOP } pdkv_command_kind;

/* Owned by the queue, except for REGISTER, which lives on the stack of the owner that waits for it. */
typedef struct pdkv_command {
    struct pdkv_command *next;
    pdkv_command_kind kind;
    pdkv_peer *peer;
    pdkv_batch *batch;
    struct pdkv_registration *registration;
} pdkv_command;

typedef struct pdkv_registration {
    uint64_t address, length;
    int on_host;
    void *key;
    size_t key_size;
    char error[PDKV_ERROR_SIZE];
    int finished; /* under engine->lock, signalled by engine->registered */
} pdkv_registration;

struct pdkv_engine {
    pdkv_ucx_api ucx;
    ucp_context_h context;
    ucp_worker_h worker; /* serves the reads of peers; each peer that is read has its own */
    int worker_fd;
    ucp_address_t *address;
    size_t address_size;
    pdkv_limits limits;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t registered;
    pdkv_command *first_command, *last_command; /* under lock */
    atomic_int has_commands;
    int command_fd;
    pdkv_done_queue done;

    /* engine thread */
    pdkv_peer *peers;
    size_t num_open_peers;
    struct pollfd *poll_fds; /* room for 2 * num_open_peers + 2 */
    size_t poll_fds_size;
    int stopping;

    /* written by the engine thread while the owner waits in register, read by both */
    pdkv_range *memories;
    ucp_mem_h *handles; /* of memories */
    size_t num_memories;

    /* owner thread */
    pdkv_peer **peer_table; /* by id, NULL once closed */
    size_t num_peers, peer_table_size;
    int64_t next_read;
};

/* ucx_engine.c */
ucs_status_t pdkv_open_worker(pdkv_engine *engine, ucp_worker_h *worker, int *fd);

/* ucx_thread.c */
void *pdkv_engine_run(void *engine);
void pdkv_engine_free_ucx(pdkv_engine *engine);
double pdkv_now_s(void);

/* ucx_peer.c: engine thread only. The int results tell whether anything moved. */
void pdkv_peer_open(pdkv_peer *peer);
void pdkv_peer_submit(pdkv_peer *peer, pdkv_batch *batch);
void pdkv_peer_lose(pdkv_peer *peer, const char *why);
int pdkv_peer_has_ended(const pdkv_peer *peer);
void pdkv_peer_bury(pdkv_peer *peer); /* its process has ended */
void pdkv_peer_drain(pdkv_peer *peer);
int pdkv_peer_post(pdkv_peer *peer);
int pdkv_peer_reap(pdkv_peer *peer);
int pdkv_peer_is_gone(const pdkv_peer *peer);
void pdkv_peer_free(pdkv_peer *peer);

#endif
