// score_simt.cu: stage 1 in plain floating point, for float32 and float64 inputs: segment moments, then scores.
//   q       [batch, heads_q, n_q, dim]                    REAL   element strides given, unit column stride
//   sum     [order heads of the slab, segments, dim]      float  sum of the segment's finite queries
//   count   [order heads of the slab, segments]           int32  how many
//   moment  [order heads of the slab, segments, dim, dim] float  their covariance; null: not wanted (mean rank)
//   k       [batch, heads_kv, n_keys, dim]                REAL   element strides given
//   rows    [order heads of the slab, segments, per_list, dim] REAL  from factor.cu
//   mean    [order heads of the slab, segments, dim]      float  in full mode (see factor.cu), else null
//   history, starts, score: as in score.cu, score float
// moments: grid (segments, order heads, dim tiles of 32 squared, 1 when moment is null)   block 256
// score:   grid (key tiles of 32, segments of the slab, order heads of the slab)   block 256
// shared memory: moments 2 * 32 * 33 REAL; score 32 * (dim + 1) + 256 REAL (dynamic)   macro REAL
#define POSITIVE_INFINITY __int_as_float(0x7f800000)
typedef REAL real_t;

__device__ __forceinline__ bool is_finite(real_t x) { return x - x == 0; }

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

extern "C" __global__ void __launch_bounds__(256) score(
    const real_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const real_t* __restrict__ rows, const float* __restrict__ mean, const int* __restrict__ history,
    const long long* __restrict__ starts, float* __restrict__ scores,
    int heads_kv, int kv_start, int dim, int segments, int per_list, int orders) {
    extern __shared__ double shared_memory[];
    real_t* const keys = (real_t*)shared_memory;  // [32][dim + 1]
    real_t* const partial = keys + 32 * (dim + 1);
    const int first_key = blockIdx.x * 32, s = blockIdx.y, order_head = blockIdx.z, kv = kv_start + order_head / orders;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, stop = history[s];
    if (first_key >= stop) return;
    k += kv / heads_kv * k_batch + kv % heads_kv * k_head;
    for (int i = threadIdx.x; i < 32 * dim; i += 256) {
        const int r = i / dim, d = i % dim;
        keys[r * (dim + 1) + d] = first_key + r < stop ? k[(first_key + r) * k_row + d] : 0;
    }
    __syncthreads();
    const long long list = (long long)order_head * segments + s;
    rows += list * per_list * dim;
    const real_t* const key = keys + lane * (dim + 1);
    real_t share = 0;
    for (int r = warp; r < per_list; r += 8) {
        real_t x = 0;
        for (int d = 0; d < dim; ++d) x += key[d] * rows[(long long)r * dim + d];
        share += mean != nullptr ? (x + mean[list * dim + r]) * key[r] : r == 0 ? x : x * x;
    }
    partial[threadIdx.x] = share;
    __syncthreads();
    if (warp == 0 && first_key + lane < stop) {
        real_t total = 0;
        for (int w = 0; w < 8; ++w) total += partial[w * 32 + lane];
        scores[order_head * starts[segments] + starts[s] + first_key + lane] = (float)total;
    }
}
