// attend_simt.cu: stage 3 by plain multiply-adds, for float32 and float64. The walk, the arrays and the arguments are
// attend.cu's, with T and every float number REAL (tail_mass stays float); nothing is in flight, so nothing is dropped.
// A thread owns 4 rows by 4 keys of a step's logits (8 threads share a row), and 4 rows by every 8th output column.
// grid (row tiles of the slab * group, K/V heads of the slab)   block 256
// shared memory: layout below; compile.simt_shared_bytes computes it   macros REAL, HEAD_DIM_V (128, 256)
#include "walk.cuh"

typedef REAL real_t;
constexpr int THREADS = 256;
constexpr int BLOCK_M = 128;
constexpr int BLOCK_N = 32;
constexpr int CHUNK = 32;  // head dim columns staged at a time
constexpr int COLUMNS = HEAD_DIM_V / 8;
constexpr int STAGED = (BLOCK_M + BLOCK_N) * (CHUNK + 1) > BLOCK_N * HEAD_DIM_V ? (BLOCK_M + BLOCK_N) * (CHUNK + 1) : BLOCK_N * HEAD_DIM_V;

__device__ __forceinline__ real_t infinity() { return (real_t)__int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_finite(real_t x) { return x - x == 0; }
__device__ __forceinline__ real_t power2(real_t x) { return sizeof(real_t) == 4 ? (real_t)exp2f((float)x) : (real_t)exp2((double)x); }
__device__ __forceinline__ real_t log_2(real_t x) { return sizeof(real_t) == 4 ? (real_t)log2f((float)x) : (real_t)log2((double)x); }

// Over the eight lanes that share a row.
__device__ __forceinline__ real_t row_sum(real_t x) {
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ __forceinline__ real_t row_max(real_t x) {
    for (int step = 1; step < 8; step *= 2) {
        const real_t other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other > x || x != x ? other : x;
    }
    return x;
}

struct Source {
    const real_t* data;
    long long stride;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_simt(
    const real_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const real_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const real_t* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    real_t* __restrict__ out, long long out_batch, long long out_head, long long out_row, int,
    const real_t* __restrict__ k_pool, const real_t* __restrict__ v_pool, int pool_stride, int k_pool_row, int v_pool_row,
    const int* __restrict__ kv_order, const long long* __restrict__ kv_offsets, long long offsets_stride,
    const int* __restrict__ query_order, const float* __restrict__ taus, float tau,
    real_t* __restrict__ lse, int* __restrict__ tiles, int* __restrict__ tail_blocks, float* __restrict__ tail_mass, const real_t* __restrict__ lift,
    int heads_q, int heads_kv, int orders, int kv_start, int n_q, int n_k, int dim_qk, int dim_v,
    int causal, int window, int segment, int segment_start, int tiles_per_segment, int tile_start, int tile_stop, int row_tiles,
    int block_q, int block_k, int log2_pool, real_t unit) {
    extern __shared__ double shared_memory[];
    real_t* const staged = (real_t*)shared_memory;          // q and k chunks, or the values
    real_t* const weights = staged + STAGED;                // [BLOCK_M][BLOCK_N + 1]
    real_t* const bias = weights + BLOCK_M * (BLOCK_N + 1);  // [BLOCK_N]
    int* const row_of = (int*)(bias + BLOCK_N);             // [BLOCK_M]
    int* const poisoned = row_of + BLOCK_M;                 // [BLOCK_M]
    int* const index = poisoned + BLOCK_M;                  // [BLOCK_N]
    int* const walked = index + BLOCK_N;                    // [pool blocks]

    const int group = heads_q / heads_kv, member = blockIdx.x % group, tile = tile_stop - 1 - blockIdx.x / group;
    const int kv = kv_start + blockIdx.y, batch = kv / heads_kv, head = (kv % heads_kv) * group + member;
    const long long flat_head = (long long)batch * heads_q + head;
    const int s = tile / tiles_per_segment, first_row = s * segment + tile % tiles_per_segment * block_q;
    const int rows = min(min(block_q, (s + 1) * segment - first_row), n_q - first_row);
    const int shift = causal ? n_k - n_q : 0, tx = threadIdx.x % 8, ty = threadIdx.x / 8;
    const bool dense = kv_order == nullptr;
    q += batch * q_batch + head * q_head;
    out += batch * out_batch + head * out_head;
    const Source sources[4] = {{k + batch * k_batch + kv % heads_kv * k_head, k_row}, {v + batch * v_batch + kv % heads_kv * v_head, v_row},
                               {k_pool + (long long)kv * pool_stride * k_pool_row, k_pool_row}, {v_pool + (long long)kv * pool_stride * v_pool_row, v_pool_row}};
    if (taus != nullptr) tau = taus[head];

    for (int r = threadIdx.x; r < BLOCK_M; r += THREADS) {
        row_of[r] = r >= rows ? -1 : query_order ? query_order[flat_head * n_q + first_row + r] : first_row + r;
        poisoned[r] = 0;
    }
    __syncthreads();
    int lowest = 0x7fffffff, highest = -1;
    for (int r = 0; r < rows; ++r) lowest = min(lowest, row_of[r]), highest = max(highest, row_of[r]);
    for (int i = threadIdx.x; i < rows * dim_qk; i += THREADS)
        if (!is_finite(q[row_of[i / dim_qk] * q_row + i % dim_qk])) poisoned[i / dim_qk] = 1;

    const int history = dense ? 0 : causal ? (s * segment + shift) >> log2_pool << log2_pool : n_k;
    const int* order = nullptr;
    Walk walk;
    walk.window_first = causal ? max(history, lowest + shift + 1 - window) : history;
    const bool cut = causal && highest + shift + 1 > window;  // some row does not see key 0: every key is masked
    walk.masked_first = cut ? walk.window_first : causal ? lowest + shift : dense ? n_k : history;
    walk.masked_stop = causal ? highest + shift + 1 : walk.masked_first;
    walk.block_k = block_k, walk.listed = 0, walk.pool_blocks = 0;
    if (!dense) {
        const long long* list = kv_offsets + (blockIdx.y * orders + (orders == 1 ? 0 : member)) * offsets_stride + (s - segment_start);
        order = kv_order + list[0], walk.listed = (int)(list[1] - list[0]);
        if (k_pool != nullptr) walk.pool_blocks = (history + (1 << log2_pool) - 1) >> log2_pool;
    }
    for (int b = threadIdx.x; b < walk.pool_blocks; b += THREADS) walked[b] = 0;

    real_t o[4][COLUMNS], top[4], closed[4], open[4], mark_sum[4], mark_top[4], ceiling[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        top[r] = -infinity(), closed[r] = open[r] = mark_sum[r] = mark_top[r] = 0, ceiling[r] = infinity();
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) o[r][c] = 0;
    }
    auto frame = [&](int r) { return top[r] == -infinity() ? (real_t)0 : top[r]; };
    auto mark_tail = [&](bool ends) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            mark_sum[r] = closed[r] - (ends ? mark_sum[r] * power2((mark_top[r] - frame(r)) * unit) : (real_t)0);
            mark_top[r] = ends ? frame(r) : top[r];
        }
    };
    int walked_tiles = 0, walked_keys = 0, blocks_found = 0;
    bool in_tail = false;
    Step step = first_step(walk, SEEN_WINDOW, BLOCK_N);
    while (true) {
        __syncthreads();
        if (in_tail && step.phase != TAIL) mark_tail(true), in_tail = false;
        if (step.phase == DONE) break;
        const Source from_k = sources[step.phase == TAIL ? 2 : 0], from_v = sources[step.phase == TAIL ? 3 : 1];
        if (threadIdx.x < BLOCK_N) {
            const int i = threadIdx.x, key = i >= step.count ? -1 : step.phase == HISTORY ? order[step.start + i] : step.start + i;
            index[i] = key;
            bias[i] = 0;
            if (step.phase == TAIL) {
                const int size = key < 0 ? 1 : min(1 << log2_pool, history - (key << log2_pool)), left = key < 0 ? 0 : size - walked[key];
                bias[i] = 4 * left >= size ? log_2((real_t)left) / unit : -infinity();
            } else if (step.phase == HISTORY && key >= 0 && walk.pool_blocks) {
                atomicAdd(walked + (key >> log2_pool), 1);
            }
        }
        __syncthreads();
        if (step.phase == TAIL) {
            if (!in_tail) mark_tail(false), in_tail = true;
            blocks_found += __syncthreads_count(threadIdx.x < BLOCK_N && bias[threadIdx.x % BLOCK_N] > -infinity());
        }
        if (step.phase == HISTORY && step.closes()) ++walked_tiles, walked_keys = step.tile_stop;

        real_t p[4][4] = {};
        for (int d0 = 0; d0 < dim_qk; d0 += CHUNK) {
            for (int i = threadIdx.x; i < (BLOCK_M + BLOCK_N) * CHUNK; i += THREADS) {
                const int r = i / CHUNK, d = d0 + i % CHUNK, row = r < BLOCK_M ? row_of[r] : index[r - BLOCK_M];
                real_t x = 0;
                if (row >= 0 && d < dim_qk) x = r < BLOCK_M ? q[row * q_row + d] : from_k.data[row * from_k.stride + d];
                staged[r * (CHUNK + 1) + i % CHUNK] = x;
            }
            __syncthreads();
#pragma unroll 4
            for (int d = 0; d < CHUNK; ++d) {
                real_t a[4], b[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i] = staged[(4 * ty + i) * (CHUNK + 1) + d];
                    b[i] = staged[(BLOCK_M + tx + 8 * i) * (CHUNK + 1) + d];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) p[i][j] += a[i] * b[j];
            }
            __syncthreads();
        }
        // Values; one that is not finite reaches only the rows that see it, through its logit.
        for (int i = threadIdx.x; i < BLOCK_N * HEAD_DIM_V; i += THREADS) {
            const int r = i / HEAD_DIM_V, c = i % HEAD_DIM_V, row = index[r];
            real_t x = row >= 0 && c < dim_v ? from_v.data[row * from_v.stride + c] : 0;
            if (step.phase == MASKED_WINDOW && !is_finite(x)) bias[r] = x - x, x = 0;
            staged[i] = x;
        }
        __syncthreads();
        bool wanted = false;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = 4 * ty + r;
            int floor = 0, limit = step.count;
            if (step.phase == MASKED_WINDOW) {
                const int end = row_of[row] + shift + 1 - step.start;
                floor = end - window, limit = min(limit, end);
            }
            real_t greatest = -infinity();
            real_t lifted = 0;
            if (step.phase == TAIL && lift != nullptr && walked_tiles && row < rows) {
                const real_t left = (real_t)(history - walked_keys) / history;
                lifted = left * left * lift[flat_head * n_q + row_of[row]];
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = tx + 8 * j;
                p[r][j] += lifted;
                if (step.phase == TAIL && p[r][j] > ceiling[r]) p[r][j] = ceiling[r];
                p[r][j] = column >= floor && column < limit ? p[r][j] + bias[column] : -infinity();
                greatest = p[r][j] > greatest ? p[r][j] : greatest;
            }
            greatest = row_max(greatest);
            const real_t old = top[r];
            if (greatest > old) top[r] = greatest;
            const real_t shrink = power2((old - frame(r)) * unit);
            closed[r] *= shrink, open[r] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const real_t x = power2((p[r][j] - frame(r)) * unit);
                open[r] += x;
                weights[row * (BLOCK_N + 1) + tx + 8 * j] = x;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) o[r][c] *= shrink;
            if (!step.closes()) continue;
            const real_t gained = row_sum(open[r]), before = closed[r];
            closed[r] = before + gained, open[r] = 0;
            // A key behind this tile in the ranking is not credited with more than the tile's mean weight.
            if (step.phase == HISTORY) ceiling[r] = frame(r) + log_2(gained / ((step.tile_stop - 1) % block_k + 1)) / unit;
            const bool gains = before == 0 ? top[r] > -infinity() && gained >= 0 : gained / before >= tau;
            wanted |= gains && row < rows && !poisoned[row];
        }
        const bool more = __syncthreads_or(wanted);
