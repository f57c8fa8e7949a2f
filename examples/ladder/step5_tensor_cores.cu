// step5_tensor_cores.cu: both products on tensor cores (mma.sync, by kernels/products.cuh), tiles in 16 bits. A warp owns
// 16 rows; weights go from one product to the next in registers. Nothing is in flight while a tile is multiplied.
// Arrays are those of step3_tiles.cu; numbers of a softmax are in base 2, as in kernels/attend.cu.
// grid (row tiles, heads_q)   block 2 * BLOCK_M threads for BLOCK_M rows   macros DIM (32, 64, 96, ...), BLOCK_M
// shared memory 2 * DIM * (BLOCK_M + 2 * BLOCK_N) bytes + (BLOCK_M + BLOCK_N) int32
#include "online_softmax.cuh"
#include "products.cuh"

constexpr int BLOCK_N = 64, THREADS = 2 * BLOCK_M, N_TILES = BLOCK_N / 8, V_TILES = DIM / 8;

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const half_t* __restrict__ q, const half_t* __restrict__ k, const half_t* __restrict__ v, const int* __restrict__ order,
    const long long* __restrict__ starts, half_t* __restrict__ out, int* __restrict__ tiles,
    int heads_kv, int n, int segment, int block_k, float tau, float scale) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned int q_tile = shared_address(memory), k_tile = q_tile + 2 * DIM * BLOCK_M, v_tile = k_tile + 2 * DIM * BLOCK_N;
    int* const q_index = (int*)(memory + 2 * DIM * (BLOCK_M + 2 * BLOCK_N));
    int* const index = q_index + BLOCK_M;
    const int head = blockIdx.y, first = blockIdx.x * BLOCK_M, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const int history = first / segment * segment, kv = head / (gridDim.y / heads_kv), segments = (n + segment - 1) / segment;
    const Rows queries = rows_of(q + (long long)head * n * DIM, DIM, DIM, true);
    const Rows keys = rows_of(k + (long long)kv * n * DIM, DIM, DIM, true), values = rows_of(v + (long long)kv * n * DIM, DIM, DIM, true);
    const int row = first + warp_row + lane / 4;  // this lane's rows are `row` and `row + 8`
    const float unit = scale * LOG2_E;

    if (threadIdx.x < BLOCK_M) q_index[threadIdx.x] = min(first + (int)threadIdx.x, n - 1);
    __syncthreads();
    load_rows<DIM, BLOCK_M, THREADS>(q_tile, queries, q_index);
    commit_copies();
    float o[1][V_TILES][4] = {};
    RowSoftmax softmax[2];
    softmax[0].clear(), softmax[1].clear();

    // Keys [begin, stop) of the list `from`, or of the array; `causal`: a row sees keys up to its own.
    auto add_keys = [&](const int* from, int begin, int stop, bool causal) {
        for (int start = begin; start < stop; start += BLOCK_N) {
            const int count = min(BLOCK_N, stop - start);
            __syncthreads();
            if (threadIdx.x < BLOCK_N) {
                const int place = start + min((int)threadIdx.x, count - 1);
                index[threadIdx.x] = from ? from[place] : place;
            }
            __syncthreads();
            load_rows<DIM, BLOCK_N, THREADS>(k_tile, keys, index);
            load_rows<DIM, BLOCK_N, THREADS>(v_tile, values, index);
            commit_copies();
            wait_copies<0>();
            __syncthreads();
            float s[1][N_TILES][4];
            multiply_qk<DIM, 1, N_TILES>(s, q_tile, k_tile, warp_row);
            unsigned int p[1][N_TILES][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int limit = causal ? min(count, row + 8 * half + 1 - start) : count;
                float greatest = NEGATIVE_INFINITY;
#pragma unroll
                for (int i = 0; i < 2 * N_TILES; ++i) {
                    float& x = s[0][i / 2][2 * half + i % 2];
                    if (i / 2 * 8 + lane % 4 * 2 + i % 2 >= limit) x = NEGATIVE_INFINITY;
                    greatest = fmaxf(greatest, x);
                }
                const float shrink = softmax[half].raise(quad_max(greatest), unit), frame = softmax[half].frame();
#pragma unroll
                for (int d = 0; d < V_TILES; ++d) o[0][d][2 * half] *= shrink, o[0][d][2 * half + 1] *= shrink;
#pragma unroll
                for (int i = 0; i < N_TILES; ++i) {
                    const float a = exp2_approx((s[0][i][2 * half] - frame) * unit), b = exp2_approx((s[0][i][2 * half + 1] - frame) * unit);
                    softmax[half].open += a + b;
                    p[0][i][half] = pack_halves(a, b);
                }
            }
            multiply_pv<1, N_TILES, V_TILES>(o, p, v_tile);
        }
    };
    // Ends a key tile; whether it added enough to one of this thread's rows.
    auto close = [&] {
        bool wanted = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = softmax[half].closed, gained = softmax[half].close();
            wanted |= row + 8 * half < n && softmax[half].wants(gained, before, tau);
        }
        return wanted;
    };
    add_keys(nullptr, history, first, false);
    close();
    const int* list = order + starts[head * (segments + 1) + history / segment];
    int walked = 0;
    while (walked * block_k < history) {
        add_keys(list, walked * block_k, min((walked + 1) * block_k, history), false);
        ++walked;
        if (!__syncthreads_or(close())) break;
    }
    add_keys(nullptr, first, min(first + BLOCK_M, n), true);
    close();
#pragma unroll
    for (int half = 0; half < 2; ++half)
        for (int d = 0; d < V_TILES && row + 8 * half < n; ++d) {
            unsigned int* const to = (unsigned int*)(out + ((long long)head * n + row + 8 * half) * DIM + 8 * d + lane % 4 * 2);
            *to = pack_halves(o[0][d][2 * half] / softmax[half].closed, o[0][d][2 * half + 1] / softmax[half].closed);
        }
    if (threadIdx.x == 0) tiles[head * gridDim.x + blockIdx.x] = walked;
}
