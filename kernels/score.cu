// score.cu: stage 1, last part. One score for each (order head, segment, history key): a tensor-core product of the
// keys with every segment's rows (factor.cu), summed up in registers.
//   k        [batch, heads_kv, n_keys, dim]               T      element strides given, unit column stride
//   rows     [order heads of the slab, segments, per_list, WIDTH] T   mean query, then covariance factors
//   mean     [order heads of the slab, segments, WIDTH]   float  the mean's share in full mode, else null
//   history  [segments of the slab]                       int32  keys [0, history) are scored
//   starts   [segments of the slab + 1]                   int64  where a list's scores start in its head's
//   score    [order heads of the slab, starts[segments]]  half   natural-log units, clamped to half's range
// T is float16 or bfloat16 (IS_BF16). per_list: 1 (mean rank), 8, 16, 32 or a multiple of 64 rows; the first row is
// linear, the others are squared. With `mean`, per_list = WIDTH and score = sum_i (row_i . k + mean_i) k_i.
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

// Four keys in a row of one list.
__device__ __forceinline__ void store_scores(unsigned short* to, float a, float b, float c, float d) {
    *(uint2*)to = make_uint2(score_bits(a) | (unsigned int)score_bits(b) << 16, score_bits(c) | (unsigned int)score_bits(d) << 16);
}

extern "C" __global__ void __launch_bounds__(THREADS) score(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const float* __restrict__ mean, const int* __restrict__ history,
    const long long* __restrict__ starts, unsigned short* __restrict__ scores,
    int heads_kv, int kv_start, int n_keys, int dim, int segments, int per_list) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[TILE_KEYS];
    const unsigned int keys = shared_address(shared_memory), chunks = keys + TILE_KEYS * WIDTH * 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y;
    rows += (long long)order_head * segments * per_list * WIDTH;
    scores += order_head * starts[segments];

    // Histories grow with the segment: the first list that reaches this tile of keys.
    int first_list = 0;
    for (int step = 1 << 20; step; step /= 2)
        if (first_list + step <= segments && history[first_list + step - 1] <= first_key) first_list += step;
    const int total_rows = segments * per_list;
    int chunk = first_list * per_list / CHUNK_ROWS;
    const int chunk_stop = (total_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;

    auto fetch = [&](int which) {
        for (int i = threadIdx.x; i < CHUNK_ROWS * Tile::CHUNKS; i += THREADS) {
            const int r = i / Tile::CHUNKS, c = i % Tile::CHUNKS, row = which * CHUNK_ROWS + r;
            const bool present = row < total_rows;
            copy16_async(Tile::address(chunks + (which & 1) * CHUNK_BYTES, r, c), rows + (present ? (long long)row * WIDTH + 8 * c : 0), present ? 16 : 0);
        }
        commit_copies();
    };

    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = first_key + i < n_keys ? first_key + i : -1;
    __syncthreads();
    const Rows from = {k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned != 0};
    load_rows<WIDTH, TILE_KEYS, THREADS>(keys, from, index);
    commit_copies();
    if (chunk < chunk_stop) fetch(chunk);
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
    float carried[4] = {};  // of a list that spans chunks
    for (; chunk < chunk_stop; ++chunk) {
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < chunk_stop) fetch(chunk + 1);
        const unsigned int here = Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
        float u[8][4];  // for each 8 rows: this lane's share of its four keys' sums
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            float c[2][2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int t = 0; t < 2; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[m][t][i] = 0.f;
#pragma unroll
            for (int d = 0; d < D_STEPS; ++d) {
                unsigned int b[4];
                load_matrices(b, Tile::from(here, 8 * n, 2 * d));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma(c[m][0], a[m][d], b[0], b[1]);
                    mma(c[m][1], a[m][d], b[2], b[3]);
                }
            }
            if (per_list == 1) {
                // Mean rank: column 2 quad + i of each 8 is a list of its own.
#pragma unroll
                for (int t = 0; t < 2; ++t)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int list = chunk * CHUNK_ROWS + 8 * (n + t) + 2 * quad + i;
                        if (list < segments && key < history[list])
                            store_scores(scores + starts[list] + key, c[0][t][i], c[0][t][2 + i], c[1][t][i], c[1][t][2 + i]);
                    }
                continue;
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int row = chunk * CHUNK_ROWS + 8 * (n + t);  // of the order head's rows
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float x = c[m][t][2 * h], y = c[m][t][2 * h + 1];
                        float& share = u[n + t][2 * m + h];
                        if (mean != nullptr) {
                            const int column = row % WIDTH + 2 * quad;
                            const float* shift = mean + ((long long)order_head * segments + row / WIDTH) * WIDTH + column;
                            unsigned int pair;
                            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(Tile::address(keys, warp * 32 + 4 * (lane / 4) + 2 * m + h, column / 8) + 2 * (column % 8)));
                            share = (x + shift[0]) * half_to_float((half_t)pair) + (y + shift[1]) * half_to_float((half_t)(pair >> 16));
                        } else {
                            share = (row % per_list == 0 && quad == 0 ? x : x * x) + y * y;
                        }
                    }
            }
        }
        if (per_list == 1) continue;

        // The quad's four shares are added up so that lane `quad` keeps rows 16 quad to 16 quad + 15.
        float pair_sum[2][2][4];  // [which pair of the lane's half][n in pair]
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float mine = quad & 2 ? u[4 + j][i] : u[j][i], other = quad & 2 ? u[j][i] : u[4 + j][i];
                pair_sum[j / 2][j % 2][i] = mine + __shfl_xor_sync(0xffffffffu, other, 2);
            }
        float both[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float mine = quad & 1 ? pair_sum[1][j][i] : pair_sum[0][j][i];
                const float other = quad & 1 ? pair_sum[0][j][i] : pair_sum[1][j][i];
                both[j][i] = mine + __shfl_xor_sync(0xffffffffu, other, 1);
            }
        if (per_list == 8) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int list = chunk * 8 + 2 * quad + j;
                if (list < segments && key < history[list])
                    store_scores(scores + starts[list] + key, both[j][0], both[j][1], both[j][2], both[j][3]);
            }
            continue;
        }
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = both[0][i] + both[1][i];
        int list = chunk * 4 + quad;
        bool writes = true;
        if (per_list >= 32) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], 1);
            list = chunk * 2 + quad / 2, writes = quad % 2 == 0;
        }
        if (per_list >= 64) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], 2) + carried[i];
            const bool ends = (chunk + 1) * CHUNK_ROWS % per_list == 0;
            list = chunk * CHUNK_ROWS / per_list, writes = quad == 0 && ends;
#pragma unroll
            for (int i = 0; i < 4; ++i) carried[i] = ends ? 0.f : x[i];
        }
        if (writes && list < segments && key < history[list]) store_scores(scores + starts[list] + key, x[0], x[1], x[2], x[3]);
    }
}
