"""The verdict: one word per use, by thresholds that stand in the tile.

The words are about use, not about privacy: the privacy statement is computed from the ledger and needs no
adjective. Every threshold compares with what real rows of that size score, because a small table cannot score
better than its own sampling error, and with shuffled columns, because beating those is the least one may ask.
"""

from __future__ import annotations

from cohortium.common.evaluation.base import Figure, Verdict, Word
from cohortium.common.evaluation.utility import Prediction

COLUMN_GOOD, COLUMN_CARE = 0.02, 0.06
PAIR_GOOD, PAIR_CARE = 0.6, 0.2
PAIR_SPREAD, RELATION_SPREAD = 0.01, 0.01
AUC_GOOD, AUC_GOOD_WORST, AUC_CARE = 0.02, 0.06, 0.6

COLUMNS = "Describing one column at a time"
PAIRS = "Counting combinations of two columns"
RELATIONS = "Strength of relations"
MODELS = "Training a prediction model"


def columns_tile(tvd1: Figure) -> Verdict:
    """How far the columns are from real ones, beyond what sampling alone gives."""
    thresholds = (
        f"good: mean distance at most {COLUMN_GOOD} above that of real rows; with care: at most {COLUMN_CARE} above."
    )
    if tvd1.value is None or tvd1.reference is None:
        return _unknown(COLUMNS, tvd1, thresholds)
    above = tvd1.value - tvd1.reference
    word: Word = "good" if above <= COLUMN_GOOD else "usable with care" if above <= COLUMN_CARE else "not fit"
    sentence = (
        f"On average {100 * tvd1.value:.1f} % of the rows would have to change cell to match the real "
        f"column; between two real samples it is {100 * tvd1.reference:.1f} %."
    )
    return Verdict(use=COLUMNS, word=word, sentence=sentence, thresholds=thresholds, figure=tvd1)


def pairs_tile(tvd2: Figure) -> Verdict:
    """How much of the way from shuffled columns to real rows the two-way tables came."""
    return _way_tile(PAIRS, tvd2, "Two-way tables", PAIR_SPREAD)


def relations_tile(gap: Figure) -> Verdict:
    """How much of the way from shuffled columns to real rows the associations came."""
    return _way_tile(RELATIONS, gap, "Associations", RELATION_SPREAD)


def _way_tile(use: str, figure: Figure, what: str, spread: float) -> Verdict:
    thresholds = (
        f"good: at least {100 * PAIR_GOOD:.0f} % of the way from shuffled columns to real rows; "
        f"with care: at least {100 * PAIR_CARE:.0f} %."
    )
    if figure.value is None or figure.reference is None or figure.floor is None:
        return _unknown(use, figure, thresholds)
    room = figure.floor - figure.reference
    if room < spread:
        reason = (
            f"Real rows ({figure.reference:.3f}) and shuffled columns ({figure.floor:.3f}) score nearly "
            "the same here: there are too few rows, or hardly any relations, to tell."
        )
        return Verdict(use=use, word="cannot be assessed", sentence=reason, thresholds=thresholds, figure=figure)
    way = (figure.floor - figure.value) / room
    word: Word = "good" if way >= PAIR_GOOD else "usable with care" if way >= PAIR_CARE else "not fit"
    if way <= 0:
        sentence = (
            f"{what}: the synthetic rows (error {figure.value:.3f}) are no closer to real rows "
            f"({figure.reference:.3f}) than shuffled columns are ({figure.floor:.3f})."
        )
    else:
        sentence = (
            f"{what}: error {figure.value:.3f}, {100 * min(way, 1):.0f} % of the way from shuffled columns "
            f"({figure.floor:.3f}) to real rows ({figure.reference:.3f})."
        )
    return Verdict(use=use, word=word, sentence=sentence, thresholds=thresholds, figure=figure)


def models_tile(prediction: Prediction | None, reason: str) -> Verdict:
    """How much prediction is lost against training on real rows, with the interval taken seriously."""
    thresholds = (
        f"good: AUC at most {AUC_GOOD} below real training rows and, at the interval's worse end, at most "
        f"{AUC_GOOD_WORST}; with care: keeps {100 * AUC_CARE:.0f} % of what real rows gain over chance (0.5)."
    )
    if prediction is None:
        unknown = Figure.unknown(reason, unit="AUC", direction="higher")
        return _unknown(MODELS, unknown, thresholds)
    synthetic, real, loss = prediction.synthetic, prediction.real, prediction.difference
    assert synthetic.value is not None and real.value is not None and loss.value is not None
    if real.low is not None and real.low <= 0.5:
        sentence = (
            f"Even real training rows do not surely beat chance (AUC {real.value:.3f}, interval from "
            f"{real.low:.3f}): there is nothing to lose."
        )
        return Verdict(
            use=MODELS, word="cannot be assessed", sentence=sentence, thresholds=thresholds, figure=synthetic
        )
    worst = loss.low if loss.low is not None else loss.value
    kept = (synthetic.value - 0.5) / (real.value - 0.5)
    if loss.value >= -AUC_GOOD and worst >= -AUC_GOOD_WORST:
        word: Word = "good"
    else:
        word = "usable with care" if kept >= AUC_CARE else "not fit"
    sentence = (
        f"AUC {synthetic.value:.3f} when trained on synthetic rows, {real.value:.3f} on real ones; "
        f"the difference {loss.value:+.3f} may be {loss.low:+.3f} to {loss.high:+.3f}."
    ).replace("-", "−")
    return Verdict(use=MODELS, word=word, sentence=sentence, thresholds=thresholds, figure=synthetic)


def headline(tiles: tuple[Verdict, ...], *, patients: int, in_sample: bool) -> str:
    """One or two sentences for the first ten seconds."""
    parts = [headline_of(tiles)]
    if patients < 1000:
        parts.append(
            f"{patients} {'training' if in_sample else 'test'} patients are few: at this size the noise that "
            "protects them is of the order of the differences one looks for."
        )
    if in_sample:
        parts.append("No patients were held out, so the comparison is in-sample and may flatter.")
    return " ".join(parts)


def headline_of(tiles: tuple[Verdict, ...]) -> str:
    """What the table is good for and what not, in the tiles' words."""
    by_word: dict[str, list[str]] = {}
    for tile in tiles:
        by_word.setdefault(tile.word, []).append(tile.use[0].lower() + tile.use[1:])
    order = (
        ("good", "Good for"),
        ("usable with care", "Usable with care for"),
        ("not fit", "Not fit for"),
        ("cannot be assessed", "Cannot be assessed for"),
    )
    return " ".join(f"{text} {_list(by_word[word])}." for word, text in order if word in by_word)


def _unknown(use: str, figure: Figure, thresholds: str) -> Verdict:
    return Verdict(
        use=use,
        word="cannot be assessed",
        sentence=figure.reason or "There is no reference to compare with.",
        thresholds=thresholds,
        figure=figure,
    )


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
