// attend.cu: stage 3 on the tensor cores (mma.sync). One block walks one row tile of one query head:
// seen window, ranked history until a key tile adds too little, pooled tail, masked window. Dense attention is
// the same walk with no history and no tail; a causal row then sees its last `window` keys (n_k: all).
//   q, k, v       [batch, heads, rows, dim]               T      element strides given, unit column stride
//   k_pool, v_pool[batch * heads_kv, pool_stride, dim]    T      block means; null without a tail
//   kv_order      [keys]                                  int32  ranked lists end to end; null: dense
//   kv_offsets    [order heads of the slab, segments + 1] int64  row stride offsets_stride
//   query_order   [batch * heads_q, n_q]                  int32  rows in walking order, or null
//   taus          [heads_q]                               float  or null: `tau` for every head
//   out           [batch, heads_q, n_q, dim_v]            T      element strides given
//   lse           [batch * heads_q, n_q]                  float  natural log
//   tiles, tail_blocks [batch * heads_q, row_tiles]       int32  or null
//   tail_mass     [batch * heads_q, n_q]                  float  share of the softmax sum; or null
//   lift          [batch * heads_q, n_q]                  float  added to a row's products with pooled keys, times the square of the
//                                                          share of the history that was not walked; or null
// T is float16 or bfloat16 (IS_BF16). `unit` is scale * log2 e.
// grid (row tiles of the slab * group, K/V heads of the slab)   block NUM_WARPS * 32
// shared memory: see the layout below; compile.attend_shared_bytes computes it
// macros IS_BF16, HEAD_DIM, HEAD_DIM_V (multiples of 32), BLOCK_M (64, 128), BLOCK_N (32, 64)
#include "gather.cuh"
#include "online_softmax.cuh"
#include "products.cuh"
#include "walk.cuh"

constexpr int WARP_ROWS = BLOCK_M == 128 && HEAD_DIM_V <= 128 ? 32 : 16;
constexpr int NUM_WARPS = BLOCK_M / WARP_ROWS;
constexpr int THREADS = NUM_WARPS * 32;
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int N_TILES = BLOCK_N / 8;
constexpr int V_TILES = HEAD_DIM_V / 8;
constexpr int K_BYTES = BLOCK_N * HEAD_DIM * 2;
constexpr int V_BYTES = BLOCK_N * HEAD_DIM_V * 2;
constexpr int Q_BYTES = BLOCK_M * HEAD_DIM * 2;
constexpr int MIN_BLOCKS = THREADS == 128 ? 2 : 1;
static_assert(HEAD_DIM_V <= HEAD_DIM, "the output is staged where q was");

typedef SharedTile<HEAD_DIM> KeyTile;
typedef SharedTile<HEAD_DIM_V> ValueTile;

struct Shared {
    unsigned int q, k, v;  // addresses; k and v hold two stages each
    int* row;              // [BLOCK_M] query row of each tile row
    int* poisoned;         // [BLOCK_M] whether that query is not finite
    float2* tail;          // [BLOCK_M] sum and maximum at the tail's start, then the tail's sum and maximum
    float* ceiling;        // [BLOCK_M] what the last key tile added, then the most a tail key's product may be
    int* index;            // [4][BLOCK_N] ring of gathered indices
    float* bias;           // [BLOCK_N] added to a tail or masked step's dot products
    int* walked;           // [pool_blocks] keys of each pool block that were accumulated
};

// What the block agrees on, kept out of its registers.
struct Agreed {
    Rows keys, values, pooled_keys, pooled_values;
    Walk walk;
    Step steps[4];  // ring: the current step, and the ones whose rows and indices are in flight
    const int* order;
    long long flat_head, out_at;
    int history, shift, window, rows, walked_tiles, blocks_found;
    int all_from, all_until;  // keys that every row sees lie between
    int walked_keys;
};

__device__ __forceinline__ Shared shared_layout(char* base) {
    Shared s;
    s.q = shared_address(base);
    s.k = s.q + Q_BYTES;
    s.v = s.k + 2 * K_BYTES;
    base += Q_BYTES + 2 * (K_BYTES + V_BYTES);
    s.tail = (float2*)base;
    s.ceiling = (float*)(s.tail + BLOCK_M);
    s.row = (int*)(s.ceiling + BLOCK_M);
    s.poisoned = s.row + BLOCK_M;
    s.index = s.poisoned + BLOCK_M;
    s.bias = (float*)(s.index + 4 * BLOCK_N);
    s.walked = (int*)(s.bias + BLOCK_N);
    return s;
}

