// moments.cu: stage 1, first part, 16-bit inputs: what is needed of every segment's finite queries.
//   q       [batch, heads_q, n_q, dim]                    T      element strides given, unit column stride
//   sum     [order heads of the slab, segments, WIDTH]    float  sum of the queries
//   count   [order heads of the slab, segments]           int32  queries that are finite
//   moment  [order heads of the slab, segments, WIDTH, WIDTH] float  sum of q q^T
// T is float16 or bfloat16 (IS_BF16); products are exact and summed in float. An order head is one query head, or
// the query heads of a K/V head (share_order): `members` of them.
// moments_64, _128, _256, by WIDTH: the queries pass once through shared memory, chunk by chunk; a warp has 32 rows of
// the moment and half its columns, and sums of columns are products with a row of ones. A row that is not finite shows
// in them at the end; only then the block starts again and looks at every number.
// means_64, _128, _256: mean rank, the mean query alone, as factor.cuh writes it: queries go straight to registers, 16
// bytes a thread, and are looked at one by one only where a sum is not finite.
// factors_64, _128: moments, and what factor.cuh makes of them, in one block, where moment and factors fit its shared memory.
// grid (segments of the slab, order heads of the slab)   block min(WIDTH, 128) * 2; means: 256
//   moments_256: two blocks a segment, one for each half of the moment's rows, side by side so that queries are read from
//   DRAM once
// shared memory 64 * WIDTH * 2 bytes a stage: 4 stages, 3 at WIDTH 256; factors: specialisations.factors_shared_bytes
// factor, and centres for the mixture rank: see factor.cuh, centres.cuh   macros IS_BF16
#include "centres.cuh"
#include "factor.cuh"
#include "gather.cuh"

constexpr int CHUNK_ROWS = 64;

// Zeroes the rows of a chunk that are not finite, or past its first `present`; returns how many of the first are not.
template <int WIDTH, int THREADS>
__device__ int drop_rows(unsigned int chunk, int present, int* bad) {
    typedef SharedTile<WIDTH> Tile;
    if (threadIdx.x < CHUNK_ROWS) bad[threadIdx.x] = (int)threadIdx.x >= present;
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK_ROWS * Tile::CHUNKS; i += THREADS) {
        unsigned int x[4];
        load_shared16(x, Tile::address(chunk, i / Tile::CHUNKS, i % Tile::CHUNKS));
        if (!(halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3]))) bad[i / Tile::CHUNKS] = 1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < CHUNK_ROWS * Tile::CHUNKS; i += THREADS)
        if (bad[i / Tile::CHUNKS]) zero_shared16(Tile::address(chunk, i / Tile::CHUNKS, i % Tile::CHUNKS));
    return __syncthreads_count(threadIdx.x < present && threadIdx.x < CHUNK_ROWS && bad[threadIdx.x % CHUNK_ROWS]);
}

// What a warp holds of a list's sums: 32 rows of the moment and half its columns, and the columns that it adds up.
template <int WIDTH>
struct Moments {
    static constexpr int BLOCK_ROWS = WIDTH < 128 ? WIDTH : 128, THREADS = 2 * BLOCK_ROWS;
    static constexpr int DOWN = BLOCK_ROWS / 32;       // warps over the rows of the moment, two over its columns
    static constexpr int N_TILES = WIDTH / 16;         // of a warp
    static constexpr int SUM_TILES = N_TILES / DOWN;   // of those, the ones whose columns the warp sums
    float c[2][N_TILES][4], column[SUM_TILES][4];
    int count;  // finite queries

