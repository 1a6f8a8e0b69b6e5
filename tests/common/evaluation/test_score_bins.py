"""Cuts follow the noise; spreading bins over fine cells keeps what was counted."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cohortium.common.evaluation import score_statistics as stats
from cohortium.common.evaluation.score_bins import MOST_BINS, Cuts, cuts


def scored(seed: int, n: int = 6000, gap: float = 1.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 8])
    hit = rng.random(n) < 0.3
    return rng.standard_normal(n) + gap * hit, hit


def made(sigma: float = 14.0, patients: float = 3000.0, **more: float) -> Cuts:
    score, hit = scored(0, **more)  # type: ignore[arg-type]
    return cuts(score=score, hit=hit, sigma=sigma, patients=patients)


def test_the_threshold_is_an_edge_where_the_g_mean_is_largest() -> None:
    score, hit = scored(0)
    chosen = made()
    best = chosen.edges[chosen.threshold - 1]

    def g_mean(at: float) -> float:
        return float(np.sqrt((score[hit] >= at).mean() * (score[~hit] < at).mean()))

    assert g_mean(best) >= max(g_mean(s) for s in score[::37]) - 1e-12
    assert best == chosen.cells[chosen.first_cell - 1]


def test_more_patients_or_less_noise_give_more_bins() -> None:
    """Red where the rule does not look at the noise."""
    bins = [made(patients=n).bins for n in (500, 3000, 30_000, 1_000_000)]
    assert bins == sorted(bins) and bins[0] <= 3 < 6 <= bins[2] and bins[-1] <= MOST_BINS
    assert made(sigma=0.0).bins == len(made(sigma=0.0).cells) + 1


def test_the_chosen_bins_lower_the_real_error_of_the_auc() -> None:
    """Against equal bins: the rule's expectation is held to what noise does to the counts. 400 draws."""
    score, hit = scored(1)
    held, truth = scored(2, n=3000)
    exact = roc_auc_score(truth, held)
    rng = np.random.default_rng(3)
    ours = cuts(score=score, hit=hit, sigma=14.0, patients=3000)

    def error(chosen: Cuts) -> float:
        bin_of = np.searchsorted(chosen.edges, held, side="right")
        counts = [np.bincount(bin_of[truth == k], minlength=chosen.bins)[None] for k in (True, False)]
        noised = [c + 14.0 * rng.standard_normal((400, chosen.bins)) for c in counts]
        fine = chosen.spread(noised[0], chosen.positive), chosen.spread(noised[1], chosen.negative)
        return float(np.sqrt(np.mean((stats.auc(*fine) - exact) ** 2)))

    def equal(bins: int) -> Cuts:
        places = np.linspace(0, len(ours.cells) - 1, bins + 1).astype(int)[1:-1]
        return Cuts(
            cells=ours.cells,
            places=places,
            threshold=1,
            positive=ours.positive,
            negative=ours.negative,
            chance=ours.chance,
            log_odds=ours.log_odds,
            prevalence=ours.prevalence,
        )

    assert error(ours) < 0.011
    assert error(ours) < 0.6 * error(equal(20))


@pytest.mark.parametrize("lean", [0.0, 0.5, 1.0])
def test_spreading_keeps_the_counts_of_each_bin(lean: float) -> None:
    """The shift keeps them too where no bin's edge lies in the outermost 0.2 % of a class."""
    chosen = made()
    counts = np.array([[250.0, 400, 500, 350, 200, 180, 160, 140, 120, 90]])[:, : chosen.bins] + 0.5
    fine = chosen.spread(counts, chosen.negative, lean)
    assert chosen.coarse(fine) == pytest.approx(counts, abs=1e-6)
    assert (fine >= -1e-9).all()


def test_the_synthetic_shares_are_spread_into_themselves() -> None:
    """Where held-out patients are as the synthetic ones, both ways of spreading give the synthetic shape back."""
    chosen = made()
    for shares in (chosen.positive, chosen.negative):
        for lean in (0.0, 1.0):
            back = chosen.spread(1000 * chosen.coarse(shares[None]), shares, lean)[0]
            assert back == pytest.approx(1000 * shares, abs=0.2)


def test_where_a_class_lies_lower_it_leans_to_the_lower_end_of_a_bin() -> None:
    """A synthetic gap of 2.2 against a true one of 1.2: plain proportion overrates the area, the shift does not."""
    score, hit = scored(4, gap=2.2)
    held, truth = scored(5, n=200_000, gap=1.2)
    chosen = cuts(score=score, hit=hit, sigma=14.0, patients=3000)
    bin_of = np.searchsorted(chosen.edges, held, side="right")
    counts = [np.bincount(bin_of[truth == k], minlength=chosen.bins)[None].astype(float) for k in (True, False)]

    def area(lean: float) -> float:
        return float(
            stats.auc(chosen.spread(counts[0], chosen.positive, lean), chosen.spread(counts[1], chosen.negative, lean))[
                0
            ]
        )

    exact = roc_auc_score(truth, held)
    assert abs(area(1.0) - exact) < 0.012 < area(0.0) - exact


def test_a_score_that_cannot_be_cut_is_refused() -> None:
    score, hit = scored(6, n=50)
    with pytest.raises(ValueError, match="both kinds"):
        cuts(score=score, hit=np.zeros(50, dtype=bool), sigma=1.0, patients=10)
    with pytest.raises(ValueError, match="distinct"):
        cuts(score=np.zeros(50), hit=hit, sigma=1.0, patients=10)
