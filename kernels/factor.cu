// factor.cu: stage 1, second part. The rows whose products with a key make its score: the mean query, then the
// factors of the segment's covariance, scaled so that score = row0 . k + sum_i (row_i . k)^2.
//   sum     [lists, width]         float  sum of the segment's finite queries
//   count   [lists]                int32  how many
//   moment  [lists, width, width]  float  sum of q q^T (raw), or the covariance itself (`centred`); null: mean rank
//   rows    [lists, terms_rows, width]  T   the answer; rows past 1 + terms are zero
//   mean    [lists, width]         float  scale * mean, written when `full`
// full: the answer is scale^2 / 2 times the covariance, width rows (score = sum_i (row_i . k + mean_i) k_i).
// Else one step of subspace iteration from the `terms` axes of largest variance: basis = orth(cov[:, axes]), and a
// Cholesky factor of basis^T cov basis (any square root of it gives the same scores as its eigenvectors).
// T is float16 or bfloat16 (IS_BF16), or REAL.
// grid lists   block 128   shared memory (2 * terms * (width + 1) + terms^2 + 3 * width + 4 * terms + 64) * 4 bytes
// macros IS_BF16 or REAL
#ifdef REAL
typedef REAL element_t;
__device__ __forceinline__ element_t to_element(float x) { return (element_t)x; }
#else
#include "half.cuh"
typedef half_t element_t;
__device__ __forceinline__ element_t to_element(float x) { return float_to_half(x); }
#endif

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_dot(const float* a, const float* b, int n) {
    float x = 0.f;
    for (int i = threadIdx.x & 31; i < n; i += 32) x += a[i] * b[i];
    return warp_sum(x);
}

