// attend_sm90.cuh: what the roles of attend_sm90.cu share: sizes, the ring between them, barriers, a row tile's place.
#pragma once
#include "online_softmax.cuh"
#include "walk.cuh"
#ifdef S2O_EMULATION
#include "mma.cuh"
#include "emulated_attend.h"
#else
#include "wgmma.cuh"
#endif

constexpr int BLOCK_M = 128, CONSUMERS = 256, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int N_TILES = BLOCK_N / 8, V_TILES = HEAD_DIM_V / 8, PANELS = HEAD_DIM / 64, V_PANELS = HEAD_DIM_V / 64;
constexpr int PANEL_BYTES = BLOCK_N * 128, Q_PANEL_BYTES = BLOCK_M * 128, Q_BYTES = PANELS * Q_PANEL_BYTES;
constexpr int UNIT_BYTES = (PANELS > V_PANELS ? PANELS : V_PANELS) * PANEL_BYTES;
constexpr int O_COLUMNS = HEAD_DIM_V % 128 ? 64 : 128, O_PARTS = HEAD_DIM_V / O_COLUMNS;  // of one instruction
constexpr int PART = BLOCK_N / PARTS, WANTED = (1 << PARTS) - 1;  // keys of a part; the vote of which every part is wanted
constexpr int TILE_END = DONE + 1;  // a unit without rows, where a tile's next keys would be

// A step as the consumers see it. `kind`: its phase, whether every row sees all of BLOCK_N keys, and a bit for each part
// with which a logical key tile ends.
constexpr int PHASE = 7, PLAIN = 8, CLOSES = 4;
struct KeyStep {
    int kind, start, count;
};
struct True {
    __device__ constexpr operator bool() const { return true; }
};
struct False {
    __device__ constexpr operator bool() const { return false; }
};

// What the consumers need to know of a row tile.
struct TileFacts {
    int id;  // -1: no more row tiles
    int history, pool_blocks, listed;
    const int* order;  // the list's keys
    int all_from, all_until;  // keys that every row sees lie between
    int end;                  // keys of the masked window end here; -1: there are none
    struct {                  // of the rows of each consumer warpgroup
        int rows;
        float tau;
        long long q_at, out_at, row_at, tile_at;  // where their head starts in q, out, lse, and they in tiles; -1: nowhere
    } part[2];
    int row[BLOCK_M];
};
// The warps that vote together: all, or of two row tiles side by side those of one, the other one's bytes being zero.
struct Ballots {
    unsigned long long cast;
    unsigned char votes[4][8];  // by warp, a bit for each part
};

struct Ring {
    unsigned long long full[UNITS], empty[UNITS], q_full, q_empty;
    Ballots ballots[2];
    TileFacts facts[2];          // of row tiles in turn
    KeyStep steps[UNITS];        // by the number of a step, as are
    __align__(16) int index[UNITS][BLOCK_N];  // the keys gathered for the history, by `index_of`
    __align__(4) unsigned char suspect[UNITS][4];  // whether a masked step's values are not all finite, by producer warp
    bool hidden[BLOCK_N];                          // which of them are not
    __align__(8) float bias[2][BLOCK_N];  // tail: added to a step's dot products, by consumer warpgroup
    float2 tail[BLOCK_M];        // sum and maximum at the tail's start, then the tail's sum and maximum
    // Of a row: its tau, negative if it has no vote, and what the last key tile added; from the tail on what is added to its
    // products with pooled keys, and the most that they may be.
    float2 state[BLOCK_M];
    float4 first[BLOCK_M];  // of two parts, after the first: the sum, what it added, the maximum, what the second shrank
    int walked_keys[2], blocks_found[2];  // of the row tile, by consumer warpgroup
    int stopped[2];  // number of the last row tile of this block that stopped, by consumer warpgroup
    int lowest[4], highest[4], ticket;
};

constexpr int RING_BYTES = UNITS * (32 + 4 * BLOCK_N) + 9 * BLOCK_N + 5632;
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
    // Row tiles of up to 64 queries go two to a block: those of two query heads of a K/V head, a consumer warpgroup each.
    // Read anew: what follows from it must not be kept in registers that the producer lacks.
    __device__ __forceinline__ bool pairs() const {
        int size = block_q;
        asm volatile("" : "+r"(size));
        return size <= 64;
    }
    __device__ __forceinline__ int places() const { return pairs() ? (group() + 1) / 2 : group(); }
    __device__ __forceinline__ int tiles() const { return (tile_stop - tile_start) * places() * kv_heads; }
};

// One row tile, or two: the longest walks of a K/V head first, the query heads of a K/V head side by side.
struct RowTile {
    int kv, batch, head, member, tile, segment, first_row, rows, history, pool_blocks;
    int second;  // heads from the first row tile's to the second one's; 0: there is none
    long long flat_head;
    __device__ __forceinline__ RowTile(const Launch& x, int id) {
        const int group = x.group(), places = x.places(), each = (x.tile_stop - x.tile_start) * places, place = id % each;
        kv = x.kv_start + id / each, batch = kv / x.heads_kv, tile = x.tile_stop - 1 - place / places;
        member = place % places * (x.pairs() ? 2 : 1), second = x.pairs() && member + 1 < group;
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

// Where the key of a step's row stands: those of the rows that a producer thread copies, every 16th, side by side.
__device__ __forceinline__ int index_of(int row) { return row % 16 * (BLOCK_N / 16) + row / 16; }

// Rows of HEAD_DIM columns as panels of 64: rows of 128 bytes whose 16-byte chunks are turned by row % 8.
__device__ __forceinline__ unsigned int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
#ifndef S2O_EMULATION
// Arrives at a barrier, which counts it, once this thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(unsigned int barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 6, 256;" ::: "memory"); }
__device__ __forceinline__ void producers_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
// The consumers take turns at starting a product with keys, so that one multiplies while the other takes exponentials.
__device__ __forceinline__ void await_turn(int warpgroup) { asm volatile("bar.sync %0, 256;" ::"r"(4 + warpgroup) : "memory"); }
__device__ __forceinline__ void pass_turn(int warpgroup) { asm volatile("bar.arrive %0, 256;" ::"r"(5 - warpgroup) : "memory"); }
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
__device__ __forceinline__ void load_global_chunk(unsigned int (&x)[4], const half_t* from) {
    asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(from) : "memory");
}
__device__ __forceinline__ void store_chunk(half_t* to, const unsigned int (&x)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
#endif
// Lane i of four gives word j to lane j, at place i.
__device__ __forceinline__ void transpose_quad(unsigned int (&x)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    const unsigned int a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
    const unsigned int low_0 = odd ? a : x[0], low_1 = odd ? x[1] : a, high_0 = odd ? b : x[2], high_1 = odd ? x[3] : b;
    const unsigned int c = __shfl_xor_sync(0xffffffffu, high ? low_0 : high_0, 2), d = __shfl_xor_sync(0xffffffffu, high ? low_1 : high_1, 2);
    x[0] = high ? c : low_0, x[1] = high ? d : low_1, x[2] = high ? high_0 : c, x[3] = high ? high_1 : d;
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

