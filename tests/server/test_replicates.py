"""A replay asks the run's questions with the run's noise; a run's answers come from its folder, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small import make_quick, small_study
from typer.testing import CliRunner

from cohortium.common.errors import UsageError
from cohortium.common.generators.base import Answer
from cohortium.common.queries import Counts
from cohortium.server.replicate_tables import write_replicates
from cohortium.server.replicates import ROWS, Replay, of_run, patients
from cohortium.server.runs import RunFolder
from cohortium.simulations.cli import app
from cohortium.simulations.run import Request, prepare, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One run of four sites where three are enough: more noise than the plan's."""
    home = tmp_path_factory.mktemp("replicates")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        study, table = small_study(home / "study", survivors=3, colluders=1)
        prepare(Request(study=study, table=table, split="iid:4", out=home / "out", seed=1))
        run(home / "out")
    return RunFolder(root=home / "out")


def histogram(folder: RunFolder, column: int) -> Counts:
    size = folder.grids()[column].size
    return Counts(columns=(column,), maps=(np.arange(size, dtype=np.int32),), bins=(size,))


def test_the_kept_answers_are_the_runs_own(folder: RunFolder) -> None:
    release, kept = of_run(folder)
    assert list(release.variance_factors) == [p.name for p in release.phases]
    assert set(release.variance_factors.values()) == {4 / 2}  # four sent noise, h = t − c = 2 of them are enough
    stage = release.stage("ranges")
    with np.load(folder.inner / "answers" / f"{stage.first:05d}.npz") as file:
        values, lattice = file["values"], float.fromhex(json.loads(str(file["facts"]))["lattice"])
    wide = Counts(columns=(0,), maps=(np.zeros(1, dtype=np.int32),), bins=(len(values),))
    answer = kept("ranges", wide)
    assert np.array_equal(answer.values, values * lattice)
    assert answer.sigma == pytest.approx(stage.noise_multiplier * wide.sensitivity_l2 * 2**0.5)


def noise_ratio(folder: RunFolder, *, factor: float = 1.0) -> float:
    """Variance of a replay's answers about the truth over the variance that they state; 20 × 101 draws."""
    release, _ = of_run(folder)
    query = histogram(folder, 1)
    codes = np.zeros((50, len(release.grids)), dtype=np.int32)
    codes[:, 1] = np.arange(50)
    exact = query.contribution(patients(codes)).units * query.lattice
    found: list[np.ndarray] = []
    for seed in range(20):
        answer: Answer = Replay(release=release, codes=codes, seed=seed)("ranges", query)
        found.append((answer.values - exact) / (answer.sigma * factor))
    return float(np.mean(np.concatenate(found) ** 2))


def test_a_replay_draws_the_noise_it_states(folder: RunFolder) -> None:
    """2,020 squares: standard deviation 0.031; noise of 2/3 or 3/2 of the variance would be 10 of them away."""
    assert abs(noise_ratio(folder) - 1) < 4 * (2 / 2020) ** 0.5
    for wrong in (2 / 3, 3 / 2):
        assert abs(noise_ratio(folder, factor=wrong**0.5) - 1) > 10 * (2 / 2020) ** 0.5


def test_a_replay_states_the_noise_of_the_run(folder: RunFolder) -> None:
    release, kept = of_run(folder)
    query = histogram(folder, 1)
    codes = np.zeros((5, len(release.grids)), dtype=np.int32)
    whole = Counts(columns=(0,), maps=(np.zeros(1, dtype=np.int32),), bins=(len(kept.answers["ranges"][0]),))
    assert Replay(release=release, codes=codes, seed=1)("ranges", query).sigma == kept("ranges", whole).sigma


def test_replays_come_again_and_differ_by_seed(folder: RunFolder) -> None:
    release, kept = of_run(folder)
    rows, total = release.rows(kept, (1, 2), seed=3)
    assert rows.shape == (ROWS, 6) and not rows[:, [0, 3, 4, 5]].any() and 40 < total < 160
    people = rows[:100]
    one, two, other = (release.replay(people, (1, 2), seed=s, count=64) for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other) and len(one) == 64


def test_without_its_answers_a_run_cannot_be_replayed(folder: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(folder.root, tmp_path / "copy")
    copy = RunFolder(root=tmp_path / "copy")
    next((copy.inner / "answers").glob("*.npz")).unlink()
    with pytest.raises(UsageError) as caught:
        of_run(copy)
    assert caught.value.code == "ANALYZE-ANSWERS"


def test_another_question_than_the_runs_is_refused(folder: RunFolder) -> None:
    _, kept = of_run(folder)
    with pytest.raises(UsageError) as caught:
        kept("ranges", histogram(folder, 0))
    assert caught.value.code == "ANALYZE-VERSION"


def test_replicate_tables_are_written_and_come_again(folder: RunFolder, tmp_path: Path) -> None:
    told: list[int] = []
    files = write_replicates(folder, 5, 40, tmp_path / "rows.parquet", seed=2, progress=told.append)
    names = ["rows_world", *(f"rows_{i:02d}" for i in range(6))]
    assert [file.stem for file in files] == names and told == [1, 2, 3, 4, 5, 6, 7]
    tables = [pd.read_parquet(file) for file in files]
    assert [len(t) for t in tables[1:]] == [40] * 6 and len(tables[0]) >= 4 * ROWS
    assert list(tables[3].columns) == [c.name for c in folder.study().schema.modelled]
    assert not tables[2].equals(tables[3])
    again = write_replicates(folder, 5, 40, tmp_path / "again.parquet", seed=2)
    assert all(pd.read_parquet(a).equals(t) for a, t in zip(again, tables, strict=True))


def test_the_command_writes_replicates_or_says_what_to_change(folder: RunFolder, tmp_path: Path) -> None:
    words = ["sample", str(folder.root), "-n", "20", "--replicates", "5"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "r.parquet"), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["files"]) == 7
    for wrong in (["--where", "sex=F"], ["-o", str(tmp_path / "r.csv")], ["--replicates", "2"]):
        failed = CliRunner().invoke(app, [*words, *wrong])
        assert failed.exit_code == 2 and ("SAMPLE-REPLICATES" in failed.stderr or "SAMPLE-FILE" in failed.stderr)
