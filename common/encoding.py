"""Values to fine codes and back, by public rule only: nothing here is learned from data.

Each modelled column gets a `Grid`. Levels are their own codes; numbers live on a lattice of multiples of a
step, and cells of the grid are runs of neighbouring multiples. The last code of every grid means "missing".
The dictionary alone decides step, cells and spacing, so any site and the coordinator build the same grids.

A value that the dictionary does not allow is never counted un-noised anywhere: it becomes the level named
"other" if there is one, the nearest allowed number if the column is required, else missing.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cohortium.common.errors import DictionaryError, TableError
from cohortium.common.late import Late

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.schema import Column, Schema
else:
    pd = Late("pandas")

CELLS = 512  # of a number, about; fine enough to keep what a clinician reads, coarse enough to be noised
WHOLE_CELLS = 1024  # integers with at most so many values have a cell for each
DATE_CELLS = 4096
LOOKED_UP = 1 << 16  # multiples of a step, so many at most, have a table that gives their cell
OTHER = ("other", "Other", "OTHER", "unknown", "Unknown", "UNKNOWN")
TRUE = frozenset({"true", "t", "yes", "y", "1"})
FALSE = frozenset({"false", "f", "no", "n", "0"})

Ints = NDArray[np.int64]
Codes = NDArray[np.int32]
Floats = NDArray[np.float64]


class Grid:
    """One column's fine codes. Subclasses of one level: `LevelGrid` and `NumberGrid`.

    size: number of codes, the missing code (size - 1) included.
    required: then sampling never chooses the missing code.
    """

    size: int
    name: str
    required: bool
    categorical: bool

    @property
    def missing(self) -> int:
        return self.size - 1

    def encode(self, values: pd.Series) -> Codes:
        """Fine codes, int32 [rows]."""
        raise NotImplementedError

    def decode(self, codes: Codes, u: Floats) -> pd.Series:
        """Values of the column's type, [rows]; `u` in [0, 1) places a value inside its cell."""
        raise NotImplementedError

    def allowed(self, wanted: object) -> NDArray[np.bool_]:
        """Which codes a condition allows: a set of values, a (low, high) tuple or slice, or one value."""
        raise NotImplementedError


def as_text(value: object) -> str:
    """How a raw cell is compared with a level: 1, 1.0 and "1" are the same level."""
    if type(value) is str:  # the common case, without the checks below
        return value.strip()
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


