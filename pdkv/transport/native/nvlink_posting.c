/* See nvlink_posting.h. */
#include <poll.h>
#include <string.h>
#include <time.h>

#include "nvlink_posting.h"

/* What one thread's load brings to a warp: spans up to here go four at a time (gather_spans.cu). */
enum { SHORT_BYTES = 512, SHORT_TOGETHER = 4, WARP = 32 };

enum { ROWS_AT_ONCE = 2048 };

enum { IN_STREAM_ORDER = 1 };

typedef struct copy_attributes { /* CUmemcpyAttributes */
    int source_order;
    int source_location[2], target_location[2];
    unsigned flags;
} copy_attributes;

typedef int (*batch_of_12)(uint64_t *, uint64_t *, size_t *, size_t, copy_attributes *, size_t *, size_t, size_t *, void *);
typedef int (*batch_of_13)(uint64_t *, uint64_t *, size_t *, size_t, copy_attributes *, size_t *, size_t, void *);

void pdkv_set_calls(pdkv_gpu *gpu, const uint64_t addresses[8])
{
    void **const calls[8] = {
        (void **)&gpu->push_context, (void **)&gpu->pop_context, (void **)&gpu->memcpy_batch,
        (void **)&gpu->memcpy_to_device, (void **)&gpu->launch_kernel, (void **)&gpu->record_event,
        (void **)&gpu->query_event, (void **)&gpu->wait_for_event,
    };
    for (int i = 0; i < 8; i++)
        *calls[i] = (void *)(uintptr_t)addresses[i];
}

static int refused(pdkv_posting *posting, int code, const char *call)
{
    posting->code = code;
    posting->call = call;
    return code;
}

static void *next_stream(pdkv_posting *posting, unsigned num_streams)
{
    const unsigned which = posting->turn++ % num_streams;
    posting->used |= 1u << which;
    return posting->streams[which];
}

/* ---- rows ---- */

static int copy_batch(pdkv_posting *posting, uint64_t *to, uint64_t *from, size_t *bytes, size_t count, void *stream)
{
    const pdkv_gpu *gpu = posting->gpu;
    copy_attributes attributes = {.source_order = IN_STREAM_ORDER, .flags = gpu->copy_flags};
    size_t first = 0, failed = 0;
    int code;
    if (gpu->tells_failed_index)
        code = ((batch_of_12)gpu->memcpy_batch)(to, from, bytes, count, &attributes, &first, 1, &failed, stream);
    else
        code = ((batch_of_13)gpu->memcpy_batch)(to, from, bytes, count, &attributes, &first, 1, stream);
    return code ? refused(posting, code, "cuMemcpyBatchAsync") : 0;
}

static int copy_rows(pdkv_posting *posting, const pdkv_spans *spans)
{
    uint64_t to[ROWS_AT_ONCE], from[ROWS_AT_ONCE];
    size_t bytes[ROWS_AT_ONCE], made = 0;
    void *stream = next_stream(posting, posting->pace.row_streams);
    for (size_t i = 0; i < spans->count; i++) {
        if (spans->length[i] < posting->pace.long_bytes)
            continue;
        to[made] = (uint64_t)spans->local[i];
        from[made] = (uint64_t)(posting->bases[spans->memory[i]] + spans->remote[i]);
        bytes[made++] = (size_t)spans->length[i];
        if (made == ROWS_AT_ONCE) {
            if (copy_batch(posting, to, from, bytes, made, stream))
                return -1;
            made = 0;
        }
    }
    return made && copy_batch(posting, to, from, bytes, made, stream) ? -1 : 0;
}

/* ---- fragments ---- */

/* Fills the table from both ends, longer pieces from its beginning and short ones from its end, and closes the gap: so
 * each warp gets as many of either as the others, whatever their order. Returns all, and how many are not short. */
static size_t fill(pdkv_posting *posting, size_t *num_long)
{
    pdkv_cutter *cutter = &posting->cutter;
    const size_t shorts = pdkv_cut_spans(cutter, posting->table.numbers, posting->table.capacity, SHORT_BYTES, num_long);
    int64_t *behind = posting->table.numbers + 3 * (posting->table.capacity - shorts);
    if (*num_long + shorts < posting->table.capacity)
        memmove(posting->table.numbers + 3 * *num_long, behind, 3 * shorts * sizeof(int64_t));
    return *num_long + shorts;
}

