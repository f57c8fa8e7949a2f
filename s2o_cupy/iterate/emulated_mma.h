// emulated_mma.h: what mma.cuh offers, on the CPU: matrices and products exchanged between the fibers of a warp, and
// asynchronous copies that arrive no sooner than they are waited for. Shared addresses count from dynamic shared memory.
#pragma once

namespace s2o_emulation {
static unsigned int fragments[2][64][32][6];

static inline char* shared(unsigned int address) {
    if (address + 16 > dynamic_shared.size()) fprintf(stderr, "shared address %u of %zu\n", address, dynamic_shared.size()), abort();
    return dynamic_shared.data() + address;
}
static inline std::vector<std::vector<Copy>>& my_copies() {
    if (current->copies.empty()) current->copies.emplace_back();
    return current->copies;
}

// Every lane's `n` registers, to all lanes.
static inline unsigned int (*gather_lanes(const unsigned int* mine, int n))[6] {
    const int slot = current->warp_arrived & 1;
    auto& all = fragments[slot][warp()];
    for (int i = 0; i < n; ++i) all[current->index.x % 32][i] = mine[i];
    wait_warp();
    return all;
}

static inline void read_matrices(unsigned int (&r)[4], unsigned int address, bool transposed) {
    auto all = gather_lanes(&address, 1);
    const int lane = current->index.x % 32;
    for (int m = 0; m < 4; ++m) {
        unsigned short pair[2];
        for (int i = 0; i < 2; ++i) {
            const int row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
            memcpy(pair + i, shared(all[8 * m + row][0]) + 2 * column, 2);
        }
        r[m] = pair[0] | (unsigned int)pair[1] << 16;
    }
    wait_warp();
}

static inline void multiply(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1, int is_bf16) {
    const unsigned int mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    auto all = gather_lanes(mine, 6);
    const int lane = current->index.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const unsigned int x = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], y = all[column * 4 + k % 8 / 2][4 + k / 8];
            sum += (double)half_to_float((unsigned short)(x >> 16 * (k % 2)), is_bf16) * half_to_float((unsigned short)(y >> 16 * (k % 2)), is_bf16);
        }
        c[i] = (float)sum;
    }
    wait_warp();
}
}  // namespace s2o_emulation

static inline unsigned int shared_address(const void* p) { return (unsigned int)((const char*)p - s2o_emulation::dynamic_shared.data()); }
static inline void load_matrices(unsigned int (&r)[4], unsigned int address) { s2o_emulation::read_matrices(r, address, false); }
static inline void load_matrices_transposed(unsigned int (&r)[4], unsigned int address) { s2o_emulation::read_matrices(r, address, true); }
static inline void mma(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    s2o_emulation::multiply(c, a, b0, b1, IS_BF16);
}
static inline void mma_bfloat16(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    s2o_emulation::multiply(c, a, b0, b1, 1);
}
static inline void mma_from_zero(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    mma(c, a, b0, b1);
}
static inline void copy16_async(unsigned int to, const void* from) { s2o_emulation::my_copies().back().push_back({to, (const char*)from, 16}); }
static inline void copy4_async(unsigned int to, const void* from) { s2o_emulation::my_copies().back().push_back({to, (const char*)from, 4}); }
static inline void commit_copies() { s2o_emulation::my_copies().emplace_back(); }
template <int PENDING>
static inline void wait_copies() {
    auto& mine = s2o_emulation::my_copies();
    while ((int)mine.size() > PENDING + 1) {
        for (auto& copy : mine.front()) memcpy(s2o_emulation::shared(copy.to), copy.from, copy.bytes);
        mine.erase(mine.begin());
    }
}
static inline void load_shared16(unsigned int (&x)[4], unsigned int address) { memcpy(x, s2o_emulation::shared(address), 16); }
static inline unsigned int load_shared4(unsigned int address) {
    unsigned int x;
    memcpy(&x, s2o_emulation::shared(address), 4);
    return x;
}
static inline float2 load_shared_pair(unsigned int address) {
    float2 x;
    memcpy(&x, s2o_emulation::shared(address), 8);
    return x;
}
static inline void zero_shared16(unsigned int address) { memset(s2o_emulation::shared(address), 0, 16); }
static inline void store_shared4(unsigned int address, unsigned int x) { memcpy(s2o_emulation::shared(address), &x, 4); }
static inline void store_shared2(unsigned int address, half_t x) { memcpy(s2o_emulation::shared(address), &x, 2); }
