/* The puller's owner-facing half: destinations, peers, batches, completions; and how threads take work. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pull_internal.h"

/* ---- the end of peers and batches ---- */

static void unlink_taken(pdkv_source *source, pdkv_pull *batch)
{
    for (pdkv_pull **link = &source->taken; *link != NULL; link = &(*link)->next) {
        if (*link == batch) {
            *link = batch->next;
            return;
        }
    }
}

/* Hands out nothing more. Batches that no thread works for end now, the others when their last slice comes back. */
static void finish(pdkv_source *source, int status)
{
    if (atomic_load(&source->over))
        return;
    source->status = status;
    atomic_store(&source->over, 1);
    for (pdkv_pull *batch = source->first, *next; batch != NULL; batch = next) {
        next = batch->next;
        batch->next = source->taken;
        source->taken = batch;
    }
    source->first = source->last = NULL;
    for (pdkv_pull **link = &source->taken; *link != NULL;) {
        pdkv_pull *batch = *link;
        pdkv_fail(&batch->done, status, "%s", source->why);
        if (batch->slices > 0) {
            link = &batch->next;
            continue;
        }
        *link = batch->next;
        pdkv_done_add(&source->puller->done, &batch->done);
    }
    for (unsigned i = 0; i < source->num_threads; i++)
        if (source->streams[i].fd >= 0)
            shutdown(source->streams[i].fd, SHUT_RDWR);
    pthread_cond_broadcast(&source->work);
    pthread_cond_broadcast(&source->puller->may_copy);
}

void pdkv_lose(pdkv_source *source, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&source->puller->lock);
    if (!atomic_load(&source->over))
        vsnprintf(source->why, sizeof(source->why), format, arguments);
    finish(source, PDKV_FAILED);
    pthread_mutex_unlock(&source->puller->lock);
    va_end(arguments);
}

/* ---- slices ---- */

/* Moves a cursor over `most_bytes`, or PDKV_SLICE_SPANS spans, or to the batch's end; returns the bytes passed. */
static uint64_t advance(pdkv_pull *batch, uint64_t most_bytes)
{
    uint64_t bytes = 0;
    for (unsigned spans = 0; spans < PDKV_SLICE_SPANS && batch->next_span < batch->spans.count; spans++) {
        uint64_t left = (uint64_t)batch->spans.length[batch->next_span] - batch->skip;
        if (bytes + left > most_bytes) {
            batch->skip += most_bytes - bytes;
            return most_bytes;
        }
        bytes += left;
        batch->skip = 0;
        batch->next_span++;
        if (bytes == most_bytes)
            break;
    }
    return bytes;
}

int pdkv_take_slice(pdkv_source *source, uint64_t most_bytes, int wait, pdkv_slice *slice)
{
    pthread_mutex_t *lock = &source->puller->lock;
    pthread_mutex_lock(lock);
    while (wait && source->first == NULL && !atomic_load(&source->over))
        pthread_cond_wait(&source->work, lock);
    pdkv_pull *batch = source->first;
    int took = batch != NULL && !atomic_load(&source->over);
    if (took) {
        *slice = (pdkv_slice){.batch = batch, .span = batch->next_span, .skip = batch->skip};
        slice->bytes = advance(batch, most_bytes);
        batch->slices++;
        if (batch->next_span == batch->spans.count) {
            source->first = batch->next;
            if (source->first == NULL)
                source->last = NULL;
            batch->next = source->taken;
            source->taken = batch;
        }
    }
    pthread_mutex_unlock(lock);
    return took;
}

void pdkv_return_slice(pdkv_source *source, const pdkv_slice *slice)
{
    pdkv_pull *batch = slice->batch;
    pthread_mutex_lock(&source->puller->lock);
    int whole = batch->next_span == batch->spans.count;
    if (--batch->slices == 0 && (whole || atomic_load(&source->over))) {
        unlink_taken(source, batch);
        source->carried |= batch->done.status == PDKV_OK;
        pdkv_done_add(&source->puller->done, &batch->done);
    }
    pthread_mutex_unlock(&source->puller->lock);
}

