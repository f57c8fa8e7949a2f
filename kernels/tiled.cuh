// tiled.cuh: rows of 16-bit elements in global memory as score_sm90.cu's shared memory holds them: chunks of 64 rows, in
// them 64 columns after 64, rows of 128 bytes whose 16-byte pieces are permuted by row % 8. One bulk copy fetches a chunk.
#pragma once

// Where element `d` of a row lies, in elements; `width` is a multiple of 64.
__device__ __forceinline__ long long tiled_place(long long row, int d, int width) {
    return (row / 64 * (width / 64) + d / 64) * 4096 + row % 64 * 64 + (d % 64 / 8 ^ (int)(row % 8)) * 8 + d % 8;
}

// Which row of its chunk a list's row is kept as, so that a lane of a product's accumulators finds 16 rows that follow one
// another in its columns 8 n + 2 (lane % 4) and the next.
__device__ __forceinline__ long long dealt_row(long long row) {
    return row / 64 * 64 + row % 16 / 2 * 8 + row % 64 / 16 * 2 + row % 2;
}

// Rows, whole chunks of them, of an order head's `segments` lists of `per_list`.
__device__ __forceinline__ int tiled_rows(int segments, int per_list) { return (segments * per_list + 63) / 64 * 64; }
