// remap.cu: stage 2. The keys of every list by descending score, ties by smaller index: a stable counting order, one
// block a list, in one pass over quantised scores or a few over the bits of exact ones.
//   score      [lists' heads, starts[segments]]  half or float  (SCORE_HALF) scores of a list from starts[segment] on
//   starts     [segments + 1]                    int64
//   history    [segments]                        int32   scores of a list
//   kv_offsets [lists' heads, segments + 1]      int64   where a list goes; row stride offsets_stride
//   kv_order   [keys]                            int32   the answer: the first offsets[s+1] - offsets[s] keys of a list
//   scratch    [2, lists' heads, starts[segments]] int32 or null where one pass does
// levels > 0: finite scores are cut into that many equal steps between the list's least and greatest, in float32
// without contraction; 0: exact. +inf leads, -inf and NaN close.
// A pass: every warp counts the digits of its own run of keys; a scan over (digit, warp) gives places; the warp then
// deals its keys out in order, equal digits of 32 keys ranked by match. No place depends on the order of atomics.
// A list of at most 2^17 keys is dealt out into shared memory, `window` places at a time (16 bits of the key, and its
// 17th), and written from there in whole sectors: scattered 4-byte writes cost more than dealing twice.
// grid (segments, lists' heads)   block warps * 32 (at most 512)
// shared memory warps * bins * 4 + window * 2 + window / 8 bytes; window a multiple of 32, or 0: none
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
constexpr int AHEAD = 4;  // keys a lane loads before it deals the first of them out

struct Scale {
    float high, factor;  // level = (high - score) * factor
    int levels;          // 0: exact
    bool flat;           // every finite score has level 0
};

