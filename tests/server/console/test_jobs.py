"""Jobs of the what-if page: one at a time, ended with the console, gone on with afterwards, nobody's other files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small import small_study, small_table

from cohortium.common.errors import Refused, UsageError
from cohortium.server.console import jobs as work
from cohortium.server.console.jobs import Job, Jobs, nearest

SLEEPS = "import time; time.sleep(60)"
MAKES = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[1]); (folder / "out").mkdir(exist_ok=True)
(folder / "out" / "what-if.html").touch()
names = "finished refused stand_in columns patients sites mode seeds says".split()
told = dict.fromkeys(names, 1) | {"points": [], "references": {}}
(folder / "out" / "what-if.json").write_text(json.dumps(told))
"""


def command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Jobs]]:
    opened: list[Jobs] = []

    def make(script: str = SLEEPS) -> Jobs:
        opened.append(Jobs(tmp_path / "what-if", clock=lambda: 1000.0 + len(opened), command=command(script)))
        return opened[-1]

    yield make
    for jobs in opened:
        jobs.close()


def add(jobs: Jobs, **changes: Any) -> str:
    plain: dict[str, Any] = {
        "by": "ada",
        "draft": "small",
        "study": "[study]\n",
        "dictionary": "{}",
        "table": b"a,b\n1,2\n",
        "file": "public.csv",
        "epsilon": 3.0,
        "epsilons": (1.0, 3.0),
        "seeds": 2,
        "split": "iid:3",
    }
    return jobs.make(**{**plain, **changes})


def settled(jobs: Jobs, name: str, within_s: float = 60.0) -> Job:
    until = time.monotonic() + within_s
    while jobs.job(name).active and time.monotonic() < until:
        time.sleep(0.05)
    return jobs.job(name)


# ---- one at a time ------------------------------------------------------------------------------------------


def test_one_runs_at_a_time_and_can_be_cancelled(made: Callable[..., Jobs]) -> None:
    jobs = made()
    first, second = add(jobs), add(jobs)
    jobs.start(first)
    child = jobs._child
    assert child is not None and [job.state for job in jobs.all() if job.id == first] == ["running"]
    for name in (first, second):
        with pytest.raises(Refused) as error:
            jobs.start(name)
        assert error.value.code == "WHAT-IF-BUSY"
    with pytest.raises(Refused) as error:
        jobs.remove(first)
    assert error.value.code == "WHAT-IF-BUSY"
    jobs.cancel(first)
    assert child.poll() is not None and jobs.job(first).state == "cancelled"
    jobs.start(second)
    assert jobs.job(second).active
    with pytest.raises(Refused) as error:
        jobs.cancel(first)
    assert error.value.code == "WHAT-IF-STOPPED"
    jobs.cancel(second)
    jobs.remove(second)
    assert [job.id for job in jobs.all()] == [first]


def test_a_restart_leaves_it_interrupted_and_it_goes_on(made: Callable[..., Jobs]) -> None:
    jobs = made()
    name = add(jobs)
    jobs.start(name)
    jobs.close()
    again = made(MAKES)
    assert again.job(name).state == "interrupted"
    again.start(name)
    assert settled(again, name).state == "done"
    with pytest.raises(Refused) as error:
        again.start(name)
    assert error.value.code == "WHAT-IF-DONE"


