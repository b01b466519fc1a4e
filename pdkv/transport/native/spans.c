/* See spans.h. */
#include "spans.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

enum { AT_ONCE = 1024 };

/* Spans of one far and one near memory: all is additions, whose sign bits tell, so the compiler makes vectors of it. None
 * that is at fault gets by through an overflow: lengths of memories are positive, so `most - length` has its sign for
 * any positive length, and with it `far - length` and `near - length` are positive, from which any offset of 63 bits can
 * be taken; an offset that wraps from below to above is larger than what it is taken from. */
WIDE static pdkv_survey survey_alike(const pdkv_spans *spans, uint64_t far, pdkv_range near, int64_t long_bytes)
{
    const int64_t *memory = spans->memory, *remote = spans->remote, *local = spans->local, *lengths = spans->length;
    const uint64_t most = far < near.length ? far : near.length, wanted = (uint64_t)long_bytes;
    const int64_t only = memory[0];
    uint64_t bad = 0, others = 0, is_long = 0, is_short = 0, bytes = 0;
    for (size_t i = 0; i < spans->count; i++) {
        const uint64_t length = (uint64_t)lengths[i], there = (uint64_t)remote[i];
        const uint64_t here = (uint64_t)local[i] - near.address;
        others |= (uint64_t)(memory[i] ^ only);
        bad |= length | (length - 1) | (most - length) | there | (far - length - there) | here
               | (near.length - length - here);
        is_long |= wanted - 1 - length;
        is_short |= length - wanted;
        bytes += length;
    }
    return (pdkv_survey){others == 0 && (int64_t)bad >= 0, (int64_t)is_long < 0, (int64_t)is_short < 0, bytes};
}

static pdkv_survey survey_mixed(const pdkv_spans *spans, const pdkv_bounds *bounds, int64_t long_bytes)
{
    pdkv_survey found = {1, 0, 0, 0};
    for (size_t i = 0; i < spans->count && found.fits; i++) {
        const uint64_t memory = (uint64_t)spans->memory[i], there = (uint64_t)spans->remote[i];
        const uint64_t length = (uint64_t)spans->length[i];
        found.fits = spans->length[i] > 0 && memory < bounds->num_far && length <= bounds->far[memory]
                     && there <= bounds->far[memory] - length
                     && pdkv_find_range(bounds->near, bounds->num_near, (uint64_t)spans->local[i], length) >= 0;
        found.any_long |= spans->length[i] >= long_bytes;
        found.any_short |= spans->length[i] < long_bytes;
        found.bytes += length;
    }
    return found;
}

pdkv_survey pdkv_survey_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, int64_t long_bytes)
{
    pdkv_survey all = {1, 0, 0, 0};
    for (size_t begin = 0; begin < spans->count && all.fits; begin += AT_ONCE) {
        const size_t left = spans->count - begin;
        const pdkv_spans some = {left < AT_ONCE ? left : AT_ONCE, spans->memory + begin, spans->remote + begin,
                                 spans->local + begin, spans->length + begin};
        const int64_t near = pdkv_find_range(bounds->near, bounds->num_near, (uint64_t)some.local[0], 1);
        pdkv_survey found = {0, 0, 0, 0};
        if (near >= 0 && (uint64_t)some.memory[0] < bounds->num_far)
            found = survey_alike(&some, bounds->far[some.memory[0]], bounds->near[near], long_bytes);
        if (!found.fits)
            found = survey_mixed(&some, bounds, long_bytes);
        all.fits = found.fits;
        all.any_long |= found.any_long;
        all.any_short |= found.any_short;
        all.bytes += found.bytes;
    }
    return all;
}

size_t pdkv_cut_spans(pdkv_cutter *cutter, int64_t *table, size_t capacity, int64_t short_bytes, size_t *num_long)
{
    const pdkv_spans spans = cutter->spans;
    const int64_t piece_bytes = cutter->piece_bytes, long_bytes = cutter->long_bytes;
    size_t next = cutter->next;
    int64_t done = cutter->done, *front = table, *back = table + 3 * capacity;
    while (next < spans.count && front < back) {
        const int64_t left = spans.length[next] - done, bytes = left <= piece_bytes ? left : piece_bytes;
        if (spans.length[next] >= long_bytes) {
            next++;
            continue;
        }
        const int is_short = bytes <= short_bytes;
        back -= is_short ? 3 : 0;
        int64_t *piece = is_short ? back : front;
        front += is_short ? 0 : 3;
        piece[0] = spans.local[next] + done;
        piece[1] = cutter->bases[spans.memory[next]] + spans.remote[next] + done;
        piece[2] = bytes;
        done += bytes;
        if (done == spans.length[next]) {
            next++;
            done = 0;
        }
    }
    cutter->next = next;
    cutter->done = done;
    *num_long = (size_t)(front - table) / 3;
    return capacity - (size_t)(back - table) / 3;
}
