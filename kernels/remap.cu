// remap.cu: stage 2. The keys of every list by descending score, ties by smaller index, one block a list: `remap` by
// levels in one counting pass, `remap_digits` exactly (or by very many levels) in a few.
//   scores     [lists' heads, starts[segments]]  half or float  (SCORE_HALF) scores of a list from starts[segment] on
//   starts     [segments + 1]                    int64          multiples of 64
//   history    [segments]                        int32          scores of a list
//   kv_offsets [lists' heads, segments + 1]      int64          where a list goes; row stride offsets_stride
//   kv_order   [keys]                            int32          the answer: the first offsets[s+1] - offsets[s] keys
//   ranges     [lists' heads, segments, parts]   two halves     least and greatest of part_keys scores of a list, as
//              score_sm90.cu's score_means writes them; null, and with float scores: not known
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
constexpr int AHEAD = 8;          // scores a lane loads before it deals the first of their keys out
constexpr int STEP = 32 * AHEAD;  // keys of a warp's step, which may come out in any order before they are sorted

struct Scale {
    float high, factor;  // level = (high - score) * factor
    int levels;
    bool special;  // some score is not finite
};

// A score's bin, smaller first: +inf, the levels, then -inf and NaN. Where no score is special it is counted from the
// first level on.
template <bool SPECIAL>
__device__ __forceinline__ int bin_of(float x, const Scale& scale) {
    const int level = min((int)__fmul_rn(__fsub_rn(scale.high, x), scale.factor), scale.levels - 1);
    if (!SPECIAL) return level;
    return x - x == 0.f ? 1 + level : x > 0.f ? 0 : scale.levels + 1;
}

