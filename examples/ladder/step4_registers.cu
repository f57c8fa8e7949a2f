// step4_registers.cu: a thread owns 4 rows by 4 keys of the logits, and 4 rows by DIM / 8 columns of the answer, so a
// number from shared memory is used four times; eight threads share a row. The shape of kernels/attend_simt.cu.
// Arrays are those of step3_tiles.cu.
// grid (row tiles, heads_q)   block 2 * BLOCK_M threads for BLOCK_M rows   macros DIM, BLOCK_M
// shared memory (BLOCK_M + BLOCK_N) * (DIM + 1) + BLOCK_M * (BLOCK_N + 1) float
#include "half.cuh"
#include "online_softmax.cuh"

constexpr int BLOCK_N = 32, THREADS = 2 * BLOCK_M, STRIDE = DIM + 1, COLUMNS = DIM / 8;  // an odd stride: other banks

// Over the eight lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ __forceinline__ float row_max(float x) {
    for (int step = 1; step < 8; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const half_t* __restrict__ q, const half_t* __restrict__ k, const half_t* __restrict__ v, const int* __restrict__ order,
    const long long* __restrict__ starts, half_t* __restrict__ out, int* __restrict__ tiles,
    int heads_kv, int n, int segment, int block_k, float tau, float scale) {
    extern __shared__ float memory[];
    float* const q_tile = memory;                               // [BLOCK_M][STRIDE]
    float* const tile = q_tile + BLOCK_M * STRIDE;              // [BLOCK_N][STRIDE]: keys, then their values
    float* const weights = tile + BLOCK_N * STRIDE;             // [BLOCK_M][BLOCK_N + 1]
    const int head = blockIdx.y, first = blockIdx.x * BLOCK_M, tx = threadIdx.x % 8, ty = threadIdx.x / 8;
    const int history = first / segment * segment, kv = head / (gridDim.y / heads_kv), segments = (n + segment - 1) / segment;
    q += (long long)head * n * DIM, out += (long long)head * n * DIM, k += (long long)kv * n * DIM, v += (long long)kv * n * DIM;
    for (int i = threadIdx.x; i < BLOCK_M * DIM; i += THREADS)
        q_tile[i / DIM * STRIDE + i % DIM] = half_to_float(q[(long long)min(first + i / DIM, n - 1) * DIM + i % DIM]);

    float acc[4][COLUMNS] = {}, top[4], closed[4] = {}, opened[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) top[r] = NEGATIVE_INFINITY;

    auto copy_tile = [&](const half_t* source, const int* from, int start, int count) {
        __syncthreads();
        for (int i = threadIdx.x; i < BLOCK_N * DIM; i += THREADS) {
            const int place = start + min(i / DIM, count - 1);
            tile[i / DIM * STRIDE + i % DIM] = half_to_float(source[(long long)(from ? from[place] : place) * DIM + i % DIM]);
        }
        __syncthreads();
    };
    // Keys [begin, stop) of the list `from`, or of the array; `causal`: a row sees keys up to its own.
    auto add_keys = [&](const int* from, int begin, int stop, bool causal) {
        for (int start = begin; start < stop; start += BLOCK_N) {
            const int count = min(BLOCK_N, stop - start);
            copy_tile(k, from, start, count);
            float p[4][4] = {};
#pragma unroll 4
            for (int d = 0; d < DIM; ++d) {
                float a[4], b[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = q_tile[(4 * ty + i) * STRIDE + d], b[i] = tile[(tx + 8 * i) * STRIDE + d];
#pragma unroll
                for (int i = 0; i < 16; ++i) p[i / 4][i % 4] += a[i / 4] * b[i % 4];
            }
            copy_tile(v, from, start, count);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int limit = causal ? min(count, first + 4 * ty + r + 1 - start) : count;
                float greatest = top[r];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    p[r][j] = tx + 8 * j < limit ? p[r][j] * scale : NEGATIVE_INFINITY;
                    greatest = fmaxf(greatest, p[r][j]);
                }
                greatest = row_max(greatest);
                const float shrink = top[r] == greatest ? 1.f : expf(top[r] - greatest);
                top[r] = greatest, closed[r] *= shrink, opened[r] *= shrink;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) acc[r][c] *= shrink;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float weight = tx + 8 * j < limit ? expf(p[r][j] - greatest) : 0.f;
                    opened[r] += weight;
                    weights[(4 * ty + r) * (BLOCK_N + 1) + tx + 8 * j] = weight;
                }
            }
            __syncthreads();
#pragma unroll 2
            for (int i = 0; i < BLOCK_N; ++i) {
                float w[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) w[r] = weights[(4 * ty + r) * (BLOCK_N + 1) + i];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int r = 0; r < 4; ++r) acc[r][c] += w[r] * tile[i * STRIDE + tx + 8 * c];
            }
        }
    };
    // Ends a key tile; whether it added enough to one of this thread's rows.
    auto close = [&] {
        bool wanted = false;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float gained = row_sum(opened[r]);
            wanted |= first + 4 * ty + r < n && (closed[r] == 0 || gained >= tau * closed[r]);
            closed[r] += gained, opened[r] = 0;
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
    for (int r = 0; r < 4; ++r)
        for (int c = 0; c < COLUMNS && first + 4 * ty + r < n; ++c)
            out[(long long)(first + 4 * ty + r) * DIM + tx + 8 * c] = float_to_half(acc[r][c] / closed[r]);
    if (threadIdx.x == 0) tiles[head * gridDim.x + blockIdx.x] = walked;
}
