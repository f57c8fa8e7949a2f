// emulation.h: runs a CUDA kernel without tensor-core instructions on a CPU, one fiber for each thread of a block.
// A fiber runs until it reaches a barrier or a warp collective; `reversed` runs the threads of a block in the opposite
// order, so that a missing barrier shows as a difference. Blocks run one after the other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define S2O_EMULATION 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)
#define __shared__ static

struct dim3 { unsigned int x, y, z; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned int x, y; };
struct uint4 { unsigned int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }

static inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

namespace s2o_emulation {
struct Copy {
    unsigned int to;  // in dynamic shared memory
    const char* from;
    int bytes;
};
struct Thread {
    ucontext_t context;  // to begin with; from then on it goes on at `place`: unlike swapcontext, without a system call
    jmp_buf place;
    std::vector<char> stack;
    dim3 index;
    int arrived = 0;       // barriers of the block passed
    int warp_arrived = 0;  // collectives of the warp passed
    bool begun = false, done = false;
    std::vector<std::vector<Copy>> copies;  // groups of asynchronous copies in flight, the last one open
};
// Threads that meet: how many are not done, how many of them have come to the next meeting, how many meetings there were.
struct Meeting {
    int live = 0, came = 0, passed = 0;
    void pass_if_all() {
        if (live && came == live) came = 0, ++passed;
    }
};
static std::vector<Thread> threads;
static Thread* current;
static jmp_buf scheduler;
static Meeting block_meeting, warp_meetings[64];
static dim3 block_index, grid_size, block_size;
static std::vector<char> dynamic_shared;
static std::function<void()> body;
static int block_votes[2], block_counts[2];
static unsigned int lanes[2][64][32];
static double wide_lanes[2][64][32];

static __attribute__((noinline)) void yield() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
static inline int warp() { return current->index.x / 32; }

static void enter() {
    body();
    current->done = true;
    for (Meeting* meeting : {&block_meeting, &warp_meetings[warp()]}) --meeting->live, meeting->pass_if_all();
    _longjmp(scheduler, 1);
}

// All live threads of the block, or of the warp, have come as far as the current one.
static inline void wait(Meeting& meeting, int mine) {
    ++meeting.came;
    meeting.pass_if_all();
    while (meeting.passed < mine) yield();
}
static inline void wait_block() { wait(block_meeting, ++current->arrived); }
static inline void wait_warp() { wait(warp_meetings[warp()], ++current->warp_arrived); }

static int vote_sum(int x) {
    static int values[2][2048];
    const int slot = current->arrived & 1;
    values[slot][current->index.x] = x;
    wait_block();
    int sum = 0;
    for (int i = 0; i < (int)threads.size(); ++i) sum += values[slot][i];
    return sum;
}

template <typename T>
static T exchange(T x, int source) {
    const int slot = current->warp_arrived & 1;
    wide_lanes[slot][warp()][current->index.x % 32] = (double)x;
    wait_warp();
    return (T)wide_lanes[slot][warp()][source & 31];
}

static void run(dim3 grid, int block, int shared_bytes, int reversed, std::function<void()> kernel) {
    body = kernel, grid_size = grid, block_size = {(unsigned int)block, 1, 1};
    dynamic_shared.assign(shared_bytes + 64, (char)0xcd);
    for (unsigned int z = 0; z < grid.z; ++z)
        for (unsigned int y = 0; y < grid.y; ++y)
            for (unsigned int x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                threads.resize(block);
                block_meeting = {block};
                for (int w = 0; w < (block + 31) / 32; ++w) warp_meetings[w] = {std::min(32, block - 32 * w)};
                for (int i = 0; i < block; ++i) {
                    Thread& t = threads[i];
                    t.index = {(unsigned int)i, 0, 0}, t.arrived = t.warp_arrived = 0, t.begun = t.done = false, t.copies.clear();
                    t.stack.resize(1 << 16);
                    getcontext(&t.context);
                    t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size();
                    makecontext(&t.context, enter, 0);
                }
                for (bool live = true; live;) {
                    live = false;
                    for (int i = 0; i < block; ++i) {
                        Thread& t = threads[reversed ? block - 1 - i : i];
                        if (t.done) continue;
                        live = true, current = &t;
                        if (_setjmp(scheduler)) continue;
                        if (t.begun) _longjmp(t.place, 1);
                        t.begun = true;
                        setcontext(&t.context);
                    }
                }
            }
}

static inline float half_to_float(unsigned short x, int is_bf16) {
    if (is_bf16) {
        const unsigned int bits = (unsigned int)x << 16;
        float y;
        memcpy(&y, &bits, 4);
        return y;
    }
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
}
static inline unsigned short float_to_half(float x, int is_bf16) {
    unsigned short y;
    if (is_bf16) {
        unsigned int bits;
        memcpy(&bits, &x, 4);
        if (x != x) return 0x7fff;
        return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    const _Float16 h = (_Float16)x;
    memcpy(&y, &h, 2);
    return y;
}
}  // namespace s2o_emulation

#define threadIdx (s2o_emulation::current->index)
#define blockIdx s2o_emulation::block_index
#define gridDim s2o_emulation::grid_size
#define blockDim s2o_emulation::block_size

static inline void __syncthreads() { s2o_emulation::wait_block(); }
static inline int __syncthreads_count(int x) { return s2o_emulation::vote_sum(x != 0); }
static inline int __syncthreads_or(int x) { return s2o_emulation::vote_sum(x != 0) != 0; }
static inline void __syncwarp() { s2o_emulation::wait_warp(); }
template <typename T>
static inline T __shfl_xor_sync(unsigned int, T x, int mask) { return s2o_emulation::exchange(x, s2o_emulation::current->index.x % 32 ^ mask); }
template <typename T>
static inline T __shfl_sync(unsigned int, T x, int source) { return s2o_emulation::exchange(x, source); }
template <typename T>
static inline T __shfl_up_sync(unsigned int, T x, int step) {
    const int lane = s2o_emulation::current->index.x % 32;
    return s2o_emulation::exchange(x, lane >= step ? lane - step : lane);
}
static inline void mma_double(double (&c)[2], double a, double b) {
    const int lane = s2o_emulation::current->index.x % 32;
    for (int k = 0; k < 4; ++k) {
        const double x = s2o_emulation::exchange(a, lane / 4 * 4 + k);
        for (int i = 0; i < 2; ++i) c[i] += x * s2o_emulation::exchange(b, (2 * (lane % 4) + i) * 4 + k);
    }
}
static inline unsigned int __match_any_sync(unsigned int, unsigned int x) {
    auto& me = *s2o_emulation::current;
    const int slot = me.warp_arrived & 1, warp = s2o_emulation::warp();
    s2o_emulation::lanes[slot][warp][me.index.x % 32] = x;
    s2o_emulation::wait_warp();
    unsigned int peers = 0;
    for (int i = 0; i < 32; ++i) peers |= (unsigned int)(s2o_emulation::lanes[slot][warp][i] == x) << i;
    return peers;
}
static inline unsigned int __ballot_sync(unsigned int, bool x) {
    auto& me = *s2o_emulation::current;
    const int slot = me.warp_arrived & 1, warp = s2o_emulation::warp();
    s2o_emulation::lanes[slot][warp][me.index.x % 32] = x;
    s2o_emulation::wait_warp();
    unsigned int votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (s2o_emulation::lanes[slot][warp][i] & 1) << i;
    return votes;
}
static inline bool __all_sync(unsigned int mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

static inline bool __any_sync(unsigned int mask, bool x) { return __ballot_sync(mask, x) != 0; }
static inline int __reduce_min_sync(unsigned int, int x) {
    for (int step = 1; step < 32; step *= 2) x = std::min(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
static inline int __reduce_max_sync(unsigned int mask, int x) { return -__reduce_min_sync(mask, -x); }
template <typename T>
static inline T __ldg(const T* p) { return *p; }
template <typename T>
static inline T atomicAnd(T* p, T x) {
    const T old = *p;
    *p &= x;
    return old;
}

template <typename T>
static inline T atomicAdd(T* p, T x) {
    const T old = *p;
    *p += x;
    return old;
}
template <typename T>
static inline T atomicOr(T* p, T x) {
    const T old = *p;
    *p |= x;
    return old;
}
static inline float __int_as_float(unsigned int x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned int x) { return __int_as_float(x); }
static inline unsigned int __float_as_uint(float x) { unsigned int y; memcpy(&y, &x, 4); return y; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline int __popc(unsigned int x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
