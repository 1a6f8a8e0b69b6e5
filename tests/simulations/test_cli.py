"""The command as people use it: exit codes, words with a fix, JSON, Ctrl-C, and every bad input of the list."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import DICTIONARY, small_study, small_table
from typer.testing import CliRunner, Result

from cohortium.simulations.cli import app

RUNNER = CliRunner()


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def says(result: Result, code: int, *words: str) -> None:
    """The exit code and words; never a traceback, and an error names its fix."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output
    if code:
        assert "fix" in result.output, result.output


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Path]:
    return small_study(tmp_path / "study")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished simulation for the commands that read one."""
    from small import make_quick

    home = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        study, table = small_study(home / "study")
        says(
            call("simulate", study, "--table", table, "--split", "iid:3", "--out", home / "out", "--seed", 4),
            0,
        )
    return home / "out"


def test_simulate_says_what_it_did(done: Path) -> None:
    for name in (
        "synthetic.parquet",
        "synthetic.csv",
        "report.html",
        "result.json",
        "plan.json",
        "run/ledger.jsonl",
    ):
        assert (done / name).stat().st_size > 0
    result = json.loads((done / "result.json").read_text())
    assert result["warnings"] and "rehearsal" in result["warnings"][0]


def test_json_is_json(study: tuple[Path, Path], done: Path, tmp_path: Path, quick: None) -> None:
    checked = call("study", "check", study[0], "--sites", 3, "--json")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["epsilon"]["add-remove"]["1"] <= 20.0
    ran = call("simulate", study[0], "--table", study[1], "--split", "iid:3", "--out", tmp_path / "out", "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout)["format"] == "cohortium-result/1"
    audited = call("audit", done, "--json")
    assert audited.exit_code == 0 and json.loads(audited.stdout)["ok"] is True
    sampled = call("sample", done, "-n", 10, "-o", tmp_path / "rows.csv", "--where", "sex=F", "--json")
    assert sampled.exit_code == 0 and json.loads(sampled.stdout)["rows"] == 10
    reported = call("report", done, "--json")
    assert reported.exit_code == 0 and json.loads(reported.stdout)["report"].endswith("report.html")
    assert isinstance(json.loads(call("doctor", "--json").stdout), list)
    drafted = call("study", "new", "--table", study[1], "--out", tmp_path / "new", "--json")
    assert drafted.exit_code == 0 and json.loads(drafted.stdout)["guessed"]
    refused = call("audit", tmp_path, "--json")
    assert refused.exit_code == 2 and json.loads(refused.stdout)["error"] == "AUDIT-MANIFEST"


def test_words_for_people(study: tuple[Path, Path], done: Path, tmp_path: Path) -> None:
    says(call("study", "check", study[0], "--sites", 3), 0, "Price of the whole plan")
    says(call("audit", done), 0, "Everything holds.")
    says(call("sample", done, "-n", 10, "-o", tmp_path / "rows.csv"), 0, "Wrote 10 rows")
    assert call("doctor").exit_code in (0, 1)
    assert call("--help").exit_code == 0
    assert call("simulate", "--nonsense").exit_code == 2


def test_simulate_usage(study: tuple[Path, Path], done: Path, tmp_path: Path, quick: None) -> None:
    says(call("simulate"), 2, "SIMULATE-ARGUMENTS")
    says(call("simulate", study[0], "--resume", done), 2, "SIMULATE-RESUME")
    says(
        call("simulate", study[0], "--table", study[1], "--split", "iid:3", "--out", done),
        2,
        "SIMULATE-OUT",
        "--resume",
    )
    says(
        call("simulate", study[0], "--table", study[1], "--engine", "warp", "--out", tmp_path / "o"),
        2,
        "ENGINE",
    )
    says(
        call("simulate", study[0], "--table", study[1], "--split", "iid:0", "--out", tmp_path / "o"),
        2,
        "SPLIT",
    )
    says(
        call("simulate", study[0], "--table", study[1], "--split", "by:nobody", "--out", tmp_path / "o"),
        2,
        "TABLE-COLUMN",
    )
    says(
        call("simulate", study[0], "--table", study[1], "--split", "iid:2", "--out", tmp_path / "o"),
        2,
        "STUDY-SITES",
    )
    says(call("simulate", "--resume", tmp_path / "nothing"), 2)
    assert not (tmp_path / "o").exists(), "a refused simulation leaves nothing behind"


def test_missing_files(study: tuple[Path, Path], tmp_path: Path) -> None:
    says(call("simulate", tmp_path / "no.toml", "--table", study[1], "--out", tmp_path / "o"), 2, "no.toml")
    says(call("simulate", study[0], "--table", tmp_path / "no.csv", "--out", tmp_path / "o"), 2, "no.csv")
    says(call("study", "check", tmp_path / "no.toml"), 2)
    says(call("study", "new", "--table", tmp_path / "no.csv", "--out", tmp_path / "o"), 2)
    says(call("sample", tmp_path / "no", "-o", tmp_path / "rows.csv"), 2)
    assert call("report", tmp_path).exit_code == 2
    (study[0].parent / "dictionary.json").unlink()
    says(call("study", "check", study[0], "--sites", 3), 2, "dictionary.json")
    says(call("audit", tmp_path), 2, "AUDIT-MANIFEST")


def changed(**fields: Any) -> dict[str, Any]:
    """The small dictionary with changed fields: name -> new field, None to drop."""
    kept = [fields.get(f["name"], f) for f in DICTIONARY["fields"] if fields.get(f["name"], f) is not None]
    return {**DICTIONARY, "fields": kept}


def edited(**columns: Any) -> pd.DataFrame:
    return small_table(40).astype({"grade": object}).assign(**columns)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a column that the dictionary does not know", {"table": edited(extra=1)}, "extra"),
    ("a column that the table lacks", {"table": small_table(40).drop(columns="dose")}, "dose"),
    (
        "a dictionary of another table",
        {"dictionary": changed(age={"name": "alter", "type": "integer", "constraints": {"minimum": 0, "maximum": 9}})},
        "alter",
    ),
    ("a string without levels", {"dictionary": changed(sex={"name": "sex", "type": "string"})}, "DICT-LEVELS"),
    ("a type that does not exist", {"dictionary": changed(sex={"name": "sex", "type": "text"})}, "DICT"),
    ("text where a number belongs", {"table": edited(dose=["two"] * len(edited()))}, "TABLE-VALUE"),
    ("no rows", {"table": small_table(40).iloc[:0]}, "TABLE-EMPTY"),
    ("a target that is not there", {"target": "death"}, "target"),
    ("more survivors than sites", {"survivors": 9}, "STUDY-SURVIVORS"),
    ("a generator that is not there", {"generator": "gan"}, "generator"),
    ("a unit that is not there", {"unit": "person"}, "unit"),
]


@pytest.mark.parametrize(("options", "word"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_is_explained(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    study, table = small_study(tmp_path / "study", **options)
    result = call("simulate", study, "--table", table, "--split", "iid:3", "--out", tmp_path / "out")
    says(result, 2, word)
    assert not (tmp_path / "out").exists()


def test_an_epsilon_too_small_for_the_plan(study: tuple[Path, Path], tmp_path: Path) -> None:
    text = study[0].read_text().replace("epsilon = 20.0", "epsilon = 1e-7").replace("delta = 1e-6", "delta = 1e-12")
    study[0].write_text(text)
    says(call("study", "check", study[0], "--sites", 3), 3, "PLAN-EPSILON")
    says(
        call("simulate", study[0], "--table", study[1], "--split", "iid:3", "--out", tmp_path / "o"),
        3,
        "PLAN-EPSILON",
    )
    assert not (tmp_path / "o").exists()


def with_one_row_hospital() -> pd.DataFrame:
    table = small_table(40)
    table["site"] = np.where(table.index == 0, "one", np.where(table.id < "p0020", "a", "b"))
    return table[(table.site != "one") | (table.index == 0)]


RIGHT: list[tuple[str, dict[str, Any], str]] = [
    (
        "a hospital of one row",
        {
            "table": with_one_row_hospital().assign(id=lambda t: t.site + t.id),
            "dictionary": {
                **DICTIONARY,
                "fields": [
                    *DICTIONARY["fields"],
                    {"name": "site", "type": "string", "constraints": {"enum": ["a", "b", "one"]}},
                ],
            },
        },
        "by:site",
    ),
    ("a hospital without rows", {"survivors": 5}, "dirichlet:sex:6:0.02"),
    ("a constant column", {"table": edited(sex="F", age=50)}, "iid:3"),
    ("a column of nothing", {"table": edited(dose=np.nan, sex=None)}, "iid:3"),
    (
        "a level that never occurs",
        {"dictionary": changed(sex={"name": "sex", "type": "string", "constraints": {"enum": ["F", "M", "X"]}})},
        "iid:3",
    ),
    ("NaN and infinity", {"table": edited(dose=lambda t: np.where(t.index % 2 == 0, np.inf, np.nan))}, "iid:3"),
    ("values far outside", {"table": edited(dose=1e9, sex="Z")}, "iid:3"),
    ("the same patient many times", {"table": pd.concat([small_table(10)] * 4)}, "iid:3"),
    ("a single patient a hospital", {"table": small_table(3)}, "iid:3"),
]


@pytest.mark.parametrize(("options", "split"), [w[1:] for w in RIGHT], ids=[w[0] for w in RIGHT])
def test_odd_input_runs(tmp_path: Path, quick: None, options: dict[str, Any], split: str) -> None:
    study, table = small_study(tmp_path / "study", **options)
    out = tmp_path / "out"
    says(call("simulate", study, "--table", table, "--split", split, "--out", out), 0)
    rows = pd.read_parquet(out / "synthetic.parquet")
    assert len(rows) == 60 and rows.dose.dropna().between(0, 10).all() and rows.sex.dropna().isin(["F", "M", "X"]).all()
    says(call("audit", out), 0)


@pytest.mark.slow
def test_five_hundred_columns(tmp_path: Path, quick: None) -> None:
    rng = np.random.default_rng(2)
    names = [f"c{i:03d}" for i in range(500)]
    fields = [{"name": name, "type": "boolean"} for name in names]
    table = pd.DataFrame({name: rng.integers(0, 2, 60).astype(bool) for name in names})
    options: dict[str, Any] = {"table": table, "dictionary": {"name": "wide", "fields": fields}}
    study, path = small_study(tmp_path / "study", unit="row", target="c000", **options)
    says(call("simulate", study, "--table", path, "--split", "iid:3", "--out", tmp_path / "out"), 0)
    assert pd.read_parquet(tmp_path / "out" / "synthetic.parquet").shape == (60, 500)


def test_no_noise_runs_and_says_so(study: tuple[Path, Path], tmp_path: Path, quick: None) -> None:
    result = call(
        "simulate", study[0], "--table", study[1], "--split", "iid:3", "--no-noise", "--out", tmp_path / "out"
    )
    says(result, 0, "no privacy")
    assert call("audit", tmp_path / "out").exit_code == 1, "no audit passes what has no price"


def spoil_bit(out: Path) -> None:
    path = out / "sites" / "site-2" / "ledger.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def spoil_line(out: Path) -> None:
    path = out / "sites" / "site-1" / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))


def spoil_last_line(out: Path) -> None:
    path = out / "run" / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def spoil_signature(out: Path) -> None:
    path = out / "run" / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["signature"] = lines[3]["signature"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def spoil_epsilon(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    result["privacy"]["prices"][0]["epsilon"] = "0.5"
    (out / "result.json").write_text(json.dumps(result))


def spoil_rows(out: Path) -> None:
    (out / "synthetic.csv").write_text((out / "synthetic.csv").read_text().replace("F", "M", 1))


@pytest.mark.parametrize("spoil", [spoil_bit, spoil_line, spoil_last_line, spoil_signature, spoil_epsilon, spoil_rows])
def test_audit_finds(done: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    spoil(out)
    result = call("audit", out)
    assert result.exit_code == 1 and "✗" in result.output and "Traceback" not in result.output


def test_an_error_we_did_not_foresee(study: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70, a code and no word of what was in the exception: it may hold values."""
    import cohortium.simulations.run as module

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("patient 17")

    monkeypatch.setattr(module, "split", broken)
    result = call("simulate", study[0], "--table", study[1], "--out", tmp_path / "o")
    says(result, 70, "BUG", "ZeroDivisionError")
    assert "patient 17" not in result.output


