// gather_sm90.cuh: the producer of attend_sm90.cu: a warpgroup that walks row tiles and gathers their rows into the ring.
#pragma once
#include "attend_sm90.cuh"

// The producer warpgroup: every thread copies its 16-byte column of each panel of every 16th row.
struct Producer {
    Ring& ring;
    const unsigned int units;
    Place place;  // of the unit to start
    int slot;     // of the step, in the ring

    __device__ __forceinline__ int first() const { return (threadIdx.x & 127) / 8; }
    __device__ __forceinline__ int column() const { return threadIdx.x % 8; }

    template <int ROWS, int COLUMN_PANELS, int PANEL_ROWS = ROWS>
    __device__ __forceinline__ void copy(unsigned int to, const half_t* from, long long stride, const int (&rows)[ROWS / 16]) {
        to += swizzled(first(), column());
        const char* const data = (const char*)(from + 8 * column());
        const int row_bytes = (int)stride * 2;  // below 2^31: rows 2 GiB apart are refused
#pragma unroll
        for (int i = 0; i < ROWS / 16; ++i) {
            const half_t* const row = (const half_t*)(data + (long long)rows[i] * row_bytes);
#pragma unroll
            for (int p = 0; p < COLUMN_PANELS; ++p) copy16_async(to + p * PANEL_ROWS * 128 + 2048 * i, row + 64 * p);
        }
    }

    __device__ __forceinline__ unsigned int open() {
        barrier_wait(shared_address(ring.empty + place.unit), place.round ^ 1);
        return units + place.unit * UNIT_BYTES;
    }
    // Awaits this thread's values and says whether they are all finite.
    __device__ __forceinline__ void look_for_non_finite(unsigned int from) {
        commit_copies();
        wait_copies<0>();
        unsigned int seen = 0, x[4];
        from += swizzled(first(), column());
#pragma unroll
        for (int p = 0; p < V_PANELS; ++p)
#pragma unroll 2
            for (int i = 0; i < BLOCK_N / 16; ++i) load_chunk(x, from + p * PANEL_BYTES + 2048 * i), seen = not_finite(x, seen);
        const bool any = __any_sync(0xffffffffu, seen != 0);
        if (threadIdx.x % 32 == 0) ring.suspect[place.unit][threadIdx.x / 32 % 4] = any;
    }
    // Gives the consumers the unit once this thread's copies are there; nobody waits for them here.
    __device__ __forceinline__ void close() {
        arrive(ring.full[place.unit]);
        place = place.after(1);
    }
    __device__ __forceinline__ void arrive(unsigned long long& barrier) {
        barrier_arrive_after_copies(shared_address(&barrier));
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&barrier));  // what was written is there too
    }
};

