// attend_sm90.cu: stage 3 on Hopper's tensor cores (wgmma). The walk, the arrays and the arguments are attend.cu's;
// q, k, v and out have rows that start on 16 bytes and exactly HEAD_DIM columns.
// A block stays on its multiprocessor and takes row tiles one after another. One producer warpgroup gathers rows by
// cp.async into a ring of units, each the BLOCK_N keys of a step or its values, the values one unit late: K0 K1 V0 K2
// V1 ... end V. Two consumer warpgroups of 64 query rows each multiply: while the values of one step are multiplied,
// the next step's logits become weights. A vote is cast when a key tile closes and read before the next step counts;
// a stop skips what is in the ring and tells the producer.
//   ticket        [1]             int32  zero; hands out row tiles
// grid any number of blocks   block 384   shared memory: layout below; specialisations.sm90_shared_bytes computes it
// macros IS_BF16, HEAD_DIM, HEAD_DIM_V (multiples of 64), BLOCK_N (64, 128), UNITS (4 or more)
#include "online_softmax.cuh"
#include "walk.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 128, CONSUMERS = 256, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int N_TILES = BLOCK_N / 8, V_TILES = HEAD_DIM_V / 8, PANELS = HEAD_DIM / 64, V_PANELS = HEAD_DIM_V / 64;
constexpr int PANEL_BYTES = BLOCK_N * 128, Q_PANEL_BYTES = BLOCK_M * 128, Q_BYTES = PANELS * Q_PANEL_BYTES;
constexpr int UNIT_BYTES = (PANELS > V_PANELS ? PANELS : V_PANELS) * PANEL_BYTES;
constexpr int O_COLUMNS = HEAD_DIM_V % 128 ? 64 : 128, O_PARTS = HEAD_DIM_V / O_COLUMNS;  // of one instruction
constexpr int LAG = 1;             // units in flight behind the one started last
constexpr int TILE_END = DONE + 1;  // a unit without rows, where a tile's next keys would be

// What the consumers need to know of a row tile.
struct TileFacts {
    int id;  // -1: no more row tiles
    int rows, history, pool_blocks;
    int all_from, all_until;  // keys that every row sees lie between
    int end;                  // keys of the masked window end here
    float tau;
    long long out_at, row_at, tile_at;  // where its head starts in out, in lse, and it itself in tiles
    int row[BLOCK_M];
};

struct Ring {
    unsigned long long full[UNITS], empty[UNITS], q_full, q_empty, vote;
    TileFacts facts[2];          // of row tiles in turn
    Step steps[UNITS];
    int index[UNITS][BLOCK_N];   // keys gathered for the history
    bool hidden[BLOCK_N];        // which of a masked step's values are not finite
    float bias[2][BLOCK_N];      // tail: added to a step's dot products, by consumer warpgroup
    float2 tail[BLOCK_M];        // sum and maximum at the tail's start, then the tail's sum and maximum
    // Of a row: its tau, negative if it has no vote; and what the last key tile added, then the most a tail key's product
    // may be.
    float2 state[BLOCK_M];
    bool poisoned[BLOCK_M];      // whether a query is not finite
    int walked_tiles[2], last_keys[2], blocks_found[2];  // of the tile; keys of the last key tile; by consumer warpgroup
    unsigned int votes[4];
    int stopped;  // number of the last row tile of this block that stopped
    int lowest[4], highest[4], ticket;
};

constexpr int RING_BYTES = UNITS * (32 + 4 * BLOCK_N) + 9 * BLOCK_N + 3584;
static_assert(sizeof(Ring) <= RING_BYTES && UNITS >= 4, "specialisations.sm90_shared_bytes counts RING_BYTES");

struct Launch {
    const half_t *q, *k, *v, *k_pool, *v_pool;
    long long q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head;
    int pool_stride, k_pool_row, v_pool_row;
    const int* kv_order;
    const long long* kv_offsets;
    long long offsets_stride;
    const int* query_order;
    const float* taus;
    float tau;
    int heads_q, heads_kv, orders, kv_start, n_q, n_k, causal, window, segment, segment_start, tiles_per_segment;
    int tile_start, tile_stop, row_tiles, block_q, block_k, log2_pool, kv_heads;
    int* ticket;
    __device__ __forceinline__ int group() const { return heads_q / heads_kv; }
    __device__ __forceinline__ int tiles() const { return (tile_stop - tile_start) * group() * kv_heads; }
};