    __device__ __forceinline__ int down() const { return threadIdx.x / 64; }
    __device__ __forceinline__ int right() const { return threadIdx.x / 32 % 2; }
    // All rows of the ones' product are alike: the first four lanes of a warp write them.
    __device__ __forceinline__ void write_sums(float* to) const {
        const int lane = threadIdx.x & 31;
        to += (right() * N_TILES + down() * SUM_TILES) * 8 + 2 * lane;
        if (lane < 4)
#pragma unroll
            for (int n = 0; n < SUM_TILES; ++n) *(float2*)(to + 8 * n) = make_float2(column[n][0], column[n][1]);
    }
    __device__ __forceinline__ void write_moment(float* to, int pitch) const {
        const int lane = threadIdx.x & 31;
        to += (down() * 32 + lane / 4) * pitch + right() * N_TILES * 8 + 2 * (lane % 4);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) *(float2*)(to + 8 * m * pitch + 8 * n) = make_float2(c[m / 2][n][m % 2 * 2], c[m / 2][n][m % 2 * 2 + 1]);
    }
};

// Adds up a list's queries, and their moment (a half of its rows, where it has 256).
template <int WIDTH>
__device__ __forceinline__ void add_moments(
    Moments<WIDTH>& sums, const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    int aligned, int heads_order, int members, int order_start, int n_q, int dim, int segment, int own_segment, int half) {
    typedef SharedTile<WIDTH> Tile;
    constexpr int THREADS = Moments<WIDTH>::THREADS, N_TILES = Moments<WIDTH>::N_TILES, SUM_TILES = Moments<WIDTH>::SUM_TILES;
    constexpr int STAGES = WIDTH < 256 ? 4 : 3, CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2;
    constexpr unsigned int ONES = IS_BF16 ? 0x3f803f80 : 0x3c003c00;
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[2][CHUNK_ROWS], bad[CHUNK_ROWS];
    const unsigned int chunks = shared_address(shared_memory);
    const int lane = threadIdx.x & 31, down = sums.down(), right = sums.right();
    const int order_head = order_start + blockIdx.y, batch = order_head / heads_order;
    const int first = own_segment * segment, rows = min(segment, n_q - first);
    const int per_head = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS, total = per_head * members;

    // Rows of a chunk count from its first; the last chunk of a head repeats its last row.
    if (threadIdx.x < CHUNK_ROWS) {
        index[0][threadIdx.x] = threadIdx.x;
        index[1][threadIdx.x] = min((int)threadIdx.x, (rows - 1) % CHUNK_ROWS);
    }
    auto fetch = [&](int chunk) {
        const int part = chunk % per_head, head = order_head % heads_order * members + chunk / per_head;
        const half_t* from = q + batch * q_batch + head * q_head + (long long)(first + part * CHUNK_ROWS) * q_row;
        load_rows<WIDTH, CHUNK_ROWS, THREADS>(chunks + chunk % STAGES * CHUNK_BYTES, rows_of(from, q_row, dim, aligned), index[part == per_head - 1]);
    };

    auto& c = sums.c;
    auto& column = sums.column;
    int& kept = sums.count;
    const unsigned int ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) c[i / 4][n][i % 4] = 0.f;
#pragma unroll
        for (int n = 0; n < SUM_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) column[n][i] = 0.f;
        kept = 0;
        __syncthreads();
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < total) fetch(s);
            commit_copies();
        }
        for (int chunk = 0; chunk < total; ++chunk) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            if (chunk + STAGES - 1 < total) fetch(chunk + STAGES - 1);
            commit_copies();
            const unsigned int here = chunks + chunk % STAGES * CHUNK_BYTES;
            const int present = min(CHUNK_ROWS, rows - chunk % per_head * CHUNK_ROWS);
            kept += present;
            if (attempt || present < CHUNK_ROWS) kept -= drop_rows<WIDTH, THREADS>(here, present, bad);
#pragma unroll
            for (int r = 0; r < CHUNK_ROWS; r += 16) {
                unsigned int a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    load_matrices_transposed(a[m], Tile::address(here, r + (lane & 7) + (lane >> 4) * 8, half * 16 + down * 4 + 2 * m + ((lane >> 3) & 1)));
#pragma unroll
                for (int n = 0; n < N_TILES; n += 2) {
                    unsigned int b[4];
                    load_matrices_transposed(b, Tile::address(here, r + (lane & 15), right * N_TILES + n + (lane >> 4)));
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma(c[m][n], a[m], b[0], b[1]), mma(c[m][n + 1], a[m], b[2], b[3]);
                    if (n / SUM_TILES == down) mma(column[n % SUM_TILES], ones, b[0], b[1]), mma(column[n % SUM_TILES + 1], ones, b[2], b[3]);
                }
            }
        }
        bool fine = true;
