"""What came out of runs, as the console shows it: a gallery, one result with its pictures, and who may take rows."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from markupsafe import Markup

from cohortium.common.errors import CohortiumError, Refused
from cohortium.common.evaluation import report
from cohortium.common.evaluation.base import Figure, Verdict
from cohortium.common.evaluation.pictures import Identifiers
from cohortium.common.evaluation.pictures_forest import findings_picture
from cohortium.common.evaluation.report_gaps import Gap, gaps
from cohortium.common.evaluation.report_sections import blocks
from cohortium.common.evaluation.report_text import amount, epsilon, interval, number, percent, reference
from cohortium.server.backing import LiveBacking
from cohortium.server.console.accounts import COORDINATOR, SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.kept import Kept, stamp
from cohortium.server.console.result_file import Card, Whole, card_of, read_result, whole_of
from cohortium.server.register import RunRow
from cohortium.server.seen import Seen

PAGE = 24
"""Runs on a page of the gallery; no more results than that are read for one request."""
CARDS_KEPT, WHOLES_KEPT = 2000, 8
EVALUATION = "cohortium.common.evaluation"


class Results:
    """The results of one consortium. Threads may share it."""

    def __init__(self, desk: Desk) -> None:
        self._root = desk.consortium.root
        self._cards: Kept[Card] = Kept(CARDS_KEPT)
        self._wholes: Kept[Whole] = Kept(WHOLES_KEPT)
        self._bodies: Kept[tuple[tuple[str, str, Markup], ...]] = Kept(WHOLES_KEPT)
        # Rows of other sizes are sampled one request at a time, whoever asks.
        self.backing = LiveBacking(desk.consortium, desk.register, Seen(desk.consortium.root / "seen.json"))

    def path(self, row: RunRow) -> Path:
        return self._root / row.folder / "result.json"

    def card(self, row: RunRow) -> Card:
        """Refused RESULT-MISSING; ProtocolError RESULT-FORM, RESULT-EXACT."""
        path = self.path(row)
        return self._cards.get(row.run, stamp(path), lambda: card_of(row.run, read_result(path)))

    def whole(self, row: RunRow) -> Whole:
        """As `card`; Refused RUN-UNFINISHED before the run has published."""
        if row.state != "finished":
            raise Refused(
                "RUN-UNFINISHED", "this run has published nothing yet", hint=f"see how it stands: /runs/{row.run}"
            )
        path = self.path(row)
        return self._wholes.get(row.run, stamp(path), lambda: whole_of(row.run, read_result(path)))

    def sections(self, row: RunRow) -> tuple[tuple[str, str, Markup], ...]:
        """(place, title, pictures and tables) of each section of the evaluation, drawn as in the report."""
        whole = self.whole(row)
        return self._bodies.get(row.run, stamp(self.path(row)), lambda: drawn(whole))


_KEPT: WeakKeyDictionary[Desk, Results] = WeakKeyDictionary()
_MAKING = threading.Lock()


def results_of(desk: Desk) -> Results:
    with _MAKING:
        if desk not in _KEPT:
            _KEPT[desk] = Results(desk)
        return _KEPT[desk]


# ---- the gallery --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """One page of finished runs, newest first: each with its card, or with the error that stands in its place."""

    shown: tuple[tuple[RunRow, Card | CohortiumError], ...]
    studies: tuple[str, ...]
    study: str
    page: int
    pages: int
    total: int


def gallery(results: Results, rows: Iterable[RunRow], *, study: str = "", page: int = 1) -> Gallery:
    """rows: all that the account sees, newest first."""
    ended = [row for row in rows if row.state == "finished"]
    studies = tuple(sorted({study_of(row.run) for row in ended}))
    chosen = [row for row in ended if not study or study_of(row.run) == study]
    pages = max(1, -(-len(chosen) // PAGE))
    page = min(page, pages)
    return Gallery(
        shown=tuple((row, _card_or_error(results, row)) for row in chosen[(page - 1) * PAGE : page * PAGE]),
        studies=studies,
        study=study,
        page=page,
        pages=pages,
        total=len(chosen),
    )


def study_of(run: str) -> str:
    """The study in a run's name (runs.new_run_id): to filter two hundred runs without opening one."""
    return run.rpartition("-")[0]


def _card_or_error(results: Results, row: RunRow) -> Card | CohortiumError:
    try:
        return results.card(row)
    except CohortiumError as error:
        return error


def card_picture(ids: Identifiers, card: Card) -> Markup | None:
    """The main figures with intervals and references, small; None where nothing is known."""
    if not card.figures:
        return None
    return Markup(findings_picture(ids, card.figures, title=f"Main figures of {card.run}, higher is better"))


# ---- one result ---------------------------------------------------------------------------------------------


@cache
def report_parts() -> Any:
    """The report's own macros, so that a picture looks here as it does there."""
    here = resources.files(EVALUATION)
    environment = report.templates()
    environment.loader = jinja2.FunctionLoader(lambda name: here.joinpath(name).read_text(encoding="utf-8"))
    environment.filters |= {"number": number, "percent": percent, "epsilon": epsilon, "interval": interval}
    environment.filters |= {"reference": reference, "amount": amount}
    return environment.get_template("report_parts.html.j2").module


def drawn(whole: Whole) -> tuple[tuple[str, str, Markup], ...]:
    parts = report_parts()
    found = blocks(Identifiers(), whole.findings, None)
    return tuple((b.place, b.title, parts.section_body(b)) for b in found if b.section is not None)


def tiles(verdicts: Sequence[Verdict]) -> Markup:
    made: Markup = report_parts().tiles(verdicts, True)
    return made


def unassessed(whole: Whole) -> list[Gap]:
    return gaps(whole.facts, whole.findings, None)


def figure_rows(whole: Whole) -> list[tuple[str, str, str, str, str]]:
    """(label, value with interval, reference, better, remark) of each main figure."""
    return [(f.named.label, *_cells(f.named.figure)) for f in whole.named]


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    better = "" if figure.direction == "none" else figure.direction
    return interval(figure), reference(figure), better, figure.reason


def may_download(desk: Desk, account: Account, run: str) -> bool:
    """Rows that were published but not released go to the coordinator and to the sites that the run names.

    An auditor reads every figure and takes rows only from a release, as everybody else does.
    """
    if account.role == SITE:
        return desk.register.entitled(run, account.site)
    return account.role == COORDINATOR