// Orthonormalises the `terms` rows of `y` (row stride `stride`) in turn, each twice against those before it; a row
// that depends on them becomes zero. `dots` holds `terms` numbers.
__device__ void orthonormalise(float* y, int terms, int width, int stride, float* dots) {
    const int warp = threadIdx.x / 32;
    for (int j = 0; j < terms; ++j) {
        float* row = y + j * stride;
        float before = 0.f;
        for (int pass = 0; pass < 3; ++pass) {
            // dots[i < j]: products with the rows before; dots[j]: the row's own square.
            for (int i = pass == 2 ? j + warp : warp; i <= j; i += WARPS) {
                const float d = warp_dot(y + i * stride, row, width);
                if (threadIdx.x % 32 == 0) dots[i] = d;
            }
            __syncthreads();
            const float square = dots[j];
            if (pass == 0) before = square;
            if (pass == 2) {
                const float inverse = square > 1e-10f * before && square > 0.f ? rsqrtf(square) : 0.f;
                for (int d = threadIdx.x; d < width; d += THREADS) row[d] *= inverse;
            } else {
                for (int d = threadIdx.x; d < width; d += THREADS) {
                    float x = row[d];
                    for (int i = 0; i < j; ++i) x -= dots[i] * y[i * stride + d];
                    row[d] = x;
                }
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) factor(
    const float* __restrict__ sum, const int* __restrict__ count, const float* __restrict__ moment,
    element_t* __restrict__ rows, float* __restrict__ mean_out, int width, int dim, int terms, int terms_rows,
    int centred, int full, float scale) {
    extern __shared__ float memory[];
    const int stride = width + 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float* mean = memory;                   // [width]
    float* variance = mean + width;         // [width]
    float* dots = variance + width;         // [terms + 1]
    int* axes = (int*)(dots + terms + 1);   // [terms]
    float* basis = (float*)(axes + terms);  // [terms][stride]
    float* image = basis + terms * stride;  // [terms][stride] covariance times basis
    float* ritz = image + terms * stride;   // [terms][terms], then its Cholesky factor
    __shared__ float best_value[WARPS];
    __shared__ int best_axis[WARPS];
    const long long list = blockIdx.x;
    const int n = count[list];
    const float inverse = n ? 1.f / n : 0.f;
    sum += list * width;
    if (moment != nullptr) moment += list * width * width;
    rows += list * terms_rows * width;
    for (int d = threadIdx.x; d < width; d += THREADS) mean[d] = sum[d] * inverse;
    __syncthreads();
    auto covariance = [&](int i, int j) {
        const float raw = moment[(long long)i * width + j];
        return centred ? raw : raw * inverse - mean[i] * mean[j];
    };

    if (full) {
        for (int d = threadIdx.x; d < width; d += THREADS) mean_out[list * width + d] = scale * mean[d];
        for (int i = threadIdx.x; i < width * width; i += THREADS)
            rows[i] = to_element(scale * scale / 2 * covariance(i / width, i % width));
        return;
    }
    for (int d = threadIdx.x; d < width; d += THREADS) rows[d] = to_element(scale * mean[d]);
    for (int i = width + threadIdx.x; i < terms_rows * width; i += THREADS)
        if (i / width > terms) rows[i] = to_element(0.f);
    if (terms == 0) return;

    // The axes of largest variance, ties by smaller axis.
    for (int d = threadIdx.x; d < width; d += THREADS) variance[d] = d < dim ? fmaxf(covariance(d, d), 0.f) : -1.f;
    __syncthreads();
    for (int j = 0; j < terms; ++j) {
        float value = -2.f;
        int axis = 0;
        for (int d = threadIdx.x; d < width; d += THREADS)
            if (variance[d] > value) value = variance[d], axis = d;
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, step);
            const int other_axis = __shfl_xor_sync(0xffffffffu, axis, step);
            if (other > value || (other == value && other_axis < axis)) value = other, axis = other_axis;
        }
        if (lane == 0) best_value[warp] = value, best_axis[warp] = axis;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < WARPS; ++w)
                if (best_value[w] > value || (best_value[w] == value && best_axis[w] < axis)) value = best_value[w], axis = best_axis[w];
            axes[j] = axis;
            variance[axis] = -1.5f;  // taken
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < terms * width; i += THREADS)
        basis[i / width * stride + i % width] = covariance(axes[i / width], i % width);
    __syncthreads();
    orthonormalise(basis, terms, width, stride, dots);

    // image = covariance * basis, eight terms at a time in registers.
    for (int d = threadIdx.x; d < width; d += THREADS)
        for (int first = 0; first < terms; first += 8) {
            float x[8] = {};
            for (int e = 0; e < dim; ++e) {
                const float c = covariance(e, d);
#pragma unroll
                for (int t = 0; t < 8; ++t)
                    if (first + t < terms) x[t] += c * basis[(first + t) * stride + e];
            }
#pragma unroll
            for (int t = 0; t < 8; ++t)
                if (first + t < terms) image[(first + t) * stride + d] = x[t];
        }
    __syncthreads();
    for (int i = warp; i < terms * terms; i += WARPS) {
        if (i / terms < i % terms) continue;
        const float x = warp_dot(basis + i / terms * stride, image + i % terms * stride, width);
        if (lane == 0) ritz[i] = x;
    }
    __syncthreads();
    // Cholesky of the lower triangle, a column at a time; a pivot lost in rounding gives an empty column.
    if (warp == 0) {
        float largest = 0.f;
        for (int j = 0; j < terms; ++j) largest = fmaxf(largest, ritz[j * terms + j]);
        for (int j = 0; j < terms; ++j) {
            const float pivot = ritz[j * terms + j];
            const bool counts = pivot > 1e-6f * largest;
            const float root = counts ? sqrtf(pivot) : 0.f, scaled = counts ? 1.f / root : 0.f;
            __syncwarp();
            for (int i = j + lane; i < terms; i += 32) ritz[i * terms + j] = i == j ? root : ritz[i * terms + j] * scaled;
            __syncwarp();
            for (int i = j + 1 + lane; i < terms; i += 32)
                for (int t = j + 1; t <= i; ++t) ritz[i * terms + t] -= ritz[i * terms + j] * ritz[t * terms + j];
            __syncwarp();
        }
    }
    __syncthreads();
    const float weight = scale * 0.70710678118654752f;
    for (int i = threadIdx.x; i < terms * width; i += THREADS) {
        const int t = i / width, d = i % width;
        float x = 0.f;
        for (int j = t; j < terms; ++j) x += basis[j * stride + d] * ritz[j * terms + t];
        rows[(long long)(1 + t) * width + d] = to_element(d < dim ? weight * x : 0.f);
    }
}
