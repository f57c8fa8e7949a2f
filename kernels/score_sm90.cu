// score_sm90.cu: stage 1, last part, on Hopper: score.cu's products by `wgmma`, where mma.sync reaches two thirds of the
// rate. Mean queries alone, or with covariance factors 8, 16, 32 or 64 rows a list, and the mixture's centres; head dims to
// 256. score.cu does the rest.
//   k        [batch, heads_kv, n_keys, dim]               T      element strides given, unit column stride
//   rows     [order heads of the slab, chunks of 64, WIDTH]  T  mean query, then covariance factors, dealt out; or
//            centres in order: as tiled.cuh says. An order head's come `head_rows` after those of the one before
//   tiles    [K/V heads of the slab, chunks of 64, WIDTH]    T  keys as tiled.cuh says, from tile_keys; 0 past the last
//   offset, partial: as in score.cu, over whole chunks of an order head
//   history, starts, score: as in score.cu; a list's scores start on the multiple of 64 where those before it end
//   ranges   [order heads of the slab, segments, parts]  two halves   of a part of a list's scores: the least (not NaN),
//            the greatest (NaN if there is one)
// A block keeps TILE_KEYS keys in registers as the left operand, 64 a warpgroup; one more warp streams the rows past
// them. A warpgroup waits for its product before it adds up the squares: the tensor cores meanwhile have the other
// warpgroups of this block and of its neighbour. At WIDTH 256 keys and stages fill a multiprocessor's shared memory and a
// block is alone there; its two warpgroups take turns, since a product lasts twice as long as at 128 and its sums do not.
// grid (order heads of a K/V head, key tiles of the longest history, K/V heads of the slab)   block TILE_KEYS * 2 + 32
//   normalise: (for each part of the longest history, tiles of TILE_KEYS rows of a head; order heads; K/V heads)
//   score_means: (parts of the longest history, tiles of TILE_KEYS lists of a head, order heads of the slab)
//   score_mixture: (key tiles; order heads; K/V heads)
//   tile_keys: (chunks of the longest history, K/V heads of the slab)   block 256
// shared memory 1024 + TILE_KEYS * WIDTH * 2 + STAGES * (64 * WIDTH * 2 + 256 + 16) bytes
// Where a list has one row, the mean query, lists are the left operand and keys stream: a lane then has twice 8 keys
// of a list in a row, writes them in two stores, and keeps the least and greatest of all it has seen.
// kernels score_8_64 .. score_64_128, by rows of a list and WIDTH; score_means_64, normalise_64, score_mixture_64, tile_keys_64 and
// their like of 128; where WIDEST is 256, those of 256 alone   macros IS_BF16, WIDEST (128, 256), TILE_KEYS
// (a multiple of 64)
#include "gather.cuh"
#include "scores.cuh"
#include "tiled.cuh"

constexpr int THREADS = 2 * TILE_KEYS;  // that multiply
constexpr int STAGES = 4;
constexpr int CHUNK_ROWS = 64;
constexpr int HALF_BYTES = CHUNK_ROWS * 128;  // 64 columns of a chunk, in rows of 128 bytes
constexpr int blocks_at(int width) { return width <= 128 ? 2 : 1; }  // of a multiprocessor

#ifdef S2O_EMULATION
#include "emulated_wgmma.h"
#else
#include "wgmma.cuh"

