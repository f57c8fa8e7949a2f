// score_simt.cu: stage 1 in plain floating point, for float32 and float64 inputs: segment moments, then scores.
//   q       [batch, heads_q, n_q, dim]                    REAL   element strides given, unit column stride
//   sum     [order heads of the slab, segments, dim]      float  sum of the segment's finite queries
//   count   [order heads of the slab, segments]           int32  how many
//   moment  [order heads of the slab, segments, dim, dim] float  their covariance; null: not wanted (mean rank)
//   k       [batch, heads_kv, n_keys, dim]                REAL   element strides given
//   rows    [order heads of the slab, segments, per_list, dim] REAL  from factor (factor.cuh)
//   mean    [order heads of the slab, segments, dim]      float  in full mode (see factor.cuh), else null
//   history, starts, score: as in score.cu, score float
// moments: grid (segments, order heads, dim tiles of 32 squared, 1 when moment is null)   block 256
// score:   grid (key tiles of 32, segments of the slab, order heads of the slab)   block 256
// The mixture rank: centres (centres.cuh), normalise and score_mixture, with the arrays of score.cu but its quadratic
// term, which they compute for themselves, and
//   variance [order heads of the slab, segments, dim]           REAL  from centres
//   offset   [order heads of the slab, segments, per_list]      REAL  log2 of a centre's share, then less its sum's
// normalise: grid (segments, order heads, row tiles of 32)   score_mixture: as score   block 256
// shared memory (dynamic, all but moments): 32 * (dim + 1) + 512 REAL   macro REAL
#include "centres.cuh"
#include "factor.cuh"

__device__ __forceinline__ real_t power_2(real_t x) { return sizeof(real_t) == 4 ? (real_t)exp2f((float)x) : (real_t)exp2((double)x); }

// A sum of powers of 2 and the exponent it is scaled by.
struct PowerSum {
    real_t frame, sum;

    __device__ __forceinline__ void clear() { frame = (real_t)-1e30f, sum = 0; }
    __device__ __forceinline__ void add(real_t other_frame, real_t other_sum) {
        const real_t top = frame > other_frame ? frame : other_frame;
        sum = sum * power_2(frame - top) + other_sum * power_2(other_frame - top);
        frame = top;
    }
    __device__ __forceinline__ void add(real_t x) {
        if (x > frame) sum *= power_2(frame - x), frame = x;
        sum += power_2(x - frame);
    }
    __device__ __forceinline__ real_t log2() const { return frame + log_2(sum); }
};

// 32 keys from `first` on into shared rows of dim + 1; zeros from `stop` on.
__device__ __forceinline__ void load_keys(real_t* keys, const real_t* k, long long k_row, int first, int stop, int dim) {
    for (int i = threadIdx.x; i < 32 * dim; i += 256) {
        const int r = i / dim, d = i % dim;
        keys[r * (dim + 1) + d] = first + r < stop ? k[(first + r) * k_row + d] : 0;
    }
}

__device__ __forceinline__ real_t dot(const real_t* a, const real_t* b, int dim) {
    real_t x = 0;
    for (int d = 0; d < dim; ++d) x += a[d] * b[d];
    return x;
}

// The quadratic term of the lane's key: the warps' shares of the columns, added up. `partial` holds 256 numbers.
__device__ __forceinline__ real_t quadratic(const real_t* key, const real_t* variance, int dim, real_t* partial) {
    real_t x = 0;
    for (int d = threadIdx.x / 32; d < dim; d += 8) x += variance[d] * key[d] * key[d];
    partial[threadIdx.x] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < 8; ++w) x += partial[w * 32 + threadIdx.x % 32];
    return x;
}

