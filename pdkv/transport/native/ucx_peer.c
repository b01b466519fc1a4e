/* One peer on the engine's thread: its worker, its endpoint, its queue of batches, its gets in flight, and its end.
 *
 * Each peer that is read has a UCX worker of its own. Over shared memory all senders write into one queue of the
 * receiving worker, and a sender killed while it fills an element blocks that queue for everybody and for ever: with a
 * worker each, it takes along only its own. Destroying the worker also makes a close final beyond doubt.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ucx_internal.h"

enum {
    MOST_LANES = 16,
    TURN_SPANS = 256,           /* most gets posted before the thread looks at commands and other peers again: */
    TURN_BYTES = 32 * 1024 * 1024 /* gets that UCX does at once (mapped memory) fill no window */
};

/* The batch will not be OK; only the first reason is kept. */
static void spoil_batch(pdkv_batch *batch, ucs_status_t status)
{
    const pdkv_peer *peer = batch->peer;
    if (batch->done.status != PDKV_OK)
        return;
    if (peer->closed_by_owner)
        pdkv_fail(&batch->done, PDKV_CANCELLED, "peer %lld was closed", (long long)peer->id);
    else if (peer->lost)
        pdkv_fail(&batch->done, PDKV_FAILED, "%s", peer->why);
    else
        pdkv_fail(&batch->done, PDKV_FAILED, "read from peer %lld failed: %s", (long long)peer->id,
                  peer->engine->ucx.ucs_status_string(status));
}

int pdkv_peer_has_ended(const pdkv_peer *peer)
{
    struct pollfd life = {.fd = peer->life_fd, .events = POLLIN};
    return peer->life_fd == PDKV_ENDED || (peer->life_fd >= 0 && poll(&life, 1, 0) > 0);
}

/* Bytes are good only if the peer lived when the last of them had come: a mapping (cuda_ipc) can be read long after the
 * death of the process whose memory it was, and UCX looks for deaths twice a second. One system call a batch. */
static void confirm_batch(pdkv_batch *batch)
{
    pdkv_peer *peer = batch->peer;
    if (pdkv_peer_has_ended(peer))
        pdkv_peer_bury(peer);
    else if (peer->is_mapped && peer->life_fd == PDKV_UNWATCHED)
        pdkv_peer_lose(peer, "UCX maps its memory, and its process cannot be watched from here");
    if (peer->lost)
        spoil_batch(batch, UCS_ERR_CONNECTION_RESET);
}

static void end_batch(pdkv_batch *batch)
{
    if (batch->done.status == PDKV_OK)
        confirm_batch(batch);
    pdkv_done_add(&batch->peer->engine->done, &batch->done);
}

static void drop_queue(pdkv_peer *peer)
{
    for (pdkv_batch *batch = peer->first, *next; batch != NULL; batch = next) {
        next = batch->next;
        spoil_batch(batch, UCS_ERR_CANCELED);
        batch->spans.count = batch->next_span; /* nothing more of it is posted */
        if (batch->in_flight == 0)
            end_batch(batch);
    }
    peer->first = peer->last = NULL;
}

/* ---- opening ---- */

static void lose_by_status(pdkv_peer *peer, ucs_status_t status)
{
    pdkv_peer_lose(peer, peer->engine->ucx.ucs_status_string(status));
}

static void on_error(void *argument, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    lose_by_status(argument, status);
}

void pdkv_peer_open(pdkv_peer *peer)
{
    pdkv_ucx_api *ucx = &peer->engine->ucx;
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                      | UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = peer->address,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = on_error, .arg = peer},
    };
    if (pdkv_peer_has_ended(peer)) {
        pdkv_peer_bury(peer);
        return;
    }
    ucs_status_t status = pdkv_open_worker(peer->engine, &peer->worker, &peer->worker_fd);
    if (status != UCS_OK) {
        lose_by_status(peer, status);
        return;
    }
    peer->engine->num_open_peers++;
    status = ucx->ucp_ep_create(peer->worker, &params, &peer->ep);
    if (status != UCS_OK)
        peer->ep = NULL;
    for (size_t i = 0; status == UCS_OK && i < peer->num_memories; i++) {
        status = ucx->ucp_ep_rkey_unpack(peer->ep, peer->memories[i].key, &peer->memories[i].rkey);
        if (status != UCS_OK)
            peer->memories[i].rkey = NULL;
    }
    if (status != UCS_OK)
        lose_by_status(peer, status);
}

/* ---- posting ---- */

