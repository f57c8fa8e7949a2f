// scores.cuh: what the kernels of stage 1's products share.
#pragma once
#include "half.cuh"
#include "online_softmax.cuh"

// A score as it is kept: float16 whatever T is, clamped to its range.
__device__ __forceinline__ unsigned short score_bits(float x) {
    const float clamped = fminf(fmaxf(x, -65504.f), 65504.f);
    return float_to_score(x - x == 0.f ? clamped : x);  // infinities and NaN stay what they are
}

// Two of them, the first in the low half. Hardly any pair has to be looked at a second time.
__device__ __forceinline__ unsigned int score_pair(float x, float y) {
    const unsigned int bits = pack_scores(x, y);
    const bool large = (bits & 0x7c00u) == 0x7c00u || (bits & 0x7c000000u) == 0x7c000000u;
    return large ? score_bits(x) | (unsigned int)score_bits(y) << 16 : bits;
}

// The first list whose history reaches `first_key`, `segments` if none does: histories grow with the segment. The whole
// block searches: a thread a history, or every few, then those between two of them.
template <int THREADS>
__device__ __forceinline__ int first_list_at(const int* history, int segments, int first_key) {
    int first = 0;
    for (int left = segments, step; left; left = step > 1 ? min(step, left) : 0) {
        step = (left + THREADS - 1) / THREADS;
        const int i = ((int)threadIdx.x + 1) * step - 1;
        const int before = __syncthreads_count(i < left && history[first + i] <= first_key);
        first += before * step, left -= before * step;
    }
    return first;
}

// A sum of powers of 2 and the exponent it is scaled by; the exponent starts below any logit, above -inf.
struct PowerSum {
    float frame, sum;

    __device__ __forceinline__ void clear() { frame = -1e30f, sum = 0.f; }
    __device__ __forceinline__ void raise(float top) {
        sum *= exp2_approx(frame - top);
        frame = top;
    }
    __device__ __forceinline__ void add(float other_frame, float other_sum) {
        const float top = fmaxf(frame, other_frame);
        sum = sum * exp2_approx(frame - top) + other_sum * exp2_approx(other_frame - top);
        frame = top;
    }
    __device__ __forceinline__ float log2() const { return frame + log2f(sum); }
};