// One row tile: the longest walks of a K/V head first, the query heads of a K/V head side by side.
struct RowTile {
    int kv, batch, head, member, tile, segment, first_row, rows, history, pool_blocks;
    long long flat_head;
    __device__ __forceinline__ RowTile(const Launch& x, int id) {
        const int group = x.group(), each = (x.tile_stop - x.tile_start) * group, place = id % each;
        kv = x.kv_start + id / each, batch = kv / x.heads_kv, member = place % group, tile = x.tile_stop - 1 - place / group;
        head = kv % x.heads_kv * group + member;
        flat_head = (long long)batch * x.heads_q + head;
        segment = tile / x.tiles_per_segment;
        first_row = segment * x.segment + tile % x.tiles_per_segment * x.block_q;
        rows = min(min(x.block_q, (segment + 1) * x.segment - first_row), x.n_q - first_row);
        const bool dense = x.kv_order == nullptr;
        const int shift = x.causal ? x.n_k - x.n_q : 0;
        history = dense ? 0 : x.causal ? (segment * x.segment + shift) >> x.log2_pool << x.log2_pool : x.n_k;
        pool_blocks = dense || x.k_pool == nullptr ? 0 : (history + (1 << x.log2_pool) - 1) >> x.log2_pool;
    }
};

// Rows of HEAD_DIM columns as panels of 64: rows of 128 bytes whose 16-byte chunks are turned by row % 8.
__device__ __forceinline__ unsigned int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 6, 256;" ::: "memory"); }
__device__ __forceinline__ void producers_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_sync(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(2 + warpgroup) : "memory"); }
// How many threads of the warpgroup say so.
__device__ __forceinline__ int warpgroup_count(int warpgroup, bool x) {
    int count;
    asm volatile("{\n.reg .pred mine;\nsetp.ne.b32 mine, %2, 0;\nbarrier.cta.red.popc.u32 %0, %1, 128, mine;\n}"
                 : "=r"(count) : "r"(2 + warpgroup), "r"((int)x) : "memory");
    return count;
}
__device__ __forceinline__ bool any_producer(bool x) {
    int any;
    asm volatile("{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %1, 0;\nbarrier.cta.red.or.pred any, 1, 128, mine;\nselp.b32 %0, 1, 0, any;\n}"
                 : "=r"(any) : "r"((int)x) : "memory");
    return any != 0;
}
// The same in every lane, and known to be: wgmma must not lie on a path that the compiler thinks may diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// The thread in its warpgroup, read anew: what seldom runs must not hold registers in the loop.
__device__ __forceinline__ int thread_here() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x & 127;
}
// NaN in either half once some x was not finite; else 0.
__device__ __forceinline__ unsigned int not_finite(unsigned int (&x)[4], unsigned int seen) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#if IS_BF16
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(x[i]), "r"(0));
#else
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(x[i]), "r"(0));
#endif
    return seen;
}
__device__ __forceinline__ void load_chunk(unsigned int (&x)[4], unsigned int address) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Where a role stands in the ring.
struct Place {
    int unit, round;
    __device__ __forceinline__ Place after(int units) const {
        const bool around = unit + units >= UNITS;
        return {unit + units - (around ? UNITS : 0), round ^ (int)around};
    }
};

// The producer warpgroup: every thread copies its 16-byte column of each panel of every 16th row.
struct Producer {
    Ring& ring;
    const unsigned int units;
    Place place;                // of the unit to start
    int started, with_queries;  // units started and not handed over; the unit that the queries travel with

    __device__ __forceinline__ int first() const { return (threadIdx.x & 127) / 8; }
    __device__ __forceinline__ int column() const { return threadIdx.x % 8; }

    template <int ROWS, int COLUMN_PANELS>
    __device__ __forceinline__ void copy(unsigned int to, const half_t* from, long long stride, const int (&rows)[ROWS / 16]) {
        to += swizzled(first(), column());
        const half_t* const data = from + 8 * column();
        const int row_stride = (int)stride;
#pragma unroll
        for (int i = 0; i < ROWS / 16; ++i) {
            const half_t* const row = data + (long long)rows[i] * row_stride;
#pragma unroll
            for (int p = 0; p < COLUMN_PANELS; ++p) copy16_async(to + p * ROWS * 128 + 2048 * i, row + 64 * p);
        }
    }

