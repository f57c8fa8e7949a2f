// remap.cu: stage 2. The keys of every list by descending score, ties by smaller index, one block a list: `remap` by
// levels in one counting pass, `remap_digits` exactly (or by very many levels) in a few.
//   scores     [lists' heads, starts[segments]]  half or float  (SCORE_HALF) scores of a list from starts[segment] on
//   starts     [segments + 1]                    int64          multiples of 64
//   history    [segments]                        int32          scores of a list
//   kv_offsets [lists' heads, segments + 1]      int64          where a list goes; row stride offsets_stride
//   kv_order   [keys]                            int32          the answer: the first offsets[s+1] - offsets[s] keys
// levels > 0: finite scores are cut into that many equal steps between the list's least and greatest, in float32
// without contraction; 0: exact. +inf leads, -inf and NaN close.
// grid (segments, lists' heads)   block warps * 32 (at most 512)
// macros SCORE_HALF (0, 1)
#define IS_BF16 0
#include "half.cuh"

#define POSITIVE_INFINITY __int_as_float(0x7f800000)

#if SCORE_HALF
typedef unsigned short score_t;
__device__ __forceinline__ float to_float(score_t x) { return half_to_float(x); }
#else
typedef float score_t;
__device__ __forceinline__ float to_float(score_t x) { return x; }
#endif

constexpr int MAX_WARPS = 16;
constexpr int AHEAD = 4;           // scores a lane loads before it deals the first of their keys out
constexpr int GROUP = 32 * AHEAD;  // keys of a warp's step
constexpr int AT_ONCE = 4;         // words of places that a warp writes at once

struct Scale {
    float high, factor;  // level = (high - score) * factor
    int levels;
    bool special;  // some score is not finite
};

// A score's bin, smaller first: +inf, the levels, then -inf and NaN.
template <bool SPECIAL>
__device__ __forceinline__ int bin_of(float x, const Scale& scale) {
    const int bin = 1 + min((int)__fmul_rn(__fsub_rn(scale.high, x), scale.factor), scale.levels - 1);
    if (!SPECIAL) return bin;
    return x - x == 0.f ? bin : x > 0.f ? 0 : scale.levels + 1;
}

