/* Copies scattered spans from anywhere the GPU can read to anywhere it can write, with as few thread blocks as asked.
 *
 * Each warp copies spans by itself: no two threads write the same byte, none waits for another. The host cuts long spans
 * beforehand and puts short ones last: a warp takes the longer ones one at a time and the short ones four at a time, so all
 * have as many of either, and end at about the same time. Built at run time by NVRTC; tests build it as plain C++ and run
 * its threads one after another, so it keeps to what both understand.
 */
typedef unsigned long long u64;
typedef unsigned char u8;

static const unsigned WARP = 32;

/* Loads that are under way before the first is stored: the link's latency is what a warp has to hide. */
static const unsigned AHEAD = 4;

/* What one load of each thread of a warp brings. */
static const unsigned SHORT_BYTES = WARP * sizeof(uint4);

struct Span {
    u64 to, from;              /* addresses */
    unsigned length, not_used; /* bytes: less than 2 GiB, as a little-endian number of 8 bytes */
};

template <typename Word>
static __device__ __forceinline__ void copy_words(Word *to, const Word *from, unsigned count, unsigned lane)
{
    for (unsigned base = lane; base < count; base += AHEAD * WARP) {
        Word held[AHEAD];
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++) {
            if (base + i * WARP < count)
                held[i] = from[base + i * WARP];
        }
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++) {
            if (base + i * WARP < count)
                to[base + i * WARP] = held[i];
        }
    }
}

/* Both ends lie equally far from a multiple of Word's size: bytes up to there, words, and bytes for the rest. */
template <typename Word>
static __device__ __forceinline__ void copy_aligned(Span span, unsigned lane)
{
    const unsigned length = span.length;
    unsigned head = (0 - (unsigned)span.to) & (sizeof(Word) - 1);
    if (head > length)
        head = length;
    const unsigned words = (length - head) / sizeof(Word);
    const unsigned tail = head + words * sizeof(Word);
    if (lane < head)
        ((u8 *)span.to)[lane] = ((const u8 *)span.from)[lane];
    copy_words<Word>((Word *)(span.to + head), (const Word *)(span.from + head), words, lane);
    if (lane < length - tail)
        ((u8 *)span.to)[tail + lane] = ((const u8 *)span.from)[tail + lane];
}

static __device__ __forceinline__ void copy_span(Span span, unsigned lane)
{
    const u64 apart = span.to ^ span.from;
    if (apart % 16 == 0)
        copy_aligned<uint4>(span, lane);
    else if (apart % 4 == 0)
        copy_aligned<unsigned>(span, lane);
    else if (apart % 2 == 0)
        copy_aligned<unsigned short>(span, lane);
    else
        copy_aligned<u8>(span, lane);
}

/* Whether the spans from here on are AHEAD short ones of whole words: then their loads go out together. Their numbers
 * are read again afterwards: kept, they would take so many registers that no second block fits beside. */
static __device__ __forceinline__ bool are_short(const Span *some)
{
    u64 all = 0;
    bool fit = true;
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
        all |= some[i].to | some[i].from | some[i].length;
        fit = fit && some[i].length <= SHORT_BYTES;
    }
    return fit && all % sizeof(uint4) == 0;
}

static __device__ __forceinline__ void copy_short(const Span *some, unsigned lane)
{
    uint4 held[AHEAD];
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
        if (lane * sizeof(uint4) < some[i].length)
            held[i] = ((const uint4 *)some[i].from)[lane];
    }
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
        if (lane * sizeof(uint4) < some[i].length)
            ((uint4 *)some[i].to)[lane] = held[i];
    }
}

extern "C" __global__ void __launch_bounds__(512) gather_spans(const Span *spans, unsigned num_long, unsigned count)
{
    const unsigned lane = threadIdx.x % WARP;
    const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const unsigned warps = gridDim.x * blockDim.x / WARP;
    if (warp < num_long) {
        Span span = spans[warp];
        for (unsigned i = warp; i < num_long; i += warps) {
            /* The next span's numbers are on their way while this one is copied. */
            const Span following = spans[i + warps < num_long ? i + warps : i];
            copy_span(span, lane);
            span = following;
        }
    }
    for (unsigned i = num_long + AHEAD * warp; i < count; i += AHEAD * warps) {
        if (i + AHEAD <= count && are_short(spans + i))
            copy_short(spans + i, lane);
        else
            for (unsigned j = i; j < count && j < i + AHEAD; j++)
                copy_span(spans[j], lane);
    }
}
