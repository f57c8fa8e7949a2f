// centres.cuh: stage 1 of the mixture rank, first part: one k-means step over each segment's finite queries.
//   q         [batch, heads_q, n_q, dim]          T      element strides given, unit column stride
//   rows      [lists, per_list, width]            T      the answer: centres; zero past `terms`, and where no query is near
//   share     [lists, per_list]                   REAL or float  log2 of a centre's part of the queries, -inf where it has none
//   variance  [lists, width]                      W      scale^2 / 2 times the queries' variance around their centres
//   place     [lists, 2, capacity]                int32  scratch: the finite queries, and each one's centre
// T and W are REAL; or T is float16 or bfloat16 (IS_BF16) and W bfloat16, whose range holds the product with a squared
// key. A list is one segment's queries of one query head, or of a K/V head's (share_order): `members` of them. The step
// starts at the finite queries floor(c n / R) + floor(n / 2R); a query joins the nearest centre, the smaller at a tie.
// tiled: rows lie as tiled.cuh says, and share follows them; then per_list counts for whole chunks of an order head.
// grid (segments of the slab, order heads of the slab)   block 512, where REAL is double 256
#pragma once
#include "tiled.cuh"
#include "elements.cuh"

#ifndef NEGATIVE_INFINITY
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#endif
constexpr int CENTRE_THREADS = sizeof(real_t) == 4 ? 512 : 256;
constexpr int CENTRE_WARPS = CENTRE_THREADS / 32;
constexpr int QUERIES = CENTRE_THREADS / 4;  // of a tile of products
constexpr int CENTRES = 32;
constexpr int COLUMNS = 32;  // staged at a time
constexpr int STAGED = (QUERIES + CENTRES) * COLUMNS / CENTRE_THREADS;  // numbers of a thread
constexpr int MOST_COLUMNS = 8;  // of a lane: width up to 256
constexpr int SUMS = 32768 / sizeof(real_t);  // of groups, held at a time
constexpr int IN_FLIGHT = 8;  // members' numbers of a thread

__device__ __forceinline__ real_t log_2(real_t x) { return sizeof(real_t) == 4 ? (real_t)log2f((float)x) : (real_t)log2((double)x); }
__device__ __forceinline__ bool is_finite(real_t x) { return x - x == 0; }

// Lists the finite rows of a list in order; returns how many. `counts` holds CENTRE_WARPS + 1 numbers.
template <typename RowAt>
__device__ int list_finite(RowAt row_at, int total, int dim, int* kept, int* counts) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int found = 0;
    for (int start = 0; start < total; start += CENTRE_THREADS) {
        unsigned int good = 0;  // bit r: row r of the warp's 32
        const int there = min(32, total - start - warp * 32);
#pragma unroll 4
        for (int r = 0; r < there; ++r) {
            const element_t* x = row_at(start + warp * 32 + r);
            bool fine = true;
#pragma unroll
            for (int j = 0; j < MOST_COLUMNS; ++j)  // no load waits for what another one found
                if (lane + 32 * j < dim) fine &= is_finite(to_real(x[lane + 32 * j]));
            if (__all_sync(0xffffffffu, fine)) good |= 1u << r;
        }
        if (lane == 0) counts[warp] = __popc(good);
        __syncthreads();
        int before = found;
        for (int w = 0; w < CENTRE_WARPS; ++w) {
            if (w < warp) before += counts[w];
            found += counts[w];
        }
        if (good >> lane & 1) kept[before + __popc(good & ((1u << lane) - 1))] = start + threadIdx.x;
        __syncthreads();
    }
    return found;
}

struct Tile {
    real_t queries[QUERIES][COLUMNS + 1], centre[CENTRES][COLUMNS + 1];
};

