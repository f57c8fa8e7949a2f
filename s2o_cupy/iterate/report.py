"""Verdict: what became of a variant, as text, as a table in Jupyter, and as a line of the history."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

from s2o_cupy import reprs
from s2o_cupy.variants import LABEL, Variant

_MESSAGE = re.compile(rf"^{LABEL}(?:\((\d+)\)|:(\d+):\d+): (?:(?:catastrophic )?error|fatal error)\s?:?\s*(.*)")


@dataclass
class Verdict:
    """What became of one variant.

    Attributes
    ----------
    name, kind : the kernel, and "cuda" or "numba"
    variant : the `Variant`, as `use_kernel` takes it
    against : what it was timed against
    status : "right", "wrong", "compiled" (neither checked nor timed; a twin: "read"), "timed" or "failed"
    failure : why it failed, or empty
    launched : registers, memory and occupancy of its kernels as the check launched them, on a GPU
    cases : one dict a case of the check: label, worst element, seconds
    timing : medians, ratio with its spread, launches, floor; None where not timed
    seconds : from the change to the verdict
    """

    name: str
    kind: str
    variant: Variant
    against: str
    seconds: float
    printed: str = ""
    failure: str = ""
    where: str = ""
    compiled: dict | None = None
    launched: list[dict] = field(default_factory=list)
    cases: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timing: dict | None = None
    sanitized: dict | None = None
    number: int = 0

    @classmethod
    def made(cls, name, kind, variant, against, events, printed, seconds) -> Verdict:
        """The verdict that a worker's events make."""
        v, at = cls(name, kind, variant, against, seconds, _printable(printed)), ""
        for event in events:
            what = event.pop("event")
            if what == "compiled":
                v.compiled = event
            elif what == "case":
                at, v.where = event["label"], event["where"]
            elif what == "checked":
                v.cases.append(event)
            elif what == "launched":
                v.launched = event["kernels"]
            elif what == "note":
                v.notes.append(event["message"])
            elif what == "timed":
                v.timing = event
            elif what == "sanitized":
                v.sanitized = event
            elif what == "error":
                v.failure = v._failed(event["what"], event["message"], at)
            elif what == "hung":
                ended = "" if event["ended"] else " The driver has not let it go yet: the GPU may stay busy."
                place = f"in the case '{at}'" if at else "in compiling"
                v.failure = f"hung: no answer {place} for {event['seconds']:g} s. Its process was killed.{ended}"
            elif what == "died":
                v.failure = f"its process died ({event['message']})" + (f" in the case '{at}'" if at else "")
        return v

    def _failed(self, what: str, message: str, at: str) -> str:
        message = _printable(message)
        if what == "compile" and at and self.kind == "numba":  # which compiles what a case launches
            return f"failed in the case '{at}'\n{message}"
        if what == "compile":
            return "does not compile\n" + _compiler_lines(message, self.variant.cell)
        if what == "device":
            place = f" in the case '{at}'" if at else ""
            return f"the device failed{place}: {message} (a bad address? --sanitize says where)"
        return message

    # --- judgement --------------------------------------------------------------------------------
    @property
    def worst(self) -> dict | None:
        """The case whose worst element uses the most of its allowance."""
        found = [c for c in self.cases if c["worst"] is not None]
        return max(found, key=lambda c: c["worst"]["share"], default=None)

    @property
    def used(self) -> list[dict]:
        """Its kernels' launches, in the long call where it was timed, else in the check; none without a GPU."""
        return self.timing["launches"] if self.timing else self.launched

    @property
    def wrong(self) -> list[dict]:
        """The cases that were not passed."""
        return [c for c in self.cases if c["past"] or (c["worst"] is not None and c["worst"]["share"] > 1)]

    @property
    def status(self) -> str:
        if self.failure:
            return "failed"
        if self.wrong or (self.sanitized and self.sanitizer_found):
            return "wrong"
        if self.cases:
            return "right"
        read = "read" if self.kind == "numba" else "compiled"  # a twin's kernels compile at their first launch
        return "timed" if self.timing else read if self.compiled else "not compiled"

    @property
    def sanitizer_found(self) -> bool:
        """Whether compute-sanitizer reported an error."""
        summary = next((x for x in self.sanitized["lines"] if "ERROR SUMMARY" in x or "SUMMARY" in x), "")
        return not re.search(r"\b0 (errors|hazards)", summary)

    # --- text -------------------------------------------------------------------------------------
    def __str__(self) -> str:
        return "\n".join([self.headline(), *(f"  {name:10s}{line}" for name, line in self.lines())])

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        rows = [(name, line) for name, line in self.lines()]
        body = "".join(
            f'<tr><td style="text-align:left;vertical-align:top">{html.escape(name)}</td>'
            f'<td style="text-align:left"><pre style="margin:0">{html.escape(line)}</pre></td></tr>'
            for name, line in rows
        )
        return f"<div><b>{html.escape(self.headline())}</b></div><table><tbody>{body}</tbody></table>"

    def headline(self) -> str:
        """The verdict in one line."""
        said = self.status
        if self.status == "failed":
            said = "failed; the shell goes on with the shipped kernel"
        elif self.status == "wrong":
            said = "WRONG"
        if self.timing:
            said += f", {self.speed()}"
        return f"{self.name}{'_numba' if self.kind == 'numba' else ''} #{self.number}: {said}"

    def speed(self) -> str:
        """The ratio of times and its spread; a difference inside the spread is no difference."""
        t = self.timing
        spread = f"({t['low']:.3f} to {t['high']:.3f})"
        if round(t["low"], 3) <= 1 <= round(t["high"], 3):
            return f"as fast as {self.against}: ratio {t['ratio']:.3f} {spread}"
        if t["ratio"] > 1:
            return f"{t['ratio']:.3f} times as fast as {self.against} {spread}"
        return f"{1 / t['ratio']:.3f} times the time of {self.against} ({1 / t['high']:.3f} to {1 / t['low']:.3f})"

    def lines(self) -> list[tuple[str, str]]:
        """What was found, as (name, text); continuation lines are indented to the text."""
        found = []
        if self.failure:
            found.append(("failure", self.failure))
        if self.compiled:
            read = ("read", f"{self.compiled['seconds']:.2f} s")
            found.append(read if self.kind == "numba" else ("compiled", self._compiled_line()))
        if self.cases:
            seconds = sum(c["seconds"] for c in self.cases)
            passed = len(self.cases) - len(self.wrong)
            found.append(("checked", f"{passed} of {len(self.cases)} cases right, {self.where}, {seconds:.2f} s"))
            for case in self.wrong[:3]:
                found += [("", f"wrong in '{case['label']}': {text}") for text in _faults(case)]
            if not self.wrong and self.worst:
                worst = self.worst["worst"]
                found.append(("worst", f"{worst['text']} ({worst['share']:.2f} of it used)"))
        if self.sanitized:
            found += self._sanitizer_lines()
        if self.timing:
            found += self._timing_lines()
        found += [("note", note) for note in self.notes]
        if self.printed.strip():
            found.append(("printed", self.printed.strip()[-1500:]))
        found.append(("verdict", f"after {self.seconds:.2f} s"))
        return [(name, line.replace("\n", "\n" + " " * 12)) for name, line in found]

    def _compiled_line(self) -> str:
        c = self.compiled
        macros = " ".join(f"-D {name}={value}" for name, value in c["macros"].items())
        said = [f"{c['seconds']:.2f} s for {c['arch']} {macros}".rstrip()]
        for kernel in c["kernels"]:
            local = f", {kernel['local_bytes']} bytes of local memory" if kernel["local_bytes"] else ""
            said.append(f"{kernel['kernel']}: {kernel['registers']} registers{local}")
        return "\n".join(said)

    def _sanitizer_lines(self) -> list[tuple[str, str]]:
        s = self.sanitized
        text = [line.removeprefix("=========").strip() for line in s["lines"]]
        if not self.sanitizer_found:
            return [("sanitized", f"{s['tool']} found nothing, {s['seconds']:.1f} s")]
        first = next((i for i, line in enumerate(text) if line and not line.startswith("COMPUTE-SAN")), 0)
        if not text:
            return [("sanitized", f"{s['tool']} gave no answer: {s['last']}")]
        return [("sanitized", "\n".join([f"{s['tool']}, {s['seconds']:.1f} s:", *text[first : first + 6]]))]

    def _timing_lines(self) -> list[tuple[str, str]]:
        t = self.timing
        found = [
            ("timed", f"{t['ms']:.4f} ms; {self.against} {t['other_ms']:.4f} ms; {t['turns']} turns\n{t['what']}"),
        ]
        uses = [_uses(mine, other, self.against) for mine, other in zip(t["launches"], t["other_launches"])]
        if len(uses) > 1:
            uses = [f"{mine['kernel']}: {line}" for mine, line in zip(t["launches"], uses)]
        if uses:
            found.append(("uses", "\n".join(uses)))
        floor = t["floor"]
        found.append(("floor", f"{floor['ms']:.4f} ms ({floor['why']}): {t['ms'] / floor['ms']:.2f} times that"))
        return found