static int gather(pdkv_posting *posting, size_t num_long, size_t count)
{
    const pdkv_gpu *gpu = posting->gpu;
    const pdkv_table *table = &posting->table;
    const size_t jobs = num_long + (count - num_long + SHORT_TOGETHER - 1) / SHORT_TOGETHER;
    const size_t warps = gpu->threads / WARP, wanted = (jobs + warps - 1) / warps;
    const unsigned blocks = wanted < posting->pace.blocks ? (unsigned)wanted : posting->pace.blocks;
    void *stream = next_stream(posting, PDKV_STREAMS);
    unsigned longer = (unsigned)num_long, all = (unsigned)count;
    void *arguments[] = {&posting->table.device, &longer, &all};
    int code = gpu->memcpy_to_device(table->device, table->numbers, 3 * count * sizeof(int64_t), stream);
    if (code)
        return refused(posting, code, "cuMemcpyHtoDAsync");
    code = gpu->launch_kernel(gpu->kernel, blocks, 1, 1, gpu->threads, 1, 1, 0, stream, arguments, NULL);
    return code ? refused(posting, code, "cuLaunchKernel") : 0;
}

/* ---- all ---- */

/* Looks at the next part, puts its rows on a stream and begins to cut the others. */
static pdkv_posted begin_part(pdkv_posting *posting)
{
    const pdkv_spans *all = &posting->spans;
    const pdkv_pace *pace = &posting->pace;
    if (posting->size == 0)
        posting->size = all->length[0] >= pace->long_bytes ? pace->first_rows : pace->first_fragments;
    const size_t begin = posting->next, left = all->count - begin;
    const pdkv_spans part = {left < posting->size ? left : posting->size, all->memory + begin, all->remote + begin,
                             all->local + begin, all->length + begin};
    const pdkv_survey found = pdkv_survey_spans(&part, posting->bounds, pace->long_bytes);
    if (!found.fits)
        return PDKV_BAD_SPAN;
    posting->next += part.count;
    posting->bytes += found.bytes;
    posting->size = posting->size * pace->times < pace->most ? posting->size * pace->times : pace->most;
    if (found.any_long && copy_rows(posting, &part))
        return PDKV_REFUSED;
    if (found.any_short) {
        /* As if all were like those so far. */
        const int much = (double)posting->bytes * (double)all->count >= (double)pace->few_bytes * (double)posting->next;
        posting->cutter = (pdkv_cutter){.spans = part, .bases = posting->bases, .long_bytes = pace->long_bytes,
                                        .piece_bytes = much ? pace->piece_bytes : pace->piece_bytes / 8};
        posting->cutting = 1;
    }
    return PDKV_POSTED;
}

static pdkv_posted go_on(pdkv_posting *posting)
{
    while (posting->cutting || posting->next < posting->spans.count) {
        if (!posting->cutting) {
            const pdkv_posted begun = begin_part(posting);
            if (begun != PDKV_POSTED)
                return begun;
            continue;
        }
        if (posting->table.numbers == NULL)
            return PDKV_WANTS_TABLE;
        size_t num_long = 0;
        const size_t count = fill(posting, &num_long);
        posting->cutting = posting->cutter.next < posting->cutter.spans.count;
        if (count == 0)
            continue;
        if (gather(posting, num_long, count))
            return PDKV_REFUSED;
        posting->table.numbers = NULL;
    }
    return PDKV_POSTED;
}

void pdkv_begin(pdkv_posting *posting, pdkv_spans spans)
{
    posting->spans = spans;
    posting->used = 0;
    posting->next = posting->size = 0;
    posting->bytes = 0;
    posting->cutting = 0;
    posting->table.numbers = NULL;
    posting->code = 0;
    posting->begun_ns = pdkv_now_ns();
}

static int has_ended(int life)
{
    struct pollfd process = {.fd = life, .events = POLLIN};
    return poll(&process, 1, 0) > 0;
}

pdkv_posted pdkv_post(pdkv_posting *posting)
{
    const pdkv_gpu *gpu = posting->gpu;
    void *popped;
    if (posting->next == 0 && has_ended(posting->life))
        return PDKV_PEER_ENDED;
    const int code = gpu->push_context(gpu->context);
    if (code) {
        refused(posting, code, "cuCtxPushCurrent");
        return PDKV_REFUSED;
    }
    const pdkv_posted ended = go_on(posting);
    gpu->pop_context(&popped);
    return ended;
}

int pdkv_mark(pdkv_posting *posting, void *const *events)
{
    const pdkv_gpu *gpu = posting->gpu;
    void *popped;
    int code = gpu->push_context(gpu->context);
    if (code)
        return refused(posting, code, "cuCtxPushCurrent");
    for (unsigned i = 0; i < PDKV_STREAMS; i++) {
        const int bad = posting->used >> i & 1 ? gpu->record_event(events[i], posting->streams[i]) : 0;
        code = code ? code : bad;
    }
    gpu->pop_context(&popped);
    return code ? refused(posting, code, "cuEventRecord") : 0;
}

int64_t pdkv_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