// c (64 x 64) = a b^T, or c += a b^T where `add`: a is 64 x 16 in the warpgroup's registers, b 64 rows of 16 columns in
// shared memory.
template <bool ADD>
__device__ __forceinline__ void wgmma(float (&c)[32], const unsigned int (&a)[4], unsigned long long b) {
    if (ADD)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                     : REGISTERS_32("+f", c, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, {%32,%33,%34,%35}, %36, 0, 1, 1, 0;"
                     : REGISTERS_32("=f", c, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Waits for every product of the warpgroup.
__device__ __forceinline__ void wgmma_finish(float (&c)[32]) {
    wgmma_commit();
    wgmma_wait<0>();
    settle(c);
}
// Arrives at `barrier` with `bytes` to come, and starts the copy that brings them.
__device__ __forceinline__ void copy_bulk(unsigned int to, const void* from, int bytes, unsigned int barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Barrier 1, among the threads that multiply.
__device__ __forceinline__ void multipliers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
#endif

// Rows of 128 bytes, 128-byte swizzle, 1024 bytes from 8 rows to the next. The low word alone says where; bytes further are
// added to it in units of 16.
__device__ __forceinline__ unsigned int low_word(unsigned int address) { return (address & 0x3ffff) >> 4 | 1u << 16; }
__device__ __forceinline__ unsigned long long descriptor(unsigned int low) {
    return (unsigned long long)(1u << 30 | 1024 >> 4) << 32 | low;
}

// The shared memory of a block: stages of 64 rows, its own keys, what goes with a stage, barriers.
template <int WIDTH>
struct Layout {
    static constexpr int CHUNK_BYTES = CHUNK_ROWS * WIDTH * 2;
    unsigned int stages, keys, offsets, full, empty;

    // `arrivals`: bulk copies that fill a stage. The block must meet before it uses the barriers.
    __device__ __forceinline__ void set_up(const char* memory, int arrivals) {
        stages = (shared_address(memory) + 1023) & ~1023u;
        keys = stages + STAGES * CHUNK_BYTES, offsets = keys + TILE_KEYS * WIDTH * 2;
        full = offsets + STAGES * CHUNK_ROWS * 4, empty = full + 8 * STAGES;
        if (threadIdx.x == 0)
            for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, arrivals), barrier_init(empty + 8 * s, THREADS / 32);
    }
    __device__ __forceinline__ unsigned int stage(int turn) const { return stages + turn % STAGES * CHUNK_BYTES; }
    // For the thread that copies: waits until the stage is free.
    __device__ __forceinline__ void claim(int turn) const {
        if (turn >= STAGES) barrier_wait(empty + 8 * (turn % STAGES), (turn / STAGES - 1) & 1);
    }
};

// The warp's 16 keys in registers, once they came. Row g of the product is key 2 g, row g + 8 the one after it.
template <int WIDTH>
__device__ __forceinline__ void load_keys(unsigned int (&a)[WIDTH / 16][4], unsigned int keys) {
    typedef SharedTile<WIDTH> Tile;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    wait_copies<0>();
    multipliers_sync();
#pragma unroll
    for (int d = 0; d < WIDTH / 16; ++d)
        load_matrices(a[d], Tile::address(keys, warp * 16 + 2 * (lane & 7) + ((lane >> 3) & 1), 2 * d + (lane >> 4)));
}

// c = a times the rows of the stage that belongs to `turn`, which it waits for and gives back.
template <int WIDTH>
__device__ __forceinline__ void multiply(float (&c)[32], const unsigned int (&a)[WIDTH / 16][4], const Layout<WIDTH>& layout, int turn) {
    barrier_wait(layout.full + 8 * (turn % STAGES), turn / STAGES & 1);
    const unsigned int here = low_word(layout.stage(turn));
    wgmma_fence();
    wgmma<false>(c, a[0], descriptor(here));
#pragma unroll
    for (int d = 1; d < WIDTH / 16; ++d) wgmma<true>(c, a[d], descriptor(here + (d / 4 * HALF_BYTES + d % 4 * 32) / 16));
    wgmma_finish(c);
}

// What the kernels that keep keys begin with. The keys come, and the first list that reaches them is found; one thread of
// the last warp starts the copies of the chunks of rows from there on, `copies` each, by fetch(chunk, turn). Returns the
// chunk that this thread multiplies first, `chunk_stop` if none.
template <int WIDTH, typename Fetch>
__device__ __forceinline__ int start_tile(
    Layout<WIDTH>& layout, unsigned int (&a)[WIDTH / 16][4], const Rows& keys, int first_key, int n_keys, const int* history,
    int segments, int per_list, int chunk_stop, int copies, Fetch fetch) {
    extern __shared__ __align__(128) char shared_memory[];
    __shared__ int index[TILE_KEYS];
    layout.set_up(shared_memory, copies);
    for (int i = threadIdx.x; i < TILE_KEYS; i += THREADS) index[i] = min(first_key + i, n_keys - 1);
    __syncthreads();
    if (threadIdx.x < THREADS) load_rows<WIDTH, TILE_KEYS, THREADS>(layout.keys, keys, index);
    commit_copies();
    const int first_list = first_list_at<THREADS + 32>(history, segments, first_key);
    const int first_chunk = first_list == segments ? chunk_stop : (int)((long long)first_list * per_list / CHUNK_ROWS);
    if (first_chunk == chunk_stop || threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS)
            for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
                layout.claim(chunk - first_chunk);
                fetch(chunk, chunk - first_chunk);
            }
        wait_copies<0>();
        return chunk_stop;
    }
    load_keys<WIDTH>(a, layout.keys);
    return first_chunk;
}

template <int PER_LIST, int WIDTH>
__device__ __forceinline__ void score_tile(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,
    unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments, int head_rows) {
    constexpr int LISTS = CHUNK_ROWS / PER_LIST, CHUNK = CHUNK_ROWS * WIDTH;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.y * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.x + blockIdx.x;
    const int chunk_stop = tiled_rows(segments, PER_LIST) / CHUNK_ROWS;
    rows += (long long)order_head * head_rows * WIDTH;
    scores += order_head * starts[segments];
    Layout<WIDTH> layout;
    unsigned int a[WIDTH / 16][4];
    const Rows keys = rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned);
    const int first_chunk = start_tile(layout, a, keys, first_key, n_keys, history, segments, PER_LIST, chunk_stop, 1, [&](int chunk, int turn) {
        copy_bulk(layout.stage(turn), rows + (long long)chunk * CHUNK, 2 * CHUNK, layout.full + 8 * (turn % STAGES));
    });

    const int key = first_key + warp * 16 + 2 * (lane / 4);
    constexpr int EACH = PER_LIST < 16 ? 16 / PER_LIST : 1;  // lists of a lane, one behind the other,
    constexpr int HELD = 16 / EACH;                          // rows of each: see dealt_row
    const bool writes = PER_LIST <= 16 || quad % (PER_LIST / 16) == 0;  // the lane that has a list's first row
    for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
        const int turn = chunk - first_chunk, list = chunk * LISTS + quad * 16 / PER_LIST;
        int stop[EACH];  // read long before they are needed
        long long start = list < segments ? starts[list] : 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) stop[j] = list + j < segments ? history[list + j] : 0;
        float c[32];
        multiply<WIDTH>(c, a, layout, turn);
        if (lane == 0) barrier_arrive(layout.empty + 8 * (turn % STAGES));

