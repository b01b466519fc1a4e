/* Spans by the hundred thousand, at the speed of memory: whether they may be read, and as a table for a GPU's kernel. */
#ifndef PDKV_SPANS_H
#define PDKV_SPANS_H

#include "reads.h"

typedef struct pdkv_survey {
    int fits;      /* every span lies within the bounds */
    int any_long;  /* one has at least so many bytes as were asked about; this and what follows only where it fits */
    int any_short; /* one has fewer */
    uint64_t bytes;
} pdkv_survey;

pdkv_survey pdkv_survey_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, int64_t long_bytes);

/* Where the cutting of a batch has come to. */
typedef struct pdkv_cutter {
    pdkv_spans spans;
    const int64_t *bases; /* address of each far memory */
    int64_t long_bytes;   /* spans from here on are passed over */
    int64_t piece_bytes;
    size_t next;
    int64_t done; /* bytes of the next span */
} pdkv_cutter;

/* Writes the next pieces, three numbers each: where to, where from, how many bytes. Those of more than `short_bytes` from
 * the table's beginning, the others from its end backwards, until they meet or none is left. Returns how many are short,
 * and in `num_long` how many are not. */
size_t pdkv_cut_spans(pdkv_cutter *cutter, int64_t *table, size_t capacity, int64_t short_bytes, size_t *num_long);

#endif
