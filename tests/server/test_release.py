"""A release and its reader's check: every change that a reader could fall for is found, each under its own code."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import releasing
import typer
from hospital import key
from releasing import EXACT, ROWS, RUN, SECRET_WORDS, SITES, Finished, edit_json, finished, resigned
from small import DICTIONARY
from typer.testing import CliRunner

from cohortium.common.errors import ProtocolError, Refused, UsageError
from cohortium.common.privacy import chain
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import seal
from cohortium.common.protocol.release_manifest import (
    ENVELOPE,
    PAYLOAD_TYPE,
    Envelope,
    Manifest,
    file_digests,
    is_inside,
    sign_release,
    signature_file,
)
from cohortium.common.protocol.signing import fingerprint, from_seed
from cohortium.common.schema import Schema
from cohortium.common.study_release import Release
from cohortium.server import cli as server_cli
from cohortium.server import release as release_module
from cohortium.server.audit import COORDINATOR, AuditReport, audit
from cohortium.server.release import release, signatures_needed
from cohortium.server.release_documents import DOCUMENTS, escaped, guess_bound, membership_bound
from cohortium.server.release_gate import decide, minimum_of, refuse
from cohortium.server.release_verify import verify

SIGNERS = SITES[:2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that two of three sites signed: as many as the plan wants."""
    folder = tmp_path_factory.mktemp("release") / "out"
    release(run.root, folder, clock=lambda: 1_000_000_000)
    run.sign(folder, *SIGNERS)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "folder"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A simulation's run, whose result holds exact scores."""
    return finished(tmp_path_factory.mktemp("simulation"), mode="simulation", exact=True)


# ---- what is written ----------------------------------------------------------------------------------------


def test_a_release_is_whole_and_its_reader_agrees(whole: Path, run: Finished) -> None:
    found = verify(whole)
    assert found.codes == () and found.ok and found.needed == 2
    assert set(found.signers) == {COORDINATOR, *SIGNERS}
    assert found.signers["east"] == fingerprint(key("east").public_key())
    assert json.loads(json.dumps(found.to_json()))["ok"] is True
    there = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert there == {
        *DOCUMENTS,
        *("synthetic.parquet", "synthetic.csv", "dictionary.json", "datapackage.json", "report.html", "result.json"),
        "summary.pdf",
        *("study.toml", "plan.json", "proposal.bin", "manifest.json", "run/ledger.jsonl", "run/model.npz"),
        *(f"run/ledgers/{site}.jsonl" for site in SITES),
        ENVELOPE,
        *(signature_file(site) for site in SIGNERS),
    }
    assert audit(whole).ok  # `cohortium audit` reads it as it reads a run


def test_it_holds_alone_and_nothing_that_is_not_to_be_handed_out(folder: Path, run: Finished) -> None:
    secret = (run.root / "coordinator.key").read_bytes().splitlines()[1]
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert secret not in text and b"/secret/table" not in text and str(run.root).encode() not in text, path


def test_rows_are_released_as_they_are(whole: Path, run: Finished) -> None:
    """No row is left out, whatever it is like."""
    for name in ("synthetic.csv", "synthetic.parquet"):
        assert (whole / name).read_bytes() == (run.root / name).read_bytes()
    assert len(pd.read_parquet(whole / "synthetic.parquet")) == ROWS


def test_the_run_is_left_as_it_was(tmp_path: Path, run: Finished) -> None:
    before = file_digests(run.root)
    release(run.root, tmp_path / "out")
    assert file_digests(run.root) == before and audit(run.root).ok