    // Gives the consumers the oldest unit; its copies are there.
    __device__ __forceinline__ void hand_over() {
        async_fence();
        __syncwarp();
        const int unit = place.unit - started + (place.unit < started ? UNITS : 0);
        const bool queries_too = with_queries == unit;
        if (threadIdx.x % 32 == 0) {
            if (queries_too) barrier_arrive(shared_address(&ring.q_full));
            barrier_arrive(shared_address(ring.full + unit));
        }
        if (queries_too) with_queries = -1;
        --started;
    }
    __device__ __forceinline__ unsigned int open() {
        barrier_wait(shared_address(ring.empty + place.unit), place.round ^ 1);
        return units + place.unit * UNIT_BYTES;
    }
    __device__ __forceinline__ void close() {
        commit_copies();
        place = place.after(1);
        if (++started > LAG) wait_copies<LAG>(), hand_over();
    }
    __device__ __forceinline__ void flush() {
        wait_copies<0>();
        while (started) hand_over();
    }
};

__device__ __forceinline__ void produce(Ring& ring, unsigned int queries, unsigned int units, const Launch& x) {
    constexpr int EACH = BLOCK_N / 16;
    Producer producer = {ring, units, {0, 0}, 0, -1};
    const int thread = threadIdx.x & 127, first = producer.first();
    int id = blockIdx.x, number = 0;
    for (; id < x.tiles(); ++number) {
        const RowTile tile(x, id);
        const bool dense = x.kv_order == nullptr;
        const int shift = x.causal ? x.n_k - x.n_q : 0;
        auto query_row = [&]() {
            const int place = tile.first_row + min(thread, tile.rows - 1);  // rows past the end repeat the last one
            return x.query_order != nullptr ? x.query_order[tile.flat_head * x.n_q + place] : place;
        };
        if (thread == 0) ring.ticket = gridDim.x + atomicAdd(x.ticket, 1);

        // The walk.
        int lowest = tile.first_row, highest = tile.first_row + tile.rows - 1;
        if (x.query_order != nullptr) {
            const int low = __reduce_min_sync(0xffffffffu, query_row()), high = __reduce_max_sync(0xffffffffu, query_row());
            if (thread % 32 == 0) ring.lowest[thread / 32] = low, ring.highest[thread / 32] = high;
            producers_sync();
            lowest = min(min(ring.lowest[0], ring.lowest[1]), min(ring.lowest[2], ring.lowest[3]));
            highest = max(max(ring.highest[0], ring.highest[1]), max(ring.highest[2], ring.highest[3]));
        }
        Walk walk;
        const int* order = nullptr;
        walk.listed = 0;
        if (!dense) {
            const int order_head = (tile.kv - x.kv_start) * x.orders + (x.orders == 1 ? 0 : tile.member);
            const long long* list = x.kv_offsets + order_head * x.offsets_stride + (tile.segment - x.segment_start);
            order = x.kv_order + list[0];
            walk.listed = (int)(list[1] - list[0]);
        }
        const int first_key = x.causal ? max(tile.history, lowest + shift + 1 - x.window) : tile.history;
        const bool cut = x.causal && highest + shift + 1 > x.window;  // some row does not see key 0: every key is masked
        walk.window_first = first_key;
        walk.masked_first = cut ? first_key : x.causal ? lowest + shift : dense ? x.n_k : tile.history;
        walk.masked_stop = x.causal ? highest + shift + 1 : walk.masked_first;
        walk.block_k = x.block_k, walk.pool_blocks = tile.pool_blocks;

        // Queries travel with the first unit.
        barrier_wait(shared_address(&ring.q_empty), number & 1 ^ 1);
        TileFacts& facts = ring.facts[number & 1];
        facts.row[thread] = query_row();
        if (thread == 0) {
            facts.id = id, facts.rows = tile.rows, facts.history = tile.history, facts.pool_blocks = tile.pool_blocks;
            facts.all_from = highest + shift + 1 - x.window, facts.all_until = lowest + shift + 1, facts.end = walk.masked_stop;
            facts.tau = x.taus != nullptr ? x.taus[tile.head] : x.tau;
            facts.out_at = tile.batch * x.out_batch + tile.head * x.out_head, facts.row_at = tile.flat_head * x.n_q;
            facts.tile_at = tile.flat_head * x.row_tiles + tile.tile;
        }
        producers_sync();
        int query_rows[BLOCK_M / 16];
#pragma unroll
        for (int i = 0; i < BLOCK_M / 16; ++i) query_rows[i] = facts.row[first + 16 * i];
        producer.copy<BLOCK_M, PANELS>(queries, x.q + tile.batch * x.q_batch + tile.head * x.q_head, x.q_row, query_rows);
        producer.with_queries = producer.place.unit;

        const int kv_head = tile.kv % x.heads_kv;
        const half_t* const keys = x.k + tile.batch * x.k_batch + kv_head * x.k_head;
        const half_t* const values = x.v + tile.batch * x.v_batch + kv_head * x.v_head;
        const long long pooled = (long long)tile.kv * x.pool_stride;
        auto rows_for = [&](const Step& step, int (&rows)[EACH]) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                // Past the count the first row, which every query sees, or which a masked step hides, its values too.
                const int r = first + 16 * i;
                rows[i] = r >= step.count ? 0 : step.phase == HISTORY ? __ldg(order + step.start + r) : step.start + r;
            }
        };

        // All of the warpgroup must see a stop at the same step.
        auto stopped = [&]() { return any_producer(*(volatile int*)&ring.stopped == number + 1); };

        Step step = first_step(walk, SEEN_WINDOW, BLOCK_N);
        int rows[EACH], late_unit = 0;
        Step late = {DONE, 0, 0, 0};  // the step whose values are still to come
        rows_for(step, rows);
        while (true) {
            const int unit = producer.place.unit;
            const unsigned int to = producer.open();
            if (step.phase == HISTORY && stopped()) {
                step = first_step(walk, TAIL, BLOCK_N);
                rows_for(step, rows);
            }
            if (step.phase != DONE) {
                const bool tail = step.phase == TAIL;
                producer.copy<BLOCK_N, PANELS>(to, tail ? x.k_pool + pooled * x.k_pool_row : keys, tail ? x.k_pool_row : x.k_row, rows);
                if (step.phase == HISTORY && producer.column() == 0)
#pragma unroll
                    for (int i = 0; i < EACH; ++i) ring.index[unit][first + 16 * i] = rows[i];
            }
            if (thread == 0) ring.steps[unit] = step.phase == DONE ? Step{TILE_END, 0, 0, 0} : step;
            producer.close();
            if (late.phase != DONE) {
                int late_rows[EACH];
                __syncwarp();
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    const int r = first + 16 * i;
                    late_rows[i] = r >= late.count ? 0 : late.phase == HISTORY ? ring.index[late_unit][r] : late.start + r;
                }
                const bool tail = late.phase == TAIL;
                const unsigned int values_to = producer.open();
                // After a stop no values of the history are wanted: those that are were there when the vote was read.
                if (!(late.phase == HISTORY && stopped())) producer.copy<BLOCK_N, V_PANELS>(values_to, tail ? x.v_pool + pooled * x.v_pool_row : values, tail ? x.v_pool_row : x.v_row, late_rows);
                producer.close();
            }
            if (step.phase == DONE) break;
            late = step, late_unit = unit;
            step = step_after(walk, step, BLOCK_N);
            rows_for(step, rows);
        }
        producer.flush();
        producers_sync();
        id = *(volatile int*)&ring.ticket;
        producers_sync();
    }
    barrier_wait(shared_address(&ring.q_empty), number & 1 ^ 1);
    if (thread == 0) ring.facts[number & 1].id = -1;
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(shared_address(&ring.q_full));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_sm90(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const half_t* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    half_t* __restrict__ out, long long out_batch, long long out_head, long long out_row, int aligned,
    const half_t* __restrict__ k_pool, const half_t* __restrict__ v_pool, int pool_stride, int k_pool_row, int v_pool_row,
    const int* __restrict__ kv_order, const long long* __restrict__ kv_offsets, long long offsets_stride,
    const int* __restrict__ query_order, const float* __restrict__ taus, float one_tau,
    float* __restrict__ lse, int* __restrict__ tiles, int* __restrict__ tail_blocks, float* __restrict__ tail_mass,
    int heads_q, int heads_kv, int orders, int kv_start, int n_q, int n_k, int dim_qk, int dim_v,
    int causal, int window, int segment, int segment_start, int tiles_per_segment, int tile_start, int tile_stop, int row_tiles,
    int block_q, int block_k, int log2_pool, float unit, int kv_heads, int* ticket) {
    const Launch launch = {q, k, v, k_pool, v_pool, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                           out_batch, out_head, pool_stride, k_pool_row, v_pool_row, kv_order, kv_offsets, offsets_stride,
                           query_order, taus, one_tau, heads_q, heads_kv, orders, kv_start, n_q, n_k, causal, window, segment, segment_start,
                           tiles_per_segment, tile_start, tile_stop, row_tiles, block_q, block_k, log2_pool, kv_heads, ticket};
    extern __shared__ __align__(1024) char shared_memory[];
    char* const base = shared_memory + (-shared_address(shared_memory) & 1023);
    const unsigned int queries = shared_address(base), units = queries + Q_BYTES;
    Ring& ring = *(Ring*)(base + Q_BYTES + UNITS * UNIT_BYTES);
    // Keys of each pool block that were accumulated: by warpgroup 0 in the low half, by warpgroup 1 in the high half.
    unsigned int* const walked = (unsigned int*)(&ring + 1);

    if (threadIdx.x == 0) {
        constexpr int PRODUCED = PRODUCERS / 32, CONSUMED = CONSUMERS / 32;
        for (int i = 0; i < UNITS; ++i) barrier_init(shared_address(ring.full + i), PRODUCED), barrier_init(shared_address(ring.empty + i), CONSUMED);
        barrier_init(shared_address(&ring.q_full), PRODUCED), barrier_init(shared_address(&ring.q_empty), CONSUMED);
        barrier_init(shared_address(&ring.vote), CONSUMED);
        for (int i = 0; i < 4; ++i) ring.votes[i] = 0;
        ring.stopped = 0;
    }
    __syncthreads();
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == CONSUMERS / 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        produce(ring, queries, units, launch);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");

    const int thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;
    const int shift = causal ? n_k - n_q : 0;
    const unsigned int vote = shared_address(&ring.vote), mine = warpgroup ? 0x10000u : 1u;
    const unsigned int my_queries = descriptor_low(queries + warpgroup * 64 * 128, 1);
    Place place = {0, 0};
    int number = 0, ballots = 0;
    auto await = [&](const Place& at) { barrier_wait(shared_address(ring.full + at.unit), at.round); };
    auto release = [&](unsigned long long& barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&barrier));
    };
    volatile float2* const row_state = ring.state + warp_row + lane / 4;

    for (;; ++number) {
        barrier_wait(shared_address(&ring.q_full), number & 1);
        const TileFacts& facts = ring.facts[number & 1];
        if (uniform(facts.id) < 0) break;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 8 * h + lane / 4;
            unsigned int seen = 0;
#pragma unroll
            for (int chunk = 0; chunk < HEAD_DIM / 8; chunk += 4) {
                unsigned int x[4];
                load_chunk(x, queries + (chunk >> 3) * Q_PANEL_BYTES + swizzled(r, chunk & 7 | lane % 4));
                seen = not_finite(x, seen);
            }
            bool bad = seen != 0;
            bad = (__ballot_sync(0xffffffffu, bad) >> (lane & 28) & 15) != 0;
            if (lane % 4 == 0) {
                ring.poisoned[r] = bad;
                ring.state[r] = make_float2(bad || r >= facts.rows ? -1.f : facts.tau, 0.f);
                ring.tail[r] = make_float2(0.f, 0.f);
            }
        }
        for (int b = thread; b < facts.pool_blocks; b += 128) atomicAnd(walked + b, warpgroup ? 0xffffu : 0xffff0000u);
        if (thread == 0) ring.walked_tiles[warpgroup] = ring.blocks_found[warpgroup] = 0;
        warpgroup_sync(warpgroup);

        float o[O_PARTS][O_COLUMNS / 2], p[N_TILES * 4];
        unsigned int weights[N_TILES * 2];
        RowSoftmax soft[2];
        soft[0].clear(), soft[1].clear();