/* Lists what UCX connected to the peer: several network cards where it stripes long reads over them. */
static void list_lanes(const pdkv_peer *peer, char *text)
{
    ucp_transport_entry_t entries[MOST_LANES];
    ucp_ep_attr_t attributes = {
        .field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS,
        .transports = {.entries = entries, .num_entries = MOST_LANES, .entry_size = sizeof(entries[0])},
    };
    size_t used = 0;
    text[0] = 0;
    if (peer->ep == NULL || peer->engine->ucx.ucp_ep_query(peer->ep, &attributes) != UCS_OK)
        return;
    for (unsigned i = 0; i < attributes.transports.num_entries && used < PDKV_PATH_SIZE; i++)
        used += (size_t)snprintf(text + used, PDKV_PATH_SIZE - used, "%s%s/%s", i ? ", " : "",
                                 entries[i].transport_name, entries[i].device_name);
}

static void note_path(pdkv_peer *peer, void *request, size_t length)
{
    char text[PDKV_PATH_SIZE] = "", lanes[PDKV_PATH_SIZE];
    ucp_request_attr_t attributes = {
        .field_mask = UCP_REQUEST_ATTR_FIELD_INFO_STRING | UCP_REQUEST_ATTR_FIELD_INFO_STRING_SIZE,
        .debug_string = text,
        .debug_string_size = sizeof(text),
    };
    if (peer->engine->ucx.ucp_request_query(request, &attributes) != UCS_OK)
        return;
    list_lanes(peer, lanes);
    peer->longest_read = length;
    peer->is_mapped = peer->is_mapped || strstr(text, "cuda_ipc") || strstr(text, "xpmem");
    pthread_mutex_lock(&peer->engine->lock);
    memcpy(peer->path, text, sizeof(text));
    memcpy(peer->lanes, lanes, sizeof(lanes));
    pthread_mutex_unlock(&peer->engine->lock);
}

static void settle_span(pdkv_batch *batch, ucs_status_t status)
{
    if (status != UCS_OK)
        spoil_batch(batch, status);
}

static void on_get(void *request, ucs_status_t status, void *argument)
{
    pdkv_slot *slot = argument;
    pdkv_batch *batch = slot->batch;
    pdkv_peer *peer = batch->peer;
    peer->engine->ucx.ucp_request_free(request);
    peer->in_flight--;
    peer->bytes_in_flight -= slot->length;
    slot->next_free = peer->free_slots;
    peer->free_slots = slot;
    batch->in_flight--;
    settle_span(batch, status);
    if (batch->in_flight == 0 && batch->next_span == batch->spans.count)
        end_batch(batch);
}

/* Posts the next span of the batch; the caller ends the batch when that was the last and none is in flight. */
static void post_span(pdkv_peer *peer, pdkv_batch *batch)
{
    pdkv_engine *engine = peer->engine;
    size_t i = batch->next_span++;
    const pdkv_spans *spans = &batch->spans;
    const pdkv_remote_memory *remote = &peer->memories[spans->memory[i]];
    uint64_t local = (uint64_t)spans->local[i], length = (uint64_t)spans->length[i];
    int64_t registered = pdkv_find_range(engine->memories, engine->num_memories, local, length);
    pdkv_slot *slot = peer->free_slots;
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH,
        .cb = {.send = on_get},
        .user_data = slot,
        .memh = engine->handles[registered], /* checked when it was submitted */
    };
    int ask_path = length > 2 * peer->longest_read;
    if (ask_path)
        params.op_attr_mask |= UCP_OP_ATTR_FLAG_NO_IMM_CMPL; /* only a request can be asked */
    slot->batch = batch;
    slot->length = length;
    ucs_status_ptr_t request =
        engine->ucx.ucp_get_nbx(peer->ep, (void *)(uintptr_t)local, length,
                                remote->address + (uint64_t)spans->remote[i], remote->rkey, &params);
    if (!UCS_PTR_IS_PTR(request)) {
        settle_span(batch, UCS_PTR_STATUS(request));
        return;
    }
    peer->free_slots = slot->next_free;
    peer->in_flight++;
    peer->bytes_in_flight += length;
    batch->in_flight++;
    if (ask_path)
        note_path(peer, request, length);
}

int pdkv_peer_post(pdkv_peer *peer)
{
    const pdkv_limits *limits = &peer->engine->limits;
    size_t bytes = 0;
    int spans = 0;
    while (peer->first != NULL && spans < TURN_SPANS && bytes < TURN_BYTES && !peer->lost) {
        pdkv_batch *batch = peer->first;
        if (batch->done.status == PDKV_OK && batch->next_span < batch->spans.count) {
            if (peer->free_slots == NULL || peer->bytes_in_flight >= limits->window_bytes)
                break;
            bytes += (size_t)batch->spans.length[batch->next_span];
            spans++;
            post_span(peer, batch);
        }
        if (batch->done.status != PDKV_OK)
            batch->spans.count = batch->next_span; /* nothing more of it is posted */
        if (batch->next_span < batch->spans.count)
            continue;
        peer->first = batch->next;
        if (peer->first == NULL)
            peer->last = NULL;
        if (batch->in_flight == 0)
            end_batch(batch);
    }
    return spans > 0;
}

