// score.cu: stage 1, last part. One score for each (order head, segment, history key): a tensor-core product of the
// keys with every segment's rows (factor.cuh), summed up in registers.
//   k        [batch, heads_kv, n_keys, dim]               T      element strides given, unit column stride
//   rows     [order heads of the slab, segments, PER_LIST, WIDTH] T   mean query, then covariance factors
//   mean     [order heads of the slab, segments, WIDTH]   float  scale * mean query; score_full alone reads it
//   history  [segments of the slab]                       int32  keys [0, history) are scored
//   starts   [segments of the slab + 1]                   int64  where a list's scores start in its head's
//   score    [order heads of the slab, starts[segments]]  half   natural-log units, clamped to half's range
// T is float16 or bfloat16 (IS_BF16). One kernel for each number of rows a list has: score_1 (mean rank), score_8,
// score_16, score_32, score_64; the first row is linear, the others are squared. score_full: WIDTH rows, and
// score = sum_i (row_i . k + mean_i) k_i.
// The mixture rank (centres.cuh) takes four kernels: score_square, as score_1 with squared keys, leaves a list's
// quadratic term where its scores will be; normalise sums a centre's exponentials over part_keys keys (a multiple of 64), and join_parts
// over the history; score_mixture adds the centres up.
//   rows     [order heads of the slab, segments, per_list, WIDTH]  T  centres; per_list is 32 or a multiple of 64
//   partial  [order heads of the slab, parts, segments * per_list, 2]  float  exponent and sum of a part of the keys
//   offset   [order heads of the slab, segments, per_list]  float  log2 of a centre's share; join_parts takes twice log2
//                                                                  of its sum from that
// grid (key tiles of the longest history, order heads of a K/V head, K/V heads of the slab)   block WARPS * 32
//   normalise: for each part of the longest history, tiles of WARPS * 32 rows of a head, in place of key tiles
//   join_parts: (rows of a head / 256, order heads of the slab)   block 256
// shared memory (WARPS * 32 + 2 * 64) * WIDTH * 2 + 512 bytes   macros IS_BF16, WIDTH (64, 128, 256), WARPS
#include "gather.cuh"
#include "scores.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE_KEYS = WARPS * 32;
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2;
constexpr int D_STEPS = WIDTH / 16;
typedef SharedTile<WIDTH> Tile;

enum { FULL = 0, SQUARE = -1 };  // in place of PER_LIST

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
                const unsigned int pair = load_shared4(Tile::address(keys, key + 2 * m + h, column / 8) + 4 * quad);
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

// Starts the copy of a chunk of 64 factor rows, or centres, to its half of `chunks`.
__device__ __forceinline__ void fetch_rows(unsigned int chunks, const half_t* rows, int chunk, int total_rows) {
#pragma unroll
    for (int start = 0; start < CHUNK_ROWS * Tile::CHUNKS; start += THREADS) {
        const int i = start + threadIdx.x, r = i / Tile::CHUNKS, c = i % Tile::CHUNKS;
        const int row = min(chunk * CHUNK_ROWS + r, total_rows - 1);
        copy16_async(Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, r, c), rows + (long long)row * WIDTH + 8 * c);
    }
}

// The warp's 32 keys in registers, for good. Row g of m-tile m, half h is key 4 g + 2 m + h, so that a lane ends up
// with four keys in a row.
__device__ __forceinline__ void load_keys(unsigned int (&a)[2][D_STEPS][4], unsigned int keys) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d)
            load_matrices(a[m][d], Tile::address(keys, warp * 32 + 4 * (lane & 7) + 2 * m + ((lane >> 3) & 1), 2 * d + (lane >> 4)));
}

// The squares of a pair of elements, as bfloat16: float16 has not their range.
__device__ __forceinline__ unsigned int squares(unsigned int pair) {
    const float x = half_to_float((half_t)pair), y = half_to_float((half_t)(pair >> 16));
    return float_to_bfloat16(x * x) | (unsigned int)float_to_bfloat16(y * y) << 16;
}