#pragma unroll
        for (int c = 0; c < O_PARTS; ++c)
#pragma unroll
            for (int i = 0; i < O_COLUMNS / 2; ++i) o[c][i] = 0.f;
        // `late`: the step before this one has values in the ring; `counts`: and weights for them.
        bool late = false, counts = false, voted = false, stopped = false, in_tail = false, found_blocks = false, queries_released = false;
        bool in_history = false, late_masked = false;
        int late_start = 0;  // first key of the step before this one, if it was masked

        auto close_all = [&]() { soft[0].close(), soft[1].close(); };
        auto end_tail = [&]() {
            in_tail = false;
            close_all();
            if (lane % 4) return;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float2& mark = ring.tail[warp_row + 8 * h + lane / 4];
                const float before = mark.x * exp2_approx((mark.y - soft[h].frame()) * unit);
                mark = make_float2(soft[h].closed - before, soft[h].frame());
            }
        };
        // A masked step's value that is not finite must reach only the rows that see it: it is zeroed, and they become NaN.
        // (Zero times NaN would reach every row of the tile.) Each warpgroup looks at all values, and both find the same.
        auto hide_non_finite = [&](const Place& at) {
            const int thread = thread_here();
            const unsigned int values = units + at.unit * UNIT_BYTES;
            unsigned int seen = 0, x[4];
#pragma unroll 4
            for (int i = thread; i < BLOCK_N * V_PANELS * 8; i += 128) load_chunk(x, values + 16 * i), seen = not_finite(x, seen);
            if (warpgroup_count(warpgroup, seen != 0) == 0) return;
            consumers_sync();
            if (thread < BLOCK_N) ring.hidden[thread] = false;
            consumers_sync();
#pragma unroll 1
            for (int i = thread + 128 * warpgroup; i < BLOCK_N * V_PANELS * 8; i += CONSUMERS) {
                load_chunk(x, values + 16 * i);
                if (not_finite(x, 0) == 0) continue;
                ring.hidden[i / 8 % BLOCK_N] = true;
                asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(values + 16 * i), "r"(0) : "memory");
            }
            async_fence();
            consumers_sync();
