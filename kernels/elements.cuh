// elements.cuh: T and the type it is computed in, for the parts of stage 1 that serve every type. REAL: T is that, and so
// are its numbers; else T is float16 or bfloat16 (IS_BF16) and its numbers are float.
#pragma once
#ifdef REAL
typedef REAL element_t;
typedef REAL real_t;
__device__ __forceinline__ element_t to_element(real_t x) { return x; }
__device__ __forceinline__ element_t to_weight(real_t x) { return x; }
__device__ __forceinline__ real_t to_real(element_t x) { return x; }
#else
#include "half.cuh"
typedef half_t element_t;
typedef float real_t;
__device__ __forceinline__ element_t to_element(float x) { return float_to_half(x); }
__device__ __forceinline__ element_t to_weight(float x) { return float_to_bfloat16(x); }
__device__ __forceinline__ float to_real(element_t x) { return half_to_float(x); }
#endif
