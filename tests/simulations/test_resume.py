"""Interrupted and gone on with: nothing is paid twice, nothing is lost, and a seeded run ends in the same model.

A run is killed with SIGKILL at every step that changes what is on disk (a sample of the steps in the quick test),
and at random moments. After each kill every ledger verifies and holds a charge for whatever was answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohortium.client.vault import Vault
from cohortium.common.errors import CheckFailed, UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.asking import Stopped
from cohortium.server.audit import audit
from cohortium.server.runs import RunFolder
from cohortium.simulations.finish import finish
from cohortium.simulations.run import run

Simulate = Callable[..., Path]
# Everybody must stay: a hospital that died inside a release makes it void, so what ends ends alike.
STRICT: dict[str, Any] = {"split": "iid:3", "survivors": 3, "run": False}
FULL = bool(os.environ.get("COHORTIUM_FULL_KILLS"))
EVERY, KILLS = (7, 24) if FULL else (50, 6)
STEPS: dict[str, Any] = {"generator": "joined", "rounds": 3}


def arrays(out: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in RunFolder(root=out).model().to_arrays()[0].items()}


def books(out: Path) -> dict[str, Book]:
    """Every ledger's book, from its database, chain and signatures verified."""
    folder = RunFolder(root=out)
    keys = {site: public_from_raw(bytes.fromhex(key)) for site, key in folder.facts()["public_keys"].items()}
    found = {}
    for owner, key in {"coordinator": folder.key().public_key(), **keys}.items():
        path = out / "run" / "ledger.db" if owner == "coordinator" else out / "sites" / owner / "ledger.db"
        if not path.exists() and owner == "coordinator":
            continue  # killed before its first line
        try:
            ledger = Ledger.open(path)
        except CheckFailed:
            assert owner == "coordinator" and not (out / "run" / "answers").exists()
            continue
        try:
            found[owner] = chain.replay(ledger.lines(), owner=owner, public=key)[0]
        finally:
            ledger.close()
    return found


def nothing_unpaid(out: Path) -> None:
    """Whatever a site sealed, and whatever the study used, stands in that site's ledger."""
    run_id = str(RunFolder(root=out).facts()["run"])
    found = books(out)
    for site in (out / "sites").iterdir():
        if (site / "vault.db").exists():
            vault = Vault(site / "vault.db")
            asked = vault.get("asked")
            vault.close()
            if asked is not None:
                named, index, _ = asked.decode().split("/")
                assert (named, index) in found[site.name].entries, f"{site.name} sealed {index} and did not charge it"
    for path in (out / "run" / "answers").glob("*.npz"):
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
        for name in facts["sites"]:
            entry = found[name].entries[run_id, str(facts["index"])]
            assert entry.state in ("SEALED", "RELEASED"), (name, facts["index"], entry.state)


class Zygote:
    """crash_run.py, warm and waiting."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_run.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"},
        )

    def start(self, out: Path, die_at: int | None = None) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"out": str(out), "die_at": die_at}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ended(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert not said["code"].startswith("BUG"), said
        return said

    def run(self, out: Path, die_at: int | None = None) -> dict[str, Any]:
        self.start(out, die_at)
        return self.ended()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


def copy(prepared: Path, name: str) -> Path:
    out = prepared.parent / name
    shutil.copytree(prepared, out)
    return out


def goes_on_to_its_end(zygote: Zygote, out: Path, reference: dict[str, bytes]) -> str:
    """Resume; "same" for the uninterrupted run's model, "void" for a clear end, "skipped" for a gradient step that a
    hospital's death made void."""
    nothing_unpaid(out)
    ended = zygote.run(out)
    nothing_unpaid(out)
    run_id = str(RunFolder(root=out).facts()["run"])
    if ended["code"]:
        assert ended["code"] == "RUN-VOID", ended
        assert any(entry.state == "BURNED" for entry in books(out)["coordinator"].entries.values())
        return "void"
    finish(out, score=False)
    found = audit(out)
    assert found.ok, [check for check in found.checks if not check.ok]
    plan = RunFolder(root=out).plan()
    for owner, book in books(out).items():
        mine = [int(release) for (run_, release) in book.entries if run_ == run_id]
        assert owner != "coordinator" or sorted(mine) == list(range(plan.releases))  # each once
    burned = {e.release for e in books(out)["coordinator"].entries.values() if e.state == "BURNED"}
    if burned:
        assert all(plan.stage_of(int(release)).kind == "gradient" for release in burned)
        return "skipped"
    assert arrays(out) == reference
    return "same"


