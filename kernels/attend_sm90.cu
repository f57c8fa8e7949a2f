// attend_sm90.cu: stage 3 on Hopper's tensor cores (wgmma). The walk, the arrays and the arguments are attend.cu's;
// q, k, v and out have rows that start on 16 bytes and exactly HEAD_DIM columns.
// A block stays on its multiprocessor and takes row tiles one after another. One producer warpgroup gathers rows by
// cp.async into a ring of units, each the BLOCK_N keys of a step or its values, the values one unit late: K0 K1 V0 K2
// V1 ... end V, which the copies themselves hand over as they land. Two consumer warpgroups of 64 query rows each
// multiply: while the values of one step are multiplied, the next step's logits become weights. A vote is cast when a key
// tile closes and read before the next step counts; a stop skips what is in the ring and tells the producer.
// Row tiles of up to 64 queries (block_q) go two to a block, those of two query heads that share a list (orders 1), each
// with its own vote; a warpgroup that has stopped lets the history pass until the other one has. Their queries are the
// same: no query_order, or row tiles that are whole segments.
//   ticket        [1]             int32  zero; hands out row tiles
// grid any number of blocks   block 384   shared memory: layout below; specialisations.sm90_shared_bytes computes it
// macros IS_BF16, HEAD_DIM, HEAD_DIM_V (multiples of 64), BLOCK_N (64, 128), PARTS (of a step, at whose ends key tiles may end: 1, 2), UNITS (4 or more)
#include "gather_sm90.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_sm90(
    const half_t* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const half_t* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    half_t* __restrict__ out, long long out_batch, long long out_head, long long out_row, int aligned,
    const half_t* __restrict__ k_pool, const half_t* __restrict__ v_pool, int pool_stride, int k_pool_row, int v_pool_row,
    const int* __restrict__ kv_order, const long long* __restrict__ kv_offsets, long long offsets_stride,
    const int* __restrict__ query_order, const float* __restrict__ taus, float one_tau,
    float* __restrict__ lse, int* __restrict__ tiles, int* __restrict__ tail_blocks, float* __restrict__ tail_mass, const float* __restrict__ lift,
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

    if (threadIdx.x == 0) {
        // Of the producer each thread arrives with its copies, and each warp with what it stored.
        constexpr int PRODUCED = PRODUCERS + PRODUCERS / 32, CONSUMED = CONSUMERS / 32;
        for (int i = 0; i < UNITS; ++i) barrier_init(shared_address(ring.full + i), PRODUCED), barrier_init(shared_address(ring.empty + i), CONSUMED);
        barrier_init(shared_address(&ring.q_full), PRODUCED), barrier_init(shared_address(&ring.q_empty), CONSUMED);
        for (int w = 0; w < 2; ++w) {
            Ballots& ballots = ring.ballots[w];
            barrier_init(shared_address(&ballots.cast), launch.pairs() ? CONSUMED / 2 : CONSUMED);
            for (int i = 0; i < 4; ++i) *(uint2*)ballots.votes[i] = make_uint2(0, 0);
            ring.stopped[w] = 0;
        }
    }
    __syncthreads();
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == CONSUMERS / 128) {
        give_registers<56>();
        produce(ring, queries, units, launch);
        return;
    }
    take_registers<224>();

    // Keys of each pool block that were accumulated, of each row tile.
    unsigned int* const walked = (unsigned int*)(&ring + 1) + (launch.pairs() ? warpgroup * (pool_stride + 3 & ~3) : 0);
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;
    const int shift = causal ? n_k - n_q : 0;
    Ballots& box = ring.ballots[launch.pairs() ? warpgroup : 0];
    const unsigned int vote = shared_address(&box.cast);
    const unsigned int my_queries = uniform(descriptor_low(queries + warpgroup * 64 * 128, 1));
    Place place = {0, 0};
    int number = 0, ballots = 0, slot = 0;
    auto await = [&](const Place& at) { barrier_wait(shared_address(ring.full + at.unit), at.round), async_fence(); };
    auto release = [&](unsigned long long& barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&barrier));
    };
    volatile float2* const row_state = ring.state + warp_row + lane / 4;
    float4* const row_first = ring.first + warp_row + lane / 4;

    if (warpgroup == 1) pass_turn(1);
    for (;; ++number) {
        barrier_wait(shared_address(&ring.q_full), number & 1);
        const TileFacts& facts = ring.facts[number & 1];
        if (uniform(facts.id) < 0) break;

        // While the first keys are multiplied: what is kept of the rows, and counts set to zero.
        auto begin = [&]() {
            const int thread = thread_here();
            if (thread < 64) {
                const int r = 64 * warpgroup + thread;
                ring.state[r] = make_float2(thread >= facts.part[warpgroup].rows ? -1.f : facts.part[warpgroup].tau, 0.f);
                ring.tail[r] = make_float2(0.f, 0.f);
            }
            if (launch.pairs() || warpgroup == 0)
                for (int b = 4 * thread, end = facts.pool_blocks; b < end; b += 512) *(uint4*)(walked + b) = make_uint4(0, 0, 0, 0);
            if (thread == 0) ring.walked_keys[warpgroup] = facts.listed, ring.blocks_found[warpgroup] = 0;
            warpgroup_sync(warpgroup);
        };

        float o[O_PARTS][O_COLUMNS / 2], p[N_TILES * 4];
        unsigned int weights[N_TILES * 2] = {};
        RowSoftmax soft[2];
        soft[0].clear(), soft[1].clear();
#pragma unroll
        for (int c = 0; c < O_PARTS; ++c)
#pragma unroll
            for (int i = 0; i < O_COLUMNS / 2; ++i) o[c][i] = 0.f;
        // `late`: the step before this one has values in the ring; `counts`: and weights for them; `voted`: it closed a
        // key tile, and what all say to that is still to be read.
        bool late = false, counts = false, voted = false, stopped = false, in_tail = false;
        bool in_history = false, late_masked = false, fresh = true;
        int late_start = 0;  // first key of the step before this one, if it was masked

        auto close_all = [&]() { soft[0].close(), soft[1].close(); };
        auto end_tail = [&]() {
            in_tail = false;
            close_all();
            warpgroup_sync(warpgroup);
            if (lane % 4) return;
            const bool found = ring.blocks_found[warpgroup] > 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float2& mark = ring.tail[warp_row + 8 * h + lane / 4];
                const float before = mark.x * exp2_approx((mark.y - soft[h].frame()) * unit);
                mark = make_float2(found ? soft[h].closed - before : 0.f, soft[h].frame());
            }
        };
        // A masked step's value that is not finite must reach only the rows that see it: it is zeroed, and they become NaN.
        // (Zero times NaN would reach every row of the tile.) The producer says whether there is one.
        auto hide_non_finite = [&](const Place& at) {
            if (uniform(*(const int*)ring.suspect[at.unit]) == 0) return;
            const int thread = thread_here();
            const unsigned int values = units + at.unit * UNIT_BYTES;
            unsigned int x[4];
            consumers_sync();
            if (thread < BLOCK_N) ring.hidden[thread] = false;
            consumers_sync();
#pragma unroll 1
            for (int i = thread + 128 * warpgroup; i < BLOCK_N * V_PANELS * 8; i += CONSUMERS) {
                load_chunk(x, values + 16 * i);
                if (not_finite(x, 0) == 0) continue;
                ring.hidden[i / 8 % BLOCK_N] = true;
                zero_shared16(values + 16 * i);
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
        // The weights of 16 keys by their values.
        auto multiply_values = [&](unsigned int values, int j) {
            const unsigned int w[4] = {weights[4 * j], weights[4 * j + 1], weights[4 * j + 2], weights[4 * j + 3]};
#pragma unroll
            for (int c = 0; c < O_PARTS; ++c)
                wgmma_columns(o[c], w, matrix_descriptor(values + 128 * j + c * (O_COLUMNS / 64) * (PANEL_BYTES / 16), 1024));
        };
        auto await_values = [&]() {
            wgmma_wait<0>();
#pragma unroll
            for (int c = 0; c < O_PARTS; ++c) settle(o[c]);
        };
        auto multiply_all_values = [&](unsigned int values) {
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < BLOCK_N / 16; ++j) multiply_values(values, j);
            wgmma_commit();
            await_values();
        };
        auto read_vote = [&]() {
            barrier_wait(vote, (ballots - 1) & 1);
            const uint2 votes = *(const uint2*)box.votes[(ballots - 1) & 3];
            const unsigned int both = votes.x | votes.y, all = both | both >> 16;
            int wanted = (all | all >> 8) & WANTED;
            if (wanted != WANTED && facts.part[warpgroup].tau == 0.f) wanted = WANTED;  // no row may vote, and tau 0 never stops
            return uniform(wanted);
        };
        // What the last step's vote says: a stop drops what lies past it.
        auto resolve = [&]() {
            if (!voted) return;
            voted = false;
            const int wanted = read_vote();
            if (wanted == WANTED) return;
            stopped = true;
            const KeyStep& past = ring.steps[slot == 0 ? UNITS - 1 : slot - 1];
            const bool halved = PARTS > 1 && !(wanted & 1);  // the first of two parts stopped the row tile
            const int thread = thread_here();
            if (thread == 0) {
                ring.walked_keys[warpgroup] = past.start + (halved ? min(PART, past.count) : past.count);
                *(volatile int*)(ring.stopped + warpgroup) = number + 1;
            }
            if (!halved || past.count <= PART) return;
            const int r = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                soft[h].closed = ring.first[r + 8 * h].x, soft[h].open = 0.f, ring.state[r + 8 * h].y = ring.first[r + 8 * h].y;
#pragma unroll
                for (int j = N_TILES / 2; j < N_TILES; ++j) weights[2 * j + h] = 0;
            }
        };

        // Counts by pool block the keys that were walked: all at once, while pooled keys are on their way.
        auto count_walked = [&]() {
            const bool pairs = launch.pairs();
            const int keys = ring.walked_keys[warpgroup], together = pairs ? 128 : CONSUMERS;
            const int* const order = facts.order;
#pragma unroll 8
            for (int i = pairs ? thread_here() : threadIdx.x; i < keys; i += together) atomicAdd(walked + (__ldg(order + i) >> log2_pool), 1u);
            if (pairs) warpgroup_sync(warpgroup);
            else consumers_sync();
        };

        // What a step of the tail adds to the logits, and the most that they may be.
        auto prepare_tail = [&](const KeyStep& step) {
            const int thread = thread_here();
            warpgroup_sync(warpgroup);
            if (!in_tail) close_all(), count_walked();
            if (!in_tail && thread % 4 == 0) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4;
                    ring.tail[r] = make_float2(soft[h].closed, soft[h].frame());
                    // A key behind the last tile in the ranking is not credited with more than that tile's mean weight.
                    const bool some = ring.walked_keys[warpgroup] > 0;
                    const float added = ring.state[r].y / ((ring.walked_keys[warpgroup] - 1) % block_k + 1);
                    const float left = (float)(facts.history - ring.walked_keys[warpgroup]) / facts.history;
                    const float lifted = lift != nullptr && some ? left * left * lift[facts.part[warpgroup].row_at + facts.row[r]] : 0.f;
                    ring.state[r] = make_float2(lifted, some ? soft[h].frame() + log2f(added) / unit : -NEGATIVE_INFINITY);
                }
            }
            in_tail = true;
            float bias = NEGATIVE_INFINITY;
            if (thread < step.count) {
                const int b = step.start + thread, size = min(1 << log2_pool, facts.history - (b << log2_pool));
                const int left = size - (int)walked[b];
                if (4 * left >= size) bias = log2f((float)left) / unit;  // fewer are left out
            }
            if (thread < BLOCK_N) ring.bias[warpgroup][thread] = bias;
            const int blocks = warpgroup_count(warpgroup, bias > NEGATIVE_INFINITY);
            if (thread == 0) ring.blocks_found[warpgroup] += blocks;
        };

        while (true) {
            await(place);
            const KeyStep& step = ring.steps[slot];
            const int kind = uniform(step.kind), phase = kind & PHASE;
            const Place key_place = place, value_place = place.after(1);  // these keys, the last step's values
            place = place.after(late ? 2 : 1);
            const unsigned int keys = uniform(descriptor_low(units + key_place.unit * UNIT_BYTES, 1));
            const unsigned int values = uniform(descriptor_low(units + value_place.unit * UNIT_BYTES, PANEL_BYTES));
            const bool ends = phase == TILE_END;
            if (ends) {
                if (fresh) begin();
                if (late_masked) await(value_place), hide_non_finite(value_place);
                resolve();
                if (in_tail) end_tail();
                if (facts.end < 0) release(ring.q_empty);
            }
            if (ends || (stopped && phase == HISTORY)) {  // past a stop, what is left of the history is let go
                release(ring.empty[key_place.unit]);
                if (!ends && launch.pairs()) await_turn(warpgroup), pass_turn(warpgroup);  // the other one may walk on
                if (late) await(value_place);
                if (counts) multiply_all_values(values);
                if (late) release(ring.empty[value_place.unit]);
                late = true, counts = false, slot = slot + 1 == UNITS ? 0 : slot + 1;
                if (ends) break;
                continue;
            }
            // Most steps: every row sees all their keys, and there are values and nothing special about them.
            auto walk = [&](auto whole) {
                await_turn(warpgroup);
                wgmma_fence();
                wgmma_rows<false>(p, matrix_descriptor(my_queries, 1024), matrix_descriptor(keys, 1024));
#pragma unroll
                for (int d = 1; d < HEAD_DIM / 16; ++d)
                    wgmma_rows<true>(p, matrix_descriptor(my_queries + (d >> 2) * (Q_PANEL_BYTES / 16) + (d & 3) * 2, 1024),
                                     matrix_descriptor(keys + (d >> 2) * (PANEL_BYTES / 16) + (d & 3) * 2, 1024));
                wgmma_commit();
                pass_turn(warpgroup);
                // While the keys are multiplied.
                if (!whole && fresh) fresh = false, begin();
                resolve();
                if (whole || late) await(value_place);
                if (!whole) {
                    if (late_masked) hide_non_finite(value_place);
                    late_masked = false;
                    if (in_tail && phase != TAIL) end_tail();
                    if (phase == TAIL) prepare_tail(step);
                }
                if (!whole && phase == HISTORY && !in_history) in_history = true, close_all();  // the first key tile is held against the window's sum
                slot = slot + 1 == UNITS ? 0 : slot + 1;
                const bool with_values = whole || uniform(counts), second = PARTS > 1 && step.count > PART;
                wgmma_wait<0>();
                settle(p);
                if (stopped && phase == HISTORY) {  // its products were for nothing
                    release(ring.empty[key_place.unit]);
                    if (whole || counts) multiply_all_values(values);
                    if (whole || late) release(ring.empty[value_place.unit]);
                    late = true, counts = false;
                    return;
                }

                if (whole || kind & PLAIN) {
                } else if (phase == TAIL) {
                    const int thread = thread_here();
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float2 tail = ring.state[warpgroup * 64 + thread / 32 * 16 + 8 * h + thread % 32 / 4];
#pragma unroll
                        for (int i = 0; i < N_TILES * 2; ++i) p[4 * (i / 2) + 2 * h + i % 2] = fminf(p[4 * (i / 2) + 2 * h + i % 2] + tail.x, tail.y);
                    }
                    const unsigned int bias_at = shared_address(ring.bias[warpgroup]) + 8 * (thread % 4);
#pragma unroll
                    for (int j = 0; j < N_TILES; ++j) {
                        const float2 added = load_shared_pair(bias_at + 32 * j);
#pragma unroll
                        for (int i = 0; i < 4; ++i) p[4 * j + i] += i % 2 ? added.y : added.x;
                        if (j % 4 == 3) __syncwarp();  // keeps the compiler from loading all at once, into registers that it lacks
                    }
                } else {
                    const bool masked = phase == MASKED_WINDOW && (step.count < BLOCK_N || step.start < facts.all_from || step.start + step.count > facts.all_until);
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
                if (!whole && phase == MASKED_WINDOW && step.start + step.count == facts.end) release(ring.q_empty);
                release(ring.empty[key_place.unit]);

                // The greatest logits come first: in most steps no row of the warp has a new maximum.
                const int closes = kind >> CLOSES;
                float shrink[2] = {1.f, 1.f};
                bool moves = false, raised = false;  // a maximum moved, in the first part or in the second
                int wanted = WANTED & ~closes;
                auto soften = [&](auto multiplies, int part) {
                    constexpr int EACH = N_TILES / PARTS;
                    float* const x = p + part * EACH * 4;
                    float greatest[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        greatest[h] = fmaxf(x[2 * h], x[2 * h + 1]);
#pragma unroll
                        for (int j = 1; j < EACH; ++j) greatest[h] = fmaxf(greatest[h], fmaxf(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]));
                    }
                    if (__any_sync(0xffffffffu, greatest[0] > soft[0].top || greatest[1] > soft[1].top)) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const float old = soft[h].top, factor = soft[h].raise(quad_max(greatest[h]), unit);
                            if (part == 0) shrink[h] = factor;
                            else ((float2*)(row_first + 8 * h))[1] = make_float2(old, factor);
                        }
                        if (part == 0) moves = true;
                        else raised = true;
                    }
                    const float frame[2] = {soft[0].frame() * unit, soft[1].frame() * unit};
                    float even[2] = {0.f, 0.f}, odd[2] = {0.f, 0.f};
