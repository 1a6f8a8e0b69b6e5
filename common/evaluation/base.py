"""What an evaluation hands on: figures with interval and reference, scores, and a run's public facts.

Nothing here reads a record. Every type turns into plain JSON and back (``to_json``, ``from_json``), so that
`cohortium report` draws the same page from result.json that the run drew from memory.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

Direction = Literal["lower", "higher", "none"]
Word = Literal["good", "usable with care", "not fit", "cannot be assessed"]
T = TypeVar("T")
LEVELS_AT_MOST = 20
"""Of a target that is predicted; more are too few patients each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number with its interval and its reference.

    value: None means that it cannot be assessed, and then `reason` says why.
    low, high: 95 % interval; both None where none can be given.
    reference: what real data of that size scores; reference_low, reference_high: the range that sampling
    alone gives it. floor: what a table scores whose columns were shuffled independently of one another.
    direction: which way is better. how: one sentence on how it was computed.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    reference_low: float | None = None
    reference_high: float | None = None
    reference_text: str = ""
    floor: float | None = None
    unit: str = ""
    direction: Direction = "none"
    how: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "reference", "reference_low", "reference_high", "floor"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"Figure.{name} must be a finite number or None, not {number!r}")
        if self.value is None and not self.reason:
            raise ValueError("a Figure without a value must say in `reason` why it cannot be assessed")
        if (self.low is None) != (self.high is None):
            raise ValueError("a Figure has both ends of its interval or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("a Figure's interval must have low <= high")
        if self.direction not in ("lower", "higher", "none"):
            raise ValueError(f"Figure.direction must be lower, higher or none, not {self.direction!r}")

    @classmethod
    def unknown(cls, reason: str, *, unit: str = "", direction: Direction = "none", how: str = "") -> Figure:
        """A figure that cannot be assessed."""
        return cls(value=None, reason=reason, unit=unit, direction=direction, how=how)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedFigure:
    """A figure with the words a reader sees in front of it."""

    label: str
    figure: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnScore:
    """One column, real against synthetic.

    tvd: total variation distance over the ruler's cells (missing is a cell of its own); ks: greatest gap
    between the two distribution functions of the values present (None for categories).
    labels, real, synthetic, band_low, band_high: the picture's cells; shares that sum to 1, and the range in
    which a second sample of real rows would fall 95 times in 100.
    """

    name: str
    kind: str
    unit: str
    description: str
    tvd: Figure
    ks: Figure | None
    real_mean: float | None
    synthetic_mean: float | None
    real_sd: float | None
    synthetic_sd: float | None
    real_missing: float
    synthetic_missing: float
    labels: tuple[str, ...]
    real: tuple[float, ...]
    synthetic: tuple[float, ...]
    band_low: tuple[float, ...]
    band_high: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            len(
                {
                    len(self.labels),
                    len(self.real),
                    len(self.synthetic),
                    len(self.band_low),
                    len(self.band_high),
                }
            )
            != 1
        ):
            raise ValueError("a column's picture needs one real, one synthetic share and one band per cell")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The association of two columns (bias-corrected Cramér's V, 0 to 1) in real and synthetic rows."""

    first: str
    second: str
    real: float
    synthetic: float
    tvd: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Associations:
    """Association of every pair: the map's columns with both square matrices, and the worst pairs.

    names: the columns drawn (those with the greatest differences where there are too many to draw).
    """

    names: tuple[str, ...]
    real: tuple[tuple[float, ...], ...]
    synthetic: tuple[tuple[float, ...], ...]
    worst: tuple[Pair, ...]
    pairs: int
    columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A tile: for one use, one word, the numbers behind it, and the thresholds that gave the word."""

    use: str
    word: Word
    sentence: str
    thresholds: str
    figure: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """All that one synthetic table scored against real rows.

    basis: what the real side is, in words ("held-out patients" or "in-sample"). figures: the summary figures
    by a stable key (tvd1, tvd2, association_gap, tstr_auc, trtr_auc, auc_difference).
    auc: the rows of the AUC picture. unassessed: what could not be assessed and why.
    """

    basis: str
    in_sample: bool
    target: str | None
    real_rows: int
    real_patients: int
    train_rows: int
    synthetic_rows: int
    seed: int
    figures: dict[str, Figure]
    columns: tuple[ColumnScore, ...]
    associations: Associations | None
    auc: tuple[NamedFigure, ...]
    verdicts: tuple[Verdict, ...]
    headline: str
    unassessed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, numbers to six significant digits."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        return from_json(cls, data)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One release (or a phase of equal ones) of the plan; epsilon_cumulated includes all rows before."""

    id: str
    purpose: str
    kind: str
    repeats: int
    sampling_rate: float
    noise_multiplier: float
    epsilon_cumulated: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetFacts:
    """The study's budget: total and spent (add/remove, one hospital), and the same loss in other units."""

    epsilon_total: float
    epsilon_spent: float
    delta: float
    replace_one: float | None = None
    hospitals2: float | None = None
    hospitals3: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRow:
    """Who answered a round and who dropped out of it."""

    round: int
    purpose: str
    answered: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFacts:
    """What the report says beside the scores: public facts of study, plan, ledger and run.

    provenance: name → value lines (plan digest, ledger heads, versions, seeds, hashes).
    private_scores: figures that came out of the privacy budget (see private.py).
    not_protected: the limits of the guarantee, one sentence each.
    """

    study_id: str
    title: str
    statement: str
    mode: Literal["simulation", "deployment"]
    plan: tuple[PlanRow, ...]
    budget: BudgetFacts
    rounds: tuple[RoundRow, ...]
    provenance: dict[str, str]
    warnings: tuple[str, ...] = ()
    private_scores: tuple[NamedFigure, ...] = ()
    not_protected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("simulation", "deployment"):
            raise ValueError(f"ReportFacts.mode must be simulation or deployment, not {self.mode!r}")
        if not self.statement:
            raise ValueError("a report without its privacy statement is not written")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite epsilon becomes the string "inf"."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReportFacts:
        return from_json(cls, data)


def to_json(value: object) -> Any:
    """Dataclasses, tuples and dicts as plain JSON values; floats to six significant digits.

    Infinity becomes the string "inf", which canonical JSON can hold; NaN is refused: it is never a result.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("a result must not hold NaN; use Figure.unknown")
        return ("inf" if value > 0 else "-inf") if math.isinf(value) else float(f"{value:.6g}")
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"cannot be written to JSON: {type(value).__name__}")


def from_json(cls: type[T], data: Any) -> T:
    """The inverse of `to_json` for a dataclass type, driven by its annotations. Raises ValueError."""
    return _revive(cls, data)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """A result has thousands of figures of a few kinds: their types are looked up once."""
    return typing.get_type_hints(kind)


def _revive(kind: Any, data: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _revive(next(a for a in args if a is not type(None)), data)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise ValueError(f"a list is needed, not {type(data).__name__}")
        return tuple(_revive(args[0], v) for v in data)
    if origin is dict:
        return {k: _revive(args[1], v) for k, v in dict(data).items()}
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(data, dict):
            raise ValueError(f"{kind.__name__} must be a JSON object")
        hints = _hints(kind)
        unknown = set(data) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
        try:
            return kind(**{k: _revive(hints[k], v) for k, v in data.items()})
        except TypeError as error:
            raise ValueError(f"{kind.__name__}: {error}") from None
    if kind is float:
        return float(data)
    return data
