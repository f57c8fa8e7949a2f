// score.cu: stage 1, last part. One score for each (order head, segment, history key): a tensor-core product of the
// keys with every segment's rows (factor.cu), summed up in registers.
//   k        [batch, heads_kv, n_keys, dim]               T      element strides given, unit column stride
//   rows     [order heads of the slab, segments, PER_LIST, WIDTH] T   mean query, then covariance factors
//   mean     [order heads of the slab, segments, WIDTH]   float  scale * mean query; score_full alone reads it
//   history  [segments of the slab]                       int32  keys [0, history) are scored
//   starts   [segments of the slab + 1]                   int64  where a list's scores start in its head's
//   score    [order heads of the slab, starts[segments]]  half   natural-log units, clamped to half's range
// T is float16 or bfloat16 (IS_BF16). One kernel for each number of rows a list has: score_1 (mean rank), score_8,
// score_16, score_32, score_64; the first row is linear, the others are squared. score_full: WIDTH rows, and
// score = sum_i (row_i . k + mean_i) k_i.
// grid (key tiles of the longest history, order heads of a K/V head, K/V heads of the slab)   block WARPS * 32
// shared memory (WARPS * 32 + 2 * 64) * WIDTH * 2 bytes   macros IS_BF16, WIDTH (64, 128, 256), WARPS
#include "gather.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE_KEYS = WARPS * 32;
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2;
constexpr int D_STEPS = WIDTH / 16;
typedef SharedTile<WIDTH> Tile;

__device__ __forceinline__ unsigned short score_bits(float x) {
    const float clamped = fminf(fmaxf(x, -65504.f), 65504.f);
    const float kept = x - x == 0.f ? clamped : x;  // infinities and NaN stay what they are
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(kept));
    return y;
}

enum { FULL = 0 };  // in place of PER_LIST

// Four keys in a row of one list.
__device__ __forceinline__ void store_scores(unsigned short* to, float a, float b, float c, float d) {
    *(uint2*)to = make_uint2(score_bits(a) | (unsigned int)score_bits(b) << 16, score_bits(c) | (unsigned int)score_bits(d) << 16);
}

// The sum of one n-tile's (8 rows') products for each of the lane's four keys, this lane's share of it.
template <int PER_LIST>
__device__ __forceinline__ void add_shares(float (&sum)[4], const float (&c)[2][4], bool linear, const float* mean, unsigned int keys, int column) {
    const int quad = threadIdx.x & 3, key = threadIdx.x / 32 * 32 + (threadIdx.x & 31) / 4 * 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float x = c[m][2 * h], y = c[m][2 * h + 1];
            float& share = sum[2 * m + h];
            if (PER_LIST == FULL) {
                unsigned int pair;
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(Tile::address(keys, key + 2 * m + h, column / 8) + 4 * quad));
                share += (x + mean[column + 2 * quad]) * half_to_float((half_t)pair) + (y + mean[column + 2 * quad + 1]) * half_to_float((half_t)(pair >> 16));
            } else {
                share += (linear && quad == 0 ? x : x * x) + y * y;
            }
        }
}

// Adds up the quad's shares of LISTS lists; lane `quad` ends with its own lists' sums in the first places.
template <int LISTS>
__device__ __forceinline__ void reduce_quad(float (&u)[LISTS][4]) {
    const int quad = threadIdx.x & 3;
    constexpr int HALF = LISTS >= 2 ? LISTS / 2 : 1, QUARTER = LISTS >= 4 ? LISTS / 4 : 1;
#pragma unroll
    for (int j = 0; j < HALF; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float mine = LISTS >= 2 && quad & 2 ? u[LISTS / 2 + j][i] : u[j][i];
            const float other = LISTS >= 2 ? (quad & 2 ? u[j][i] : u[LISTS / 2 + j][i]) : u[j][i];
            u[j][i] = mine + __shfl_xor_sync(0xffffffffu, other, 2);
        }
#pragma unroll
    for (int j = 0; j < QUARTER; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float mine = LISTS >= 4 && quad & 1 ? u[LISTS / 4 + j][i] : u[j][i];
            const float other = LISTS >= 4 ? (quad & 1 ? u[j][i] : u[LISTS / 4 + j][i]) : u[j][i];
            u[j][i] = mine + __shfl_xor_sync(0xffffffffu, other, 1);
        }
}