def _uses(mine: dict, other: dict, against: str) -> str:
    """A kernel's resources, beside those of what it was compared with."""
    local = f"{mine['local_bytes']} bytes of local memory ({other['local_bytes']}), "
    return (
        f"{mine['registers']} registers ({against} {other['registers']}), "
        f"{local if mine['local_bytes'] or other['local_bytes'] else ''}"
        f"{mine['shared_bytes']} bytes of shared memory ({other['shared_bytes']}), "
        f"{mine['blocks']} block{'' if mine['blocks'] == 1 else 's'} a multiprocessor ({other['blocks']}), "
        f"occupancy {mine['occupancy']:.2f} ({other['occupancy']:.2f})"
    )


def _printable(text: str) -> str:
    """A compiler's log may end in a NUL, and a wild kernel prints anything."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _faults(case: dict) -> list[str]:
    found = [f"wrote {line}" for line in case["past"]]
    worst = case["worst"]
    if worst is not None and worst["share"] > 1:
        found.append(worst["text"])
    return found


def _compiler_lines(message: str, cell: str) -> str:
    """The compiler's errors, each with the line of the cell that it is about."""
    lines, found = cell.split("\n"), []
    for line in message.splitlines():
        match = _MESSAGE.match(line.strip())
        if match:
            number = int(match[1] or match[2])
            text = lines[number - 1].strip() if number <= len(lines) else ""
            found.append(f"line {number}: {match[3]}\n    {text}")
    return "\n".join(found[:5]) if found else "\n".join(message.splitlines()[:12])