#pragma unroll 2
        for (int n = 0; n < BLOCK_N; ++n) {
            real_t w[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) w[r] = weights[(4 * ty + r) * (BLOCK_N + 1) + n];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const real_t x = staged[n * HEAD_DIM_V + tx + 8 * c];
#pragma unroll
                for (int r = 0; r < 4; ++r) o[r][c] += w[r] * x;
            }
        }
        const bool stops = step.phase == HISTORY && step.closes() && tau > 0 && !more;
        step = stops ? first_step(walk, TAIL, BLOCK_N) : step_after(walk, step, BLOCK_N);
    }

    for (int r = 0; r < 4; ++r) {
        const int row = 4 * ty + r;
        if (row >= rows) continue;
        const bool bad = poisoned[row];
        const real_t nan = infinity() - infinity(), inverse = bad ? nan : closed[r] == 0 ? (real_t)0 : 1 / closed[r];
        for (int c = 0; c < COLUMNS; ++c)
            if (tx + 8 * c < dim_v) out[row_of[row] * out_row + tx + 8 * c] = o[r][c] * inverse;
        if (tx) continue;
        const long long place = flat_head * n_q + row_of[row];
        const real_t ln_2 = (real_t)0.69314718055994530942;
        lse[place] = bad ? nan : closed[r] == 0 ? -infinity() : (top[r] * unit + log_2(closed[r])) * ln_2;
        if (tail_mass != nullptr) {
            const real_t share = mark_sum[r] * power2((mark_top[r] - frame(r)) * unit) / closed[r];
            tail_mass[place] = blocks_found && share > 0 && !bad ? (float)share : 0.f;
        }
    }
    if (tiles != nullptr && threadIdx.x == 0) {
        tiles[flat_head * row_tiles + tile] = walked_tiles;
        tail_blocks[flat_head * row_tiles + tile] = blocks_found;
    }
}
