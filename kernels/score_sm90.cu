// score_sm90.cu: stage 1, last part, on Hopper: score.cu's products by `wgmma`, which mma.sync holds to two thirds of
// its rate. Mean query and covariance factors of 8, 16, 32 or 64 rows a list, head dims to 128; score.cu does the rest.
//   k        [batch, heads_kv, n_keys, dim]               T      element strides given, unit column stride
//   rows     [order heads of the slab, chunks, WIDTH / 64, 64, 64]  T  mean query, then covariance factors: chunks of 64
//            rows as they lie in shared memory (factor.cu's `tiled`), so that one bulk copy fetches a chunk
//   history, starts, score: as in score.cu
// A block keeps TILE_KEYS keys in registers as the left operand, 64 a warpgroup; one more warp streams the rows past
// them. A warpgroup waits for its product before it adds up the squares: the tensor cores meanwhile have the other
// warpgroups of this block and of its neighbour.
// grid (key tiles of the longest history, order heads of a K/V head, K/V heads of the slab)   block TILE_KEYS * 2 + 32
// shared memory 1024 + TILE_KEYS * WIDTH * 2 + STAGES * 64 * WIDTH * 2 + 16 * STAGES bytes
// kernels score_8_64 .. score_64_128, by rows of a list and WIDTH   macros IS_BF16
#include "gather.cuh"

constexpr int TILE_KEYS = 128;
constexpr int THREADS = 2 * TILE_KEYS;  // that multiply
constexpr int STAGES = 4;
constexpr int CHUNK_ROWS = 64;
constexpr int HALF_BYTES = CHUNK_ROWS * 128;  // 64 columns of a chunk, in rows of 128 bytes

#ifdef S2O_EMULATION
#include "emulated_wgmma.h"
#else
#if IS_BF16
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
#else
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"
#endif
#define EIGHT(mode, i) mode(c[i]), mode(c[i + 1]), mode(c[i + 2]), mode(c[i + 3]), mode(c[i + 4]), mode(c[i + 5]), mode(c[i + 6]), mode(c[i + 7])

