"""Bar: a progress bar on standard error for work that passes two seconds."""

from __future__ import annotations

import sys
import time

DELAY = 2.0
_WIDTH = 30


class Bar:
    """Counts steps of known number; silent until two seconds have passed, plain lines where there is no terminal.

    Examples
    --------
    >>> with Bar("dense", 3) as bar:
    ...     for _ in range(3):
    ...         bar.step()
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, max(total, 1), 0
        self.start = time.monotonic()
        self.shown = -1

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_):
        if self.shown >= 0 and sys.stderr.isatty():
            print(file=sys.stderr)

    def step(self, count: int = 1) -> None:
        """`count` more steps are done."""
        self.show(self.done + count, self.total)

    def show(self, done: int, total: int) -> None:
        """`done` of `total` steps are done; the signature of ``attention(progress=)``."""
        self.done, self.total = done, total
        elapsed = time.monotonic() - self.start
        if elapsed < DELAY:
            return
        share = done / total
        left = elapsed / share - elapsed if share else 0
        text = f"{self.label} [{'#' * int(share * _WIDTH):<{_WIDTH}}] {share:4.0%} {elapsed:.0f} s, {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = 10
        elif int(share * 10) > self.shown:
            print(text, file=sys.stderr, flush=True)
            self.shown = int(share * 10)
