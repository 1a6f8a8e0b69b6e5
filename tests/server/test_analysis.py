"""`cohortium analyze` on a finished run: intervals beside naive ones, kept replays, refusals with their fix."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small import make_quick, small_study
from typer.testing import CliRunner

from cohortium.common.errors import UsageError
from cohortium.common.evaluation.combining import plain
from cohortium.server import playing
from cohortium.server.analysis import FOLDER, analyze, read_formulas
from cohortium.server.finish import sample
from cohortium.server.replicates import Release
from cohortium.server.runs import RunFolder
from cohortium.simulations.cli import app
from cohortium.simulations.run import Request, prepare, run

LOGISTIC = "smoker ~ age + sex"
FEW = 6


def people(patients: int = 400) -> pd.DataFrame:
    """Smoking depends on age; no cell is missing but of the dose."""
    rng = np.random.default_rng(4)
    age = np.clip(rng.normal(50, 15, patients), 0, 99).round().astype(int)
    return pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(patients)],
            "sex": np.where(rng.random(patients) < 0.4, "F", "M"),
            "age": age,
            "dose": np.where(rng.random(patients) < 0.2, np.nan, (age / 10) // 0.5 * 0.5),
            "seen": pd.Timestamp("2020-01-05"),
            "smoker": pd.array(rng.random(patients) < 1 / (1 + np.exp(-0.08 * (age - 50))), dtype="boolean"),
            "grade": rng.integers(1, 4, patients),
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    home = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        study, table = small_study(home / "study", table=people(), rows=400)
        prepare(Request(study=study, table=table, split="iid:3", out=home / "out", seed=1))
        run(home / "out")
    sample(RunFolder(root=home / "out"))
    return RunFolder(root=home / "out")


@pytest.fixture(autouse=True)
def _small_population(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "POPULATION_BLOCKS", 1)


@pytest.fixture
def folder(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy, without kept replays."""
    shutil.copytree(finished.root, tmp_path / "run", ignore=shutil.ignore_patterns(FOLDER))
    return RunFolder(root=tmp_path / "run")


def test_intervals_stand_beside_the_naive_ones(folder: RunFolder) -> None:
    estimands = read_formulas(folder, means=["age"], logistic=[LOGISTIC], cox=["dose, smoker ~ age"])
    found = analyze(folder, estimands, replicates=10, seed=1)
    mean, logistic, cox = found.found
    assert [one.estimand.kind for one in found.found] == ["mean", "logistic", "cox"]
    assert 380 < found.patients < 420 and found.table_rows == 400
    age = mean.terms[0].combined
    assert age is not None and age.assessed and abs(age.estimate - 50) < 4
    effect = logistic.terms[0].combined
    assert effect is not None and effect.low < 0.08 < effect.high and effect.estimate > 0
    rows = pd.read_parquet(folder.root / "synthetic.parquet")
    value, error = rows.age.mean(), rows.age.std(ddof=1) / 20
    assert mean.terms[0].naive == pytest.approx((value, *plain(value, error)), abs=1e-9)
    for term in (*mean.terms, *logistic.terms, *cox.terms):
        assert term.naive is not None and term.combined is not None
        # Little noise at this ε: as much doubt as real patients leave, told by few replays to a half.
        assert term.combined.high - term.combined.low > 0.5 * (term.naive[2] - term.naive[1])


@pytest.mark.slow
def test_replays_are_kept_and_gone_on_with(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[int] = []
    real = Release.replay

    def counted(self: Release, *args: object, **options: object) -> np.ndarray:
        replayed.append(1)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Release, "replay", counted)
    estimands = read_formulas(folder, means=["age"], logistic=[LOGISTIC], cox=[])
    told: list[tuple[int, int]] = []
    whole = analyze(folder, estimands, replicates=8, progress=lambda *done: told.append(done)).to_json()
    assert len(replayed) == 8 and told[-1] == (8, 8)
    (kept,) = (folder.root / FOLDER).glob("*.jsonl")
    assert analyze(folder, estimands, replicates=8).to_json() == whole and len(replayed) == 8
    # Fewer are the first of them; and a crash in the middle of a line costs that line.
    assert analyze(folder, estimands, replicates=5).replicates == 5 and len(replayed) == 8
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:6]) + '{"truths": [[0.')
    assert analyze(folder, estimands, replicates=8).to_json() == whole and len(replayed) == 11
    assert analyze(folder, estimands, replicates=8, seed=1).to_json() != whole and len(replayed) == 19


