// factor.cu: stage 1, second part. The rows whose products with a key make its score: the mean query, then the
// factors of the segment's covariance, scaled so that score = row0 . k + sum_i (row_i . k)^2.
//   sum     [lists, width]         float  sum of the segment's finite queries
//   count   [lists]                int32  how many
//   moment  [lists, width, width]  float  sum of q q^T (raw), or the covariance itself (`centred`); null: mean rank
//   rows    [lists, terms_rows, width]  T   the answer; rows past 1 + terms are zero
//   mean    [lists, width]         float  scale * mean, written when `full`
// tiled: how many segments an order head has; its rows then lie in chunks of 64 as score_sm90.cu's shared memory holds
// them: 64 columns after 64, rows of 128 bytes whose 16-byte pieces are permuted by row % 8. 0: row after row.
// full: the answer is scale^2 / 2 times the covariance, width rows (score = sum_i (row_i . k + mean_i) k_i).
// Else one step of subspace iteration from the `terms` axes of largest variance: basis = orth(cov[:, axes]), by the
// Gram matrix of those columns, and a Cholesky factor of basis^T cov basis (any square root of it gives the same scores
// as its eigenvectors). The Gram matrix squares the columns' condition, so it and what is made of it are double.
// A block waits more than it computes: every loop of one step after another runs over columns of a terms x terms matrix,
// with one barrier a step, and all else is a number a thread.
// T is float16 or bfloat16 (IS_BF16), or REAL.
// grid lists   block 128   shared memory: layout below; specialisations.factor_shared_bytes   macros IS_BF16 or REAL
#ifdef REAL
typedef REAL element_t;
__device__ __forceinline__ element_t to_element(float x) { return (element_t)x; }
#else
#include "half.cuh"
typedef half_t element_t;
__device__ __forceinline__ element_t to_element(float x) { return float_to_half(x); }
#endif

constexpr int THREADS = 128;

// Place of (i, j), j <= i, in a lower triangle stored row by row.
__device__ __forceinline__ int triangle(int i, int j) { return i * (i + 1) / 2 + j; }