// c[t][m] = the warp's two m-tiles of `a` times rows 8 n + 8 t .. of a chunk, whose first matrices `b` already holds;
// leaves in `b` the first of the next pair of n-tiles.
template <bool SQUARES>
__device__ __forceinline__ void multiply_pair(float (&c)[2][2][4], const unsigned int (&a)[2][D_STEPS][4], unsigned int (&b)[2][4], unsigned int here, int n) {
#pragma unroll
    for (int d = 0; d < D_STEPS; ++d) {
        const int next = n / 2 * D_STEPS + d + 1;
        if (next < 4 * D_STEPS) load_matrices(b[next % 2], Tile::from(here, next / D_STEPS * 16, next % D_STEPS * 2));
        const unsigned int(&x)[4] = b[d % 2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (SQUARES) {
                if (d == 0)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[0][m][i] = c[1][m][i] = 0.f;
                mma_bfloat16(c[0][m], a[m][d], x[0], x[1]), mma_bfloat16(c[1][m], a[m][d], x[2], x[3]);
            } else if (d == 0) {
                mma_from_zero(c[0][m], a[m][0], x[0], x[1]), mma_from_zero(c[1][m], a[m][0], x[2], x[3]);
            } else {
                mma(c[0][m], a[m][d], x[0], x[1]), mma(c[1][m], a[m][d], x[2], x[3]);
            }
        }
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
    constexpr int ROWS = PER_LIST == FULL ? WIDTH : PER_LIST == SQUARE ? 1 : PER_LIST;  // of a list
    constexpr int LISTS = ROWS >= CHUNK_ROWS ? 1 : CHUNK_ROWS / ROWS;         // of a chunk
    constexpr int SPAN = ROWS >= CHUNK_ROWS ? ROWS / CHUNK_ROWS : 1;          // chunks of a list
    const unsigned int keys = shared_address(shared_memory), chunks = keys + TILE_KEYS * WIDTH * 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y;
    rows += (long long)order_head * segments * ROWS * WIDTH;
    scores += order_head * starts[segments];

    const int first_list = first_list_at<THREADS>(history, segments, first_key);
    const int total_rows = segments * ROWS, chunk_stop = (total_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int chunk = (int)((long long)first_list * ROWS / CHUNK_ROWS);
    if (first_list == segments) return;

    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = min(first_key + i, n_keys - 1);
    __syncthreads();
    load_rows<WIDTH, TILE_KEYS, THREADS>(keys, rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned), index);
    fetch_rows(chunks, rows, chunk, total_rows);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    unsigned int a[2][D_STEPS][4];
    load_keys(a, keys);
    if (PER_LIST == SQUARE)
#pragma unroll
        for (int i = 0; i < 8 * D_STEPS; ++i) a[i % 2][i / 2 % D_STEPS][i / 2 / D_STEPS] = squares(a[i % 2][i / 2 % D_STEPS][i / 2 / D_STEPS]);

    const int key = first_key + warp * 32 + 4 * (lane / 4);
    float u[LISTS][4] = {};  // this lane's share of its four keys' sums
    for (; chunk < chunk_stop; ++chunk) {
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < chunk_stop) fetch_rows(chunks, rows, chunk + 1, total_rows);
        commit_copies();
        const unsigned int here = Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
        unsigned int b[2][4];
        load_matrices(b[0], here);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            float c[2][2][4];  // [n-tile][m-tile]
            multiply_pair<PER_LIST == SQUARE>(c, a, b, here, n);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int row = 8 * (n + t);  // of the chunk
                if (ROWS == 1) {  // columns 2 quad and the next are lists of their own
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
        if (ROWS == 1 || (SPAN > 1 && chunk % SPAN != SPAN - 1)) continue;
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
SCORE(score_full, FULL, 0)
SCORE(score_square, SQUARE, 128)

extern "C" __global__ void __launch_bounds__(THREADS, 1) normalise(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, float2* __restrict__ partial, const int* __restrict__ history,
    const long long* __restrict__ starts, const unsigned short* __restrict__ scores, int heads_kv, int kv_start,
    int n_keys, int dim, int segments, int per_list, float unit, int part_keys) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[2][CHUNK_ROWS];
    constexpr int TILE_ROWS = THREADS;
    const unsigned int mine = shared_address(shared_memory), chunks = mine + TILE_ROWS * WIDTH * 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int kv = kv_start + blockIdx.z, order_head = blockIdx.z * gridDim.y + blockIdx.y;
    const int total_rows = segments * per_list, tiles = (total_rows + TILE_ROWS - 1) / TILE_ROWS, part = blockIdx.x / tiles;
    const int first_row = (tiles - 1 - (int)blockIdx.x % tiles) * TILE_ROWS, part_key = part * part_keys;  // longest first
    const int list = (first_row + warp * 32) / per_list, stop = list < segments ? history[list] : 0;
    const int last = min(history[min((first_row + TILE_ROWS - 1) / per_list, segments - 1)], part_key + part_keys);
    if (part_key >= last) return;
    rows += (long long)order_head * total_rows * WIDTH;
    partial += ((long long)order_head * (gridDim.x / tiles) + part) * total_rows;
    scores += order_head * starts[segments] + (list < segments ? starts[list] : 0) + 2 * quad;
    const Rows from = rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned);

    auto fetch = [&](int chunk) {
        int* keys = index[chunk & 1];
        if (threadIdx.x < CHUNK_ROWS) keys[threadIdx.x] = min(chunk * CHUNK_ROWS + (int)threadIdx.x, n_keys - 1);
        __syncthreads();
        load_rows<WIDTH, CHUNK_ROWS, THREADS>(chunks + (chunk & 1) * CHUNK_BYTES, from, keys);
        commit_copies();
    };

    for (int i = threadIdx.x; i < TILE_ROWS * Tile::CHUNKS; i += THREADS) {
        const int r = i / Tile::CHUNKS, c = i % Tile::CHUNKS;
        copy16_async(Tile::address(mine, r, c), rows + (long long)min(first_row + r, total_rows - 1) * WIDTH + 8 * c);
    }
    fetch(part_key / CHUNK_ROWS);
    wait_copies<0>();
    __syncthreads();
    unsigned int a[2][D_STEPS][4];  // the warp's 32 centres
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d) load_matrices(a[m][d], Tile::address(mine, warp * 32 + 16 * m + (lane & 15), 2 * d + (lane >> 4)));

    PowerSum sums[4];  // of rows lane / 4 + 8 i, over this lane's keys
    for (int i = 0; i < 4; ++i) sums[i].clear();
    for (int chunk = part_key / CHUNK_ROWS; chunk * CHUNK_ROWS < last; ++chunk) {
        const int first_key = chunk * CHUNK_ROWS;
        wait_copies<0>();
        __syncthreads();
        if (first_key + CHUNK_ROWS < last) fetch(chunk + 1);
        if (first_key >= stop) continue;
        unsigned int quadratic[8], b[2][4];
#pragma unroll
        for (int n = 0; n < 8; ++n) quadratic[n] = *(const unsigned int*)(scores + first_key + 8 * n);
        const unsigned int here = Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
        load_matrices(b[0], here);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            float c[2][2][4];
            multiply_pair<false>(c, a, b, here, n);
            float bias[4];  // of keys 8 (n + i / 2) + 2 quad + i % 2
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first_key + 8 * (n + i / 2) + 2 * quad + i % 2;
                bias[i] = LOG2_E * score_to_float((unsigned short)(quadratic[n + i / 2] >> 16 * (i % 2)));
                if (key < stop) continue;
                bias[i] = NEGATIVE_INFINITY;  // whatever the key is
#pragma unroll
                for (int r = 0; r < 4; ++r) c[i / 2][r / 2][r % 2 * 2 + i % 2] = 0.f;
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = fmaf(c[i / 2][r / 2][r % 2 * 2 + i % 2], unit, bias[i]);
                const float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
                if (top > sums[r].frame + 8.f) sums[r].raise(top);  // seldom, once the great ones were seen
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r].sum += exp2_approx(x[i] - sums[r].frame);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        for (int step = 1; step < 4; step *= 2) {
            const float frame = __shfl_xor_sync(0xffffffffu, sums[r].frame, step), sum = __shfl_xor_sync(0xffffffffu, sums[r].sum, step);
            sums[r].add(frame, sum);
        }
        const int row = first_row + warp * 32 + lane / 4 + 8 * r;
        if (quad == 0 && row < total_rows) partial[row] = make_float2(sums[r].frame, sums[r].sum);
    }
}

