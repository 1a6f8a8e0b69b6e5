"""What a diagnosis says: figures, each with what it means and what it does not mean.

Site-only: built from records without noise, so none of these types has a form that travels, and nothing in the guard
or the courier imports this folder.
"""

from __future__ import annotations

from dataclasses import dataclass

from cohortium.common.evaluation.base import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One figure. means: what a reader may conclude. limits: what not."""

    key: str
    label: str
    figure: Figure
    means: str
    limits: str

    def __post_init__(self) -> None:
        if not (self.means and self.limits):
            raise ValueError("a figure of a site's report says what it means and what it does not mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Shares of patients in bins of a number: training patients beside held-out ones (empty: no control).

    edges: one more than the bins.
    """

    title: str
    axis: str
    edges: tuple[float, ...]
    train: tuple[float, ...]
    control: tuple[float, ...]
    train_patients: int
    control_patients: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One kind of question. warning: the sentence that stands above all of its figures."""

    key: str
    title: str
    intro: str
    warning: str
    items: tuple[Item, ...]
    histograms: tuple[Histogram, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All that a site's page shows. study facts are public, everything else stays here."""

    site: str
    run: str
    study: str
    synthetic_file: str
    synthetic_sha256: str
    train_patients: int
    control_patients: int
    synthetic_rows: int
    columns: int
    seed: int
    statement: str
    sampled: tuple[str, ...]
    sections: tuple[Section, ...]
    unassessed: tuple[str, ...]


def unknown(reason: str, *, unit: str = "") -> Figure:
    return Figure.unknown(reason, unit=unit)


NO_CONTROL = (
    "Too few patients were held out of training to compare with: without a control nobody can tell what an attack "
    "gains from the model's training."
)
