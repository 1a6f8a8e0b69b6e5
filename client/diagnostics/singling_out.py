"""Singling out: can the synthetic rows name a condition that exactly one patient meets?

The attacker looks for conditions that exactly one synthetic row meets, in a sample as large as the group of patients
attacked, and bets that exactly one patient meets them too: with one column (a rare level, a value beyond all others)
or with several columns of one row. Control: the same conditions on as many held-out patients. Blind: conditions from
the dictionary alone. Even a condition made without data singles one patient out with chance up to 1/e (Cohen, Nissim
2020, PNAS 117, 8344), so only the residual risk counts. Giomi et al. 2023, section 4.1.
Both groups must be of one size, so only as many training patients are attacked as were held out: a model that remembers
some patients is seen here by those of them who were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cohortium.client.diagnostics import draws
from cohortium.client.diagnostics.attacks import Attack
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.common.encoding import Codes

ATTEMPTS = 500
TRIES = 12  # candidates for every condition wanted
COLUMNS = 4
CROWDED = 4
"""Conditions on few patients catch the same ones: with more than n / CROWDED of them intervals would be too short."""
SAME, AT_MOST, AT_LEAST = 0, 1, 2

Condition = tuple[tuple[int, int, int], ...]
"""(column, how, code) of each term; all must hold. A number's missing code only ever fits SAME."""


def met(condition: Condition, codes: Codes, missing: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows meet it, bool [rows]."""
    out = np.ones(len(codes), dtype=bool)
    for column, how, code in condition:
        x = codes[:, column]
        if how == SAME:
            out &= x == code
        else:
            out &= ((x <= code) if how == AT_MOST else (x >= code)) & (x != missing[column])
    return out


def singling_out(cohort: Cohort, *, missing: NDArray[np.int64], seed: int) -> tuple[Attack, Attack]:
    """By one column, and by several. missing: int [columns], the missing code of each."""
    train, control = cohort.equal_parts() if cohort.controlled else (cohort.train, None)
    n = min(len(train), len(cohort.synthetic))
    seen = cohort.synthetic[draws.some(f"singling {seed}", len(cohort.synthetic), n)]
    kinds: tuple[tuple[str, str, Iterable[Condition]], ...] = (
        ("singling_one", "Singling out by one column", _of_one_column(cohort, seen, missing, seed)),
        ("singling_many", "Singling out by several columns", _of_rows(cohort, seen, missing, seed)),
    )
    found = []
    for key, label, candidates in kinds:
        alone = (c for c in candidates if int(met(c, seen, missing).sum()) == 1)
        chosen = list(islice(alone, min(ATTEMPTS, max(n // CROWDED, 1))))
        blind = _of_dictionary(cohort, missing, seed, columns=1 if key == "singling_one" else COLUMNS)
        found.append(
            Attack(
                key=key,
                label=label,
                guess="Success: exactly one patient meets the condition.",
                train=_alone(chosen, train, missing),
                control=None if control is None else _alone(chosen, control, missing),
                blind=_alone(blind, train, missing),
            )
        )
    return found[0], found[1]


def _alone(conditions: list[Condition], codes: Codes, missing: NDArray[np.int64]) -> tuple[int, int]:
    """(how many are met by exactly one row, how many)."""
    return sum(int(met(c, codes, missing).sum()) == 1 for c in conditions), len(conditions)


def _of_one_column(cohort: Cohort, seen: Codes, missing: NDArray[np.int64], seed: int) -> list[Condition]:
    found: list[Condition] = []
    for column, scale in enumerate(cohort.scales):
        codes, counts = np.unique(seen[:, column], return_counts=True)
        found += [((column, SAME, int(code)),) for code in codes[counts == 1]]
        numbers = codes[codes != missing[column]]
        if not scale.levels and len(numbers):
            found += [((column, AT_MOST, int(numbers[0])),), ((column, AT_LEAST, int(numbers[-1])),)]
    return [found[i] for i in draws.order(f"one column {seed}", len(found))]


def _of_rows(cohort: Cohort, seen: Codes, missing: NDArray[np.int64], seed: int) -> Iterator[Condition]:
    """Some columns of a synthetic row: its levels, and its numbers as bounds that cut off the shorter side.

    Every row is taken in turn before one is taken again, so that as many different rows as possible are bet on.
    """
    width = len(cohort.scales)
    rows = np.tile(draws.order(f"rows {seed}", len(seen)), TRIES)[: ATTEMPTS * TRIES]
    middle = [np.median(x[x != missing[c]]) if (x != missing[c]).any() else 0.0 for c, x in enumerate(seen.T)]
    before: set[Condition] = set()
    for at, row in enumerate(rows):
        terms = []
        for column in draws.order(f"columns {seed} {at}", width)[:COLUMNS]:
            code = int(seen[row, column])
            if cohort.scales[column].levels or code == missing[column]:
                terms.append((int(column), SAME, code))
            else:
                terms.append((int(column), AT_LEAST if code >= middle[column] else AT_MOST, code))
        condition = tuple(sorted(terms))
        if condition not in before:
            before.add(condition)
            yield condition


def _of_dictionary(cohort: Cohort, missing: NDArray[np.int64], seed: int, *, columns: int) -> list[Condition]:
    """Conditions of one who knows what values there are and has seen no row."""
    width, found = len(cohort.scales), []
    for at in range(ATTEMPTS):
        dice = draws.uniforms(f"blind {columns} {seed} {at}", 2 * columns)
        terms = []
        for k, column in enumerate(draws.order(f"blind columns {columns} {seed} {at}", width)[:columns]):
            code = int(dice[k] * (missing[column] + 1))
            free = not cohort.scales[column].levels and code != missing[column]
            terms.append((int(column), (AT_MOST if dice[columns + k] < 0.5 else AT_LEAST) if free else SAME, code))
        found.append(tuple(terms))
    return found