def test_what_has_no_fit_says_so_and_leaves_the_others_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimands = read_formulas(folder, means=["age"], logistic=[LOGISTIC], cox=[])
    fit = type(estimands[1]).fit
    calls: list[int] = []

    def fails_often(self: object, codes: np.ndarray) -> object:
        calls.append(1)
        # The population, the run's own rows, then replays: every second of them has no estimate.
        if len(calls) > 4 and len(calls) % 2:
            raise playing.CannotFit("no finite estimate")
        return fit(self, codes)  # type: ignore[arg-type]

    monkeypatch.setattr(type(estimands[1]), "fit", fails_often)
    mean, logistic = analyze(folder, estimands, replicates=FEW).found
    assert mean.why == "" and mean.terms[0].combined is not None
    assert logistic.failed >= 2 and "no finite estimate" in logistic.why
    assert all(term.combined is None and term.naive is not None for term in logistic.terms)


def test_json_has_ratios_and_no_infinity(folder: RunFolder) -> None:
    words = ["analyze", str(folder.root), "--mean", "grade=2", "--logistic", LOGISTIC, "--replicates", "6", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["format"] == "cohortium-analysis/1" and read["seed"] == 0 and read["level"] == 0.95
    share, logistic = read["analyses"]
    assert "odds_ratio" not in share["terms"][0] and 0 < share["terms"][0]["estimate"] < 1
    for term in logistic["terms"]:
        assert term["odds_ratio"]["estimate"] == pytest.approx(math.exp(term["estimate"]))
        assert term["naive"]["odds_ratio"]["interval"][0] == pytest.approx(math.exp(term["naive"]["interval"][0]))
        assert term["assessed"] == (None not in term["interval"])


def test_people_read_a_table_with_both(folder: RunFolder) -> None:
    done = CliRunner().invoke(app, ["analyze", str(folder.root), "--logistic", LOGISTIC, "--replicates", "6"])
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "odds ratio" in text and "does not cover" in text and "smoker=true ~ age + sex[F]" in text
    assert "seed 0" in text and "Free of budget." in text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], "ANALYZE-NOTHING"),
        (["--mean", "height"], "ANALYZE-COLUMN"),
        (["--logistic", "age ~ sex"], "ANALYZE-FORMULA"),
        (["--cox", "sex, smoker ~ age"], "ANALYZE-FORMULA"),
        (["--mean", "age", "--replicates", "2"], "ANALYZE-REPLICATES"),
    ],
)
def test_the_command_refuses_with_a_fix(folder: RunFolder, words: list[str], code: str) -> None:
    failed = CliRunner().invoke(app, ["analyze", str(folder.root), *words])
    assert failed.exit_code == 2 and code in failed.stderr and "fix" in failed.stderr
    assert not (folder.root / FOLDER).exists()


def test_an_unfinished_run_is_refused(folder: RunFolder) -> None:
    (folder.inner / "model.npz").unlink()
    with pytest.raises(UsageError) as caught:
        analyze(folder, read_formulas(folder, means=["age"], logistic=[], cox=[]), replicates=FEW)
    assert caught.value.code == "RUN-NO-MODEL"


def test_a_generator_without_pairs_gives_means_only(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Release, "has_pairs", property(lambda self: False))
    with pytest.raises(UsageError) as caught:
        analyze(folder, read_formulas(folder, means=[], logistic=[LOGISTIC], cox=[]), replicates=FEW)
    assert caught.value.code == "ANALYZE-GENERATOR"
    only = read_formulas(folder, means=["age"], logistic=[], cox=[])
    assert analyze(folder, only, replicates=FEW).found[0].terms[0].combined is not None