int pdkv_next_piece(pdkv_slice *slice, pdkv_piece *piece)
{
    if (slice->bytes == 0)
        return 0;
    const pdkv_spans *spans = &slice->batch->spans;
    uint64_t left = (uint64_t)spans->length[slice->span] - slice->skip;
    *piece = (pdkv_piece){
        .memory = spans->memory[slice->span],
        .remote = (uint64_t)spans->remote[slice->span] + slice->skip,
        .local = (char *)(uintptr_t)spans->local[slice->span] + slice->skip,
        .length = left < slice->bytes ? left : slice->bytes,
    };
    slice->bytes -= piece->length;
    slice->skip = 0; /* whatever follows begins with the next span */
    slice->span++;
    return 1;
}

/* ---- the puller ---- */

pdkv_puller *pdkv_puller_create(pdkv_pull_limits limits)
{
    pdkv_puller *puller = calloc(1, sizeof(*puller));
    if (puller == NULL)
        return NULL;
    puller->limits = limits;
    if (pdkv_done_open(&puller->done) != 0) {
        free(puller);
        return NULL;
    }
    pthread_mutex_init(&puller->lock, NULL);
    pthread_cond_init(&puller->may_copy, NULL);
    return puller;
}

void pdkv_puller_use_device(pdkv_puller *puller, pdkv_device *device, uint64_t slice_bytes)
{
    puller->device = device;
    puller->limits.slice_bytes = slice_bytes;
}

int pdkv_puller_add_destination(pdkv_puller *puller, uint64_t address, uint64_t length)
{
    size_t size = (puller->num_destinations + 1) * sizeof(*puller->destinations);
    pdkv_range *grown = realloc(puller->destinations, size);
    if (grown == NULL)
        return -1;
    puller->destinations = grown;
    grown[puller->num_destinations++] = (pdkv_range){address, length};
    return 0;
}

pdkv_done *pdkv_puller_poll(pdkv_puller *puller)
{
    return pdkv_done_take(&puller->done);
}

int pdkv_puller_fileno(const pdkv_puller *puller)
{
    return puller->done.fd;
}

/* ---- peers ---- */

static void *run_stream(void *argument)
{
    pdkv_stream *stream = argument;
    pdkv_source *source = stream->source;
    if (source->address.port == 0)
        pdkv_run_mapped(stream);
    else
        pdkv_run_socket(stream);
    pthread_mutex_lock(&source->puller->lock);
    source->num_left++;
    pthread_mutex_unlock(&source->puller->lock);
    return NULL;
}

/* Joins the threads and frees. They have left, or do so without waiting for anybody. */
static void free_source(pdkv_source *source)
{
    for (unsigned i = 0; i < source->num_threads; i++)
        pthread_join(source->streams[i].thread, NULL);
    pdkv_unmap(source);
    if (source->life_fd >= 0)
        close(source->life_fd);
    pthread_cond_destroy(&source->work);
    free(source->memories);
    free(source->lengths);
    free(source->maps);
    free(source->streams);
    free(source);
}

/* Frees closed peers whose threads have left. */
static void reap(pdkv_puller *puller)
{
    for (pdkv_source **link = &puller->sources; *link != NULL;) {
        pdkv_source *source = *link;
        pthread_mutex_lock(&puller->lock);
        int gone = puller->table[source->id] == NULL && source->num_left == source->num_threads;
        pthread_mutex_unlock(&puller->lock);
        if (!gone) {
            link = &source->next;
            continue;
        }
        *link = source->next;
        free_source(source);
    }
}

static pdkv_source *new_source(pdkv_puller *puller, const pdkv_far_address *address, const pdkv_far_memory *memories,
                               size_t num_memories)
{
    pdkv_source *source = calloc(1, sizeof(*source));
    if (source == NULL)
        return NULL;
    source->puller = puller;
    source->address = *address;
    source->num_memories = num_memories;
    source->life_fd = -1;
    source->memories = calloc(num_memories + 1, sizeof(*memories));
    source->lengths = calloc(num_memories + 1, sizeof(*source->lengths));
    source->maps = calloc(num_memories + 1, sizeof(*source->maps));
    source->streams = calloc(puller->limits.streams, sizeof(*source->streams));
    pthread_cond_init(&source->work, NULL);
    if (source->memories == NULL || source->lengths == NULL || source->maps == NULL || source->streams == NULL) {
        free_source(source);
        return NULL;
    }
    memcpy(source->memories, memories, num_memories * sizeof(*memories));
    for (size_t i = 0; i < num_memories; i++)
        source->lengths[i] = memories[i].length;
    return source;
}

