// probe_wgmma.cu: the smallest wgmma kernel that gathers rows by cp.async, to learn what gathering costs on Hopper.
// Every block multiplies its 128 query rows with `tiles` tiles of 128 key rows and adds the products up, which is
// the ratio of arithmetic to loads that attention has. One producer warpgroup, two consumers of 64 rows each.
//   q      [blocks, 128, 128]  bfloat16
//   k      [n_keys, 128]       bfloat16
//   index  [blocks, tiles*128] int32     rows of k to gather; or contiguous rows, for comparison
//   sums   [blocks, 128, 128]  float     sum over the tiles of q k^T
// grid blocks   block 384   shared memory (1 + STAGES) * 32768 + 1024 bytes   macros STAGES, AHEAD (stages in flight)
typedef unsigned int u32;
typedef unsigned long long u64;
constexpr int TILE_BYTES = 128 * 128 * 2, HALF_BYTES = TILE_BYTES / 2;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(n)); }
__device__ __forceinline__ void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void barrier_wait(u32 b, int parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(b), "r"(parity)
        : "memory");
}
// 128 rows of 128 columns as two halves of 64 columns: rows of 128 bytes whose 16-byte chunks are turned by row % 8.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return (chunk >> 3) * HALF_BYTES + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
#define R8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
__device__ __forceinline__ void wgmma(float (&c)[64], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
        "%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
        : R8(0), R8(8), R8(16), R8(24), R8(32), R8(40), R8(48), R8(56)
        : "l"(a), "l"(b));
}

extern "C" __global__ void __launch_bounds__(384, 1) probe(
    const unsigned short* __restrict__ q, const unsigned short* __restrict__ k, const int* __restrict__ index,
    float* __restrict__ sums, int tiles) {
    extern __shared__ __align__(1024) char raw[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 base = (shared_address(raw) + 1023) & ~1023u, stages = base + TILE_BYTES;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const int thread = threadIdx.x & 127, group = threadIdx.x / 128;
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 128), barrier_init(empty + 8 * s, 256);
    for (int i = threadIdx.x; i < 128 * 16; i += 384) {
        const uint4 x = *(const uint4*)(q + (blockIdx.x * 128ll + i / 16) * 128 + i % 16 * 8);
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(base + swizzled(i / 16, i % 16)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const int* rows = index + (long long)blockIdx.x * tiles * 128;
        const int first = thread / 8, column = thread % 8;
        int now[8], next[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) next[i] = __ldg(rows + first + 16 * i);
        for (int t = 0; t < tiles + AHEAD; ++t) {
            if (t < tiles) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    now[i] = next[i];
                    if (t + 1 < tiles) next[i] = __ldg(rows + (t + 1) * 128 + first + 16 * i);
                }
                const int s = t % STAGES;
                if (t >= STAGES) barrier_wait(empty + 8 * s, (t / STAGES - 1) & 1);
                const u32 to = stages + s * TILE_BYTES;
#pragma unroll
                for (int r = 0; r < 128; r += 16) {
                    const unsigned short* from = k + (long long)now[r / 16] * 128 + column * 8;
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + swizzled(first + r, column)), "l"(from) : "memory");
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + swizzled(first + r, column + 8)), "l"(from + 64) : "memory");
                }
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (t >= AHEAD) {
                asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory");
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                barrier_arrive(full + 8 * ((t - AHEAD) % STAGES));
            }
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        float c[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) c[i] = 0.f;
        const u32 mine = base + group * 64 * 128;
        for (int t = 0; t < tiles; ++t) {
            const int s = t % STAGES;
            barrier_wait(full + 8 * s, (t / STAGES) & 1);
            const u32 tile = stages + s * TILE_BYTES;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                const u32 step = (d >> 2) * HALF_BYTES + (d & 3) * 32;
                wgmma(c, descriptor(mine + step), descriptor(tile + step));
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (t > 0) barrier_arrive(empty + 8 * ((t - 1) % STAGES));
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        const int row = group * 64 + thread / 32 * 16 + (thread & 31) / 4;
        float* to = sums + (blockIdx.x * 128ll + row) * 128 + 2 * (thread & 3);
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            *(float2*)(to + i * 2) = make_float2(c[i], c[i + 1]);
            *(float2*)(to + 8 * 128 + i * 2) = make_float2(c[i + 2], c[i + 3]);
        }
    }
}
