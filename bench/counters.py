"""What limits the kernels: hardware counters of one launch each, by Nsight Compute, as a table.

`python -m bench.counters [CSV]` runs itself under `ncu` (clocks left as they are) and prints a row a launch; what `ncu`
wrote goes to CSV. Needs a Hopper GPU that lets its counters be read.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis")
KERNELS = "regex:attend_sm90|factor|moments|score|remap"
STALLS = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {  # heading: metric
    "ms": "gpu__time_duration.sum",
    "GHz": "gpc__cycles_elapsed.avg.per_second",
    "tensor %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials %": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "eligible warps": "smsp__warps_eligible.avg.per_cycle_active",
    "shared, L1 %": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hit %": "lts__t_sector_hit_rate.pct",
    "DRAM %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
WAITS = ("wait", "gmma", "long_scoreboard", "short_scoreboard", "barrier", "no_instruction", "math_pipe_throttle")
WAITS += ("mio_throttle", "lg_throttle", "dispatch_stall", "branch_resolving", "membar", "sleeping", "selected")
WAITS += ("not_selected",)


def launches() -> None:
    """Everything that is profiled, each launch once before; LABELS names the attend launches in their order."""
    import cupy

    import s2o_cupy as s2o
    from bench import ours, workloads
    from s2o_cupy.backends import cuda
    from s2o_cupy.problem import make_problem

    def profiled(call, *arguments):
        call(*arguments)
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.profiler.start()
        call(*arguments)
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.profiler.stop()

    def attend(q, k, v, settings):
        p = make_problem(q, k, v, settings)
        offsets, order = ours.lists(p)
        cuda.rank(p, q, k, p.whole, offsets, order)
        result = ours.answer(p, q)
        profiled(cuda.attend, p, q, k, v, p.whole, order, offsets, None, cuda.pool(p, k, v), result)
        print(f"density {ours.computed(p, result)[0]:.4f}", file=sys.stderr)

    for dim in (128, 256):
        arrays = [x[None] for x in workloads.make("diffuse", 131072, heads_q=8, heads_kv=2, dim=dim, xp=cupy)]
        attend(*arrays, ours.S512.replace(rank="mean"))
        if dim == 128:
            attend(*arrays, ours.S64)
        profiled(s2o.dense_attention, *(x[:, :, :32768] for x in arrays))
        p = make_problem(*arrays, ours.S512)
        offsets, order = ours.lists(p)
        profiled(cuda.rank, p, *arrays[:2], p.whole, offsets, order)


LABELS = (
    "attend, 128K, S=512, tau 1e-2",
    "attend, 128K, S=64 side by side, tau 1e-2",
    "dense, 32K",
    "attend, D=256, 128K, S=512, tau 1e-2",
    "dense, D=256, 32K",
)


def table(text: str) -> str:
    """Rows of what `ncu --csv --page raw` wrote: a line a launch, then its waits."""
    lines = text[text.index('"ID"') :].splitlines()
    rows = list(csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"')))))
    units, rows, labels = rows[0], rows[1:], iter(LABELS)

    def number(row, names):
        name = next((n for n in names if row.get(n)), None)
        if name is None:
            return "-"
        value = float(row[name].replace(",", ""))
        scale = {"nsecond": 1e-6, "ns": 1e-6, "usecond": 1e-3, "us": 1e-3, "second": 1e3, "s": 1e3, "hz": 1e-9}
        return f"{value * scale.get(units[name], 1):.4g}"

    out = ["| launch | " + " | ".join(COLUMNS) + " | warp-cycles an instruction, by what they wait for |"]
    out.append("| --- " * (len(COLUMNS) + 2) + "|")
    for row in rows:
        name = row["Kernel Name"].split("(")[0]
        label = f"{name}: {next(labels)}" if name == "attend_sm90" else name
        waits = {w: number(row, [STALLS.format(w), STALLS.format(w.replace("resolving", "resolve"))]) for w in WAITS}
        most = sorted((w for w in waits if waits[w] != "-"), key=lambda w: -float(waits[w]))[:7]
        cells = [number(row, [metric]) for metric in COLUMNS.values()]
        out.append(f"| {label} | {' | '.join(cells)} | {', '.join(f'{w} {waits[w]}' for w in most)} |")
    return "\n".join(out)


def main() -> None:
    """Profile, and print the table."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "-k", KERNELS, "--csv", "--page", "raw"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, "-m", "bench.counters", "--launches"]
    path = sys.argv[1] if len(sys.argv) > 1 else os.devnull
    found = subprocess.run(command, capture_output=True, text=True)
    Path(path).write_text(found.stdout)
    print(found.stderr[-2000:])
    print(table(found.stdout))


if __name__ == "__main__":
    launches() if sys.argv[1:] == ["--launches"] else main()
