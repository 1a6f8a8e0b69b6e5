"""The end of a consortium's run: what `simulate` gives from the same seed, in a folder to be audited anywhere."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from conducting import SITES, Field, in_the_field, say_yes

from cohortium.common.errors import Refused
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import PUBLISHED
from cohortium.server.audit import audit
from cohortium.server.finish import GUESSED, REHEARSAL, export_ledgers, finish_run, main, rewrite_report
from cohortium.server.progress import Progress, spent
from cohortium.server.runs import RunFolder

Prepare = Callable[..., Path]
HOLDOUT = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n"


@pytest.fixture
def field(simulate: Prepare, tmp_path: Path) -> Callable[..., tuple[Field, Path]]:
    """A consortium over a simulation's hospitals, and that simulation, not run yet."""

    def make(**options: object) -> tuple[Field, Path]:
        prepared = simulate("iid:3", run=False, **options)
        return in_the_field(tmp_path / "consortium", prepared), prepared

    return make


def run_it(made: Field, prepared: Path, *, seed: int | None = 5) -> RunFolder:
    run = made.made.propose(prepared / "study.toml", seed=seed)
    made.approve(run)
    return made.drive(run)


def failed(folder: Path) -> list[str]:
    return [check.name for check in audit(folder).checks if not check.ok]


def test_the_same_bytes_as_a_simulation(field: Callable[..., tuple[Field, Path]]) -> None:
    """Same seed, sites, tables and plan: same rows; and every claim holds on the coordinator's folder alone."""
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import run

    made, prepared = field(evaluation=HOLDOUT)
    folder = run_it(made, prepared)
    result = finish_run(folder.root, mirror=made.made.mirror)
    run(prepared)
    simulated = finish(prepared, score=False)
    assert folder.plan().digest == RunFolder(root=prepared).plan().digest
    for name in ("synthetic.csv", "synthetic.parquet", "run/evaluation.json"):
        assert (folder.root / name).read_bytes() == (prepared / name).read_bytes(), name
    assert result["run"] == simulated["run"]
    assert result["privacy"]["prices"] == simulated["privacy"]["prices"]
    assert failed(folder.root) == []


def test_what_it_says(field: Callable[..., tuple[Field, Path]]) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    result = finish_run(folder.root, mirror=made.made.mirror)
    page = (folder.root / "report.html").read_text(encoding="utf-8")
    assert result["facts"]["mode"] == "deployment" and "This is a simulation" not in page
    assert result["facts"]["provenance"]["Consortium"] == "rare-tumours" and result["scores"] is None
    assert result["warnings"] == [REHEARSAL] and "NOT PRIVATE" in result["privacy"]["sentence"]
    assert REHEARSAL.split(":")[0] in page
    again = rewrite_report(folder.root).read_text(encoding="utf-8")
    assert "This is a simulation" not in again and result["privacy"]["sentence"] in again.replace("&#39;", "'")
    notes = [line.body for line in chain.read_jsonl(folder.inner / "ledger.jsonl") if line.body["kind"] == "note"]
    assert [note["about"] for note in notes].count(PUBLISHED) == 1 and GUESSED not in {n["about"] for n in notes}


def test_the_folder_that_is_handed_out_holds_no_key_and_audits_elsewhere(
    field: Callable[..., tuple[Field, Path]], tmp_path: Path
) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    finish_run(folder.root, mirror=made.made.mirror)
    away = tmp_path / "auditor" / "a" / "b"
    shutil.copytree(folder.root, away, symlinks=True)
    assert not (away / "coordinator.key").exists() and os.path.islink(away / "coordinator.key")
    shutil.rmtree(made.made.root)
    assert failed(away) == []
    secret = (prepared / "coordinator.key").read_bytes().splitlines()[1]
    assert not [path for path in away.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.parametrize(
    ("spoil", "red"),
    [
        (lambda root: (root / "synthetic.csv").write_text("a,b\n"), "file synthetic.csv"),
        (lambda root: (root / "run/ledgers/site-2.jsonl").unlink(), "ledger site-2"),
        (lambda root: _cut(root / "run/ledgers/site-1.jsonl"), "claimed ledgers"),
        (lambda root: _silence(root, "site-3"), "claimed ledgers"),
    ],
)
def test_a_planted_change_is_found(
    field: Callable[..., tuple[Field, Path]], spoil: Callable[[Path], object], red: str
) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    finish_run(folder.root, mirror=made.made.mirror)
    spoil(folder.root)
    assert red in failed(folder.root)


def _cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


def _silence(root: Path, site: str) -> None:
    """A coordinator that hides a ledger by calling its site silent."""
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["ledgers"]["sites"][site]
    manifest["silent"] = [site]
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_a_site_that_was_never_there(field: Callable[..., tuple[Field, Path]]) -> None:
    """Of one site no line was ever seen, and two of three survive: the manifest says so, and the audit holds."""
    made, prepared = field()
    folder = run_it(made, prepared)
    with sqlite3.connect(made.made.mirror) as db:
        db.execute("DELETE FROM lines WHERE owner = ?", (SITES[2],))
    result = finish_run(folder.root, mirror=made.made.mirror)
    assert json.loads((folder.root / "manifest.json").read_text())["silent"] == [SITES[2]]
    assert SITES[2] not in result["ledgers"] and failed(folder.root) == []


def test_too_many_silent_sites_are_found(field: Callable[..., tuple[Field, Path]]) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    with sqlite3.connect(made.made.mirror) as db:
        db.execute("DELETE FROM lines WHERE owner <> ?", (SITES[0],))
    finish_run(folder.root, mirror=made.made.mirror)
    assert "agreement" in failed(folder.root)


def test_written_again_after_a_crash(
    field: Callable[..., tuple[Field, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    words = ["run", str(folder.root), str(made.made.mirror)]
    first = finish_run(folder.root, mirror=made.made.mirror)["files"]
    (folder.root / "result.json").unlink()
    (folder.root / "synthetic.csv").write_text("half a")
    assert main(words) == 0
    assert json.loads((folder.root / "result.json").read_text())["files"] == first and failed(folder.root) == []
    (folder.inner / "model.npz").unlink()
    assert main(words) == 3
    assert json.loads(capfd.readouterr().out)["error"] == "RUN-UNFINISHED"


def test_other_rows(field: Callable[..., tuple[Field, Path]], tmp_path: Path) -> None:
    made, prepared = field()
    folder = run_it(made, prepared)
    assert main(["rows", str(folder.root), "7", str(tmp_path / "rows.csv")]) == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 8


def test_not_before_the_fit(field: Callable[..., tuple[Field, Path]]) -> None:
    made, prepared = field()
    run = made.made.propose(prepared / "study.toml", seed=5)
    say_yes(made.made, run)
    with pytest.raises(Refused, match="RUN-UNFINISHED"):
        finish_run(made.made.runs / run, mirror=made.made.mirror)


def test_one_mirror_for_all_runs(field: Callable[..., tuple[Field, Path]]) -> None:
    """A second run finds the first one's lines there; each run's folder has the whole ledgers, and its own price."""
    made, prepared = field()
    first = run_it(made, prepared)
    finish_run(first.root, mirror=made.made.mirror)
    paid = spent(first, made.made.mirror)
    assert not (first.inner / "mirror.db").exists() and 0 < paid <= first.plan().epsilon
    export_ledgers(first, made.made.mirror)
    assert failed(first.root) == []
    assert Progress(made.made.mirror).of(first)["epsilon"]["spent"] == paid
