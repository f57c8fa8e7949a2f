// spread.cuh: what tail="spread" adds to a row's pooled logits. The exponential of a mean is less than the mean of
// exponentials: half the variance that a query's departure from its row tile's mean sees inside the blocks makes up for it.
//   departures    [batch * heads_kv, blocks, dim]   real_t   a block's squared departures of K from its mean, then their running sums
//   lift          [batch * heads_q, n_q]            real_t   scale / 2 * sum over columns of (q - mean of the tile)^2 * variance,
//                                                           at most `most`; 0 behind a key that is not finite. The attend
//                                                           kernels multiply it by the squared share of the history not walked
// Sums run in one order: two runs agree bitwise. element_t, sum_t and to_sum are pool.cu's.
#pragma once

typedef sum_t real_t;

constexpr int MOST_COLUMNS = 256, SPREAD_WARPS = 8, TOGETHER = 4;  // rows that a warp has in flight

// Of one pool block, `count` keys from `k` on, by 256 threads with a number each in `partial`.
__device__ __forceinline__ void departures(
    real_t* partial, const element_t* __restrict__ k, long long k_row, int count, int dim, real_t* __restrict__ squares) {
    const int columns = (dim + 31) / 32 * 32, strands = 256 / columns, strand = threadIdx.x / columns, c = threadIdx.x % columns;
    const bool mine = strand < strands && c < dim;
    k += c;
    real_t mean = 0, total = 0;
    for (int pass = 0; pass < 2; ++pass) {
        real_t sum = 0;
        if (mine)
#pragma unroll 8
            for (int r = strand; r < count; r += strands) {
                const real_t x = to_sum(k[r * k_row]) - mean;
                sum += pass ? x * x : x;
            }
        __syncthreads();
        partial[threadIdx.x] = sum;
        __syncthreads();
        total = 0;
        for (int s = 0; s < strands; ++s) total += partial[s * columns + c];
        mean = total / (real_t)count;
    }
    if (mine && strand == 0) squares[c] = total;
}

// Running sums over the blocks, in place: a warp a run of blocks, then each begins with what lies before its run.
// grid (columns / 32, batch * heads_kv)   block 256
extern "C" __global__ void __launch_bounds__(32 * SPREAD_WARPS) running_sums(real_t* __restrict__ squares, int dim, int blocks) {
    __shared__ real_t runs[SPREAD_WARPS][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = min(blockIdx.x * 32 + lane, dim - 1);
    const int run = (blocks + SPREAD_WARPS - 1) / SPREAD_WARPS, first = warp * run, last = min(first + run, blocks);
    real_t* const at = squares + (long long)blockIdx.y * blocks * dim + c;
    real_t sum = 0;
#pragma unroll 8
    for (int b = first; b < last; ++b) sum += at[(long long)b * dim];
    runs[warp][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warp; ++w) sum += runs[w][lane];
    for (int b = first; b < last; b += 8) {
        real_t x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = b + i < last ? at[(long long)(b + i) * dim] : (real_t)0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum += x[i];
            if (b + i < last) at[(long long)(b + i) * dim] = sum;
        }
    }
}

// Two columns at once: their place is even.
__device__ __forceinline__ void load_pair(real_t& x, real_t& y, const element_t* from) {
#ifdef REAL
    x = from[0], y = from[1];
#else
    const unsigned int both = *(const unsigned int*)from;
    x = to_sum((element_t)both), y = to_sum((element_t)(both >> 16));
#endif
}