// A score's place in the exact order, as an unsigned number: smaller comes first.
__device__ __forceinline__ unsigned int exact_key(float x) {
    if (x != x || x == -POSITIVE_INFINITY) return 0xffffffffu;
    const unsigned int bits = __float_as_uint(x == 0.f ? 0.f : x);
    return ~(bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

// Adds 1 to a counter in shared memory.
__device__ __forceinline__ void add_one(int* counters, int i) {
#ifdef S2O_EMULATION
    ++counters[i];
#else
    const unsigned int address = (unsigned int)__cvta_generic_to_shared(counters) + 4 * i;
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
#endif
}

// What a counter in shared memory held before `more` was added.
__device__ __forceinline__ unsigned int take(unsigned int* counters, int i, unsigned int more) {
#ifdef S2O_EMULATION
    const unsigned int before = counters[i];
    counters[i] += more;
#else
    const unsigned int address = (unsigned int)__cvta_generic_to_shared(counters) + 4 * i;
    unsigned int before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(more) : "memory");
#endif
    return before;
}

// Asks for n scores, all of them before the first is needed.
__device__ __forceinline__ void prefetch(const score_t* scores, int n) {
#ifndef S2O_EMULATION
    constexpr int LINE = 128 / sizeof(score_t);
    for (int i = LINE * threadIdx.x; i < n; i += LINE * blockDim.x) asm volatile("prefetch.global.L2 [%0];" ::"l"(scores + i));
#endif
}

// Exclusive scan of `x` over the block, in thread order.
__device__ int scan_block(int x) {
    __shared__ int warp_totals[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto scan_warp = [&](int sum) {
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += before;
        }
        return sum;
    };
    const int sum = scan_warp(x);
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    const int totals = scan_warp(lane < blockDim.x / 32 ? warp_totals[lane] : 0);
    const int base = __shfl_sync(0xffffffffu, totals, max(warp - 1, 0));
    __syncthreads();
    return (warp ? base : 0) + sum - x;
}

// Calls `use` with each of the scores [first, last), `threads` of them sharing the work 16 bytes at a time. `first` is
// a multiple of 32 past an address on 16 bytes.
template <typename Use>
__device__ __forceinline__ void for_each_score(
    const score_t* scores, int first, int last, int thread, int threads, Use use) {
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
// The least and the greatest of n scores, pairs at a time, as far as this thread's share goes; false where some score
// is not finite.
__device__ __forceinline__ bool half_range(const score_t* scores, int n, float& low, float& high) {
    unsigned int least = 0x7c007c00u, greatest = 0xfc00fc00u;  // infinities
    const int whole = n / 8 * 8;
    for (int start = 8 * threadIdx.x; start - 8 * (int)threadIdx.x < whole; start += 64 * blockDim.x) {
        uint4 x[8];  // all on their way at once, some of the last more than once
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = *(const uint4*)(scores + min(start + 8 * j * (int)blockDim.x, whole - 8));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            least = min_halves(min_halves(least, min_halves(x[j].x, x[j].y)), min_halves(x[j].z, x[j].w));
            greatest = max_halves(max_halves(greatest, max_halves(x[j].x, x[j].y)), max_halves(x[j].z, x[j].w));
        }
    }
    if (threadIdx.x < n % 8) {
        const unsigned int x = scores[whole + threadIdx.x] * 0x10001u;
        least = min_halves(least, x), greatest = max_halves(greatest, x);
    }
    const float a = to_float((score_t)least), b = to_float((score_t)(least >> 16));
    const float c = to_float((score_t)greatest), d = to_float((score_t)(greatest >> 16));
    low = fminf(a, b), high = fmaxf(c, d);
    // A thread without scores keeps the infinities it started with.
    return n < 8 && threadIdx.x >= n || low - low == 0.f && c - c == 0.f && d - d == 0.f;
}
#endif

// The levels of a list of n scores, of which `parts` ranges are known, if any; the whole block calls it.
__device__ Scale scale_of(const score_t* scores, int n, int levels, const unsigned int* ranges, int parts) {
    __shared__ float least[MAX_WARPS], greatest[MAX_WARPS];
    float low = POSITIVE_INFINITY, high = -POSITIVE_INFINITY;
    bool special = true;
#if SCORE_HALF
    bool fine = true;
    if (ranges != nullptr) {
        for (int i = threadIdx.x; i < parts; i += blockDim.x) {
            const float a = to_float((score_t)ranges[i]), b = to_float((score_t)(ranges[i] >> 16));
            low = fminf(low, a), high = fmaxf(high, b), fine = fine && a - a == 0.f && b - b == 0.f;
        }
    } else fine = half_range(scores, n, low, high);
    special = __syncthreads_or(!fine);
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

// A flag as a compile-time constant that a lambda takes.
template <bool VALUE>
struct Flag {
    __device__ constexpr bool operator()() const { return VALUE; }
};

// What of a list is dealt out at a time: places [base, base + limit), in bins [first_bin, stop_bin).
struct Window {
    int base, limit, first_bin, stop_bin;
};

// Where a warp's next key of each bin goes: words of its own, or halves of words that two warps share.
template <bool NARROW>
struct Places {
    unsigned int* next;
    __device__ __forceinline__ static int read(unsigned int word, bool upper) {
        if (!NARROW) return word;
#ifdef S2O_EMULATION
        return upper ? word >> 16 : word & 0xffff;
#else
        return __byte_perm(word, 0, upper ? 0x4432 : 0x4410);
#endif
    }
};

// Deals out those of a warp's keys [first, last) that the window takes (ALL: every key): each to its place less the
// window's base, as its number less `origin`. The others count too, a lane in a counter of its own, `refused`, that stays
// above any place: an atomic under a condition would be a branch, which takes longer.
template <bool SPECIAL, bool ALL, bool NARROW>
__device__ __forceinline__ void deal(
    const score_t* scores, int first, int last, const Scale& scale, const Window& window, unsigned int* next_place,
    int refused, int origin, unsigned short* places) {
    const int lane = threadIdx.x % 32, whole = first + (last - first) / STEP * STEP;
    const bool upper = NARROW && threadIdx.x / 32 % 2;
    const unsigned int one = upper ? 1 << 16 : 1;
    next_place += !SPECIAL, refused -= !SPECIAL;
    const int first_bin = window.first_bin - !SPECIAL;
    const unsigned int bins = window.stop_bin - window.first_bin, limit = window.limit;
    float x[AHEAD];
    auto step = [&](int start, auto inside) {
        int bin[AHEAD];
        unsigned int place[AHEAD];  // in the window
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) bin[j] = bin_of<SPECIAL>(x[j], scale);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const bool wanted = inside(j) && (ALL || (NARROW ? bin[j] < (int)bins + first_bin : (unsigned int)(bin[j] - first_bin) < bins));
            place[j] = take(next_place, wanted ? bin[j] : refused, one);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            place[j] = Places<NARROW>::read(place[j], upper) - window.base;
            if (inside(j) && (ALL || place[j] < limit)) places[place[j]] = (unsigned short)(start - origin + 32 * j);
        }
        __syncwarp();
    };
    // The next scores are on their way while these keys are dealt out.
    score_t ahead[AHEAD];
    auto fetch = [&](int start) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) ahead[j] = scores[start + 32 * j];
    };
    if (first < whole) fetch(first + lane);
    for (int start = first; start < whole; start += STEP) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) x[j] = to_float(ahead[j]);
        fetch(min(start + STEP, whole - STEP) + lane);
        step(start + lane, [](int) { return true; });
    }
    if (whole < last) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) x[j] = to_float(scores[min(whole + lane + 32 * j, last - 1)]);
        step(whole + lane, [=](int j) { return whole + lane + 32 * j < last; });
    }
}