#pragma unroll
        for (int n = 0; n < SUM_TILES; ++n) fine = fine && column[n][0] - column[n][0] == 0.f && column[n][1] - column[n][1] == 0.f;
        if (!__syncthreads_or(!fine)) break;
    }
}

#define MOMENTS(NAME, WIDTH)                                                                                           \
    extern "C" __global__ void __launch_bounds__(Moments<WIDTH>::THREADS) NAME(                                         \
        const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,                \
        float* __restrict__ sum, int* __restrict__ count, float* __restrict__ moment,                                   \
        int heads_order, int members, int order_start, int n_q, int dim, int segment, int segment_start) {              \
        Moments<WIDTH> sums;                                                                                           \
        const int halves = WIDTH > 128 ? WIDTH / 128 : 1, half = blockIdx.x % halves;                                  \
        add_moments(sums, q, q_batch, q_head, q_row, aligned, heads_order, members, order_start, n_q,\
                    dim, segment, segment_start + blockIdx.x / halves, half);                                          \
        const long long list = (long long)blockIdx.y * (gridDim.x / halves) + blockIdx.x / halves;                     \
        if (half == 0) {                                                                                               \
            sums.write_sums(sum + list * WIDTH);                                                                       \
            if (threadIdx.x == 0) count[list] = sums.count;                                                            \
        }                                                                                                              \
        sums.write_moment(moment + (list * WIDTH + half * 128) * WIDTH, WIDTH);                 \
    }
MOMENTS(moments_64, 64)
MOMENTS(moments_128, 128)
MOMENTS(moments_256, 256)

// A list's sums, and what factor.cuh makes of them. A row of the moment in shared memory is 8 numbers longer: rows that a
// warp writes at once lie in different banks.
template <int WIDTH>
__device__ __forceinline__ void factors_of_queries(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,
    half_t* __restrict__ rows, int heads_order, int members, int order_start, int n_q, int dim, int segment,
    int segment_start, int terms, int terms_rows, int tiled, float scale) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ float total[WIDTH];
    constexpr int PITCH = WIDTH + 8;
    float* const moment = (float*)shared_memory;
    int count;
    {
        Moments<WIDTH> sums;
        add_moments(sums, q, q_batch, q_head, q_row, aligned, heads_order, members, order_start, n_q, dim, segment, segment_start + blockIdx.x, 0);
        sums.write_sums(total);
        sums.write_moment(moment, PITCH);
        count = sums.count;
    }
    __syncthreads();
    make_factors<Moments<WIDTH>::THREADS>(shared_memory, WIDTH * PITCH * 4, (long long)blockIdx.y * gridDim.x + blockIdx.x,
                                          total, count, moment, PITCH, rows, nullptr, WIDTH, dim, terms, terms_rows, 0, 0, tiled, scale);
}

#define FACTORS(NAME, WIDTH)                                                                                           \
    extern "C" __global__ void __launch_bounds__(Moments<WIDTH>::THREADS, 2) NAME(                                      \
        const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,                \
        half_t* __restrict__ rows, int heads_order, int members, int order_start, int n_q, int dim, int segment,        \
        int segment_start, int terms, int terms_rows, int tiled, float scale) {                                         \
        factors_of_queries<WIDTH>(q, q_batch, q_head, q_row, aligned, rows, heads_order, members, order_start, n_q,     \
                                  dim, segment, segment_start, terms, terms_rows, tiled, scale);                        \
    }
FACTORS(factors_64, 64)
FACTORS(factors_128, 128)

constexpr int MEAN_THREADS = 256;

