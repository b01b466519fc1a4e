/* The owner's side of the engine: starting UCX, queueing commands, collecting completions. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ucx_internal.h"

pdkv_done *pdkv_engine_poll(pdkv_engine *engine)
{
    return pdkv_done_take(&engine->done);
}

static void enqueue(pdkv_engine *engine, pdkv_command *command)
{
    command->next = NULL;
    pthread_mutex_lock(&engine->lock);
    if (engine->first_command == NULL)
        engine->first_command = command;
    else
        engine->last_command->next = command;
    engine->last_command = command;
    if (atomic_exchange(&engine->has_commands, 1) == 0)
        pdkv_signal(engine->command_fd);
    pthread_mutex_unlock(&engine->lock);
}

/* ---- starting ---- */

static void apply_setting(pdkv_ucx_api *ucx, ucp_config_t *config, pdkv_setting *setting)
{
    ucs_status_t status = UCS_ERR_UNSUPPORTED;
    if (strncmp(setting->name, "LOG_", 4) != 0)
        status = ucx->ucp_config_modify(config, setting->name, setting->value);
    else if (ucx->ucs_global_opts_set_value != NULL)
        status = ucx->ucs_global_opts_set_value(setting->name, setting->value);
    setting->refused = status != UCS_OK;
}

static int start_context(pdkv_engine *engine, pdkv_setting *settings, size_t num_settings, char *error, size_t size)
{
    pdkv_ucx_api *ucx = &engine->ucx;
    ucp_config_t *config;
    ucs_status_t status = ucx->ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        snprintf(error, size, "ucp_config_read: %s", ucx->ucs_status_string(status));
        return -1;
    }
    for (size_t i = 0; i < num_settings; i++)
        apply_setting(ucx, config, &settings[i]);
    ucp_params_t params = {
        .field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
        .features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP,
        .name = "pdkv",
    };
    status = ucx->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &engine->context);
    ucx->ucp_config_release(config);
    if (status != UCS_OK) {
        engine->context = NULL;
        snprintf(error, size, "ucp_init: %s", ucx->ucs_status_string(status));
        return -1;
    }
    return 0;
}

ucs_status_t pdkv_open_worker(pdkv_engine *engine, ucp_worker_h *worker, int *fd)
{
    pdkv_ucx_api *ucx = &engine->ucx;
    ucp_worker_params_t params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        .thread_mode = UCS_THREAD_MODE_SERIALIZED, /* one may be made by the owner; all are used by one thread */
    };
    ucs_status_t status = ucx->ucp_worker_create(engine->context, &params, worker);
    if (status != UCS_OK) {
        *worker = NULL;
        return status;
    }
    status = ucx->ucp_worker_get_efd(*worker, fd);
    if (status != UCS_OK) {
        ucx->ucp_worker_destroy(*worker);
        *worker = NULL;
    }
    return status;
}

static int start_worker(pdkv_engine *engine, char *error, size_t size)
{
    pdkv_ucx_api *ucx = &engine->ucx;
    ucs_status_t status = pdkv_open_worker(engine, &engine->worker, &engine->worker_fd);
    if (status != UCS_OK) {
        snprintf(error, size, "ucp_worker_create: %s", ucx->ucs_status_string(status));
        return -1;
    }
    ucp_worker_attr_t attributes = {.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS};
    status = ucx->ucp_worker_query(engine->worker, &attributes);
    if (status != UCS_OK) {
        snprintf(error, size, "ucp_worker_query: %s", ucx->ucs_status_string(status));
        return -1;
    }
    engine->address = attributes.address;
    engine->address_size = attributes.address_length;
    return 0;
}

