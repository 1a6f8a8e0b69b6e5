"""What the console's own answers cost, counted as they go out, and how a histogram is told."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

ANSWERS = (0.01, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
"""Upper ends of the buckets of the console's answers, seconds."""


class Requests:
    """Counts of the console's own answers. `observe` is what server/logs.Access calls; any thread may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], int] = {}
        self._buckets, self._seconds = [0] * len(ANSWERS), 0.0

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        place = next(at for at, end in enumerate(ANSWERS) if seconds <= end)
        with self._lock:
            key = method, f"{status // 100}xx"
            self._answers[key] = self._answers.get(key, 0) + 1
            self._buckets[place] += 1
            self._seconds += seconds

    def families(self) -> Iterator[Metric]:
        with self._lock:
            answers, buckets, seconds = dict(self._answers), list(self._buckets), self._seconds
        told = CounterMetricFamily(
            "cohortium_console_requests", "Requests that the console answered.", labels=("method", "status")
        )
        for key, count in sorted(answers.items()):
            told.add_metric(key, count)
        yield told
        yield histogram("cohortium_console_answer_seconds", "How long answers took.", ANSWERS, buckets, seconds)


def histogram(name: str, told: str, ends: Sequence[float], counts: Sequence[int], total: float) -> Metric:
    below, buckets = 0, []
    for end, count in zip(ends, counts, strict=True):
        below += count
        buckets.append(("+Inf" if math.isinf(end) else str(end), float(below)))
    return HistogramMetricFamily(name, told, buckets=buckets, sum_value=round(total, 3))
