"""Membership: can one who has a patient's whole record tell whether it was in training?

After van Breugel, Sun, Qian, van der Schaar 2023 (DOMIAS, AISTATS): the attacker compares the density of the synthetic
rows at the record with the density of the population, known from other patients of the same hospital. Where the first
is too high for the second, the model remembers. Held-out patients are dealt in two: reference for the attacker, and
the non-members that it must not name. Both densities are kernel estimates with one product kernel over the columns
(Aitchison, Aitken 1976, Biometrika 63, 413, for levels); its width is the one under which synthetic rows predict each
other best, so no record chooses it.
The share of members found at a false-alarm rate of 1 % stands beside the area: the area hides that a few patients are
found for certain (Carlini et al. 2022, IEEE S&P).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cohortium.client.diagnostics import draws, intervals
from cohortium.client.diagnostics.cohort import LEAST, Cohort
from cohortium.client.diagnostics.facts import NO_CONTROL, Item, unknown
from cohortium.common.encoding import Codes
from cohortium.common.evaluation.base import Figure
from cohortium.common.privacy.budget import rounded_up

Floats = NDArray[np.float64]
WIDTHS = (0.02, 0.035, 0.06, 0.1, 0.16, 0.25, 0.4, 0.7)  # of one column's difference
FALSE_ALARMS = 0.01
_LIMITS = (
    "A weak attack scores 0.5 too. It is one attack with one reference; a stronger one may find more, up to the proven "
    "bound and never beyond."
)


def membership(cohort: Cohort, *, epsilon: float | None, delta: float, seed: int) -> tuple[Item, ...]:
    """The attack's area, its share of members at 1 % false alarms, and what the guarantee allows at most.

    epsilon: of the plan, for one patient in all that it spends; None: no guarantee (a rehearsal without noise).
    """
    if not cohort.controlled or len(cohort.control) < 2 * LEAST:
        area = found = unknown(NO_CONTROL)
    else:
        members, others = attack_scores(cohort, seed=seed)
        value, (low, high) = intervals.auc(members, others)
        area = Figure(
            value=value,
            low=low,
            high=high,
            reference=0.5,
            reference_text="guessing",
            unit="AUC",
            direction="lower",
            how=f"{len(members)} members, {len(others)} others; Newcombe's interval over patients.",
        )
        found = _found(members, others)
    return (
        Item(
            key="membership_auc",
            label="Membership attack (density ratio): area under the ROC curve",
            figure=area,
            means="0.5: the attack cannot tell training patients from others. 1: it names every one.",
            limits=_LIMITS,
        ),
        Item(
            key="membership_found",
            label="Members named at 1 % false alarms",
            figure=found,
            means="Near 0.01: no better than guessing. Above: some patients stand out, whatever the area says.",
            limits=_LIMITS,
        ),
        Item(
            key="membership_bound",
            label="The most that any membership attack can reach (proven)",
            figure=_bound(epsilon, delta),
            means="Holds against every attack, known or not, by the privacy statement.",
            limits="It is a ceiling, not an estimate: attacks known today stay far below.",
        ),
    )


def attack_scores(cohort: Cohort, *, seed: int) -> tuple[Floats, Floats]:
    """Log density ratio of training patients and of those held-out ones who are not the attacker's reference."""
    dealt = draws.order(f"reference {seed}", len(cohort.control))
    half = len(dealt) // 2
    reference, others = cohort.control[dealt[:half]], cohort.control[dealt[half:]]
    width = kernel_width(cohort, seed=seed)

    def score(codes: Codes) -> Floats:
        released = log_density(cohort, codes, cohort.synthetic, width)
        return released - log_density(cohort, codes, reference, width)

    return score(cohort.train), score(others)


def kernel_width(cohort: Cohort, *, seed: int) -> float:
    """The width under which one half of some synthetic rows predicts the other best; synthetic rows only."""
    some = cohort.synthetic[draws.order(f"width {seed}", len(cohort.synthetic))[:1_200]]
    half = len(some) // 2
    fits = [float(log_density(cohort, some[:half], some[half:], width).mean()) for width in WIDTHS]
    return WIDTHS[int(np.argmax(fits))]


def log_density(cohort: Cohort, codes: Codes, to: Codes, width: float) -> Floats:
    """Log of the mean kernel exp(-difference / width) over `to`, normalised in every column; float64 [rows].

    The normaliser is the same for all rows of one width: 2 · width · (1 - e^-1/width) of a number up to its ends.
    """
    out = np.zeros(len(codes))
    for part, found in cohort.distances(codes, to=to):
        # log of a mean of exponentials, from the largest term, so that a far row is no log of 0
        least = found.min(axis=1, keepdims=True)
        out[part] = -least[:, 0] / width + np.log(np.exp(-(found - least) / width).mean(axis=1))
    each = sum(
        math.log(1 + (len(s.cell) - 1) * math.exp(-1 / width))
        if s.levels
        else math.log(2 * width * -math.expm1(-1 / width))
        for s in cohort.scales
    )
    return out - each


def _found(members: Floats, others: Floats) -> Figure:
    allowed = int(FALSE_ALARMS * len(others))
    if allowed < 1:
        return unknown(f"{len(others)} held-out patients are too few to count one false alarm in a hundred.")
    threshold = np.sort(others)[::-1][allowed]  # at most `allowed` of the others lie above
    hits = int((members > threshold).sum())
    low, high = intervals.wilson(hits, len(members))
    return Figure(
        value=hits / len(members),
        low=low,
        high=high,
        reference=FALSE_ALARMS,
        reference_text="guessing",
        unit="share",
        direction="lower",
        how=f"{hits} of {len(members)} members above all but {allowed} of {len(others)} others; Wilson's interval.",
    )


def _bound(epsilon: float | None, delta: float) -> Figure:
    if epsilon is None:
        return unknown("This run was a rehearsal: nothing is proven.", unit="AUC")
    value = intervals.auc_bound(epsilon, delta)
    how = f"From ε = {rounded_up(epsilon)} and δ = {delta:g} of the plan (Kairouz, Oh, Viswanath 2015)."
    return Figure(value=value, unit="AUC", direction="lower", reference=0.5, reference_text="guessing", how=how)