#pragma unroll 1
            for (int c = 0; c < BLOCK_N; ++c) {
                if (!ring.hidden[c]) continue;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int end = facts.row[warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4] + shift + 1 - late_start;
                    if (c < end && c >= end - window) soft[h].closed = not_a_number();
                }
            }
        };
        auto multiply_values = [&](const Place& at) {
            const unsigned int values = descriptor_low(units + at.unit * UNIT_BYTES, PANEL_BYTES);
#pragma unroll
            for (int j = 0; j < BLOCK_N / 16; ++j) {
                const unsigned int w[4] = {weights[4 * j], weights[4 * j + 1], weights[4 * j + 2], weights[4 * j + 3]};
#pragma unroll
                for (int c = 0; c < O_PARTS; ++c)
                    wgmma_columns(o[c], w, matrix_descriptor(values + 128 * j + c * (O_COLUMNS / 64) * (PANEL_BYTES / 16), 1024));
            }
        };
        auto read_vote = [&]() {
            if (!voted) return;
            barrier_wait(vote, (ballots - 1) & 1);
            stopped = uniform(*(volatile int*)&ring.votes[(ballots - 1) & 3]) == 0;
            if (stopped && threadIdx.x == 0) *(volatile int*)&ring.stopped = number + 1;
            voted = false;
        };

        while (true) {
            await(place);
            const Step& step = ring.steps[place.unit];  // until its unit is released
            const int phase = uniform(step.phase);
            const Place key_place = place, value_place = place.after(1);  // these keys, the last step's values
            place = place.after(late ? 2 : 1);
            const bool ends = phase == TILE_END;
            if (late) await(value_place);
            if (late_masked) hide_non_finite(value_place);
            late_masked = false;
            if (ends && in_tail) end_tail();
            if (ends && !queries_released) release(ring.q_empty);
            if (ends || (stopped && phase == HISTORY)) {  // past a stop, what is left of the history is let go
                release(ring.empty[key_place.unit]);
                if (counts) {
                            wgmma_fence();
                    multiply_values(value_place);
                    wgmma_commit();
                    wgmma_wait<0>();
#pragma unroll
                    for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
                }
                if (late) release(ring.empty[value_place.unit]);
                late = true, counts = false;
                if (ends) break;
                continue;
            }
            const bool partial = step.count < BLOCK_N, closes = step.closes();
            const bool masked = phase == MASKED_WINDOW && (partial || step.start < facts.all_from || step.start + step.count > facts.all_until);
            wgmma_fence();
            const unsigned int keys = descriptor_low(units + key_place.unit * UNIT_BYTES, 1);
            wgmma_rows<false>(p, matrix_descriptor(my_queries, 1024), matrix_descriptor(keys, 1024));
#pragma unroll
            for (int d = 1; d < HEAD_DIM / 16; ++d)
                wgmma_rows<true>(p, matrix_descriptor(my_queries + (d >> 2) * (Q_PANEL_BYTES / 16) + (d & 3) * 2, 1024),
                                 matrix_descriptor(keys + (d >> 2) * (PANEL_BYTES / 16) + (d & 3) * 2, 1024));
            wgmma_commit();
            if (uniform(counts)) {
                multiply_values(value_place);
                wgmma_commit();
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            settle(p);
            read_vote();
            if (stopped && phase == HISTORY) {  // its products were for nothing
                wgmma_wait<0>();
#pragma unroll
                for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
                release(ring.empty[key_place.unit]);
                if (late) release(ring.empty[value_place.unit]);
                late = true, counts = false;
                continue;
            }

            if (in_tail && phase != TAIL) end_tail();
            if (phase == HISTORY) {
                const int thread = thread_here();
                if (!in_history) in_history = true, close_all();  // the window's sum is what the first key tile is held against
                if (thread == 0 && closes) ++ring.walked_tiles[warpgroup], ring.last_keys[warpgroup] = (step.tile_stop - 1) % block_k + 1;
                if (thread < step.count && facts.pool_blocks) atomicAdd(walked + (ring.index[key_place.unit][thread] >> log2_pool), mine);
            } else if (phase == TAIL) {
                const int thread = thread_here();
                warpgroup_sync(warpgroup);
                if (!in_tail) close_all();
                if (!in_tail && thread % 4 == 0) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int r = warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4;
                        ring.tail[r] = make_float2(soft[h].closed, soft[h].frame());
                        // A key behind the last tile in the ranking is not credited with more than that tile's mean weight.
                        float& x = ring.state[r].y;
                        x = ring.walked_tiles[warpgroup] ? soft[h].frame() + log2f(x / ring.last_keys[warpgroup]) / unit : -NEGATIVE_INFINITY;
                    }
                }
                in_tail = true;
                float bias = NEGATIVE_INFINITY;
                if (thread < step.count) {
                    const int b = step.start + thread, size = min(1 << log2_pool, facts.history - (b << log2_pool));
                    const int left = size - (int)(warpgroup ? walked[b] >> 16 : walked[b] & 0xffffu);
                    if (4 * left >= size) bias = log2f((float)left) / unit;  // fewer are left out
                }
                if (thread < BLOCK_N) ring.bias[warpgroup][thread] = bias;
                const int blocks = warpgroup_count(warpgroup, bias > NEGATIVE_INFINITY);
                found_blocks |= blocks > 0;
                if (thread == 0) ring.blocks_found[warpgroup] += blocks;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float most = ring.state[warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4].y;
#pragma unroll
                    for (int i = 0; i < N_TILES * 2; ++i) p[4 * (i / 2) + 2 * h + i % 2] = fminf(p[4 * (i / 2) + 2 * h + i % 2], most);
                }
                const unsigned int bias_at = shared_address(ring.bias[warpgroup]) + 8 * (thread % 4);
