// factor.cuh: stage 1, second part. The rows whose products with a key make its score: the mean query, then the
// factors of the segment's covariance, scaled so that score = row0 . k + sum_i (row_i . k)^2.
//   sum     [width]                float  sum of the segment's finite queries
//   count                          int32  how many
//   moment  [width, pitch]         float  sum of q q^T (raw), or the covariance itself (`centred`); not read: mean rank
//   rows    [lists, terms_rows, width]  T   the answer; rows past 1 + terms are zero
//   mean    [lists, width]         float  scale * mean, written when `full`
// tiled: how many segments an order head has, whose rows then lie as tiled.cuh says, dealt out; 0: row after row.
// full: the answer is scale^2 / 2 times the covariance, width rows (score = sum_i (row_i . k + mean_i) k_i).
// Else one step of subspace iteration from the `terms` axes of largest variance: basis = orth(cov[:, axes]), by the
// Gram matrix of those columns, and a Cholesky factor of basis^T cov basis (any square root of it gives the same scores
// as its eigenvectors). The Gram matrix squares the columns' condition, so it and what is made of it are double.
// A block waits more than it computes: every loop of one step after another runs over columns of a terms x terms matrix,
// with one barrier a step, and all else is a number a thread.
// moment, the block's own list's, may lie at the start of its shared memory: `held` bytes of that are not to be used.
// T is float16 or bfloat16 (IS_BF16), or REAL.
// grid lists, the last one first   block THREADS   shared memory: layout below; specialisations.factor_shared_bytes
#pragma once
#include "tiled.cuh"
#include "elements.cuh"

constexpr int FACTOR_THREADS = 512;  // of `factor` alone
constexpr int BLOCK = 8;  // terms that go through registers together

#ifndef S2O_EMULATION
// c (8 x 8) += a (8 x 4) b (4 x 8) in double. Lane l holds a at row l/4, column l%4; b the other way round; c at row l/4,
// columns 2(l%4) and the next.
__device__ __forceinline__ void mma_double(double (&c)[2], double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(c[0]), "+d"(c[1]) : "d"(a), "d"(b));
}
#endif

// Place of (i, j), j <= i, in a lower triangle stored row by row.
__device__ __forceinline__ int triangle(int i, int j) { return i * (i + 1) / 2 + j; }

__device__ __forceinline__ void load_block(float (&x)[BLOCK], const float* from) {
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4) {
        const float4 y = *(const float4*)(from + i);
        x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
    }
}

