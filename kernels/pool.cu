// pool.cu: the mean of every pool block of K or V, which the tail lets enter the softmax in place of skipped keys.
//   x     [batch, heads, n_keys, dim]          T          element strides given, unit column stride
//   mean  [batch * heads, blocks, row]         T          row >= dim: columns beyond dim are zero
// T is float16 or bfloat16 (IS_BF16), summed in float; or REAL (float or double), summed in REAL.
// A partial last block is the mean of the keys it has. Sums run in one order: two runs agree bitwise.
// grid (blocks, batch * heads)   block 256 (LANES of columns by 256 / LANES rows)   shared memory 256 * 8 * 8 bytes at most
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

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) pool(
    const element_t* __restrict__ x, long long x_batch, long long x_head, long long x_row, element_t* __restrict__ mean,
    int heads, int n_keys, int dim, int row, int blocks, int pool_size) {
    __shared__ sum_t partial[THREADS * 8];
    const int block = blockIdx.x, first = block * pool_size, count = min(pool_size, n_keys - first);
    x += blockIdx.y / heads * x_batch + blockIdx.y % heads * x_head + first * x_row;
    mean += ((long long)blockIdx.y * blocks + block) * row;
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
