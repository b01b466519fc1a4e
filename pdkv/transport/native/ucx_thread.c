/* The engine's thread: runs commands, posts, progresses, and sleeps when there is nothing to do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ucx_internal.h"

enum { CLOSE_PATIENCE_S = 10, LOOK_MS = 5 };

double pdkv_now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- registration ---- */

static int pack_key(pdkv_engine *engine, ucp_mem_h handle, pdkv_registration *registration)
{
    void *packed;
    size_t size;
    ucs_status_t status = engine->ucx.ucp_rkey_pack(engine->context, handle, &packed, &size);
    if (status != UCS_OK) {
        snprintf(registration->error, sizeof(registration->error), "ucp_rkey_pack: %s",
                 engine->ucx.ucs_status_string(status));
        return -1;
    }
    registration->key = malloc(size);
    if (registration->key != NULL) {
        memcpy(registration->key, packed, size);
        registration->key_size = size;
    }
    engine->ucx.ucp_rkey_buffer_release(packed);
    return registration->key == NULL ? -1 : 0;
}

/* UCX copies GPU memory in the context of the thread that drives it: from here on this thread has the memory's own.
 * Whoever allocated it has loaded the driver. */
static void adopt_gpu_context(uint64_t address)
{
    enum { POINTER_ATTRIBUTE_CONTEXT = 1 };
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (driver == NULL)
        return;
    int (*ask)(void *, int, uint64_t) = (int (*)(void *, int, uint64_t))dlsym(driver, "cuPointerGetAttribute");
    int (*adopt)(void *) = (int (*)(void *))dlsym(driver, "cuCtxSetCurrent");
    void *context = NULL;
    if (ask != NULL && adopt != NULL && ask(&context, POINTER_ATTRIBUTE_CONTEXT, address) == 0 && context != NULL)
        adopt(context);
    dlclose(driver);
}

static void map_memory(pdkv_engine *engine, pdkv_registration *registration)
{
    pdkv_range *ranges = realloc(engine->memories, (engine->num_memories + 1) * sizeof(*ranges));
    if (ranges != NULL)
        engine->memories = ranges;
    ucp_mem_h *handles = realloc(engine->handles, (engine->num_memories + 1) * sizeof(*handles));
    if (handles != NULL)
        engine->handles = handles;
    if (ranges == NULL || handles == NULL) {
        snprintf(registration->error, sizeof(registration->error), "out of memory");
        return;
    }
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        .address = (void *)(uintptr_t)registration->address,
        .length = registration->length,
    };
    if (registration->on_host) {
        params.field_mask |= UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
        params.memory_type = UCS_MEMORY_TYPE_HOST;
    } else {
        adopt_gpu_context(registration->address);
    }
    ucp_mem_h handle;
    ucs_status_t status = engine->ucx.ucp_mem_map(engine->context, &params, &handle);
    if (status != UCS_OK) {
        snprintf(registration->error, sizeof(registration->error), "ucp_mem_map: %s",
                 engine->ucx.ucs_status_string(status));
        return;
    }
    if (pack_key(engine, handle, registration) != 0) {
        engine->ucx.ucp_mem_unmap(engine->context, handle);
        return;
    }
    engine->handles[engine->num_memories] = handle;
    engine->memories[engine->num_memories++] = (pdkv_range){registration->address, registration->length};
}

static void run_register(pdkv_engine *engine, pdkv_registration *registration)
{
    map_memory(engine, registration);
    pthread_mutex_lock(&engine->lock);
    registration->finished = 1;
    pthread_cond_signal(&engine->registered);
    pthread_mutex_unlock(&engine->lock);
}

/* ---- commands ---- */

/* Makes room for one more peer in the poll set: its worker and its life. */
static int reserve_poll_fd(pdkv_engine *engine)
{
    size_t needed = 2 * (engine->num_open_peers + 1) + 2;
    if (needed <= engine->poll_fds_size)
        return 0;
    struct pollfd *grown = realloc(engine->poll_fds, 2 * needed * sizeof(*grown));
    if (grown == NULL)
        return -1;
    engine->poll_fds = grown;
    engine->poll_fds_size = 2 * needed;
    return 0;
}

static void run_command(pdkv_engine *engine, pdkv_command *command)
{
    switch (command->kind) {
    case PDKV_CONNECT:
        command->peer->next = engine->peers;
        engine->peers = command->peer;
        if (reserve_poll_fd(engine) == 0)
            pdkv_peer_open(command->peer);
        else
            pdkv_peer_lose(command->peer, "no memory for another peer");
        break;
    case PDKV_CLOSE_PEER:
        command->peer->closed_by_owner = 1;
        pdkv_peer_drain(command->peer);
        break;
    case PDKV_SUBMIT:
        pdkv_peer_submit(command->peer, command->batch);
        break;
    case PDKV_REGISTER:
        run_register(engine, command->registration);
        break;
    case PDKV_STOP:
        engine->stopping = 1;
        return; /* lives on the owner's stack */
    }
    free(command);
}