// A key's place in the order, as an unsigned number: smaller comes first.
__device__ __forceinline__ unsigned int rank_key(float x, const Scale& scale) {
    const bool finite = x - x == 0.f;
    if (scale.levels == 0) {
        if (x != x || x == -POSITIVE_INFINITY) return 0xffffffffu;
        const unsigned int bits = __float_as_uint(x == 0.f ? 0.f : x);
        return ~(bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    }
    if (!finite) return x > 0.f ? 0u : (unsigned int)scale.levels + 1;
    if (scale.flat) return 1u;
    const int level = (int)__fmul_rn(__fsub_rn(scale.high, x), scale.factor);
    return 1u + (unsigned int)min(level, scale.levels - 1);
}

// Exclusive scan of `x` over the block, in thread order.
__device__ int scan_block(int x, int* warp_totals) {
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
#pragma unroll 2
    for (int i = first + EACH * thread; i < last; i += EACH * threads) {
        score_t x[EACH];
        if (i + EACH <= last) {
            *(uint4*)x = *(const uint4*)(scores + i);
        } else {
            for (int j = 0; j < EACH; ++j) x[j] = scores[min(i + j, last - 1)];
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            if (i + j < last) use(to_float(x[j]));
    }
}

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS) remap(
    const score_t* __restrict__ scores, const long long* __restrict__ starts, const int* __restrict__ history,
    const long long* __restrict__ kv_offsets, long long offsets_stride, int* __restrict__ kv_order, int* scratch,
    int segments, int levels, int bins, int passes, int window) {
    extern __shared__ int counts[];  // [warps][bins], then the window
    __shared__ int next_digit, next_place;
    __shared__ int warp_totals[MAX_WARPS];
    __shared__ float least[MAX_WARPS], greatest[MAX_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x, warps = threads / 32;
    const int s = segments - 1 - blockIdx.x;  // the longest lists first
    const long long in_head = starts[segments], at = blockIdx.y * in_head + starts[s];
    const int n = history[s];
    const long long* offsets = kv_offsets + blockIdx.y * offsets_stride + s;
    const int listed = (int)(offsets[1] - offsets[0]);
    if (n == 0 || listed == 0) return;
    scores += at;
    int* const out = kv_order + offsets[0];

    Scale scale = {0.f, 0.f, levels, true};
    if (levels > 0) {
        float low = POSITIVE_INFINITY, high = -POSITIVE_INFINITY;
        for_each_score(scores, 0, n, threadIdx.x, threads, [&](float x) {
            if (x - x == 0.f) low = fminf(low, x), high = fmaxf(high, x);
        });
        for (int step = 16; step; step /= 2) {
            low = fminf(low, __shfl_xor_sync(0xffffffffu, low, step));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
        }
        if (lane == 0) least[warp] = low, greatest[warp] = high;
        __syncthreads();
        for (int w = 0; w < warps; ++w) low = fminf(low, least[w]), high = fmaxf(high, greatest[w]);
        const float span = __fsub_rn(high, low);
        if (span > 0.f && span < POSITIVE_INFINITY) scale.high = high, scale.factor = __fdiv_rn((float)levels, span), scale.flat = false;
    }

    // Every warp's run of keys, a multiple of 32.
    const int run = (n + threads - 1) / threads * 32, first = warp * run, last = min(first + run, n);
    int* const mine = counts + warp * bins;
    unsigned int* const tops = (unsigned int*)(counts + warps * bins);         // [window / 32] 17th bits
    unsigned short* const places = (unsigned short*)(tops + window / 32);  // [window]
    int shift = 0, bits = 0;
    while (1 << bits < bins) ++bits;
    for (int pass = 0; pass < passes; ++pass, shift += bits) {
        const unsigned int mask = passes == 1 ? 0xffffffffu : (1u << bits) - 1;
        const int* from = pass == 0 ? nullptr : scratch + (pass - 1) % 2 * gridDim.y * in_head + at;
        int* to = pass == passes - 1 ? out : scratch + pass % 2 * gridDim.y * in_head + at;
        const int limit = pass == passes - 1 ? listed : n;

        for (int i = threadIdx.x; i < warps * bins; i += threads) counts[i] = 0;
        __syncthreads();
        auto count = [&](float x) { atomicAdd(mine + (rank_key(x, scale) >> shift & mask), 1); };
        if (from == nullptr) {
            for_each_score(scores, first, last, lane, 32, count);
        } else {
#pragma unroll 4
            for (int i = first + lane; i < last; i += 32) count(to_float(scores[from[i]]));
        }
        __syncthreads();

        // Places: digit by digit, and within a digit warp by warp.
        const int per_thread = (bins + threads - 1) / threads, bin_first = min((int)threadIdx.x * per_thread, bins);
        const int bin_last = min(bin_first + per_thread, bins);
        int total = 0;
        for (int b = bin_first; b < bin_last; ++b)
            for (int w = 0; w < warps; ++w) total += counts[w * bins + b];
        int place = scan_block(total, warp_totals);
        for (int b = bin_first; b < bin_last; ++b)
            for (int w = 0; w < warps; ++w) {
                const int here = counts[w * bins + b];
                counts[w * bins + b] = place;
                place += here;
            }
        __syncthreads();

        // The keys whose digit lies in [low, high), to their places: in the window from `base` on, or in `to`.
        auto deal = [&](unsigned int low, unsigned int high, bool direct, int base_place) {
            // The next keys and scores are on their way while these are dealt out.
            int next_keys[AHEAD];
            score_t next_scores[AHEAD];
            auto fetch = [&](int start) {
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    const int i = start + 32 * j + lane;
                    next_keys[j] = i >= last ? -1 : from ? from[i] : i;
                    next_scores[j] = scores[max(next_keys[j], 0)];
                }
            };
            fetch(first);
            for (int start = first; start < last; start += 32 * AHEAD) {
                int keys[AHEAD];
                float values[AHEAD];
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) keys[j] = next_keys[j], values[j] = to_float(next_scores[j]);
                fetch(start + 32 * AHEAD);
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    const unsigned int found = rank_key(values[j], scale) >> shift & mask;
                    const bool active = keys[j] >= 0 && found >= low && found < high;
                    const unsigned int peers = __match_any_sync(0xffffffffu, active ? found : 0xffffffffu);
                    const int before = __popc(peers & ((1u << lane) - 1)), base = active ? mine[found] : 0;
                    __syncwarp();
                    if (active && before == 0) mine[found] = base + __popc(peers);
                    __syncwarp();
                    const int place = base + before;
                    if (!active || place >= limit) continue;
                    if (direct) {
                        to[place] = keys[j];
                    } else {
                        places[place - base_place] = (unsigned short)keys[j];
                        if (keys[j] >> 16) atomicOr(tops + (place - base_place) / 32, 1u << (place - base_place) % 32);
                    }
                }
            }
        };
        if (window == 0 || pass < passes - 1 || n > 1 << 17) {
            deal(0u, 0xffffffffu, true, 0);
            __syncthreads();
            continue;
        }
        for (int low = 0, base = 0; low < bins && base < limit;) {
            // The digits whose places fit the window: warp 0's counts are where each digit starts.
            if (threadIdx.x == 0) {
                int high = low;
                for (int step = 1 << 16; step; step /= 2)
                    if (high + step <= bins && (high + step == bins ? n : counts[high + step]) - base <= window) high += step;
                next_digit = high;
                next_place = high == low ? (low + 1 == bins ? n : counts[low + 1]) : high == bins ? n : counts[high];
            }
            for (int i = threadIdx.x; i < window / 32; i += threads) tops[i] = 0;
            __syncthreads();
            const int high = max(next_digit, low + 1), stop = next_place;
            const bool direct = next_digit == low;  // one digit alone is more than the window
            deal((unsigned int)low, (unsigned int)high, direct, base);
            __syncthreads();
            if (!direct)
                for (int i = threadIdx.x; i < min(stop, limit) - base; i += threads)
                    to[base + i] = places[i] | (int)(tops[i / 32] >> i % 32 & 1) << 16;
            low = high, base = stop;
            __syncthreads();
        }
    }
}
