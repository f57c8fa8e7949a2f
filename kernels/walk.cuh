// walk.cuh: the order in which a row tile meets its keys: seen window, ranked history, pooled tail, masked window.
#pragma once

enum Phase { SEEN_WINDOW = 0, HISTORY = 1, TAIL = 2, MASKED_WINDOW = 3, DONE = 4 };

// What one row tile walks. Counts are keys; `masked` ones may be hidden from some rows.
struct Walk {
    int window_first, masked_first, masked_stop;  // the seen window is [window_first, masked_first)
    int listed, block_k;                          // ranked keys, and keys of a logical key tile
    int pool_blocks;                              // 0: no tail
};

// A step: at most `size` keys of one phase, never past the end of a logical key tile.
struct Step {
    int phase, start, count, tile_stop;
    // The last step of a logical key tile; every step outside the history is one.
    __device__ __forceinline__ bool closes() const { return start + count == tile_stop; }
};

// The first step of a phase, or of the next one that has keys.
__device__ __forceinline__ Step first_step(const Walk& walk, int phase, int size) {
    if (phase <= SEEN_WINDOW && walk.window_first < walk.masked_first) {
        const int count = min(size, walk.masked_first - walk.window_first);
        return {SEEN_WINDOW, walk.window_first, count, walk.window_first + count};
    }
    if (phase <= HISTORY && walk.listed) {
        const int stop = min(walk.block_k, walk.listed);
        return {HISTORY, 0, min(size, stop), stop};
    }
    if (phase <= TAIL && walk.pool_blocks) {
        const int count = min(size, walk.pool_blocks);
        return {TAIL, 0, count, count};
    }
    if (phase <= MASKED_WINDOW && walk.masked_first < walk.masked_stop) {
        const int count = min(size, walk.masked_stop - walk.masked_first);
        return {MASKED_WINDOW, walk.masked_first, count, walk.masked_first + count};
    }
    return {DONE, 0, 0, 0};
}

__device__ __forceinline__ Step step_after(const Walk& walk, const Step& step, int size) {
    const int start = step.start + step.count;
    if (step.phase == HISTORY) {
        if (start == walk.listed) return first_step(walk, TAIL, size);
        const int stop = start == step.tile_stop ? min(start + walk.block_k, walk.listed) : step.tile_stop;
        return {HISTORY, start, min(size, stop - start), stop};
    }
    const int end = step.phase == TAIL ? walk.pool_blocks : step.phase == SEEN_WINDOW ? walk.masked_first : walk.masked_stop;
    if (step.phase == DONE || start == end) return first_step(walk, step.phase + 1, size);
    const int count = min(size, end - start);
    return {step.phase, start, count, start + count};
}
