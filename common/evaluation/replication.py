"""Would an analyst come to the same conclusions? Logistic and Cox regressions on held-out patients, in one step.

The sites answer with the sum of their patients' clipped score vectors at the synthetic fit β. One Newton step from
there estimates the held-out coefficients (Le Cam's one-step estimate; van der Vaart 1998, section 5.7):

    β̂ = β + (n D)⁻¹ (U − n b)        noise and clipping add (n D)⁻¹ (σ² I + n · residual) (n D)⁻ᵀ to its covariance

with D, b and the residual from `analysis.ask_about`. Beside it stands the synthetic analysis with as many patients,
and how often a reader of both would decide alike. One step is not the maximum: the further β is off, the more they
differ, by the second order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import special

from cohortium.common.evaluation.agreement import DRAWS, NOISE_AT_MOST, Z, agreement
from cohortium.common.evaluation.analysis import Question
from cohortium.common.evaluation.base import NamedFigure


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """One coefficient (a log odds or log hazard ratio), held-out against synthetic.

    low, high: 95 % interval of the population's effect, from sampling and noise; p: Wald, of both. exact_low,
    exact_high: 95 % for the figure that these very patients give without noise. synthetic…: the synthetic analysis
    as if it had as many patients. assessed: False where noise swamps it.
    """

    term: str
    estimate: float
    low: float
    high: float
    p: float
    exact_low: float
    exact_high: float
    synthetic: float
    synthetic_low: float
    synthetic_high: float
    synthetic_p: float
    noise_over_sampling: float
    assessed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Replication:
    """effects: without the intercept. figures by key: decision_agreement, estimate_agreement, ci_overlap."""

    key: str
    label: str
    model: str
    effects: tuple[Effect, ...]
    figures: dict[str, NamedFigure]
    patients: float
    clip_share: float

    def rows(self) -> tuple[NamedFigure, ...]:
        return tuple(self.figures.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class OneStep:
    """In the design's own units: beta, and the covariances of noise (with what clipping loses) and of sampling."""

    beta: np.ndarray
    noise: np.ndarray = field(repr=False)
    sampling: np.ndarray = field(repr=False)


def one_step(*, question: Question, values: np.ndarray, sigma: float, patients: float) -> OneStep:
    """The estimate from the noised score sum `values` float64 [d]; sigma: noise SD of each number; patients: held out.

    Raises ValueError for values that do not fit.
    """
    d = question.query.dim
    if np.shape(values) != (d,) or not np.all(np.isfinite(values)):
        raise ValueError(f"{d} finite numbers are needed, not {np.shape(values)}")
    if not (np.isfinite(sigma) and sigma >= 0 and np.isfinite(patients) and patients > 0):
        raise ValueError("sigma must be finite and not negative, patients above 0")
    inverse = np.linalg.inv(patients * question.slope)
    blur = sigma**2 * np.eye(d) + patients * question.residual
    return OneStep(
        beta=question.fit.beta + inverse @ (np.asarray(values, dtype=float) - patients * question.centre),
        noise=inverse @ blur @ inverse.T,
        sampling=np.linalg.inv(patients * question.information),
    )


def replicate(
    *, question: Question, values: np.ndarray, sigma: float, patients: float, seed: int = 0, draws: int = DRAWS
) -> Replication:
    """Coefficients with their intervals, and the agreement of held-out and synthetic analyses. See `one_step`."""
    step = one_step(question=question, values=values, sigma=sigma, patients=patients)
    analysis = question.analysis
    terms = np.arange(0 if analysis.model == "cox" else 1, len(analysis.names))
    units = analysis.units
    made = question.fit.beta
    se = np.sqrt(np.diag(step.sampling))
    noise_se = np.sqrt(np.diag(step.noise))
    total_se = np.hypot(se, noise_se)
    effects = []
    for j in terms:
        u = units[j]
        effects.append(
            Effect(
                term=analysis.names[j],
                estimate=float(step.beta[j] * u),
                low=float((step.beta[j] - Z * total_se[j]) * u),
                high=float((step.beta[j] + Z * total_se[j]) * u),
                p=_two_sided(step.beta[j] / total_se[j]),
                exact_low=float((step.beta[j] - Z * noise_se[j]) * u),
                exact_high=float((step.beta[j] + Z * noise_se[j]) * u),
                synthetic=float(made[j] * u),
                synthetic_low=float((made[j] - Z * se[j]) * u),
                synthetic_high=float((made[j] + Z * se[j]) * u),
                synthetic_p=_two_sided(made[j] / se[j]),
                noise_over_sampling=float(noise_se[j] / se[j]),
                assessed=bool(noise_se[j] <= NOISE_AT_MOST * se[j]),
            )
        )
    return Replication(
        key=analysis.key,
        label=analysis.label,
        model=analysis.model,
        effects=tuple(effects),
        figures=agreement(
            synthetic=made[terms],
            difference=(step.beta - made)[terms],
            noise=step.noise[np.ix_(terms, terms)],
            sampling=step.sampling[np.ix_(terms, terms)],
            how=(
                f"One-step estimates of {len(terms)} coefficients from the noised score sum (noise SD {sigma:.3g} a "
                f"number; {question.clip_share:.1%} of synthetic rows clipped), both analyses with as many patients "
                "as are held out."
            ),
            seed=seed,
            draws=draws,
        ),
        patients=float(patients),
        clip_share=question.clip_share,
    )


def _two_sided(z: float) -> float:
    return float(special.erfc(abs(z) / np.sqrt(2)))
