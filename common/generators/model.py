"""Fitted models: arrays that draw bins, and the shared road from bins to herded fine codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cohortium.common.encoding import Codes
from cohortium.common.generators.alias import Alias
from cohortium.common.generators.base import Floats
from cohortium.common.generators.bins import Bins
from cohortium.common.generators.features import clear_own
from cohortium.common.generators.herding import EXCESS, Herder, Targets, towards
from cohortium.common.generators.measure import Measured
from cohortium.common.generators.nade import Nade
from cohortium.common.generators.outcome import Outcome, OutcomeLaw, applies, fit_outcome
from cohortium.common.generators.relevance import Seen
from cohortium.common.generators.sampling import BLOCK, Allowed, Placer, bin_share, resampled
from cohortium.common.generators.threads import one_thread
from cohortium.common.generators.three_way import MOST_LEVELS, ByClass

CONDITION_EXCESS = 4
DRAWN_AT_ONCE = 8192  # rows: arrays of a column stay below what the C library maps and zeroes anew for each
TOLERANCE = 1.0  # standard deviations of noise that herding does not follow
OUTCOME_ROWS = (2048, 16384)  # at least and at most: rows of the model that the target's law is fitted on
Shares = Mapping[int, Floats]
"""Allowed part of each bin of some columns."""
Bins2 = NDArray[np.int64]
Draw = Callable[[int, np.random.Generator], Bins2]


def moments_of(
    weights: Floats, tables: tuple[Floats, ...], features: tuple[Floats, ...]
) -> tuple[tuple[Floats, ...], Floats]:
    """A mixture's own one-ways and Gram matrix (zero diagonal blocks)."""
    ones = tuple(weights @ t for t in tables)
    means = np.concatenate([t @ f for t, f in zip(tables, features)], axis=1)
    return ones, clear_own(means.T @ (means * weights[:, None]), [f.shape[1] for f in features])