extern "C" __global__ void __launch_bounds__(256) moments(
    const real_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    float* __restrict__ sum, int* __restrict__ count, float* __restrict__ moment,
    int heads_order, int members, int order_start, int n_q, int dim, int segment, int segment_start) {
    __shared__ real_t left[32][33], right[32][33], mean[256];
    __shared__ int keep[32], kept;
    const int order_head = order_start + blockIdx.y, first = (segment_start + blockIdx.x) * segment;
    const int rows = min(segment, n_q - first), total = rows * members;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const long long list = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    q += order_head / heads_order * q_batch + order_head % heads_order * members * q_head + first * q_row;
    auto row_at = [&](int r) { return q + r / rows * q_head + r % rows * q_row; };

    // Mean of the finite rows, a column a thread; 32 rows are judged at a time.
    real_t column = 0;
    if (threadIdx.x == 0) kept = 0;
    for (int start = 0; start < total; start += 32) {
        __syncthreads();
        for (int r = warp; r < 32; r += 8) {
            bool good = start + r < total;
            if (good)
                for (int d = lane; d < dim; d += 32) good = good && is_finite(row_at(start + r)[d]);
            good = __all_sync(0xffffffffu, good);
            if (lane == 0) keep[r] = good;
        }
        __syncthreads();
        for (int r = 0; r < 32; ++r)
            if (keep[r] && threadIdx.x < dim) column += row_at(start + r)[threadIdx.x];
        if (threadIdx.x == 0)
            for (int r = 0; r < 32; ++r) kept += keep[r];
    }
    __syncthreads();
    if (threadIdx.x < dim) mean[threadIdx.x] = kept ? column / kept : 0;
    if (blockIdx.z == 0) {
        if (threadIdx.x < dim) sum[list * dim + threadIdx.x] = (float)column;
        if (threadIdx.x == 0) count[list] = kept;
    }
    if (moment == nullptr) return;

    // One tile of 32 x 32 of the covariance, four numbers a thread.
    const int tiles = (dim + 31) / 32, i0 = blockIdx.z / tiles * 32, j0 = blockIdx.z % tiles * 32;
    real_t c[4] = {};
    for (int start = 0; start < total; start += 32) {
        __syncthreads();
        for (int r = warp; r < 32; r += 8) {
            bool good = start + r < total;
            if (good)
                for (int d = lane; d < dim; d += 32) good = good && is_finite(row_at(start + r)[d]);
            good = __all_sync(0xffffffffu, good);
            left[r][lane] = good && i0 + lane < dim ? row_at(start + r)[i0 + lane] - mean[i0 + lane] : 0;
            right[r][lane] = good && j0 + lane < dim ? row_at(start + r)[j0 + lane] - mean[j0 + lane] : 0;
        }
        __syncthreads();
        for (int r = 0; r < 32; ++r)
            for (int i = 0; i < 4; ++i) c[i] += left[r][warp * 4 + i] * right[r][lane];
    }
    for (int i = 0; i < 4; ++i)
        if (i0 + warp * 4 + i < dim && j0 + lane < dim)
            moment[(list * dim + i0 + warp * 4 + i) * dim + j0 + lane] = kept ? (float)(c[i] / kept) : 0.f;
}

// What score and score_mixture have in common: 32 keys of a list in shared memory, one a lane; the warps share the list's
// rows, and what each made of a key is joined by the first.
struct ListTile {
    real_t *keys, *partial;  // [32][dim + 1], [512]
    const real_t* key;       // the lane's
    long long list;          // of the slab
    float* score;            // of the lane's key; null past the history, and for all warps but the first

