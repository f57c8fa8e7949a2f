// emulated_attend.h: what attend_sm90.cu asks of Hopper, on the CPU. Products are done at once; named barriers and memory
// barriers make fibers wait.
#pragma once
#include "emulated_barriers.h"

namespace s2o_emulation {
struct NamedBarrier {
    int arrived = 0, sum = 0, last = 0, phase = 0;
};
static NamedBarrier named[16];

static inline NamedBarrier& barrier_named(int id) {
    static unsigned int block = ~0u;
    if (block != block_index.x) block = block_index.x, std::fill(named, named + 16, NamedBarrier());  // a block may leave some half full
    return named[id];
}
// A named barrier of `count` threads; the sum of what they bring.
static inline void arrive(int id, int count, int x) {
    NamedBarrier& b = barrier_named(id);
    b.sum += x;
    if (++b.arrived == count) b.last = b.sum, b.arrived = b.sum = 0, ++b.phase;
}
static inline int meet(int id, int count, int x) {
    const int phase = barrier_named(id).phase;
    arrive(id, count, x);
    while (named[id].phase == phase) yield();
    return named[id].last;
}
static inline float element(unsigned long long descriptor, int row_bytes_group, int row, int column_bytes) {
    unsigned int address = ((unsigned int)(descriptor & 0x3fff) << 4) + row / 8 * row_bytes_group + row % 8 * 128 + column_bytes;
    address ^= (address >> 7 & 7) << 4;
    unsigned short y;
    memcpy(&y, shared(address & ~15u) + (address & 15), 2);
    return half_to_float(y, IS_BF16);
}
}  // namespace s2o_emulation

static inline unsigned int descriptor_low(unsigned int address, int leading) { return (address & 0x3ffff) >> 4 | (leading == 1 ? 1u : (unsigned int)leading >> 4) << 16; }
static inline unsigned long long matrix_descriptor(unsigned int low, int group) { return (unsigned long long)(1u << 30 | group >> 4) << 32 | low; }
static inline void barrier_arrive_after_copies(unsigned int barrier) {
    commit_copies();
    wait_copies<0>();
    barrier_arrive(barrier);
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {}
template <int PENDING>
static inline void wgmma_wait() { s2o_emulation::wait_warp(); }
template <int COUNT>
static inline void settle(float (&)[COUNT]) {}

template <bool ADD, int COUNT>
static inline void wgmma_rows(float (&c)[COUNT], unsigned long long a, unsigned long long b) {
    using namespace s2o_emulation;
    const int lane = current->index.x % 32, first = current->index.x / 32 % 4 * 16 + lane / 4;
    float x[2][16];
    for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 16; ++k) x[h][k] = element(a, 1024, first + 8 * h, 2 * k);
    for (int j = 0; j < COUNT / 4; ++j)
        for (int e = 0; e < 2; ++e) {
            double sum[2] = {0, 0};
            for (int k = 0; k < 16; ++k) {
                const double y = element(b, 1024, 8 * j + 2 * (lane % 4) + e, 2 * k);
                for (int h = 0; h < 2; ++h) sum[h] += x[h][k] * y;
            }
            for (int h = 0; h < 2; ++h) {
                float& to = c[4 * j + 2 * h + e];
                to = (float)((ADD ? to : 0) + sum[h]);
            }
        }
    wait_warp();
}
template <int COUNT>
static inline void wgmma_columns(float (&c)[COUNT], const unsigned int (&a)[4], unsigned long long b) {
    using namespace s2o_emulation;
    const int lane = current->index.x % 32;
    const unsigned int leading = (unsigned int)(b >> 16 & 0x3fff) << 4;
    auto all = gather_lanes(a, 4);
    float x[2][16];
    for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 16; ++k) x[h][k] = half_to_float((unsigned short)(all[lane / 4 * 4 + k % 8 / 2][h + 2 * (k / 8)] >> 16 * (k % 2)), IS_BF16);
    for (int j = 0; j < COUNT / 4; ++j)
        for (int e = 0; e < 2; ++e) {
            const int column = 8 * j + 2 * (lane % 4) + e;
            double sum[2] = {0, 0};
            for (int k = 0; k < 16; ++k) {
                unsigned int address = ((unsigned int)(b & 0x3fff) << 4) + column / 64 * leading + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2;
                address ^= (address >> 7 & 7) << 4;
                unsigned short raw;
                memcpy(&raw, shared(address & ~15u) + (address & 15), 2);
                const double y = half_to_float(raw, IS_BF16);
                for (int h = 0; h < 2; ++h) sum[h] += x[h][k] * y;
            }
            for (int h = 0; h < 2; ++h) c[4 * j + 2 * h + e] = (float)(c[4 * j + 2 * h + e] + sum[h]);
        }
    wait_warp();
}

static inline void await_turn(int warpgroup) { s2o_emulation::meet(4 + warpgroup, 256, 0); }
static inline void pass_turn(int warpgroup) { s2o_emulation::arrive(5 - warpgroup, 256, 0); }
static inline void consumers_sync() { s2o_emulation::meet(6, 256, 0); }
static inline void producers_sync() { s2o_emulation::meet(1, 128, 0); }
static inline void warpgroup_sync(int warpgroup) { s2o_emulation::meet(2 + warpgroup, 128, 0); }
static inline int warpgroup_count(int warpgroup, bool x) { return s2o_emulation::meet(2 + warpgroup, 128, x); }
static inline bool any_producer(bool x) { return s2o_emulation::meet(1, 128, x) != 0; }
static inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
static inline int thread_here() { return threadIdx.x & 127; }
static inline unsigned int not_finite(unsigned int (&x)[4], unsigned int seen) {
    for (unsigned int pair : x)
        if (!halves_are_finite(pair)) seen = 0x7fffffff;
    return seen;
}
static inline void load_chunk(unsigned int (&x)[4], unsigned int address) { load_shared16(x, address); }
static inline void load_global_chunk(unsigned int (&x)[4], const half_t* from) { memcpy(x, from, 16); }
static inline void store_chunk(half_t* to, const unsigned int (&x)[4]) { memcpy(to, x, 16); }
template <int REGISTERS>
static inline void take_registers() {}
template <int REGISTERS>
static inline void give_registers() {}
