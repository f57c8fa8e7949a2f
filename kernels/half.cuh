// half.cuh: the 16-bit element types, without CUDA's headers (they cost more to compile than a kernel does).
// IS_BF16: 1 for bfloat16, 0 for float16. Elements travel as unsigned short, pairs as unsigned int, low half first.
#pragma once

typedef unsigned short half_t;

#ifdef S2O_EMULATION
static inline float half_to_float(half_t x) { return s2o_emulation::half_to_float(x, IS_BF16); }
static inline half_t float_to_half(float x) { return s2o_emulation::float_to_half(x, IS_BF16); }
static inline half_t float_to_bfloat16(float x) { return s2o_emulation::float_to_half(x, 1); }
static inline unsigned short float_to_score(float x) { return s2o_emulation::float_to_half(x, 0); }
static inline float score_to_float(unsigned short x) { return s2o_emulation::half_to_float(x, 0); }
static inline unsigned int pack_scores(float low, float high) { return float_to_score(low) | (unsigned int)float_to_score(high) << 16; }
static inline unsigned int pack_halves(float low, float high) { return float_to_half(low) | (unsigned int)float_to_half(high) << 16; }
#else
__device__ __forceinline__ float half_to_float(half_t x) {
#if IS_BF16
    return __uint_as_float((unsigned int)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

// Two floats, rounded to nearest even, as one register.
__device__ __forceinline__ unsigned int pack_halves(float low, float high) {
    unsigned int y;
#if IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

__device__ __forceinline__ half_t float_to_half(float x) { return (half_t)pack_halves(x, 0.f); }

__device__ __forceinline__ half_t float_to_bfloat16(float x) {
    half_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Scores are float16 whatever T is.
__device__ __forceinline__ unsigned short float_to_score(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned int pack_scores(float low, float high) {
    unsigned int y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float score_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#endif

__device__ __forceinline__ bool half_is_finite(half_t x) {
    const unsigned int exponent = IS_BF16 ? 0x7f80 : 0x7c00;
    return (x & exponent) != exponent;
}

__device__ __forceinline__ bool halves_are_finite(unsigned int pair) {
    return half_is_finite((half_t)pair) && half_is_finite((half_t)(pair >> 16));
}

// Of two pairs of float16, the lesser and the greater of each; NaN is ignored by the one and wins the other.
#ifdef S2O_EMULATION
static inline unsigned int min_halves(unsigned int x, unsigned int y) {
    auto least = [](unsigned short a, unsigned short b) { return score_to_float(a) < score_to_float(b) || score_to_float(b) != score_to_float(b) ? a : b; };
    return least((unsigned short)x, (unsigned short)y) | (unsigned int)least((unsigned short)(x >> 16), (unsigned short)(y >> 16)) << 16;
}
static inline unsigned int max_halves(unsigned int x, unsigned int y) {
    auto greatest = [](unsigned short a, unsigned short b) { return score_to_float(a) > score_to_float(b) || score_to_float(a) != score_to_float(a) ? a : b; };
    return greatest((unsigned short)x, (unsigned short)y) | (unsigned int)greatest((unsigned short)(x >> 16), (unsigned short)(y >> 16)) << 16;
}
#else
__device__ __forceinline__ unsigned int min_halves(unsigned int x, unsigned int y) {
    asm("min.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
}
__device__ __forceinline__ unsigned int max_halves(unsigned int x, unsigned int y) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
}
#endif