def test_stopped_between_releases(simulate: Simulate) -> None:
    """Stopped before each release in turn, in every generator's phases: the model of an uninterrupted run."""
    prepared = simulate(**STRICT, **STEPS)
    whole = copy(prepared, "whole")
    run(whole)
    for calls in range(1, RunFolder(root=prepared).plan().releases + 5):
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > 1  # one release further each time

        try:
            run(prepared, stop=stop)
            break
        except Stopped:
            assert len(books(prepared)["site-1"].entries) == calls
            nothing_unpaid(prepared)
    assert calls == RunFolder(root=prepared).plan().releases
    assert arrays(prepared) == arrays(whole)
    for book in books(prepared).values():
        assert len(book.entries) == calls
        assert {entry.state for entry in book.entries.values()} == {"RELEASED"}
    assert (
        (finish(prepared, score=False)["files"]["synthetic.csv"])
        == finish(whole, score=False)["files"]["synthetic.csv"]
    )
    assert audit(prepared).ok
    run(prepared)  # a finished run is run again: nothing is asked
    assert all(len(book.entries) == calls for book in books(prepared).values())


def steps_of(zygote: Zygote, simulate: Simulate, **changes: Any) -> tuple[Path, int, dict[str, bytes]]:
    prepared = simulate(**{**STRICT, **changes})
    whole = copy(prepared, "whole")
    ended = zygote.run(whole)
    assert ended["code"] == "" and ended["steps"] > 100
    return prepared, ended["steps"], arrays(whole)


def test_killed_at_some_steps(simulate: Simulate, zygote: Zygote) -> None:
    prepared, steps, reference = steps_of(zygote, simulate)
    ends = []
    for at in random.Random(7).sample(range(steps), 4):
        out = copy(prepared, f"at-{at}")
        assert zygote.run(out, at)["signal"] == signal.SIGKILL
        ends.append(goes_on_to_its_end(zygote, out, reference))
    assert "same" in ends


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_so_many_steps(simulate: Simulate, zygote: Zygote) -> None:
    """Four releases, from the hello to the last note; a hospital that died inside one makes it void, and says so.

    Every 50th step in the everyday check, every 7th with COHORTIUM_FULL_KILLS=1.
    """
    prepared, steps, reference = steps_of(zygote, simulate)
    ends: dict[str, int] = {}
    for at in range(1, steps, EVERY):
        out = copy(prepared, f"at-{at}")
        assert zygote.run(out, at)["signal"] == signal.SIGKILL
        how = goes_on_to_its_end(zygote, out, reference)
        ends[how] = ends.get(how, 0) + 1
        shutil.rmtree(out)
    assert set(ends) <= {"same", "void"} and ends["same"] > ends.get("void", 0), ends


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments(simulate: Simulate, zygote: Zygote) -> None:
    """SIGKILL from outside at random moments, up to three times in a row in one run."""
    prepared, _, reference = steps_of(zygote, simulate)
    started = time.monotonic()
    zygote.run(copy(prepared, "timed"))
    duration = time.monotonic() - started
    dice, kills, ends = random.Random(11), 0, list[str]()
    for number in range(60):
        out = copy(prepared, f"random-{number}")
        for _ in range(dice.randint(1, 3)):
            pid = zygote.start(out)
            time.sleep(dice.random() * duration)
            # The fork may have ended by itself; its pid is not given away before the zygote has waited for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            kills += zygote.ended()["signal"] == signal.SIGKILL
            nothing_unpaid(out)
        ends.append(goes_on_to_its_end(zygote, out, reference))
        shutil.rmtree(out)
        if kills >= KILLS:
            break
    assert kills >= KILLS and "same" in ends


def test_with_one_to_spare_a_killed_hospital_only_drops(simulate: Simulate, zygote: Zygote) -> None:
    """t = 2 of 3: a site that died inside a release is left out of it and is back in the next.

    Whatever the moment: also where some hospitals had revealed their shares and the coordinator died with them.
    """
    prepared, steps, _ = steps_of(zygote, simulate, survivors=2)
    unmasking = 60  # inside the first round's last exchange, where some sites have revealed and some have not
    for at in (0, unmasking, *random.Random(3).sample(range(steps), 4)):
        out = copy(prepared, f"at-{at}")
        assert zygote.run(out, at)["signal"] == signal.SIGKILL
        nothing_unpaid(out)
        assert zygote.run(out)["code"] == ""
        finish(out, score=False)
        assert audit(out).ok
        study = [entry.state for entry in books(out)["coordinator"].entries.values()]
        assert set(study) == {"RELEASED"}, "one hospital's death makes no round void"


def test_a_half_made_consortium_says_so(simulate: Simulate) -> None:
    prepared = simulate(**STRICT)
    (prepared / "manifest.json").unlink()  # the last file that `prepare` writes
    with pytest.raises(UsageError) as caught:
        run(prepared)
    assert caught.value.code == "SIMULATE-UNMADE" and "remove" in caught.value.hint