class LevelGrid(Grid):
    """A code for every level, in the dictionary's order."""

    categorical = True

    def __init__(self, column: Column, missing_values: Sequence[str]) -> None:
        self.name = column.name
        self.required = column.required
        self.kind = column.kind
        levels = tuple(column.levels or ())
        if column.kind == "boolean" and not levels:
            levels = ("false", "true")
        if not levels:
            raise DictionaryError(
                "DICT-LEVELS",
                f"column {column.name!r} is text without levels",
                where=(f"fields.{column.name}",),
                hint='add "constraints": {"enum": [...]} with every level that may occur, '
                'or "role": "identifier" if it is a name or number of a person',
            )
        self.levels = levels
        self.size = len(levels) + 1
        self._code: dict[str, int] = {as_text(level): i for i, level in enumerate(levels)}
        if column.kind == "boolean":
            no, yes = self._boolean_codes()
            self._code |= dict.fromkeys(FALSE, no) | dict.fromkeys(TRUE, yes) | self._code
        self._other = next((self._code[o] for o in OTHER if o in self._code), self.missing)
        self._missing_text = frozenset(missing_values) | {""}

    def _boolean_codes(self) -> tuple[int, int]:
        no = next((i for i, level in enumerate(self.levels) if as_text(level).lower() in FALSE), 0)
        return no, next((i for i, level in enumerate(self.levels) if as_text(level).lower() in TRUE), 1)

    def _one(self, value: Hashable) -> int:
        if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
            return self.missing
        text = as_text(value)
        code = self._code.get(text, self._code.get(text.lower(), -1) if self.kind == "boolean" else -1)
        if code >= 0:
            return code
        return self.missing if text in self._missing_text else self._other

    def encode(self, values: pd.Series) -> Codes:
        position, uniques = pd.factorize(values)
        table = np.fromiter((self._one(v) for v in uniques), dtype=np.int32, count=len(uniques))
        table = np.append(table, np.int32(self.missing)).astype(np.int32)  # position -1: missing
        return table[position]

    def decode(self, codes: Codes, u: Floats) -> pd.Series:
        if self.kind == "boolean":
            _no, yes = self._boolean_codes()
            value = np.zeros(self.size, dtype=bool)
            value[yes] = True
            return pd.Series(pd.arrays.BooleanArray(value[codes], codes == self.missing))
        if self.kind in ("integer", "year"):
            whole = np.array([int(float(x)) for x in self.levels] + [0], dtype=np.int64)
            return pd.Series(pd.arrays.IntegerArray(whole[codes], codes == self.missing))
        if self.kind == "number":
            return pd.Series(np.array([float(x) for x in self.levels] + [np.nan])[codes])
        return pd.Series(
            pd.Categorical.from_codes(np.where(codes == self.missing, -1, codes), pd.Index(list(self.levels)))
        )

    def allowed(self, wanted: object) -> NDArray[np.bool_]:
        out = np.zeros(self.size, dtype=bool)
        for value in _as_items(wanted):
            text = "" if value is None else as_text(value)
            code = self._code.get(text, self._code.get(text.lower(), -1) if self.kind == "boolean" else -1)
            if code < 0 and text in self._missing_text:
                code = self.missing
            if code < 0:
                raise TableError(
                    "WHERE-LEVEL",
                    f"column {self.name!r} has no level {text!r}",
                    hint="levels: " + ", ".join(str(x) for x in self.levels[:20]),
                )
            out[code] = True
        return out