// A score's place in the exact order, as an unsigned number: smaller comes first.
__device__ __forceinline__ unsigned int exact_key(float x) {
    if (x != x || x == -POSITIVE_INFINITY) return 0xffffffffu;
    const unsigned int bits = __float_as_uint(x == 0.f ? 0.f : x);
    return ~(bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

// Adds to a counter in shared memory.
__device__ __forceinline__ void add(unsigned int* counters, int i, unsigned int x) {
#ifdef S2O_EMULATION
    counters[i] += x;
#else
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"((unsigned int)__cvta_generic_to_shared(counters) + 4 * i), "r"(x) : "memory");
#endif
}

// What a counter in shared memory held before it was added to.
__device__ __forceinline__ unsigned int take(unsigned int* counters, int i, unsigned int x) {
#ifdef S2O_EMULATION
    const unsigned int before = counters[i];
    counters[i] += x;
#else
    unsigned int before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"((unsigned int)__cvta_generic_to_shared(counters) + 4 * i), "r"(x) : "memory");
#endif
    return before;
}

// Exclusive scan of `x` over the block, in thread order.
__device__ int scan_block(int x) {
    __shared__ int warp_totals[MAX_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = x;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    int base = 0;
    for (int w = 0; w < warp; ++w) base += warp_totals[w];
    __syncthreads();
    return base + sum - x;
}

// Calls `use` with each of the scores [first, last), `threads` of them sharing the work 16 bytes at a time. `first` is a
// multiple of 32 past an address on 16 bytes.
template <typename Use>
__device__ __forceinline__ void for_each_score(const score_t* scores, int first, int last, int thread, int threads, Use use) {
    constexpr int EACH = 16 / sizeof(score_t);
    const int whole = last / EACH * EACH;
#pragma unroll 2
    for (int i = first + EACH * thread; i < whole; i += EACH * threads) {
        score_t x[EACH];
        *(uint4*)x = *(const uint4*)(scores + i);
#pragma unroll
        for (int j = 0; j < EACH; ++j) use(to_float(x[j]));
    }
    if (first < last && thread < last - whole) use(to_float(scores[whole + thread]));
}

#if SCORE_HALF
// Of two pairs of halves, the lesser and the greater of each; NaN is ignored by the one and wins the other.
__device__ __forceinline__ unsigned int min_halves(unsigned int x, unsigned int y) {
#ifdef S2O_EMULATION
    auto least = [](score_t a, score_t b) { return to_float(a) < to_float(b) || to_float(b) != to_float(b) ? a : b; };
    return least((score_t)x, (score_t)y) | least((score_t)(x >> 16), (score_t)(y >> 16)) << 16;
#else
    asm("min.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
#endif
}
__device__ __forceinline__ unsigned int max_halves(unsigned int x, unsigned int y) {
#ifdef S2O_EMULATION
    auto greatest = [](score_t a, score_t b) { return to_float(a) > to_float(b) || to_float(a) != to_float(a) ? a : b; };
    return greatest((score_t)x, (score_t)y) | greatest((score_t)(x >> 16), (score_t)(y >> 16)) << 16;
#else
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
#endif
}

// The least and the greatest of n scores, pairs at a time, as far as this thread's share goes; false where some score is
// not finite.
__device__ __forceinline__ bool half_range(const score_t* scores, int n, float& low, float& high) {
    unsigned int least = 0x7c007c00u, greatest = 0xfc00fc00u;  // infinities
#pragma unroll 4
    for (int i = 8 * threadIdx.x; i < n / 8 * 8; i += 8 * blockDim.x) {
        const uint4 x = *(const uint4*)(scores + i);
        least = min_halves(min_halves(least, min_halves(x.x, x.y)), min_halves(x.z, x.w));
        greatest = max_halves(max_halves(greatest, max_halves(x.x, x.y)), max_halves(x.z, x.w));
    }
    if (threadIdx.x < n % 8) {
        const unsigned int x = scores[n / 8 * 8 + threadIdx.x] * 0x10001u;
        least = min_halves(least, x), greatest = max_halves(greatest, x);
    }
    const float a = to_float((score_t)least), b = to_float((score_t)(least >> 16));
    const float c = to_float((score_t)greatest), d = to_float((score_t)(greatest >> 16));
    low = fminf(a, b), high = fmaxf(c, d);
    // A thread without scores keeps the infinities it started with.
    return 8 * threadIdx.x >= n / 8 * 8 && threadIdx.x >= n % 8 || low - low == 0.f && c - c == 0.f && d - d == 0.f;
}
#endif

// The levels of a list of n scores; the whole block calls it.
__device__ Scale scale_of(const score_t* scores, int n, int levels) {
    __shared__ float least[MAX_WARPS], greatest[MAX_WARPS];
    float low = POSITIVE_INFINITY, high = -POSITIVE_INFINITY;
    bool special = true;
#if SCORE_HALF
    special = __syncthreads_or(!half_range(scores, n, low, high));
#endif
    if (special) {
        bool finite = true;
        low = POSITIVE_INFINITY, high = -POSITIVE_INFINITY;
        for_each_score(scores, 0, n, threadIdx.x, blockDim.x, [&](float x) {
            if (x - x == 0.f) low = fminf(low, x), high = fmaxf(high, x);
            else finite = false;
        });
        special = __syncthreads_or(!finite);
    }
    for (int step = 16; step; step /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, step));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    if (threadIdx.x % 32 == 0) least[threadIdx.x / 32] = low, greatest[threadIdx.x / 32] = high;
    __syncthreads();
    for (int w = 0; w < blockDim.x / 32; ++w) low = fminf(low, least[w]), high = fmaxf(high, greatest[w]);
    const float factor = high > low ? __fdiv_rn((float)levels, __fsub_rn(high, low)) : 0.f;
    if (factor > 0.f && factor < POSITIVE_INFINITY) return {high, factor, levels, special};
    return {0.f, 0.f, levels, special};  // every finite score has level 0
}

// `remap` takes a list a chunk of keys at a time. Each warp counts the bins of its run of the chunk; a scan over (bin,
// warp) gives places; the warp deals its keys out into shared memory, 16 bits each, by atomics on its own counters, 32
// keys an instruction. Then the chunk is written in whole sectors: a place belongs to the bin whose head is the last at
// or before it. Equal keys of one instruction come out in order where the hardware serves lanes in order, which nothing
// promises: what is written is checked on the way, and sorted where need be, so no answer depends on it.
// Bins that start past the keys wanted are counted once and dealt never.
// Counters are 16 bits, two warps a word. A place 65536 carries into the other half where no key is left to be placed.
// shared memory (warps / 2 + 2) * bins * 4 + chunk / 4 + chunk * 2 bytes; bins = levels + 2; warps a multiple of 4
//   chunk   a multiple of 128, from 2 * bins + 2 to 65536
struct __align__(8) Heads {
    unsigned int bits;  // of 32 places, those where a bin starts
    int before;         // bins that start before them
};

// Calls `use` with two flags as compile-time constants.
template <bool VALUE>
struct Flag {
    __device__ constexpr bool operator()() const { return VALUE; }
};
template <typename Use>
__device__ __forceinline__ void choose(bool special, bool all, Use use) {
    if (special) use(Flag<true>(), Flag<false>());
    else if (all) use(Flag<false>(), Flag<true>());
    else use(Flag<false>(), Flag<false>());
}

// Counts `bins` of the scores [first, last) that are `most` or less.
template <bool SPECIAL, bool ALL>
__device__ __forceinline__ void count_bins(
    const score_t* scores, int first, int last, int thread, int threads, const Scale& scale, int most, unsigned int* bins,
    unsigned int one) {
    for_each_score(scores, first, last, thread, threads, [&](float x) {
        const int bin = bin_of<SPECIAL>(x, scale);
        if (ALL || bin <= most) add(bins, bin, one);
    });
}

// Deals the keys [first, last) whose bin is `most` or less out to their places, by the warp that owns `next_place`.
template <bool SPECIAL, bool ALL>
__device__ __forceinline__ void deal(
    const score_t* scores, int first, int last, const Scale& scale, int most, unsigned int* next_place,
    int odd, int base, unsigned short* places) {
    const int lane = threadIdx.x % 32, whole = first + (last - first) / GROUP * GROUP;
    auto group = [&](const float (&x)[AHEAD], int start, auto active) {
        int bin[AHEAD], place[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) bin[j] = bin_of<SPECIAL>(x[j], scale);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (active(j, bin[j])) place[j] = take(next_place, bin[j], odd ? 0x10000u : 1u) >> 16 * odd & 0xffff;
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (active(j, bin[j])) places[place[j]] = (unsigned short)(start - base + 32 * j);
        __syncwarp();
    };
    // The next scores are on their way while these keys are dealt out.
    score_t ahead[AHEAD];
    auto fetch = [&](int start) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) ahead[j] = scores[start + 32 * j];
    };
    if (first < whole) fetch(first + lane);
    for (int start = first; start < whole; start += GROUP) {
        float x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) x[j] = to_float(ahead[j]);
        fetch(min(start + GROUP, whole - GROUP) + lane);
        group(x, start + lane, [=](int, int bin) { return ALL || bin <= most; });
    }
    if (whole < last) {
        float x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) x[j] = to_float(scores[min(whole + lane + 32 * j, last - 1)]);
        group(x, whole + lane, [=](int j, int bin) { return bin <= most && whole + lane + 32 * j < last; });
    }
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2) remap(
    const score_t* __restrict__ scores, const long long* __restrict__ starts, const int* __restrict__ history,
    const long long* __restrict__ kv_offsets, long long offsets_stride, int* __restrict__ kv_order, int segments,
    int levels, int chunk) {
    extern __shared__ int shared[];
    __shared__ int last_wanted, dealt_end;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x, warps = threads / 32;
    const int s = segments - 1 - blockIdx.x;  // the longest lists first
    const int n = history[s], bins = levels + 2, rows = warps / 2, words = chunk / 32;
    const long long* offsets = kv_offsets + blockIdx.y * offsets_stride + s;
    const int wanted = (int)(offsets[1] - offsets[0]);
    if (n == 0 || wanted == 0) return;
    scores += blockIdx.y * starts[segments] + starts[s];
    int* const out = kv_order + offsets[0];
    unsigned int* const counts = (unsigned int*)shared;  // [rows][bins]
    int* const next = (int*)(counts + rows * bins);      // [bins] where a bin's next key goes in the list
    int* const shifts = next + bins;                     // [bins that have keys] from a place in the chunk to the list
    Heads* const heads = (Heads*)(shifts + bins);        // [words]
    unsigned short* const places = (unsigned short*)(heads + words);  // [chunk]
    int* const bin_starts = (int*)places;                // [bins + 1] in the chunk, before anything is dealt
    unsigned int* const mine = counts + warp / 2 * bins;
    const unsigned int one = warp % 2 ? 0x10000u : 1u;
    const int per_thread = (bins + threads - 1) / threads;
    const int bin_first = min((int)threadIdx.x * per_thread, bins), bin_last = min(bin_first + per_thread, bins);
    const int words_each = (words + threads - 1) / threads;
    const int word_first = min((int)threadIdx.x * words_each, words), word_last = min(word_first + words_each, words);

    const Scale scale = scale_of(scores, n, levels);
    for (int i = threadIdx.x; i < bins; i += threads) next[i] = 0;

    for (int base = 0; base < n; base += chunk) {
        const int size = min(chunk, n - base), run = (size + warps * GROUP - 1) / (warps * GROUP) * GROUP;
        const int first = base + min(warp * run, size), last = min(first + run, base + size);
        for (int i = threadIdx.x; i < rows * bins / 2; i += threads) ((unsigned long long*)counts)[i] = 0;
        for (int i = threadIdx.x; i < words; i += threads) heads[i].bits = 0;
        __syncthreads();
        const int most = base == 0 ? bins : last_wanted;
        auto count = [&](auto special, auto all) {
            count_bins<special(), all()>(scores, first, last, lane, 32, scale, most, mine, one);
            if (base == 0)
                count_bins<special(), true>(scores, size, n, threadIdx.x, threads, scale, most, (unsigned int*)next, 1u);
        };
        choose(scale.special, most >= levels + 1, count);
        __syncthreads();

        int here = 0, all = 0;
        for (int b = bin_first; b < bin_last; ++b) {
            unsigned int both = 0;
#pragma unroll
            for (int r = 0; r < MAX_WARPS / 2; ++r)
                if (r < rows) both += counts[r * bins + b];
            here += (both & 0xffff) + (both >> 16);
            all += next[b];
        }
        int place = scan_block(here), list_place = base == 0 ? scan_block(here + all) : 0;
        for (int b = bin_first; b < bin_last; ++b) {
            const int start = place;
            unsigned int both[MAX_WARPS / 2];
#pragma unroll
            for (int r = 0; r < MAX_WARPS / 2; ++r) both[r] = r < rows ? counts[r * bins + b] : 0;
#pragma unroll
            for (int r = 0; r < MAX_WARPS / 2; ++r) {
                const int even = place, odd = even + (both[r] & 0xffff);
                place = odd + (both[r] >> 16);
                if (r < rows) counts[r * bins + b] = (even & 0xffff) | odd << 16;
            }
            if (base == 0) {
                const int count = place - start + next[b];
                next[b] = list_place;
                if (list_place < wanted && list_place + count >= wanted) last_wanted = b;
                list_place += count;
            }
            bin_starts[b] = start;
            if (b == bins - 1) bin_starts[bins] = place;
            if (place > start) atomicOr(&heads[start / 32].bits, 1u << start % 32);
        }
        __syncthreads();
        const int last_bin = last_wanted;
        int bits = 0;
        for (int i = word_first; i < word_last; ++i) bits += __popc(heads[i].bits);
        bits = scan_block(bits);
        for (int i = word_first; i < word_last; ++i) heads[i].before = bits, bits += __popc(heads[i].bits);
        __syncthreads();
        for (int b = bin_first; b < min(bin_last, last_bin + 1); ++b) {
            const int start = bin_starts[b], end = bin_starts[b + 1];
            if (b == last_bin) dealt_end = end;
            if (start == end) continue;
            const Heads& head = heads[start / 32];
            shifts[head.before + __popc(head.bits & ((1u << start % 32) - 1))] = next[b] - start;
            next[b] += end - start;
        }
        __syncthreads();
        const int dealt = dealt_end;
        choose(scale.special, last_bin >= levels + 1, [&](auto special, auto all) {
            deal<special(), all()>(scores, first, last, scale, last_bin, mine, warp % 2, base, places);
        });
        __syncthreads();

        for (bool sorted = false; !sorted;) {
            bool disordered = false;
            auto write = [&](int first_place, auto whole) {  // AT_ONCE words of places
                const Heads* const here = heads + first_place / 32;
                const unsigned short* const from = places + first_place + lane;
                int key[AT_ONCE], shift[AT_ONCE];
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const Heads head = here[j];
                    key[j] = from[32 * j];
                    const bool inside = whole() || first_place + 32 * j + lane < dealt;
                    disordered |= from[32 * j - 1] >= key[j] && !(head.bits & 1u << lane) && inside;
                    shift[j] = shifts[head.before + __popc(head.bits & (2u << lane) - 1) - 1];
                    if (!inside) shift[j] = wanted;
                }
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const int to = first_place + lane + 32 * j + shift[j];
                    if (to < wanted) out[to] = base + key[j];
                }
            };
            for (int i = 32 * AT_ONCE * warp; i < dealt; i += 32 * AT_ONCE * warps) {
                if (i + 32 * AT_ONCE <= dealt) write(i, Flag<true>());
                else write(i, Flag<false>());
            }
            sorted = !__syncthreads_or(disordered);
            for (bool moved = !sorted; moved;) {  // odd-even transposition inside the bins
                moved = false;
                for (int odd = 0; odd < 2; ++odd) {
                    for (int at = 2 * threadIdx.x + 1 + odd; at < dealt; at += 2 * threads) {
                        const unsigned short before = places[at - 1], key = places[at];
                        if (before < key || heads[at / 32].bits >> at % 32 & 1) continue;
                        places[at - 1] = key, places[at] = before, moved = true;
                    }
                    __syncthreads();
                }
                moved = __syncthreads_or(moved);
            }
        }
    }
}