#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            float u[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sums[2] = {0.f, 0.f};
#pragma unroll
                for (int r = j * HELD; r < (j + 1) * HELD; ++r) {
                    const float x = c[r / 2 * 4 + 2 * h + r % 2];
                    sums[r % 2] += r == j * HELD && writes ? x : x * x;
                }
                u[h] = sums[0] + sums[1];
#pragma unroll
                for (int step = 1; step < PER_LIST / 16; step *= 2) u[h] += __shfl_xor_sync(0xffffffffu, u[h], step);
            }
            if (writes && key < stop[j]) *(unsigned int*)(scores + start + key) = score_pair(u[0], u[1]);
            start += stop[j] + 63 & ~63;
        }
    }
}

// Starts the copies of 64 keys by a warp, as rows of a stage so dealt out that a lane's columns of the product are 8 keys
// in a row of the first 32 and 8 of the others: four lanes together write 64 bytes.
template <int WIDTH>
__device__ __forceinline__ void fetch_keys(unsigned int to, const Rows& keys, int first_key, int n_keys) {
    const int lane = threadIdx.x & 31, piece = lane % 8;
    auto address = [&](int row, int panel) { return to + panel * HALF_BYTES + row * 128 + (piece ^ row % 8) * 16; };
    auto key_of = [](int row) { return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2; };
    if (keys.aligned && keys.width == WIDTH && first_key + CHUNK_ROWS <= n_keys) {
        const char* const from = keys.data + (long long)(first_key + key_of(lane / 8)) * keys.stride + 16 * piece;
#pragma unroll
        for (int i = 0; i < CHUNK_ROWS; i += 4)
#pragma unroll
            for (int panel = 0; panel < WIDTH / 64; ++panel)
                copy16_async(address(i + lane / 8, panel), from + (long long)key_of(i) * keys.stride + 128 * panel);
        return;
    }
#pragma unroll 1
    for (int i = lane / 8; i < CHUNK_ROWS * WIDTH / 64; i += 4) {
        const int row = i % CHUNK_ROWS, panel = i / CHUNK_ROWS, column = 64 * panel + 8 * piece;
        const char* const from = keys.data + (long long)min(first_key + key_of(row), n_keys - 1) * keys.stride + 2 * column;
        const unsigned int at = address(row, panel);
        if (keys.aligned && column + 8 <= keys.width) copy16_async(at, from);
        else
            for (int d = 0; d < 8; ++d) store_shared2(at + 2 * d, column + d < keys.width ? ((const half_t*)from)[d] : (half_t)0);
    }
}