class NumberGrid(Grid):
    """Runs of neighbouring multiples of a step between the dictionary's minimum and maximum.

    step: the declared resolution; 1 for integers and days; else a round decimal 1e-4 of the range or less.
    Cells hold equally many multiples, or, where the range starts at or above 0 and spans a decade, their
    width grows with the square root of the value: TSH of 0.4 and of 400 both keep two digits.
    Decoding a number without a declared resolution gives the roundest multiple in its cell (laboratories
    write 1.4, not 1.387); with one, and for integers and days, any multiple of the cell.
    """

    categorical = False

    def __init__(self, column: Column) -> None:
        self.name, self.kind, self.required = column.name, column.kind, column.required
        if column.minimum is None or column.maximum is None:
            raise DictionaryError(
                "DICT-RANGE",
                f"column {column.name!r} ({column.kind}) has no minimum or no maximum",
                where=(f"fields.{column.name}",),
                hint='add "constraints": {"minimum": ..., "maximum": ...} with plausible values from public '
                "knowledge, never from the data",
            )
        self.low, self.high = float(column.minimum), float(column.maximum)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise DictionaryError(
                "DICT-RANGE",
                f"column {column.name!r} has minimum {column.minimum} and maximum {column.maximum}",
                where=(f"fields.{column.name}",),
                hint="the minimum must be a finite number not above the maximum",
            )
        whole = column.kind in ("integer", "year", "date", "datetime")
        declared = column.resolution if column.resolution and column.resolution > 0 else None
        span = self.high - self.low
        if declared is not None:
            self.step = max(float(declared), 1.0) if whole else float(declared)
        elif whole or span == 0:
            self.step = 1.0
        else:
            self.step = 10.0 ** math.floor(math.log10(span) - 4)
        self.step = max(self.step, span / 2**40)  # a tiny declared resolution must not overflow the lattice
        self._whole = whole
        self._roundest = declared is None and not whole
        # Integers count from their minimum; decimals are multiples of the step, so that 1.4 stays 1.4.
        self._first = 0 if whole else round(self.low / self.step)
        self._origin = self.low if whole else 0.0
        last = math.floor(span / self.step + 1e-9) if whole else round(self.high / self.step)
        steps = last - self._first + 1
        most = DATE_CELLS if column.kind in ("date", "datetime") else CELLS
        if declared is not None or whole:
            most = steps if steps <= WHOLE_CELLS else most
        decade = self.low >= 0 and self.high >= 10 * max(self.low, self.step)
        self.edges = _edges(
            steps,
            most,
            first=self._first,
            root=decade and column.kind in ("integer", "number"),
            centred=not whole,
        )
        self.size = len(self.edges)  # len(edges) - 1 cells and the missing code
        widths = np.diff(self.edges)
        self._codes = np.repeat(np.arange(len(widths), dtype=np.int32), widths) if steps <= LOOKED_UP else None
        self._cell_value = self.round_multiples() * self.step if self._roundest else None

    def round_multiples(self) -> Ints:
        """The roundest multiple of the step in each cell (without the missing code), as an integer."""
        base = int(self.low) if self._whole else self._first
        return np.array(
            [roundest(int(a) + base, int(b) - 1 + base) for a, b in zip(self.edges[:-1], self.edges[1:])],
            dtype=np.int64,
        )

    def numbers(self, values: pd.Series) -> Floats:
        """Raw cells as float64: numbers, days or seconds since 1970; NaN where they are none of these."""
        if self.kind == "date":
            if pd.api.types.is_numeric_dtype(values):
                return np.full(len(values), np.nan)
            return _since_epoch(values, "D")
        if self.kind == "datetime":
            return _since_epoch(values, "s")
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype(object)
        if pd.api.types.is_datetime64_any_dtype(values):
            return values.dt.year.to_numpy(dtype=np.float64, na_value=np.nan)
        if pd.api.types.is_numeric_dtype(values):
            return values.to_numpy(dtype=np.float64, na_value=np.nan)
        return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)

    def encode(self, values: pd.Series) -> Codes:
        x = self.numbers(values)
        finite = np.isfinite(x)
        if not self.required:
            finite &= (x >= self.low) & (x <= self.high)
        x = np.clip(np.where(finite, x, self.low), self.low, self.high)
        j = np.rint((x - self._origin) / self.step).astype(np.int64) - self._first
        j = np.clip(j, 0, self.edges[-1] - 1)
        code = np.searchsorted(self.edges, j, side="right") - 1 if self._codes is None else self._codes.take(j)
        return np.where(finite, code, self.missing).astype(np.int32)

    def decode(self, codes: Codes, u: Floats) -> pd.Series:
        gone = codes == self.missing
        cell = np.where(gone, 0, codes)
        if self._cell_value is not None:
            x = np.clip(self._cell_value[cell], self.low, self.high)
        else:
            a, b = self.edges[cell], self.edges[cell + 1]
            j = np.minimum(a + np.floor(u * (b - a)).astype(np.int64), b - 1)
            x = np.clip(self._origin + (j + self._first) * self.step, self.low, self.high)
        return self._typed(x, gone)

    def decode_between(self, codes: Codes, u: Floats, wanted: tuple[object, object]) -> pd.Series:
        """Like decode, but only values between the bounds: a cell at a condition's edge holds others too."""
        series = self.decode(codes, u)
        low = -math.inf if wanted[0] is None else self._bound(wanted[0])
        high = math.inf if wanted[1] is None else self._bound(wanted[1])
        gone = codes == self.missing
        x = self.numbers(series).copy()
        outside = np.flatnonzero(~gone & ~((x >= low - 1e-9 * self.step) & (x <= high + 1e-9 * self.step)))
        if not len(outside):
            return series
        cell = codes[outside]
        first, last = self.edges[cell], self.edges[cell + 1] - 1
        if math.isfinite(low):
            first = np.maximum(first, math.ceil((low - self._origin) / self.step - self._first - 1e-9))
        if math.isfinite(high):
            last = np.minimum(last, math.floor((high - self._origin) / self.step - self._first + 1e-9))
        j = first + np.floor(u[outside] * np.maximum(last - first + 1, 1)).astype(np.int64)
        x[outside] = np.clip(self._origin + (j + self._first) * self.step, self.low, self.high)
        return self._typed(np.where(gone, self.low, x), gone)

    def _typed(self, x: Floats, gone: NDArray[np.bool_]) -> pd.Series:
        if self.kind in ("integer", "year"):
            return pd.Series(pd.arrays.IntegerArray(np.rint(x).astype(np.int64), gone))
        if self.kind == "date":
            days = self._dates(np.rint(x).astype(np.int64))
            days[gone] = None
            return pd.Series(days, dtype=object)
        if self.kind == "datetime":
            seconds = np.rint(x).astype("datetime64[s]")
            seconds[gone] = np.datetime64("NaT")
            return pd.Series(seconds)
        x = np.round(x, max(0, min(15, 1 - math.floor(math.log10(self.step) + 1e-9))))
        return pd.Series(np.where(gone, np.nan, x))

    def _dates(self, days: Ints) -> NDArray[np.object_]:
        """Days since 1970 inside the range as Python dates, looked up where the range is short."""
        first, last = math.floor(self.low), math.ceil(self.high)
        if last - first >= LOOKED_UP or len(days) < last - first:
            return days.astype("datetime64[D]").astype(object)
        every = np.arange(first, last + 1).astype("datetime64[D]").astype(object)
        return every.take(days - first)

    def allowed(self, wanted: object) -> NDArray[np.bool_]:
        out = np.zeros(self.size, dtype=bool)
        bounds: tuple[object, object] | None = None
        if isinstance(wanted, (slice, range)):
            bounds = (wanted.start, wanted.stop - 1 if isinstance(wanted, range) else wanted.stop)
        elif isinstance(wanted, tuple) and len(wanted) == 2:
            bounds = wanted
        if bounds is not None:
            low = self.low if bounds[0] is None else self._bound(bounds[0])
            high = self.high if bounds[1] is None else self._bound(bounds[1])
            a = self._origin + (self.edges[:-1] + self._first) * self.step
            b = self._origin + (self.edges[1:] - 1 + self._first) * self.step
            out[:-1] = (b >= low - 1e-9 * self.step) & (a <= high + 1e-9 * self.step)
            return out
        for value in _as_items(wanted):
            if value is None or value == "":
                out[self.missing] = True
                continue
            x = self._bound(value)
            if not self.low <= x <= self.high:
                raise TableError(
                    "WHERE-RANGE",
                    f"column {self.name!r} has no value {value!r}",
                    hint=f"the dictionary allows {self.low:g} to {self.high:g}",
                )
            out[self._cell_of(x)] = True
        return out

    def _cell_of(self, x: float) -> int:
        j = min(max(round((x - self._origin) / self.step) - self._first, 0), int(self.edges[-1]) - 1)
        return int(np.searchsorted(self.edges, j, side="right")) - 1

    def _bound(self, value: object) -> float:
        x = self.numbers(pd.Series([value]))[0]
        if not math.isfinite(x):
            raise TableError("WHERE-VALUE", f"column {self.name!r}: {value!r} is not a {self.kind}")
        return float(x)


