"""The verdict from private figures: one word per use, by thresholds that the study fixed before anything was run.

A figure is held against its reference (what real rows of that size, or the model on fresh synthetic patients, would
score): how far it falls behind gives the word. The interval is taken seriously: "good" must hold at its worse end
with the wider threshold, so that a lucky noise does not make a table good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cohortium.common.evaluation.base import Figure, Verdict, Word
from cohortium.common.evaluation.findings import Section
from cohortium.common.evaluation.verdict import COLUMNS, MODELS, RELATIONS, headline_of
from cohortium.common.study_evaluation import Evaluation

SURVIVAL = "Survival curves"
ANALYSES = "Repeating analyses"
GROUPS = "Use across groups"


def verdicts(sections: Sequence[Section], evaluation: Evaluation) -> tuple[tuple[Verdict, ...], str]:
    """(tiles, headline). A use that the study did not ask about has no tile."""
    figures = {f.key: f.named.figure for section in sections for f in section.findings}
    notes = {section.key: section.notes for section in sections}
    tiles = [
        _tile(COLUMNS, figures.get("column_agreement"), evaluation, "columns", "agreement of columns"),
        _tile(
            RELATIONS, figures.get("correlation_similarity"), evaluation, "correlations", "similarity of correlations"
        ),
        _models(figures.get("tstr_auc"), evaluation),
        _tile(SURVIVAL, figures.get("km_gap"), evaluation, "survival", "largest gap of the survival curves"),
        _tile(
            ANALYSES,
            _leniently(_worst(figures, ".ci_overlap")),
            evaluation,
            "replication",
            "overlap of confidence intervals",
        ),
        _tile(GROUPS, _worst(figures, ".error_rate", "group_gap."), evaluation, "groups", "gap in error rate"),
    ]
    asked = {
        "associations": RELATIONS,
        "prediction": MODELS,
        "survival": SURVIVAL,
        "replication": ANALYSES,
        "fairness": GROUPS,
    }
    for key, use in asked.items():
        if key in notes and not any(tile is not None and tile.use == use for tile in tiles):
            reason = " ".join(notes[key]) or "There is no figure."
            tiles.append(_unknown(use, Figure.unknown(reason), ""))
    found = tuple(tile for tile in tiles if tile is not None)
    return found, headline_of(found)


def _models(figure: Figure | None, evaluation: Evaluation) -> Verdict | None:
    """A model that scores in reality as it does on the table may be poor in both: what the table lost of the relations
    shows only against an AUC that the study expects. Without one the best word is "usable with care"."""
    expected = evaluation.expected_auc
    if figure is not None and figure.reference is not None and expected is not None:
        figure = replace(figure, reference=max(figure.reference, expected), reference_low=None, reference_high=None)
    tile = _tile(MODELS, figure, evaluation, "prediction", "AUC on held-out patients", floor=0.5)
    if tile is None or expected is not None or tile.word != "good":
        return tile
    sentence = f"{tile.sentence} The study expects no AUC, so relations that the table lost cannot be seen here."
    return replace(tile, word="usable with care", sentence=sentence)


def _leniently(figure: Figure | None) -> Figure | None:
    """Against the lower end of what sampling alone gives: the mean overlap of a few coefficients scatters widely."""
    if figure is None or figure.reference_low is None:
        return figure
    return replace(figure, reference=min(figure.reference_low, figure.reference or 1.0))


def _tile(
    use: str, figure: Figure | None, evaluation: Evaluation, setting: str, what: str, *, floor: float | None = None
) -> Verdict | None:
    """floor: a value that the interval's lower end must pass for anything better than "not fit"."""
    if figure is None:
        return None
    good, care = evaluation.threshold(setting)
    better = "above" if figure.direction == "lower" else "below"
    thresholds = (
        f"good: at most {good:g} {better} the reference, and at most {care:g} at the interval's worse end; "
        f"with care: at most {care:g}."
    )
    if figure.value is None or figure.reference is None:
        return _unknown(use, figure, thresholds)
    sign = 1.0 if figure.direction == "lower" else -1.0
    behind = sign * (figure.value - figure.reference)
    worse_end = figure.high if figure.direction == "lower" else figure.low
    worst = behind if worse_end is None else sign * (worse_end - figure.reference)
    word: Word = "good" if behind <= good and worst <= care else "usable with care" if behind <= care else "not fit"
    if floor is not None and (figure.low if figure.low is not None else figure.value) <= floor:
        word = "not fit" if figure.value <= floor else min(word, "usable with care", key=_RANK.__getitem__)
    interval = "" if figure.low is None else f" (95 % interval {figure.low:.3f} to {figure.high:.3f})"
    sentence = f"The {what} is {figure.value:.3f}{interval}; the reference is {figure.reference:.3f}."
    return Verdict(use=use, word=word, sentence=sentence, thresholds=thresholds, figure=figure)


_RANK: dict[Word, int] = {"not fit": 0, "usable with care": 1, "good": 2, "cannot be assessed": 3}


def _worst(figures: dict[str, Figure], ending: str, beginning: str = "") -> Figure | None:
    """The figure farthest behind its reference among those of that key; an unknown one only if none is known."""
    some = [f for key, f in figures.items() if key.endswith(ending) and key.startswith(beginning)]
    known = [f for f in some if f.value is not None and f.reference is not None]
    if not known:
        return some[0] if some else None

    def behind(figure: Figure) -> float:
        assert figure.value is not None and figure.reference is not None
        gap = figure.value - figure.reference
        return gap if figure.direction == "lower" else -gap

    return max(known, key=behind)


def _unknown(use: str, figure: Figure, thresholds: str) -> Verdict:
    sentence = figure.reason or "There is no reference to compare with."
    sentence = sentence[0].upper() + sentence[1:] + ("" if sentence.endswith(".") else ".")
    return Verdict(use=use, word="cannot be assessed", sentence=sentence, thresholds=thresholds, figure=figure)