// Scores by mean queries of a part of the keys, for 16 lists a warp: they stay in registers and keys stream past.
template <int WIDTH>
__device__ __forceinline__ void means_tile(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,
    unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments, int head_rows,
    unsigned int* __restrict__ ranges, int orders, int part_keys) {
    constexpr int TILE_LISTS = TILE_KEYS, LAG = STAGES - 2;  // chunks on their way that are not waited for
    extern __shared__ __align__(128) char shared_memory[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3, order_head = blockIdx.z;
    const int part_key = blockIdx.x * part_keys;
    const int first_list = (gridDim.y - 1 - blockIdx.y) * TILE_LISTS;  // the longest first
    const int last = min(history[min(first_list + TILE_LISTS, segments) - 1], part_key + part_keys);
    if (part_key >= last) return;
    const int chunks = (last - part_key + CHUNK_ROWS - 1) / CHUNK_ROWS;
    rows += (long long)order_head * head_rows * WIDTH;
    scores += order_head * starts[segments];

    Layout<WIDTH> layout;
    layout.set_up(shared_memory, 1);
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        const int kv = kv_start + order_head / orders;
        const Rows keys = rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned);
        for (int turn = 0; turn < chunks + LAG; ++turn) {
            if (turn < chunks) {
                layout.claim(turn);
                fetch_keys<WIDTH>(layout.stage(turn), keys, part_key + turn * CHUNK_ROWS, n_keys);
            }
            commit_copies();
            if (turn < LAG) continue;
            wait_copies<LAG>();
            async_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(layout.full + 8 * ((turn - LAG) % STAGES));
        }
        return;
    }
    unsigned int a[WIDTH / 16][4], least[2], greatest[2];  // of lists `list` and list + 8
    int stop[2];
    const int list = first_list + warp * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        stop[h] = list + 8 * h < segments ? history[list + 8 * h] : 0;
        least[h] = 0x7c007c00u, greatest[h] = 0xfc00fc00u;
        const int row = (int)dealt_row(min(list + 8 * h, head_rows - 1));
