// emulated_wgmma.h: what score_sm90.cu asks of Hopper, on the CPU. A warp multiplies its own 16 of the warpgroup's rows;
// bulk copies arrive at once; memory barriers make fibers wait.
#pragma once

#include "emulated_barriers.h"

namespace s2o_emulation {
static int multipliers_arrived[2048];
}  // namespace s2o_emulation

static inline void copy_bulk(unsigned int to, const void* from, int bytes, unsigned int barrier) {
    s2o_emulation::shared(to + bytes - 16);
    memcpy(s2o_emulation::shared(to), from, bytes);
    barrier_arrive(barrier);
}
static inline void multipliers_sync() {
    using namespace s2o_emulation;
    const int mine = ++multipliers_arrived[current->index.x];
    for (bool all = false; !all;) {
        all = true;
        for (int i = 0; i < THREADS; ++i) all = all && multipliers_arrived[i] >= mine;
        if (!all) yield();
    }
}
static inline void wgmma_fence() {}
static inline void wgmma_finish(float (&)[32]) {}

template <bool ADD>
static inline void wgmma(float (&c)[32], const unsigned int (&a)[4], unsigned long long b) {
    using namespace s2o_emulation;
    const unsigned int start = (unsigned int)(b & 0x3fff) << 4, group = (unsigned int)(b >> 32 & 0x3fff) << 4;
    auto all = gather_lanes(a, 4);
    const int lane = current->index.x % 32;
    for (int i = 0; i < 32; ++i) {
        const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        double sum = ADD ? c[i] : 0;
        for (int k = 0; k < 16; ++k) {
            const unsigned int x = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            unsigned int address = start + column / 8 * group + column % 8 * 128 + 2 * k;
            address ^= (address >> 7 & 7) << 4;
            unsigned short y;
            memcpy(&y, shared(address), 2);
            sum += (double)half_to_float((unsigned short)(x >> 16 * (k % 2)), IS_BF16) * half_to_float(y, IS_BF16);
        }
        c[i] = (float)sum;
    }
    wait_warp();
}
