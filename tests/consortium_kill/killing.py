"""Kills parts of a whole consortium: at named points of a run, or at random moments."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whole import AT_SITES, COMPONENTS, End, Whole

POINTS = {
    1: "before hello",
    2: "after hello",
    3: "after witness",
    4: "after start",
    5: "before prepare",
    6: "after prepare",
    7: "before ask",
    8: "after masked sums arrived",
    9: "before survivors",
    10: "after votes",
    11: "before reveal",
    12: "after the last release, before finish",
}
_LABELS = {
    ("before", "hello"): 1,
    ("after", "hello"): 2,
    ("after", "witness"): 3,
    ("after", "start"): 4,
    ("before", "prepare"): 5,
    ("after", "prepare"): 6,
    ("before", "mask"): 7,
    ("after", "mask"): 8,
    ("before", "agree"): 9,
    ("after", "agree"): 10,
    ("before", "unmask"): 11,
    ("before", "finish"): 12,
}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What dies where. release: in which one the point is waited for, of those that each release has."""

    component: str
    point: int
    release: int | None = None
    site: str = ""


@dataclass(kw_only=True)
class Done:
    """A kill that happened. processes: how many died. seconds: until the run's next step was done."""

    kill: Kill
    at: float
    processes: int
    seconds: float | None = None


@dataclass(kw_only=True)
class Story:
    run: str
    end: End
    kills: list[Done]
    missed: list[Kill]
    seconds: float

    def lines(self) -> list[dict[str, Any]]:
        shared = {
            "run": self.run,
            "outcome": self.end.how,
            "tries": self.end.tries,
            "dropped": self.end.dropped,
            "problems": self.end.problems,
            "message": self.end.message,
        }
        return [
            {
                "component": done.kill.component,
                "point": done.kill.point,
                "name": POINTS.get(done.kill.point, "random"),
                "release": done.kill.release,
                "site": done.kill.site,
                "processes": done.processes,
                "seconds": done.seconds,
                **shared,
            }
            for done in self.kills
        ]


def place_of(line: Mapping[str, Any], *, fitted: bool) -> tuple[int | None, int | None]:
    """(point, release) of a line of the trace."""
    release, _, step = line["label"].rpartition("/")
    point = _LABELS.get((line["when"], step))
    if point == 12 and not fitted:
        point = None  # the farewell of a try that failed
    return point, int(release) if release else None


@dataclass(kw_only=True)
class Killer:
    """Lets a run come to each point of a plan, kills there, lets it go on."""

    whole: Whole
    pending: list[Kill]
    done: list[Done] = field(default_factory=list)
    _seen: int = 0

    def run(self, run: str, seed: int, *, timeout_s: float) -> Story:
        started = time.monotonic()
        while not self.whole.ended(run) and time.monotonic() - started < timeout_s:
            for line in self.whole.traced("points.jsonl", run)[self._seen :]:
                self._seen += 1
                self._at(run, line)
            time.sleep(0.02)
        (self.whole.trace / "armed").unlink(missing_ok=True)
        self._time(run)
        seconds = round(time.monotonic() - started, 1)
        return Story(run=run, end=self.whole.end(run, seed), kills=self.done, missed=self.pending, seconds=seconds)

    def _at(self, run: str, line: Mapping[str, Any]) -> None:
        if not _lives(line["pid"]):
            return
        point, release = place_of(line, fitted=(self.whole.run_folder(run).inner / "model.npz").exists())
        now = [k for k in self.pending if k.point == point and k.release in (None, release)]
        for kill in now:
            self.pending.remove(kill)
            self.whole.there(kill.component, kill.site)
            at = time.time()
            count = self.whole.kill(kill.component, kill.site)
            self.done.append(Done(kill=kill, at=at, processes=count))
        (self.whole.trace / f"go-{line['pid']}-{line['number']}").touch()

    def _time(self, run: str) -> None:
        answered = [line["at"] for line in self.whole.traced("points.jsonl", run) if line["when"] == "after"]
        for done in self.done:
            done.seconds = round(min((at for at in answered if at > done.at), default=done.at) - done.at, 1) or None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def at_points(whole: Whole, seed: int, kills: list[Kill], *, timeout_s: float = 600.0) -> Story:
    """One run with these kills."""
    (whole.trace / "armed").touch()
    run = whole.propose(seed)
    return Killer(whole=whole, pending=list(kills)).run(run, seed, timeout_s=timeout_s)


def at_random(
    whole: Whole, seed: int, dice: random.Random, *, kills: int, pause_s: float = 8.0, timeout_s: float = 1200.0
) -> Story:
    """One run in which `kills` random parts die at random moments, pause_s apart at most; fewer if it ends before.

    A run that has used up its tries is held for its coordinator, who resumes it.
    """
    (whole.trace / "armed").unlink(missing_ok=True)
    run = whole.propose(seed)
    started, done = time.monotonic(), list[Done]()
    while time.monotonic() - started < timeout_s:
        if whole.held(run):
            whole.command("resume", str(whole.root), run)
        elif whole.ended(run):
            break
        if len(done) == kills:
            time.sleep(0.3)
            continue
        # Half of the kills fall into the seconds in which the sites are asked, where there is most to lose.
        if dice.random() < 0.5:
            _until_asked(whole, run, timeout_s=30.0)
            time.sleep(dice.random())
        else:
            time.sleep(dice.random() * pause_s)
        component = dice.choice(COMPONENTS)
        site = dice.choice(whole.sites) if component in AT_SITES else ""
        at, count = time.time(), whole.kill(component, site)
        if count:
            done.append(Done(kill=Kill(component=component, point=0, site=site), at=at, processes=count))
    seconds = round(time.monotonic() - started, 1)
    return Story(run=run, end=whole.end(run, seed), kills=done, missed=[], seconds=seconds)


def _until_asked(whole: Whole, run: str, *, timeout_s: float) -> None:
    """Wait for the next line of the trace."""
    known, until = len(whole.traced("points.jsonl", run)), time.monotonic() + timeout_s
    while len(whole.traced("points.jsonl", run)) == known and time.monotonic() < until and not whole.ended(run):
        time.sleep(0.02)


def all_points(sites: tuple[str, ...]) -> dict[str, list[Kill]]:
    """Six components at twelve points, in a dozen runs: name of a run -> its kills."""
    spread = {5: 0, 6: 0, 7: 1, 8: 1, 9: 2, 10: 2, 11: 3}
    found = {}
    for component in AT_SITES:
        found[component] = [
            Kill(component=component, point=point, release=spread.get(point), site=sites[point % len(sites)])
            for point in POINTS
        ]
    # Of these each kill costs a try, and tries are counted anew with each release.
    for component in ("ServerApp", "SuperLink", "service"):
        for number, points in enumerate(((1, 5, 7, 12), (2, 6, 9, 11), (3, 4, 8, 10)), 1):
            found[f"{component} {number}"] = [
                Kill(component=component, point=point, release=spread.get(point)) for point in points
            ]
    return found


def record(path: str, story: Story) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for line in story.lines():
            file.write(json.dumps(line) + "\n")
        for missed in story.missed:
            facts = {"component": missed.component, "point": missed.point, "run": story.run, "outcome": "MISSED"}
            file.write(json.dumps(facts) + "\n")
        facts = {
            "run": story.run,
            "ended": story.end.how,
            "seconds": story.seconds,
            "tries": story.end.tries,
            "dropped": story.end.dropped,
            "problems": story.end.problems,
            "message": story.end.message,
        }
        file.write(json.dumps(facts) + "\n")
