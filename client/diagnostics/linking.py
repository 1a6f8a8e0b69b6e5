"""Linkability and inference: what the nearest synthetic rows tell one who knows a part of a patient's record.

Linkability: the attacker has two lists, some columns in one and the others in the other, and links two entries when
they have a synthetic row among their nearest in common (Giomi et al. 2023, section 4.2). Inference: the attacker knows
all columns but one and says what the nearest synthetic row has there (section 4.3); a number counts as guessed when it
is right to a twentieth of the synthetic rows. Ties are broken by a fixed hash, apart for every question asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cohortium.client.diagnostics import draws
from cohortium.client.diagnostics.attacks import Attack
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.common.encoding import Codes

if TYPE_CHECKING:
    from cohortium.common.schema import Column

NEIGHBOURS = 5
SECRETS = 6
NEAR_ENOUGH = 0.05
_HAIR = 1e-9  # orders ties; distances are sums of places, whose differences are far larger


def sides(columns: tuple[Column, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the two lists hold: quasi-identifiers against the rest, or every other column where none is declared."""
    first = tuple(i for i, c in enumerate(columns) if c.role == "quasi-identifier")
    if not first or len(first) == len(columns):
        first = tuple(range(0, len(columns), 2))
    return first, tuple(i for i in range(len(columns)) if i not in first)


def secrets(columns: tuple[Column, ...], *, seed: int) -> tuple[int, ...]:
    """Which columns the attacker wants: sensitive ones and targets, else any; at most SECRETS, by the seed."""
    declared = [i for i, c in enumerate(columns) if c.role in ("sensitive", "target", "event")]
    wanted = declared or list(range(len(columns)))
    return tuple(wanted[i] for i in draws.some(f"secrets {seed}", len(wanted), SECRETS))


def linkability(cohort: Cohort, *, seed: int) -> Attack | None:
    """None where there is only one column."""
    first, second = sides(cohort.columns)
    if not first or not second:
        return None
    k, m = min(NEIGHBOURS, len(cohort.synthetic)), len(cohort.synthetic)
    # Of k rows drawn blindly twice, some are the same with this chance.
    chance = 1 - float(np.prod([(m - k - i) / (m - i) for i in range(k)])) if m > 2 * k else 1.0
    tries = len(cohort.train)
    return Attack(
        key="linkability",
        label="Linkability",
        guess=(
            f"Success: one of the {k} nearest synthetic rows by {len(first)} columns is also one of the {k} nearest by "
            f"the other {len(second)}."
        ),
        train=(_linked(cohort, cohort.train, first, second, k, seed), tries),
        control=(_linked(cohort, cohort.control, first, second, k, seed), len(cohort.control))
        if cohort.controlled
        else None,
        blind=(int((draws.uniforms(f"blind linking {seed}", tries) < chance).sum()), tries),
    )


def _linked(cohort: Cohort, codes: Codes, first: tuple[int, ...], second: tuple[int, ...], k: int, seed: int) -> int:
    hits = 0
    ties = [_HAIR * draws.uniforms(f"ties {side} {seed}", len(cohort.synthetic)) for side in (1, 2)]
    blocks = zip(
        cohort.distances(codes, to=cohort.synthetic, columns=first),
        cohort.distances(codes, to=cohort.synthetic, columns=second),
        strict=True,
    )
    for (_, a), (_, b) in blocks:
        one, two = (np.argpartition(d + tie, k - 1, axis=1)[:, :k] for d, tie in zip((a, b), ties, strict=True))
        hits += int((one[:, :, None] == two[:, None, :]).any(axis=(1, 2)).sum())
    return hits


def inference(cohort: Cohort, *, missing: NDArray[np.int64], seed: int) -> tuple[Attack, ...]:
    """One attack for each secret column. missing: the missing code of each column."""
    wanted = secrets(cohort.columns, seed=seed) if len(cohort.columns) > 1 else ()
    on_train = _inferred(cohort, cohort.train, wanted, missing, seed)
    on_control = _inferred(cohort, cohort.control, wanted, missing, seed) if cohort.controlled else {}
    found = []
    for column in wanted:
        known = cohort.train[cohort.train[:, column] != missing[column], column]
        dice = draws.integers(f"blind inference {column} {seed}", len(known), len(cohort.synthetic))
        right = _right(cohort, column, known, cohort.synthetic[dice, column])
        found.append(
            Attack(
                key=f"inference_{column}",
                label=f"Inference of {cohort.columns[column].name}",
                guess="Success: the nearest synthetic row by all other columns has the patient's value.",
                train=on_train[column],
                control=on_control.get(column),
                blind=(int(right.sum()), len(known)),
            )
        )
    return tuple(found)


def _inferred(
    cohort: Cohort, codes: Codes, wanted: tuple[int, ...], missing: NDArray[np.int64], seed: int
) -> dict[int, tuple[int, int]]:
    """(right guesses, patients whose value is known) for each secret column."""
    nearest = {column: np.zeros(len(codes), dtype=np.int64) for column in wanted}
    ties = _HAIR * draws.uniforms(f"ties {seed}", len(cohort.synthetic))
    own = {column: cohort.distances(codes, to=cohort.synthetic, columns=(column,)) for column in wanted}
    for part, every in cohort.distances(codes, to=cohort.synthetic):
        every += ties
        for column in wanted:
            nearest[column][part] = np.argmin(every - next(own[column])[1], axis=1)
    out = {}
    for column in wanted:
        known = codes[:, column] != missing[column]
        guess = cohort.synthetic[nearest[column][known], column]
        out[column] = (int(_right(cohort, column, codes[known, column], guess).sum()), int(known.sum()))
    return out


def _right(cohort: Cohort, column: int, truth: Codes, guess: Codes) -> NDArray[np.bool_]:
    scale = cohort.scales[column]
    if scale.levels:
        return np.asarray(truth == guess)
    with np.errstate(invalid="ignore"):  # a guess that the value is missing is wrong: NaN compares false
        return np.asarray(np.abs(scale.place[truth] - scale.place[guess]) <= NEAR_ENOUGH)
