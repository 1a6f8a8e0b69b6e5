"""Principal axes: does the synthetic table spread along the same directions as real patients?

The axes are the synthetic correlation matrix's (public). How much of the held-out variance lies on each is linear in
the noised correlations, so its noise is Gaussian and known. The overlap is the held-out variance on the first k
synthetic axes over the most that any k axes could hold (Krzanowski 1979, JASA 74, in its variance form): 1 where the
synthetic axes are as good as the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cohortium.common.evaluation.base import Figure, NamedFigure
from cohortium.common.evaluation.belts import Interval, linear_figure
from cohortium.common.evaluation.correlation import Correlations
from cohortium.common.evaluation.sizes import simulated

SHARE_WANTED = 0.7
AXES_AT_MOST = 10
HALF_WIDTH_AT_MOST = 0.1
DRAWS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """real: share of the held-out variance on each synthetic axis; synthetic: the synthetic table's own shares.

    together: share of the held-out variance on all of these axes; synthetic_together; overlap: see the module.
    """

    real: tuple[Figure, ...]
    synthetic: tuple[float, ...]
    together: Figure
    synthetic_together: float
    overlap: NamedFigure


def axes(found: Correlations) -> Axes:
    """The first axes that hold 70 % of the synthetic variance (10 at most)."""
    state, made = found.state, found.synthetic
    p = len(made)
    upper = np.triu_indices(p, 1)
    values, vectors = np.linalg.eigh(made)
    values, vectors = values[::-1], vectors[:, ::-1]
    k = min(int(np.searchsorted(np.cumsum(values) / p, SHARE_WANTED)) + 1, AXES_AT_MOST, p - 1)
    how = f"Share of the variance of {p} rank scores along axes of the synthetic correlations."
    shares = []
    for a in range(k):
        weight = 2 * (vectors[:, a][:, None] * vectors[:, a])[upper] / p
        shares.append(_share(weight, state.seen, state.noise, values[a] / p, how))
    top = vectors[:, :k]
    projector = top @ top.T
    together = _share(
        2 * projector[upper] / p, state.seen, state.noise, float(values[:k].sum()) / p, f"{how} All {k} together."
    )

    def overlap(difference: np.ndarray) -> np.ndarray:
        matrices = np.repeat(made[None], len(difference), axis=0)
        matrices[:, upper[0], upper[1]] += difference
        matrices[:, upper[1], upper[0]] += difference
        held = np.einsum("dij,ij->d", matrices, projector)
        return np.asarray(held / np.linalg.eigvalsh(matrices)[:, -k:].sum(axis=1))

    label = f"Overlap of the first {k} principal axes"
    if state.worlds is not None:
        interval = simulated(state.worlds, state.seen, state.noise, state.sampling, overlap, draws=DRAWS)
    elif np.all(state.noise == 0):
        exact = float(overlap(state.seen[None])[0])
        interval = Interval(low=exact, middle=exact, high=exact)
    else:
        reason = "a column has no spread in the synthetic table or at the sites"
        return Axes(
            real=tuple(shares),
            synthetic=tuple(float(v) / p for v in values[:k]),
            together=together,
            synthetic_together=float(values[:k].sum()) / p,
            overlap=NamedFigure(label=label, figure=Figure.unknown(reason, unit="share of variance")),
        )
    return Axes(
        real=tuple(shares),
        synthetic=tuple(float(v) / p for v in values[:k]),
        together=together,
        synthetic_together=float(values[:k].sum()) / p,
        overlap=NamedFigure(label=label, figure=_overlap_figure(interval, how)),
    )


def _share(weight: np.ndarray, seen: np.ndarray, noise: np.ndarray, made: float, how: str) -> Figure:
    return linear_figure(
        float(made + weight @ seen),
        float(np.sqrt((weight**2) @ (noise**2))),
        low=0.0,
        high=1.0,
        at_most=HALF_WIDTH_AT_MOST,
        reference=float(made),
        reference_text="the synthetic table",
        unit="share of variance",
        how=how,
    )


def _overlap_figure(interval: Interval, how: str) -> Figure:
    low, value, high = (float(np.clip(v, 0.0, 1.0)) for v in (interval.low, interval.value, interval.high))
    if (high - low) / 2 > HALF_WIDTH_AT_MOST:
        reason = f"the noise leaves it anywhere between {low:.2f} and {high:.2f}"
        return Figure.unknown(reason, unit="share of variance", direction="higher", how=how)
    return Figure(
        value=value,
        low=low,
        high=high,
        reference=1.0,
        reference_text="the real axes themselves",
        unit="share of variance",
        direction="higher",
        how=how,
    )