// c (64 x 64) = a b^T, or c += a b^T where `add`: a is 64 x 16 in the warpgroup's registers, b 64 rows of 16 columns in
// shared memory.
template <bool ADD>
__device__ __forceinline__ void wgmma(float (&c)[32], const unsigned int (&a)[4], unsigned long long b) {
    if (ADD)
        asm volatile(WGMMA
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
                     "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                     : EIGHT("+f", 0), EIGHT("+f", 8), EIGHT("+f", 16), EIGHT("+f", 24)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(WGMMA
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
                     "{%32,%33,%34,%35}, %36, 0, 1, 1, 0;"
                     : EIGHT("=f", 0), EIGHT("=f", 8), EIGHT("=f", 16), EIGHT("=f", 24)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Waits for every product of the warpgroup; without the second part the compiler reads accumulators above the wait.
__device__ __forceinline__ void wgmma_finish(float (&c)[32]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
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
// Arrives at `barrier` with `bytes` to come, and starts the copy that brings them.
__device__ __forceinline__ void copy_bulk(unsigned int to, const void* from, int bytes, unsigned int barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Barrier 1, among the threads that multiply.
__device__ __forceinline__ void multipliers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
#endif

// Rows of 128 bytes, 128-byte swizzle, 1024 bytes from 8 rows to the next.
__device__ __forceinline__ unsigned long long descriptor(unsigned int address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ unsigned int score_bits(float x) {
    const float clamped = fminf(fmaxf(x, -65504.f), 65504.f);
    return float_to_score(x - x == 0.f ? clamped : x);  // infinities and NaN stay what they are
}

// Adds up the quad's shares of LISTS lists for two keys; lane `quad` ends with its own lists' sums in the first places.
template <int LISTS>
__device__ __forceinline__ void reduce_quad(float (&u)[LISTS][2]) {
    const int quad = threadIdx.x & 3;
    int held = LISTS;
#pragma unroll
    for (int step = 2; step; step /= 2) {
        const int kept = held >= 2 ? held / 2 : 1;
#pragma unroll
        for (int j = 0; j < kept; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool upper = held >= 2 && quad & step;
                const float mine = upper ? u[held / 2 + j][i] : u[j][i], other = held < 2 || upper ? u[j][i] : u[held / 2 + j][i];
                u[j][i] = mine + __shfl_xor_sync(0xffffffffu, other, step);
            }
        held = kept;
    }
}

template <int PER_LIST, int WIDTH>
__device__ __forceinline__ void score_tile(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,
    unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments) {
    typedef SharedTile<WIDTH> Tile;
    constexpr int D_STEPS = WIDTH / 16, CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2, LISTS = CHUNK_ROWS / PER_LIST;
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[TILE_KEYS];
    const unsigned int stages = (shared_address(shared_memory) + 1023) & ~1023u, keys = stages + STAGES * CHUNK_BYTES;
    const unsigned int full = keys + TILE_KEYS * WIDTH * 2, empty = full + 8 * STAGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y;
    const int chunk_stop = (segments * PER_LIST + CHUNK_ROWS - 1) / CHUNK_ROWS;
    rows += (long long)order_head * chunk_stop * CHUNK_ROWS * WIDTH;
    scores += order_head * starts[segments];

    // Histories grow with the segment: the first list that reaches this tile of keys.
    int first_list = 0;
    for (int step = 1 << 20; step; step /= 2)
        if (first_list + step <= segments && history[first_list + step - 1] <= first_key) first_list += step;
    if (first_list == segments) return;
    const int first_chunk = first_list / LISTS;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, THREADS / 32);
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS)
            for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
                const int turn = chunk - first_chunk, s = turn % STAGES;
                if (turn >= STAGES) barrier_wait(empty + 8 * s, (turn / STAGES - 1) & 1);
                copy_bulk(stages + s * CHUNK_BYTES, rows + (long long)chunk * CHUNK_ROWS * WIDTH, CHUNK_BYTES, full + 8 * s);
            }
        return;
    }

    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = min(first_key + i, n_keys - 1);
    multipliers_sync();
    load_rows<WIDTH, TILE_KEYS, THREADS>(keys, rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned), index);
    commit_copies();
    wait_copies<0>();
    multipliers_sync();
    // The warp's 16 keys, for good. Row g of the product is key 2 g, row g + 8 the one after it.
    unsigned int a[D_STEPS][4];
#pragma unroll
    for (int d = 0; d < D_STEPS; ++d)
        load_matrices(a[d], Tile::address(keys, warp * 16 + 2 * (lane & 7) + ((lane >> 3) & 1), 2 * d + (lane >> 4)));

    const int key = first_key + warp * 16 + 2 * (lane / 4);
    constexpr int EACH = LISTS >= 4 ? LISTS / 4 : 1;  // lists that a lane writes
    const bool writes = LISTS >= 4 || quad % (4 / LISTS) == 0;
    for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
        const int turn = chunk - first_chunk, s = turn % STAGES;
        int stop[EACH];
        long long start[EACH];
#pragma unroll
        for (int j = 0; j < EACH; ++j) {  // read long before they are needed
            const int list = chunk * LISTS + (LISTS >= 4 ? EACH * quad + j : quad * LISTS / 4);
            stop[j] = list < segments ? history[list] : 0;
            start[j] = list < segments ? starts[list] : 0;
        }
        barrier_wait(full + 8 * s, turn / STAGES & 1);
        const unsigned int here = stages + s * CHUNK_BYTES;
        float c[32];
        wgmma_fence();
        wgmma<false>(c, a[0], descriptor(here));
#pragma unroll
        for (int d = 1; d < D_STEPS; ++d) wgmma<true>(c, a[d], descriptor(here + d / 4 * HALF_BYTES + d % 4 * 32));
        wgmma_finish(c);
        if (lane == 0) barrier_arrive(empty + 8 * s);

        float u[LISTS][2];
#pragma unroll
        for (int j = 0; j < LISTS; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < PER_LIST / 8; ++n) {
                    const float x = c[4 * (j * PER_LIST / 8 + n) + 2 * h], y = c[4 * (j * PER_LIST / 8 + n) + 2 * h + 1];
                    sum += (n == 0 && quad == 0 ? x : x * x) + y * y;
                }
                u[j][h] = sum;
            }
        reduce_quad<LISTS>(u);
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            if (writes && key < stop[j]) *(unsigned int*)(scores + start[j] + key) = score_bits(u[j][0]) | score_bits(u[j][1]) << 16;
    }
}

#define SCORE(NAME, PER_LIST, WIDTH)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, 2) NAME(                                                 \
        const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,                \
        const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,         \
        unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments) {           \
        score_tile<PER_LIST, WIDTH>(k, k_batch, k_head, k_row, aligned, rows, history, starts, scores, heads_kv,        \
                                    kv_start, n_keys, dim, segments);                                                   \
    }
SCORE(score_8_64, 8, 64)
SCORE(score_16_64, 16, 64)
SCORE(score_32_64, 32, 64)
SCORE(score_64_64, 64, 64)
SCORE(score_8_128, 8, 128)
SCORE(score_16_128, 16, 128)
SCORE(score_32_128, 32, 128)
SCORE(score_64_128, 64, 128)
