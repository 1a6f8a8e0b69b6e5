"""Histograms of derived columns: how many patients fall into each bin of a public program.

Score histograms, counts of arm × interval × event, of group × prediction × outcome, of distances: all of them are
`Tallies` of a `common/derived.py` program. Like `Counts`, but the bins come from several columns at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cohortium.common.derived import MAX_WORK, AnyDerived, derived_from_wire, prefixed
from cohortium.common.encoding import Records
from cohortium.common.errors import ProtocolError
from cohortium.common.query_base import (
    SUM_BITS,
    Contribution,
    Ints,
    Part,
    Wire,
    check_dim,
    lattice_of,
    part_of,
    rows_of,
)

MAX_DERIVED = 1024
_CHUNK_ROWS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Tallies:
    """The histograms of some derived columns, one after the other.

    Guarantees: a row falls into exactly one bin of each derived column, by its own codes alone. A patient with m
    rows has U = 1/γ units, γ the lattice, a whole number: row j gets ⌊U(j+1)/m⌋ − ⌊Uj/m⌋ of them. They are at least 0
    and sum to U, so the patient's share of one histogram has L1 norm exactly 1, hence L2 norm ≤ 1. The k histograms
    stand in different coordinates, so the whole has L2 norm ≤ √k = C, reached by a patient whose rows all fall into
    the same bins. Nothing is rounded after that: the sensitivity is C.
        no rows       zeros
        any record    gets its bins: a program that could fail on some row is refused when it is made
        programs that take more than MAX_WORK steps a row together     QUERY-SIZE
    """

    derived: tuple[AnyDerived, ...] = field(repr=False)
    part: Part = "holdout"
    kind: Literal["tallies"] = "tallies"

    def __post_init__(self) -> None:
        if not 1 <= len(self.derived) <= MAX_DERIVED:
            raise ProtocolError("QUERY-SHAPE", f"tallies are of 1 to {MAX_DERIVED} derived columns")
        if sum(d.work for d in self.derived) > MAX_WORK:
            raise ProtocolError("QUERY-SIZE", "the derived columns take too long for one row")
        check_dim(self.dim)

    @property
    def bins(self) -> tuple[int, ...]:
        return tuple(d.bins for d in self.derived)

    @property
    def dim(self) -> int:
        return sum(self.bins)

    @property
    def clip_norm_l2(self) -> float:
        return math.sqrt(len(self.derived))

    @property
    def lattice(self) -> float:
        return lattice_of(self.clip_norm_l2, SUM_BITS)

    @property
    def sensitivity_l2(self) -> float:
        return self.clip_norm_l2

    def check_codes(self, sizes: Sequence[int]) -> None:
        """Refuse programs that do not cover exactly the fine codes `sizes` of the dictionary's columns."""
        for derived in self.derived:
            derived.check_codes(sizes)

    def contribution(self, records: Records, chosen: np.ndarray | None = None) -> Contribution:
        rows, of_patient = rows_of(records, chosen)
        weight = _units(records.patient[rows], of_patient, round(1.0 / self.lattice))
        parts = [np.zeros(bins, dtype=np.int64) for bins in self.bins]
        for at in range(0, len(rows), _CHUNK_ROWS):
            some = records.codes[rows[at : at + _CHUNK_ROWS]]
            mine = weight[at : at + _CHUNK_ROWS]
            for derived, tally in zip(self.derived, parts, strict=True):
                # Exact in whatever order: a chunk's whole numbers stay far below 2^53.
                tally += np.bincount(derived.assign(some), weights=mine, minlength=derived.bins).astype(np.int64)
        return Contribution(units=np.concatenate(parts))

    def unpack(self, values: np.ndarray) -> list[np.ndarray]:
        """An answer [dim] as one histogram [bins] for each derived column."""
        return np.split(values, np.cumsum(self.bins)[:-1])

    def to_wire(self) -> Wire:
        fields: list[dict[str, Any]] = []
        blobs: dict[str, bytes] = {}
        for i, derived in enumerate(self.derived):
            mine, arrays = derived.to_wire()
            fields.append(mine)
            blobs |= prefixed(f"{i:05d}.", arrays)
        return {"derived": fields, "part": self.part}, blobs

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Tallies:
        listed = fields["derived"]
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_DERIVED:
            raise ProtocolError("QUERY-SHAPE", f"tallies are of 1 to {MAX_DERIVED} derived columns")
        theirs: dict[str, dict[str, bytes]] = {f"{i:05d}": {} for i in range(len(listed))}
        for name, blob in blobs.items():
            place, dot, rest = name.partition(".")
            if not dot or place not in theirs:
                raise ProtocolError("QUERY-FORM", "an array that belongs to no derived column")
            theirs[place][rest] = blob
        derived = tuple(derived_from_wire(one, theirs[f"{i:05d}"]) for i, one in enumerate(listed))
        return cls(derived=derived, part=part_of(fields["part"]))


def _units(patient: Ints, of_patient: Ints, units: int) -> Ints:
    """Each row's whole share of its patient's units; rows of a patient stand together, m of them sum to `units`."""
    place = np.arange(len(patient))
    place -= np.maximum.accumulate(np.where(np.diff(patient, prepend=-1) != 0, place, 0))
    return units * (place + 1) // of_patient - units * place // of_patient
