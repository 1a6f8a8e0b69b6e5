"""k-anonymity, l-diversity and homogeneity of the synthetic table, with the hospital's own training rows beside it.

All attributes count as quasi-identifiers (for l-diversity all but the sensitive one), numbers in CELLS cells; where
the dictionary declares quasi-identifiers, these alone as well. k: the smallest class of rows that agree (Sweeney 2002);
l: the fewest values of a sensitive column in a class (Machanavajjhala et al. 2007, distinct l-diversity).
A synthetic row is nobody's row, so k = 1 singles nobody out by itself: the figures describe a table as if it were real.
The homogeneity attack puts them to the test: it names the secret of a patient whose other attributes all agree with a
class of synthetic rows that have one value there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cohortium.client.diagnostics import draws
from cohortium.client.diagnostics.attacks import Attack
from cohortium.client.diagnostics.cohort import Cohort, row_keys
from cohortium.client.diagnostics.facts import Item
from cohortium.client.diagnostics.linking import secrets
from cohortium.common.encoding import Codes
from cohortium.common.evaluation.base import Figure

Ints = NDArray[np.int64]
SMALL = 5
WARNING = (
    "Synthetic rows belong to nobody: a class of one row identifies no patient, and a large class protects none. These "
    "figures are asked for by checklists made for real tables; the attack below says what can be done with them."
)
_LIMITS = "It says how a reader would rate the table if its rows were patients. They are not."


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """Rows that agree in all chosen columns. of: class of each row, int64 [rows]; sizes: rows of each class."""

    of: Ints
    sizes: Ints

    @classmethod
    def make(cls, cells: Codes, columns: tuple[int, ...]) -> Classes:
        """cells: int32 [rows, columns], of which these count."""
        _, of, sizes = np.unique(row_keys(cells, columns), return_inverse=True, return_counts=True)
        return cls(of=of.ravel().astype(np.int64), sizes=sizes.astype(np.int64))

    @property
    def k(self) -> int:
        return int(self.sizes.min())

    def share_below(self, size: int) -> float:
        """Share of rows in classes of fewer than `size` rows."""
        return float(self.sizes[self.sizes < size].sum() / self.sizes.sum())

    def diversity(self, secret: Codes) -> Ints:
        """How many values of `secret` (from 0 on) each class has, int64 [classes]."""
        size = int(secret.max(initial=0)) + 1
        pairs = np.unique(self.of * size + secret)
        return np.bincount(pairs // size, minlength=len(self.sizes)).astype(np.int64)


def anonymity(cohort: Cohort, *, seed: int) -> tuple[Item, ...]:
    """Figures of the whole synthetic table, real training rows as the reference."""
    synthetic, real = cohort.cells(cohort.all_synthetic), cohort.cells(cohort.all_train.codes)
    every = tuple(range(len(cohort.columns)))
    declared = tuple(i for i, c in enumerate(cohort.columns) if c.role == "quasi-identifier")
    found = list(_classes("all", "all attributes", synthetic, real, every))
    if declared and len(declared) < len(every):
        found += _classes("declared", "the declared quasi-identifiers", synthetic, real, declared)
    for secret in secrets(cohort.columns, seed=seed) if len(every) > 1 else ():
        others = tuple(i for i in every if i != secret)
        found += _diversity(cohort, synthetic, real, secret, others)
    return tuple(found)


def _classes(key: str, words: str, synthetic: Codes, real: Codes, columns: tuple[int, ...]) -> tuple[Item, ...]:
    one, other = (Classes.make(cells, columns) for cells in (synthetic, real))
    below = f"Rows in classes of fewer than {SMALL} by {words}"
    return (
        Item(
            key=f"k_{key}",
            label=f"k-anonymity by {words}",
            figure=_figure(one.k, other.k, unit="rows"),
            means="The smallest number of synthetic rows that agree; the training rows' own beside it.",
            limits=_LIMITS,
        ),
        Item(
            key=f"small_{key}",
            label=below,
            figure=_figure(one.share_below(SMALL), other.share_below(SMALL), unit="share"),
            means="How many synthetic rows are nearly alone in their cells; the training rows' share beside it.",
            limits=_LIMITS,
        ),
    )


def _diversity(cohort: Cohort, synthetic: Codes, real: Codes, secret: int, others: tuple[int, ...]) -> tuple[Item, ...]:
    name = cohort.columns[secret].name
    least, uniform = [], []
    for cells in (synthetic, real):
        classes = Classes.make(cells, others)
        values = classes.diversity(cells[:, secret])
        several = classes.sizes > 1
        least.append(int(values.min()))
        uniform.append(float(classes.sizes[several & (values == 1)].sum() / classes.sizes.sum()))
    return (
        Item(
            key=f"l_{secret}",
            label=f"l-diversity of {name}, by all other attributes",
            figure=_figure(least[0], least[1], unit="values"),
            means="The fewest values of this column in a class; 1 wherever some row is alone.",
            limits=_LIMITS,
        ),
        Item(
            key=f"uniform_{secret}",
            label=f"Rows in classes of several rows that all agree in {name}",
            figure=_figure(uniform[0], uniform[1], unit="share"),
            means="Classes in which this column can be read off the others (homogeneity).",
            limits=_LIMITS,
        ),
    )


def _figure(value: float, reference: float, *, unit: str) -> Figure:
    return Figure(
        value=float(value),
        reference=float(reference),
        reference_text="training rows of this hospital",
        unit=unit,
        how="Counted over all rows; numbers in cells of equally many synthetic rows. No interval: nothing is sampled.",
    )


def homogeneity(cohort: Cohort, *, missing: Ints, seed: int) -> tuple[Attack, ...]:
    """The homogeneity attack on each secret. missing: the missing code of each column."""
    synthetic = cohort.cells(cohort.all_synthetic)
    found = []
    for secret in secrets(cohort.columns, seed=seed) if len(cohort.columns) > 1 else ():
        book = _Book.of(synthetic, secret)
        known = _patients(cohort, cohort.train, secret, missing)
        named = book.named(known)
        dice = draws.integers(f"blind homogeneity {secret} {seed}", len(known), len(synthetic))
        others = _patients(cohort, cohort.control, secret, missing)
        found.append(
            Attack(
                key=f"homogeneity_{secret}",
                label=f"Homogeneity attack on {cohort.columns[secret].name}",
                guess="Success: synthetic rows that agree with the patient in all else have one value, the patient's.",
                train=(int((named == known[:, secret]).sum()), len(known)),
                control=(int((book.named(others) == others[:, secret]).sum()), len(others))
                if cohort.controlled
                else None,
                # As many bets as the attack makes, each on the value of some synthetic row.
                blind=(int(((named >= 0) & (synthetic[dice, secret] == known[:, secret])).sum()), len(known)),
            )
        )
    return tuple(found)


def _patients(cohort: Cohort, codes: Codes, secret: int, missing: Ints) -> Codes:
    """The patients whose secret is known, in cells."""
    return cohort.cells(codes[codes[:, secret] != missing[secret]])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Book:
    """What the attacker looks up: keys of the synthetic classes, ascending, and the one value of each or -1."""

    others: tuple[int, ...]
    keys: NDArray[np.uint64]
    values: Ints

    @classmethod
    def of(cls, synthetic: Codes, secret: int) -> _Book:
        others = tuple(i for i in range(synthetic.shape[1]) if i != secret)
        keys, of = np.unique(row_keys(synthetic, others), return_inverse=True)
        low = np.full(len(keys), np.iinfo(np.int64).max)
        high = np.full(len(keys), -1, dtype=np.int64)
        np.minimum.at(low, of.ravel(), synthetic[:, secret])
        np.maximum.at(high, of.ravel(), synthetic[:, secret])
        return cls(others=others, keys=keys, values=np.where(low == high, low, -1))

    def named(self, cells: Codes) -> Ints:
        """The value that the attack names for each patient, or -1; int64 [patients]."""
        wanted = row_keys(cells, self.others)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.values[at], -1)