// `paired`: rows start on 4 bytes and have an even number of columns.
// grid (row tiles of the slab * group, K/V heads of the slab)   block 256: a warp every eighth row of the tile
extern "C" __global__ void __launch_bounds__(32 * SPREAD_WARPS) lifts(
    const element_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const int* __restrict__ query_order, const real_t* __restrict__ sums, real_t* __restrict__ lift,
    int heads_q, int heads_kv, int kv_start, int n_q, int n_k, int dim, int causal, int segment, int tiles_per_segment,
    int tile_start, int block_q, int blocks, int log2_pool, int paired, real_t half_scale, real_t most) {
    __shared__ real_t partial[SPREAD_WARPS][MOST_COLUMNS], mean[MOST_COLUMNS], variance[MOST_COLUMNS];
    __shared__ int finite_rows[SPREAD_WARPS];
    const int group = heads_q / heads_kv, tile = tile_start + blockIdx.x / group, s = tile / tiles_per_segment;
    const int kv = kv_start + blockIdx.y, batch = kv / heads_kv, head = kv % heads_kv * group + blockIdx.x % group;
    const int first = s * segment + tile % tiles_per_segment * block_q, shift = causal ? n_k - n_q : 0;
    const int rows = min(min(block_q, (s + 1) * segment - first), n_q - first);
    const int history = causal ? (s * segment + shift) >> log2_pool << log2_pool : n_k;
    if (history <= 0) return;  // no tail
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long row_at = ((long long)batch * heads_q + head) * n_q;
    q += batch * q_batch + head * q_head;
    auto row_of = [&](int r) { return query_order != nullptr ? query_order[row_at + first + r] : first + r; };

    real_t x[TOGETHER][MOST_COLUMNS / 32], sum[MOST_COLUMNS / 32] = {};
    auto load = [&](int r) {
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            const element_t* const from = q + row_of(min(r + t * SPREAD_WARPS, rows - 1)) * q_row + 2 * lane;
#pragma unroll
            for (int i = 0; i < MOST_COLUMNS / 64; ++i) {
                const int c = 2 * lane + 64 * i;
                x[t][2 * i] = x[t][2 * i + 1] = 0;
                if (paired && c < dim) load_pair(x[t][2 * i], x[t][2 * i + 1], from + 64 * i);
                if (!paired && c < dim) x[t][2 * i] = to_sum(from[64 * i]);
                if (!paired && c + 1 < dim) x[t][2 * i + 1] = to_sum(from[64 * i + 1]);
            }
        }
    };
    auto column = [&](int i) { return 2 * lane + 64 * (i / 2) + i % 2; };
    int finite = 0;
    for (int r = warp; r < rows; r += TOGETHER * SPREAD_WARPS) {
        load(r);
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            bool fine = r + t * SPREAD_WARPS < rows;
#pragma unroll
            for (int i = 0; i < MOST_COLUMNS / 32; ++i) fine &= x[t][i] - x[t][i] == 0;
            const bool counts = __all_sync(0xffffffffu, fine);
            finite += counts;
#pragma unroll
            for (int i = 0; i < MOST_COLUMNS / 32; ++i) sum[i] += counts ? x[t][i] : (real_t)0;
        }
    }
#pragma unroll
    for (int i = 0; i < MOST_COLUMNS / 32; ++i) partial[warp][column(i)] = sum[i];
    if (lane == 0) finite_rows[warp] = finite;
    __syncthreads();
    const real_t* const walked = sums + ((long long)kv * blocks + (history + (1 << log2_pool) - 1 >> log2_pool) - 1) * dim;
    for (int c = threadIdx.x; c < dim; c += 32 * SPREAD_WARPS) {
        real_t total = 0;
        int count = 0;
        for (int w = 0; w < SPREAD_WARPS; ++w) total += partial[w][c], count += finite_rows[w];
        mean[c] = total / (real_t)count, variance[c] = walked[c] / (real_t)history;
    }
    __syncthreads();
    for (int r = warp; r < rows; r += TOGETHER * SPREAD_WARPS) {
        load(r);
        real_t spread[TOGETHER] = {};
#pragma unroll
        for (int i = 0; i < MOST_COLUMNS / 32; ++i) {
            const int c = column(i);
            if (c >= dim) continue;
#pragma unroll
            for (int t = 0; t < TOGETHER; ++t) spread[t] += (x[t][i] - mean[c]) * (x[t][i] - mean[c]) * variance[c];
        }
#pragma unroll
        for (int step = 16; step; step /= 2)
#pragma unroll
            for (int t = 0; t < TOGETHER; ++t) spread[t] += __shfl_xor_sync(0xffffffffu, spread[t], step);
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            const real_t much = half_scale * spread[t];
            if (lane == t && r + t * SPREAD_WARPS < rows)
                lift[row_at + row_of(r + t * SPREAD_WARPS)] = much != much ? (real_t)0 : much < most ? much : most;
        }
    }
}
