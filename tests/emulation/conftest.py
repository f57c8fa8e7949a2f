"""Thread orders take turns over a test's parameters: each kernel runs in both, in half the time.

S2O_BOTH_ORDERS=1 runs every case in both.
"""

import os
from collections import defaultdict
from pathlib import Path


def pytest_collection_modifyitems(config, items):
    """Keep every second case forward and the others in reverse; a test of one case stays in both orders."""
    if os.environ.get("S2O_BOTH_ORDERS"):
        return
    cases = defaultdict(dict)
    for item in items:
        given = getattr(item, "callspec", None)
        if given and "reverse" in given.params and Path(__file__).parent in Path(item.path).parents:
            other = item.name.replace("forward", "*").replace("reverse", "*")
            cases[item.path, item.originalname].setdefault(other, []).append(item)
    left_out = set()
    for by_case in cases.values():
        for i, pair in enumerate(by_case.values() if len(by_case) > 1 else ()):
            left_out |= {item for item in pair if item.callspec.params["reverse"] != bool(i % 2)}
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
