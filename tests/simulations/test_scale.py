"""The benchmark of many sites finds what grows faster than it may, and measures what it says it measures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cohortium.client import guard
from cohortium.client.gate import Gate
from cohortium.simulations.benchmarks import scale
from cohortium.simulations.benchmarks.scale import Measured, Task, figures, line

SITES = (5, 10, 25, 50, 100)


def studies(
    *,
    memory: Callable[[int], float] = lambda n: 500 + 2.5 * n,
    own: Callable[[int], float] = lambda n: 8.0,
    seconds: Callable[[int], float] = lambda n: 4.0 * n,
) -> list[Measured]:
    """What a machine would have measured on which the sites cost so much."""
    return [
        Measured(
            task=Task(sites=n),
            generator="joined",
            releases=104,
            seconds=seconds(n),
            cpu_seconds=seconds(n),
            peak_mb=1.5 * memory(n),
            run_mb=memory(n),
            site_ms=own(n),
            exchange_ms=5 + 0.4 * n,
        )
        for n in SITES
    ]


def failing(found: list[Measured]) -> set[str]:
    return {figure.name for figure in figures(found) if not figure.holds}


def test_what_grows_with_the_sites_alone_holds() -> None:
    assert failing(studies()) == set()
    memory = next(f for f in figures(studies()) if f.name == "scale-memory-3")
    assert memory.details == {
        "MB a site": pytest.approx(2.5),
        "MB without sites": pytest.approx(500),
        "R²": pytest.approx(1),
    }
    site = next(f for f in figures(studies()) if f.name == "scale-site-3")
    assert site.details["key exchange, ms for each other site"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (studies(memory=lambda n: 500 + 2.5 * n + 0.05 * n**2), "scale-memory-3"),
        (studies(own=lambda n: 8 + 0.06 * n), "scale-site-3"),
        (studies(seconds=lambda n: 0.061 * n**2), "scale-minutes-3"),
    ],
)
def test_what_grows_faster_is_told(planted: list[Measured], name: str) -> None:
    assert failing(planted) == {name}


def test_budgets_are_judged_each_by_itself() -> None:
    bad = [replace(m, task=replace(m.task, epsilon=1.0)) for m in studies(memory=lambda n: 500 + 0.1 * n**2)]
    assert failing([*studies(), *bad]) == {"scale-memory-1"}
    assert [f.name for f in figures(studies()[:1])] == ["scale-minutes-3"], "one study has no slope"


def test_a_line_and_how_well_it_fits() -> None:
    straight = line(SITES, [3.0 * n for n in SITES])
    assert (straight.slope, straight.bend, straight.fit) == pytest.approx((3, 1, 1))
    assert line(SITES, [7.0] * 5).bend == 1
    curved = line(SITES, [float(n**2) for n in SITES])
    assert curved.bend > 1.4 and curved.fit < 0.97


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("scale")
    task = Task(sites=4, patients=40, epsilon=1.0, threads=2, released=50, score=False)
    scale.make_table(folder, task)
    before = (guard.release, guard.Guard.handle, Gate.open)
    found = scale.study(folder, task)
    assert (guard.release, guard.Guard.handle, Gate.open) == before, "nothing stays timed"
    return found


def test_a_study_is_measured_whole(small: Measured) -> None:
    assert small.generator == "mixture" and small.releases == 4
    assert list(small.stages) == ["libraries", "prepare", "run", "finish"]
    assert small.seconds == pytest.approx(sum(stage["seconds"] for stage in small.stages.values()), rel=1e-6)
    assert 0 < small.run_mb <= small.peak_mb
    assert small.site_ms > 0.1 and small.exchange_ms > 1
    read = json.loads(json.dumps(scale.asdict(small)))
    assert Measured(**{**read, "task": Task(**read["task"])}) == small, "so it crosses the process's border"


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name", "grows"), [("own", "release", 0), ("exchange", "_masked", 1)])
def test_own_work_and_key_exchange_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Measured, place: str, name: str, grows: int
) -> None:
    """Twenty milliseconds of computing more, planted in one of the two, are found in that one alone."""
    owner: Any = guard if place == "own" else guard.Guard
    plain = getattr(owner, name)

    def slower(*given: Any, **named: Any) -> Any:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return plain(*given, **named)

    slower.__name__ = name
    monkeypatch.setattr(owner, name, slower)
    scale.make_table(tmp_path, small.task)
    found = scale.study(tmp_path, small.task)
    more = (found.site_ms - small.site_ms, found.exchange_ms - small.exchange_ms)
    assert 14 < more[grows] < 40 and abs(more[1 - grows]) < 10


def test_the_command_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Task] = []

    def measure(task: Task) -> Measured:
        asked.append(task)
        (found,) = (m for m in studies() if m.task.sites == task.sites)
        return replace(found, task=task)

    monkeypatch.setattr(scale, "measure", measure)
    assert scale.main(["--json", "--sites", "50", "5", "10", "--epsilon", "3"]) == 0
    assert [task.sites for task in asked] == [5, 10, 50]
    assert [json.loads(said)["holds"] for said in capsys.readouterr().out.splitlines()[3:]] == [True] * 3
    monkeypatch.setattr(scale, "MINUTES", 0.01)
    assert scale.main(["--sites", "5", "--epsilon", "3"]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_the_large_study_is_ten_sites_of_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Task] = []

    def measure(task: Task) -> Measured:
        asked.append(task)
        return replace(studies()[1], task=task)

    monkeypatch.setattr(scale, "measure", measure)
    assert scale.main(["--large", "--sites", "10", "--epsilon", "3"]) == 0
    assert [(t.sites, t.patients) for t in asked] == [(10, 10_000), (10, 1_000_000)]
