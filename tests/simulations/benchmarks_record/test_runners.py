"""What a peer is given, and what becomes of one that does not install; peers and baselines themselves are faked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cohortium.common.errors import UsageError
from cohortium.simulations.benchmarks.record import runners
from cohortium.simulations.benchmarks.record.cells import Cell, Prepared
from cohortium.simulations.benchmarks.record.measure import Limits, Measured
from cohortium.simulations.benchmarks.record.methods import Method
from cohortium.simulations.benchmarks.record.peers import PEERS, Job, Outcome
from cohortium.simulations.benchmarks.record.runners import ONE_THREAD, Runners
from cohortium.simulations.benchmarks.record.worlds import World

WORLD = World(table="toy", target="ill", unit="who", skip=("secret",))
NAME = next(name for name, peer in PEERS.items() if peer.private and "oracle" in peer.bins)
DECLARED = Method(name=NAME, family="peer", part=NAME, bins="declared")
ORACLE = Method(name=f"{NAME}+oracle", family="oracle", part=NAME, bins="oracle")
LIMITS = Limits(cpu_s=5, wall_s=7, memory_gb=2)


@pytest.fixture
def table(tmp_path: Path) -> Prepared:
    rows = pd.DataFrame({"who": range(10), "age": range(10), "ill": [0, 1] * 5, "secret": 1})
    path = tmp_path / "toy.parquet"
    rows.iloc[:6].to_parquet(path)
    facts: dict[str, Any] = {"world": WORLD, "schema": {"fields": []}, "dictionary": tmp_path / "toy.schema.json"}
    return Prepared(train=rows.iloc[:6], test=rows.iloc[6:], path=path, patients=6, **facts)


@pytest.fixture
def make() -> Runners:
    return Runners(peers=PEERS, cache=Path("nowhere"), limits=LIMITS, delta=1e-5)


@pytest.mark.parametrize("method", [DECLARED, ORACLE], ids=lambda m: m.bins)
def test_a_peer_gets_the_training_rows_the_budget_and_its_limits(
    make: Runners, table: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    seen: list[tuple[Job, dict[str, Any]]] = []

    def run_peer(peer: Any, job: Job, **more: Any) -> Outcome:
        seen.append((job, more))
        assert job.out.is_dir() and peer is PEERS[NAME]
        pd.DataFrame({"age": [1, 2], "ill": [0, 1]}).to_parquet(job.out / "synthetic.parquet")
        said = {"package": "p", "version": "3"}
        return Outcome(
            synthetic=job.out / "synthetic.parquet", said=said, failure=None, wall_s=3.0, cpu_s=2.0, peak_mb=9.0
        )

    monkeypatch.setattr(runners, "environment", lambda peer, cache: cache / "python")
    monkeypatch.setattr(runners, "run_peer", run_peer)
    made = make(Cell(world=WORLD, method=method, epsilon=3.0, seed=2), table, tmp_path)
    assert made.synthetic is not None and len(made.synthetic) == 2 and made.failure is None
    assert made.cost == {"cpu_s": 2.0, "wall_s": 3.0, "peak_mb": 9.0} and made.said["version"] == "3"
    ((job, limits),) = seen
    assert (job.train, job.rows, job.epsilon, job.delta, job.seed) == (table.path, 6, 3.0, 1e-5, 2)
    assert (job.bins, job.skip, job.target, job.unit) == (method.bins, ("secret",), "ill", "who")
    assert job.method == PEERS[NAME].method
    assert limits == {"cache": Path("nowhere"), "limit_cpu_s": 5, "limit_wall_s": 7, "limit_memory_gb": 2}


def test_a_peer_that_does_not_install_is_tried_once_and_says_its_version(
    make: Runners, table: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def environment(peer: Any, cache: Path) -> Path:
        tried.append(peer.name)
        raise UsageError("PEER-INSTALL", "no matching distribution")

    monkeypatch.setattr(runners, "environment", environment)
    cells = [Cell(world=WORLD, method=m, epsilon=1.0, seed=s) for m in (DECLARED, ORACLE) for s in (1, 2)]
    made = [make(cell, table, tmp_path) for cell in cells]
    assert tried == [NAME]
    assert {m.failure for m in made} == {"not installable: no matching distribution"}
    package, _, version = PEERS[NAME].requirements[0].partition("==")
    assert made[0].said == {"package": package, "version": version}


def test_references_need_no_process(make: Runners, table: Prepared, tmp_path: Path) -> None:
    for name in ("real", "shuffled"):
        made = make(
            Cell(world=WORLD, method=Method(name=name, family="reference"), epsilon=None, seed=1), table, tmp_path
        )
        assert made.synthetic is not None and len(made.synthetic) == 6
        assert made.synthetic.equals(table.train) == (name == "real")


@pytest.mark.parametrize(
    ("method", "split", "local", "baseline"),
    [
        (Method(name="ours-iid", family="ours", split="iid"), "iid:5", False, None),
        (Method(name="ours-iid-c0", family="ours", split="iid", colluders=0), "iid:5", False, None),
        (Method(name="ours-skewed", family="ours", split="skewed"), "dirichlet:ill:5:0.5", False, None),
        (Method(name="ours-pooled", family="pooled"), None, False, None),
        (Method(name="ours-local", family="local", split="iid"), "iid:5", True, None),
        (Method(name="alone", family="baseline", part="alone", split="iid"), "iid:5", False, "alone"),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_ours_and_baselines_run_on_one_thread_with_their_split(
    make: Runners,
    table: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    split: str | None,
    local: bool,
    baseline: str | None,
) -> None:
    from cohortium.simulations.benchmarks.record import child

    def measured(command: list[str], *, limits: Limits, words: Path, environment: dict[str, str]) -> Measured:
        job, name = child.read_job(Path(command[-1]))
        assert (job.split, job.local, name, job.rows, job.epsilon) == (split, local, baseline, 6, 2.0)
        assert job.colluders == method.colluders
        assert limits == LIMITS and {k: environment[k] for k in ONE_THREAD} == ONE_THREAD
        assert not (job.folder / "out").exists()
        return Measured(failure="over 5 CPU s", wall_s=1.0, cpu_s=5.1, peak_mb=2.0)

    monkeypatch.setattr(runners, "measured", measured)
    made = make(Cell(world=WORLD, method=method, epsilon=2.0, seed=1), table, tmp_path)
    assert made.failure == "over 5 CPU s" and made.cost["cpu_s"] == 5.1


def test_the_code_of_a_method_is_its_own(make: Runners) -> None:
    ours = Method(name="ours-iid", family="ours", split="iid")
    alone = Method(name="alone", family="baseline", part="alone", split="iid")
    found = {m.name: make.code(m) for m in (ours, alone, DECLARED)}
    assert len(set(found.values())) == 3 and all(found.values())
    assert make.code(Method(name="real", family="reference")) == ""
    newer = {**PEERS, NAME: replace(PEERS[NAME], requirements=("mbi==99",))}
    other = Runners(peers=newer, cache=Path(), limits=LIMITS, delta=1e-5)
    assert other.code(DECLARED) != found[NAME] and other.code(ours) == found["ours-iid"]