#pragma unroll
        for (int d = 0; d < WIDTH / 16; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) a[d][2 * i + h] = *(const unsigned int*)(rows + tiled_place(row, 16 * d + 8 * i + 2 * quad, WIDTH));
    }
    // Where this lane's next scores go, and how many times 64 further those of list + 8.
    const long long start = starts[min(list, segments)];
    unsigned short* to = scores + start + part_key + 8 * quad;
    const unsigned int gap = (unsigned int)((starts[min(list + 8, segments)] - start) / 64);
    for (int turn = 0; turn < chunks; ++turn, to += CHUNK_ROWS) {
        const int first_key = part_key + turn * CHUNK_ROWS;
        float c[32];
        multiply<WIDTH>(c, a, layout, turn);
        if (lane == 0) barrier_arrive(layout.empty + 8 * (turn % STAGES));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (first_key >= stop[h]) continue;
            unsigned int x[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) x[n] = pack_scores(c[4 * n + 2 * h], c[4 * n + 2 * h + 1]);
            unsigned int low = min_halves(x[0], x[1]), high = max_halves(x[0], x[1]);
#pragma unroll
            for (int n = 2; n < 8; ++n) low = min_halves(low, x[n]), high = max_halves(high, x[n]);
            const unsigned int large = (low & 0x7c007c00u) + 0x04000400u | (high & 0x7c007c00u) + 0x04000400u;
            if (large & 0x80008000u || first_key + CHUNK_ROWS > stop[h]) {  // not of a half's range, or past the history
                low = 0x7c007c00u, high = 0xfc00fc00u;
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    x[n] = score_pair(c[4 * n + 2 * h], c[4 * n + 2 * h + 1]);
                    const int left = stop[h] - first_key - n / 4 * 32 - 8 * quad - n % 4 * 2;  // keys of the list from the first on
                    const unsigned int seen = left > 1 ? x[n] : x[n] & 0xffffu | x[n] << 16;
                    if (left > 0) low = min_halves(low, seen), high = max_halves(high, seen);
                }
            }
            least[h] = min_halves(least[h], low), greatest[h] = max_halves(greatest[h], high);
            uint4* const at = (uint4*)(to + (h ? 64ll * gap : 0));
            at[0] = make_uint4(x[0], x[1], x[2], x[3]);
            at[4] = make_uint4(x[4], x[5], x[6], x[7]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        for (int step = 1; step < 4; step *= 2) {
            least[h] = min_halves(least[h], __shfl_xor_sync(0xffffffffu, least[h], step));
            greatest[h] = max_halves(greatest[h], __shfl_xor_sync(0xffffffffu, greatest[h], step));
        }
        const unsigned int low = min_halves(least[h], least[h] >> 16 | least[h] << 16), high = max_halves(greatest[h], greatest[h] >> 16 | greatest[h] << 16);
        if (quad == 0 && part_key < stop[h])
            ranges[((long long)order_head * segments + list + 8 * h) * gridDim.x + blockIdx.x] = low & 0xffffu | high << 16;
    }
}

// Sums of a part of the keys, for 16 centres a warp: they stay in registers and keys stream past.
template <int WIDTH>
__device__ __forceinline__ void normalise_tile(
    const half_t* __restrict__ tiles, const half_t* __restrict__ rows, float2* __restrict__ partial, const int* __restrict__ history,
    const long long* __restrict__ starts, const unsigned short* __restrict__ scores, int key_chunks, int segments, int per_list,
    float unit, int part_keys) {
    constexpr int CHUNK = CHUNK_ROWS * WIDTH, TILE_ROWS = TILE_KEYS;
    extern __shared__ __align__(128) char shared_memory[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y, head_rows = tiled_rows(segments, per_list);
    const int row_tiles = (head_rows + TILE_ROWS - 1) / TILE_ROWS, part = blockIdx.x / row_tiles;
    const int first_row = (row_tiles - 1 - (int)blockIdx.x % row_tiles) * TILE_ROWS, part_key = part * part_keys;  // longest first
    const int last = min(history[min((first_row + TILE_ROWS - 1) / per_list, segments - 1)], part_key + part_keys);
    if (part_key >= last) return;
    const int first_chunk = part_key / CHUNK_ROWS, chunk_stop = (last + CHUNK_ROWS - 1) / CHUNK_ROWS;
    rows += (long long)order_head * head_rows * WIDTH;
    tiles += (long long)blockIdx.z * key_chunks * CHUNK;
    partial += ((long long)order_head * (gridDim.x / row_tiles) + part) * head_rows;

    Layout<WIDTH> layout;
    layout.set_up(shared_memory, 1);
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS)
            for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
                const int turn = chunk - first_chunk;
                layout.claim(turn);
                copy_bulk(layout.stage(turn), tiles + (long long)chunk * CHUNK, 2 * CHUNK, layout.full + 8 * (turn % STAGES));
            }
        return;
    }
    const int row = first_row + warp * 16 + lane / 4, list = (first_row + warp * 16) / per_list;
    const int stop = list < segments ? history[list] : 0;
    scores += order_head * starts[segments] + (list < segments ? starts[list] : 0) + 2 * quad;
    unsigned int a[WIDTH / 16][4];