extern "C" __global__ void __launch_bounds__(256) join_parts(
    const float2* __restrict__ partial, float* __restrict__ offset, const int* __restrict__ history, int parts,
    int segments, int per_list, int head_rows, int part_keys) {
    const int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= segments * per_list) return;
    partial += (long long)blockIdx.y * parts * head_rows + row;
    offset += (long long)blockIdx.y * head_rows + row;
    if (*offset == NEGATIVE_INFINITY) return;  // a centre without queries
    PowerSum sum;
    sum.clear();
    for (int part = 0; part * part_keys < history[row / per_list]; ++part) {
        const float2 x = partial[(long long)part * head_rows];
        sum.add(x.x, x.y);
    }
    *offset -= 2.f * sum.log2();
}

constexpr int GROUP_ROWS = WIDTH <= 128 ? 32 : 16;  // products held at once

extern "C" __global__ void __launch_bounds__(THREADS, 1) score_mixture(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const float* __restrict__ offset, const int* __restrict__ history,
    const long long* __restrict__ starts, unsigned short* __restrict__ scores, int heads_kv, int kv_start,
    int n_keys, int dim, int segments, int per_list, float unit) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[TILE_KEYS];
    const unsigned int keys = shared_address(shared_memory), chunks = keys + TILE_KEYS * WIDTH * 2;
    const float* const staged = (const float*)(shared_memory + TILE_KEYS * WIDTH * 2 + 2 * CHUNK_BYTES);  // [2][64] offsets
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y, total_rows = segments * per_list;
    rows += (long long)order_head * total_rows * WIDTH;
    offset += (long long)order_head * total_rows;
    scores += order_head * starts[segments];
    const int first_list = first_list_at<THREADS>(history, segments, first_key);
    if (first_list == segments) return;

    auto fetch = [&](int chunk) {
        fetch_rows(chunks, rows, chunk, total_rows);
        if (threadIdx.x < CHUNK_ROWS / 4)
            copy16_async(chunks + 2 * CHUNK_BYTES + (chunk & 1) * CHUNK_ROWS * 4 + 16 * threadIdx.x,
                         offset + min(chunk * CHUNK_ROWS + 4 * (int)threadIdx.x, total_rows - 4));
        commit_copies();
    };

    int chunk = (int)((long long)first_list * per_list / CHUNK_ROWS);
    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = min(first_key + i, n_keys - 1);
    __syncthreads();
    load_rows<WIDTH, TILE_KEYS, THREADS>(keys, rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned), index);
    fetch(chunk);
    wait_copies<0>();
    __syncthreads();
    unsigned int a[2][D_STEPS][4];
    load_keys(a, keys);

    const int key = first_key + warp * 32 + lane;  // the one that this lane writes
    PowerSum sums[4];                              // of the lane's four keys, over its columns
    for (; chunk * CHUNK_ROWS < total_rows; ++chunk) {
        wait_copies<0>();
        __syncthreads();
        if ((chunk + 1) * CHUNK_ROWS < total_rows) fetch(chunk + 1);
        const unsigned int here = Tile::address(chunks + (chunk & 1) * CHUNK_BYTES, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
        unsigned int b[2][4];
        load_matrices(b[0], here);
#pragma unroll
        for (int part = 0; part < CHUNK_ROWS; part += GROUP_ROWS) {
            const int row = chunk * CHUNK_ROWS + part, list = row / per_list;
            float c[GROUP_ROWS / 16][2][2][4];
#pragma unroll
            for (int pair = 0; pair < GROUP_ROWS / 16; ++pair) multiply_pair<false>(c[pair], a, b, here, part / 8 + 2 * pair);
            float2 shift[GROUP_ROWS / 8];
#pragma unroll
            for (int n = 0; n < GROUP_ROWS / 8; ++n) shift[n] = *(const float2*)(staged + (chunk & 1) * CHUNK_ROWS + part + 8 * n + 2 * quad);
            const bool begins = row % per_list == 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float x[GROUP_ROWS / 4], top = -1e30f;
#pragma unroll
                for (int j = 0; j < GROUP_ROWS / 4; ++j) {
                    x[j] = fmaf(c[j / 4][j / 2 % 2][i / 2][i % 2 * 2 + j % 2], 2.f * unit, j % 2 ? shift[j / 2].y : shift[j / 2].x);
                    top = fmaxf(top, x[j]);
                }
                if (begins) sums[i].frame = top, sums[i].sum = 0.f;
                else if (top > sums[i].frame) sums[i].raise(top);
#pragma unroll
                for (int j = 0; j < GROUP_ROWS / 4; ++j) sums[i].sum += exp2_approx(x[j] - sums[i].frame);
            }
            if ((row + GROUP_ROWS) % per_list) continue;
            // The quad's lanes add up: first two keys each, then one.
#pragma unroll
            for (int step = 2; step; step /= 2)
#pragma unroll
                for (int i = 0; i < step; ++i) {
                    const bool upper = quad & step;
                    const PowerSum mine = upper ? sums[step + i] : sums[i], other = upper ? sums[i] : sums[step + i];
                    const float frame = __shfl_xor_sync(0xffffffffu, other.frame, step), sum = __shfl_xor_sync(0xffffffffu, other.sum, step);
                    sums[i] = mine;
                    sums[i].add(frame, sum);
                }
            if (list < segments && key < history[list]) {
                unsigned short* to = scores + starts[list] + key;
                *to = score_bits(score_to_float(*to) + 0.5f * LN_2 * sums[0].log2());
            }
        }
    }
}