// A value row that is not finite must reach only the rows that see it: it is zeroed here and marked, and the
// rows that see it get NaN through its logit. (Zero times NaN would reach every row of the tile.)
__device__ __forceinline__ void hide_non_finite(const Shared& sm, unsigned int v) {
    if (threadIdx.x < BLOCK_N) sm.bias[threadIdx.x] = 0.f;
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_N * ValueTile::CHUNKS; i += THREADS) {
        const int row = i / ValueTile::CHUNKS;
        const unsigned int address = ValueTile::address(v, row, i % ValueTile::CHUNKS);
        unsigned int x[4];
        load_shared16(x, address);
        if (halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3])) continue;
        sm.bias[row] = __int_as_float(0x7fffffff);
        zero_shared16(address);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attend(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const half_t* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    half_t* __restrict__ out, long long out_batch, long long out_head, long long out_row,
    int aligned,  // bits 0 to 3: q, k, v, out have rows that start on 16 bytes
    const half_t* __restrict__ k_pool, const half_t* __restrict__ v_pool, int pool_stride, int k_pool_row, int v_pool_row,
    const int* __restrict__ kv_order, const long long* __restrict__ kv_offsets, long long offsets_stride,
    const int* __restrict__ query_order, const float* __restrict__ taus, float tau,
    float* __restrict__ lse, int* __restrict__ tiles, int* __restrict__ tail_blocks, float* __restrict__ tail_mass, const float* __restrict__ lift,
    int heads_q, int heads_kv, int orders, int kv_start, int n_q, int n_k, int dim_qk, int dim_v,
    int causal, int window, int segment, int segment_start, int tiles_per_segment, int tile_start, int tile_stop, int row_tiles,
    int block_q, int block_k, int log2_pool, float unit) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ Agreed agreed;
    const Shared sm = shared_layout(shared_memory);
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * WARP_ROWS;

    // Which row tile: the longest walks of a head first, the heads of a K/V head side by side.
    const int group = heads_q / heads_kv, member = blockIdx.x % group;
    const int tile = tile_stop - 1 - blockIdx.x / group;
    const int kv = kv_start + blockIdx.y, batch = kv / heads_kv;
    const int head = (kv % heads_kv) * group + member;
    const long long flat_head = (long long)batch * heads_q + head;
    const int s = tile / tiles_per_segment;
    const int first_row = s * segment + tile % tiles_per_segment * block_q;
    const int rows = min(min(block_q, (s + 1) * segment - first_row), n_q - first_row);
    const int shift = causal ? n_k - n_q : 0;
    const bool dense = kv_order == nullptr;

    q += batch * q_batch + head * q_head;
    if (taus != nullptr) tau = taus[head];

    // Query rows of the tile, and the positions they span.
    int lowest = 0x7fffffff, highest = -1;
    for (int r = threadIdx.x; r < BLOCK_M; r += THREADS) {
        const int place = first_row + min(r, rows - 1);  // rows past the end repeat the last one
        const int row = query_order ? query_order[flat_head * n_q + place] : place;
        sm.row[r] = row, sm.poisoned[r] = 0, sm.tail[r] = make_float2(0.f, 0.f);
    }
    __syncthreads();
    if (query_order != nullptr) {
        for (int r = 0; r < rows; ++r) lowest = min(lowest, sm.row[r]), highest = max(highest, sm.row[r]);
    } else {
        lowest = first_row, highest = first_row + rows - 1;
    }

    // Queries to shared memory.
    const Rows queries = rows_of(q, q_row, dim_qk, aligned & 1);
    load_rows<HEAD_DIM, BLOCK_M, THREADS>(sm.q, queries, sm.row);
    commit_copies();

    // The walk.
    const int history = dense ? 0 : causal ? (s * segment + shift) >> log2_pool << log2_pool : n_k;
    const int pool_blocks = dense || k_pool == nullptr ? 0 : (history + (1 << log2_pool) - 1) >> log2_pool;
    const int* order = nullptr;
    int listed = 0;
    if (!dense) {
        const int order_head = blockIdx.y * orders + (orders == 1 ? 0 : member);
        const long long* list = kv_offsets + order_head * offsets_stride + (s - segment_start);
        order = kv_order + list[0];
        listed = (int)(list[1] - list[0]);
    }
    if (threadIdx.x == 0) {
        agreed.keys = rows_of(k + batch * k_batch + kv % heads_kv * k_head, k_row, dim_qk, aligned & 2);
        agreed.values = rows_of(v + batch * v_batch + kv % heads_kv * v_head, v_row, dim_v, aligned & 4);
        agreed.pooled_keys = rows_of(k_pool + (long long)kv * pool_stride * k_pool_row, k_pool_row, k_pool_row, true);
        agreed.pooled_values = rows_of(v_pool + (long long)kv * pool_stride * v_pool_row, v_pool_row, v_pool_row, true);
        const int first = causal ? max(history, lowest + shift + 1 - window) : history;
        const bool cut = causal && highest + shift + 1 > window;  // some row does not see key 0: every key is masked
        agreed.walk.window_first = first;
        agreed.walk.masked_first = cut ? first : causal ? lowest + shift : dense ? n_k : history;
        agreed.walk.masked_stop = causal ? highest + shift + 1 : agreed.walk.masked_first;
        agreed.walk.block_k = block_k;
        agreed.walk.listed = listed;
        agreed.walk.pool_blocks = pool_blocks;
        agreed.order = order, agreed.flat_head = flat_head, agreed.out_at = batch * out_batch + head * out_head;
        agreed.all_from = highest + shift + 1 - window, agreed.all_until = lowest + shift + 1;
        agreed.shift = shift, agreed.window = window, agreed.rows = rows, agreed.history = history, agreed.walked_tiles = agreed.blocks_found = 0;
        agreed.steps[0] = first_step(agreed.walk, SEEN_WINDOW, BLOCK_N);
        for (int i = 1; i < 3; ++i) agreed.steps[i] = step_after(agreed.walk, agreed.steps[i - 1], BLOCK_N);
    }
    for (int b = threadIdx.x; b < pool_blocks; b += THREADS) sm.walked[b] = 0;
    __syncthreads();

    // Rows of k and v that a step gathers; past its count the first row, which every query sees, or which a masked
    // step hides, its values too.
    auto fetch_index = [&](int place) {
        const Step& step = agreed.steps[place & 3];
        int* to = sm.index + (place & 3) * BLOCK_N + threadIdx.x;
        if (threadIdx.x >= BLOCK_N) return;
        if (step.phase == HISTORY && (int)threadIdx.x < step.count)
            copy4_async(shared_address(to), agreed.order + step.start + threadIdx.x);
        else
            *to = step.phase != HISTORY && (int)threadIdx.x < step.count ? step.start + (int)threadIdx.x : 0;
    };
    auto fetch_rows = [&](int place) {
        const bool pooled = agreed.steps[place & 3].phase == TAIL;
        const int* index = sm.index + (place & 3) * BLOCK_N;
        const unsigned int stage = place & 1;
        load_rows<HEAD_DIM, BLOCK_N, THREADS>(sm.k + stage * K_BYTES, pooled ? agreed.pooled_keys : agreed.keys, index);
        load_rows<HEAD_DIM_V, BLOCK_N, THREADS>(sm.v + stage * V_BYTES, pooled ? agreed.pooled_values : agreed.values, index);
    };

    float o[M_TILES][V_TILES][4];
    RowSoftmax soft[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        soft[m][0].clear(), soft[m][1].clear();
#pragma unroll
        for (int d = 0; d < V_TILES; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][d][i] = 0.f;
    }

    fetch_index(0), fetch_index(1);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_M * KeyTile::CHUNKS; i += THREADS) {
        unsigned int x[4];
        const unsigned int address = KeyTile::address(sm.q, i / KeyTile::CHUNKS, i % KeyTile::CHUNKS);
        load_shared16(x, address);
        if (!(halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3])))
            sm.poisoned[i / KeyTile::CHUNKS] = 1;
    }
    fetch_rows(0);
    commit_copies();
    __syncthreads();
    // Finite queries of the tile vote.
    auto votes = [&](int r) { return r < agreed.rows && !sm.poisoned[r]; };
    int place = 0;
    bool voted = false, wanted = false, in_tail = false;

    // The share of the sum that came since the tail began, kept with the maximum it is measured in.
    auto mark_tail = [&](bool ends) {
        if (lane % 4) return;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float2& mark = sm.tail[warp_row + 16 * m + 8 * h + lane / 4];
                const RowSoftmax& row = soft[m][h];
                const float before = ends ? mark.x * exp2_approx((mark.y - row.frame()) * unit) : 0.f;
                mark = make_float2(row.closed - before, ends ? row.frame() : row.top);
            }
    };

    // A key behind the last tile in the ranking is not credited with more than that tile's mean weight.
    auto start_ceiling = [&]() {
        if (lane % 4) return;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float& x = sm.ceiling[warp_row + 16 * m + 8 * h + lane / 4];
                x = agreed.walked_tiles ? soft[m][h].frame() + log2f(x / ((agreed.walked_keys - 1) % block_k + 1)) / unit : -NEGATIVE_INFINITY;
            }
    };

    while (true) {
        wait_copies<0>();
        const bool more = __syncthreads_or(wanted);
        if (voted && !more && agreed.steps[place & 3].phase == HISTORY) {  // stop: what is in flight is dropped
            __syncthreads();
            if (threadIdx.x == 0) {
                agreed.steps[place & 3] = first_step(agreed.walk, TAIL, BLOCK_N);
                for (int i = place + 1; i < place + 3; ++i)
                    agreed.steps[i & 3] = step_after(agreed.walk, agreed.steps[(i - 1) & 3], BLOCK_N);
            }
            __syncthreads();
            fetch_index(place), fetch_index(place + 1);
            __syncthreads();
            fetch_rows(place);
            commit_copies();
            wait_copies<0>();
            __syncthreads();
        }
        voted = wanted = false;
        const Step step = agreed.steps[place & 3];
        if (in_tail && step.phase != TAIL) mark_tail(true), in_tail = false;
        if (step.phase == DONE) break;

        fetch_rows(place + 1);
        fetch_index(place + 2);
        commit_copies();
        if (threadIdx.x == 0) agreed.steps[(place + 3) & 3] = step_after(agreed.walk, agreed.steps[(place + 2) & 3], BLOCK_N);
        const unsigned int stage = place & 1;
        const bool masked = step.phase == MASKED_WINDOW && (step.count < BLOCK_N || step.start < agreed.all_from || step.start + step.count > agreed.all_until);

        if (step.phase == TAIL) {
            if (!in_tail) mark_tail(false), start_ceiling(), in_tail = true;
            float bias = NEGATIVE_INFINITY;
            if ((int)threadIdx.x < step.count) {
                const int b = step.start + threadIdx.x;
                const int size = min(1 << log2_pool, agreed.history - (b << log2_pool)), left = size - sm.walked[b];
                if (4 * left >= size) bias = log2f((float)left) / unit;  // fewer are left out
            }
            if (threadIdx.x < BLOCK_N) sm.bias[threadIdx.x] = bias;
            const int found = __syncthreads_count(bias > NEGATIVE_INFINITY);
            if (threadIdx.x == 0) agreed.blocks_found += found;
        } else if (masked) {
            hide_non_finite(sm, sm.v + stage * V_BYTES);
        } else if (step.phase == HISTORY) {
            if (threadIdx.x == 0 && step.closes()) ++agreed.walked_tiles, agreed.walked_keys = step.tile_stop;
            if (agreed.walk.pool_blocks && (int)threadIdx.x < step.count)
                atomicAdd(sm.walked + (sm.index[(place & 3) * BLOCK_N + threadIdx.x] >> log2_pool), 1);
        }

        float p[M_TILES][N_TILES][4];
        multiply_qk<HEAD_DIM>(p, sm.q, sm.k + stage * K_BYTES, warp_row);

        if (step.count < BLOCK_N || step.phase == TAIL || masked) {
            __syncwarp();
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = warp_row + 16 * m + 8 * h + lane / 4;
                    int floor = 0, limit = step.count;  // columns before and from there on are hidden
                    if (masked) {
                        const int end = sm.row[r] + agreed.shift + 1 - step.start;
                        floor = end - agreed.window, limit = min(limit, end);
                    }
                    const float ceiling = step.phase == TAIL ? sm.ceiling[r] : -NEGATIVE_INFINITY;
                    float lifted = 0.f;
                    if (step.phase == TAIL && lift != nullptr && agreed.walked_tiles) {
                        const float left = (float)(agreed.history - agreed.walked_keys) / agreed.history;
                        lifted = left * left * lift[agreed.flat_head * n_q + sm.row[r]];
                    }
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            float& x = p[m][n][2 * h + i];
                            const int column = 8 * n + 2 * (lane % 4) + i;
                            const float bias = step.phase >= TAIL ? *(volatile float*)(sm.bias + column) : 0.f;
                            x = column >= floor && column < limit ? fminf(x + lifted, ceiling) + bias : NEGATIVE_INFINITY;
                        }
                }
        }

        float shrink[M_TILES][2];
        bool moved = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float greatest = fmaxf(p[m][0][2 * h], p[m][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < N_TILES; ++n) greatest = fmaxf(greatest, fmaxf(p[m][n][2 * h], p[m][n][2 * h + 1]));
                shrink[m][h] = soft[m][h].raise(quad_max(greatest), unit);
                moved |= shrink[m][h] != 1.f;
            }
        // In ranked order the greatest logits come first: most steps move no maximum.
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int d = 0; d < V_TILES; ++d)
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[m][d][i] *= shrink[m][i / 2];
        }
        unsigned int weights[M_TILES][N_TILES][2];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float frame = soft[m][h].frame() * unit;
                float even = 0.f, odd = 0.f;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    const float x = exp2_approx(p[m][n][2 * h] * unit - frame);
                    const float y = exp2_approx(p[m][n][2 * h + 1] * unit - frame);
                    even += x, odd += y;
                    weights[m][n][h] = pack_halves(x, y);
                }
                soft[m][h].open += even + odd;
            }
        multiply_pv(o, weights, sm.v + stage * V_BYTES);

        if (step.closes()) {
            voted = step.phase == HISTORY && tau > 0.f;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float before = soft[m][h].closed, gained = soft[m][h].close();
                    const int r = warp_row + 16 * m + 8 * h + lane / 4;
                    wanted |= votes(r) && soft[m][h].wants(gained, before, tau);
                    if (step.phase == HISTORY && lane % 4 == 0) sm.ceiling[r] = gained;
                }
        }
        ++place;
    }

    // Normalise; rows go out through the shared memory of the warp's own queries.
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 16 * m + 8 * h + lane / 4;
            const RowSoftmax& row = soft[m][h];
            const bool poisoned = sm.poisoned[r];
            const float nan = __int_as_float(0x7fffffff);
            const float inverse = poisoned ? nan : row.closed == 0.f ? 0.f : 1.f / row.closed;
