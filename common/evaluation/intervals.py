"""The intervals of a survival comparison, chosen on the synthetic table, and the program that counts in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cohortium.common.derived import Additive, Joint, Scored
from cohortium.common.evaluation.coded import TimeToEvent
from cohortium.common.evaluation.risk_sets import kaplan_meier
from cohortium.common.tallies import Tallies

INTERVALS = 10
STILL_FOLLOWED = 0.2
"""The curve ends where a smaller share of the synthetic patients is still at risk."""
REFINED = 3
"""Intervals spent on cutting those where grouping distorts the synthetic curve most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """K intervals (end before, end]; the first begins at 0 and holds it.

    ends: float64 [K]; places: float64 [K], mean time of the synthetic events of each interval, where its fall is
    drawn; synthetic: float64 [A, 2K + 1], the synthetic table's cells (see risk_sets.py); grouping: how far grouping
    moves the synthetic curve at most.
    """

    outcome: TimeToEvent
    ends: np.ndarray = field(repr=False)
    places: np.ndarray = field(repr=False)
    synthetic: np.ndarray = field(repr=False)
    grouping: float

    @property
    def cells(self) -> int:
        return 2 * len(self.ends) + 1

    @property
    def derived(self) -> Scored:
        """A row's cell: [arm not used, arms …] × [2K + 1 cells, not used].

        Score: twice the interval's number, plus 1 if censored; past the last end both are one cell, and a row
        without time or event lies beyond all of them.
        """
        last, lost = 2 * len(self.ends), 8.0 * len(self.ends) + 8.0
        time, event = self.outcome.time, self.outcome.event
        at = 2.0 * np.searchsorted(self.ends, np.where(np.isnan(time[1]), 0.0, time[1]), side="left")
        columns = (time[0], event[0])
        tables = (np.where(np.isnan(time[1]), lost, at), np.where(event[1] < 0, lost, 1.0 - event[1]))
        score = Additive(columns=columns, tables=tables)
        edges: np.ndarray = np.append(np.arange(1, last + 1) - 0.5, lost - 0.5)
        arms = self.outcome.arms
        if arms is None:
            return Scored(score=score, edges=edges)
        maps: tuple[np.ndarray, ...] = ((arms.of_code + 1).astype(np.int32),)
        by = Joint(columns=(arms.column,), maps=maps, sizes=(len(arms.names) + 1,))
        return Scored(score=score, edges=edges, by=by)

    @property
    def query(self) -> Tallies:
        return Tallies(derived=(self.derived,), part="holdout")

    def unpack(self, values: np.ndarray) -> np.ndarray:
        """The cells of the arms, float64 [A, 2K + 1], from the answer's histogram of `derived`."""
        arms = len(self.outcome.names)
        if np.shape(values) != (self.derived.bins,):
            raise ValueError(f"{self.derived.bins} counts are needed, not {np.shape(values)}")
        table = np.asarray(values, dtype=float).reshape(-1, self.cells + 1)
        return table[-arms:, : self.cells]


def choose_intervals(outcome: TimeToEvent, codes: np.ndarray, *, intervals: int = INTERVALS) -> Intervals:
    """Intervals in which the synthetic curve falls equally far, some cut once more where grouping distorts.

    codes: the synthetic rows, int32 [rows, columns]. Raises ValueError where fewer than two times of an event or an
    empty arm leave nothing to compare.
    """
    time, event, arm = outcome.read(codes)
    used = ~np.isnan(time) & (event >= 0) & (arm >= 0)
    time, event, arm = time[used], event[used], arm[used]
    arms = len(outcome.names)
    if len(np.unique(time[event == 1])) < 2 or len(np.unique(arm)) < arms:
        raise ValueError("the synthetic table has too few events, or an arm without a patient")
    when, place = np.unique(time, return_inverse=True)
    events = np.bincount(place, weights=event, minlength=len(when))
    both = np.bincount(place, minlength=len(when))
    risk = np.cumsum(both[::-1])[::-1]
    kept = risk >= STILL_FOLLOWED * len(time)
    curve = np.cumprod(1 - events / risk)[kept]
    fell = np.flatnonzero(events[kept] > 0)
    first = max(intervals - REFINED, 2)
    levels = np.linspace(1.0, curve[-1], first + 1)[1:]
    stops = np.unique([int(np.argmax(curve <= level + 1e-12)) for level in levels])
    stops = np.union1d(stops[:-1], fell[-1:]) if len(fell) else stops
    while len(stops) < intervals:
        wider = _refined(stops, events, both, curve)
        if len(wider) == len(stops):
            break
        stops = wider
    ends = when[stops]
    cell = np.searchsorted(ends, time, side="left")
    cell = np.where(cell == len(ends), 2 * len(ends), 2 * cell + 1 - event)
    width = 2 * len(ends) + 1
    synthetic = np.bincount(arm * width + cell, minlength=arms * width).reshape(arms, width).astype(float)
    grouped = kaplan_meier(synthetic.sum(axis=0))
    return Intervals(
        outcome=outcome,
        ends=ends,
        places=_places(ends, time, event),
        synthetic=synthetic,
        grouping=float(np.abs(grouped - curve[stops]).max()),
    )


def _refined(stops: np.ndarray, events: np.ndarray, both: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """One interval more: the one whose grouped fall is farthest from its true fall is cut at half of its fall."""
    begins = np.concatenate([[0], stops[:-1] + 1])
    before = np.concatenate([[1.0], curve[stops[:-1]]])
    total = both.sum()
    risk = np.array([total - both[:b].sum() for b in begins])
    dead = np.array([events[b : e + 1].sum() for b, e in zip(begins, stops, strict=True)])
    off = np.abs(before * (1 - dead / risk) - curve[stops])
    for k in np.argsort(-off, kind="stable"):
        inside = curve[begins[k] : stops[k]]
        if len(inside):
            cut = int(np.argmin(np.abs(inside - (before[k] + curve[stops[k]]) / 2)))
            return np.union1d(stops, [begins[k] + cut])
    return stops


def _places(ends: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Mean time of the events in each interval; its middle where there is none."""
    died = time[event == 1]
    at = np.searchsorted(ends, died, side="left")
    sums = np.bincount(at, weights=died, minlength=len(ends) + 1)[: len(ends)]
    counts = np.bincount(at, minlength=len(ends) + 1)[: len(ends)]
    middle = ends - np.diff(np.concatenate([[0.0], ends])) / 2
    return np.where(counts > 0, sums / np.maximum(counts, 1), middle)