def _as_items(wanted: object) -> list[Any]:
    if isinstance(wanted, (set, frozenset, list, tuple)):
        return sorted(wanted, key=str) if isinstance(wanted, (set, frozenset)) else list(wanted)
    return [wanted]


def _since_epoch(values: pd.Series, unit: str) -> Floats:
    """Days or seconds since 1970 as float64, NaN where a cell is no date."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    if not pd.api.types.is_datetime64_any_dtype(values):
        values = values.map(_isoformat) if values.dtype == object else values
        values = pd.to_datetime(values, errors="coerce", format="ISO8601", utc=False)
    if not pd.api.types.is_datetime64_any_dtype(values):  # mixed time zones
        return np.full(len(values), np.nan)
    if values.dt.tz is not None:
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    stamps = values.to_numpy(dtype="datetime64[s]")
    whole = stamps.astype(f"datetime64[{unit}]")
    return np.where(np.isnat(stamps), np.nan, whole.astype(np.int64).astype(np.float64))


def _isoformat(value: object) -> object:
    if isinstance(value, (dt.date, dt.datetime)):
        return None if pd.isna(value) else value.isoformat()
    return value if isinstance(value, str) else None


def _edges(steps: int, most: int, *, first: int, root: bool, centred: bool) -> Ints:
    """Cell borders 0 = e_0 < e_1 < ... < e_m = steps, m at most about `most`.

    Where cells hold several multiples their widths are 1, 2, 5, 10, 20, ... multiples. `centred`: a cell's
    middle is a multiple of its width (decimals), so that a round number is never near a border; else a cell
    starts at a multiple of its width, counted from the minimum. `root`: widths grow with the square root.
    """
    if steps <= most:
        return np.arange(steps + 1, dtype=np.int64)
    edges = [0]
    grow = 0.62 * most  # 1-2-5 widths are on average this much narrower than asked for
    while edges[-1] < steps:
        here = edges[-1]
        wanted = 2.0 * math.sqrt(max(here, 1) * steps) / grow if root else steps / most
        width = _one_two_five(wanted, up=not root)
        if centred:
            middle = round((here + first + width / 2) / width) * width
            end = middle + (width + 1) // 2 - first
            end = end if end > here else end + width
        else:
            end = (here // width + 1) * width
        edges.append(min(end, steps))
    return np.array(edges, dtype=np.int64)


def _one_two_five(wanted: float, *, up: bool) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, ... not above `wanted` (not below, with `up`); at least 1."""
    if wanted <= 1:
        return 1
    power = 10 ** math.floor(math.log10(wanted) + 1e-12)
    steps = [m * power for m in (1, 2, 5, 10)]
    if up:
        return next(x for x in steps if x >= wanted - 1e-9)
    return max(x for x in steps if x <= wanted + 1e-9)