// image[d][0 .. GROUP) = the covariance times GROUP rows of the basis.
template <int GROUP, typename Covariance>
__device__ __forceinline__ void multiply_group(float* image, const float* basis, int stride, int width, int dim, Covariance covariance) {
    for (int d = threadIdx.x; d < width; d += THREADS) {
        float x[GROUP] = {};
#pragma unroll 8
        for (int e = 0; e < dim; ++e) {
            const float c = covariance(e, d);
#pragma unroll
            for (int t = 0; t < GROUP; t += 4) {
                const float4 row = *(const float4*)(basis + e * stride + t);
                x[t] += c * row.x, x[t + 1] += c * row.y, x[t + 2] += c * row.z, x[t + 3] += c * row.w;
            }
        }
#pragma unroll
        for (int t = 0; t < GROUP; t += 4) *(float4*)(image + d * (GROUP + 4) + t) = make_float4(x[t], x[t + 1], x[t + 2], x[t + 3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) factor(
    const float* __restrict__ sum, const int* __restrict__ count, const float* __restrict__ moment,
    element_t* __restrict__ rows, float* __restrict__ mean_out, int width, int dim, int terms, int terms_rows,
    int centred, int full, int tiled, float scale) {
    extern __shared__ double shared_memory[];
    const int group = terms <= 8 ? 8 : 16, stride = (terms + group - 1) / group * group + 4, pairs = triangle(terms, 0);
    double* gram = shared_memory;                        // [pairs], later the pivots of its elimination
    double* inverse = gram + pairs;                      // [pairs]: L^-1 of gram = L D L^T
    float* image = (float*)shared_memory;                // [width][group + 4], once those two are done with
    float* basis = image + max(4 * pairs, width * (group + 4));  // [width][stride]
    float* ritz = basis + width * stride;                // [pairs], then its elimination
    float* mean = ritz + pairs;                          // [width]
    float* variance = mean + width;                      // [width]
    float* root = variance + width;                      // [terms]
    int* axes = (int*)(root + terms);                    // [terms]
    unsigned short* place = (unsigned short*)(axes + terms);  // [pairs]: row and column of a place in a triangle
    const long long list = blockIdx.x;
    const int n = count[list];
    const float share = n ? 1.f / n : 0.f;
    sum += list * width;
    if (moment != nullptr) moment += list * width * width;
    if (full || terms == 0) mean = (float*)shared_memory;
    for (int d = threadIdx.x; d < width; d += THREADS) mean[d] = sum[d] * share;
    __syncthreads();
    auto covariance = [&](int i, int j) {
        const float raw = moment[(long long)i * width + j];
        return centred ? raw : raw * share - mean[i] * mean[j];
    };

    const int own_row = tiled ? (int)(list % tiled) * terms_rows : 0;
    rows += tiled ? list / tiled * ((tiled * terms_rows + 63) / 64 * 64) * width : list * terms_rows * width;
    auto write = [&](int r, int d, float x) {
        const int row = own_row + r, turned = row % 64 * 64 + (d % 64 / 8 ^ row % 8) * 8 + d % 8;
        rows[tiled ? (row / 64 * (width / 64) + d / 64) * 4096ll + turned : (long long)row * width + d] = to_element(x);
    };

    if (full) {
        for (int d = threadIdx.x; d < width; d += THREADS) mean_out[list * width + d] = scale * mean[d];
        for (int i = threadIdx.x; i < width * width; i += THREADS)
            write(i / width, i % width, scale * scale / 2 * covariance(i / width, i % width));
        return;
    }
    for (int d = threadIdx.x; d < width; d += THREADS) write(0, d, scale * mean[d]);
    for (int i = (1 + terms) * width + threadIdx.x; i < terms_rows * width; i += THREADS) write(i / width, i % width, 0.f);
    if (terms == 0) return;

    // The axes of largest variance, ties by smaller axis: as many axes as go before this one.
    for (int d = threadIdx.x; d < width; d += THREADS) variance[d] = d < dim ? fmaxf(covariance(d, d), 0.f) : -1.f;
    for (int i = threadIdx.x; i < terms; i += THREADS)
        for (int j = 0; j <= i; ++j) place[triangle(i, j)] = (unsigned short)(i << 8 | j);
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += THREADS) {
        const float mine = variance[d];
        int before = 0;
#pragma unroll 8
        for (int e = 0; e < dim; ++e) before += variance[e] > mine || (variance[e] == mine && e < d);
        if (before < terms) axes[before] = d;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < width; d += THREADS)
#pragma unroll 4
        for (int t = 0; t < stride; ++t) basis[d * stride + t] = t < terms ? covariance(axes[t], d) : 0.f;
    __syncthreads();

    for (int p = threadIdx.x; p < pairs; p += THREADS) {
        const int i = place[p] >> 8, j = place[p] & 255;
        double x = 0, y = 0;
#pragma unroll 4
        for (int d = 0; d < width; d += 2) {  // width is even, or its last column is not there
            x += (double)basis[d * stride + i] * basis[d * stride + j];
            if (d + 1 < width) y += (double)basis[(d + 1) * stride + i] * basis[(d + 1) * stride + j];
        }
        gram[p] = x + y;
        inverse[p] = i == j;
        if (i == j) root[i] = (float)(x + y);
    }
    __syncthreads();
    // Elimination of gram, the same row operations on the identity. A column that depends on those before it counts
    // for nothing.
    for (int j = 0; j < terms; ++j) {
        const double pivot = gram[triangle(j, j)];
        const double scaled = pivot > 1e-10 * root[j] ? 1 / pivot : 0;
        for (int p = threadIdx.x; p < pairs; p += THREADS) {
            const int i = place[p] >> 8, c = place[p] & 255;
            if (i <= j) continue;
            const double part = gram[triangle(i, j)] * scaled;
            if (c > j) gram[p] -= part * gram[triangle(c, j)];
            else inverse[p] -= part * inverse[triangle(j, c)];
        }
        __syncthreads();
    }
    for (int t = threadIdx.x; t < terms; t += THREADS) {
        const double pivot = gram[triangle(t, t)];
        root[t] = pivot > 1e-10 * root[t] ? (float)(1 / sqrt(pivot)) : 0.f;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < width; d += THREADS)
        for (int t = terms - 1; t >= 0; --t) {
            double x = 0;
#pragma unroll 4
            for (int u = 0; u <= t; ++u) x += inverse[triangle(t, u)] * basis[d * stride + u];
            basis[d * stride + t] = (float)(x * root[t]);
        }
    __syncthreads();

    for (int first = 0; first < terms; first += group) {
        if (group == 8) multiply_group<8>(image, basis, stride, width, dim, covariance);
        else multiply_group<16>(image, basis + first, stride, width, dim, covariance);
        __syncthreads();
        for (int p = threadIdx.x; p < pairs; p += THREADS) {
            const int i = place[p] >> 8, j = (place[p] & 255) - first;
            if (j < 0 || j >= group) continue;
            float x = 0.f, y = 0.f;
#pragma unroll 4
            for (int d = 0; d < width; d += 2) {
                x += basis[d * stride + i] * image[d * (group + 4) + j];
                if (d + 1 < width) y += basis[(d + 1) * stride + i] * image[(d + 1) * (group + 4) + j];
            }
            ritz[p] = x + y;
        }
        __syncthreads();
    }
    // The same elimination; a pivot lost in rounding gives an empty column.
    float largest = 0.f;
    for (int j = 0; j < terms; ++j) largest = fmaxf(largest, ritz[triangle(j, j)]);
    __syncthreads();
    for (int j = 0; j < terms; ++j) {
        const float pivot = ritz[triangle(j, j)], scaled = pivot > 1e-6f * largest ? 1.f / pivot : 0.f;
        if (threadIdx.x == 0) root[j] = scaled > 0.f ? scale * 0.70710678118654752f * rsqrtf(pivot) : 0.f;
        for (int p = threadIdx.x; p < pairs; p += THREADS) {
            const int i = place[p] >> 8, c = place[p] & 255;
            if (c > j) ritz[p] -= ritz[triangle(i, j)] * scaled * ritz[triangle(c, j)];
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < terms * width; i += THREADS) {
        const int t = i / width, d = i % width;
        float x = 0.f;
#pragma unroll 4
        for (int j = t; j < terms; ++j) x += basis[d * stride + j] * ritz[triangle(j, t)];
        write(1 + t, d, d < dim ? root[t] * x : 0.f);
    }
}
