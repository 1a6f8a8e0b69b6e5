"""Ratios within one run: what is compared takes turns, and the median of its CPU times counts.

CPU time of the process, all threads: another program on the same machine makes a run slower, not more expensive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured figure against its limit. details: what it is made of, for people."""

    name: str
    what: str
    value: float
    unit: str
    limit: float
    better: Literal["lower", "higher"] = "lower"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.better == "lower" else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def interleaved(runs: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median CPU seconds of each run; they take turns, so that a slow minute slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn >= warm_up:
                times[name].append(time.process_time() - started)
    return {name: median(values) for name, values in times.items()}