__device__ __forceinline__ void produce(Ring& ring, unsigned int queries, unsigned int units, const Launch& x) {
    Producer producer = {ring, units, {0, 0}, 0};
    const int thread = threadIdx.x & 127, first = producer.first();
    int id = blockIdx.x, number = 0;
    for (; id < x.tiles(); ++number) {
        const RowTile tile(x, id);
        const bool dense = x.kv_order == nullptr;
        const int shift = x.causal ? x.n_k - x.n_q : 0;
        auto query_row = [&]() {
            const int r = x.pairs() ? thread % 64 : thread;
            const int place = tile.first_row + min(r, tile.rows - 1);  // rows past the end repeat the last one
            return x.query_order != nullptr ? x.query_order[(tile.flat_head + thread / 64 * tile.second) * x.n_q + place] : place;
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
        walk.block_k = PARTS > 1 ? BLOCK_N : x.block_k, walk.pool_blocks = tile.pool_blocks;

        barrier_wait(shared_address(&ring.q_empty), number & 1 ^ 1);
        TileFacts& facts = ring.facts[number & 1];
        facts.row[thread] = query_row();
        if (thread == 0) {
            facts.id = id, facts.history = tile.history, facts.pool_blocks = tile.pool_blocks, facts.listed = walk.listed, facts.order = order;
            facts.all_from = highest + shift + 1 - x.window, facts.all_until = lowest + shift + 1;
            facts.end = walk.masked_first < walk.masked_stop ? walk.masked_stop : -1;
        }
        if (thread < 2) {  // a warpgroup with nothing to do repeats the first one's head and keeps no row of it
            auto& part = facts.part[thread];
            const int further = thread * tile.second;
            const bool own = thread == 0 || tile.second;
            part.rows = x.pairs() ? (own ? tile.rows : 0) : max(min(tile.rows - 64 * thread, 64), 0);
            part.tau = x.taus != nullptr ? x.taus[tile.head + further] : x.tau;
            part.q_at = tile.batch * x.q_batch + (tile.head + further) * x.q_head;
            part.out_at = tile.batch * x.out_batch + (tile.head + further) * x.out_head;
            part.row_at = (tile.flat_head + further) * x.n_q;
            part.tile_at = own ? (tile.flat_head + further) * x.row_tiles + tile.tile : -1;
        }
        producers_sync();
#pragma unroll 1
        for (int w = 0; w < 2; ++w) {
            int query_rows[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) query_rows[i] = facts.row[64 * w + first + 16 * i];
            producer.copy<64, PANELS, BLOCK_M>(queries + 64 * 128 * w, x.q + facts.part[w].q_at, x.q_row, query_rows);
        }
        producer.arrive(ring.q_full);

        const int kv_head = tile.kv % x.heads_kv;
        const half_t* const keys = x.k + tile.batch * x.k_batch + kv_head * x.k_head;
        const half_t* const values = x.v + tile.batch * x.v_batch + kv_head * x.v_head;
        const long long pooled = (long long)tile.kv * x.pool_stride;
        // The rows that this thread copies. Past the count the first row, which every query sees, or which a masked step
        // hides, its values too.
        auto find_rows = [&](int (&rows)[BLOCK_N / 16], const Step& step, int slot) {
            const uint4* const listed = (const uint4*)(ring.index[slot] + first * (BLOCK_N / 16));
#pragma unroll
            for (int i = 0; i < BLOCK_N / 64; ++i) {
                const uint4 four = listed[i];
                rows[4 * i] = (int)four.x, rows[4 * i + 1] = (int)four.y, rows[4 * i + 2] = (int)four.z, rows[4 * i + 3] = (int)four.w;
            }
            if (step.phase == HISTORY) return;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 16; ++i) rows[i] = first + 16 * i < step.count ? step.start + first + 16 * i : 0;
        };
        // A thread looks up one key of the history, a step before it is wanted.
        auto look_up = [&](const Step& step) {
            return step.phase == HISTORY && thread < step.count ? __ldg(order + step.start + thread) : 0;
        };
        auto kind = [&](const Step& step) {
            if (step.phase == DONE) return (int)TILE_END;
            if (step.phase != HISTORY) return step.phase | (step.phase == SEEN_WINDOW && step.count == BLOCK_N ? PLAIN : 0);
            int parts = PARTS == 1 && step.closes();
            for (int p = 0; PARTS > 1 && p < PARTS; ++p) {
                const int end = min(PART * (p + 1), step.count) + step.start;
                parts |= (int)(PART * p < step.count && (end % x.block_k == 0 || end == walk.listed)) << p;
            }
            return HISTORY | (step.count == BLOCK_N ? PLAIN : 0) | parts << CLOSES;
        };
        // All of the warpgroup must see a stop at the same step.
        auto stopped = [&]() {
            const volatile int* const of = ring.stopped;
            return any_producer(of[0] == number + 1 && of[x.pairs()] == number + 1);
        };

        Step step = first_step(walk, SEEN_WINDOW, BLOCK_N), late = {DONE, 0, 0, 0};  // `late`: its values are still to come
        int key = look_up(step), late_slot = 0;
        while (true) {
            const unsigned int to = producer.open();
            const int slot = producer.slot;
            bool past = false;  // the last step's keys were already for nothing: consumers cannot have met more of them
            if (step.phase == HISTORY) {
                if (thread < BLOCK_N) ring.index[slot][index_of(thread)] = key;
                past = stopped();
                if (past) step = first_step(walk, TAIL, BLOCK_N);
            }
            const Step next = step_after(walk, step, BLOCK_N);
            key = look_up(next);
            if (step.phase != DONE) {
                const bool tail = step.phase == TAIL;
                int rows[BLOCK_N / 16];
                find_rows(rows, step, slot);
                producer.copy<BLOCK_N, PANELS>(to, tail ? x.k_pool + pooled * x.k_pool_row : keys, tail ? x.k_pool_row : x.k_row, rows);
            }
            if (thread == 0) ring.steps[slot] = {kind(step), step.start, step.count};
            producer.close();
            producer.slot = slot + 1 == UNITS ? 0 : slot + 1;
            if (late.phase != DONE) {
                const unsigned int values_to = producer.open();
                // By now consumers may have stopped at the last step itself, and want its values.
                if (!past) {
                    const bool tail = late.phase == TAIL;
                    int rows[BLOCK_N / 16];
                    find_rows(rows, late, late_slot);
                    producer.copy<BLOCK_N, V_PANELS>(values_to, tail ? x.v_pool + pooled * x.v_pool_row : values, tail ? x.v_pool_row : x.v_row, rows);
                    if (late.phase == MASKED_WINDOW) producer.look_for_non_finite(values_to);
                }
                producer.close();
            }
            if (step.phase == DONE) break;
            late = step, late_slot = slot, step = next;
        }
        producers_sync();
        id = *(volatile int*)&ring.ticket;
        producers_sync();
    }
    barrier_wait(shared_address(&ring.q_empty), number & 1 ^ 1);
    if (thread == 0) ring.facts[number & 1].id = -1;
    producer.arrive(ring.q_full);
}