template <int WIDTH>
__device__ __forceinline__ void mean_of_queries(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,
    half_t* __restrict__ rows, int heads_order, int members, int order_start, int n_q, int dim, int segment,
    int segment_start, int tiled, float scale) {
    constexpr int PIECES = WIDTH / 8, STRANDS = MEAN_THREADS / PIECES, AHEAD = 4;  // a thread's loads on their way
    __shared__ __align__(16) float partial[STRANDS][WIDTH];
    __shared__ int finite;
    const int piece = threadIdx.x % PIECES, strand = threadIdx.x / PIECES, lane = threadIdx.x & 31;
    const unsigned int own_row = PIECES < 32 ? (1u << PIECES % 32) - 1 << lane / PIECES * PIECES : 0xffffffffu;  // lanes
    const int order_head = order_start + blockIdx.y, first = (segment_start + blockIdx.x) * segment, count = min(segment, n_q - first);
    q += order_head / heads_order * q_batch + (long long)(order_head % heads_order * members) * q_head + (long long)first * q_row + 8 * piece;
    const bool wide = aligned && 8 * piece + 8 <= dim;
    float sum[8];
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
#pragma unroll
        for (int d = 0; d < 8; ++d) sum[d] = 0.f;
        if (threadIdx.x == 0) finite = attempt ? 0 : members * count;
        __syncthreads();
        for (int member = 0; member < members; ++member) {
            const half_t* const from = q + member * q_head;
#pragma unroll 1
            for (int start = 0; start < count; start += AHEAD * STRANDS) {
                uint4 x[AHEAD];
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    const int i = start + j * STRANDS + strand;
                    const half_t* const row = from + (long long)i * q_row;
                    x[j] = make_uint4(0, 0, 0, 0);
                    if (wide && i < count) x[j] = *(const uint4*)row;
                    else if (i < count)
                        for (int d = 0; d < 8; ++d)
                            if (8 * piece + d < dim) ((half_t*)(x + j))[d] = row[d];
                }
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    if (attempt) {
                        const bool fine = halves_are_finite(x[j].x) && halves_are_finite(x[j].y) && halves_are_finite(x[j].z) && halves_are_finite(x[j].w);
                        const bool drop = __ballot_sync(0xffffffffu, !fine) & own_row;
                        if (drop) x[j] = make_uint4(0, 0, 0, 0);
                        else if (piece == 0 && start + j * STRANDS + strand < count) atomicAdd(&finite, 1);
                    }
                    const unsigned int pairs[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
#pragma unroll
                    for (int d = 0; d < 8; ++d) sum[d] += half_to_float((half_t)(pairs[d / 2] >> 16 * (d % 2)));
                }
            }
        }
        *(float4*)&partial[strand][8 * piece] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *(float4*)&partial[strand][8 * piece + 4] = make_float4(sum[4], sum[5], sum[6], sum[7]);
        __syncthreads();
        float total = 0.f;
        if (threadIdx.x < WIDTH)
            for (int s = 0; s < STRANDS; ++s) total += partial[s][threadIdx.x];
        const int n = finite;
        if (__syncthreads_or(total - total != 0.f) && attempt == 0) continue;
        if (threadIdx.x < WIDTH) {
            const float mean = total * (n ? 1.f / n : 0.f);
            const long long list = tiled ? blockIdx.x : (long long)blockIdx.y * gridDim.x + blockIdx.x;
            if (tiled) rows += (long long)blockIdx.y * tiled_rows(tiled, 1) * WIDTH;
            rows[tiled ? tiled_place(dealt_row(list), threadIdx.x, WIDTH) : list * WIDTH + threadIdx.x] = float_to_half(scale * mean);
        }
        return;
    }
}

#define MEANS(NAME, WIDTH)                                                                                             \
    extern "C" __global__ void __launch_bounds__(MEAN_THREADS, 4) NAME(                                                 \
        const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,                \
        half_t* __restrict__ rows, int heads_order, int members, int order_start, int n_q, int dim, int segment,        \
        int segment_start, int tiled, float scale) {                                                                    \
        mean_of_queries<WIDTH>(q, q_batch, q_head, q_row, aligned, rows, heads_order, members, order_start, n_q, dim,   \
                               segment, segment_start, tiled, scale);                                                   \
    }
MEANS(means_64, 64)
MEANS(means_128, 128)
MEANS(means_256, 256)