static int start_thread(pdkv_engine *engine)
{
    sigset_t all, before;
    sigfillset(&all); /* signals belong to the interpreter's main thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&engine->thread, NULL, pdkv_engine_run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed)
        pthread_setname_np(engine->thread, "pdkv-ucx");
    return failed ? -1 : 0;
}

static void free_engine(pdkv_engine *engine)
{
    if (engine->command_fd >= 0)
        close(engine->command_fd);
    if (engine->done.fd >= 0)
        pdkv_done_close(&engine->done);
    pthread_cond_destroy(&engine->registered);
    pthread_mutex_destroy(&engine->lock);
    free(engine->memories);
    free(engine->handles);
    free(engine->peer_table);
    free(engine->poll_fds);
    free(engine);
}

pdkv_engine *pdkv_engine_create(const char *library, pdkv_setting *settings, size_t num_settings, pdkv_limits limits,
                                char *error, size_t error_size)
{
    pdkv_engine *engine = calloc(1, sizeof(*engine));
    if (engine == NULL) {
        snprintf(error, error_size, "out of memory");
        return NULL;
    }
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->registered, NULL);
    engine->limits = limits;
    engine->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int failed = pdkv_done_open(&engine->done);
    if (engine->command_fd < 0 || failed) {
        snprintf(error, error_size, "eventfd: %s", strerror(errno));
        free_engine(engine);
        return NULL;
    }
    if (pdkv_ucx_api_load(&engine->ucx, library, error, error_size) != 0) {
        free_engine(engine);
        return NULL;
    }
    if (start_context(engine, settings, num_settings, error, error_size) != 0
        || start_worker(engine, error, error_size) != 0) {
        pdkv_engine_free_ucx(engine);
        free_engine(engine);
        return NULL;
    }
    if (start_thread(engine) != 0) {
        snprintf(error, error_size, "no thread could be started");
        pdkv_engine_free_ucx(engine);
        free_engine(engine);
        return NULL;
    }
    return engine;
}

const char *pdkv_engine_version(const pdkv_engine *engine)
{
    return engine->ucx.ucp_get_version_string();
}

const void *pdkv_engine_address(const pdkv_engine *engine, size_t *size)
{
    *size = engine->address_size;
    return engine->address;
}

int pdkv_engine_fileno(const pdkv_engine *engine)
{
    return engine->done.fd;
}

/* ---- commands ---- */

void *pdkv_engine_register(pdkv_engine *engine, uint64_t address, uint64_t length, int on_host, size_t *key_size,
                           char *error, size_t error_size)
{
    pdkv_registration registration = {.address = address, .length = length, .on_host = on_host};
    pdkv_command *command = calloc(1, sizeof(*command));
    if (command == NULL) {
        snprintf(error, error_size, "out of memory");
        return NULL;
    }
    command->kind = PDKV_REGISTER;
    command->registration = &registration;
    enqueue(engine, command);
    pthread_mutex_lock(&engine->lock);
    while (!registration.finished)
        pthread_cond_wait(&engine->registered, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    snprintf(error, error_size, "%s", registration.error);
    *key_size = registration.key_size;
    return registration.key;
}

static pdkv_peer *new_peer(pdkv_engine *engine, const void *address, size_t address_size, const pdkv_memory *memories,
                           size_t num_memories)
{
    pdkv_peer *peer = calloc(1, sizeof(*peer));
    if (peer == NULL)
        return NULL;
    peer->engine = engine;
    peer->life_fd = PDKV_UNWATCHED;
    peer->address = malloc(address_size);
    peer->memories = calloc(num_memories + 1, sizeof(*peer->memories));
    peer->lengths = calloc(num_memories + 1, sizeof(*peer->lengths));
    peer->slots = calloc(engine->limits.window_spans, sizeof(*peer->slots));
    int complete = peer->address != NULL && peer->memories != NULL && peer->lengths != NULL && peer->slots != NULL;
    for (size_t i = 0; complete && i < num_memories; i++) {
        peer->lengths[i] = memories[i].length;
        pdkv_remote_memory *remote = &peer->memories[peer->num_memories++];
        remote->address = memories[i].address;
        remote->key = malloc(memories[i].key_size);
        complete = remote->key != NULL;
        if (complete)
            memcpy(remote->key, memories[i].key, memories[i].key_size);
    }
    if (!complete) {
        pdkv_peer_free(peer);
        return NULL;
    }
    memcpy(peer->address, address, address_size);
    for (size_t i = 0; i < engine->limits.window_spans; i++) {
        peer->slots[i].next_free = peer->free_slots;
        peer->free_slots = &peer->slots[i];
    }
    return peer;
}

int64_t pdkv_engine_connect(pdkv_engine *engine, const void *address, size_t address_size,
                            const pdkv_memory *memories, size_t num_memories, int life_fd)
{
    if (engine->num_peers == engine->peer_table_size) {
        size_t size = engine->peer_table_size ? 2 * engine->peer_table_size : 16;
        pdkv_peer **table = realloc(engine->peer_table, size * sizeof(*table));
        if (table == NULL)
            return -1;
        engine->peer_table = table;
        engine->peer_table_size = size;
    }
    pdkv_command *command = calloc(1, sizeof(*command));
    pdkv_peer *peer = command ? new_peer(engine, address, address_size, memories, num_memories) : NULL;
    if (peer == NULL) {
        free(command);
        return -1;
    }
    peer->life_fd = life_fd;
    peer->id = (int64_t)engine->num_peers;
    engine->peer_table[engine->num_peers++] = peer;
    command->kind = PDKV_CONNECT;
    command->peer = peer;
    enqueue(engine, command);
    return peer->id;
}

static pdkv_peer *find_peer(const pdkv_engine *engine, int64_t peer)
{
    return peer >= 0 && (size_t)peer < engine->num_peers ? engine->peer_table[peer] : NULL;
}

void pdkv_engine_close_peer(pdkv_engine *engine, int64_t peer)
{
    pdkv_peer *found = find_peer(engine, peer);
    pdkv_command *command = found ? calloc(1, sizeof(*command)) : NULL;
    if (command == NULL)
        return;
    engine->peer_table[peer] = NULL; /* from here on the peer belongs to the engine's thread, which frees it */
    command->kind = PDKV_CLOSE_PEER;
    command->peer = found;
    enqueue(engine, command);
}

void pdkv_engine_path(pdkv_engine *engine, int64_t peer, char *path, char *lanes)
{
    pdkv_peer *found = find_peer(engine, peer);
    pthread_mutex_lock(&engine->lock);
    snprintf(path, PDKV_PATH_SIZE, "%s", found ? found->path : "");
    snprintf(lanes, PDKV_PATH_SIZE, "%s", found ? found->lanes : "");
    pthread_mutex_unlock(&engine->lock);
}

/* ---- reads ---- */

int64_t pdkv_engine_submit(pdkv_engine *engine, int64_t peer, const pdkv_spans *spans)
{
    pdkv_command *command = calloc(1, sizeof(*command));
    pdkv_batch *batch = command ? pdkv_new_batch(sizeof(*batch), offsetof(pdkv_batch, spans), spans) : NULL;
    if (batch == NULL) {
        free(command);
        return -1;
    }
    int64_t read = batch->done.read = engine->next_read++;
    batch->peer = find_peer(engine, peer);
    int refused = batch->peer == NULL;
    if (refused) {
        pdkv_fail(&batch->done, PDKV_FAILED, "peer %lld is closed", (long long)peer);
    } else {
        pdkv_bounds bounds = {batch->peer->lengths, batch->peer->num_memories, engine->memories, engine->num_memories};
        refused = pdkv_check_spans(&batch->spans, &bounds, &batch->done) != 0;
    }
    if (refused) {
        free(command);
        pdkv_done_add(&engine->done, &batch->done);
        return read;
    }
    command->kind = PDKV_SUBMIT;
    command->peer = batch->peer;
    command->batch = batch;
    enqueue(engine, command);
    return read;
}

void pdkv_engine_destroy(pdkv_engine *engine)
{
    pdkv_command stop = {.kind = PDKV_STOP};
    enqueue(engine, &stop);
    pthread_join(engine->thread, NULL);
    pdkv_engine_free_ucx(engine);
    free_engine(engine);
}
