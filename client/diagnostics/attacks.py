"""Three attacks that a guideline names: singling out, linkability, inference (Article 29 Working Party, WP216, 2014).

After Giomi, Boenisch, Wehmeyer, Tasnádi 2023 (PoPETs 2023-2): each attack is run three times. On training patients; on
held-out patients (the control: what the population alone gives away, which the release is meant to teach); and blindly,
without the synthetic rows (the baseline: an attack that does not beat it is a failed attack and proves nothing). What
counts is the residual risk (training − control) / (1 − control).
"""

from __future__ import annotations

from dataclasses import dataclass

from cohortium.client.diagnostics import intervals
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.facts import NO_CONTROL, Item, unknown
from cohortium.client.diagnostics.nearest import excess
from cohortium.common.evaluation.base import Figure

WARNING = (
    "An attack that fails proves nothing about a better one. These figures can find a leak and cannot rule one out; "
    "the privacy statement above holds against every attack."
)


NO_TRY = "The attacker found nothing to try in these synthetic rows."


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One attack's outcome: (successes, attempts) on training patients, on held-out ones (None: no control), blind.

    No attempts: the attacker found nothing to try. guess: what a success is, for the reader.
    """

    key: str
    label: str
    guess: str
    train: tuple[int, int]
    control: tuple[int, int] | None
    blind: tuple[int, int]

    @property
    def weak(self) -> bool:
        """Whether it does no better than a blind attack; then its low figure is no good news."""
        if not self.train[1] or not self.blind[1]:
            return False
        return intervals.wilson(*self.train)[0] <= self.blind[0] / self.blind[1]


def items(cohort: Cohort, attack: Attack) -> tuple[Item, ...]:
    """Residual risk, then the three success rates with Wilson's intervals."""
    weak = " The attack does no better than blind guessing here: it says nothing either way." if attack.weak else ""
    if attack.control is None:
        residual = unknown(NO_CONTROL, unit="share")
    elif not (attack.train[1] and attack.control[1]):
        residual = unknown(NO_TRY, unit="share")
    else:
        how = "(training − control) / (1 − control), MOVER interval."
        residual = excess(cohort, attack.train, attack.control, how=how)
    rates = (
        ("train", "on training patients", attack.train),
        ("control", "on held-out patients (control)", attack.control),
        ("blind", "without the synthetic rows (baseline)", attack.blind),
    )
    out = [
        Item(
            key=f"{attack.key}_residual",
            label=f"{attack.label}: residual risk",
            figure=residual,
            means=f"What the attack gains on a patient because that patient was in training. {attack.guess}",
            limits=f"0 means that this attack gains nothing, not that none does.{weak}",
        )
    ]
    for key, words, found in rates:
        out.append(
            Item(
                key=f"{attack.key}_{key}",
                label=f"{attack.label} {words}",
                figure=unknown(NO_CONTROL, unit="share") if found is None else rate(*found),
                means=_MEANS[key],
                limits=_LIMITS[key],
            )
        )
    return tuple(out)


_MEANS = {
    "train": "How often the attack succeeds on a patient of the training data.",
    "control": "How often it succeeds on patients whom the model never saw: knowledge of the population.",
    "blind": "How often it succeeds with the dictionary alone or by chance.",
}
_LIMITS = {
    "train": "High alone is no leak: compare it with the control.",
    "control": "It is no harm done by taking part: it is there without the patient's record.",
    "blind": "It is a floor for the attack, no promise about other attacks.",
}


def rate(hits: int, of: int) -> Figure:
    if not of:
        return unknown(NO_TRY, unit="share")
    low, high = intervals.wilson(hits, of)
    return Figure(
        value=hits / of, low=low, high=high, unit="share", direction="lower", how=f"{hits} of {of}; Wilson's interval."
    )
