"""Sums of clipped vectors over patients: features of a row, and the score of a regression at public parameters.

`Sums` gives means, variances and missingness of many columns in one release. `Estimates` gives the score vector
(the gradient of the log-likelihood) of a logistic or Cox regression at the synthetic table's fit: with the noise's
law known, one Newton step from there estimates the coefficients of the held-out patients.

    v_row          from the row's codes and public tables alone
    w_row          v_row · min(1, C/‖v_row‖)
    u_patient      mean of w_row over the patient's rows, clipped to C again
    answer         Σ rint(u_patient / γ), in units of the lattice γ

Every step is elementwise in a fixed order, with exponentials taken one number at a time: a row's bits do not depend
on the rows around it, so the sum over sites is the pooled sum, bit for bit on machines with one mathematical library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cohortium.common.derived import MAX_CODES, MAX_COLUMNS, MAX_TABLE
from cohortium.common.encoding import Records
from cohortium.common.errors import ProtocolError
from cohortium.common.query_base import (
    MAX_DIM,
    SUM_BITS,
    Contribution,
    Floats,
    Ints,
    Part,
    Wire,
    check_columns,
    check_covers,
    check_dim,
    lattice_of,
    listed,
    misfit,
    named,
    part_of,
    real,
    rows_of,
    to_array,
    to_bytes,
    whole,
)

MAX_WIDTH = 1 << 16
"""Numbers of one vector."""
CLIP_SLACK = 2.0**-32
"""What float64 may add to a clipped norm, as a part of C: √(MAX_WIDTH sums of squares) err by (d + 8) · 2^−53."""
MAX_ETA = 50.0
"""A linear predictor is held to ±MAX_ETA: exp never overflows."""
_CHUNK_NUMBERS = 1 << 21


def _sensitivity(clip_norm_l2: float, dim: int, lattice: float) -> float:
    """C (1 + slack) + √d γ/2: one patient more adds one rounded vector, each coordinate moved by at most γ/2."""
    return clip_norm_l2 * (1.0 + CLIP_SLACK) + math.sqrt(dim) * lattice / 2.0


def _patients_sum(
    vectors: Callable[[np.ndarray], Floats],
    records: Records,
    chosen: np.ndarray | None,
    *,
    dim: int,
    clip: float,
    lattice: float,
) -> Contribution:
    """Σ over patients of the rounded mean of their rows' clipped vectors; vectors: codes [rows, columns] -> [rows, d].

    Memory is bounded by _CHUNK_NUMBERS numbers a chunk, however many rows one patient has.
    """
    rows, of_patient = rows_of(records, chosen)
    units = np.zeros(dim, dtype=np.int64)
    most = max(1, _CHUNK_NUMBERS // dim)
    begins = np.flatnonzero(np.diff(records.patient[rows], prepend=-1))
    ends = np.append(begins[1:], len(rows))
    first = 0
    while first < len(begins):
        # Whole patients, as many as fit into a chunk; one that does not fit alone is summed in several steps.
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + most, side="right")))
        start, stop = int(begins[first]), int(ends[last - 1])
        owner = np.repeat(np.arange(last - first), ends[first:last] - begins[first:last])
        total = np.zeros((last - first, dim))
        for at in range(start, stop, most):
            some = slice(at, min(at + most, stop))
            clipped = _clipped(vectors(records.codes[rows[some]]), clip)
            np.add.at(total, owner[some.start - start : some.stop - start], clipped)  # one row after the other
        total /= of_patient[begins[first:last], None]
        units += np.rint(_clipped(total, clip) / lattice).astype(np.int64).sum(axis=0)
        first = last
    return Contribution(units=units)


def _clipped(vectors: Floats, clip: float) -> Floats:
    """Each row of [rows, d] scaled to a norm of at most C (but for CLIP_SLACK); shorter ones are left as they are."""
    norm = norms(vectors)
    far = norm > clip
    if far.any():
        vectors = vectors.copy()
        vectors[far] *= (clip / norm[far])[:, None]
    return vectors


def norms(vectors: Floats) -> Floats:
    """L2 norm of each row of [rows, d], its squares added from left to right wherever the row stands."""
    if vectors.shape[1] == 0:
        return np.zeros(len(vectors))
    out: Floats = np.sqrt(np.add.accumulate(vectors * vectors, axis=1)[:, -1])
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """The sum over patients of a clipped vector of features.

    features: per column of the dictionary float64 [fine codes, k_c], k_c ≥ 0; a row's vector is their entries side
    by side. clip_norm_l2: C. The answer: float64-exact lattice integers [Σ k_c].

    Guarantees: with w_r the row's vector scaled to ‖w_r‖ ≤ C, a patient's mean over m rows has norm
    ≤ (1/m) Σ ‖w_r‖ ≤ C (triangle inequality), and is clipped to C once more after its floating-point sum, so that
    only the error of one norm and one scaling, below C · CLIP_SLACK, is left. It is rounded to the lattice before
    patients are added: each coordinate moves by at most γ/2, the vector by √d γ/2. Integer sums are exact, so a
    patient more or less changes the answer by that patient's own vector:
    sensitivity C (1 + 2^−32) + √d γ/2.
        no rows   zeros         NaN, inf or beyond ±2^40 in a feature   refused at construction
        ‖v‖ ≤ C   unscaled      any codes                               answered: no refusal depends on a record
    """

    features: tuple[np.ndarray, ...] = field(repr=False)
    clip_norm_l2: float
    part: Part = "holdout"
    kind: Literal["sums"] = "sums"

    def __post_init__(self) -> None:
        _check_design(self.features)
        if self.dim < 1:
            raise ProtocolError("QUERY-SHAPE", "sums need at least one feature")
        lattice_of(self.clip_norm_l2)
        check_dim(self.dim)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(f.shape[1] for f in self.features)

    @property
    def dim(self) -> int:
        return sum(self.widths)

    @property
    def lattice(self) -> float:
        return lattice_of(self.clip_norm_l2, SUM_BITS)

    @property
    def sensitivity_l2(self) -> float:
        return _sensitivity(self.clip_norm_l2, self.dim, self.lattice)

    def check_codes(self, sizes: Sequence[int]) -> None:
        """Refuse feature tables that do not cover exactly the fine codes `sizes` of the dictionary's columns."""
        _check_design_codes(self.features, sizes)

    def vectors(self, codes: np.ndarray) -> Floats:
        """float64 [rows, d], not clipped, from codes int32 [rows, columns]."""
        return side_by_side(self.features, codes)

    def contribution(self, records: Records, chosen: np.ndarray | None = None) -> Contribution:
        check_columns(records, range(len(self.features)), exactly=True)
        return _patients_sum(self.vectors, records, chosen, dim=self.dim, clip=self.clip_norm_l2, lattice=self.lattice)

    def to_wire(self) -> Wire:
        shapes, blobs = _design_to_wire(self.features)
        return {**shapes, "clip": float(self.clip_norm_l2).hex(), "part": self.part}, blobs

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Sums:
        return cls(
            features=_design_from_wire(fields, blobs),
            clip_norm_l2=real(fields["clip"]),
            part=part_of(fields["part"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Logistic:
    """The score of one row in a logistic regression: v = (y − expit(xᵀβ)) x (McCullagh and Nelder 1989, ch. 4).

    outcome: (column, map int32 [fine codes] -> 0, 1, or −1 where the row is not used: v = 0).
    design: per column of the dictionary float64 [fine codes, k_c]; x = (1, the columns' entries side by side).
    beta: float64 [1 + Σ k_c], the intercept first.
    """

    outcome: tuple[int, np.ndarray] = field(repr=False)
    design: tuple[np.ndarray, ...] = field(repr=False)
    beta: np.ndarray = field(repr=False)
    name: Literal["logistic"] = "logistic"

    def __post_init__(self) -> None:
        _check_design(self.design)
        _check_labels(self.outcome[1])
        _check_vector(self.beta, 1 + sum(f.shape[1] for f in self.design))

    @property
    def dim(self) -> int:
        return len(self.beta)

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_design_codes(self.design, sizes)
        _check_one(self.outcome, sizes)

    def vectors(self, codes: np.ndarray) -> Floats:
        """float64 [rows, d], not clipped, from codes int32 [rows, columns]."""
        y = _labels(self.outcome, codes)
        x = np.concatenate([np.ones((len(codes), 1)), side_by_side(self.design, codes)], axis=1)
        eta = _linear(x, self.beta)
        probability = np.array([1.0 / (1.0 + math.exp(-e)) for e in eta.tolist()])
        residual = np.where(y >= 0, y - probability, 0.0)
        return residual[:, None] * x

    def to_wire(self) -> Wire:
        fields, blobs = _design_to_wire(self.design)
        fields |= {"outcome": self.outcome[0]}
        return fields, blobs | {"outcome": to_bytes(self.outcome[1], "<i4"), "beta": to_bytes(self.beta, "<f8")}

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Logistic:
        return cls(
            outcome=(_one(fields["outcome"]), to_array(blobs["outcome"], "<i4")),
            design=_design_from_wire(fields, blobs),
            beta=to_array(blobs["beta"], "<f8"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cox:
    """The score of one row in a Cox regression, with the synthetic table's risk sets (Lin and Wei 1989, JASA 84).

    v = δ (x − x̄(t)) − Σ_{k: t_k ≤ t} (x − x̄_k) exp(xᵀβ) ΔΛ_k
    Summed over the rows of the table that gave t_k, ΔΛ_k and x̄_k it is the score of the partial likelihood (Breslow
    ties). Public risk sets make v a function of one row alone: the partial likelihood's own terms are not.

    time: (column, float64 [fine codes], NaN where the row is not used); event: (column, int32 [fine codes] -> 0, 1,
    −1 where the row is not used); design: per column float64 [fine codes, k_c], without an intercept; beta float64 [d].
    times float64 [K] strictly ascending; increments float64 [K] ≥ 0, of the baseline hazard; means float64 [K, d].
    x̄(t) is that of the largest t_k ≤ t, the first before that.
    """

    time: tuple[int, np.ndarray] = field(repr=False)
    event: tuple[int, np.ndarray] = field(repr=False)
    design: tuple[np.ndarray, ...] = field(repr=False)
    beta: np.ndarray = field(repr=False)
    times: np.ndarray = field(repr=False)
    increments: np.ndarray = field(repr=False)
    means: np.ndarray = field(repr=False)
    name: Literal["cox"] = "cox"

    def __post_init__(self) -> None:
        _check_design(self.design)
        _check_labels(self.event[1])
        if self.dim < 1:
            raise ProtocolError("QUERY-SHAPE", "a Cox regression has at least one coefficient")
        _check_vector(self.beta, sum(f.shape[1] for f in self.design))
        when, steps = self.time[1], len(self.times)
        if when.dtype != np.float64 or when.ndim != 1 or not 1 <= len(when) <= MAX_CODES:
            raise ProtocolError("QUERY-SHAPE", "times are a float64 vector of a column's fine codes")
        if not (np.isnan(when) | (np.abs(when) <= MAX_TABLE)).all():
            raise ProtocolError("QUERY-VALUE", "a time is infinite or too large")
        if not 1 <= steps <= MAX_CODES or steps * self.dim > MAX_DIM:
            raise ProtocolError("QUERY-SIZE", "a baseline hazard has too few or too many steps")
        _check_vector(self.times, steps)
        _check_vector(self.increments, steps)
        if self.means.dtype != np.float64 or self.means.shape != (steps, self.dim):
            raise ProtocolError("QUERY-SHAPE", "there is one mean of the covariates for each step")
        if not (np.abs(self.means) <= MAX_TABLE).all():
            raise ProtocolError("QUERY-VALUE", "a mean is not finite or too large")
        if not (np.diff(self.times) > 0).all() or not (self.increments >= 0).all():
            raise ProtocolError("QUERY-VALUE", "steps ascend and increments are at least 0")

    @property
    def dim(self) -> int:
        return len(self.beta)

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_design_codes(self.design, sizes)
        _check_one(self.time, sizes)
        _check_one(self.event, sizes)

    def vectors(self, codes: np.ndarray) -> Floats:
        """float64 [rows, d], not clipped, from codes int32 [rows, columns]."""
        when = self.time[1][codes[:, self.time[0]]]
        delta = _labels(self.event, codes)
        used = (delta >= 0) & ~np.isnan(when)
        x = side_by_side(self.design, codes)
        risk = np.array([math.exp(e) for e in _linear(x, self.beta).tolist()])
        passed = np.searchsorted(self.times, np.where(used, when, 0.0), side="right")
        hazard = np.concatenate([[0.0], np.add.accumulate(self.increments)])[passed]
        drift = np.add.accumulate(self.means * self.increments[:, None], axis=0)
        drift = np.concatenate([np.zeros((1, self.dim)), drift])[passed]
        v = np.where(delta > 0, 1.0, 0.0)[:, None] * (x - self.means[np.maximum(passed - 1, 0)])
        v -= risk[:, None] * (x * hazard[:, None] - drift)
        v[~used] = 0.0
        return v

    def to_wire(self) -> Wire:
        fields, blobs = _design_to_wire(self.design)
        fields |= {"time": self.time[0], "event": self.event[0]}
        blobs |= {"time": to_bytes(self.time[1], "<f8"), "event": to_bytes(self.event[1], "<i4")}
        return fields, blobs | {name: to_bytes(getattr(self, name), "<f8") for name in _COX_TABLES}

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Cox:
        tables: dict[str, Any] = {name: to_array(blobs[name], "<f8") for name in _COX_TABLES}
        tables["means"] = tables["means"].reshape(len(tables["times"]), len(tables["beta"]))
        return cls(
            time=(_one(fields["time"]), to_array(blobs["time"], "<f8")),
            event=(_one(fields["event"]), to_array(blobs["event"], "<i4")),
            design=_design_from_wire(fields, blobs),
            **tables,
        )


_COX_TABLES = ("beta", "times", "increments", "means")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """The sum over patients of the clipped score vector of a regression at public parameters.

    model: what gives a row's vector. clip_norm_l2: C.

    Guarantees: those of `Sums`, with the row's score as its vector: the parameters, risk sets and baseline hazard
    are public, so the score is a function of that row alone, and one patient more or less changes the answer by the
    patient's own clipped mean: sensitivity C (1 + 2^−32) + √d γ/2.
        a row that is not used     adds zeros, and still counts among its patient's rows
        a linear predictor beyond ±MAX_ETA     held there; with tables within ±2^40 every score is finite
    """

    model: Logistic | Cox
    clip_norm_l2: float
    part: Part = "holdout"
    kind: Literal["estimates"] = "estimates"

    def __post_init__(self) -> None:
        lattice_of(self.clip_norm_l2)
        check_dim(self.dim)

    @property
    def dim(self) -> int:
        return self.model.dim

    @property
    def lattice(self) -> float:
        return lattice_of(self.clip_norm_l2, SUM_BITS)

    @property
    def sensitivity_l2(self) -> float:
        return _sensitivity(self.clip_norm_l2, self.dim, self.lattice)

    def check_codes(self, sizes: Sequence[int]) -> None:
        """Refuse tables that do not cover exactly the fine codes `sizes` of the dictionary's columns."""
        self.model.check_codes(sizes)

    def vectors(self, codes: np.ndarray) -> Floats:
        """float64 [rows, d], not clipped, from codes int32 [rows, columns]."""
        return self.model.vectors(codes)

    def contribution(self, records: Records, chosen: np.ndarray | None = None) -> Contribution:
        check_columns(records, range(len(self.model.design)), exactly=True)
        return _patients_sum(self.vectors, records, chosen, dim=self.dim, clip=self.clip_norm_l2, lattice=self.lattice)

    def to_wire(self) -> Wire:
        fields, blobs = self.model.to_wire()
        own = {"model": self.model.name, "clip": float(self.clip_norm_l2).hex(), "part": self.part}
        return {**fields, **own}, blobs

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Estimates:
        name = fields["model"]
        if name not in ("logistic", "cox"):
            raise ProtocolError("QUERY-KIND", "a regression is logistic or cox")
        model = Logistic.from_wire(fields, blobs) if name == "logistic" else Cox.from_wire(fields, blobs)
        return cls(model=model, clip_norm_l2=real(fields["clip"]), part=part_of(fields["part"]))


def side_by_side(tables: Sequence[np.ndarray], codes: np.ndarray) -> Floats:
    """float64 [rows, Σ k_c]: each column's entries of its table [fine codes, k_c], in the columns' order."""
    out = np.empty((len(codes), sum(t.shape[1] for t in tables)))
    at = 0
    for column, table in enumerate(tables):
        if table.shape[1]:
            out[:, at : at + table.shape[1]] = table[codes[:, column]]
            at += table.shape[1]
    return out


def _linear(x: Floats, beta: np.ndarray) -> Floats:
    """xᵀβ within ±MAX_ETA, float64 [rows]; added from left to right, so not by a matrix product."""
    eta: Floats = np.add.accumulate(x * beta, axis=1)[:, -1]
    return np.clip(eta, -MAX_ETA, MAX_ETA)


def _labels(label: tuple[int, np.ndarray], codes: np.ndarray) -> Ints:
    return label[1][codes[:, label[0]]].astype(np.int64)


def _check_design(tables: Sequence[np.ndarray]) -> None:
    if not 1 <= len(tables) <= MAX_COLUMNS or any(
        t.ndim != 2 or t.dtype != np.float64 or not 1 <= len(t) <= MAX_CODES for t in tables
    ):
        raise ProtocolError("QUERY-SHAPE", "there is one float64 table [codes, k] per column")
    if sum(t.shape[1] for t in tables) >= MAX_WIDTH or sum(t.size for t in tables) > MAX_DIM:
        raise ProtocolError("QUERY-SIZE", "the tables of a sum are too large")
    if not all((np.abs(t) <= MAX_TABLE).all() for t in tables):  # False for NaN
        raise ProtocolError("QUERY-VALUE", "a number of a table is not finite or too large")


def _check_design_codes(tables: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
    if len(tables) != len(sizes):
        raise misfit()
    for table, size in zip(tables, sizes, strict=True):
        check_covers(table, size)


def _check_one(pair: tuple[int, np.ndarray], sizes: Sequence[int]) -> None:
    if not 0 <= pair[0] < len(sizes):
        raise misfit()
    check_covers(pair[1], sizes[pair[0]])


def _check_labels(table: np.ndarray) -> None:
    if table.dtype != np.int32 or table.ndim != 1 or not 1 <= len(table) <= MAX_CODES:
        raise ProtocolError("QUERY-SHAPE", "an outcome is an int32 vector of a column's fine codes")
    if table.min() < -1 or table.max() > 1:
        raise ProtocolError("QUERY-VALUE", "an outcome is 0, 1, or -1 where a row is not used")


def _check_vector(vector: np.ndarray, size: int) -> None:
    if vector.dtype != np.float64 or vector.shape != (size,):
        raise ProtocolError("QUERY-SHAPE", "a vector of the regression has the wrong length")
    if not (np.abs(vector) <= MAX_TABLE).all():
        raise ProtocolError("QUERY-VALUE", "a number of the regression is not finite or too large")


def _design_to_wire(tables: Sequence[np.ndarray]) -> Wire:
    shapes = {"codes": [len(t) for t in tables], "widths": [t.shape[1] for t in tables]}
    return shapes, named("table", tables, "<f8")


def _design_from_wire(fields: dict[str, Any], blobs: dict[str, bytes]) -> tuple[np.ndarray, ...]:
    codes, widths = whole(fields["codes"]), whole(fields["widths"])
    if not codes or min(codes + widths) < 0:
        raise ProtocolError("QUERY-SHAPE", "there is one float64 table [codes, k] per column")
    tables = listed("table", len(codes), blobs, "<f8")
    return tuple(table.reshape(shape) for table, shape in zip(tables, zip(codes, widths, strict=True), strict=True))


def _one(value: Any) -> int:
    return whole([value])[0]
