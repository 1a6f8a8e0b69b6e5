"""Logistic and Cox regression by Newton's method, on rows that are free to be looked at: synthetic ones, or a
simulation's. Never used on records at a hospital.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import special

STEPS = 60
HALVINGS = 30
DECREMENT = 1e-18
"""Newton's decrement, gᵀ I⁻¹ g / weight: about the squared distance to the optimum in standard errors of one row."""
LARGEST = 15.0
"""A coefficient of a standardised term beyond this is separation, not an effect."""


class CannotFit(ValueError):
    """Why a regression has no finite estimate, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """beta float64 [d]; information float64 [d, d], the observed one (weights as given); weight: Σ weights."""

    beta: np.ndarray
    information: np.ndarray = field(repr=False)
    weight: float

    @property
    def covariance(self) -> np.ndarray:
        return np.linalg.inv(self.information)

    @property
    def standard_errors(self) -> np.ndarray:
        return np.asarray(np.sqrt(np.diag(self.covariance)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """Risk sets of a Cox fit: distinct times of events float64 [K], increments of the baseline hazard [K] (Breslow
    1974), means of the covariates among those at risk, weighted by their risk, [K, d]."""

    times: np.ndarray
    increments: np.ndarray
    means: np.ndarray


def fit_logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> Fit:
    """Maximum likelihood; x float64 [rows, d] with its constant, y 0 or 1 [rows]. Raises CannotFit."""
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    if not len(x) or not 0 < float(w @ y) < float(w.sum()):
        raise CannotFit("the outcome takes one value only")

    def look(beta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        eta = x @ beta
        p = special.expit(eta)
        likelihood = float(w @ (y * eta - np.logaddexp(0.0, eta)))
        return likelihood, x.T @ (w * (y - p)), (x * (w * p * (1 - p))[:, None]).T @ x

    beta, information = _newton(look, x.shape[1], float(w.sum()))
    return Fit(beta=beta, information=information, weight=float(w.sum()))


def fit_cox(
    x: np.ndarray, time: np.ndarray, event: np.ndarray, weights: np.ndarray | None = None
) -> tuple[Fit, Baseline]:
    """Maximum partial likelihood, Breslow ties; x float64 [rows, d], time [rows], event 0 or 1. Raises CannotFit."""
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    if not len(x) or not float(w @ event) > 0:
        raise CannotFit("there is no event")
    centre = np.average(x, axis=0, weights=w)
    xc = x - centre
    times = np.unique(time[event == 1])
    # Step of the last event time at or before a row's time: the row is at risk at that step and all before.
    last = np.searchsorted(times, time, side="right")
    died = np.where(event == 1, last - 1, len(times))
    deaths = np.bincount(died, weights=w, minlength=len(times) + 1)[:-1]
    events_sum = xc.T @ (w * event)

    def risk_sets(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        risk: np.ndarray = w * np.exp(np.clip(xc @ beta, -50.0, 50.0))
        return risk, _from_here(last, risk, len(times)), _from_here(last, risk[:, None] * xc, len(times))

    def look(beta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        risk, s0, s1 = risk_sets(beta)
        means = s1 / s0[:, None]
        hazard = np.concatenate([[0.0], np.cumsum(deaths / s0)])
        likelihood = float(events_sum @ beta - deaths @ np.log(s0))
        information = (xc * (risk * hazard[last])[:, None]).T @ xc - (means * deaths[:, None]).T @ means
        return likelihood, events_sum - means.T @ deaths, information

    beta, information = _newton(look, x.shape[1], float(w.sum()))
    _, s0, s1 = risk_sets(beta)
    # exp(xᵀβ) of the uncentred covariates goes with an increment that holds the centre's share.
    increments = deaths / s0 * np.exp(-float(centre @ beta))
    baseline = Baseline(times=times, increments=increments, means=s1 / s0[:, None] + centre)
    return Fit(beta=beta, information=information, weight=float(w.sum())), baseline


def _from_here(last: np.ndarray, amount: np.ndarray, steps: int) -> np.ndarray:
    """Σ of `amount` over the rows still at risk at each step, [steps] or [steps, d]."""
    if amount.ndim == 1:
        sums = np.bincount(last, weights=amount, minlength=steps + 1)
    else:
        sums = np.column_stack([np.bincount(last, weights=a, minlength=steps + 1) for a in amount.T])
    return np.asarray(np.cumsum(sums[:0:-1], axis=0)[::-1])


def _newton(
    look: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]], size: int, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """(optimum, information there) of a concave likelihood, from 0; a step that lowers it is halved."""
    beta = np.zeros(size)
    likelihood, score, information = look(beta)
    for _ in range(STEPS):
        try:
            step = np.linalg.solve(information, score)
        except np.linalg.LinAlgError:
            raise CannotFit("the terms of the regression are not independent of one another") from None
        decrement = float(score @ step)
        if not np.isfinite(decrement) or float(np.linalg.cond(information)) > 1e12:
            raise CannotFit("the terms of the regression are not independent of one another")
        if decrement <= DECREMENT * weight:
            return beta + step, information
        for _ in range(HALVINGS):
            found = look(beta + step)
            if found[0] >= likelihood - 1e-12 * abs(likelihood):
                break
            step = step / 2
        beta = beta + step
        likelihood, score, information = found
        if np.abs(beta).max() > LARGEST:
            raise CannotFit("a term tells the outcome apart (separation): its coefficient has no finite estimate")
    raise CannotFit(f"no optimum within {STEPS} Newton steps")
