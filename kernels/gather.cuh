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
    const half_t* data;
    long long stride;  // elements from row to row
    int width;         // elements of a row; the tile's columns beyond it are zero
    bool aligned;      // every row starts on 16 bytes
};

// Starts the copy of the TILE_ROWS rows that `index` (in shared memory) names, by all THREADS of the block. Rows
// below 0, and columns past the width, become zero. A lane group reads 64 or 128 contiguous bytes of a row.
template <int COLUMNS, int TILE_ROWS, int THREADS>
__device__ __forceinline__ void load_rows(unsigned int to, const Rows& rows, const int* index) {
    typedef SharedTile<COLUMNS> Tile;
    constexpr int LANES = Tile::CHUNKS % 8 == 0 ? 8 : 4;
    const int width = rows.width;
    const long long stride = rows.stride;
    if (rows.aligned) {
        const int first = threadIdx.x / LANES, column = threadIdx.x % LANES;
        const half_t* data = rows.data + 8 * column;
        to = Tile::address(to, first, column);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r += THREADS / LANES) {
            if (TILE_ROWS % (THREADS / LANES) && first + r >= TILE_ROWS) break;
            const int row = index[first + r];
            const half_t* from = data + max(row, 0) * stride;
#pragma unroll
            for (int c = 0; c < Tile::CHUNKS; c += LANES) {
                const int valid = row < 0 ? 0 : max(0, min(8, width - 8 * (column + c)));
                copy16_async(to + 16 * (r * Tile::CHUNKS + c), valid ? from + 8 * c : data, 2 * valid);
            }
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE_ROWS * COLUMNS; i += THREADS) {  // views that start off 16 bytes: one by one
        const int r = i / COLUMNS, c = i % COLUMNS, row = index[r];
        const half_t x = row >= 0 && c < width ? rows.data[row * stride + c] : (half_t)0;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(Tile::address(to, r, c / 8) + 2 * (c % 8)), "h"(x) : "memory");
    }
}
