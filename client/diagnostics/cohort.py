"""What a diagnosis compares: training patients, held-out patients and synthetic rows, in fine codes.

One row of every patient is looked at, chosen by a fixed seed: patients count equally, rows of one patient do not pass
for several patients, and the intervals of shares are right. Large tables are sampled, so that a page takes a minute
or two and not a night; what was sampled is said on it. Exact copies are sought in all rows all the same.

The scale of a column is read off the SYNTHETIC rows, which are public: a number is worth its place among them (the
middle of its ties, 0 to 1), so that a distance of 0.1 means a tenth of the synthetic rows, in every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from cohortium.client.diagnostics import draws
from cohortium.common.encoding import Codes, Grid, Records
from cohortium.common.errors import TableError

if TYPE_CHECKING:
    from cohortium.common.schema import Column

PATIENTS = 2_000
SYNTHETIC = 10_000
WORK = 1.2e9  # pairs of rows times columns in one comparison; a core does about 1e9 of them a second
CELLS = 20
LEAST = 20
"""Fewer patients than this give no figure: an interval over them would span nearly everything."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One column's fine codes as places 0 to 1 (`place`; NaN for missing, and for levels) and as cells (`cell`).

    cell: int32 [codes]; levels and missing have a cell of their own, numbers share about CELLS of them.
    """

    name: str
    levels: bool
    place: Floats
    cell: Codes

    @classmethod
    def of(cls, grid: Grid, synthetic: Codes) -> Scale:
        size = grid.size
        if grid.categorical:
            return cls(name=grid.name, levels=True, place=np.full(size, np.nan), cell=np.arange(size, dtype=np.int32))
        counts = np.bincount(synthetic, minlength=size)[: grid.missing].astype(np.float64)
        total = counts.sum()
        # No synthetic number at all: places by the dictionary's order alone.
        counts = counts if total else np.ones(size - 1)
        place = np.append((np.cumsum(counts) - counts / 2) / counts.sum(), np.nan)
        cell = np.minimum((np.nan_to_num(place) * CELLS).astype(np.int32), CELLS - 1)
        cell[grid.missing] = CELLS
        return cls(name=grid.name, levels=False, place=place, cell=cell)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cohort:
    """The three sets of rows, int32 [rows, columns] in fine codes: one row a patient in `train` and `control`.

    control: held-out patients, who were in no release that the model was fitted to; no rows where nobody was held out.
    copies: patients with a row that some synthetic row equals in every fine code, (train, train patients, control,
    control patients), over all rows. sampled: sentences for the page. unfolded: all rows, for what looks at all.
    """

    columns: tuple[Column, ...]
    scales: tuple[Scale, ...]
    train: Codes
    control: Codes
    synthetic: Codes
    copies: tuple[int, int, int, int]
    train_patients: int
    control_patients: int
    synthetic_rows: int
    sampled: tuple[str, ...]
    all_train: Records
    all_control: Records
    all_synthetic: Codes

    @property
    def controlled(self) -> bool:
        """Whether there are held-out patients enough to compare with."""
        return len(self.control) >= LEAST

    @classmethod
    def of(
        cls,
        columns: tuple[Column, ...],
        grids: tuple[Grid, ...],
        records: Records,
        held: NDArray[np.bool_],
        synthetic: Codes,
        *,
        seed: int,
    ) -> Cohort:
        """`held`: bool [patients]. TableError where training patients or synthetic rows are too few to say anything."""
        train, control = records.subset(~held), records.subset(held)
        if train.patients < LEAST or len(synthetic) < LEAST:
            raise TableError(
                "REPORT-FEW", f"a report needs {LEAST} training patients and {LEAST} synthetic rows at least"
            )
        if not columns:
            raise TableError("REPORT-COLUMNS", "the dictionary has no modelled column")
        patients = PATIENTS
        rows = int(max(1_000, min(SYNTHETIC, WORK / (2 * patients * len(columns)))))
        picked = draws.some(f"synthetic {seed}", len(synthetic), rows)
        said = ["One row of each patient is looked at."] if records.rows > records.patients else []
        for name, found, most in (
            ("training patients", train.patients, patients),
            ("held-out patients", control.patients, patients),
            ("synthetic rows", len(synthetic), rows),
        ):
            if found > most:
                said.append(f"{most} of {found} {name} were drawn by the seed {seed}.")
        return cls(
            columns=columns,
            scales=tuple(Scale.of(grid, synthetic[:, place]) for place, grid in enumerate(grids)),
            train=_one_row_each(train, f"train {seed}", patients),
            control=_one_row_each(control, f"control {seed}", patients),
            synthetic=synthetic[picked],
            copies=(*_copied(train, synthetic), *_copied(control, synthetic)),
            train_patients=train.patients,
            control_patients=control.patients,
            synthetic_rows=len(synthetic),
            sampled=tuple(said),
            all_train=train,
            all_control=control,
            all_synthetic=synthetic,
        )

    def equal_parts(self) -> tuple[Codes, Codes]:
        """As many training as held-out patients, for what depends on how many there are."""
        n = min(len(self.train), len(self.control))
        return self.train[draws.some("part of train", len(self.train), n)], self.control[:n]

    def cells(self, codes: Codes) -> Codes:
        """The rows in cells, int32 [rows, columns]."""
        return np.column_stack([scale.cell[codes[:, place]] for place, scale in enumerate(self.scales)])

    def points(self, codes: Codes, columns: tuple[int, ...]) -> tuple[Floats, Floats]:
        """(coordinates of the numbers, cells of the levels) of some columns, float64; see `distances`."""
        numbers: list[Floats] = []
        levels: list[Floats] = []
        for place in columns:
            scale, code = self.scales[place], codes[:, place]
            if scale.levels:
                levels.append(scale.cell[code].astype(np.float64))
                continue
            at = scale.place[code]
            gone = np.isnan(at)
            numbers += [np.where(gone, 0.5, at), np.where(gone, 0.5, 0.0)]
        empty = np.zeros((len(codes), 0))
        return (
            np.column_stack(numbers) if numbers else empty,
            np.column_stack(levels) if levels else empty,
        )

    def distances(
        self, codes: Codes, *, to: Codes, columns: tuple[int, ...] | None = None
    ) -> Iterator[tuple[slice, Floats]]:
        """Blocks of the sum over columns of |difference|: (which rows of `codes`, float64 [those, rows of `to`]).

        A number's difference is that of places, a level's 0 or 1. A missing number is 1/2 to 1 away from any other
        value and 0 from another missing one (Gower 1971, Biometrics 27, 857, made a metric that knows of gaps).
        """
        chosen = tuple(range(len(self.scales))) if columns is None else columns
        (x, a), (y, b) = self.points(codes, chosen), self.points(to, chosen)
        step = max(1, int(4e6 // max(len(to), 1)))
        for start in range(0, len(codes), step):
            part = slice(start, min(start + step, len(codes)))
            found = np.zeros((part.stop - part.start, len(to)))
            if x.shape[1]:
                found += cdist(x[part], y, "cityblock")
            if a.shape[1]:
                found += a.shape[1] * cdist(a[part], b, "hamming")
            yield part, found


def row_keys(codes: Codes, columns: Iterable[int] | None = None) -> NDArray[np.uint64]:
    """One 64-bit key a row, equal for rows that agree in these columns (all, if None), uint64 [rows].

    Sums of a hash of each (column, code): two of a million different rows share a key with chance 3e-8.
    """
    out = np.zeros(len(codes), dtype=np.uint64)
    for column in range(codes.shape[1]) if columns is None else columns:
        code = codes[:, column]
        out += draws.bits(f"key of column {column}", int(code.max(initial=0)) + 1)[code]
    return out


def _copied(records: Records, synthetic: Codes) -> tuple[int, int]:
    hit = np.isin(row_keys(records.codes), row_keys(synthetic))
    return len(np.unique(records.patient[hit])), records.patients


def _one_row_each(records: Records, label: str, most: int) -> Codes:
    chosen = draws.some(label, records.patients, most)
    first = np.concatenate([[0], np.cumsum(records.rows_per_patient)])[chosen]
    among = np.floor(draws.uniforms(label + " rows", records.patients)[chosen] * records.rows_per_patient[chosen])
    return records.codes[first + among.astype(np.int64)]