    // False where the history ends before the tile.
    __device__ __forceinline__ bool load(
        const real_t* k, long long k_batch, long long k_head, long long k_row, const int* history, const long long* starts,
        float* scores, int heads_kv, int kv_start, int dim, int segments, int orders) {
        extern __shared__ double shared_memory[];
        const int first_key = blockIdx.x * 32, s = blockIdx.y, order_head = blockIdx.z, kv = kv_start + order_head / orders;
        const int lane = threadIdx.x & 31, stop = history[s];
        if (first_key >= stop) return false;
        keys = (real_t*)shared_memory, partial = keys + 32 * (dim + 1), key = keys + lane * (dim + 1);
        list = (long long)order_head * segments + s;
        score = threadIdx.x < 32 && first_key + lane < stop ? scores + order_head * starts[segments] + starts[s] + first_key + lane : nullptr;
        load_keys(keys, k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, first_key, stop, dim);
        __syncthreads();
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(256) score(
    const real_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const real_t* __restrict__ rows, const float* __restrict__ mean, const int* __restrict__ history,
    const long long* __restrict__ starts, float* __restrict__ scores,
    int heads_kv, int kv_start, int dim, int segments, int per_list, int orders) {
    ListTile tile;
    if (!tile.load(k, k_batch, k_head, k_row, history, starts, scores, heads_kv, kv_start, dim, segments, orders)) return;
    rows += tile.list * per_list * dim;
    real_t share = 0;
    for (int r = threadIdx.x / 32; r < per_list; r += 8) {
        const real_t x = dot(tile.key, rows + (long long)r * dim, dim);
        share += mean != nullptr ? (x + mean[tile.list * dim + r]) * tile.key[r] : r == 0 ? x : x * x;
    }
    tile.partial[threadIdx.x] = share;
    __syncthreads();
    if (tile.score == nullptr) return;
    real_t total = 0;
    for (int w = 0; w < 8; ++w) total += tile.partial[w * 32 + threadIdx.x];
    *tile.score = (float)total;
}

extern "C" __global__ void __launch_bounds__(256) normalise(
    const real_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const real_t* __restrict__ rows, const real_t* __restrict__ variance, real_t* __restrict__ offset,
    const int* __restrict__ history, int heads_kv, int kv_start, int dim, int segments, int per_list, int orders, real_t unit) {
    extern __shared__ double shared_memory[];
    real_t* const keys = (real_t*)shared_memory;  // [32][dim + 1]
    real_t* const partial = keys + 32 * (dim + 1);
    const int s = blockIdx.x, order_head = blockIdx.y, kv = kv_start + order_head / orders, stop = history[s];
    const int lane = threadIdx.x & 31, first_row = blockIdx.z * 32 + threadIdx.x / 32 * 4;
    const long long list = (long long)order_head * segments + s;
    k += kv / heads_kv * k_batch + kv % heads_kv * k_head;
    rows += list * per_list * dim, variance += list * dim, offset += list * per_list;
    PowerSum sums[4];  // of the warp's four rows, over the lane's keys
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[r].clear();
    for (int first_key = 0; first_key < stop; first_key += 32) {
        __syncthreads();
        load_keys(keys, k, k_row, first_key, stop, dim);
        __syncthreads();
        const real_t* const key = keys + lane * (dim + 1);
        const real_t bias = (real_t)1.4426950408889634 * quadratic(key, variance, dim, partial);
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (first_row + r < per_list && first_key + lane < stop)
                sums[r].add(unit * dot(key, rows + (long long)(first_row + r) * dim, dim) + bias);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        for (int step = 1; step < 32; step *= 2) {
            const real_t frame = __shfl_xor_sync(0xffffffffu, sums[r].frame, step), sum = __shfl_xor_sync(0xffffffffu, sums[r].sum, step);
            sums[r].add(frame, sum);
        }
        if (lane == 0 && first_row + r < per_list && offset[first_row + r] != NEGATIVE_INFINITY) offset[first_row + r] -= 2 * sums[r].log2();
    }
}

extern "C" __global__ void __launch_bounds__(256) score_mixture(
    const real_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const real_t* __restrict__ rows, const real_t* __restrict__ variance, const real_t* __restrict__ offset,
    const int* __restrict__ history, const long long* __restrict__ starts, float* __restrict__ scores,
    int heads_kv, int kv_start, int dim, int segments, int per_list, int orders, real_t unit) {
    ListTile tile;
    if (!tile.load(k, k_batch, k_head, k_row, history, starts, scores, heads_kv, kv_start, dim, segments, orders)) return;
    rows += tile.list * per_list * dim, variance += tile.list * dim, offset += tile.list * per_list;
    const real_t bias = quadratic(tile.key, variance, dim, tile.partial);
    PowerSum sum;  // of the lane's key, over the warp's rows
    sum.clear();
    for (int r = threadIdx.x / 32; r < per_list; r += 8) sum.add(2 * unit * dot(tile.key, rows + (long long)r * dim, dim) + offset[r]);
    __syncthreads();
    tile.partial[threadIdx.x] = sum.frame;
    tile.partial[256 + threadIdx.x] = sum.sum;
    __syncthreads();
    if (tile.score == nullptr) return;
    for (int w = 1; w < 8; ++w) sum.add(tile.partial[w * 32 + threadIdx.x], tile.partial[256 + w * 32 + threadIdx.x]);
    *tile.score = (float)(bias + (real_t)0.34657359027997264 * sum.log2());
}
