// pool.cu: the mean of every pool block of K and V, which the tail lets enter the softmax in place of skipped keys.
//   k, v            [batch, heads, n_keys, dim]      T      element strides given, unit column stride
//   k_mean, v_mean  [batch * heads, blocks, row]     T      row: dim up to a multiple of 8; columns beyond dim are zero
//   squares         [batch * heads, blocks, dim_qk]  sum_t  what spread.cuh's departures leaves, where grid.z is 3
// T is float16 or bfloat16 (IS_BF16), summed in float; or REAL (float or double), summed in REAL.
// A partial last block is the mean of the keys it has. Sums run in one order: two runs agree bitwise.
// grid (blocks, batch * heads, K and V: 2, and K's departures: 3)   block 256 (LANES of columns by 256 / LANES rows)
// shared memory 256 * 8 * 8 bytes at most
// macros IS_BF16 or REAL
#ifdef REAL
typedef REAL element_t;
typedef REAL sum_t;
__device__ __forceinline__ sum_t to_sum(element_t x) { return x; }
__device__ __forceinline__ element_t from_sum(sum_t x) { return x; }
#else
#include "half.cuh"
typedef half_t element_t;
typedef float sum_t;
__device__ __forceinline__ sum_t to_sum(element_t x) { return half_to_float(x); }
__device__ __forceinline__ element_t from_sum(sum_t x) { return float_to_half(x); }
#endif
#include "spread.cuh"

constexpr int THREADS = 256, BLOCKS = sizeof(sum_t) == 4 ? 6 : 4;  // of a multiprocessor: departures would take registers

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) pool(
    const element_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, element_t* __restrict__ k_mean,
    const element_t* __restrict__ v, long long v_batch, long long v_head, long long v_row, element_t* __restrict__ v_mean,
    sum_t* __restrict__ squares, int heads, int n_keys, int dim_qk, int dim_v, int blocks, int pool_size) {
    __shared__ sum_t partial[THREADS * 8];
    const int block = blockIdx.x, first = block * pool_size, count = min(pool_size, n_keys - first), of_v = blockIdx.z == 1;
    const long long place = (long long)blockIdx.y * blocks + block, x_row = of_v ? v_row : k_row;
    const element_t* const x = (of_v ? v : k) + blockIdx.y / heads * (of_v ? v_batch : k_batch) +
                               blockIdx.y % heads * (of_v ? v_head : k_head) + first * x_row;
    if (blockIdx.z == 2) return departures(partial, x, x_row, count, dim_qk, squares + place * dim_qk);
    const int dim = of_v ? dim_v : dim_qk, row = (dim + 7) / 8 * 8;
    element_t* const mean = (of_v ? v_mean : k_mean) + place * row;
    // Columns in runs of 8 for each thread; 32 runs cover the largest head dim.
    const int runs = row / 8, lane = threadIdx.x % runs, strand = threadIdx.x / runs, strands = THREADS / runs;
    sum_t sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = 0;
    if (strand < strands) {
        for (int r = strand; r < count; r += strands) {
            const element_t* from = x + r * x_row + 8 * lane;
            for (int i = 0; i < 8; ++i)
                if (8 * lane + i < dim) sum[i] += to_sum(from[i]);
        }
        for (int i = 0; i < 8; ++i) partial[threadIdx.x * 8 + i] = sum[i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < row; c += THREADS) {
        sum_t total = 0;
        for (int s = 0; s < strands; ++s) total += partial[(s * runs + c / 8) * 8 + c % 8];
        mean[c] = c < dim ? from_sum(total / (sum_t)count) : from_sum((sum_t)0);
    }
}