void pdkv_peer_submit(pdkv_peer *peer, pdkv_batch *batch)
{
    if (peer->lost) {
        spoil_batch(batch, UCS_ERR_CONNECTION_RESET);
        end_batch(batch);
        return;
    }
    batch->next = NULL;
    if (peer->first == NULL)
        peer->first = batch;
    else
        peer->last->next = batch;
    peer->last = batch;
}

/* ---- the end ---- */

void pdkv_peer_lose(pdkv_peer *peer, const char *why)
{
    if (peer->lost)
        return;
    peer->lost = 1; /* the endpoint is closed by reap, outside of UCX's callback */
    snprintf(peer->why, sizeof(peer->why), "peer %lld is lost: %s", (long long)peer->id, why);
}

void pdkv_peer_bury(pdkv_peer *peer)
{
    pdkv_peer_lose(peer, "its process has ended");
}

/* Begins the end that the owner asked for: posts nothing more and gives what is in flight a moment to arrive. */
void pdkv_peer_drain(pdkv_peer *peer)
{
    pdkv_engine *engine = peer->engine;
    drop_queue(peer);
    if (peer->ep == NULL || peer->lost)
        return;
    ucp_request_param_t params = {.op_attr_mask = 0};
    ucs_status_ptr_t flush = engine->ucx.ucp_ep_flush_nbx(peer->ep, &params);
    peer->flush = UCS_PTR_IS_PTR(flush) ? flush : NULL;
    peer->draining = 1;
    peer->drain_until_s = pdkv_now_s() + 1e-3 * engine->limits.drain_ms;
}

static int has_drained(pdkv_peer *peer)
{
    int flushed = peer->flush == NULL || peer->engine->ucx.ucp_request_check_status(peer->flush) != UCS_INPROGRESS;
    return (flushed && peer->in_flight == 0) || peer->lost || pdkv_now_s() > peer->drain_until_s;
}

static void close_endpoint(pdkv_peer *peer)
{
    pdkv_ucx_api *ucx = &peer->engine->ucx;
    drop_queue(peer);
    if (peer->ep == NULL)
        return;
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
    ucp_ep_h ep = peer->ep;
    peer->ep = NULL; /* first: closing runs callbacks of gets */
    ucs_status_ptr_t request = ucx->ucp_ep_close_nbx(ep, &params);
    peer->closing = UCS_PTR_IS_PTR(request) ? request : NULL;
}

static void close_worker(pdkv_peer *peer)
{
    pdkv_ucx_api *ucx = &peer->engine->ucx;
    for (size_t i = 0; i < peer->num_memories; i++)
        if (peer->memories[i].rkey != NULL)
            ucx->ucp_rkey_destroy(peer->memories[i].rkey);
    ucx->ucp_worker_destroy(peer->worker);
    peer->worker = NULL;
    peer->engine->num_open_peers--;
}

int pdkv_peer_reap(pdkv_peer *peer)
{
    pdkv_ucx_api *ucx = &peer->engine->ucx;
    int moved = 0;
    if ((peer->lost && (peer->ep != NULL || peer->first != NULL)) || (peer->draining && has_drained(peer))) {
        peer->draining = 0;
        close_endpoint(peer);
        moved = 1;
    }
    if (peer->flush != NULL && ucx->ucp_request_check_status(peer->flush) != UCS_INPROGRESS) {
        ucx->ucp_request_free(peer->flush);
        peer->flush = NULL;
    }
    if (peer->closing != NULL && ucx->ucp_request_check_status(peer->closing) != UCS_INPROGRESS) {
        ucx->ucp_request_free(peer->closing);
        peer->closing = NULL;
        moved = 1;
    }
    int over = peer->lost || peer->closed_by_owner;
    if (over && peer->ep == NULL && peer->closing == NULL && peer->flush == NULL && peer->in_flight == 0
        && peer->worker != NULL) {
        close_worker(peer);
        moved = 1;
    }
    return moved;
}

int pdkv_peer_is_gone(const pdkv_peer *peer)
{
    return peer->closed_by_owner && peer->worker == NULL;
}

void pdkv_peer_free(pdkv_peer *peer)
{
    for (size_t i = 0; i < peer->num_memories; i++)
        free(peer->memories[i].key);
    if (peer->life_fd >= 0)
        close(peer->life_fd);
    free(peer->memories);
    free(peer->lengths);
    free(peer->address);
    free(peer->slots);
    free(peer);
}