__device__ __forceinline__ void store_block(float* to, const float (&x)[BLOCK]) {
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4) *(float4*)(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <int THREADS>
__device__ __forceinline__ void make_factors(
    char* shared_memory, int held, long long list, const float* sum, int n, const float* moment, int pitch,
    element_t* __restrict__ rows, float* __restrict__ mean_out, int width, int dim, int terms, int terms_rows,
    int centred, int full, int tiled, float scale) {
    const int group = terms <= 8 ? 8 : 16, stride = (terms + group - 1) / group * group + 4;
    const int padded = (terms + BLOCK - 1) / BLOCK * BLOCK, pairs = triangle(terms, 0), all_pairs = triangle(padded, 0);
    double* gram = (double*)(shared_memory + held);      // [all_pairs], later the pivots of its elimination
    double* inverse = gram + all_pairs;                  // [all_pairs]: L^-1 of gram = L D L^T
    float* image = (float*)gram;                         // [width][group + 4], once those two are done with
    float* basis = image + max(4 * all_pairs, width * (group + 4));  // [width][stride]
    float* ritz = basis + width * stride;                // [all_pairs], then its elimination
    float* variance = ritz + all_pairs;                  // [width], read four at a time
    float* mean = variance + width;                      // [width]
    float* shift = mean + width;                         // [padded]: a column's scale; then the mean times a basis row
    float* root = shift + padded;                        // [padded]
    int* axes = (int*)(root + padded);                   // [terms]
    unsigned short* place = (unsigned short*)(axes + terms);  // [pairs]: row and column of a place in a triangle
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const float share = n ? 1.f / n : 0.f;
    if (full || terms == 0) mean = (float*)(shared_memory + held);
    for (int d = threadIdx.x; d < width; d += THREADS) mean[d] = sum[d] * share;
    __syncthreads();
    auto covariance = [&](int i, int j) {
        const float raw = moment[(long long)i * pitch + j];
        return centred ? raw : raw * share - mean[i] * mean[j];
    };

    const int own_row = tiled ? (int)(list % tiled) * terms_rows : 0;
    rows += (tiled ? list / tiled * tiled_rows(tiled, terms_rows) : list * terms_rows) * width;
    auto write = [&](int r, int d, float x) {
        rows[tiled ? tiled_place(dealt_row(own_row + r), d, width) : (long long)r * width + d] = to_element(x);
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
    for (int start = 0; start < 2 * dim; start += THREADS) {  // two threads an axis, neighbours
        const int d = min((start + (int)threadIdx.x) / 2, dim - 1);
        const float mine = variance[d];
        int before = 0;
#pragma unroll 4
        for (int first = threadIdx.x % 2 * 4; first < dim; first += 8) {
            const float4 x = *(const float4*)(variance + first);
            const float other[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) before += first + i < dim && (other[i] > mine || (other[i] == mine && first + i < d));
        }
        before += __shfl_xor_sync(0xffffffffu, before, 1);
        if (threadIdx.x % 2 == 0 && start + threadIdx.x < 2 * dim && before < terms) axes[before] = d;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < width; d += THREADS)
#pragma unroll 4
        for (int t = 0; t < stride; t += 4) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = t + i < terms ? covariance(axes[t + i], d) : 0.f;
            *(float4*)(basis + d * stride + t) = make_float4(x[0], x[1], x[2], x[3]);
        }
    for (int p = threadIdx.x; p < all_pairs; p += THREADS) inverse[p] = 0, ritz[p] = 0.f;
    __syncthreads();

    for (int tile = warp; tile < triangle(padded / 8, 0); tile += THREADS / 32) {
        int down = 0;
        while (triangle(down + 1, 0) <= tile) ++down;
        const int right = tile - triangle(down, 0), i = 8 * down + lane / 4, j = 8 * right + 2 * (lane % 4);
        double c[2] = {0, 0};
#pragma unroll 4
        for (int first = 0; first < width; first += 4) {
            const int d = first + lane % 4;
            const bool inside = d < width;
            const double a = inside ? basis[d * stride + i] : 0.f, b = inside ? basis[d * stride + 8 * right + lane / 4] : 0.f;
            mma_double(c, a, b);
        }
        for (int h = 0; h < 2; ++h)
            if (j + h <= i) gram[triangle(i, j + h)] = c[h];
    }
    __syncthreads();
    // Columns of length 1: pivots are then shares of what a column was.
    for (int t = threadIdx.x; t < padded; t += THREADS) {
        const float square = (float)gram[triangle(t, t)];
        inverse[triangle(t, t)] = 1;
        shift[t] = square > 0.f ? rsqrtf(square) : 0.f;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += THREADS) gram[p] *= (double)shift[place[p] >> 8] * shift[place[p] & 255];
    __syncthreads();
    // Elimination, the same row operations on the identity. A column that depends on those before it counts for nothing.
    const int own = threadIdx.x < pairs ? place[threadIdx.x] : 0;
    for (int j = 0; j < terms; ++j) {
        const double pivot = gram[triangle(j, j)];
        const float shrink = rsqrtf((float)pivot);
        const double near = shrink * shrink, scaled = pivot > 1e-10 ? near * (2 - pivot * near) : 0;
        for (int p = threadIdx.x; p < pairs; p += THREADS) {
            const int at = p < THREADS ? own : place[p], i = at >> 8, c = at & 255;
            if (i <= j) continue;
            const double part = gram[triangle(i, j)] * scaled;
            if (c > j) gram[p] -= part * gram[triangle(c, j)];
            else inverse[p] -= part * inverse[triangle(j, c)];
        }
        __syncthreads();
    }
    for (int t = threadIdx.x; t < padded; t += THREADS) {
        const float pivot = t < terms ? (float)gram[triangle(t, t)] : 0.f;
        root[t] = pivot > 1e-10f ? rsqrtf(pivot) : 0.f;
    }
    __syncthreads();
    // Some blocks of columns at a time, from the last on: they read those before them.
    const int groups = THREADS / width;
    for (int top = padded - BLOCK; top >= 0; top -= groups * BLOCK) {
        const int d = threadIdx.x % width, last = top - (int)threadIdx.x / width * BLOCK;
        const bool mine = threadIdx.x < groups * width && last >= 0;
        double x[BLOCK] = {};
        if (mine)
            for (int first = 0; first <= last; first += BLOCK) {
#pragma unroll(THREADS > 256 ? 2 : 4)  // two blocks of 512 threads a multiprocessor have 64 registers each
                for (int u = 0; u < BLOCK; ++u) {
                    const double y = (double)basis[d * stride + first + u] * shift[first + u];
#pragma unroll
                    for (int t = 0; t < BLOCK; ++t)
                        if (first < last || u <= t) x[t] += inverse[triangle(last + t, first + u)] * y;
                }
            }
        __syncthreads();
        float y[BLOCK];
#pragma unroll
        for (int t = 0; t < BLOCK; ++t) y[t] = mine ? (float)(x[t] * root[last + t]) : 0.f;
        if (mine) store_block(basis + d * stride + last, y);
    }
    __syncthreads();

    for (int t = warp; t < padded; t += THREADS / 32) {
        float x = 0.f;
        for (int d = lane; d < width; d += 32) x += mean[d] * basis[d * stride + t];
        x = warp_sum(x);
        if (lane == 0) shift[t] = centred ? 0.f : x;
    }
    __syncthreads();
    for (int first = 0; first < terms; first += group) {
        // The covariance times some rows of the basis, eight to a thread.
        for (int i = threadIdx.x; i < width * (group / BLOCK); i += THREADS) {
            const int d = i % width, t0 = i / width * BLOCK;
            const float* column = moment + d;
            const float* row = basis + first + t0;
            float x[BLOCK] = {};
#pragma unroll 8
            for (int e = 0; e < dim; ++e) {
                const float c = column[(long long)e * pitch];
                float y[BLOCK];
                load_block(y, row + e * stride);
#pragma unroll
                for (int t = 0; t < BLOCK; ++t) x[t] += c * y[t];
            }
#pragma unroll
            for (int t = 0; t < BLOCK; ++t) x[t] = centred ? x[t] : x[t] * share - mean[d] * shift[first + t0 + t];
            store_block(image + d * (group + 4) + t0, x);
        }
        __syncthreads();
        for (int start = 0; start < 2 * pairs; start += THREADS) {  // two threads to a product, neighbours
            const int p = min((start + (int)threadIdx.x) / 2, pairs - 1), i = place[p] >> 8, j = (place[p] & 255) - first;
            const bool mine = start + (int)threadIdx.x < 2 * pairs && j >= 0 && j < group;
            float x = 0.f;
            if (mine)
#pragma unroll 8
                for (int d = threadIdx.x % 2; d < width; d += 2) x += basis[d * stride + i] * image[d * (group + 4) + j];
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            if (mine) ritz[p] = x;
        }
        __syncthreads();
    }
    // The same elimination; a pivot lost in rounding gives an empty column.
    float largest = 0.f;
    for (int j = 0; j < terms; ++j) largest = fmaxf(largest, ritz[triangle(j, j)]);
    __syncthreads();
    for (int j = 0; j < terms; ++j) {
        const float pivot = ritz[triangle(j, j)], shrink = pivot > 1e-6f * largest ? rsqrtf(pivot) : 0.f, scaled = shrink * shrink;
        if (threadIdx.x == 0) root[j] = scale * 0.70710678118654752f * shrink;
        for (int p = threadIdx.x; p < pairs; p += THREADS) {
            const int at = p < THREADS ? own : place[p], i = at >> 8, c = at & 255;
            if (c > j) ritz[p] -= ritz[triangle(i, j)] * scaled * ritz[triangle(c, j)];
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < width * (padded / BLOCK); i += THREADS) {
        const int d = i % width, first = i / width * BLOCK;
        float x[BLOCK] = {};
        for (int last = first; last < terms; last += BLOCK) {
#pragma unroll 4
            for (int j = 0; j < BLOCK; ++j) {
                const float y = basis[d * stride + last + j];
#pragma unroll
                for (int t = 0; t < BLOCK; ++t)
                    if (first < last || t <= j) x[t] += y * ritz[triangle(last + j, first + t)];
            }
        }
#pragma unroll
        for (int t = 0; t < BLOCK; ++t)
            if (first + t < terms) write(1 + first + t, d, d < dim ? root[first + t] * x[t] : 0.f);
    }
}

extern "C" __global__ void __launch_bounds__(FACTOR_THREADS, 2) factor(
    const float* __restrict__ sum, const int* __restrict__ count, const float* __restrict__ moment,
    element_t* __restrict__ rows, float* __restrict__ mean_out, int width, int dim, int terms, int terms_rows,
    int centred, int full, int tiled, float scale) {
    extern __shared__ double factor_memory[];
    const long long list = gridDim.x - 1 - blockIdx.x;  // the last moments that were written are still in the second cache
    make_factors<FACTOR_THREADS>((char*)factor_memory, 0, list, sum + list * width, count[list], moment + list * width * width, width,
                                 rows, mean_out, width, dim, terms, terms_rows, centred, full, tiled, scale);
}
