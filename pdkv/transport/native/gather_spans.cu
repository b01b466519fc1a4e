/* Copies scattered spans from anywhere the GPU can read to anywhere it can write, with as few thread blocks as asked.
 *
 * Each warp takes every so-manieth span and copies it by itself: no two threads write the same byte, none waits for
 * another. The host cuts long spans beforehand, so that warps end at about the same time. Built at run time by NVRTC;
 * tests build it as plain C++ and run its threads one after another, so it keeps to what both understand.
 */
typedef unsigned long long u64;
typedef unsigned char u8;

static const unsigned WARP = 32;

/* AHEAD loads are under way before the first is stored: the link's latency is what a warp has to hide. */
template <typename Word, unsigned AHEAD>
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
static __device__ __forceinline__ void copy_span(u64 to, u64 from, unsigned length, unsigned lane)
{
    unsigned head = (0 - (unsigned)to) & (sizeof(Word) - 1);
    if (head > length)
        head = length;
    const unsigned words = (length - head) / sizeof(Word);
    const unsigned tail = head + words * sizeof(Word);
    if (lane < head)
        ((u8 *)to)[lane] = ((const u8 *)from)[lane];
    copy_words<Word, 4>((Word *)(to + head), (const Word *)(from + head), words, lane);
    if (lane < length - tail)
        ((u8 *)to)[tail + lane] = ((const u8 *)from)[tail + lane];
}

/* spans: [3, count]: where to, where from, how many bytes (less than 2 GiB). */
extern "C" __global__ void __launch_bounds__(512) gather_spans(const u64 *spans, u64 count)
{
    const unsigned lane = threadIdx.x % WARP;
    const u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const u64 step = (u64)gridDim.x * blockDim.x / WARP;
    if (first >= count)
        return;
    u64 to = spans[first], from = spans[count + first], length = spans[2 * count + first];
    for (u64 i = first; i < count; i += step) {
        /* The next span's numbers are on their way while this one is copied. */
        const u64 next = i + step < count ? i + step : i;
        const u64 next_to = spans[next], next_from = spans[count + next], next_length = spans[2 * count + next];
        const u64 apart = to ^ from;
        if (apart % 16 == 0)
            copy_span<uint4>(to, from, (unsigned)length, lane);
        else if (apart % 8 == 0)
            copy_span<u64>(to, from, (unsigned)length, lane);
        else if (apart % 4 == 0)
            copy_span<unsigned>(to, from, (unsigned)length, lane);
        else if (apart % 2 == 0)
            copy_span<unsigned short>(to, from, (unsigned)length, lane);
        else
            copy_span<u8>(to, from, (unsigned)length, lane);
        to = next_to;
        from = next_from;
        length = next_length;
    }
}
