"""The public Python API: it is thin, it is cheap to import, and it does what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cohortium

SCHEMA = {
    "name": "ward",
    "missingValues": [""],
    "fields": [
        {"name": "id", "type": "integer", "role": "identifier"},
        {"name": "age", "type": "integer", "constraints": {"minimum": 18, "maximum": 99}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        {"name": "died", "type": "boolean", "role": "target"},
    ],
}
STUDY = """
[study]
id = "ward"
title = "A ward"
dictionary = "dictionary.json"

[privacy]
epsilon = 5.0
delta = 1e-6
unit = "id"
adjacency = "add-remove"
hospitals_per_patient = 1

[generator]
name = "mixture"

[strategy]
name = "secure-sum"
survivors = 3
colluders = 1

[release]
rows = 300
"""


def ward(rows: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    age = rng.integers(20, 95, rows)
    return pd.DataFrame(
        {
            "id": np.arange(rows),
            "age": age,
            "sex": rng.choice(["f", "m"], rows),
            "died": rng.random(rows) < (age - 15) / 100,
        }
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ward")
    (folder / "dictionary.json").write_text(json.dumps(SCHEMA))
    (folder / "study.toml").write_text(STUDY)
    return folder / "study.toml"


@pytest.fixture(scope="module")
def run(study: Path) -> cohortium.Run:
    return cohortium.simulate(study, ward(), out=study.parent / "result", split="iid:4", seed=3)


def test_import_is_cheap_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import cohortium; t = time.perf_counter() - t\n"
        "heavy = {'torch', 'pandas', 'numpy', 'flwr', 'scipy', 'dp_accounting', 'cryptography', 'typer'}\n"
        "print(t, *sorted(heavy & set(sys.modules)))"
    )
    best = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, *heavy = done.stdout.split()
        assert heavy == []
        best.append(float(seconds))
    assert min(best) < 0.3


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in cohortium.__all__:
        value = getattr(cohortium, name)
        assert name in dir(cohortium)
        if name != "__version__":
            assert (value.__doc__ or "").strip(), name
    assert cohortium.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = cohortium.nothing


def test_no_public_name_is_missing_from_all() -> None:
    import ast

    tree = ast.parse(Path(cohortium.__file__).read_text(encoding="utf-8"))
    made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert {name for name in made if not name.startswith("_")} <= set(cohortium.__all__)


def test_plan_reads_no_data_and_takes_numbers_names_and_studies(study: Path) -> None:
    by_number = cohortium.plan(study, sites=4)
    assert by_number.sites == ("site-001", "site-002", "site-003", "site-004")
    assert cohortium.plan(cohortium.load_study(study), sites=["b", "a", "d", "c"]).sites == (
        "a",
        "b",
        "c",
        "d",
    )
    assert 4.9 < by_number.price() <= 5.0
    with pytest.raises(cohortium.CohortiumError, match="STUDY-SITES"):
        cohortium.plan(study)


def test_plan_refuses_guessed_ranges(study: Path, tmp_path: Path) -> None:
    guessed = json.loads(json.dumps(SCHEMA))
    guessed["fields"][1]["x-guessed"] = True
    (tmp_path / "dictionary.json").write_text(json.dumps(guessed))
    (tmp_path / "study.toml").write_text(STUDY)
    with pytest.raises(cohortium.CohortiumError, match="STUDY-GUESSED"):
        cohortium.plan(tmp_path / "study.toml", sites=4)
    assert cohortium.plan(tmp_path / "study.toml", sites=4, accept_guessed_ranges=True).releases > 0


def test_simulate_gives_a_run_with_table_statement_and_warning(run: cohortium.Run) -> None:
    made = run.synthetic()
    assert list(made.columns) == ["age", "sex", "died"] and len(made) == 300
    assert "1e-06" in run.statement and "secure-sum" in run.statement
    assert any("rehearsal" in text for text in run.warnings)
    assert json.loads((run.directory / "result.json").read_text())["run"] == run.result["run"]


def test_simulate_leaves_no_copy_of_a_frame_outside_its_folder(run: cohortium.Run) -> None:
    named = json.loads((run.directory / "run.json").read_text())["table"]
    assert not Path(named).exists()


def test_sample_is_reproducible_conditional_and_balanced(run: cohortium.Run) -> None:
    first, again = run.sample(200, seed=5), cohortium.sample(run.directory, 200, seed=5)
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(run.sample(200, seed=6))
    assert set(run.sample(50, where="sex=f")["sex"].astype(str)) == {"f"}
    old = run.sample(50, where={"age": (70, 99), "died": {"true"}})
    assert old["age"].min() >= 70 and bool(old["died"].all())
    assert run.sample(60, balance="sex")["sex"].value_counts().tolist() == [30, 30]
    for bad in ({"rows": 0}, {"rows": 5, "where": "nose=1"}):
        with pytest.raises(cohortium.CohortiumError):
            cohortium.sample(run.directory, **bad)


def test_evaluate_scores_a_folder_and_frames(run: cohortium.Run) -> None:
    whole = cohortium.evaluate(run.directory, seed=run.result["scores"]["seed"])
    assert whole.to_json() == run.result["scores"]
    frames = cohortium.evaluate(run.synthetic(), train=ward(), dictionary=cohortium.Schema.from_dict(SCHEMA), unit="id")
    assert frames.figures["tvd1"].value == pytest.approx(whole.figures["tvd1"].value)
    for wrong in ({}, {"train": ward()}):
        with pytest.raises(cohortium.CohortiumError, match="EVALUATE-ARGUMENTS"):
            cohortium.evaluate(run.synthetic(), **wrong)
    with pytest.raises(cohortium.CohortiumError, match="EVALUATE-ARGUMENTS"):
        cohortium.evaluate(run.directory, train=ward())


def test_report_and_audit(run: cohortium.Run, tmp_path: Path) -> None:
    path = run.directory / "report.html"
    path.unlink()
    assert cohortium.report(run.directory) == path and path.stat().st_size > 10_000
    found = cohortium.audit(run.directory)
    assert found.delta == 1e-6 and {"plan", "budget", "claimed ε"} <= {check.name for check in found.checks}
    assert all(check.ok for check in found.checks if check.name.startswith(("ledger", "file")))
    for function in (cohortium.report, cohortium.audit):
        with pytest.raises(cohortium.CohortiumError):
            function(tmp_path)


def test_resume_of_a_finished_run_changes_nothing_that_was_paid(run: cohortium.Run) -> None:
    before = run.result["privacy"]["prices"]
    again = cohortium.resume(run.directory)
    assert again.result["privacy"]["prices"] == before
    pd.testing.assert_frame_equal(again.synthetic(), run.synthetic())


def test_a_wrong_engine_is_refused_before_anything_is_written(study: Path, tmp_path: Path) -> None:
    with pytest.raises(cohortium.CohortiumError, match="ENGINE"):
        cohortium.simulate(study, ward(), out=tmp_path / "new", engine="steam")
    assert not (tmp_path / "new").exists()