#pragma unroll
    for (int d = 0; d < WIDTH / 16; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[d][i] = *(const unsigned int*)(rows + tiled_place(min(row, head_rows - 9) + i % 2 * 8, 16 * d + i / 2 * 8 + 2 * quad, WIDTH));

    PowerSum sums[2];  // of rows `row` and row + 8, over this lane's keys
    sums[0].clear(), sums[1].clear();
    for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
        const int turn = chunk - first_chunk, first_key = chunk * CHUNK_ROWS;
        unsigned int quadratic[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) quadratic[n] = first_key < stop ? *(const unsigned int*)(scores + first_key + 8 * n) : 0;
        float c[32];
        multiply<WIDTH>(c, a, layout, turn);
        if (lane == 0) barrier_arrive(layout.empty + 8 * (turn % STAGES));
        if (first_key >= stop) continue;
        if (first_key + CHUNK_ROWS > stop)  // -inf past the history, whatever the key is
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (first_key + 8 * (i / 2) + 2 * quad + i % 2 < stop) continue;
                quadratic[i / 2] = quadratic[i / 2] & ~(0xffffu << 16 * (i % 2)) | 0xfc00u << 16 * (i % 2);
                c[4 * (i / 2) + i % 2] = c[4 * (i / 2) + 2 + i % 2] = 0.f;
            }
        float top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float bias = LOG2_E * score_to_float((unsigned short)(quadratic[i / 2] >> 16 * (i % 2)));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float& x = c[4 * (i / 2) + 2 * h + i % 2];
                x = fmaf(x, unit, bias);
                top[h] = fmaxf(top[h], x);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (top[h] > sums[h].frame + 8.f) sums[h].raise(top[h]);  // seldom, once the great ones were seen
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 16; ++i) sum += exp2_approx(c[4 * (i / 2) + 2 * h + i % 2] - sums[h].frame);
            sums[h].sum += sum;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        for (int step = 1; step < 4; step *= 2) {
            const float frame = __shfl_xor_sync(0xffffffffu, sums[h].frame, step), sum = __shfl_xor_sync(0xffffffffu, sums[h].sum, step);
            sums[h].add(frame, sum);
        }
        if (quad == 0 && row + 8 * h < head_rows) partial[row + 8 * h] = make_float2(sums[h].frame, sums[h].sum);
    }
}

