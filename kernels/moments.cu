// moments.cu: stage 1, first part. Sum and raw second moment of every segment's finite queries, 16-bit inputs.
//   q       [batch, heads_q, n_q, dim]                    T      element strides given, unit column stride
//   sum     [order heads of the slab, segments, WIDTH]    float  sum of the queries
//   count   [order heads of the slab, segments]           int32  queries that are finite
//   moment  [order heads of the slab, segments, WIDTH, WIDTH] float  sum of q q^T; null: not wanted (mean rank)
// T is float16 or bfloat16 (IS_BF16); products are exact and summed in float. An order head is one query head, or
// the query heads of a K/V head (share_order): `members` of them.
// grid (segments of the slab, order heads of the slab, moment ? WIDTH / 64 : 1)   block 128
// shared memory 2 * 64 * WIDTH * 2 bytes   macros IS_BF16, WIDTH (64, 128, 256)
#include "centres.cuh"
#include "gather.cuh"

constexpr int THREADS = 128;
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2;
constexpr int N_TILES = WIDTH / 8;
typedef SharedTile<WIDTH> Tile;

// Zeroes the rows of a chunk that are not finite, or past its first `present`; returns how many are left.
__device__ __forceinline__ int keep_finite(unsigned int chunk, int present, int* bad) {
    if (threadIdx.x < CHUNK_ROWS) bad[threadIdx.x] = (int)threadIdx.x >= present;
    __syncthreads();
    bool found = present < CHUNK_ROWS;
    for (int i = threadIdx.x; i < CHUNK_ROWS * Tile::CHUNKS; i += THREADS) {
        unsigned int x[4];
        const unsigned int address = Tile::address(chunk, i / Tile::CHUNKS, i % Tile::CHUNKS);
        load_shared16(x, address);
        if (!(halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3])))
            bad[i / Tile::CHUNKS] = 1, found = true;
    }
    if (__syncthreads_or(found)) {
        for (int i = threadIdx.x; i < CHUNK_ROWS * Tile::CHUNKS; i += THREADS)
            if (bad[i / Tile::CHUNKS])
                zero_shared16(Tile::address(chunk, i / Tile::CHUNKS, i % Tile::CHUNKS));
    }
    return __syncthreads_count(threadIdx.x < CHUNK_ROWS && !bad[threadIdx.x % CHUNK_ROWS]);
}

extern "C" __global__ void __launch_bounds__(THREADS) moments(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row, int aligned,
    float* __restrict__ sum, int* __restrict__ count, float* __restrict__ moment,
    int heads_order, int members, int order_start, int n_q, int dim, int segment, int segment_start) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[2][CHUNK_ROWS], bad[CHUNK_ROWS];
    const unsigned int chunks = shared_address(shared_memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int order_head = order_start + blockIdx.y, batch = order_head / heads_order;
    const int first = (segment_start + blockIdx.x) * segment, rows = min(segment, n_q - first);
    const int per_head = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS, total = per_head * members;
    const bool leads = blockIdx.z == 0;

    auto fetch = [&](int chunk) {
        const int r = chunk % per_head * CHUNK_ROWS, head = order_head % heads_order * members + chunk / per_head;
        int* row_index = index[chunk & 1];
        if (threadIdx.x < CHUNK_ROWS) row_index[threadIdx.x] = first + min(r + (int)threadIdx.x, rows - 1);
        __syncthreads();
        const Rows from = rows_of(q + batch * q_batch + head * q_head, q_row, dim, aligned);
        load_rows<WIDTH, CHUNK_ROWS, THREADS>(chunks + (chunk & 1) * CHUNK_BYTES, from, row_index);
        commit_copies();
    };

    float c[N_TILES][4];
    float column_sum[(WIDTH + THREADS - 1) / THREADS] = {};
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
    int kept = 0;
    fetch(0);
    for (int chunk = 0; chunk < total; ++chunk) {
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < total) fetch(chunk + 1);
        const unsigned int here = chunks + (chunk & 1) * CHUNK_BYTES;
        kept += keep_finite(here, rows - chunk % per_head * CHUNK_ROWS, bad);
        if (leads) {
#pragma unroll
            for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; ++i) {
                const int column = threadIdx.x + i * THREADS;
                if (column >= WIDTH) break;
                float part = 0.f;
#pragma unroll 8
                for (int r = 0; r < CHUNK_ROWS; ++r) {
                    const unsigned int pair = load_shared4(Tile::address(here, r, column / 8) + 2 * (column % 8 & ~1));
                    part += half_to_float((half_t)(pair >> 16 * (column % 2)));
                }
                column_sum[i] += part;
            }
        }
        if (moment != nullptr) {
            const int mine = blockIdx.z * 8 + warp * 2;  // chunk column of the warp's 16 rows of the moment
#pragma unroll
            for (int r = 0; r < CHUNK_ROWS; r += 16) {
                unsigned int a[4];
                load_matrices_transposed(a, Tile::address(here, r + (lane & 7) + (lane >> 4) * 8, mine + ((lane >> 3) & 1)));
#pragma unroll
                for (int n = 0; n < N_TILES; n += 2) {
                    unsigned int b[4];
                    load_matrices_transposed(b, Tile::address(here, r + (lane & 15), n + (lane >> 4)));
                    mma(c[n], a, b[0], b[1]);
                    mma(c[n + 1], a, b[2], b[3]);
                }
            }
        }
    }
    const long long list = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    if (leads) {
#pragma unroll
        for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; ++i)
            if (threadIdx.x + i * THREADS < WIDTH) sum[list * WIDTH + threadIdx.x + i * THREADS] = column_sum[i];
        if (threadIdx.x == 0) count[list] = kept;
    }
    if (moment == nullptr) return;
    float* to = moment + (list * WIDTH + blockIdx.z * 64 + warp * 16 + lane / 4) * WIDTH + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        *(float2*)(to + 8 * n) = make_float2(c[n][0], c[n][1]);
        *(float2*)(to + 8 * WIDTH + 8 * n) = make_float2(c[n][2], c[n][3]);
    }
}

extern "C" __global__ void __launch_bounds__(CENTRE_THREADS) centres(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    half_t* __restrict__ rows, float* __restrict__ share, half_t* __restrict__ variance, int* __restrict__ place,
    int heads_order, int members, int order_start, int n_q, int dim, int segment, int segment_start,
    int width, int terms, int per_list, int capacity, float scale) {
    find_centres(q, q_batch, q_head, q_row, rows, share, variance, place, heads_order, members, order_start, n_q, dim,
                 segment, segment_start, width, terms, per_list, capacity, scale);
}
