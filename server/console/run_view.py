"""Everything that the pages tell about one run.

Its events are read as they grow; what it costs is worked out beside the requests (prices.py), and what it was charged
comes from the verified mirror (books.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cohortium.common.errors import CohortiumError
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import read_proposal
from cohortium.server.console.desk import Desk
from cohortium.server.console.prices import Price
from cohortium.server.console.run_list import LIVE, STATE_KINDS, code_of, named
from cohortium.server.console.run_log import Mark, RunLog
from cohortium.server.console.run_picture import Burn, Row, Timeline, burn, rows, timeline
from cohortium.server.console.run_store import Brief, runs_of
from cohortium.server.register import ENDED, Answer, RunRow


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """One run as its page tells it. price: None while it is worked out; charged: by the mirrored ledgers."""

    run: str
    state: str
    since: int
    attempts: int
    message: str
    code: str
    words: str
    brief: Brief
    answers: tuple[Answer, ...]
    done: int
    planned: int
    phase: str
    purpose: str
    seconds_left: float | None
    void: int
    dropped: Mapping[str, int]
    last_at: float | None
    rows: tuple[Row, ...]
    timeline: Timeline | None
    priced: bool
    private: bool
    burn: Burn | None
    charged: float | None
    charged_exact: bool
    epsilon: float
    delta: float
    marks: tuple[Mark, ...] = field(default=())
    published: bool = False
    released: bool = False

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def kind(self) -> str:
        """The badge's look."""
        return STATE_KINDS.get(self.state, "soft")

    @property
    def gone(self) -> tuple[str, ...]:
        """Who dropped, most often first: "site-2 in 3"."""
        often = sorted(self.dropped.items(), key=lambda entry: (-entry[1], entry[0]))
        return tuple(f"{site} in {times}" for site, times in often)

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(answer.site for answer in self.answers if answer.state == "open")

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "state": self.state,
            "since": self.since,
            "attempts": self.attempts,
            "message": self.message,
            "words": self.words,
            "study": self.brief.study,
            "sites": list(self.brief.sites),
            "rehearsal": self.brief.rehearsal,
            "approvals": {answer.site: {"state": answer.state, "since": answer.since} for answer in self.answers},
            "releases": {"done": self.done, "planned": self.planned, "void": self.void},
            "phase": self.phase or None,
            "seconds_left": self.seconds_left,
            "dropped": dict(self.dropped),
            "epsilon": {
                "charged": None if self.charged is None else _finite(self.charged),
                "planned": self.epsilon,
                "delta": self.delta,
            },
            "published": self.published,
        }


def view(desk: Desk, row: RunRow) -> RunView:
    """Everything about one run. Where its folder cannot be read it tells what the register knows."""
    runs = runs_of(desk)
    state, brief, log = desk.state(row), runs.brief(row), runs.log(row)
    answers = tuple(desk.register.answers(row.run))
    try:
        plan: Plan | None = runs.plan(row)
    except CohortiumError:
        plan = None
    done = len(log.releases)
    price = runs.prices.of(plan) if plan is not None and plan.private else None
    last = log.releases.get(max(log.releases)) if log.releases else None
    stage = plan.stage_of(min(done, plan.releases - 1)) if plan is not None else None
    shown = rows(plan, log.releases, running=state == "running") if plan is not None else ()
    spent, exact = charged(desk, row, done) if done and plan is not None else (0.0, True)
    root = desk.consortium.root / row.folder
    return RunView(
        run=row.run,
        state=state,
        since=row.since,
        attempts=row.attempts,
        message=row.message,
        code=code_of(row.message),
        words=_words(state, row, answers, log, stage.name if stage else "", done, brief.planned),
        brief=brief,
        answers=answers,
        done=done,
        planned=brief.planned,
        phase=stage.name if stage is not None and state in LIVE and done < brief.planned else "",
        purpose=stage.purpose if stage is not None else "",
        seconds_left=log.seconds_left(brief.planned - done) if state == "running" else None,
        void=sum(bool(release.void) for release in log.releases.values()),
        dropped=log.dropped(),
        last_at=last.at if last else None,
        rows=shown,
        timeline=timeline(plan.sites, shown) if plan is not None else None,
        priced=plan is None or not plan.private or price is not None,
        private=plan is not None and plan.private,
        burn=burn(price.curves, done=done, planned=plan.releases) if price is not None and plan is not None else None,
        charged=spent,
        charged_exact=exact,
        epsilon=plan.epsilon if plan is not None else 0.0,
        delta=plan.delta if plan is not None else 0.0,
        marks=tuple(log.marks[-20:]),
        published=(root / "result.json").exists(),
        released=(root / "release" / "release.json").exists(),
    )


def charged(desk: Desk, row: RunRow, done: int) -> tuple[float | None, bool]:
    """(ε by the dearest of the mirrored ledgers, whether it is exact or an upper bound), as of some seconds ago.

    None where it is not worked out yet.
    """
    return runs_of(desk).charged(desk, row, done)


def signed_plan(desk: Desk, row: RunRow) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(code or "", columns, columns left out) of the proposal whose signature holds: what the officers were shown."""
    try:
        proposal = read_proposal(desk.register.envelope(row.run), desk.consortium.key().public_key())
        if proposal.plan.digest != runs_of(desk).plan(row).digest:
            return "PROPOSAL-OTHER", (), ()
    except CohortiumError as error:
        return error.code, (), ()
    return "", tuple(column.name for column in proposal.schema.columns), proposal.exclude


def price_of(desk: Desk, row: RunRow) -> tuple[Plan | None, Price | None]:
    try:
        plan = runs_of(desk).plan(row)
    except CohortiumError:
        return None, None
    return plan, runs_of(desk).prices.of(plan)


def is_private(desk: Desk, row: RunRow) -> bool:
    """Whether the plan can be read and every answer of it is noised: then it has a price in ε."""
    try:
        return runs_of(desk).plan(row).private
    except CohortiumError:
        return False


def _words(state: str, row: RunRow, answers: Sequence[Answer], log: RunLog, phase: str, done: int, planned: int) -> str:
    """How the run stands, in a sentence that changes when something happens, and not with each release."""
    if state == "proposed":
        waiting = [answer.site for answer in answers if answer.state == "open"]
        return f"Waiting for the officers of {named(waiting)}." if waiting else "Every officer has answered."
    if state == "approved":
        return "Every officer approved. It starts as soon as nothing else runs and the service is up."
    if state == "running":
        last = log.last()
        if row.message.startswith("fitted") or (last is not None and last.event == "fitted"):
            return "The model is fitted. Rows and report are being written."
        if last is None or last.event in ("try", "start", "failed", "stopped"):
            return "Starting: looking for the sites."
        return f"Asking the sites: phase {phase}." if done < planned else "All answers are here; fitting the model."
    return {
        "stopping": "Stops after the release under way.",
        "stopped": "Stopped. Nothing is paid twice when it goes on.",
        "finished": "Published.",
        "failed": "Failed. It cannot go on; propose the study again.",
        "void": "Withdrawn or declined. Nothing was asked.",
    }.get(state, state)


def _finite(value: float) -> float | str:
    return "inf" if value == float("inf") else value