#pragma unroll
                for (int j = 0; j < N_TILES; ++j) {
                    float added[2];
                    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(added[0]), "=f"(added[1]) : "r"(bias_at + 32 * j) : "memory");
#pragma unroll
                    for (int i = 0; i < 4; ++i) p[4 * j + i] += added[i % 2];
                    if (j % 4 == 3) __syncwarp();  // keeps the compiler from loading all at once, into registers that it lacks
                }
            }
            if (phase != TAIL && (partial || masked)) {
                const int thread = thread_here(), column_0 = 2 * (thread % 4);
                late_masked = masked, late_start = step.start;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int end = facts.row[warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4] + shift + 1 - step.start;
                    const int limit = (masked ? min(step.count, end) : step.count) - column_0;  // columns from there on are hidden
#pragma unroll
                    for (int i = 0; i < N_TILES * 2; ++i) {
                        float& y = p[4 * (i / 2) + 2 * h + i % 2];
                        y = 8 * (i / 2) + i % 2 < limit ? y : NEGATIVE_INFINITY;
                    }
                    if (!masked || step.start >= facts.all_from) continue;
                    const int floor = end - window - column_0;  // columns before it are hidden too
#pragma unroll
                    for (int i = 0; i < N_TILES * 2; ++i) {
                        float& y = p[4 * (i / 2) + 2 * h + i % 2];
                        y = 8 * (i / 2) + i % 2 >= floor ? y : NEGATIVE_INFINITY;
                    }
                }
            }
            if (phase == MASKED_WINDOW && step.start + step.count == facts.end) queries_released = true, release(ring.q_empty);
            release(ring.empty[key_place.unit]);

            // The greatest logits come first: in most steps no row of the warp has a new maximum.
            float greatest[2], shrink[2] = {1.f, 1.f};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                greatest[h] = fmaxf(p[2 * h], p[2 * h + 1]);
