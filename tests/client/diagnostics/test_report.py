"""`cohortium site report`: one page in the site's own folder, for its owner only, and nothing goes anywhere."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hospital import RUN, plan, schema, table, ward
from typer.testing import CliRunner

from cohortium.client.cli import site_app
from cohortium.client.diagnostics import report as reports
from cohortium.client.diagnostics.facts import Item
from cohortium.client.diagnostics.page import histogram, page
from cohortium.client.guard import held_out
from cohortium.client.policy import Policy, Rehearsal
from cohortium.client.records import records
from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.pictures import Identifiers
from cohortium.common.privacy.chain import REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import load_private

ROOT = Path(__file__).resolve().parents[3]
HELD = 0.4


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital with 160 patients, 40 % held out, whose officer approved a run."""
    folder = tmp_path_factory.mktemp("consortium")
    agreed = plan(("a",), holdout=HELD)
    ward(folder, agreed, tables={"a": table(160, seed=4, prefix="a")}, started=False, seed=None)
    table(150, seed=5, prefix="z").drop(columns="pid").to_parquet(folder / "synthetic.parquet", index=False)
    return folder / "a"


@pytest.fixture(scope="module")
def written(site: Path) -> reports.Written:
    return reports.report(site, site.parent / "synthetic.parquet")


def test_it_lies_in_the_site_and_only_its_owner_reads_it(site: Path, written: reports.Written) -> None:
    """Red if it were written with the process's umask, or beside the synthetic rows."""
    assert written.page == site / "reports" / f"{RUN}.html" and written.figures.suffix == ".json"
    for path in (written.page, written.figures):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((site / "reports").stat().st_mode) == 0o700
    facts = json.loads(written.figures.read_text())
    assert facts | {"page": str(written.page), "figures": str(written.figures)} == written.to_json()
    assert facts["synthetic_sha256"] == hashlib.sha256((site.parent / "synthetic.parquet").read_bytes()).hexdigest()


def test_training_and_held_out_patients_are_the_guards_own(site: Path, written: reports.Written) -> None:
    """Red if the split were drawn anew here: then the control would hold training patients."""
    found = records(schema(), table(160, seed=4, prefix="a"), unit="pid")
    held = held_out(found, study=plan(("a",)).study, share=HELD)
    assert (written.diagnosis.train_patients, written.diagnosis.control_patients) == ((~held).sum(), held.sum())


def test_the_same_table_gives_the_same_page(site: Path, written: reports.Written) -> None:
    before = written.page.read_bytes(), written.figures.read_bytes()
    reports.report(site, site.parent / "synthetic.parquet", run=RUN)
    assert (written.page.read_bytes(), written.figures.read_bytes()) == before


def test_everything_asked_for_is_on_it_and_says_what_it_does_not_mean(written: reports.Written) -> None:
    sections = {section.key: section for section in written.diagnosis.sections}
    assert list(sections) == ["similarity", "attacks", "membership", "anonymity", "prediction"]
    keys = {item.key for section in sections.values() for item in section.items}
    wanted = {"copies", "dcr", "nndr", "hamming", "singling_one_residual", "singling_many_control", "linkability_blind"}
    wanted |= {"inference_3_residual", "homogeneity_3_residual", "membership_auc", "membership_bound", "k_all", "l_3"}
    assert wanted | {"trtr_auc", "tstr_auc"} <= keys
    for section in sections.values():
        assert section.warning and all(item.means and item.limits for item in section.items)
    with pytest.raises(ValueError, match="does not mean"):
        Item(key="x", label="x", figure=Figure(value=1.0), means="something", limits="")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "rect", "path", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path", "circle"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_reads_well(written: reports.Written) -> None:
    text = written.page.read_text()
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "img", "iframe", "form", "object"} and "svg" in tags
    assert "default-src 'none'" in text and not re.findall(r"(?:src|href)=\"(?!data:,)", text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) >= 5 and all(p.get("aria-labelledby") for p in pictures)
    for words in ("stays in the hospital", "not privacy", "It does not mean", "control", written.diagnosis.statement):
        assert words in unescape(text), words
    for item in (i for s in written.diagnosis.sections for i in s.items if i.key == "copies"):
        assert item.limits in unescape(text)


def test_names_are_hostile_input(written: reports.Written) -> None:
    from dataclasses import replace

    bad = "<script>alert(1)</script>"
    text = page(replace(written.diagnosis, site=bad, study=bad, run=bad, synthetic_file=bad, sampled=(bad,)))
    assert bad not in text and text.count("&lt;script&gt;") >= 5
    (drawn,) = written.diagnosis.sections[0].histograms
    assert bad not in histogram(Identifiers(), replace(drawn, title=bad, axis=bad))