def test_ctrl_c_stops_between_releases_and_resume_goes_on(tmp_path: Path) -> None:
    """SIGINT to the real command: exit 130, what was spent, and --resume finishes without paying twice."""
    study, table = small_study(tmp_path / "study", generator="autoregressive", rounds=50)
    out = tmp_path / "out"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); from small import make_quick; "
        "make_quick(); from cohortium.simulations.cli import main; main()"
    )

    def command(*arguments: str | Path) -> list[str]:
        return [sys.executable, "-c", script, *map(str, arguments)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        command("simulate", study, "--table", table, "--split", "iid:3", "--out", out, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    until = time.monotonic() + 120
    while len(list((out / "run" / "answers").glob("*.npz"))) < 6 and time.monotonic() < until:
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.02)
    begun.send_signal(signal.SIGINT)
    said, words = begun.communicate(timeout=120)
    assert begun.returncode == 130, (said, words)
    stopped = json.loads(said)
    assert stopped["stopped"] and 0 < stopped["epsilon_spent"] < stopped["epsilon"]
    assert "Traceback" not in words and not (out / "run" / "model.npz").exists()
    went_on = subprocess.run(
        command("simulate", "--resume", out, "--json"),
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert went_on.returncode == 0, went_on.stderr
    spent = json.loads(went_on.stdout)["privacy"]["prices"][0]
    assert float(spent["epsilon"]) <= 20.0 * (1 + 1e-6)
    says(call("audit", out), 0)