static int run_commands(pdkv_engine *engine)
{
    if (!atomic_load_explicit(&engine->has_commands, memory_order_relaxed))
        return 0;
    pthread_mutex_lock(&engine->lock);
    pdkv_command *command = engine->first_command;
    engine->first_command = engine->last_command = NULL;
    atomic_store(&engine->has_commands, 0);
    uint64_t count;
    ssize_t got = read(engine->command_fd, &count, sizeof(count));
    (void)got;
    pthread_mutex_unlock(&engine->lock);
    while (command != NULL) {
        pdkv_command *next = command->next;
        run_command(engine, command);
        command = next;
    }
    return 1;
}

/* ---- the loop ---- */

static int serve_peers(pdkv_engine *engine)
{
    int moved = 0;
    for (pdkv_peer **link = &engine->peers; *link != NULL;) {
        pdkv_peer *peer = *link;
        if (peer->worker != NULL)
            moved |= engine->ucx.ucp_worker_progress(peer->worker) != 0;
        moved |= pdkv_peer_post(peer);
        moved |= pdkv_peer_reap(peer);
        if (pdkv_peer_is_gone(peer)) {
            *link = peer->next;
            pdkv_peer_free(peer);
        } else {
            link = &peer->next;
        }
    }
    return moved;
}

/* 1 when it is safe to sleep on `fd`, 0 when events came in between. */
static int arm(pdkv_engine *engine, ucp_worker_h worker, int fd, struct pollfd *slot, int *timeout_ms)
{
    ucs_status_t status = engine->ucx.ucp_worker_arm(worker);
    if (status == UCS_ERR_BUSY)
        return 0;
    if (status != UCS_OK)
        *timeout_ms = 10; /* a worker that cannot be armed gives no events: it is looked at a hundred times a second */
    *slot = (struct pollfd){.fd = fd, .events = POLLIN};
    return 1;
}

static void sleep_until_event(pdkv_engine *engine)
{
    struct pollfd *fds = engine->poll_fds;
    int timeout_ms = -1;
    size_t count = 0;
    fds[count++] = (struct pollfd){.fd = engine->command_fd, .events = POLLIN};
    if (!arm(engine, engine->worker, engine->worker_fd, &fds[count++], &timeout_ms))
        return;
    for (pdkv_peer *peer = engine->peers; peer != NULL; peer = peer->next) {
        if (peer->worker != NULL && !arm(engine, peer->worker, peer->worker_fd, &fds[count++], &timeout_ms))
            return;
        if (peer->draining)
            timeout_ms = 5; /* its deadline is looked at by reap */
        peer->life_slot = 0;
        if (peer->worker != NULL && peer->life_fd >= 0 && !peer->lost) {
            peer->life_slot = count;
            fds[count++] = (struct pollfd){.fd = peer->life_fd, .events = POLLIN};
        }
    }
    if (poll(fds, count, timeout_ms) > 0)
        for (pdkv_peer *peer = engine->peers; peer != NULL; peer = peer->next)
            if (peer->life_slot > 0 && fds[peer->life_slot].revents != 0)
                pdkv_peer_bury(peer);
}

static void drain_peers(pdkv_engine *engine)
{
    for (pdkv_peer *peer = engine->peers; peer != NULL; peer = peer->next) {
        peer->closed_by_owner = 1;
        pdkv_peer_drain(peer);
    }
    double deadline = pdkv_now_s() + CLOSE_PATIENCE_S;
    while (engine->peers != NULL && pdkv_now_s() < deadline) {
        engine->ucx.ucp_worker_progress(engine->worker);
        serve_peers(engine);
    }
}

/* Whoever is awake is not told of deaths: a stream keeps the thread from its sleep, and so does, for ever, a queue whose
 * next element was left half written by a sender that was killed. */
static void look_for_deaths(pdkv_engine *engine)
{
    for (pdkv_peer *peer = engine->peers; peer != NULL; peer = peer->next)
        if (pdkv_peer_has_ended(peer))
            pdkv_peer_bury(peer);
}

void *pdkv_engine_run(void *argument)
{
    pdkv_engine *engine = argument;
    if (reserve_poll_fd(engine) != 0)
        abort(); /* not a hundred bytes left at the start */
    double last_moved_s = pdkv_now_s(), last_looked_s = last_moved_s;
    while (!engine->stopping) {
        int moved = run_commands(engine);
        moved |= serve_peers(engine);
        moved |= engine->ucx.ucp_worker_progress(engine->worker) != 0;
        double now_s = pdkv_now_s();
        if (now_s - last_looked_s > 1e-3 * LOOK_MS) {
            look_for_deaths(engine);
            last_looked_s = now_s;
        }
        if (moved)
            last_moved_s = now_s;
        else if (!engine->stopping && now_s - last_moved_s > 1e-6 * engine->limits.linger_us)
            sleep_until_event(engine);
    }
    drain_peers(engine);
    return NULL;
}

void pdkv_engine_free_ucx(pdkv_engine *engine)
{
    if (engine->peers != NULL)
        return; /* UCX did not let go of a peer's reads: keep the memory registered rather than pull it from under them */
    for (size_t i = 0; i < engine->num_memories; i++)
        engine->ucx.ucp_mem_unmap(engine->context, engine->handles[i]);
    if (engine->address != NULL)
        engine->ucx.ucp_worker_release_address(engine->worker, engine->address);
    if (engine->worker != NULL)
        engine->ucx.ucp_worker_destroy(engine->worker);
    if (engine->context != NULL)
        engine->ucx.ucp_cleanup(engine->context);
}