def test_nothing_is_sent(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    before = (site / "ledger.db").read_bytes()
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    reports.report(site, site.parent / "synthetic.parquet")
    assert (site / "ledger.db").read_bytes() == before


def test_the_guard_and_the_courier_do_not_know_this_folder() -> None:
    """Red if a path led from the door to these figures, or from here to keys and connections."""
    for path in (ROOT / "client").rglob("*.py"):
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        if path.parent.name == "diagnostics":
            banned = ("gate", "courier", "calls", "connect", "stream", "join", "vault", "witness", "enrolment")
            assert not {f"cohortium.client.{b}" for b in banned} & names, path
        elif path.name != "cli.py":
            assert not [n for n in names if "diagnostics" in n], path


def test_the_command_prints_where_and_figures(site: Path) -> None:
    words = ["report", str(site), str(site.parent / "synthetic.parquet")]
    shown = CliRunner().invoke(site_app, words)
    assert shown.exit_code == 0 and f"{RUN}.html" in shown.output.replace("\n", "")
    assert "Nothing left this hospital" in shown.stderr
    told = json.loads(CliRunner().invoke(site_app, [*words, "--json"]).stdout)
    assert told["run"] == RUN and {s["key"] for s in told["sections"]} >= {"attacks", "membership"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--run", "another"], "REPORT-RUN"),
        (["--run", "../a"], "REPORT-RUN"),
        (["--target", "weight"], "REPORT-TARGET"),
    ],
)
def test_what_cannot_be_used_is_said(site: Path, options: list[str], code: str) -> None:
    words = ["report", str(site), str(site.parent / "synthetic.parquet"), "--json", *options]
    result = CliRunner().invoke(site_app, words)
    assert result.exit_code == 2 and json.loads(result.stdout)["error"] == code


def test_rows_of_another_dictionary_and_no_rows_are_refused(site: Path, tmp_path: Path) -> None:
    other = table(30, seed=6).drop(columns=["pid", "sex"])
    other.to_csv(tmp_path / "other.csv", index=False)
    for name, code in (("other.csv", "TABLE-COLUMN"), ("absent.csv", "REPORT-FILE")):
        result = CliRunner().invoke(site_app, ["report", str(site), str(tmp_path / name), "--json"])
        assert result.exit_code == 2 and json.loads(result.stdout)["error"] == code


def test_a_folder_that_others_may_write_is_refused(site: Path, tmp_path: Path) -> None:
    """Red if the page were written through a link that somebody put there."""
    kept = site / "kept"
    (site / "reports").rename(kept)
    try:
        os.symlink(tmp_path, site / "reports")
        result = CliRunner().invoke(site_app, ["report", str(site), str(site.parent / "synthetic.parquet"), "--json"])
        assert result.exit_code == 3 and json.loads(result.stdout)["error"] == "MODE-OPEN"
        assert not list(tmp_path.iterdir())
    finally:
        (site / "reports").unlink()
        kept.rename(site / "reports")


def test_a_real_sites_folder_is_found(site: Path, tmp_path: Path) -> None:
    """SITE/guard, as `site init` makes it, and the folder itself, as a simulation does."""
    assert reports.guard_folder(site) == site.resolve()
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "site.toml").write_bytes((site / "site.toml").read_bytes())
    assert reports.guard_folder(tmp_path) == (tmp_path / "guard").resolve()


def test_a_run_without_noise_promises_nothing(site: Path) -> None:
    from types import SimpleNamespace
    from typing import cast

    from cohortium.common.proposals import Proposal

    nothing = cast(Proposal, SimpleNamespace(plan=SimpleNamespace(private=False)))
    assert "no noise" in reports._statement(nothing, rehearsal=True)
    assert np.isclose(HELD, plan(("a",), holdout=HELD).holdout)


@pytest.mark.parametrize("how", ["policy", "ledger"])
def test_a_rehearsal_promises_nothing(site: Path, written: reports.Written, tmp_path: Path, how: str) -> None:
    """Whoever knows the seed can take the noise away, whether the policy still says so or only the ledger."""
    again = tmp_path / "a"
    shutil.copytree(site, again)
    if how == "policy":
        replace(Policy.load(again / "site.toml"), rehearsal=Rehearsal(seed=7, noise=True)).save(again / "site.toml")
    else:
        with Ledger.open(again / "ledger.db", load_private(again / "site.key")) as ledger:
            ledger.note(REHEARSAL, run=RUN)
    found = reports.report(again, site.parent / "synthetic.parquet").diagnosis
    assert found.statement.startswith("NOT PRIVATE") and not written.diagnosis.statement.startswith("NOT PRIVATE")
    bound = {item.key: item.figure for section in found.sections for item in section.items}["membership_bound"]
    assert bound.value is None, "a rehearsal has no ceiling"
