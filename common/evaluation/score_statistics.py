"""How well a score parts those with an outcome from those without, from counts by cell of the score.

Cells are intervals of the score in ascending order; a patient's score is the cell. Every function takes counts with
and without the outcome, float64 [draws, cells], and gives float64 [draws]: one exact table is one draw, and many
draws of noised counts are as many. Where every distinct score is a cell of its own these are the usual figures.

Counts may be weights (a patient with m rows gives each row 1/m), and, where noise was added, a little negative.
A figure whose denominator is not positive is NaN.
"""

from __future__ import annotations

import numpy as np

SLOPE_STEPS = 30


def auc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; a tie (same cell) counts one half. scikit-learn's roc_auc_score of the cells."""
    below = np.cumsum(negative, axis=1) - negative / 2
    return _ratio((positive * below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Σ (recall gained at a cell) · (precision there), from the highest cell down: average_precision_score."""
    true = np.cumsum(positive[:, ::-1], axis=1)
    false = np.cumsum(negative[:, ::-1], axis=1)
    called = true + false
    # With noise a precision may leave [0, 1]: no table of patients has such a one.
    precision = np.clip(np.where(called > 0, true / np.where(called > 0, called, 1.0), 0.0), 0.0, 1.0)
    return _ratio((positive[:, ::-1] * precision).sum(axis=1), positive.sum(axis=1))


def brier(positive: np.ndarray, negative: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Mean squared difference of outcome and predicted chance, float64 [cells]: brier_score_loss."""
    lost = positive @ (1 - chance) ** 2 + negative @ chance**2
    return _ratio(lost, positive.sum(axis=1) + negative.sum(axis=1))


def observed_over_expected(positive: np.ndarray, negative: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Outcomes seen for each one predicted; 1 is calibrated in the large."""
    return _ratio(positive.sum(axis=1), (positive + negative) @ chance)


def calibration_slope(positive: np.ndarray, negative: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Slope b of the logistic regression outcome ~ a + b · log-odds predicted, float64 [cells]; 1 is calibrated.

    Below 1 the predictions are too extreme (Cox 1958, Biometrika 45; Van Calster et al. 2016, J Clin Epidemiol 74).
    Newton steps with halving for all draws at once; NaN where they find no end or the slope has none.
    """
    x = np.stack([np.ones_like(log_odds), log_odds])  # [2, cells]
    total = positive + negative
    beta = np.zeros((len(positive), 2))
    fine = np.ones(len(positive), dtype=bool)
    step = np.zeros_like(beta)
    for _ in range(SLOPE_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * np.clip(beta @ x, -60, 60)))
        gradient = (positive - total * p) @ x.T
        w = total * p * (1 - p)
        a, b, c = w.sum(axis=1), w @ x[1], w @ x[1] ** 2
        det = a * c - b * b
        fine &= (det > 1e-12 * np.abs(a * c)) & (a > 0)
        safe = np.where(fine, det, 1.0)
        step = np.stack([c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], axis=1)
        step = np.where(fine[:, None], step / safe[:, None], 0.0)
        # The log-likelihood is concave, but a first full step may leap over its top.
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        beta += step
        if (np.abs(step) < 1e-13).all():
            break
    fine &= np.abs(step).max(axis=1) < 1e-8
    return np.where(fine, beta[:, 1], np.nan)


def confusion(positive: np.ndarray, negative: np.ndarray, first: int) -> dict[str, np.ndarray]:
    """Figures at a threshold: cells from `first` on are called positive. Keys as in `CONFUSION`."""
    n1, n0 = positive.sum(axis=1), negative.sum(axis=1)
    true, false = positive[:, first:].sum(axis=1), negative[:, first:].sum(axis=1)
    sensitivity, specificity = _ratio(true, n1), _ratio(n0 - false, n0)
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "g_mean": np.sqrt(np.maximum(sensitivity, 0) * np.maximum(specificity, 0)),
        "f1": _ratio(2 * true, n1 + true + false),
        "precision": _ratio(true, true + false),
    }


CONFUSION = ("sensitivity", "specificity", "balanced_accuracy", "g_mean", "f1", "precision")


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    good = below > 0
    return np.where(good, above / np.where(good, below, 1.0), np.nan)
