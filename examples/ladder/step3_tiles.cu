// step3_tiles.cu: step2_tiles.py in CUDA C++, line for line: what does the language cost?
//   q, out [heads_q, n, DIM]   k, v [heads_kv, n, DIM]   float16
//   order [keys] int32   starts [heads_q, segments + 1] int64   tiles [heads_q, row tiles] int32
// grid (row tiles, heads_q)   block rows of a tile   shared memory 2 * STEP * DIM float   macros DIM
#include "half.cuh"
#include "online_softmax.cuh"

constexpr int STEP = 32;  // keys staged at a time

struct Row {
    float query[DIM], acc[DIM], top, closed, opened;

    __device__ __forceinline__ void add(const float* key, const float* value, float scale) {
        float logit = 0;
#pragma unroll
        for (int d = 0; d < DIM; ++d) logit += query[d] * key[d];
        logit *= scale;
        if (logit > top) {
            const float shrink = expf(top - logit);
            closed *= shrink, opened *= shrink, top = logit;
#pragma unroll
            for (int d = 0; d < DIM; ++d) acc[d] *= shrink;
        }
        const float weight = expf(logit - top);
        opened += weight;
#pragma unroll
        for (int d = 0; d < DIM; ++d) acc[d] += weight * value[d];
    }
};

extern "C" __global__ void attend(
    const half_t* __restrict__ q, const half_t* __restrict__ k, const half_t* __restrict__ v, const int* __restrict__ order,
    const long long* __restrict__ starts, half_t* __restrict__ out, int* __restrict__ tiles,
    int heads_kv, int n, int segment, int block_k, float tau, float scale) {
    __shared__ float k_tile[STEP * DIM];
    __shared__ float v_tile[STEP * DIM];
    const int head = blockIdx.y, first = blockIdx.x * blockDim.x, row = first + threadIdx.x;
    const int history = first / segment * segment, kv = head / (gridDim.y / heads_kv), segments = (n + segment - 1) / segment;
    const bool active = row < n;
    q += ((long long)head * n + (active ? row : first)) * DIM;
    k += (long long)kv * n * DIM, v += (long long)kv * n * DIM;
    Row mine;
    mine.top = NEGATIVE_INFINITY, mine.closed = mine.opened = 0;
#pragma unroll
    for (int d = 0; d < DIM; ++d) mine.query[d] = half_to_float(q[d]), mine.acc[d] = 0;

    auto add_keys = [&](const int* from, int begin, int stop, int my_stop) {
        for (int start = begin; start < stop; start += STEP) {
            const int count = min(STEP, stop - start);
            __syncthreads();
            for (int i = threadIdx.x; i < count * DIM; i += blockDim.x) {
                const long long key = from ? from[start + i / DIM] : start + i / DIM;
                k_tile[i] = half_to_float(k[key * DIM + i % DIM]), v_tile[i] = half_to_float(v[key * DIM + i % DIM]);
            }
            __syncthreads();
            for (int i = 0; i < min(count, my_stop - start); ++i) mine.add(k_tile + i * DIM, v_tile + i * DIM, scale);
        }
    };
    auto close = [&] {
        const bool wanted = active && (mine.closed == 0 || mine.opened >= tau * mine.closed);
        mine.closed += mine.opened, mine.opened = 0;
        return wanted;
    };
    add_keys(nullptr, history, first, first);
    close();
    const int* list = order + starts[head * (segments + 1) + history / segment];
    int walked = 0;
    while (walked * block_k < history) {
        const int stop = min((walked + 1) * block_k, history);
        add_keys(list, walked * block_k, stop, stop);
        ++walked;
        if (!__syncthreads_or(close())) break;
    }
    add_keys(nullptr, first, min(first + (int)blockDim.x, n), row + 1);
    close();
    if (active)
        for (int d = 0; d < DIM; ++d) out[((long long)head * n + row) * DIM + d] = float_to_half(mine.acc[d] / mine.closed);
    if (threadIdx.x == 0) tiles[head * gridDim.x + blockIdx.x] = walked;
}
