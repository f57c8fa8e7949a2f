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
    int phase, start, count;
    bool closes;  // the last step of a logical key tile (and every step outside the history)
};

__device__ __forceinline__ Step step_at(const Walk& walk, int phase, int start, int size) {
    if (phase == SEEN_WINDOW) {
        if (walk.window_first + start < walk.masked_first)
            return {SEEN_WINDOW, walk.window_first + start, min(size, walk.masked_first - walk.window_first - start), true};
        phase = HISTORY, start = 0;
    }
    if (phase == HISTORY) {
        if (start < walk.listed) {
            const int stop = min((start / walk.block_k + 1) * walk.block_k, walk.listed);
            return {HISTORY, start, min(size, stop - start), start + size >= stop};
        }
        phase = TAIL, start = 0;
    }
    if (phase == TAIL) {
        if (start < walk.pool_blocks) return {TAIL, start, min(size, walk.pool_blocks - start), true};
        phase = MASKED_WINDOW, start = 0;
    }
    if (phase == MASKED_WINDOW && walk.masked_first + start < walk.masked_stop)
        return {MASKED_WINDOW, walk.masked_first + start, min(size, walk.masked_stop - walk.masked_first - start), true};
    return {DONE, 0, 0, true};
}

__device__ __forceinline__ Step step_after(const Walk& walk, const Step& step, int size) {
    const int base = step.phase == SEEN_WINDOW ? walk.window_first : step.phase == MASKED_WINDOW ? walk.masked_first : 0;
    return step_at(walk, step.phase, step.start - base + step.count, size);
}