// `remap_digits`: passes over the bits of a score's place in the order, `bins` a power of two at a time, from the least
// digit on; scattered from pass to pass through `scratch` [2, lists' heads, starts[segments]] int32.
// shared memory warps * bins * 4 bytes
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS) remap_digits(
    const score_t* __restrict__ scores, const long long* __restrict__ starts, const int* __restrict__ history,
    const long long* __restrict__ kv_offsets, long long offsets_stride, int* __restrict__ kv_order, int* scratch,
    int segments, int levels, int bins, int passes) {
    extern __shared__ int shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x, warps = threads / 32;
    const int s = segments - 1 - blockIdx.x;
    const long long in_head = starts[segments], at = blockIdx.y * in_head + starts[s];
    const int n = history[s];
    const long long* offsets = kv_offsets + blockIdx.y * offsets_stride + s;
    const int wanted = (int)(offsets[1] - offsets[0]);
    if (n == 0 || wanted == 0) return;
    scores += at;
    int* const counts = shared;  // [warps][bins]
    int* const mine = counts + warp * bins;
    Scale scale = {0.f, 0.f, 0, true};
    if (levels > 0) scale = scale_of(scores, n, levels);

    // Every warp's run of keys, a multiple of 32.
    const int run = (n + threads - 1) / threads * 32, first = min(warp * run, n), last = min(first + run, n);
    for (int pass = 0, shift = 0; pass < passes; ++pass, shift += __popc(bins - 1)) {
        const int* from = pass == 0 ? nullptr : scratch + (pass - 1) % 2 * gridDim.y * in_head + at;
        int* to = pass == passes - 1 ? kv_order + offsets[0] : scratch + pass % 2 * gridDim.y * in_head + at;
        const int limit = pass == passes - 1 ? wanted : n;
        auto digit = [&](int key) {
            const float x = to_float(scores[key]);
            return (int)((levels > 0 ? (unsigned int)bin_of<true>(x, scale) : exact_key(x)) >> shift & (bins - 1));
        };
        for (int i = threadIdx.x; i < warps * bins; i += threads) counts[i] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = first + lane; i < last; i += 32) atomicAdd(mine + digit(from ? from[i] : i), 1);
        __syncthreads();

        // Places: digit by digit, and within a digit warp by warp.
        const int per_thread = (bins + threads - 1) / threads;
        const int bin_first = min((int)threadIdx.x * per_thread, bins), bin_last = min(bin_first + per_thread, bins);
        int total = 0;
        for (int b = bin_first; b < bin_last; ++b)
            for (int w = 0; w < warps; ++w) total += counts[w * bins + b];
        int place = scan_block(total);
        for (int b = bin_first; b < bin_last; ++b)
            for (int w = 0; w < warps; ++w) {
                const int count = counts[w * bins + b];
                counts[w * bins + b] = place;
                place += count;
            }
        __syncthreads();

        for (int start = first; start < last; start += 32) {
            const bool active = start + lane < last;
            const int key = active ? from ? from[start + lane] : start + lane : 0, found = active ? digit(key) : bins;
            const unsigned int peers = __match_any_sync(0xffffffffu, (unsigned int)found);
            const int before = __popc(peers & ((1u << lane) - 1)), base = active ? mine[found] : 0;
            __syncwarp();
            if (active && before == 0) mine[found] = base + __popc(peers);
            __syncwarp();
            if (active && base + before < limit) to[base + before] = key;
        }
        __syncthreads();
    }
}