template <int WIDTH>
__device__ __forceinline__ void mixture_tile(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    const half_t* __restrict__ rows, const float* __restrict__ offset, const int* __restrict__ history,
    const long long* __restrict__ starts, unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim,
    int segments, int per_list, float unit) {
    constexpr int CHUNK = CHUNK_ROWS * WIDTH;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
    const int first_key = blockIdx.x * TILE_KEYS, kv = kv_start + blockIdx.z;
    const int order_head = blockIdx.z * gridDim.y + blockIdx.y, chunk_stop = tiled_rows(segments, per_list) / CHUNK_ROWS;
    rows += (long long)order_head * chunk_stop * CHUNK;
    offset += (long long)order_head * chunk_stop * CHUNK_ROWS;
    scores += order_head * starts[segments];
    Layout<WIDTH> layout;
    unsigned int a[WIDTH / 16][4];
    const Rows keys = rows_of(k + kv / heads_kv * k_batch + kv % heads_kv * k_head, k_row, dim, aligned);
    const int first_chunk = start_tile(layout, a, keys, first_key, n_keys, history, segments, per_list, chunk_stop, 2, [&](int chunk, int turn) {
        const unsigned int full = layout.full + 8 * (turn % STAGES);
        copy_bulk(layout.stage(turn), rows + (long long)chunk * CHUNK, 2 * CHUNK, full);
        copy_bulk(layout.offsets + turn % STAGES * CHUNK_ROWS * 4, offset + chunk * CHUNK_ROWS, CHUNK_ROWS * 4, full);
    });

    const int key = first_key + warp * 16 + 2 * (lane / 4) + quad / 2;  // the one that this lane writes, if quad is even
    int list = (int)((long long)first_chunk * CHUNK_ROWS / per_list), row = (int)((long long)first_chunk * CHUNK_ROWS % per_list);
    PowerSum sums[2];  // of the lane's two keys, over its columns of a list
    for (int chunk = first_chunk; chunk < chunk_stop; ++chunk) {
        const int turn = chunk - first_chunk;
        unsigned short* to[2];  // where the lists that end with a half of the chunk want the lane's key; null: nowhere
        unsigned short quadratic[2];
#pragma unroll
        for (int part = 0; part < 2; ++part) {  // read long before they are needed
            const int ended = (row + 32 * part) / per_list, at = list + ended;
            const bool ends = (row + 32 * part + 32) % per_list == 0;
            to[part] = ends && quad % 2 == 0 && at < segments && key < history[at] ? scores + starts[at] + key : nullptr;
            quadratic[part] = to[part] != nullptr ? *to[part] : 0;
        }
        float c[32];
        multiply<WIDTH>(c, a, layout, turn);
#pragma unroll
        for (int part = 0; part < 8; part += 4) {  // n-tiles, 32 rows
            float2 shift[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) shift[n] = load_shared_pair(layout.offsets + (turn % STAGES * CHUNK_ROWS + 8 * (part + n) + 2 * quad) * 4);
            if (part) {
                __syncwarp();
                if (lane == 0) barrier_arrive(layout.empty + 8 * (turn % STAGES));
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = -1e30f, sum = 0.f;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float2 bias = shift[i / 2];
                    float& x = c[4 * (part + i / 2) + 2 * h + i % 2];
                    x = fmaf(x, 2.f * unit, i % 2 ? bias.y : bias.x);
                    top = fmaxf(top, x);
                }
                if (row == 0) sums[h].frame = top, sums[h].sum = 0.f;
                else if (top > sums[h].frame) sums[h].raise(top);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum += exp2_approx(c[4 * (part + i / 2) + 2 * h + i % 2] - sums[h].frame);
                sums[h].sum += sum;
            }
            row += 32;
            if (row < per_list) continue;
            // The quad's lanes add up: first a key each, then its two halves.
            const bool upper = quad & 2;
            PowerSum sum = upper ? sums[1] : sums[0];
            const PowerSum other = upper ? sums[0] : sums[1];
            const float other_frame = __shfl_xor_sync(0xffffffffu, other.frame, 2), other_sum = __shfl_xor_sync(0xffffffffu, other.sum, 2);
            sum.add(other_frame, other_sum);
            const float half_frame = __shfl_xor_sync(0xffffffffu, sum.frame, 1), half_sum = __shfl_xor_sync(0xffffffffu, sum.sum, 1);
            sum.add(half_frame, half_sum);
            if (to[part / 4] != nullptr) *to[part / 4] = score_bits(score_to_float(quadratic[part / 4]) + 0.5f * LN_2 * sum.log2());
            row = 0, ++list;
        }
    }
}

#define SCORE(NAME, PER_LIST, WIDTH)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, blocks_at(WIDTH)) NAME(                                  \
        const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,                \
        const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,         \
        unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments,             \
        int head_rows) {                                                                                               \
        score_tile<PER_LIST, WIDTH>(k, k_batch, k_head, k_row, aligned, rows, history, starts, scores, heads_kv,        \
                                    kv_start, n_keys, dim, segments, head_rows);                                        \
    }