/* Starts the threads; fewer than wanted will do, none will not. */
static int start_streams(pdkv_source *source)
{
    pthread_mutex_lock(&source->puller->lock); /* a stream that fails at once looks at num_threads */
    for (unsigned i = 0; i < source->puller->limits.streams; i++) {
        source->streams[i] = (pdkv_stream){.source = source, .fd = -1};
        if (pthread_create(&source->streams[i].thread, NULL, run_stream, &source->streams[i]) != 0)
            break;
        source->num_threads++;
    }
    unsigned started = source->num_threads;
    pthread_mutex_unlock(&source->puller->lock);
    return started > 0 ? 0 : -1;
}

int64_t pdkv_puller_connect(pdkv_puller *puller, const pdkv_far_address *address, const pdkv_far_memory *memories,
                            size_t num_memories)
{
    reap(puller);
    if (puller->num_peers == puller->table_size) {
        size_t size = puller->table_size ? 2 * puller->table_size : 16;
        pdkv_source **table = realloc(puller->table, size * sizeof(*table));
        if (table == NULL)
            return -1;
        puller->table = table;
        puller->table_size = size;
    }
    pdkv_source *source = new_source(puller, address, memories, num_memories);
    if (source == NULL)
        return -1;
    source->id = (int64_t)puller->num_peers;
    if (start_streams(source) != 0) {
        free_source(source);
        return -1;
    }
    puller->table[puller->num_peers++] = source;
    source->next = puller->sources;
    puller->sources = source;
    return source->id;
}

static pdkv_source *find(const pdkv_puller *puller, int64_t peer)
{
    return peer >= 0 && (size_t)peer < puller->num_peers ? puller->table[peer] : NULL;
}

void pdkv_puller_close_peer(pdkv_puller *puller, int64_t peer)
{
    pdkv_source *source = find(puller, peer);
    if (source == NULL)
        return;
    pthread_mutex_lock(&puller->lock);
    puller->table[peer] = NULL;
    if (!atomic_load(&source->over))
        snprintf(source->why, sizeof(source->why), "peer %lld was closed", (long long)peer);
    finish(source, PDKV_CANCELLED);
    pthread_mutex_unlock(&puller->lock);
    reap(puller);
}

int pdkv_puller_has_carried(pdkv_puller *puller, int64_t peer)
{
    pdkv_source *source = find(puller, peer);
    pthread_mutex_lock(&puller->lock);
    int carried = source != NULL && source->carried;
    pthread_mutex_unlock(&puller->lock);
    return carried;
}

void pdkv_puller_destroy(pdkv_puller *puller)
{
    for (size_t i = 0; i < puller->num_peers; i++)
        pdkv_puller_close_peer(puller, (int64_t)i);
    while (puller->sources != NULL) {
        pdkv_source *source = puller->sources;
        puller->sources = source->next;
        free_source(source);
    }
    pdkv_done_close(&puller->done);
    pthread_cond_destroy(&puller->may_copy);
    pthread_mutex_destroy(&puller->lock);
    free(puller->destinations);
    free(puller->table);
    free(puller);
}

/* ---- reads ---- */

static void enqueue(pdkv_source *source, pdkv_pull *batch)
{
    if (source->last != NULL)
        source->last->next = batch;
    else
        source->first = batch;
    source->last = batch;
    pthread_cond_broadcast(&source->work);
}

int64_t pdkv_puller_submit(pdkv_puller *puller, int64_t peer, const pdkv_spans *spans)
{
    pdkv_pull *batch = pdkv_new_batch(sizeof(*batch), offsetof(pdkv_pull, spans), spans);
    if (batch == NULL)
        return -1;
    int64_t read = batch->done.read = puller->next_read++;
    pdkv_source *source = find(puller, peer);
    int refused = 1;
    if (source == NULL) {
        pdkv_fail(&batch->done, PDKV_FAILED, "the peer is closed");
    } else {
        pdkv_bounds bounds = {source->lengths, source->num_memories, puller->destinations, puller->num_destinations};
        refused = pdkv_check_spans(&batch->spans, &bounds, &batch->done) != 0;
    }
    pthread_mutex_lock(&puller->lock);
    if (!refused && atomic_load(&source->over))
        pdkv_fail(&batch->done, PDKV_FAILED, "%s", source->why);
    if (refused || spans->count == 0 || atomic_load(&source->over))
        pdkv_done_add(&puller->done, &batch->done);
    else
        enqueue(source, batch);
    pthread_mutex_unlock(&puller->lock);
    return read;
}