def test_a_deaf_child_is_ended_all_the_same(made: Callable[..., Jobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LEAVES_WITHIN_S", 0.3)
    jobs = made(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    name = add(jobs)
    jobs.start(name)
    child = jobs._child
    assert child is not None
    until = time.monotonic() + 10
    while not (jobs.root / name / "log.txt").read_bytes() and time.monotonic() < until:
        time.sleep(0.02)
    jobs.close()
    assert child.poll() is not None


def test_an_error_of_the_child_is_told(made: Callable[..., Jobs]) -> None:
    told = {"error": "TABLE-KIND", "sentence": "no table", "where": [], "left": "", "fix": "another"}
    script = f"import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'error.json').write_text({json.dumps(told)!r})"
    jobs = made(script)
    name = add(jobs)
    jobs.start(name)
    job = settled(jobs, name)
    assert job.state == "failed" and job.error == told


# ---- what is put there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"table": b""}, "WHAT-IF-TABLE"),
        ({"epsilons": ()}, "WHAT-IF-EPSILONS"),
        ({"epsilons": (math.nan,)}, "WHAT-IF-EPSILONS"),
        ({"epsilons": (math.inf,)}, "WHAT-IF-EPSILONS"),
        ({"epsilons": tuple(range(1, 14))}, "WHAT-IF-EPSILONS"),
        ({"seeds": 0}, "WHAT-IF-SEEDS"),
        ({"seeds": 10**6}, "WHAT-IF-SEEDS"),
    ],
)
def test_what_cannot_be_used_is_refused(made: Callable[..., Jobs], changes: dict[str, Any], code: str) -> None:
    jobs = made()
    with pytest.raises(UsageError) as error:
        add(jobs, **changes)
    assert error.value.code == code and jobs.all() == []


def test_a_table_too_large_is_refused(made: Callable[..., Jobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MOST_TABLE", 10)
    with pytest.raises(UsageError) as error:
        add(made(), table=b"x" * 11)
    assert error.value.code == "WHAT-IF-TABLE"
    monkeypatch.setattr(work, "MOST_JOBS", 1)
    jobs = made()
    add(jobs)
    with pytest.raises(Refused) as full:
        add(jobs)
    assert full.value.code == "WHAT-IF-FULL"


def test_names_lead_nowhere(made: Callable[..., Jobs], tmp_path: Path) -> None:
    jobs = made()
    name = add(jobs, file="../../etc/passwd", table=b"PAR1....")
    assert sorted(path.name for path in (jobs.root / name).iterdir()) == [
        "dictionary.json",
        "job.json",
        "study.toml",
        "table.parquet",
    ]
    assert (jobs.root / name).stat().st_mode & 0o077 == 0, "only this user reads it"
    for wrong in ("", ".", "..", "../what-if/" + name, name + "/", name[:-1], "w" + "z" * 12):
        with pytest.raises(Refused) as error:
            jobs.job(wrong)
        assert error.value.code == "WHAT-IF-UNKNOWN"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}"])
def test_files_that_are_not_ours_break_nothing(made: Callable[..., Jobs], text: str) -> None:
    jobs = made()
    name = add(jobs)
    (jobs.root / name / "progress.json").write_text(text)
    (jobs.root / name / "out").mkdir()
    (jobs.root / name / "out" / "what-if.json").write_text(text)
    assert jobs.all()[0].state == "interrupted"


# ---- what past ones say -------------------------------------------------------------------------------------


def job(**changes: Any) -> Job:
    result = {"columns": 10, "patients": 1000, "mode": "secure-sum", "points": [{"epsilon": 1.0}, {"epsilon": 3.0}]}
    result |= changes.pop("result", {})
    plain: dict[str, Any] = {"id": "w1", "at": 0.0, "by": "", "draft": "", "digest": "", "file": "", "sha256": ""}
    plain |= {"size": 1, "epsilon": None, "epsilons": (1.0, 3.0), "seeds": 1, "split": None, "state": "done"}
    return Job(**{**plain, "done": 1, "of": 1, "what": "", "error": None, "result": result, **changes})


def test_only_what_is_alike_is_said() -> None:
    asked: dict[str, Any] = {"columns": 11, "patients": 1200, "epsilon": 2.9, "mode": "secure-sum"}
    found = nearest([job()], **asked)
    assert found is not None and found.point["epsilon"] == 3.0
    for change in (
        {"columns": 30},
        {"columns": 5},
        {"patients": 5000},
        {"patients": 200},
        {"patients": None},
        {"epsilon": 10.0},
        {"epsilon": 0.3},
        {"mode": "local"},
    ):
        assert nearest([job()], **{**asked, **change}) is None, f"{change}: no number is better than one made up"
    assert nearest([job(state="running")], **asked) is None and nearest([job(result={"points": []})], **asked) is None
    near = job(id="w2", result={"columns": 11, "patients": 1200})
    found = nearest([job(), near], **asked)
    assert found is not None and found.job.id == "w2"


# ---- the real child -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_job_from_upload_to_curve_and_hostile_tables(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path / "s", survivors=3, colluders=1, epsilon=3.0, target="")
    texts = {"study": study.read_text(), "dictionary": (study.parent / "dictionary.json").read_text()}
    table = small_table(150).to_csv(index=False).encode()
    jobs = Jobs(tmp_path / "what-if")
    try:
        name = add(jobs, **texts, table=table, epsilons=(10.0,), seeds=1, split="iid:4")
        jobs.start(name)
        child = jobs._child
        assert child is not None and child.pid != os.getpid()
        found = settled(jobs, name, 240)
        log = (jobs.root / name / "log.txt").read_text()
        assert found.state == "done" and found.result is not None, log
        assert found.result["points"][0]["scores"]["tvd2"]["mean"] > 0 and found.done == found.of == 2
        # The same module, in this process: what is no table is an error with a code, and nothing else changes.
        from threading import Event

        from cohortium.simulations.what_if_job import _work

        bad = add(jobs, **texts, table=b"\x00\xff;" * 1000, epsilons=(10.0,), seeds=1, split="iid:4")
        assert _work(jobs.root / bad, Event()) == 1
        failed = jobs.job(bad)
        assert failed.state == "failed" and failed.error is not None and failed.error["error"].startswith("TABLE-")
        assert jobs.job(name).state == "done"
    finally:
        jobs.close()


@pytest.mark.slow
def test_a_killed_console_leaves_no_simulation_behind(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib\nfrom cohortium.server.console.jobs import Jobs\n"
        "jobs = Jobs(pathlib.Path(sys.argv[1]), command=[sys.executable, '-c', "
        "'from cohortium.common.processes import leave_with_parent; leave_with_parent(); '\n"
        " 'import time; time.sleep(60)'])\n"
        "name = jobs.make(by='a', draft='d', study='', dictionary='', table=b'x', file='f', epsilon=None, "
        "epsilons=(1.0,), seeds=1, split=None)\n"
        "jobs.start(name); print(jobs._child.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w")], capture_output=True, text=True, check=False
    )
    pid, until = int(done.stdout), time.monotonic() + 20
    while time.monotonic() < until and psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    again = Jobs(tmp_path / "w")
    assert [job.state for job in again.all()] == ["interrupted"]


def test_the_module_that_is_started_leaves_with_its_console() -> None:
    source = (Path(work.__file__).parents[2] / "simulations" / "what_if_job.py").read_text()
    assert work.MODULE == "cohortium.simulations.what_if_job"
    body = source.partition("def main")[2]
    assert body.index("leave_with_parent()") < body.index("os.nice") < body.index("_work(")
