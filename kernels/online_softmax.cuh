// online_softmax.cuh: the running maximum and sum of query rows, in base 2, safe where everything is -inf.
#pragma once

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
constexpr float LN_2 = 0.693147180559945309f;
constexpr float LOG2_E = 1.44269504088896341f;

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef S2O_EMULATION
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The four lanes that share a row of an mma accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// One query row. `top` is a raw dot product: logits in base 2 are `unit` times it. `closed` is the sum over
// whole logical key tiles, the same in the row's four lanes; `open` is this lane's share of the running one.
struct RowSoftmax {
    float top, closed, open;

    __device__ __forceinline__ void clear() { top = NEGATIVE_INFINITY, closed = 0.f, open = 0.f; }

    // Moves the frame to a greater maximum; returns the factor for what was accumulated before.
    __device__ __forceinline__ float raise(float greatest, float unit) {
        const float old = top;
        top = fmaxf(old, greatest);
        const float shrink = exp2_approx((old - frame()) * unit);
        closed *= shrink, open *= shrink;
        return shrink;
    }

    // A maximum that can be subtracted from -inf.
    __device__ __forceinline__ float frame() const { return top == NEGATIVE_INFINITY ? 0.f : top; }

    // Closes a logical key tile; returns what it added to the sum.
    __device__ __forceinline__ float close() {
        const float gained = quad_sum(open);
        closed += gained, open = 0.f;
        return gained;
    }

    // Whether the row wants another tile: it gained at least `tau` of what it had before. A row that is not finite
    // has no wish, nor has one whose every logit was -inf.
    __device__ __forceinline__ bool wants(float gained, float before, float tau) const {
        return before == 0.f ? top > NEGATIVE_INFINITY && gained >= 0.f : gained >= tau * before;
    }
};