// Sets the bits [from, to).
__device__ __forceinline__ void set_bits(unsigned int* words, int from, int to) {
    for (int i = from / 32; 32 * i < to; ++i) {
        unsigned int bits = 0xffffffffu;
        if (32 * i < from) bits &= 0xffffffffu << from % 32;
        if (32 * i + 32 > to) bits &= (1u << to % 32) - 1;
        atomicOr(words + i, bits);
    }
}

// `remap`: each warp counts the bins of its run of a list; a scan over (bin, warp) gives places; a window of places at
// a time, the warps deal their keys out into shared memory, by atomics on their own counters, 32 keys an instruction,
// and the block writes them in whole sectors.
// A key is kept in 16 bits, less the first of its group of warps; the group's number lies in bit planes.
// Equal keys of one instruction come out in order where the hardware serves lanes in order, which nothing promises:
// what is written is checked on the way, and sorted where need be, so no answer depends on it.
// `remap_narrow` keeps places in 16 bits and counts where the keys will lie later: two blocks share a multiprocessor. All
// that is listed is one window of at most 48000 places, and with a warp's run 65000.
// shared memory: specialisations.remap_fit; bins = levels + 2
//   window   a multiple of 128, at most 65536
//   most_planes   2^most_planes divides the warps; a list has at most 65536 * 2^most_planes keys
template <bool NARROW>
__device__ __forceinline__ void remap_list(
    const score_t* __restrict__ scores, const long long* __restrict__ starts, const int* __restrict__ history,
    const long long* __restrict__ kv_offsets, long long offsets_stride, int* __restrict__ kv_order, int segments,
    int levels, int window_size, int most_planes, const unsigned int* __restrict__ ranges, int part_keys, int parts) {
    extern __shared__ __align__(16) int shared[];
    __shared__ int first_bin, last_bin, before, behind;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x, warps = threads / 32;
    const int s = segments - 1 - blockIdx.x;  // the longest lists first
    const int n = history[s], bins = levels + 2, words = (window_size + 2 * STEP) / 32 + 1;
    const long long* offsets = kv_offsets + blockIdx.y * offsets_stride + s;
    const int wanted = (int)(offsets[1] - offsets[0]);
    if (n == 0 || wanted == 0) return;
    scores += blockIdx.y * starts[segments] + starts[s];
    prefetch(scores, n);
    int* const out = kv_order + offsets[0];
    const int skew = STEP + (int)((size_t)out / sizeof(int) % 8);  // to where a sector of the answer starts
    unsigned short* const places = (unsigned short*)shared;  // [window_size + 2 * STEP + 8]
    // [words] bits of the places where a bin or group starts, and [planes][words] bits of a place's group
    unsigned int* heads = (unsigned int*)(places + window_size + 2 * STEP + 8);
    if (NARROW) heads = (unsigned int*)shared + max((window_size + 2 * STEP + 8) / 2, warps * bins);
    unsigned int* const tops = heads + words;
    unsigned int* const next = tops + most_planes * words;  // [warps][bins] places, two warps' in a word where narrow
    const int refused = (NARROW ? warps / 2 : warps) * bins + threadIdx.x;  // of this lane, behind them
    int* const counts = NARROW ? shared : (int*)next;                       // [warps][bins]
    int* const mine = counts + warp * bins;
    // Narrow places are counted from the start of shared memory on.
    auto place_of = [&](int w, int b) { return Places<NARROW>::read(next[(NARROW ? w / 2 : w) * bins + b], w % 2) - (NARROW ? skew : 0); };
    const int per_thread = (bins + threads - 1) / threads;
    const int bin_first = min((int)threadIdx.x * per_thread, bins), bin_stop = min(bin_first + per_thread, bins);
    int planes = 0;  // 65536 keys a group
    while (n > 65536 << planes) ++planes;
    const int run = (n + warps * STEP - 1) / (warps * STEP) * STEP, group_warps = warps >> planes;
    const int first = min(warp * run, n), last = min(first + run, n), group_keys = group_warps * run;

    for (int i = threadIdx.x; i < (1 + most_planes) * words + (NARROW ? 0 : warps * bins); i += threads) heads[i] = 0;
    if (NARROW)
        for (int i = threadIdx.x; i < warps * bins; i += threads) counts[i] = 0;
    next[refused] = NARROW ? 0xc000c000u : 1u << 31;
    if (ranges != nullptr) ranges += ((long long)blockIdx.y * segments + s) * parts;
    const Scale scale = scale_of(scores, n, levels, ranges, (n + part_keys - 1) / part_keys);
    auto count = [&](auto special) {
        constexpr bool SPECIAL = special();
        for_each_score(scores, first, last, lane, 32, [&](float x) { add_one(mine + !SPECIAL, bin_of<SPECIAL>(x, scale)); });
    };
    if (scale.special) count(Flag<true>());
    else count(Flag<false>());
    __syncthreads();

    int place = 0;
    for (int b = bin_first; b < bin_stop; ++b) {
#pragma unroll
        for (int w = 0; w < MAX_WARPS; ++w)
            if (w < warps) place += counts[w * bins + b];
    }
    place = scan_block(place);
    for (int b = bin_first; b < bin_stop; ++b) {
        int here[MAX_WARPS];
#pragma unroll
        for (int w = 0; w < MAX_WARPS; ++w) here[w] = w < warps ? counts[w * bins + b] : 0;
        if (NARROW)
#pragma unroll
            for (int w = 0; w < MAX_WARPS; w += 2) {
                const unsigned int first = min(skew + place, 65535), second = min(skew + place + here[w], 65535);
                if (w < warps) next[w / 2 * bins + b] = first | second << 16;
                place += here[w] + here[w + 1];
            }
        else
#pragma unroll
            for (int w = 0; w < MAX_WARPS; ++w) {
                if (w < warps) counts[w * bins + b] = place;
                place += here[w];
            }
    }
    __syncthreads();

    for (int base = 0; base < wanted; base += window_size) {
        const int size = min(window_size, wanted - base);
        for (int b = threadIdx.x; b < bins; b += threads) {
            const int start = place_of(0, b) - base, end = (b + 1 < bins ? place_of(0, b + 1) : n) - base;
            if (start == end || end <= 0 || start >= size) continue;
            if (start <= 0) first_bin = b, before = max(start, -STEP);
            if (end >= size) last_bin = b, behind = min(end, size + STEP);
            for (int g = 0; g < 1 << planes; ++g) {
                const int from = place_of(g * group_warps, b) - base;
                const int to = g + 1 < 1 << planes ? place_of((g + 1) * group_warps, b) - base : end;
                if (from == to || to <= -STEP || from >= size + STEP) continue;
                const int left = skew + max(from, -STEP), right = skew + min(to, size + STEP);
                atomicOr(heads + left / 32, 1u << left % 32);
                for (int plane = 0; plane < planes; ++plane)
                    if (g >> plane & 1) set_bits(tops + plane * words, left, right);
            }
        }
        __syncthreads();
        // Narrow places must not overflow: a warp whose keys of the last bin go past the window leaves them.
        const bool leaves = NARROW && place_of(warp, last_bin) >= size + STEP;
        __syncwarp();
        // A step more of the first bin before and of the last bin behind, so that the sorted keys are the right ones.
        const Window window = {NARROW ? 0 : base - STEP, size + 2 * STEP + (NARROW ? 8 : 0), NARROW ? 0 : first_bin, last_bin + !leaves};
        const int row = (NARROW ? warp / 2 : warp) * bins, origin = warp / group_warps * group_keys;
        unsigned int* const own = next + row;
        unsigned short* const to = places + (NARROW ? 0 : skew - STEP);
        if (scale.special) deal<true, false, NARROW>(scores, first, last, scale, window, own, refused - row, origin, to);
        else if (!NARROW && size == n) deal<false, true, NARROW>(scores, first, last, scale, window, own, refused - row, origin, to);
        else deal<false, false, NARROW>(scores, first, last, scale, window, own, refused - row, origin, to);
        __syncthreads();

        for (bool sorted = false; !sorted;) {
            bool disordered = false;
            auto write = [&](unsigned int i, auto whole) {  // 4 places, all of them in the window where `whole`
                const uint2 packed = *(const uint2*)(places + i);
                const unsigned int starting = ((const unsigned char*)heads)[i / 8] >> i % 8;
                const int from = whole() ? 0 : skew + before - (int)i, to = whole() ? 4 : skew + behind - (int)i;
                int key[5] = {places[i ? i - 1 : 0], (int)(packed.x & 0xffff), (int)(packed.x >> 16), (int)(packed.y & 0xffff), (int)(packed.y >> 16)};
                int falls = 0;  // negative where a key is smaller than the one before it
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int fall = key[j + 1] - key[j] & ~(starting << 31 - j);
                    if (whole() || (j >= from && j < to)) falls |= fall;
                }
                disordered |= falls < 0;
#pragma unroll 1
                for (int plane = 0; plane < planes; ++plane) {
                    const unsigned int top = ((const unsigned char*)(tops + plane * words))[i / 8] >> i % 8;
                    const int more = group_keys << plane;
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (top & 1u << j) key[j + 1] += more;
                }
                int* const at = out + base + ((int)i - skew);
                if (whole()) {
                    const unsigned int a = key[1], b = key[2], c = key[3], d = key[4];
                    *(uint4*)at = {a, b, c, d};
                } else {
                    for (int j = 0; j < 4; ++j)
                        if ((int)i + j >= skew && (int)i + j < skew + size) at[j] = key[j + 1];
                }
            };
            // A warp writes 512 bytes in a row, twice.
            for (int first_place = (skew + before) / 8 * 8 + 256 * warp + 4 * lane; first_place < skew + behind; first_place += 256 * warps)
#pragma unroll
                for (int i = first_place; i < first_place + 256; i += 128) {
                    if (i >= skew && i + 4 <= skew + size) write(i, Flag<true>());
                    else if (i < skew + behind) write(i, Flag<false>());
                }
            sorted = !__syncthreads_or(disordered);
            for (bool moved = !sorted; moved;) {  // odd-even transposition inside the bins
                moved = false;
                for (int odd = 0; odd < 2; ++odd) {
                    for (int i = skew + before + 2 * threadIdx.x + 1 + odd; i < skew + behind; i += 2 * threads) {
                        const unsigned short previous = places[i - 1], key = places[i];
                        if (previous <= key || heads[i / 32] >> i % 32 & 1) continue;
                        places[i - 1] = key, places[i] = previous, moved = true;
                    }
                    __syncthreads();
                }
                moved = __syncthreads_or(moved);
            }
        }
        if (NARROW || base + size == wanted) return;
        // The last bin goes on in the next window: back to where its counters started.
        const int start_of_bin = last_bin ? counts[(warps - 1) * bins + last_bin - 1] : 0;
        const int restored = warp ? counts[(warp - 1) * bins + last_bin] : start_of_bin;
        __syncthreads();
        if (lane == 0) mine[last_bin] = restored;
        for (int i = threadIdx.x; i < (1 + planes) * words; i += threads) heads[i] = 0;
        __syncthreads();
    }
}

#define REMAP(NAME, NARROW)                                                                                            \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, NARROW ? 2 : 1) NAME(                                  \
        const score_t* __restrict__ scores, const long long* __restrict__ starts, const int* __restrict__ history,      \
        const long long* __restrict__ kv_offsets, long long offsets_stride, int* __restrict__ kv_order, int segments,   \
        int levels, int window_size, int most_planes, const unsigned int* __restrict__ ranges, int part_keys,           \
        int parts) {                                                                                                    \
        remap_list<NARROW>(scores, starts, history, kv_offsets, offsets_stride, kv_order, segments, levels,             \
                           window_size, most_planes, ranges, part_keys, parts);                                         \
    }
REMAP(remap, false)
REMAP(remap_narrow, true)

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
    if (levels > 0) scale = scale_of(scores, n, levels, nullptr, 0);

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
