"""Time several ways of doing the same thing in turn, so that a drift of the machine's speed touches all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(ways: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each way over ``repeats`` turns; ``before`` (a barrier) precedes every call."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            before()
            start = time.perf_counter()
            way()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, medians: dict[str, float], reference: str) -> str:
    """A line for each way: milliseconds and the ratio to ``reference``."""
    width = max(map(len, medians))
    lines = [title] + [
        f"  {name:{width}}  {1000 * seconds:8.1f} ms  {seconds / medians[reference]:5.2f}"
        for name, seconds in medians.items()
    ]
    return "\n".join(lines)
