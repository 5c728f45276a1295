"""Rows of `foveate bench`: our code beside a peer's on the same work, in one process.

A file's `ROWS` names functions that return (ours, peer, unit), both as rates, so that more is better and their ratio
says how many times better ours is.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter


def best_seconds(*works: Callable[[], object], rounds: int, repeats: int = 1) -> list[float]:
    """Shortest seconds of one call of each, the mean of `repeats` calls being one measurement.

    They take turns and the best counts: what else the machine does slows single measurements by up to twofold, all of
    them alike.
    """
    for work in works:
        work()
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for place, work in enumerate(works):
            begun = perf_counter()
            for _ in range(repeats):
                work()
            best[place] = min(best[place], (perf_counter() - begun) / repeats)
    return best
