"""Curves and tests from grouped counts: Kaplan–Meier, restricted mean survival time, log-rank.

Cells of one arm, last axis of length 2K + 1: events in interval 1, censored in interval 1, events in interval 2, …,
and last the patients still followed after the last interval. Those censored in an interval count as at risk at its
events, as in Kaplan–Meier with ties. Everything works on the last axes, so many draws go through at once.
"""

from __future__ import annotations

import numpy as np


def at_risk(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(events, patients at risk), each [..., K]."""
    events = cells[..., 0:-1:2]
    both = events + cells[..., 1::2]
    return events, cells[..., -1:] + np.cumsum(both[..., ::-1], axis=-1)[..., ::-1]


def hazards(cells: np.ndarray) -> np.ndarray:
    """Events over patients at risk, [..., K]; 0 where nobody is at risk."""
    events, risk = at_risk(cells)
    out = np.divide(events, risk, out=np.zeros(events.shape), where=risk > 0)
    return np.asarray(np.clip(out, 0.0, 1.0))


def kaplan_meier(cells: np.ndarray) -> np.ndarray:
    """Survival at the intervals' ends, [..., K] (Kaplan and Meier 1958)."""
    return np.asarray(np.cumprod(1.0 - hazards(cells), axis=-1))


def greenwood(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % band of a curve from sampling alone, [..., K] each: Greenwood's variance on the log(−log) scale
    (Kalbfleisch and Prentice 2002, section 1.4)."""
    events, risk = at_risk(cells)
    left = np.maximum(risk - events, 0.0)
    terms = np.divide(events, risk * left, out=np.zeros(events.shape), where=risk * left > 0)
    survival = np.clip(kaplan_meier(cells), 1e-12, 1 - 1e-12)
    log = np.log(survival)
    width = 1.959963984540054 * np.sqrt(np.cumsum(terms, axis=-1)) / np.abs(log)
    return np.exp(log * np.exp(width)), np.exp(log * np.exp(-width))


def restricted_mean(survival: np.ndarray, places: np.ndarray, horizon: float) -> np.ndarray:
    """Area under the step curve up to `horizon`, [...]: it falls at `places` [K], one in each interval."""
    begin = np.ones((*survival.shape[:-1], 1))
    widths = np.diff(np.concatenate([[0.0], places, [horizon]]))
    return np.asarray((np.concatenate([begin, survival], axis=-1) * widths).sum(axis=-1))


def log_rank(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(observed − expected events per arm [..., A], their covariance [..., A, A]) of cells [..., A, 2K + 1].

    Hypergeometric variance for ties (Mantel 1966).
    """
    events, risk = at_risk(cells)
    all_events, everyone = events.sum(axis=-2), risk.sum(axis=-2)
    share = risk / np.maximum(everyone, 1e-300)[..., None, :]
    difference = (events - share * all_events[..., None, :]).sum(axis=-1)
    tied = np.divide(
        all_events * (everyone - all_events), everyone - 1, out=np.zeros(everyone.shape), where=everyone > 1
    )
    arms = np.eye(cells.shape[-2])
    covariance = np.einsum("...ak,...k,ab->...ab", share, tied, arms)
    return difference, covariance - np.einsum("...ak,...bk,...k->...ab", share, share, tied)


def chi_square(difference: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Log-rank statistic with A − 1 degrees of freedom, [...]; one covariance [A, A] for all."""
    inverse = np.linalg.pinv(covariance[:-1, :-1])
    u = difference[..., :-1]
    return np.asarray(np.maximum(np.einsum("...a,ab,...b->...", u, inverse, u), 0.0))


def to_simplex(cells: np.ndarray) -> np.ndarray:
    """The nearest cells that are not negative and keep their sum along the last axis.

    Noised counts below zero make curves that rise. Clipping alone would add patients: what is clipped is taken from
    the other cells in equal parts (Held, Wolfe and Crowder 1974; Duchi et al. 2008, figure 1).
    """
    total = np.maximum(cells.sum(axis=-1, keepdims=True), 1e-9)
    falling = -np.sort(-cells, axis=-1)
    surplus = (np.cumsum(falling, axis=-1) - total) / np.arange(1, cells.shape[-1] + 1)
    kept = (falling > surplus).sum(axis=-1, keepdims=True)
    shift = np.take_along_axis(surplus, np.maximum(kept, 1) - 1, axis=-1)
    # Nothing to mend: keep the very numbers, so that without noise every figure is exact.
    return np.where((cells >= 0).all(axis=-1, keepdims=True), cells, np.maximum(cells - shift, 0.0))
