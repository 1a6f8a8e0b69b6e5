"""Derived columns: a bin for each row, computed at the site by a public program on the fine codes.

The coordinator sends the program (made from the synthetic table alone), the site runs it on its rows and answers
with a noised histogram (`common/tallies.py`). Programs are arrays: tables, trees, edges, synthetic rows. Nothing
of them is code, and everything is bounded when the query is read, before a record is touched:

    Joint     several mapped columns as one mixed-radix number
    Scored    a score (Additive tables or Trees) cut at edges, optionally within the bins of a Joint
    Nearest   the distance of a row to the nearest of some synthetic rows, cut at edges

Guarantees:
    a row's bin depends on that row's codes and the program alone, never on another row: one patient moves only
    the bins of that patient's own rows. Sums run elementwise in one fixed order, so a row gets the same bits
    wherever it stands, and many sites count as one pooled table does.
    every row of a table that fits the dictionary gets a bin in 0..bins−1: no refusal depends on a record.
    NaN or inf in a program, edges that do not ascend, a map outside its bins, a tree with a cycle or too deep, a
    program too large to store or too slow to run: refused when it is made (QUERY-SHAPE, -VALUE, -SIZE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from cohortium.common.errors import ProtocolError
from cohortium.common.query_base import (
    Floats,
    Ints,
    Wire,
    check_covers,
    check_map,
    listed,
    misfit,
    named,
    real,
    to_array,
    to_bytes,
    whole,
)

MAX_BINS = 1 << 20
"""Of one derived column."""
MAX_COLUMNS = 10_000
MAX_CODES = 1 << 20
"""Fine codes of one column, and edges of one score."""
MAX_TABLE = 2.0**40
"""Largest size of a number in a score: no sum of MAX_COLUMNS or MAX_TREES of them overflows."""
MAX_NODES = 1 << 18
MAX_TREES = 4096
MAX_DEPTH = 64
MAX_WORK = 1 << 20
"""Steps for one row, of about a nanosecond each: one number added in `Nearest`, _LOOK_UP of them for a look-up."""
_LOOK_UP = 16
MAX_DISTANCES = 1 << 23
"""Numbers in the tables of distances that `Nearest` makes: 64 MB."""
_CHUNK = 16_384


class Score(Protocol):
    """A number for each row."""

    @property
    def work(self) -> int: ...
    def score(self, codes: np.ndarray) -> Floats: ...
    def check_codes(self, sizes: Sequence[int]) -> None: ...
    def to_wire(self) -> Wire: ...


class Derived(Protocol):
    """A bin for each row. work: elementary steps a row costs, bounded by MAX_WORK."""

    @property
    def bins(self) -> int: ...
    @property
    def work(self) -> int: ...
    def assign(self, codes: np.ndarray) -> Ints: ...
    def check_codes(self, sizes: Sequence[int]) -> None: ...
    def to_wire(self) -> Wire: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """Up to four mapped columns as one mixed-radix number; the first column is the slowest digit.

    columns: indices; maps: per column int32 [fine codes] -> 0..size−1; sizes: per column.
    """

    columns: tuple[int, ...]
    maps: tuple[np.ndarray, ...] = field(repr=False)
    sizes: tuple[int, ...]
    kind: Literal["joint"] = "joint"

    def __post_init__(self) -> None:
        if not 1 <= len(self.columns) <= 4 or not len(self.columns) == len(self.maps) == len(self.sizes):
            raise ProtocolError("QUERY-SHAPE", "a joint column has one to four columns, a map and a size for each")
        _check_indices(self.columns)
        for table, size in zip(self.maps, self.sizes, strict=True):
            _check_digit(table, size)
        _check_bins(self.bins)

    @property
    def bins(self) -> int:
        return math.prod(self.sizes)

    @property
    def work(self) -> int:
        return _LOOK_UP * len(self.columns)

    def assign(self, codes: np.ndarray) -> Ints:
        """int64 [rows] from codes int32 [rows, columns]."""
        out = np.zeros(len(codes), dtype=np.int64)
        for column, table, size in zip(self.columns, self.maps, self.sizes, strict=True):
            out = out * size + table[codes[:, column]]
        return out

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_fits(self.columns, self.maps, sizes)

    def to_wire(self) -> Wire:
        fields = {"kind": self.kind, "columns": list(self.columns), "sizes": list(self.sizes)}
        return fields, named("map", self.maps, "<i4")

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> Joint:
        columns = _few(fields["columns"])
        return cls(columns=columns, maps=listed("map", len(columns), blobs, "<i4"), sizes=whole(fields["sizes"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Additive:
    """A score: intercept plus one table per column, added in the order of `columns`; tables float64 [fine codes]."""

    columns: tuple[int, ...]
    tables: tuple[np.ndarray, ...] = field(repr=False)
    intercept: float = 0.0
    kind: Literal["additive"] = "additive"

    def __post_init__(self) -> None:
        if not 1 <= len(self.columns) == len(self.tables) <= MAX_COLUMNS:
            raise ProtocolError("QUERY-SHAPE", "an additive score has one table per column")
        _check_indices(self.columns)
        for table in self.tables:
            _check_numbers(table)
        _check_numbers(np.array([self.intercept]))

    @property
    def work(self) -> int:
        return _LOOK_UP * len(self.columns)

    def score(self, codes: np.ndarray) -> Floats:
        """float64 [rows] from codes int32 [rows, columns]."""
        out = np.full(len(codes), self.intercept, dtype=np.float64)
        for column, table in zip(self.columns, self.tables, strict=True):
            out += table[codes[:, column]]
        return out

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_fits(self.columns, self.tables, sizes)

    def to_wire(self) -> Wire:
        fields = {"kind": self.kind, "columns": list(self.columns), "intercept": float(self.intercept).hex()}
        return fields, named("table", self.tables, "<f8")

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> Additive:
        columns = _few(fields["columns"])
        tables = listed("table", len(columns), blobs, "<f8")
        return cls(columns=columns, tables=tables, intercept=real(fields["intercept"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """A score: base plus the leaf of each tree, added in the trees' order (float64).

    columns: those that the trees look at; maps: per column int32 [fine codes] -> ordinal ≥ 0 (missing has one of
    its own). The nodes of all trees stand in one list: feature int32 [nodes], place in `columns`, −1 at a leaf;
    threshold int32 [nodes], ordinal ≤ threshold goes left; left, right int32 [nodes]; value float64 [nodes], read at
    leaves only. roots int32 [trees].

    A child stands after its parent in the list. So no path can come back, whatever the bytes say.
    """

    columns: tuple[int, ...]
    maps: tuple[np.ndarray, ...] = field(repr=False)
    feature: np.ndarray = field(repr=False)
    threshold: np.ndarray = field(repr=False)
    left: np.ndarray = field(repr=False)
    right: np.ndarray = field(repr=False)
    value: np.ndarray = field(repr=False)
    roots: np.ndarray = field(repr=False)
    base: float = 0.0
    kind: Literal["trees"] = "trees"

    def __post_init__(self) -> None:
        if not 1 <= len(self.columns) == len(self.maps) <= MAX_COLUMNS:
            raise ProtocolError("QUERY-SHAPE", "trees have one map per column")
        _check_indices(self.columns)
        for table in self.maps:
            _check_digit(table, MAX_BINS)
        nodes = len(self.feature)
        whole_lists = (self.feature, self.threshold, self.left, self.right, self.roots)
        if any(a.ndim != 1 or a.dtype != np.int32 for a in whole_lists):
            raise ProtocolError("QUERY-SHAPE", "the nodes of trees are int32 vectors")
        if not len(self.threshold) == len(self.left) == len(self.right) == len(self.value) == nodes:
            raise ProtocolError("QUERY-SHAPE", "the lists of nodes are of one length")
        if nodes > MAX_NODES or len(self.roots) > MAX_TREES:
            raise ProtocolError("QUERY-SIZE", f"at most {MAX_TREES} trees of {MAX_NODES:,} nodes together")
        if not len(self.roots) or self.roots.min() < 0 or self.roots.max() >= nodes:
            raise ProtocolError("QUERY-SHAPE", "a root points at one of the nodes")
        _check_numbers(self.value)
        _check_numbers(np.array([self.base]))
        if self.feature.min() < -1 or self.feature.max() >= len(self.columns):
            raise ProtocolError("QUERY-SHAPE", "a node looks at one of the trees' columns")
        inner = np.flatnonzero(self.feature >= 0)
        for child in (self.left[inner], self.right[inner]):
            if (child <= inner).any() or (child >= nodes).any():
                raise ProtocolError("QUERY-SHAPE", "a child stands after its parent in the list of nodes")
        if self.work > MAX_WORK:
            raise ProtocolError("QUERY-SIZE", "the trees take too long for one row")

    @property
    def depths(self) -> tuple[int, ...]:
        """Longest way from each root to a leaf. Raises ProtocolError beyond MAX_DEPTH."""
        height = np.zeros(len(self.feature), dtype=np.int64)
        inner = np.flatnonzero(self.feature >= 0)
        left, right = self.left[inner], self.right[inner]
        for _ in range(MAX_DEPTH + 1):
            taller = 1 + np.maximum(height[left], height[right])
            if np.array_equal(taller, height[inner]):
                return tuple(int(h) for h in height[self.roots])
            height[inner] = taller
        raise ProtocolError("QUERY-SIZE", f"a tree is deeper than {MAX_DEPTH}")

    @property
    def work(self) -> int:
        return _LOOK_UP * (len(self.columns) + len(self.roots) + sum(self.depths))

    def score(self, codes: np.ndarray) -> Floats:
        """float64 [rows] from codes int32 [rows, columns]."""
        out = np.full(len(codes), self.base, dtype=np.float64)
        # At a leaf both ways lead to the leaf itself, so that all rows may walk equally far.
        leaf, nodes = self.feature < 0, np.arange(len(self.feature), dtype=np.int32)
        look = np.where(leaf, 0, self.feature)
        children = np.stack([np.where(leaf, nodes, self.left), np.where(leaf, nodes, self.right)], axis=1).ravel()
        width, depths = len(self.columns), self.depths
        for start in range(0, len(codes), _CHUNK):
            some = codes[start : start + _CHUNK]
            ordinals = np.empty((len(some), width), dtype=np.int32)
            for place, (column, table) in enumerate(zip(self.columns, self.maps, strict=True)):
                ordinals[:, place] = table[some[:, column]]
            flat, first = ordinals.ravel(), np.arange(len(some)) * width
            total = out[start : start + _CHUNK]
            for root, depth in zip(self.roots, depths, strict=True):
                at = np.full(len(some), root, dtype=np.int64)
                for _ in range(depth):
                    at = children[2 * at + (flat[first + look[at]] > self.threshold[at])].astype(np.int64)
                total += self.value[at]
        return out

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_fits(self.columns, self.maps, sizes)

    def to_wire(self) -> Wire:
        fields = {"kind": self.kind, "columns": list(self.columns), "base": float(self.base).hex()}
        lists = {name: to_bytes(getattr(self, name), "<i4") for name in _NODE_LISTS}
        return fields, named("map", self.maps, "<i4") | lists | {"value": to_bytes(self.value, "<f8")}

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> Trees:
        columns = _few(fields["columns"])
        lists: dict[str, Any] = {name: to_array(blobs[name], "<i4") for name in _NODE_LISTS}
        return cls(
            columns=columns,
            maps=listed("map", len(columns), blobs, "<i4"),
            value=to_array(blobs["value"], "<f8"),
            base=real(fields["base"]),
            **lists,
        )


_NODE_LISTS = ("feature", "threshold", "left", "right", "roots")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A score cut at edges, within the bins of another column.

    edges: float64, strictly ascending. bin = by's bin · (edges + 1) + how many edges are ≤ the score.
    """

    score: Additive | Trees
    edges: np.ndarray = field(repr=False)
    by: Joint | None = None
    kind: Literal["scored"] = "scored"

    def __post_init__(self) -> None:
        _check_edges(self.edges)
        _check_bins(self.bins)

    @property
    def bins(self) -> int:
        return (len(self.edges) + 1) * (1 if self.by is None else self.by.bins)

    @property
    def work(self) -> int:
        return self.score.work + (0 if self.by is None else self.by.work) + _LOOK_UP * len(self.edges).bit_length()

    def assign(self, codes: np.ndarray) -> Ints:
        """int64 [rows] from codes int32 [rows, columns]."""
        out = np.searchsorted(self.edges, self.score.score(codes), side="right").astype(np.int64)
        return out if self.by is None else self.by.assign(codes) * (len(self.edges) + 1) + out

    def check_codes(self, sizes: Sequence[int]) -> None:
        self.score.check_codes(sizes)
        if self.by is not None:
            self.by.check_codes(sizes)

    def to_wire(self) -> Wire:
        score, blobs = self.score.to_wire()
        by: dict[str, Any] | None = None
        extra: dict[str, bytes] = {}
        if self.by is not None:
            by, extra = self.by.to_wire()
        fields = {"kind": self.kind, "score": score, "by": by}
        return fields, prefixed("score.", blobs) | prefixed("by.", extra) | {"edges": to_bytes(self.edges, "<f8")}

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> Scored:
        score, by = fields["score"], fields["by"]
        if not isinstance(score, dict) or score.get("kind") not in ("additive", "trees"):
            raise ProtocolError("QUERY-KIND", "a score is additive or of trees")
        if by is not None and (not isinstance(by, dict) or by.get("kind") != "joint"):
            raise ProtocolError("QUERY-KIND", "a score is cut within the bins of a joint column")
        reader = Additive if score["kind"] == "additive" else Trees
        return cls(
            score=reader.from_wire(score, under("score.", blobs)),
            edges=to_array(blobs["edges"], "<f8"),
            by=None if by is None else Joint.from_wire(by, under("by.", blobs)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The distance of a row to the nearest of m synthetic rows, cut at edges.

    columns: those compared; maps: per column int32 [fine codes] -> 0..size−1; rows: int32 [m, columns], the
    synthetic rows in these bins. The distance is the mean over columns of |difference| / (size − 1) for an
    ordinal column, and of 0 or 1 for another; in [0, 1]. edges: float64, strictly ascending.

    The other direction, from a synthetic row to the nearest record, has no bound: one record can be the nearest
    of every synthetic row. This one moves one patient's own row alone.
    """

    columns: tuple[int, ...]
    maps: tuple[np.ndarray, ...] = field(repr=False)
    ordinal: tuple[bool, ...]
    sizes: tuple[int, ...]
    rows: np.ndarray = field(repr=False)
    edges: np.ndarray = field(repr=False)
    kind: Literal["nearest"] = "nearest"

    def __post_init__(self) -> None:
        p = len(self.columns)
        if not 1 <= p <= MAX_COLUMNS or not p == len(self.maps) == len(self.ordinal) == len(self.sizes):
            raise ProtocolError("QUERY-SHAPE", "a distance has a map, a kind and a size for each column")
        _check_indices(self.columns)
        if any(type(o) is not bool for o in self.ordinal):
            raise ProtocolError("QUERY-FORM", "a column of a distance is ordinal or is not")
        if self.rows.ndim != 2 or self.rows.dtype != np.int32 or self.rows.shape[1] != p or not len(self.rows):
            raise ProtocolError("QUERY-SHAPE", "the synthetic rows are an int32 table with one bin per column")
        if self.rows.size > MAX_WORK or sum(self.sizes) * len(self.rows) > MAX_DISTANCES:
            raise ProtocolError("QUERY-SIZE", "the synthetic rows are too many for a distance")
        for place, (table, size) in enumerate(zip(self.maps, self.sizes, strict=True)):
            _check_digit(table, size)
            check_map(self.rows[:, place], size)
        _check_edges(self.edges)
        _check_bins(self.bins)

    @property
    def bins(self) -> int:
        return len(self.edges) + 1

    @property
    def work(self) -> int:
        return self.rows.size + _LOOK_UP * (len(self.columns) + len(self.edges).bit_length())

    def distance(self, codes: np.ndarray) -> Floats:
        """float64 [rows] in [0, 1] from codes int32 [rows, columns]."""
        tables = [self._distances(place) for place in range(len(self.columns))]
        bins = np.stack([m[codes[:, c]] for c, m in zip(self.columns, self.maps, strict=True)], axis=1)
        # Equal rows are measured once; each stands alone, so that its bits do not depend on its neighbours.
        different, back = np.unique(bins, axis=0, return_inverse=True)
        out = np.empty(len(different))
        far = np.empty(len(self.rows))
        for i, row in enumerate(different):
            far[:] = tables[0][row[0]]
            for table, digit in zip(tables[1:], row[1:], strict=True):
                far += table[digit]
            out[i] = far.min()
        return out[back.reshape(-1)] / len(self.columns)

    def _distances(self, place: int) -> Floats:
        """[size, m]: from each bin of a column to each synthetic row's."""
        size, theirs = self.sizes[place], self.rows[:, place]
        mine = np.arange(size)[:, None]
        if not self.ordinal[place]:
            return (mine != theirs).astype(np.float64)
        far: Floats = np.abs(mine - theirs) / max(size - 1, 1)
        return far

    def assign(self, codes: np.ndarray) -> Ints:
        """int64 [rows] from codes int32 [rows, columns]."""
        return np.searchsorted(self.edges, self.distance(codes), side="right").astype(np.int64)

    def check_codes(self, sizes: Sequence[int]) -> None:
        _check_fits(self.columns, self.maps, sizes)

    def to_wire(self) -> Wire:
        fields = {
            "kind": self.kind,
            "columns": list(self.columns),
            "ordinal": list(self.ordinal),
            "sizes": list(self.sizes),
        }
        blobs = named("map", self.maps, "<i4")
        return fields, blobs | {"rows": to_bytes(self.rows, "<i4"), "edges": to_bytes(self.edges, "<f8")}

    @classmethod
    def from_wire(cls, fields: dict[str, Any], blobs: Mapping[str, bytes]) -> Nearest:
        columns = _few(fields["columns"])
        return cls(
            columns=columns,
            maps=listed("map", len(columns), blobs, "<i4"),
            ordinal=tuple(fields["ordinal"]),
            sizes=whole(fields["sizes"]),
            rows=to_array(blobs["rows"], "<i4").reshape(-1, max(len(columns), 1)),
            edges=to_array(blobs["edges"], "<f8"),
        )


AnyDerived = Joint | Scored | Nearest


def derived_from_wire(fields: Any, blobs: Mapping[str, bytes]) -> AnyDerived:
    """A derived column from its wire form; ProtocolError, KeyError, TypeError or ValueError where malformed."""
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if kind == "joint":
        return Joint.from_wire(fields, blobs)
    if kind == "scored":
        return Scored.from_wire(fields, blobs)
    if kind == "nearest":
        return Nearest.from_wire(fields, blobs)
    raise ProtocolError("QUERY-KIND", "a derived column is joint, scored or nearest")


def prefixed(prefix: str, blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    return {prefix + name: blob for name, blob in blobs.items()}


def under(prefix: str, blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(prefix): blob for name, blob in blobs.items() if name.startswith(prefix)}


def _few(values: Any) -> tuple[int, ...]:
    columns = whole(values)
    if len(columns) > MAX_COLUMNS:
        raise ProtocolError("QUERY-SIZE", f"a derived column looks at no more than {MAX_COLUMNS:,} columns")
    return columns


def _check_indices(columns: Sequence[int]) -> None:
    if len(set(columns)) != len(columns) or min(columns) < 0:
        raise ProtocolError("QUERY-SHAPE", "a derived column looks at a column once")


def _check_digit(table: np.ndarray, size: int) -> None:
    if table.dtype != np.int32 or len(table) > MAX_CODES:
        raise ProtocolError("QUERY-SHAPE", "a map is an int32 vector of a column's fine codes")
    check_map(table, size)


def _check_fits(columns: Sequence[int], tables: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
    """Refuse tables that do not cover exactly the fine codes `sizes` of the dictionary's columns."""
    if max(columns) >= len(sizes):
        raise misfit()
    for column, table in zip(columns, tables, strict=True):
        check_covers(table, sizes[column])


def _check_numbers(table: np.ndarray) -> None:
    if table.dtype != np.float64 or table.ndim != 1 or not 1 <= len(table) <= MAX_CODES:
        raise ProtocolError("QUERY-SHAPE", "a table of numbers is a float64 vector")
    if not (np.abs(table) <= MAX_TABLE).all():  # False for NaN
        raise ProtocolError("QUERY-VALUE", "a number of a score is not finite or too large")


def _check_edges(edges: np.ndarray) -> None:
    if edges.dtype != np.float64 or edges.ndim != 1 or len(edges) >= MAX_BINS:
        raise ProtocolError("QUERY-SHAPE", "edges are a float64 vector")
    if not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
        raise ProtocolError("QUERY-VALUE", "edges are finite and strictly ascending")


def _check_bins(bins: int) -> None:
    if not 1 <= bins <= MAX_BINS:
        raise ProtocolError("QUERY-SIZE", f"a derived column has at most {MAX_BINS:,} bins")
