// emulated_barriers.h: memory barriers on the CPU (8 bytes: arrivals wanted, arrivals missing, phases passed) make fibers wait.
#pragma once

namespace s2o_emulation {
struct Barrier {
    unsigned short wanted, missing;
    unsigned int phase;
};
static inline Barrier* barrier_at(unsigned int address) { return (Barrier*)shared(address); }
}  // namespace s2o_emulation

static inline void barrier_init(unsigned int barrier, int count) { *s2o_emulation::barrier_at(barrier) = {(unsigned short)count, (unsigned short)count, 0}; }
static inline void barrier_arrive(unsigned int barrier) {
    auto* b = s2o_emulation::barrier_at(barrier);
    if (--b->missing == 0) b->missing = b->wanted, ++b->phase;
}
static inline void barrier_wait(unsigned int barrier, int parity) {
    while ((int)(s2o_emulation::barrier_at(barrier)->phase & 1) == parity) s2o_emulation::yield();
}
static inline void async_fence() {}