def test_a_release_is_never_written_over(whole: Path, run: Finished, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RELEASE-EXISTS"):
        release(run.root, whole)
    with pytest.raises(Refused, match="RELEASE-UNFINISHED"):
        release(tmp_path, tmp_path / "out")


def test_nothing_is_left_of_a_release_that_breaks_off(
    tmp_path: Path, run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(release_module, "write_documents", broken)
    with pytest.raises(OSError, match="full"):
        release(run.root, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_data_package_describes_the_files(whole: Path) -> None:
    package = json.loads((whole / "datapackage.json").read_text())
    names = [field["name"] for field in package["resources"][0]["schema"]["fields"]]
    assert names == list(pd.read_csv(whole / package["resources"][0]["path"]).columns) and "id" not in names


def test_local_mode_wants_more_than_half_of_the_sites(run: Finished) -> None:
    from dataclasses import replace

    local = replace(run.plan, mode="local", survivors=0, colluders=0)
    assert signatures_needed(local) == 2 and signatures_needed(run.plan) == run.plan.survivors == 2
    assert signatures_needed(replace(local, sites=("a", "b", "c", "d"))) == 3


# ---- what a reader finds ------------------------------------------------------------------------------------


def line_changed(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace("F", "M", 1) if "F" in lines[7] else lines[7].replace("M", "F", 1)
    path.write_text("\n".join(lines) + "\n")


def ledgers_swapped(folder: Path) -> None:
    first, second = (folder / "run" / "ledgers" / f"{site}.jsonl" for site in SITES[:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def other_ledger(folder: Path) -> None:
    """A ledger that the site really signed, for a run of the same plan, with fewer charges."""
    plan = release_module.Plan.loads((folder / "plan.json").read_bytes())
    place = folder.parent / "other.db"
    releasing.charge(place, "east", plan, releases=plan.releases - 1)
    with releasing.Ledger.open(place) as ledger:
        ledger.export(folder / "run" / "ledgers" / "east.jsonl")


def parquet_row_changed(folder: Path) -> None:
    table = pd.read_parquet(folder / "synthetic.parquet")
    table.loc[3, "age"] = 99 - table.loc[3, "age"]
    table.to_parquet(folder / "synthetic.parquet", index=False)


def figure_changed(folder: Path) -> None:
    edit_json(folder / "result.json", lambda r: r["facts"]["budget"].update(epsilon_total=1.5))


CHANGES: list[tuple[str, Callable[[Path], object], set[str]]] = [
    ("a row of the CSV", lambda f: line_changed(f / "synthetic.csv"), {"VERIFY-ROWS"}),
    ("a row of the Parquet file", parquet_row_changed, {"VERIFY-ROWS"}),
    ("no rows", lambda f: (f / "synthetic.parquet").unlink(), {"VERIFY-ROWS"}),
    ("a figure in the report's JSON", figure_changed, {"VERIFY-REPORT"}),
    ("a figure on the page", lambda f: (f / "report.html").write_text("ε = 0.001"), {"VERIFY-REPORT"}),
    ("swapped ledgers", ledgers_swapped, {"VERIFY-LEDGER"}),
    ("another ledger of the site", other_ledger, {"VERIFY-LEDGER"}),
    ("no ledger", lambda f: (f / "run/ledgers/west.jsonl").unlink(), {"VERIFY-LEDGER"}),
    ("a missing signature", lambda f: (f / signature_file("north")).unlink(), {"VERIFY-THRESHOLD"}),
    ("a word in a card", lambda f: (f / "data-card.md").write_text("fit for everything"), {"VERIFY-FILE"}),
    ("no annex", lambda f: (f / "dpia-annex.md").unlink(), {"VERIFY-FILE"}),
    ("another model", lambda f: (f / "run/model.npz").write_bytes(b"x"), {"VERIFY-FILE"}),
    ("a file more", lambda f: (f / "more-rows.csv").write_text("x"), {"VERIFY-EXTRA"}),
    ("a link", lambda f: (f / "passwords").symlink_to("/etc/passwd"), {"VERIFY-EXTRA"}),
    ("another proposal", lambda f: (f / "proposal.bin").write_bytes(b"x"), {"VERIFY-PLAN"}),
    ("a changed study", lambda f: (f / "study.toml").write_text("x"), {"VERIFY-PLAN"}),
]


@pytest.mark.parametrize(("what", "change", "codes"), CHANGES, ids=[what for what, _, _ in CHANGES])
def test_a_change_is_found_under_its_code(
    folder: Path, what: str, change: Callable[[Path], object], codes: set[str]
) -> None:
    change(folder)
    found = verify(folder)
    assert set(found.codes) == codes and not found.ok


def test_a_link_in_place_of_a_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """The same bytes, outside the folder: the folder does not hold alone."""
    (folder / "data-card.md").rename(tmp_path / "away.md")
    (folder / "data-card.md").symlink_to(tmp_path / "away.md")
    assert verify(folder).codes == ("VERIFY-FILE",)


def test_signatures_are_of_this_release_and_of_their_site(folder: Path) -> None:
    manifest = Manifest.read(Envelope.read((folder / ENVELOPE).read_bytes()).payload)
    east, north, west = (folder / signature_file(site) for site in SITES)
    shutil.copy(east, west)  # one signature under two names
    assert verify(folder).codes == ("VERIFY-SIGNATURE",)
    west.unlink()
    north.write_bytes(sign_release(manifest, key("a stranger")).to_bytes())
    assert set(verify(folder).codes) == {"VERIFY-SIGNATURE", "VERIFY-THRESHOLD"}
    other = Manifest.of({"synthetic.csv": "0" * 64}, {})
    north.write_bytes(sign_release(other, key("north")).to_bytes())  # the site's own, under another release
    assert set(verify(folder).codes) == {"VERIFY-SIGNATURE", "VERIFY-THRESHOLD"}
    north.write_bytes(sign_release(manifest, key("north")).to_bytes())
    assert verify(folder).ok
    (folder / ENVELOPE).write_bytes(sign_release(manifest, key("east")).to_bytes())
    assert verify(folder).codes == ("VERIFY-COORDINATOR",)


def test_the_coordinator_is_no_site(folder: Path) -> None:
    """Its signature, however often it lies there, counts for no hospital."""
    (folder / signature_file("north")).unlink()
    shutil.copy(folder / ENVELOPE, folder / signature_file(COORDINATOR))
    assert set(verify(folder).codes) == {"VERIFY-SIGNATURE", "VERIFY-THRESHOLD"}


def test_what_the_coordinator_signs_again_the_sites_did_not_sign(folder: Path) -> None:
    line_changed(folder / "synthetic.csv")
    resigned(folder)
    found = set(verify(folder).codes)
    assert {"VERIFY-SIGNATURE", "VERIFY-THRESHOLD"} <= found and "VERIFY-COORDINATOR" not in found


LIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("fewer signatures", lambda p: p.update(sites_needed=1), "VERIFY-THRESHOLD"),
    ("a better sentence", lambda p: p["statement"].update(sentence="(0.1, 0)-private"), "VERIFY-STATEMENT"),
    ("no warning", lambda p: p.update(warnings=["none"]), "VERIFY-STATEMENT"),
    ("another head", lambda p: p["ledgers"]["west"].update(hash="0" * 64), "VERIFY-LEDGER"),
    ("a silent site", lambda p: p.update(silent=["west"]), "VERIFY-LEDGER"),
    ("another plan", lambda p: p["plan"].update(sha256="0" * 64), "VERIFY-PLAN"),
    ("another key", lambda p: p["keys"].update(west="1" * 64), "VERIFY-KEYS"),
    ("another run", lambda p: p.update(run="other"), "VERIFY-PLAN"),
    ("a deployment", lambda p: p.update(mode="real"), "VERIFY-MANIFEST"),
    ("no keys", lambda p: p.pop("keys"), "VERIFY-KEYS"),
    ("nonsense", lambda p: p.update(withheld=5, keys=[], ledgers="x", run=None), "VERIFY-KEYS"),
]


@pytest.mark.parametrize(("what", "lie", "code"), LIES, ids=[what for what, _, _ in LIES])
def test_a_lie_that_everybody_signed_is_found(
    folder: Path, what: str, lie: Callable[[dict[str, Any]], object], code: str
) -> None:
    """The sites sign blindly: the manifest is still held against the ledgers in the folder."""
    resigned(folder, lie, by={site: key(site) for site in SIGNERS})
    assert code in verify(folder).codes


def test_a_smaller_epsilon_that_everybody_signed_is_found(folder: Path) -> None:
    def smaller(value: dict[str, Any]) -> None:
        value["privacy"]["prices"][0]["epsilon"] = 0.1

    edit_json(folder / "result.json", smaller)
    resigned(folder, by={site: key(site) for site in SIGNERS})
    assert verify(folder).codes == ("VERIFY-STATEMENT",)


def test_rows_that_are_published_and_not_planned_are_found(tmp_path: Path) -> None:
    """One row was left out before anything was signed: only the plan's number tells."""
    run = finished(tmp_path / "run", written=ROWS - 1)
    release(run.root, tmp_path / "out")
    run.sign(tmp_path / "out", *SIGNERS)
    assert verify(tmp_path / "out").codes == ("VERIFY-ROWS",)


def test_another_proposal_or_dictionary_that_everybody_signed_is_found(folder: Path, run: Finished) -> None:
    proposal, dictionary = folder / "proposal.bin", folder / "dictionary.json"
    kept = proposal.read_bytes()
    identities = {site: key(site).public_key().public_bytes_raw().hex() for site in SITES}
    schema = Schema.load(dictionary)
    other = proposal_message(run="another-run", plan=run.plan, identities=identities, schema=schema)
    proposal.write_bytes(seal(other, key(COORDINATOR)))
    resigned(folder, by={site: key(site) for site in SIGNERS})
    assert verify(folder).codes == ("VERIFY-PLAN",)
    proposal.write_bytes(kept)
    edit_json(dictionary, lambda value: value.update(title="Another one"))
    resigned(folder, by={site: key(site) for site in SIGNERS})
    assert verify(folder).codes == ("VERIFY-PLAN",)


def test_a_ledger_line_that_everybody_signed_is_still_not_its_owners(folder: Path) -> None:
    path = folder / "run" / "ledgers" / "east.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count":1', b'"count":0', 1))
    resigned(folder, by={site: key(site) for site in SIGNERS})
    assert "VERIFY-LEDGER" in verify(folder).codes


def test_a_known_fingerprint_must_have_signed(whole: Path) -> None:
    print_ = fingerprint(key("north").public_key())
    assert verify(whole, roots=[print_, f"north={print_[:39]}"]).ok
    assert verify(whole, roots=[fingerprint(key("west").public_key())]).codes == ("VERIFY-ROOT",)  # did not sign
    assert verify(whole, roots=[f"east={print_}"]).codes == ("VERIFY-ROOT",)
    for wrong in ("abc", "zz" * 32, ""):
        with pytest.raises(UsageError, match="VERIFY-FINGERPRINT"):
            verify(whole, roots=[wrong])


@pytest.mark.parametrize(
    "name", [ENVELOPE, "manifest.json", "plan.json", "result.json", "dictionary.json", "proposal.bin"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_broken_files_are_findings_not_tracebacks(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert not verify(folder).ok


def test_a_folder_without_a_release(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="VERIFY-FOLDER"):
        verify(tmp_path)


# ---- the gate -----------------------------------------------------------------------------------------------


def good_audit() -> AuditReport:
    report = AuditReport(directory="x")
    report.add("plan", True, "")
    return report


def result_of(**more: Any) -> dict[str, Any]:
    return {"privacy": {"rehearsal": False}, "warnings": [], "facts": {}, **more}


def stopped(result: dict[str, Any], minimum: dict[str, str] | None = None, **options: bool) -> str:
    try:
        refuse(decide(result, good_audit(), minimum or {}, **options))
    except Refused as error:
        return error.code
    return ""


def tiles(use: str, word: str) -> list[dict[str, str]]:
    return [{"use": use, "word": word}]


def test_the_gate_lets_a_good_release_go() -> None:
    assert stopped(result_of()) == ""
    for word in ("usable with care", "good"):
        assert (
            stopped(result_of(verdicts=tiles("Training a model", word)), {"training-a-model": "usable with care"}) == ""
        )


@pytest.mark.parametrize("word", ["not fit", "cannot be assessed", "splendid"])
def test_the_gate_stops_below_the_studys_word(word: str) -> None:
    given = result_of(facts={"verdicts": tiles("Training a model", word)})
    assert stopped(given, {"Training a model": "usable with care"}) == "RELEASE-THRESHOLD"


def test_the_gate_stops_where_nothing_was_assessed() -> None:
    """Fail closed: a use without a verdict, no verdicts at all, a word that is none."""
    assert stopped(result_of(), {"Training": "not fit"}) == "RELEASE-THRESHOLD"
    assert stopped(result_of(verdicts="nonsense", scores=None), {"Training": "good"}) == "RELEASE-THRESHOLD"
    assert stopped(result_of(verdicts=tiles("Other", "good")), {"Training": "good"}) == "RELEASE-THRESHOLD"
    assert stopped(result_of(verdicts=tiles("Training", "good")), {"Training": "gut"}) == "RELEASE-THRESHOLD"


def test_a_private_verdict_goes_before_an_exact_one() -> None:
    given = result_of(verdicts=tiles("Use", "not fit"), scores={"verdicts": tiles("Use", "good")})
    assert stopped(given, {"use": "good"}) == "RELEASE-THRESHOLD"
    exact = result_of(scores={"verdicts": tiles("Use", "good")})
    (finding,) = [f for f in decide(exact, good_audit(), {"use": "usable with care"}) if "minimum" in f.name]
    assert finding.ok and "'good'" not in finding.detail  # what saw real rows is not repeated


def test_the_gate_asks_for_audit_fresh_noise_and_public_ranges() -> None:
    bad = good_audit()
    bad.add("budget", False, "")
    with pytest.raises(Refused, match="RELEASE-AUDIT"):
        refuse(decide(result_of(), bad, {}))
    with pytest.raises(Refused, match="RELEASE-AUDIT"):
        refuse(decide(result_of(), AuditReport(directory="x"), {}))  # nothing was looked at
    seeded = result_of(privacy={"rehearsal": True})
    assert stopped(seeded) == "RELEASE-REHEARSAL" and stopped(seeded, rehearsal=True) == ""
    guessed = result_of(warnings=["ranges that were guessed from a table"])
    assert stopped(guessed) == "RELEASE-GUESSED" and stopped(guessed, accept_guessed=True) == ""


def test_a_stopped_release_writes_nothing(run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_module, "minimum_of", lambda _: {"Training a prediction model": "usable with care"})
    with pytest.raises(Refused, match="RELEASE-THRESHOLD"):
        release(run.root, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_audit_fails_is_not_released(run: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run.root, tmp_path / "run"))
    line_changed(root / "synthetic.csv")
    with pytest.raises(Refused, match="RELEASE-AUDIT"):
        release(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_thresholds_are_read_from_the_study(tmp_path: Path) -> None:
    assert minimum_of(Release(rows=1, minimum=(("a", "good"), ("b", "not fit")))) == {"a": "good", "b": "not fit"}
    run = finished(tmp_path / "run", lines='minimum = {"Training a prediction model" = "usable with care"}\n')
    with pytest.raises(Refused, match="RELEASE-THRESHOLD"):
        release(run.root, tmp_path / "out")  # nobody was asked, so there is no verdict
    assert not (tmp_path / "out").exists()
    word = {"use": "training a prediction model", "word": "good"}
    edit_json(run.root / "result.json", lambda r: r.update(verdicts=[word]))
    with pytest.raises(Refused, match="RELEASE-AUDIT"):
        release(run.root, tmp_path / "out")  # a word that nobody signed
    minimum = {"training a prediction model": "usable with care"}
    found = decide(json.loads((run.root / "result.json").read_text()), audit(run.root), minimum, rehearsal=True)
    assert any(finding.code == "RELEASE-THRESHOLD" and finding.ok for finding in found)


# ---- how the rows were sampled ------------------------------------------------------------------------------


def test_a_card_says_that_rows_are_as_the_model_gives_them(whole: Path) -> None:
    card = (whole / "data-card.md").read_text()
    assert "As the model gives them" in card and "balanced:" not in card and "rarest combination" not in card


def test_a_card_says_that_rows_were_balanced_made_coarser_and_drawn_again(tmp_path: Path) -> None:
    """Power: the test before reads a card where nothing of it was done."""
    changed = copy.deepcopy(DICTIONARY)
    for field in changed["fields"]:
        if field["name"] in ("sex", "grade"):
            field["role"] = "quasi-identifier"
    changed["fields"][1]["x-reference-shares"] = {"F": 0.51, "M": 0.49}
    changed["rules"] = [
        {"name": "dose | of the young", "if": {"age": {"maximum": 9}}, "then": {"dose": {"maximum": 1}}}
    ]
    lines = 'balance = "smoker"\nenforce_rules = true\nk_anonymity = 2\n'
    run = finished(tmp_path / "run", lines=lines, dictionary=changed)
    release(run.root, tmp_path / "out")
    card = (tmp_path / "out" / "data-card.md").read_text()
    rows = pd.read_parquet(tmp_path / "out" / "synthetic.parquet")
    smallest = int(rows.groupby(["sex", "grade"], dropna=False, observed=True).size().min())
    for words in (
        "Rows were balanced: the levels of smoker occur equally often",
        "broke one of the dictionary's 1 clinical rules were drawn again",
        "Each combination of sex, grade occurs in at least 2 rows",
        f"the rarest combination occurs in {smallest} rows",
        "| sex | F | 51.0 % |",
        r"| dose \| of the young | if age ≤ 9, then dose ≤ 1 |",
    ):
        assert words in card, words
    assert "As the model gives them" not in card


# ---- simulations and rehearsals -----------------------------------------------------------------------------


def test_a_simulations_exact_scores_are_never_released(simulated: Finished, tmp_path: Path) -> None:
    """They compare with real rows without noise. Power: the run's own result.json holds the words looked for."""
    words = (SECRET_WORDS, "77 real rows", str(EXACT))
    assert all(word in (simulated.root / "result.json").read_text() for word in words)
    out = tmp_path / "out"
    made = release(simulated.root, out)
    assert made.manifest.predicate["withheld"] == ["scores"] and made.manifest.predicate["mode"] == "simulation"
    for path in out.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not [word for word in words if word.encode() in text], path
    simulated.sign(out, *SIGNERS)
    assert verify(out).ok
    assert "simulation" in (out / "README.md").read_text()


def test_exact_figures_beside_private_ones_stay_here(tmp_path: Path) -> None:
    """At any depth; a name that the list of what is released does not know stays here as a whole."""
    facts = {"mode": "simulation", "provenance": {"Run": "r"}, "figures": [{"private": 1, "exact": 7, "exact_low": 7}]}
    found = {"findings": [{"key": "k", "exact": 7}], "exact_shown": True}
    exact = {"truth": 7, "exact_evaluation": {"k": 7}}
    release_module._write_result(tmp_path, {"facts": facts, "run": "r", "scores": None, "evaluation": found, **exact})
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "facts": {"mode": "simulation", "provenance": {"Run": "r"}, "figures": [{"private": 1}]},
        "run": "r",
        "scores": None,
        "evaluation": {"findings": [{"key": "k"}]},
    }


def test_scores_put_back_are_found(simulated: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    release(simulated.root, out)
    edit_json(out / "result.json", lambda r: r.update(scores={"headline": "Good for everything."}))
    resigned(out, by={site: key(site) for site in SIGNERS})
    assert verify(out).codes == ("VERIFY-REPORT",)


def test_a_rehearsal_says_so_everywhere(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", rehearsal=True, title="Heart | <script>alert(1)</script> [x](http://evil)")
    with pytest.raises(Refused, match="RELEASE-REHEARSAL"):
        release(run.root, tmp_path / "out")
    out = tmp_path / "out"
    release(run.root, out, rehearsal=True)
    run.sign(out, *SIGNERS)
    found = verify(out)
    assert found.ok and found.rehearsal and found.sentence.startswith("NOT PRIVATE")
    for name in DOCUMENTS:
        text = (out / name).read_text()
        assert "NOT PRIVATE" in text, name
        assert "<script>" not in text and "[x](http" not in text, name  # a title is a title


@pytest.mark.slow
def test_the_walk_of_a_real_run(simulate: Callable[..., Path], tmp_path: Path) -> None:
    """Simulated hospitals that really answered: their ledgers hold votes, starts and farewells too."""
    from cohortium.client.signing_release import check_release, endorse
    from cohortium.simulations.finish import finish

    root = simulate("iid:3", evaluation=releasing.HOLDOUT)
    finish(root, score=False)
    out = tmp_path / "out"
    made = release(root, out, rehearsal=True)
    assert verify(out).codes == ("VERIFY-THRESHOLD",)
    for place in sorted((root / "sites").iterdir())[: made.needed]:
        endorse(check_release(place, out), out)
    found = verify(out)
    assert found.ok and found.rehearsal and len(found.signers) == made.needed + 1


# ---- documents ----------------------------------------------------------------------------------------------


def test_every_document_is_filled_from_the_facts(whole: Path, run: Finished) -> None:
    sentence = json.loads((whole / "result.json").read_text())["privacy"]["sentence"]
    for name in DOCUMENTS:
        text = (whole / name).read_text()
        assert sentence in text.replace("\\", ""), name
        assert "{{" not in text and "{%" not in text and "None" not in text and "Undefined" not in text, name
    card = (whole / "data-card.md").read_text()
    for column in pd.read_csv(whole / "synthetic.csv").columns:
        assert f"| {column} |" in card
    model = (whole / "model-card.md").read_text()
    assert run.plan.digest in model and all(f"| {site} |" in model for site in SITES)
    for name in ("dpia-annex.md", "hipaa-annex.md"):  # nobody's judgement is made up
        assert (whole / name).read_text().count("**To be completed:**") >= 5


def test_the_same_facts_give_the_same_folder(run: Finished, tmp_path: Path) -> None:
    first, second = (release(run.root, tmp_path / name, clock=lambda: 5) for name in ("a", "b"))
    assert first.manifest.payload == second.manifest.payload


def test_other_peoples_text_is_one_line_that_shows_itself() -> None:
    assert escaped("a|b\n# <i>x</i> `c` *d*") == "a\\|b \\# \\<i\\>x\\</i\\> \\`c\\` \\*d\\*"
    assert "\x1b" not in escaped("\x1b[31mred") and escaped("Größe µ") == "Größe µ"


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_the_bounds_are_those_of_randomised_response_and_above_the_gaussians(epsilon: float) -> None:
    """Randomised response reaches them exactly; a Gaussian of the same (ε, δ) stays below them."""
    honest = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert membership_bound(epsilon, 0.0, 1 - honest) == pytest.approx(honest, rel=1e-12)
    assert guess_bound(epsilon, 0.0, 0.5) == pytest.approx(honest, rel=1e-12)
    from scipy import stats

    from cohortium.common.privacy.pld import gaussian_mu

    mu = gaussian_mu(epsilon, 1e-6)
    for alarms in (0.001, 0.01, 0.1, 0.5):
        reached = stats.norm.cdf(mu - stats.norm.isf(alarms))
        assert reached <= membership_bound(epsilon, 1e-6, alarms) <= 1
    for prior in (0.01, 0.3, 0.5, 0.9):
        best = max(
            prior * stats.norm.cdf(mu - z) + (1 - prior) * stats.norm.cdf(z) for z in [x / 50 for x in range(-400, 400)]
        )
        assert best <= guess_bound(epsilon, 1e-6, prior) + 1e-12
    assert membership_bound(math.inf, 1e-6, 0.01) == guess_bound(math.inf, 1e-6, 0.5) == 1.0
    assert guess_bound(0.0, 0.0, 0.3) == pytest.approx(0.7) and membership_bound(0.0, 0.0, 0.05) == pytest.approx(0.05)


# ---- the envelope -------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_dsse() -> None:
    """The preimage as the DSSE specification writes it, spelled out here a second time."""
    secret = from_seed(bytes(32))
    manifest = Manifest.of({"a/b.csv": "0" * 64}, {"x": 1})
    envelope = sign_release(manifest, secret)
    payload = manifest.payload
    said = b" ".join(
        [b"DSSEv1", str(len(PAYLOAD_TYPE)).encode(), PAYLOAD_TYPE.encode(), str(len(payload)).encode(), payload]
    )
    secret.public_key().verify(envelope.signatures[0][1], said)
    again = Envelope.read(envelope.to_bytes())
    assert again == envelope and again.signed_by(secret.public_key())
    assert not again.signed_by(key("east").public_key())
    value = json.loads(payload)
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"] == [{"name": "a/b.csv", "digest": {"sha256": "0" * 64}}]


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "", ".", "a//b", "a/./b", "a\\b", "a\nb", "a/", 5, None]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name: Any) -> None:
    assert not is_inside(name)
    with pytest.raises((ProtocolError, TypeError)):
        Manifest.of({name: "0" * 64}, {})


def test_a_sites_name_leads_nowhere_else() -> None:
    assert is_inside(signature_file("../../etc/passwd")) and signature_file("../x").count("/") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(_type="x"),
        lambda v: v.update(predicateType="x"),
        lambda v: v.update(more=1),
        lambda v: v.update(subject=[]),
        lambda v: v.update(predicate=[]),
        lambda v: v["subject"].append(v["subject"][0]),
        lambda v: v["subject"][0].update(name="../x"),
        lambda v: v["subject"][0]["digest"].update(sha256="A" * 64),
        lambda v: v["subject"][0]["digest"].update(md5="x"),
        lambda v: v["predicate"].update(x=1.5),
    ],
)
def test_a_manifest_has_one_form(change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(Manifest.of({"a": "0" * 64}, {"x": 1}).payload)
    change(value)
    with pytest.raises(ProtocolError):
        Manifest.read(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


# ---- the commands -------------------------------------------------------------------------------------------


def command(*words: Any) -> Any:
    app = typer.Typer()
    app.command("release")(server_cli.release)
    app.command("verify")(server_cli.verify)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_commands(run: Finished, whole: Path, tmp_path: Path) -> None:
    made = command("release", run.root, "--out", tmp_path / "out", "--json")
    facts = json.loads(made.stdout)
    assert made.exit_code == 0 and facts["sites_needed"] == 2 and "synthetic.csv" in facts["files"]
    found = command("verify", tmp_path / "out", "--json")
    assert found.exit_code == 1 and json.loads(found.stdout)["codes"] == ["VERIFY-THRESHOLD"]
    assert command("verify", whole, "--json").exit_code == 0
    shown = command("verify", whole, "--root", fingerprint(key("east").public_key()))
    assert shown.exit_code == 0 and "Everything holds." in shown.output and "signed by east" in shown.output
    assert command("verify", tmp_path / "out").exit_code == 1
    assert command("verify", tmp_path / "nothing", "--json").exit_code == 2
    assert command("release", run.root, "--out", whole, "--json").exit_code == 2
    said = command("release", run.root, "--out", tmp_path / "again")
    assert said.exit_code == 0 and "differential privacy" in said.output and "At least 2 sites sign it" in said.output


def test_the_ledgers_in_a_release_replay_alone(whole: Path) -> None:
    for site in SITES:
        lines = chain.read_jsonl(whole / "run" / "ledgers" / f"{site}.jsonl")
        book, _ = chain.replay(lines, owner=site, public=key(site).public_key())
        assert {run for run, _ in book.entries} == {RUN}


def test_the_audit_of_a_simulations_release_holds(simulated: Finished, tmp_path: Path) -> None:
    """The withheld scores are missing as their signer foresaw; whatever is put back, or changed, is not."""
    out = tmp_path / "out"
    release(simulated.root, out)
    assert audit(simulated.root).ok and audit(out).ok
    found = next(check for check in audit(out).checks if check.name == "scores")
    assert "without those that saw real rows" in found.detail
    whole = json.loads((out / "result.json").read_text())
    exact = json.loads((simulated.root / "result.json").read_text())["scores"]
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda r: r.update(warnings=["none"]),
        lambda r: r.update(scores={**exact, "headline": "Good for everything."}),
        lambda r: r.update(exact_evaluation={"tstr_auc": 0.99}),
        lambda r: r.update(evaluation={"headline": "Good for everything."}),
        lambda r: r.update(evaluation={**(r.get("evaluation") or {}), "exact_figures": [0.99]}),
    ]
    for change in changes:
        (out / "result.json").write_text(json.dumps(whole))
        edit_json(out / "result.json", change)
        assert [check.name for check in audit(out).checks if not check.ok] == ["scores"]
