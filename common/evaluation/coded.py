"""What a fine code means to an analysis: a number, an event, an arm. By the dictionary alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cohortium.common.encoding import Grid, LevelGrid, NumberGrid


def number_of_code(grid: Grid) -> np.ndarray:
    """The number that a code stands for (middle of its cell; of dates, days since 1970), float64 [codes].

    NaN for missing and for levels that are no numbers.
    """
    out = np.full(grid.size, np.nan)
    if isinstance(grid, LevelGrid):
        for code, level in enumerate(grid.levels):
            try:
                number = float(level)
            except ValueError:
                continue
            out[code] = number if np.isfinite(number) else np.nan
        return out
    if not isinstance(grid, NumberGrid):
        raise TypeError(f"no numbers in a {type(grid).__name__}")
    half = np.full(grid.size - 1, 0.5)
    out[:-1] = grid.numbers(grid.decode(np.arange(grid.size - 1, dtype=np.int32), half))
    return out


def label_of_code(grid: Grid, wanted: object) -> np.ndarray:
    """1 where the code is one of `wanted` (a value, or a set of them), 0 elsewhere, −1 for missing; int32 [codes].

    Raises TableError for a level that the dictionary lacks.
    """
    out = grid.allowed(wanted).astype(np.int32)
    out[grid.missing] = -1
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """Groups compared by an analysis. of_code: int32 [fine codes], the arm of a code, −1 for none."""

    column: int
    of_code: np.ndarray = field(repr=False)
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise ValueError("arms are at least two, each with a name of its own")
        if self.of_code.min() < -1 or self.of_code.max() >= len(self.names):
            raise ValueError("a code points outside the arms")

    @classmethod
    def of_levels(cls, column: int, grid: Grid) -> Arms:
        """One arm for each level of the dictionary, in its order."""
        if not isinstance(grid, LevelGrid):
            raise ValueError(f"column {grid.name!r} has no levels to compare")
        of_code: np.ndarray = np.append(np.arange(len(grid.levels)), -1).astype(np.int32)
        return cls(column=column, of_code=of_code, names=tuple(str(level) for level in grid.levels))


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeToEvent:
    """A survival outcome in codes.

    time: (column, float64 [fine codes], NaN: the row is not used); event: (column, int32 [fine codes] -> 1 event,
    0 censored, −1 not used); arms: groups to compare, or None. unit: of the times.
    """

    time: tuple[int, np.ndarray] = field(repr=False)
    event: tuple[int, np.ndarray] = field(repr=False)
    arms: Arms | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if np.any(self.time[1] < 0):
            raise ValueError("a time to an event is not negative")
        if not np.isin(self.event[1], (-1, 0, 1)).all():
            raise ValueError("an event is 1, 0, or −1 where the row is not used")

    @property
    def names(self) -> tuple[str, ...]:
        return ("all",) if self.arms is None else self.arms.names

    def read(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(time, event, arm) of each row, NaN or −1 where it is not used; from codes int32 [rows, columns]."""
        time, event = self.time[1][codes[:, self.time[0]]], self.event[1][codes[:, self.event[0]]]
        if self.arms is None:
            return time, event, np.zeros(len(codes), dtype=np.int64)
        return time, event, self.arms.of_code[codes[:, self.arms.column]].astype(np.int64)