def targets_of(measured: Measured, weights: Floats, tables: tuple[Floats, ...]) -> Targets:
    """What herded rows shall match: the mixture's moments, moved to the measured ones beyond their noise."""
    ones, gram = moments_of(weights, tables, measured.features)
    one_way = []
    for mine, seen, sd in zip(ones, measured.one_way, measured.one_way_sd):
        moved = np.maximum(towards(mine, seen, TOLERANCE * sd), 0.0)
        one_way.append(moved / max(moved.sum(), 1e-12))
    return Targets(
        one_way=tuple(one_way),
        features=measured.features,
        gram=towards(gram, measured.gram, TOLERANCE * measured.gram_sd),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureModel:
    """weights [K], tables per column [K, bins]; bins and targets as measured."""

    bins: tuple[Bins, ...]
    weights: Floats
    tables: tuple[Floats, ...]
    targets: Targets
    outcome: Outcome | None = None
    kind: str = "mixture"

    def drawer(self, shares: Shares) -> Draw:
        """Draws bins [rows, columns], exactly conditioned on `shares`; what all draws need is worked out once."""
        weights, tables = self.weights, list(self.tables)
        for column, share in shares.items():
            held = tables[column] * share[None, :]
            mass = held.sum(axis=1)
            weights = weights * mass
            tables[column] = np.where(mass[:, None] > 0, held, share[None, :])
        cumulative = np.cumsum(weights if weights.sum() > 0 else self.weights)
        cumulative /= cumulative[-1]
        boxes = [Alias.of(table) for table in tables]

        def draw(rows: int, rng: np.random.Generator) -> Bins2:
            out = np.empty((len(boxes), rows), dtype=np.int64)
            for at in range(0, rows, DRAWN_AT_ONCE):
                part = out[:, at : at + DRAWN_AT_ONCE]
                u = rng.random(part.shape[1])
                which: Bins2 = np.asarray(np.searchsorted(cumulative, u, side="right"))  # the last is exactly 1
                for column, box in zip(part, boxes, strict=True):
                    column[:] = box.draw(which, rng)
            return out.T

        return draw

    def draw(self, rows: int, rng: np.random.Generator, shares: Shares | None = None) -> Bins2:
        """Bins [rows, columns], see `drawer`."""
        return self.drawer(shares or {})(rows, rng)

    def own_law(self, bins: Bins2, column: int) -> Floats:
        """The column's distribution alone: what the components add to it, the measured moments say better."""
        return np.tile(np.log(np.maximum(self.targets.one_way[column], 1e-9)), (len(bins), 1))

    def sample(self, rows: int, *, seed: int, where: Allowed | None = None) -> Codes:
        return sample_bins(self, rows, seed=seed, where=where)

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays, header = common_arrays(self)
        arrays["weights"] = self.weights
        for c, table in enumerate(self.tables):
            arrays[f"table{c:05d}"] = table
        return arrays, header | {"kind": self.kind}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> MixtureModel:
        return cls(
            **common_from_arrays(arrays, header),
            weights=np.asarray(arrays["weights"], dtype=np.float64),
            tables=tuple(np.asarray(arrays[f"table{c:05d}"], dtype=np.float64) for c in range(len(header["columns"]))),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NadeModel:
    """An autoregressive network over the bins: parameters float32 [d], hidden units."""

    bins: tuple[Bins, ...]
    parameters: NDArray[np.float32]
    hidden: int
    targets: Targets
    outcome: Outcome | None = None
    kind: str = "nade"

    def network(self) -> Nade:
        return Nade({"kind": "nade", "bins": [b.size for b in self.bins], "hidden": self.hidden})

    def drawer(self, shares: Shares) -> Draw:
        """Draws bins [rows, columns]. Under conditions: importance resampling, since later columns are conditioned
        on too late (a fourfold excess, rows taken by how likely their history made the condition)."""
        network = self.network()

        def free(rows: int, rng: np.random.Generator) -> Bins2:
            parts = [min(DRAWN_AT_ONCE, rows - at) for at in range(0, rows, DRAWN_AT_ONCE)]
            return np.concatenate([network.draw(self.parameters, part, rng)[0] for part in parts])

        def conditioned(rows: int, rng: np.random.Generator) -> Bins2:
            drawn, log_weight = network.draw(self.parameters, CONDITION_EXCESS * rows, rng, shares)
            weight = np.exp(log_weight - log_weight.max())
            return drawn[resampled(weight, rows, rng)]

        return conditioned if shares else free

    def draw(self, rows: int, rng: np.random.Generator, shares: Shares | None = None) -> Bins2:
        """Bins [rows, columns], see `drawer`."""
        return self.drawer(shares or {})(rows, rng)

    def own_law(self, bins: Bins2, column: int) -> Floats:
        """log p(column | all others), up to a constant of the row."""
        return self.network().log_given_others(self.parameters, bins, column)

    def sample(self, rows: int, *, seed: int, where: Allowed | None = None) -> Codes:
        return sample_bins(self, rows, seed=seed, where=where)

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays, header = common_arrays(self)
        return arrays | {"parameters": self.parameters}, header | {"kind": self.kind, "hidden": self.hidden}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> NadeModel:
        return cls(
            **common_from_arrays(arrays, header),
            parameters=np.asarray(arrays["parameters"], dtype=np.float32),
            hidden=int(header["hidden"]),
        )


Fitted = TypeVar("Fitted", MixtureModel, NadeModel)


def with_outcome(
    model: Fitted, column: int | None, *, seen: Seen, seed: int, by_class: ByClass | None = None
) -> Fitted:
    """The model, its target drawn by the law that the measured moments speak for; itself without such a target."""
    if column is None or not applies(model.targets, column, ordered=_is_number(model.bins[column])):
        return model
    least, most = OUTCOME_ROWS
    rng = np.random.default_rng([seed, 0x6F75])
    draw, herder = model.drawer({}), Herder(model.targets)
    left, parts = int(min(max(2 * seen.patients, least), most)), []
    with one_thread():
        while left > 0:
            parts.append(_herded(draw, herder, min(BLOCK, left), rng))
            left -= BLOCK
        rows = np.concatenate(parts)
        outcome = fit_outcome(model.targets, column, rows, lambda b: model.own_law(b, column), seen, by_class)
    return replace(model, outcome=outcome)


def _is_number(bins: Bins) -> bool:
    """Whether there are more values than levels may have: such numbers stay as the generator drew them."""
    return bins.ordered and len(bins.map) > MOST_LEVELS + 1


def sample_bins(model: MixtureModel | NadeModel, rows: int, *, seed: int, where: Allowed | None) -> Codes:
    """Draw, herd (not under a condition: the targets describe everyone), draw the target, place inside bins."""
    rng, bins = np.random.default_rng([seed, 0x726F]), model.bins
    allowed = dict(where or {})
    shares = {c: bin_share(bins[c], a) for c, a in allowed.items()}
    law, wanted = None, None
    if model.outcome is not None:
        column = model.outcome.column
        law = OutcomeLaw(model.outcome, model.targets, lambda b: model.own_law(b, column))
        wanted = shares.pop(column, None)
    draw = model.drawer(shares)
    placers = [Placer(b, allowed.get(c)) for c, b in enumerate(bins)]
    out = np.empty((rows, len(bins)), dtype=np.int32, order="F")
    herder = None if allowed or rows < 2 else Herder(model.targets)
    with one_thread():
        for at in range(0, rows, BLOCK):
            count = min(BLOCK, rows - at)
            if law is not None and wanted is not None:
                chosen = law.conditioned(draw, count, rng, wanted)
            else:
                chosen = draw(count, rng) if herder is None else _herded(draw, herder, count, rng)
                if law is not None:
                    chosen = law.redraw(chosen, rng, among=rows)
            for c, placer in enumerate(placers):
                out[at : at + count, c] = placer.place(chosen[:, c], rng)
    return out


def _herded(draw: Draw, herder: Herder, rows: int, rng: np.random.Generator) -> Bins2:
    pool = draw(EXCESS * rows, rng)
    return pool[herder.select(pool, rows)]


def common_arrays(model: MixtureModel | NadeModel) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Bins, targets and the target's law as arrays named by column, and a header."""
    bins, targets = model.bins, model.targets
    arrays: dict[str, NDArray[Any]] = {"gram": targets.gram}
    for c, b in enumerate(bins):
        arrays[f"map{c:05d}"], arrays[f"within{c:05d}"], arrays[f"mass{c:05d}"] = b.map, b.within, b.mass
        arrays[f"one{c:05d}"], arrays[f"feature{c:05d}"] = targets.one_way[c], targets.features[c]
    header: dict[str, Any] = {
        "format": 1,
        "columns": [{"size": b.size, "missing": b.missing, "ordered": b.ordered} for b in bins],
    }
    if model.outcome is not None:
        arrays["outcome"], header["outcome"] = model.outcome.slope, model.outcome.column
        if model.outcome.square is not None:
            arrays["square"] = model.outcome.square
    return arrays, header


def common_from_arrays(arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> dict[str, Any]:
    count = len(header["columns"])
    bins = tuple(
        Bins(
            map=np.asarray(arrays[f"map{c:05d}"], dtype=np.int32),
            size=int(h["size"]),
            within=np.asarray(arrays[f"within{c:05d}"], dtype=np.float64),
            missing=int(h["missing"]),
            mass=np.asarray(arrays[f"mass{c:05d}"], dtype=np.float64),
            ordered=bool(h["ordered"]),
        )
        for c, h in enumerate(header["columns"])
    )
    targets = Targets(
        one_way=tuple(np.asarray(arrays[f"one{c:05d}"], dtype=np.float64) for c in range(count)),
        features=tuple(np.asarray(arrays[f"feature{c:05d}"], dtype=np.float64) for c in range(count)),
        gram=np.asarray(arrays["gram"], dtype=np.float64),
    )
    outcome = None
    if "outcome" in header:
        slope = np.asarray(arrays["outcome"], dtype=np.float64)
        square = np.asarray(arrays["square"], dtype=np.float64) if "square" in arrays else None
        outcome = Outcome(column=int(header["outcome"]), slope=slope, square=square)
    return {"bins": bins, "targets": targets, "outcome": outcome}
