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
#include "gather.cuh"
#include "online_softmax.cuh"
#include "walk.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 128, CONSUMERS = 256, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int N_TILES = BLOCK_N / 8, V_TILES = HEAD_DIM_V / 8, PANELS = HEAD_DIM / 64, V_PANELS = HEAD_DIM_V / 64;
constexpr int PANEL_BYTES = BLOCK_N * 128, Q_PANEL_BYTES = BLOCK_M * 128, Q_BYTES = PANELS * Q_PANEL_BYTES;
constexpr int UNIT_BYTES = (PANELS > V_PANELS ? PANELS : V_PANELS) * PANEL_BYTES;
constexpr int O_COLUMNS = HEAD_DIM_V % 128 ? 64 : 128, O_PARTS = HEAD_DIM_V / O_COLUMNS;  // of one instruction
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
    float hidden[3][BLOCK_N];    // masked window: NaN where a value is not finite, else 0; for steps in turn
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

constexpr int RING_BYTES = UNITS * (32 + 4 * BLOCK_N) + 20 * BLOCK_N + 3584;
static_assert(sizeof(Ring) <= RING_BYTES && UNITS >= 4, "specialisations.sm90_shared_bytes counts RING_BYTES");

struct Launch {
    const half_t *q, *k, *v, *k_pool, *v_pool;
    half_t* out;
    long long q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row;
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
#if TURNS
// The consumers take turns at the tensor cores, so that one's exponentials overlap the other's products.
__device__ __forceinline__ void await_turn(int warpgroup) { asm volatile("bar.sync %0, 256;" ::"r"(4 + warpgroup) : "memory"); }
__device__ __forceinline__ void pass_turn(int warpgroup) { asm volatile("bar.arrive %0, 256;" ::"r"(5 - warpgroup) : "memory"); }
#else
__device__ __forceinline__ void await_turn(int) {}
__device__ __forceinline__ void pass_turn(int) {}
#endif
// The same in every lane, and known to be: wgmma must not lie on a path that the compiler thinks may diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// The thread in its warpgroup, read anew: what seldom runs must not hold registers in the loop.
__device__ __forceinline__ int thread_here() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x & 127;
}
// Transposes four words in four lanes: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void trade(unsigned int (&x)[4], int lane) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool high = lane & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const unsigned int got = __shfl_xor_sync(0xffffffffu, high ? x[i] : x[i + step], step);
            if (high) x[i] = got;
            else x[i + step] = got;
        }
    }
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
    const unsigned int queries, units;
    Place place;

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

    __device__ __forceinline__ void hand_over(unsigned int full) {
        barrier_arrive_after_copies(full);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(full);
    }

    __device__ __forceinline__ unsigned int open() {
        barrier_wait(shared_address(ring.empty + place.unit), place.round ^ 1);
        return units + place.unit * UNIT_BYTES;
    }
    __device__ __forceinline__ void close() {
        hand_over(shared_address(ring.full + place.unit));
        place = place.after(1);
    }
};