def roundest(low: int, high: int) -> int:
    """The integer of [low, high] that ends in most zeros; among equals a multiple of 5, then the middle."""
    if low <= 0 <= high:
        return 0
    power = 10 ** len(str(max(abs(low), abs(high))))
    while power > 1:
        for unit in (power, power // 2, power // 5):
            first = -(-low // unit)
            last = high // unit
            if first <= last:
                return ((first + last) // 2) * unit
        power //= 10
    return (low + high) // 2


@lru_cache(maxsize=8)
def grids(schema: Schema) -> tuple[Grid, ...]:
    """One grid for each modelled column, in the dictionary's order. Raises DictionaryError."""
    return tuple(LevelGrid(c, schema.missing_values) if c.categorical else NumberGrid(c) for c in schema.modelled)


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """Encoded rows of one site (or pooled), sorted by patient. Never leaves the site.

    codes: int32 [rows, columns]; patient: int64 [rows], ordinals 0..patients-1, not decreasing;
    identity: uint8 [patients, 16], SHA-256 prefix of the patient's identifier, rows of equal bytes are one
    patient; rows_per_patient: int64 [patients], each at least 1. full_rows: how many rows of a patient count in full
    (public, the study's); one row's weight in a sum is 1 / max(full_rows, rows of its patient).
    """

    codes: Codes
    patient: Ints
    identity: NDArray[np.uint8]
    rows_per_patient: Ints
    full_rows: int = 1

    def __post_init__(self) -> None:
        if self.full_rows < 1:
            raise ValueError("Records: full_rows is at least 1")
        rows, patients = len(self.codes), len(self.identity)
        if self.codes.ndim != 2 or self.patient.shape != (rows,) or self.identity.shape != (patients, 16):
            raise ValueError("Records: shapes of codes, patient and identity do not fit")
        if self.rows_per_patient.shape != (patients,) or int(self.rows_per_patient.sum()) != rows:
            raise ValueError("Records: rows_per_patient does not sum to the rows")

    @property
    def patients(self) -> int:
        return len(self.identity)

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Of each row in a sum, float64 [rows]: those of a patient sum to 1 at most."""
        return 1.0 / np.maximum(self.rows_per_patient, self.full_rows)[self.patient]

    def subset(self, mask: NDArray[np.bool_]) -> Records:
        """The patients where `mask` (bool [patients]) holds, renumbered."""
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (self.patients,):
            raise ValueError("Records.subset: one True or False for each patient")
        rows = mask[self.patient]
        renumber = np.cumsum(mask) - 1
        return Records(
            codes=self.codes[rows],
            patient=renumber[self.patient[rows]].astype(np.int64),
            identity=self.identity[mask],
            rows_per_patient=self.rows_per_patient[mask],
            full_rows=self.full_rows,
        )


def encode(schema: Schema, table: pd.DataFrame, unit: str) -> Records:
    """Encode a table; `unit` is the patient column, or "row" where each row is a patient of its own.

    Patients are ordered by identity, rows of one patient keep the table's order. With unit "row" the
    identity comes from the row's index label, so a table split over sites keeps its identities.
    Raises TableError for a missing column or a row without a patient.
    """
    absent = [c.name for c in schema.modelled if c.name not in table.columns]
    if unit != "row" and unit not in table.columns:
        absent.append(unit)
    if absent:
        raise TableError(
            "TABLE-COLUMN",
            "the table lacks column(s) " + ", ".join(repr(a) for a in absent),
            hint="name every column as in the dictionary, or take it out of the dictionary",
        )
    columns = [g.encode(table[c.name]) for c, g in zip(schema.modelled, grids(schema))]
    codes = np.column_stack(columns).astype(np.int32) if columns else np.zeros((len(table), 0), dtype=np.int32)
    position, identity = patients_of(table, unit)
    digests = identity.tobytes()
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    by_identity = np.lexsort((halves[:, 1], halves[:, 0]))
    rank = np.empty(len(identity), dtype=np.int64)
    rank[by_identity] = np.arange(len(identity))
    patient = rank[position]
    order = np.argsort(patient, kind="stable")
    return Records(
        codes=np.ascontiguousarray(codes[order]),
        patient=patient[order],
        identity=np.ascontiguousarray(identity[by_identity]),
        rows_per_patient=np.bincount(patient, minlength=len(identity)).astype(np.int64),
    )


def patients_of(table: pd.DataFrame, unit: str) -> tuple[Ints, NDArray[np.uint8]]:
    """(patient of each row as a position, identity uint8 [patients, 16]), patients in order of appearance."""
    if unit == "row":
        index = table.index if table.index.is_unique else range(len(table))
        position, labels = np.arange(len(table), dtype=np.int64), [f"row:{i}" for i in index]
    else:
        position, uniques = pd.factorize(table[unit])
        if (position < 0).any():
            raise TableError(
                "TABLE-PATIENT",
                f"rows without a patient identifier in column {unit!r}",
                where=tuple(f"row {i + 2}" for i in np.flatnonzero(position < 0)[:5]),
                hint="every row needs the patient it belongs to",
            )
        labels = ["id:" + as_text(v) for v in uniques.tolist()]  # an array's own loop is several times slower
    sha = hashlib.sha256
    digests = b"".join([sha(label.encode()).digest()[:16] for label in labels])
    return position, np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
