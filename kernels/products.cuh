// products.cuh: the two matrix products of attention for one warp, by mma.sync from swizzled shared tiles. A warp has
// M_TILES of 16 query rows, and N_TILES of 8 keys a step.
#pragma once
#include "gather.cuh"

// Both products read their matrices AHEAD steps before they multiply with them: shared memory answers late.
constexpr int AHEAD = 1;

// s (raw dot products) = q k^T of one key tile, for the warp's rows.
template <int COLUMNS, int M_TILES, int N_TILES>
__device__ __forceinline__ void multiply_qk(float (&s)[M_TILES][N_TILES][4], unsigned int q, unsigned int k, int warp_row) {
    typedef SharedTile<COLUMNS> KeyTile;
    const int lane = threadIdx.x & 31;
    constexpr int PAIRS = N_TILES / 2, STEPS = COLUMNS / 16 * PAIRS;
    q = KeyTile::address(q, warp_row + (lane & 15), lane >> 4);
    k = KeyTile::address(k, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    unsigned int a[2][M_TILES][4], b[AHEAD + 1][4];
#pragma unroll
    for (int step = 0; step < STEPS + AHEAD; ++step) {
        if (step < STEPS) {
            const int d = step / PAIRS, n = step % PAIRS;
            if (n == 0)
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) load_matrices(a[d % 2][m], KeyTile::from(q, 16 * m, 2 * d));
            load_matrices(b[step % (AHEAD + 1)], KeyTile::from(k, 16 * n, 2 * d));
        }
        if (step < AHEAD) continue;
        const int now = step - AHEAD, d = now / PAIRS, n = now % PAIRS * 2;
        const unsigned int(&x)[4] = b[now % (AHEAD + 1)];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            if (d == 0) mma_from_zero(s[m][n], a[0][m], x[0], x[1]), mma_from_zero(s[m][n + 1], a[0][m], x[2], x[3]);
            else mma(s[m][n], a[d % 2][m], x[0], x[1]), mma(s[m][n + 1], a[d % 2][m], x[2], x[3]);
        }
    }
}

// o += p v, p in the layout of the products' accumulators.
template <int M_TILES, int N_TILES, int V_TILES>
__device__ __forceinline__ void multiply_pv(
    float (&o)[M_TILES][V_TILES][4], const unsigned int (&p)[M_TILES][N_TILES][2], unsigned int v) {
    typedef SharedTile<8 * V_TILES> ValueTile;
    const int lane = threadIdx.x & 31;
    constexpr int PAIRS = V_TILES / 2, STEPS = N_TILES / 2 * PAIRS;
    v = ValueTile::address(v, lane & 15, lane >> 4);
    unsigned int b[AHEAD + 1][4];
#pragma unroll
    for (int step = 0; step < STEPS + AHEAD; ++step) {
        if (step < STEPS) load_matrices_transposed(b[step % (AHEAD + 1)], ValueTile::from(v, step / PAIRS * 16, step % PAIRS * 2));
        if (step < AHEAD) continue;
        const int now = step - AHEAD, n = now / PAIRS * 2, d = now % PAIRS * 2;
        const unsigned int(&x)[4] = b[now % (AHEAD + 1)];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            const unsigned int a[4] = {p[m][n][0], p[m][n][1], p[m][n + 1][0], p[m][n + 1][1]};
            mma(o[m][d], a, x[0], x[1]);
            mma(o[m][d + 1], a, x[2], x[3]);
        }
    }
}