#if WIDEST == 256
SCORE(score_8_256, 8, 256)
SCORE(score_16_256, 16, 256)
SCORE(score_32_256, 32, 256)
SCORE(score_64_256, 64, 256)
#else
SCORE(score_8_64, 8, 64)
SCORE(score_16_64, 16, 64)
SCORE(score_32_64, 32, 64)
SCORE(score_64_64, 64, 64)
SCORE(score_8_128, 8, 128)
SCORE(score_16_128, 16, 128)
SCORE(score_32_128, 32, 128)
SCORE(score_64_128, 64, 128)
#endif

#define MEANS(NAME, WIDTH)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, blocks_at(WIDTH)) NAME(                                  \
        const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,                \
        const half_t* __restrict__ rows, const int* __restrict__ history, const long long* __restrict__ starts,         \
        unsigned short* __restrict__ scores, int heads_kv, int kv_start, int n_keys, int dim, int segments,             \
        int head_rows, unsigned int* __restrict__ ranges, int orders, int part_keys) {                                  \
        means_tile<WIDTH>(k, k_batch, k_head, k_row, aligned, rows, history, starts, scores, heads_kv, kv_start,        \
                          n_keys, dim, segments, head_rows, ranges, orders, part_keys);                                 \
    }
#if WIDEST == 256
MEANS(score_means_256, 256)
#else
MEANS(score_means_64, 64)
MEANS(score_means_128, 128)
#endif

#define NORMALISE(NAME, WIDTH)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, blocks_at(WIDTH)) NAME(                                  \
        const half_t* __restrict__ tiles, const half_t* __restrict__ rows, float2* __restrict__ partial,                \
        const int* __restrict__ history, const long long* __restrict__ starts,                                          \
        const unsigned short* __restrict__ scores, int key_chunks, int segments, int per_list, float unit,              \
        int part_keys) {                                                                                                \
        normalise_tile<WIDTH>(tiles, rows, partial, history, starts, scores, key_chunks, segments, per_list, unit,      \
                              part_keys);                                                                               \
    }
#if WIDEST == 256
NORMALISE(normalise_256, 256)
#else
NORMALISE(normalise_64, 64)
NORMALISE(normalise_128, 128)
#endif

#define MIXTURE(NAME, WIDTH)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS + 32, blocks_at(WIDTH)) NAME(                                  \
        const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,                \
        const half_t* __restrict__ rows, const float* __restrict__ offset, const int* __restrict__ history,             \
        const long long* __restrict__ starts, unsigned short* __restrict__ scores, int heads_kv, int kv_start,          \
        int n_keys, int dim, int segments, int per_list, float unit) {                                                  \
        mixture_tile<WIDTH>(k, k_batch, k_head, k_row, aligned, rows, offset, history, starts, scores, heads_kv,        \
                            kv_start, n_keys, dim, segments, per_list, unit);                                           \
    }
#if WIDEST == 256
MIXTURE(score_mixture_256, 256)
#else
MIXTURE(score_mixture_64, 64)
MIXTURE(score_mixture_128, 128)
#endif

extern "C" __global__ void __launch_bounds__(256) tile_keys(
    const half_t* __restrict__ k, long long k_batch, long long k_head, long long k_row, int aligned,
    half_t* __restrict__ tiles, int heads_kv, int kv_start, int n_keys, int dim, int width) {
    const int kv = kv_start + blockIdx.y;
    k += kv / heads_kv * k_batch + kv % heads_kv * k_head;
    tiles += (long long)blockIdx.y * gridDim.x * CHUNK_ROWS * width;
    for (int i = threadIdx.x; i < CHUNK_ROWS * width / 8; i += 256) {
        const int row = blockIdx.x * CHUNK_ROWS + i / (width / 8), column = i % (width / 8) * 8;
        const half_t* from = k + row * k_row + column;
        uint4* const to = (uint4*)(tiles + tiled_place(row, column, width));
        if (row >= n_keys || column >= dim) *to = make_uint4(0, 0, 0, 0);
        else if (aligned && column + 8 <= dim) *to = *(const uint4*)from;
        else
            for (int d = 0; d < 8; ++d) ((half_t*)to)[d] = column + d < dim ? from[d] : (half_t)0;
    }
}