extern "C" __global__ void __launch_bounds__(CENTRE_THREADS, 2) centres(
    const element_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    element_t* __restrict__ rows, real_t* __restrict__ share, element_t* __restrict__ variance, int* __restrict__ place,
    int heads_order, int members, int order_start, int n_q, int dim, int segment, int segment_start,
    int width, int terms, int per_list, int capacity, int tiled, real_t scale) {
    __shared__ __align__(16) unsigned char shared[SUMS * sizeof(real_t)];
    static_assert(sizeof(shared) >= sizeof(Tile), "the sums' place holds a tile");
    Tile& tile = *(Tile*)shared;           // while the nearest centres are sought
    real_t* const sums = (real_t*)shared;  // [a centre of those held][columns], afterwards
    __shared__ real_t near[QUERIES][9];
    __shared__ int nearest[QUERIES][9], counts[CENTRE_WARPS], joined[CENTRE_THREADS];
    int* const size = &nearest[0][0];  // of each group held
    static_assert(sizeof(nearest) / sizeof(int) >= SUMS / 32, "a size for each group");
    __shared__ const element_t* source[CENTRE_THREADS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, tx = threadIdx.x % 8, ty = threadIdx.x / 8;
    const int order_head = order_start + blockIdx.y, first = (segment_start + blockIdx.x) * segment;
    const int in_head = min(segment, n_q - first);
    const long long list = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    q += order_head / heads_order * q_batch + order_head % heads_order * members * q_head + first * q_row;
    const long long first_row = tiled ? (long long)blockIdx.y * tiled_rows(gridDim.x, per_list) + blockIdx.x * per_list : list * per_list;
    share += first_row, variance += list * width;
    int* const kept = place + list * 2 * capacity;
    int* const group = kept + capacity;
    auto row_at = [&](int r) { return q + r / in_head * q_head + r % in_head * q_row; };

    const int n = list_finite(row_at, in_head * members, dim, kept, counts), present = min(terms, n);
    auto start_of = [&](int c) { return row_at(kept[(int)((long long)c * n / present) + n / (2 * present)]); };

    // The nearest centre of each query: the greatest x . c - |c|^2 / 2. A thread has two queries and four centres; the next
    // columns are on their way while it multiplies.
    for (int first_query = 0; first_query < n; first_query += QUERIES) {
        real_t best[2];
        int best_centre[2] = {0, 0};
        for (int first_centre = 0; first_centre < present; first_centre += CENTRES) {
            real_t x[2][4] = {}, square[4] = {};
            if (threadIdx.x < QUERIES + CENTRES) {
                const int r = threadIdx.x, c = first_centre + r - QUERIES;
                source[r] = r < QUERIES ? (first_query + r < n ? row_at(kept[first_query + r]) : nullptr) : c < present ? start_of(c) : nullptr;
            }
            __syncthreads();
            real_t next[STAGED];
            auto fetch = [&](int column) {
#pragma unroll
                for (int j = 0; j < STAGED; ++j) {
                    const element_t* x = source[warp + j * CENTRE_WARPS];
                    next[j] = x != nullptr && column + lane < dim ? to_real(x[column + lane]) : 0;
                }
            };
            fetch(0);
            for (int column = 0; column < dim; column += COLUMNS) {
                __syncthreads();
#pragma unroll
                for (int j = 0; j < STAGED; ++j) {
                    const int r = warp + j * CENTRE_WARPS;
                    (r < QUERIES ? tile.queries[r] : tile.centre[r - QUERIES])[lane] = next[j];
                }
                __syncthreads();
                if (column + COLUMNS < dim) fetch(column + COLUMNS);
#pragma unroll 8
                for (int d = 0; d < COLUMNS; ++d) {
                    const real_t left[2] = {tile.queries[ty][d], tile.queries[ty + QUERIES / 2][d]};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const real_t right = tile.centre[tx + 8 * j][d];
                        x[0][j] += left[0] * right, x[1][j] += left[1] * right, square[j] += right * right;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int c = first_centre + tx + 8 * j;
                    const real_t closeness = x[i][j] - square[j] / 2;
                    if (c < present && (c < 8 || closeness > best[i])) best[i] = closeness, best_centre[i] = c;
                }
        }
        for (int i = 0; i < 2; ++i)
            if (tx < present) near[ty + QUERIES / 2 * i][tx] = best[i], nearest[ty + QUERIES / 2 * i][tx] = best_centre[i];
        __syncthreads();
        if (threadIdx.x < QUERIES && first_query + (int)threadIdx.x < n) {
            const int r = threadIdx.x;
            int chosen = 0;
            for (int t = 1; t < min(8, present); ++t)
                if (near[r][t] > near[r][chosen] || (near[r][t] == near[r][chosen] && nearest[r][t] < nearest[r][chosen])) chosen = t;
            group[first_query + r] = nearest[r][chosen];
        }
    }
    __syncthreads();

    // Means of the groups: a thread has one column of every slots-th group, its members in order; then how far they lie from it.
    int columns = 32;
    while (columns < width) columns *= 2;
    const int column = threadIdx.x % columns, slot = threadIdx.x / columns, slots = CENTRE_THREADS / columns;
    const int which = slots - 1 | 1 << 31;  // of a group's number, or -1 for none held: its slot
    real_t around = 0;
    for (int first_centre = 0; first_centre < per_list; first_centre += SUMS / columns) {
        const int held = min(SUMS / columns, per_list - first_centre);
        for (int i = threadIdx.x; i < held * columns; i += CENTRE_THREADS) sums[i] = 0;
        for (int c = threadIdx.x; c < held; c += CENTRE_THREADS) size[c] = 0;
        for (int pass = 0; pass < 2; ++pass) {
            for (int start = 0; start < n; start += CENTRE_THREADS) {
                const int there = min(CENTRE_THREADS, n - start);
                __syncthreads();
                joined[threadIdx.x] = -1;
                if ((int)threadIdx.x < there) {
                    const int c = group[start + threadIdx.x] - first_centre;
                    source[threadIdx.x] = row_at(kept[start + threadIdx.x]);
                    if (c >= 0 && c < held) joined[threadIdx.x] = c;
                }
                __syncthreads();
                for (int r = 0; r < there; r += IN_FLIGHT) {
                    real_t value[IN_FLIGHT];
#pragma unroll
                    for (int i = 0; i < IN_FLIGHT; ++i) {
                        const int c = joined[r + i];
                        value[i] = (c & which) == slot && column < dim ? to_real(source[r + i][column]) : 0;
                    }
#pragma unroll
                    for (int i = 0; i < IN_FLIGHT; ++i) {
                        const int c = joined[r + i];
                        if ((c & which) != slot) continue;
                        real_t& sum = sums[c * columns + column];
                        if (pass == 0) sum += value[i];
                        else around += (value[i] - sum) * (value[i] - sum);
                        if (pass == 0 && column == 0) ++size[c];
                    }
                }
            }
            __syncthreads();
            for (int c = slot; pass == 0 && c < held; c += slots)
                if (size[c]) sums[c * columns + column] /= size[c];
        }
        for (int c = slot; c < held; c += slots) {
            const long long row = first_row + first_centre + c;
            if (column < width) rows[tiled ? tiled_place(row, column, width) : row * width + column] = to_element(sums[c * columns + column]);
            // Without a finite query there is one centre, 0.
            if (column == 0) share[first_centre + c] = n == 0 && first_centre + c == 0 ? 0 : size[c] ? log_2((real_t)size[c] / n) : NEGATIVE_INFINITY;
        }
        __syncthreads();
    }
    sums[threadIdx.x] = around;
    __syncthreads();
    if (threadIdx.x < width) {
        real_t sum = 0;
        for (int s = 0; s < slots; ++s) sum += sums[s * columns + column];
        variance[column] = to_weight(n ? scale * scale / 2 * sum / n : 0);
    }
}