#pragma unroll
                for (int j = 1; j < N_TILES; ++j) greatest[h] = fmaxf(greatest[h], fmaxf(p[4 * j + 2 * h], p[4 * j + 2 * h + 1]));
            }
            const bool moves = __any_sync(0xffffffffu, greatest[0] > soft[0].top || greatest[1] > soft[1].top);
            if (moves) {
#pragma unroll
                for (int h = 0; h < 2; ++h) shrink[h] = soft[h].raise(quad_max(greatest[h]), unit);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float frame = soft[h].frame() * unit;
                float even = 0.f, odd = 0.f;
#pragma unroll
                for (int j = 0; j < N_TILES; ++j) {
                    float &x = p[4 * j + 2 * h], &y = p[4 * j + 2 * h + 1];
                    x = exp2_approx(x * unit - frame), y = exp2_approx(y * unit - frame);
                    even += x, odd += y;
                }
                soft[h].open += even + odd;
            }
            if (phase == HISTORY && closes) {
                bool wanted = false;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float before = soft[h].closed, gained = soft[h].close(), row_tau = row_state[8 * h].x;
                    wanted |= row_tau >= 0.f && soft[h].wants(gained, before, row_tau);
                    row_state[8 * h].y = gained;
                }
                // Slots are cleared two votes before they are used: every warp has read this one by then.
                wanted = __any_sync(0xffffffffu, wanted);
                if (lane == 0) {
                    if (threadIdx.x == 0) *(volatile unsigned int*)&ring.votes[(ballots + 2) & 3] = 0;
                    if (wanted) atomicOr(&ring.votes[ballots & 3], 1u);
                    barrier_arrive(vote);
                }
                voted = true, ++ballots;
            }
            wgmma_wait<0>();
