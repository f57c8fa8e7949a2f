// wgmma.cuh: Hopper's warpgroup matrix instructions and memory barriers (sm_90a).
#pragma once
#include "mma.cuh"

__device__ __forceinline__ void barrier_init(unsigned int barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned int barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned int barrier, int parity) {
    asm volatile(
        "{\n.reg .pred ready;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n@ready bra done;\nbra again;\n"
        "done:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// What ordinary stores and copies wrote to shared memory, and this thread has seen, becomes visible to wgmma.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A tile in shared memory, 128-byte swizzle. Rows along the product's inner dimension (keys for q k^T): `group` is
// bytes from 8 rows to the next 8. Rows across it (values for p v): `leading` is bytes from 64 columns to the next 64.
// The low word alone says where; bytes further are added to it in units of 16.
__device__ __forceinline__ unsigned int descriptor_low(unsigned int address, int leading) {
    return (address & 0x3ffff) >> 4 | (leading == 1 ? 1u : (unsigned int)leading >> 4) << 16;
}
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned int low, int group) {
    return (unsigned long long)(1u << 30 | group >> 4) << 32 | low;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Accumulators have their value from here on: without this the compiler moves their readers above the wait.
template <int COUNT>
__device__ __forceinline__ void settle(float (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#if IS_BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif
#define REGISTERS_8(mode, c, i) \
    mode(c[i]), mode(c[i + 1]), mode(c[i + 2]), mode(c[i + 3]), mode(c[i + 4]), mode(c[i + 5]), mode(c[i + 6]), mode(c[i + 7])
#define REGISTERS_32(mode, c, i) \
    REGISTERS_8(mode, c, i), REGISTERS_8(mode, c, i + 8), REGISTERS_8(mode, c, i + 16), REGISTERS_8(mode, c, i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 \
    NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c (64 x 64, 64 x 128) = a b^T: a is 64 rows of 16 columns in shared memory, b 64 or 128 rows of 16.
template <bool ADD>
__device__ __forceinline__ void wgmma_rows(float (&c)[32], unsigned long long a, unsigned long long b) {
    if (ADD)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, %32, %33, 1, 1, 1, 0, 0;"
                     : REGISTERS_32("+f", c, 0) : "l"(a), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, %32, %33, 0, 1, 1, 0, 0;"
                     : REGISTERS_32("=f", c, 0) : "l"(a), "l"(b));
}
template <bool ADD>
__device__ __forceinline__ void wgmma_rows(float (&c)[64], unsigned long long a, unsigned long long b) {
    if (ADD)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" NAMES_64 "}, %64, %65, 1, 1, 1, 0, 0;"
                     : REGISTERS_32("+f", c, 0), REGISTERS_32("+f", c, 32) : "l"(a), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" NAMES_64 "}, %64, %65, 0, 1, 1, 0, 0;"
                     : REGISTERS_32("=f", c, 0), REGISTERS_32("=f", c, 32) : "l"(a), "l"(b));
}

// c (64 x 64, 64 x 128) += a b: a is 64 x 16 in registers, b 16 rows of 64 or 128 columns in shared memory.
__device__ __forceinline__ void wgmma_columns(float (&c)[32], const unsigned int (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : REGISTERS_32("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_columns(float (&c)[64], const unsigned int (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" NAMES_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : REGISTERS_32("+f", c, 0), REGISTERS_32("+f", c, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