template <int PER_LIST>
__device__ __forceinline__ void score_tile(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const float* __restrict__ mean, const int* __restrict__ history,
    const long long* __restrict__ starts, unsigned short* __restrict__ scores,
    int heads_kv, int kv_start, int n_keys, int dim, int segments) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[TILE_KEYS];
    constexpr int ROWS = PER_LIST == FULL ? WIDTH : PER_LIST;                 // of a list
    constexpr int LISTS = ROWS >= CHUNK_ROWS ? 1 : CHUNK_ROWS / ROWS;         // of a chunk
    constexpr int SPAN = ROWS >= CHUNK_ROWS ? ROWS / CHUNK_ROWS : 1;          // chunks of a list
    const unsigned int keys = shared_address(shared_memory), chunks = keys + TILE_KEYS * WIDTH * 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y;
    rows += (long long)order_head * segments * ROWS * WIDTH;
    scores += order_head * starts[segments];

    // Histories grow with the segment: the first list that reaches this tile of keys.
    int first_list = 0;
    for (int step = 1 << 20; step; step /= 2)
        if (first_list + step <= segments && history[first_list + step - 1] <= first_key) first_list += step;
    const int total_rows = segments * ROWS, chunk_stop = (total_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int chunk = (int)((long long)first_list * ROWS / CHUNK_ROWS);
    if (first_list == segments) return;

    auto fetch = [&](int which) {
#pragma unroll
        for (int start = 0; start < CHUNK_ROWS * Tile::CHUNKS; start += THREADS) {
            const int i = start + threadIdx.x, r = i / Tile::CHUNKS, c = i % Tile::CHUNKS;
            const int row = min(which * CHUNK_ROWS + r, total_rows - 1);
            copy16_async(Tile::address(chunks + (which & 1) * CHUNK_BYTES, r, c), rows + (long long)row * WIDTH + 8 * c);
        }
        commit_copies();
    };

    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = min(first_key + i, n_keys - 1);
    __syncthreads();
    load_rows<WIDTH, TILE_KEYS, THREADS>(keys, rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned), index);
    commit_copies();
    fetch(chunk);
    wait_copies<0>();
    __syncthreads();

    // The warp's 32 keys, for good. Row g of m-tile m, half h is key 4 g + 2 m + h, so that a lane ends up with four
    // keys in a row.
    unsigned int a[2][D_STEPS][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d)
            load_matrices(a[m][d], Tile::address(keys, warp * 32 + 4 * (lane & 7) + 2 * m + ((lane >> 3) & 1), 2 * d + (lane >> 4)));

    const int key = first_key + warp * 32 + 4 * (lane / 4);
    float u[LISTS][4] = {};  // this lane's share of its four keys' sums
    for (; chunk < chunk_stop; ++chunk) {
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < chunk_stop) fetch(chunk + 1);
        const unsigned int here = Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
        unsigned int b[2][4];
        load_matrices(b[0], here);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            float c[2][2][4];  // [n-tile][m-tile]
#pragma unroll
            for (int d = 0; d < D_STEPS; ++d) {
                const int next = n / 2 * D_STEPS + d + 1;
                if (next < 4 * D_STEPS) load_matrices(b[next % 2], Tile::from(here, next / D_STEPS * 16, next % D_STEPS * 2));
                const unsigned int(&x)[4] = b[d % 2];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (d == 0) mma_from_zero(c[0][m], a[m][0], x[0], x[1]), mma_from_zero(c[1][m], a[m][0], x[2], x[3]);
                    else mma(c[0][m], a[m][d], x[0], x[1]), mma(c[1][m], a[m][d], x[2], x[3]);
                }
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int row = 8 * (n + t);  // of the chunk
                if (PER_LIST == 1) {  // columns 2 quad and the next are lists of their own
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int list = chunk * CHUNK_ROWS + row + 2 * quad + i;
                        if (list < segments && key < history[list])
                            store_scores(scores + starts[list] + key, c[t][0][i], c[t][0][2 + i], c[t][1][i], c[t][1][2 + i]);
                    }
                } else {
                    const bool first = SPAN == 1 || chunk % SPAN == 0;
                    const float* shift = PER_LIST == FULL ? mean + ((long long)order_head * segments + chunk / SPAN) * WIDTH : nullptr;
                    add_shares<PER_LIST>(u[row / ROWS % LISTS], c[t], row % ROWS == 0 && first, shift, keys, chunk % SPAN * CHUNK_ROWS + row);
                }
            }
        }
        if (PER_LIST == 1 || (SPAN > 1 && chunk % SPAN != SPAN - 1)) continue;
        reduce_quad<LISTS>(u);
        constexpr int EACH = LISTS >= 4 ? LISTS / 4 : 1;
        const bool writes = LISTS >= 4 || quad % (4 / LISTS) == 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int list = chunk / SPAN * LISTS + (LISTS >= 4 ? EACH * quad + j : quad * LISTS / 4);
            if (writes && list < segments && key < history[list]) store_scores(scores + starts[list] + key, u[j][0], u[j][1], u[j][2], u[j][3]);
        }
#pragma unroll
        for (int j = 0; j < LISTS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) u[j][i] = 0.f;
    }
}

// FIT: the widest head dim whose registers let two blocks share a multiprocessor.
#define SCORE(NAME, PER_LIST, FIT)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, WIDTH <= FIT ? 2 : 1) NAME(                                   \
        const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,                \
        const half_t* __restrict__ rows, const float* __restrict__ mean, const int* __restrict__ history,               \
        const long long* __restrict__ starts, unsigned short* __restrict__ scores, int heads_kv, int kv_start,          \
        int n_keys, int dim, int segments) {                                                                            \
        score_tile<PER_LIST>(k, k_batch, k_head, k_row, aligned, rows, mean, history, starts, scores, heads_kv,         \
                             kv_start, n_keys, dim, segments);                                                          \
    }
SCORE(score_1, 1, 128)
SCORE(score_8, 8, 64)
SCORE(score_16, 16, 128)
SCORE(score_32, 32, 64)
SCORE(score_64, 64, 64)
SCORE(score_full, FULL, 64)