#pragma unroll
            for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
            if (late) release(ring.empty[value_place.unit]);
            if (moves) {
#pragma unroll
                for (int c = 0; c < O_PARTS; ++c)
#pragma unroll
                    for (int i = 0; i < O_COLUMNS / 2; ++i) o[c][i] *= shrink[i / 2 % 2];
            }
#pragma unroll
            for (int j = 0; j < N_TILES; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) weights[2 * j + h] = pack_halves(p[4 * j + 2 * h], p[4 * j + 2 * h + 1]);
            late = counts = true;
        }
        read_vote();

        close_all();

        // Normalise and write: a lane has two columns of every eight.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 8 * h + lane / 4, row = facts.row[r];
            if (r >= facts.rows) continue;
            const bool poisoned = ring.poisoned[r];
            const float inverse = poisoned ? not_a_number() : soft[h].closed == 0.f ? 0.f : 1.f / soft[h].closed;
            half_t* const to = out + facts.out_at + row * out_row + 2 * (lane % 4);
#pragma unroll
            for (int d = 0; d < V_TILES; ++d) {
                const float* const pair = &o[d / (O_COLUMNS / 8)][d % (O_COLUMNS / 8) * 4 + 2 * h];
                *(unsigned int*)(to + 8 * d) = pack_halves(pair[0] * inverse, pair[1] * inverse);
            }
            if (lane % 4) continue;
            const float natural = soft[h].closed == 0.f ? NEGATIVE_INFINITY : soft[h].top * unit * LN_2 + logf(soft[h].closed);
            lse[facts.row_at + row] = poisoned ? not_a_number() : natural;
            if (tail_mass != nullptr) {
                const float2 mark = ring.tail[r];
                const float share = mark.x * exp2_approx((mark.y - soft[h].frame()) * unit) / soft[h].closed;
                tail_mass[facts.row_at + row] = found_blocks && share > 0.f && !poisoned ? share : 0.f;
            }
        }
        if (tiles != nullptr && threadIdx.x == 0) {
            tiles[facts.tile_at] = ring.walked_tiles[0];
            tail_blocks[facts.tile_at] = ring.blocks_found[0];
        }
    }
}
