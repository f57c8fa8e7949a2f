// gather.cuh: rows of a matrix in global memory, contiguous or through an index, into a swizzled shared tile.
#pragma once
#include "mma.cuh"

// A tile of rows of COLUMNS elements, in 16-byte chunks so permuted that the eight rows of an 8x8 matrix lie in
// different banks.
template <int COLUMNS>
struct SharedTile {
    static constexpr int CHUNKS = COLUMNS / 8;
    static_assert(CHUNKS % 4 == 0, "head dims are multiples of 32");

    static __device__ __forceinline__ int chunk(int row, int column) {
        const int turn = CHUNKS % 8 == 0 ? row & 7 : (row >> 1) & 3;
        return row * CHUNKS + (column ^ turn);
    }
    static __device__ __forceinline__ unsigned int address(unsigned int base, int row, int column) {
        return base + 16 * chunk(row, column);
    }
    // The address of a chunk `columns` (even, a constant) further and `rows` (of 8, a constant) below `start`, itself
    // of chunk column 0 or 1, in a tile on 128 bytes: at most four registers for a whole row of matrices.
    static __device__ __forceinline__ unsigned int from(unsigned int start, int rows, int columns) {
        constexpr int TURNED = CHUNKS % 8 == 0 ? 6 : 2;
        return (start ^ (16 * (columns & TURNED))) + 16 * (columns & ~(TURNED | 1)) + 16 * rows * CHUNKS;
    }
};

// The rows of one head of q, k or v.
struct Rows {
    const char* data;
    int stride;    // bytes from row to row
    int width;     // elements of a row; the tile's columns beyond it become zero
    bool aligned;  // every row starts on 16 bytes
};

__device__ __forceinline__ Rows rows_of(const half_t* data, long long stride, int width, bool aligned) {
    return {(const char*)data, (int)(2 * stride), width, aligned};
}

// Starts the copy of the TILE_ROWS rows that `index` (in shared memory) names, by all THREADS of the block. A group
// of 4 or 8 lanes reads 64 or 128 contiguous bytes of a row.
template <int COLUMNS, int TILE_ROWS, int THREADS>
__device__ __forceinline__ void load_rows(unsigned int to, const Rows& rows, const int* index) {
    typedef SharedTile<COLUMNS> Tile;
    constexpr int LANES = Tile::CHUNKS % 8 == 0 ? 8 : 4;
    const int width = rows.width, stride = rows.stride;
    if (rows.aligned && width == COLUMNS) {
        const int first = threadIdx.x / LANES, column = threadIdx.x % LANES;
        const char* data = rows.data + 16 * column;
        to = Tile::address(to, first, column);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r += THREADS / LANES) {
            if (TILE_ROWS % (THREADS / LANES) && first + r >= TILE_ROWS) break;
            const char* from = data + (long long)index[first + r] * stride;
#pragma unroll
            for (int c = 0; c < Tile::CHUNKS; c += LANES) copy16_async(to + 16 * (r * Tile::CHUNKS + c), from + 16 * c);
        }
        return;
    }
    if (rows.aligned && width % 8 == 0) {  // a narrower head: whole chunks, the others zero
#pragma unroll 1
        for (int i = threadIdx.x; i < TILE_ROWS * Tile::CHUNKS; i += THREADS) {
            const int r = i / Tile::CHUNKS, c = i % Tile::CHUNKS;
            const unsigned int address = Tile::address(to, r, c);
            if (8 * c < width) copy16_async(address, rows.data + (long long)index[r] * stride + 16 * c);
            else zero_shared16(address);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE_ROWS * COLUMNS; i += THREADS) {  // rows off 16 bytes: one by one
        const int r = i / COLUMNS, c = i % COLUMNS;
        const half_t x = c < width ? *(const half_t*)(rows.data + (long long)index[r] * stride + 2 * c) : (half_t)0;
        store_shared2(Tile::address(to, r, c / 8) + 2 * (c % 8), x);
    }
}