#pragma unroll
                    for (int j = 0; j < EACH; ++j) {
                        if (multiplies && j % 2 == 0) multiply_values(values, (part * EACH + j) / 2);
                        if (multiplies && part * EACH + j == N_TILES - 2) wgmma_commit();
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float &y = x[4 * j + 2 * h], &z = x[4 * j + 2 * h + 1];
                            y = exp2_approx(y * unit - frame[h]), z = exp2_approx(z * unit - frame[h]);
                            even[h] += y, odd[h] += z;
                        }
                    }
#pragma unroll
                    for (int h = 0; h < 2; ++h) soft[h].open += even[h] + odd[h];
                    if (!(closes >> part & 1)) return;
                    bool wants = false;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float before = soft[h].closed, gained = soft[h].close(), row_tau = row_state[8 * h].x;
                        const bool first_gain = before == 0.f;  // RowSoftmax::wants without a branch
                        wants |= (row_tau >= 0.f) & (gained >= (first_gain ? 0.f : row_tau * before)) & (!first_gain | (soft[h].top > NEGATIVE_INFINITY));
                        row_state[8 * h].y = gained;
                        if (PARTS > 1 && part == 0) *(float2*)(row_first + 8 * h) = make_float2(soft[h].closed, gained);
                    }
                    if (__any_sync(0xffffffffu, wants)) wanted |= 1 << part;
                };
                if (with_values) {
                    wgmma_fence();
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) soften(True(), part);
                } else {
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) soften(False(), part);
                }
                if (closes) {
                    if (lane == 0) box.votes[ballots & 3][threadIdx.x / 32] = (unsigned char)wanted, barrier_arrive(vote);
                    voted = true, ++ballots;
                }
                await_values();
                if (whole || late) release(ring.empty[value_place.unit]);
                if (raised) {  // seldom; so this waits to know whether the second part counts
                    const bool halved = second && closes & 1 && !(read_vote() & 1);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float factor = row_first[8 * h].w;
                        if (halved) soft[h].top = row_first[8 * h].z;
                        else shrink[h] *= factor;
#pragma unroll
                        for (int i = 0; i < N_TILES; ++i) {
                            float &y = p[4 * (i / 2) + 2 * h + i % 2], &z = p[2 * N_TILES + 4 * (i / 2) + 2 * h + i % 2];
                            if (halved) z = 0.f;
                            else y *= factor;
                        }
                    }
                    moves = true;
                }
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
            };
            const bool whole = kind & PLAIN && counts && !late_masked && !in_tail && !fresh && (phase != HISTORY || in_history);
            if (HEAD_DIM_V <= 128 && uniform(whole)) walk(True());  // a second copy would spill above
            else walk(False());
        }

        close_all();

        const auto& part = facts.part[warpgroup];
        // A row that met no finite logit has the answer 0, or NaN where its query is why.
        auto poisoned = [&](int row) {
            const half_t* const query = q + part.q_at + row * q_row;
            unsigned int x[4], seen = 0;
#pragma unroll 1
            for (int d = 0; d < HEAD_DIM; d += 8) load_global_chunk(x, query + d), seen = not_finite(x, seen);
            return seen != 0;
        };
        // Normalise and write. A lane has two columns of every eight; four lanes trade, so that each writes 16 bytes.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 8 * h + lane / 4, row = facts.row[r];
            const bool there = r % 64 < part.rows;
            if (soft[h].closed == 0.f && poisoned(row)) soft[h].closed = not_a_number();
            const float inverse = soft[h].closed == 0.f ? 0.f : 1.f / soft[h].closed;
            half_t* const to = out + part.out_at + row * out_row + 8 * (lane % 4);
#pragma unroll
            for (int d = 0; d < V_TILES; d += 4) {
                unsigned int x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const pair = &o[d / (O_COLUMNS / 8)][(d + i) % (O_COLUMNS / 8) * 4 + 2 * h];
                    x[i] = pack_halves(pair[0] * inverse, pair[1] * inverse);
                }
                transpose_quad(x, lane);
                if (there) store_chunk(to + 8 * d, x);
            }
            if (lane % 4 || !there) continue;
            const float natural = soft[h].closed == 0.f ? NEGATIVE_INFINITY : soft[h].top * unit * LN_2 + logf(soft[h].closed);
            lse[part.row_at + row] = natural;
            if (tail_mass != nullptr) {
                const float2 mark = ring.tail[r];
                const float share = mark.x * exp2_approx((mark.y - soft[h].frame()) * unit) / soft[h].closed;
                tail_mass[part.row_at + row] = share > 0.f ? share : 0.f;
            }
        }
        if (tiles != nullptr && thread_here() == 0 && part.tile_at >= 0) {
            tiles[part.tile_at] = (ring.walked_keys[warpgroup] + block_k - 1) / block_k;
            tail_blocks[part.tile_at] = ring.blocks_found[warpgroup];
        }
    }
}