__device__ __forceinline__ void produce(Ring& ring, unsigned int queries, unsigned int units, const Launch& x) {
    constexpr int EACH = BLOCK_N / 16;
    Producer producer = {ring, queries, units, {0, 0}};
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
        for (bool begins = true;; begins = false) {
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
            if (begins) {
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
                producer.hand_over(shared_address(&ring.q_full));
            }
            if (late.phase != DONE) {
                int late_rows[EACH];
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
        producers_sync();
        id = *(volatile int*)&ring.ticket;
        producers_sync();
    }
    barrier_wait(shared_address(&ring.q_empty), number & 1 ^ 1);
    if (thread == 0) ring.facts[number & 1].id = -1;
    producer.hand_over(shared_address(&ring.q_full));
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
    const Launch launch = {q, k, v, k_pool, v_pool, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                           out_batch, out_head, out_row, pool_stride, k_pool_row, v_pool_row, kv_order, kv_offsets, offsets_stride,
                           query_order, taus, one_tau, heads_q, heads_kv, orders, kv_start, n_q, n_k, causal, window, segment, segment_start,
                           tiles_per_segment, tile_start, tile_stop, row_tiles, block_q, block_k, log2_pool, kv_heads, ticket};
    extern __shared__ __align__(1024) char shared_memory[];
    char* const base = shared_memory + (-shared_address(shared_memory) & 1023);
    const unsigned int queries = shared_address(base), units = queries + Q_BYTES;
    Ring& ring = *(Ring*)(base + Q_BYTES + UNITS * UNIT_BYTES);
    // Keys of each pool block that were accumulated: by warpgroup 0 in the low half, by warpgroup 1 in the high half.
    unsigned int* const walked = (unsigned int*)(&ring + 1);

    if (threadIdx.x == 0) {
        constexpr int PRODUCED = PRODUCERS + PRODUCERS / 32, CONSUMED = CONSUMERS / 32;
        for (int i = 0; i < UNITS; ++i) barrier_init(shared_address(ring.full + i), PRODUCED), barrier_init(shared_address(ring.empty + i), CONSUMED);
        barrier_init(shared_address(&ring.q_full), PRODUCED), barrier_init(shared_address(&ring.q_empty), CONSUMED);
        barrier_init(shared_address(&ring.vote), CONSUMED);
        for (int i = 0; i < 4; ++i) ring.votes[i] = 0;
        ring.stopped = 0;
    }
    if (threadIdx.x < BLOCK_N) ring.hidden[0][threadIdx.x] = 0.f;
    __syncthreads();
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == CONSUMERS / 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        produce(ring, queries, units, launch);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");

    const int thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;
    const int shift = causal ? n_k - n_q : 0;
    const unsigned int vote = shared_address(&ring.vote), mine = warpgroup ? 0x10000u : 1u;
    const unsigned int my_queries = descriptor_low(queries + warpgroup * 64 * 128, 1);
    Place place = {0, 0};
    int number = 0, ballots = 0, masked_steps = 0;
    auto await = [&](const Place& at) { barrier_wait(shared_address(ring.full + at.unit), at.round); };
    auto release = [&](unsigned long long& barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&barrier));
    };
    volatile float2* const row_state = ring.state + warp_row + lane / 4;
    if (warpgroup == 1) pass_turn(1);

    for (;; ++number) {
        barrier_wait(shared_address(&ring.q_full), number & 1);
        const TileFacts& facts = ring.facts[number & 1];
        if (uniform(facts.id) < 0) break;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 8 * h + lane / 4;
            bool bad = false;
            for (int chunk = lane % 4; chunk < HEAD_DIM / 8; chunk += 4) {
                unsigned int x[4];
                const unsigned int address = queries + (chunk >> 3) * Q_PANEL_BYTES + swizzled(r, chunk & 7);
                asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
                bad |= !(halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3]));
            }
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

        auto end_tail = [&]() {
            in_tail = false;
            if (lane % 4) return;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float2& mark = ring.tail[warp_row + 8 * h + lane / 4];
                const float before = mark.x * exp2_approx((mark.y - soft[h].frame()) * unit);
                mark = make_float2(soft[h].closed - before, soft[h].frame());
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
        async_fence();

        while (true) {
            await(place);
            const Step& step = ring.steps[place.unit];  // until its unit is released
            const int phase = uniform(step.phase);
            const Place key_place = place, value_place = place.after(1);  // these keys, the last step's values
            place = place.after(late ? 2 : 1);
            const bool ends = phase == TILE_END;
            if (ends && in_tail) end_tail();
            if (ends && !queries_released) release(ring.q_empty);
            if (ends || (stopped && phase == HISTORY)) {  // past a stop, what is left of the history is let go
                release(ring.empty[key_place.unit]);
                if (late) await(value_place);
                if (counts) {
                    async_fence();
                    await_turn(warpgroup);
                    wgmma_fence();
                    multiply_values(value_place);
                    wgmma_commit();
                    pass_turn(warpgroup);
                    wgmma_wait<0>();
#pragma unroll
                    for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
                }
                if (late) release(ring.empty[value_place.unit]);
                late = true, counts = false;
                if (ends) break;
                continue;
            }
            if (late) await(value_place);
            async_fence();
            await_turn(warpgroup);
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
                pass_turn(warpgroup);
                wgmma_wait<1>();
            } else {
                pass_turn(warpgroup);
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
            const int count = step.count;
            const bool masked = phase == MASKED_WINDOW && (count < BLOCK_N || step.start < facts.all_from || step.start + count > facts.all_until);
            if (phase == HISTORY) {
                const int thread = thread_here();
                if (thread == 0 && step.closes()) ++ring.walked_tiles[warpgroup], ring.last_keys[warpgroup] = (step.tile_stop - 1) % block_k + 1;
                if (thread < count && facts.pool_blocks) atomicAdd(walked + (ring.index[key_place.unit][thread] >> log2_pool), mine);
            } else if (phase == TAIL) {
                const int thread = thread_here();
                warpgroup_sync(warpgroup);
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
                if (thread < count) {
                    const int b = step.start + thread, size = min(1 << log2_pool, facts.history - (b << log2_pool));
                    const int left = size - (int)(warpgroup ? walked[b] >> 16 : walked[b] & 0xffffu);
                    if (4 * left >= size) bias = log2f((float)left) / unit;  // fewer are left out
                }
                if (thread < BLOCK_N) ring.bias[warpgroup][thread] = bias;
                const int blocks = warpgroup_count(warpgroup, bias > NEGATIVE_INFINITY);
                found_blocks |= blocks > 0;
                if (thread == 0) ring.blocks_found[warpgroup] += blocks;
            } else if (masked) {
                // A value that is not finite must reach only the rows that see it: it is zeroed here, and the rows that
                // see it get NaN through its logit. (Zero times NaN would reach every row of the tile.)
                const int thread = warpgroup * 128 + thread_here();
                const Place own = key_place.after(late ? 3 : 2);
                await(own);
#pragma unroll 1
                for (int i = thread; i < BLOCK_N * V_PANELS * 8; i += CONSUMERS) {
                    const int r = i / (V_PANELS * 8), chunk = i % (V_PANELS * 8);
                    const unsigned int address = units + own.unit * UNIT_BYTES + (chunk >> 3) * PANEL_BYTES + swizzled(r, chunk & 7);
                    unsigned int x[4];
                    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
                    if (halves_are_finite(x[0]) && halves_are_finite(x[1]) && halves_are_finite(x[2]) && halves_are_finite(x[3])) continue;
                    ring.hidden[masked_steps][r] = not_a_number();
                    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(address), "r"(0) : "memory");
                }
                masked_steps = masked_steps == 2 ? 0 : masked_steps + 1;
                if (thread < BLOCK_N) ring.hidden[masked_steps][thread] = 0.f;  // last read two steps ago
                consumers_sync();
            }
            if (count < BLOCK_N || phase == TAIL || masked) {
                const int thread = thread_here(), column_0 = 2 * (thread % 4);
                const float* const bias = phase == TAIL ? ring.bias[warpgroup] : ring.hidden[masked_steps == 0 ? 2 : masked_steps - 1];
                const unsigned int bias_at = shared_address(bias + column_0);
                int floor[2], limit[2];  // columns before and from there on are hidden
                float most[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4;
                    const int end = facts.row[r] + shift + 1 - step.start;
                    floor[h] = (masked ? end - window : 0) - column_0;
                    limit[h] = (masked ? min(count, end) : count) - column_0;
                    most[h] = phase == TAIL ? ring.state[r].y : -NEGATIVE_INFINITY;
                }
#pragma unroll
                for (int j = 0; j < N_TILES; ++j) {
                    float added[2] = {0.f, 0.f};
                    if (phase >= TAIL) asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(added[0]), "=f"(added[1]) : "r"(bias_at + 32 * j) : "memory");
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& y = p[4 * j + i];
                        y = 8 * j + i % 2 >= floor[i / 2] && 8 * j + i % 2 < limit[i / 2] ? fminf(y, most[i / 2]) + added[i % 2] : NEGATIVE_INFINITY;
                    }
                    if (j % 2) __syncwarp();  // keeps the compiler from loading all at once, into registers that it lacks
                }
            }
            const bool closes = step.closes();
            if (phase == MASKED_WINDOW && step.start + count == facts.end) queries_released = true, release(ring.q_empty);
            release(ring.empty[key_place.unit]);

            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float greatest = fmaxf(p[2 * h], p[2 * h + 1]);