#pragma unroll
            for (int d = 0; d < V_TILES; ++d) {
                const unsigned int pair = pack_halves(o[m][d][2 * h] * inverse, o[m][d][2 * h + 1] * inverse);
                store_shared4(ValueTile::address(sm.q, r, d) + 4 * (lane % 4), pair);
            }
            if (r < agreed.rows && lane % 4 == 0) {
                const long long place = agreed.flat_head * n_q + sm.row[r];
                const float natural = row.closed == 0.f ? NEGATIVE_INFINITY : row.top * unit * LN_2 + logf(row.closed);
                lse[place] = poisoned ? nan : natural;
                if (tail_mass != nullptr) {
                    const float share = sm.tail[r].x * exp2_approx((sm.tail[r].y - row.frame()) * unit) / row.closed;
                    tail_mass[place] = agreed.blocks_found && share > 0.f && !poisoned ? share : 0.f;
                }
            }
        }
    __syncthreads();
    out += agreed.out_at;
    for (int i = threadIdx.x; i < agreed.rows * ValueTile::CHUNKS; i += THREADS) {
        const int r = i / ValueTile::CHUNKS, c = i % ValueTile::CHUNKS, valid = min(8, dim_v - 8 * c);
        if (valid <= 0) continue;
        half_t* to = out + sm.row[r] * out_row + 8 * c;
        unsigned int x[4];
        load_shared16(x, ValueTile::address(sm.q, r, c));
        if ((aligned & 8) && valid == 8) {
            *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
        } else {
            for (int e = 0; e < valid; ++e) to[e] = (half_t)(x[e / 2] >> 16 * (e & 1));
        }
    }
    if (tiles != nullptr && threadIdx.x == 0) {
        const int tile = tile_stop - 1 - blockIdx.x / (heads_q / heads_kv);
        tiles[agreed.flat_head * row_tiles + tile] = agreed.walked_tiles;
        tail_blocks[agreed.flat_head * row_tiles + tile] = agreed.blocks_found;
    }
}