class History(list):
    """The variants tried in a shell, as a table and a small picture of their speeds."""

    COLUMNS = ("#", "kernel", "verdict", "worst", "ms", "against", "ratio", "10-90 %", "registers", "blocks", "floor")

    def rows(self) -> list[tuple]:
        """One row a variant."""
        found = []
        for v in self:
            t, worst = v.timing, v.worst
            used = v.used[0] if v.used else None
            registers = used["registers"] if used else None
            if registers is None and v.compiled and v.compiled["kernels"]:
                registers = max(k["registers"] for k in v.compiled["kernels"])
            found.append(
                (
                    v.number, v.name + ("_numba" if v.kind == "numba" else ""), v.status,
                    f"{worst['worst']['share']:.3g}" if worst else "", f"{t['ms']:.4f}" if t else "",
                    v.against if t else "", f"{t['ratio']:.3f}" if t else "",
                    f"{t['low']:.3f}-{t['high']:.3f}" if t else "", registers or "", used["blocks"] if used else "",
                    f"{t['ms'] / t['floor']['ms']:.2f}x" if t else "",
                )
            )  # fmt: skip
        return found

    def __str__(self) -> str:
        if not self:
            return "no variant was tried yet: %%s2o_cuda NAME, %%s2o_numba NAME"
        rows = [self.COLUMNS, *(tuple(map(str, row)) for row in self.rows())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.COLUMNS))]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
        timed = [v for v in self if v.timing]
        if timed:
            most = max(v.timing["ratio"] for v in timed)
            lines += ["", "times as fast as what it was compared with:"]
            for v in timed:
                bar = "#" * max(round(40 * v.timing["ratio"] / most), 1)
                lines.append(f"{v.number:4d} {bar} {v.timing['ratio']:.3f}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        timed = [v.timing["ratio"] for v in self if v.timing]
        picture = reprs.columns_picture(timed, "times as fast as what it was compared with, in order") if timed else ""
        return reprs.table(self.COLUMNS, self.rows(), "variants tried in this shell") + picture