#pragma unroll
                for (int j = 1; j < N_TILES; ++j) greatest = fmaxf(greatest, fmaxf(p[4 * j + 2 * h], p[4 * j + 2 * h + 1]));
                shrink[h] = soft[h].raise(quad_max(greatest), unit);
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
            if (closes) {
                bool wanted = false;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float before = soft[h].closed, gained = soft[h].close();
                    if (phase != HISTORY) continue;
                    wanted |= row_state[8 * h].x >= 0.f && soft[h].wants(gained, before, row_state[8 * h].x);
                    row_state[8 * h].y = gained;
                }
                if (phase == HISTORY) {
                    // Slots are cleared two votes before they are used: every warp has read this one by then.
                    wanted = __any_sync(0xffffffffu, wanted);
                    if (lane == 0) {
                        if (threadIdx.x == 0) *(volatile unsigned int*)&ring.votes[(ballots + 2) & 3] = 0;
                        if (wanted) atomicOr(&ring.votes[ballots & 3], 1u);
                        barrier_arrive(vote);
                    }
                    voted = true, ++ballots;
                }
            }
            wgmma_wait<0>();
#pragma unroll
            for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
            if (late) release(ring.empty[value_place.unit]);
            // The greatest logits come first: most steps move no maximum.
            if (__any_sync(0xffffffffu, shrink[0] != 1.f || shrink[1] != 1.f)) {
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

        // Normalise and write. A lane has two columns of every eight; the four lanes of a row trade them for whole eights.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 8 * h + lane / 4, row = facts.row[r];
            const bool poisoned = ring.poisoned[r], writes = r < facts.rows;
            const float inverse = poisoned ? not_a_number() : soft[h].closed == 0.f ? 0.f : 1.f / soft[h].closed;
            half_t* const to = out + facts.out_at + row * out_row + 8 * (lane % 4);
#pragma unroll
            for (int d = 0; d < V_TILES; d += 4) {
                unsigned int x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const pair = &o[(d + i) / (O_COLUMNS / 8)][(d + i) % (O_COLUMNS / 8) * 4 + 2 * h];
                    x[i] = pack_halves(pair[0] * inverse, pair[1] * inverse);
                }
                trade(x, lane);
                if (writes) *(uint4*)(to + 8 * d) = make_uint4(x[0], x[1], x[2], x[3]);
            }
            if (lane % 4 || !writes) continue;
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
