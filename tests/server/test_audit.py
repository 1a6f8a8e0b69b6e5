"""The offline audit: a small study's files pass, and every planted change turns a named check red."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.errors import UsageError
from cohortium.common.privacy import chain
from cohortium.common.privacy.accountant import Part, calibrate
from cohortium.common.privacy.chain import PUBLISHED
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.protocol.messages import canonical
from cohortium.server.audit import AuditReport, audit, claims, write_manifest

RUN = "run-1"
SITES = ("A", "B", "C")
KEYS = {n: Ed25519PrivateKey.from_private_bytes(bytes([i + 1]) * 32) for i, n in enumerate(["coordinator", *SITES])}
QUARTER = 2**62


def make_plan() -> Plan:
    parts = [Part(share=0.5), Part(rate=QUARTER, repeats=4, share=0.5)]
    counts, gradient = calibrate(parts, epsilon=3.0, delta=1e-6)
    held = calibrate([Part(share=1.0)], epsilon=1.0, delta=1e-6)[0]
    common: dict[str, Any] = {"purpose": "test", "max_dim": 100, "rate": 2**64}
    stages = (
        Stage(name="bins", kind="counts", part="train", first=0, repeats=1, **common, noise_multiplier=counts),
        Stage(
            name="steps",
            kind="gradient",
            part="train",
            first=1,
            repeats=4,
            noise_multiplier=gradient,
            **common | {"rate": QUARTER},
        ),
        Stage(name="score", kind="counts", part="holdout", first=5, repeats=1, **common, noise_multiplier=held),
    )
    return Plan(
        study="demo",
        study_digest="0" * 64,
        dictionary_digest="0" * 64,
        generator="mixture",
        rows=10,
        mode="secure-sum",
        sites=SITES,
        survivors=2,
        colluders=0,
        epsilon=3.0,
        delta=1e-6,
        unit="patient",
        hospitals=1,
        holdout=0.2,
        stages=stages,
    )


def paths(folder: Path) -> dict[str, Path]:
    return {"coordinator": folder / "run", **{site: folder / "sites" / site for site in SITES}}


def write_study(folder: Path, plan: Plan, *, spoil: Callable[[str, int], dict[str, Any]] | None = None) -> None:
    """What a simulation leaves behind. spoil(owner, index): other arguments for one reservation."""
    files = {"synthetic.csv": hashlib.sha256(b"a,b\n").hexdigest()}
    (folder / "synthetic.csv").write_bytes(b"a,b\n")
    for owner, place in paths(folder).items():
        place.mkdir(parents=True)
        with Ledger.create(place / "ledger.db", owner, KEYS[owner], clock=lambda: 0) as ledger:
            for index in range(plan.releases):
                stage = plan.stage_of(index)
                arguments = {"run": RUN, "release_id": str(index), "event": stage.event, "count": stage.steps}
                arguments |= {"plan_digest": plan.digest, "purpose": stage.name}
                changed = spoil(owner, index) if spoil else {}
                if changed.pop("skip", False):
                    continue
                ballot = changed.pop("ballot", "2" * 64)
                voted = changed.pop("voted", False)
                ledger.reserve(**(arguments | changed))
                name = (arguments | changed)["release_id"]
                ledger.advance(RUN, name, "SEALED", "1" * 64)
                if voted:  # signed a survivor set, and never saw its round's end
                    ledger.advance(RUN, name, "UNMASKED", ballot)
                    continue
                ledger.advance(RUN, name, "RELEASED", ballot, later=True)
            if owner == "coordinator":
                ledger.note(PUBLISHED, run=RUN, files=files)
            ledger.export(place / "ledger.jsonl")
    (folder / "plan.json").write_bytes(canonical(plan.to_json()))
    public = {owner: key.public_key().public_bytes_raw().hex() for owner, key in KEYS.items()}
    names = {owner: str(place.relative_to(folder) / "ledger.jsonl") for owner, place in paths(folder).items()}
    write_manifest(folder, run=RUN, plan=plan, public_keys=public, ledgers=names)
    write_result(folder, plan, files)


def write_result(folder: Path, plan: Plan, files: dict[str, str]) -> None:
    books = {
        owner: chain.replay(chain.read_jsonl(place / "ledger.jsonl"), public=KEYS[owner].public_key())
        for owner, place in paths(folder).items()
    }
    (folder / "result.json").write_text(json.dumps({**claims(plan, RUN, books), "files": files}))


def failed(report: AuditReport) -> set[str]:
    return {check.name for check in report.checks if not check.ok}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def study(tmp_path: Path, plan: Plan) -> Path:
    write_study(tmp_path, plan)
    return tmp_path


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_a_good_study_passes_and_the_report_is_json(study: Path, plan: Plan) -> None:
    report = audit(study)
    assert failed(report) == set()
    assert report.ok
    rows = {(row["relation"], row["hospitals"]): row["epsilon"] for row in report.epsilons}
    assert rows["add-remove", 1] == pytest.approx(plan.price(), rel=1e-9)
    assert rows["add-remove", 1] < rows["add-remove", 2] < rows["add-remove", 3]
    assert rows["replace-one", 1] > rows["add-remove", 1]
    assert 0.995 * 3.0 <= rows["add-remove", 1] <= 3.0  # the held-out part is disjoint, not added
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert set(report.keys) == {"coordinator", *SITES}


def test_the_database_does_as_well_as_its_export(study: Path) -> None:
    def use_database(manifest: dict[str, Any]) -> None:
        manifest["ledgers"]["sites"]["A"] = "sites/A/ledger.db"

    change(study / "manifest.json", use_database)
    assert audit(study).ok


LINES: list[tuple[str, Callable[[list[bytes]], list[bytes]]]] = [
    ("flipped bit", lambda lines: [lines[0], lines[1].replace(b'"count":1', b'"count":0'), *lines[2:]]),
    ("removed line", lambda lines: lines[:3] + lines[4:]),
    ("last line removed", lambda lines: lines[:-1]),
    ("swapped lines", lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]]),
    ("truncated file", lambda lines: [*lines[:-1], lines[-1][:-20]]),
    ("wrong signature", lambda lines: [*lines[:2], lines[2][:-20] + b"0" * 17 + lines[2][-3:], *lines[3:]]),
]


@pytest.mark.parametrize("owner", ["coordinator", "B"])
@pytest.mark.parametrize(("what", "damage"), LINES, ids=[name for name, _ in LINES])
def test_a_damaged_ledger_is_found(
    study: Path, owner: str, what: str, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = paths(study)[owner] / "ledger.jsonl"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    report = audit(study)
    assert not report.ok
    # A cleanly shortened ledger verifies by itself; the recorded head gives it away.
    expected = "claimed ledgers" if what == "last line removed" else f"ledger {owner}"
    assert expected in failed(report)


SPOILED: list[tuple[str, str, Callable[[str, int, Plan], dict[str, Any]]]] = [
    (
        "less noise than planned",
        "events A",
        lambda o, i, p: {"event": replace(p.stages[0].event, noise_multiplier=0.5)} if (o, i) == ("A", 0) else {},
    ),
    (
        "not sampled",
        "events A",
        lambda o, i, p: (
            {"event": replace(p.stages[0].event, noise_multiplier=p.stages[1].noise_multiplier)}
            if (o, i) == ("A", 2)
            else {}
        ),
    ),
    ("counted twice as many steps", "events B", lambda o, i, p: {"count": 2} if (o, i) == ("B", 1) else {}),
    ("another plan", "events C", lambda o, i, p: {"plan_digest": "9" * 64} if o == "C" else {}),
    ("a release that the plan lacks", "events C", lambda o, i, p: {"release_id": "77"} if (o, i) == ("C", 5) else {}),
    ("another spelling of a release", "events C", lambda o, i, p: {"release_id": "05"} if (o, i) == ("C", 5) else {}),
    ("used with too few sites", "agreement", lambda o, i, p: {"skip": i == 3 and o in ("A", "B")}),
    ("charged behind the study's back", "agreement", lambda o, i, p: {"skip": i == 3 and o == "coordinator"}),
    ("two survivor sets", "agreement", lambda o, i, p: {"ballot": "3" * 64} if (o, i) == ("A", 2) else {}),
    (
        "a vote for another survivor set",
        "agreement",
        lambda o, i, p: {"ballot": "3" * 64, "voted": True} if (o, i) == ("A", 2) else {},
    ),
]


@pytest.mark.parametrize(("what", "check", "spoil"), SPOILED, ids=[name for name, _, _ in SPOILED])
def test_properly_signed_but_wrong_events_are_found(
    tmp_path: Path, plan: Plan, what: str, check: str, spoil: Callable[[str, int, Plan], dict[str, Any]]
) -> None:
    write_study(tmp_path, plan, spoil=lambda owner, index: spoil(owner, index, plan))
    assert check in failed(audit(tmp_path))


def test_a_site_that_voted_and_went_before_the_end_is_no_fault(tmp_path: Path, plan: Plan) -> None:
    write_study(tmp_path, plan, spoil=lambda owner, index: {"voted": (owner, index) == ("A", 2)})
    assert audit(tmp_path).ok


def test_less_noise_breaks_the_budget_too(tmp_path: Path, plan: Plan) -> None:
    weak = replace(plan.stages[0].event, noise_multiplier=0.5)
    write_study(tmp_path, plan, spoil=lambda owner, index: {"event": weak} if (owner, index) == ("A", 0) else {})
    report = audit(tmp_path)
    assert "budget" in failed(report)
    assert report.epsilons[0]["epsilon"] > 5  # recomputed from what ran, not from what was planned


CLAIMS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("smaller epsilon", "claimed ε", lambda r: r["privacy"]["prices"][0].update(epsilon=2.0)),
    ("epsilon left out", "claimed ε", lambda r: r["privacy"]["prices"].pop(2)),
    ("another delta", "claimed ε", lambda r: r["privacy"].update(delta=1e-7)),
    ("statement", "claimed ε", lambda r: r["privacy"]["statement"].update(epsilon=(1.0).hex())),
    (
        "fewer trusted sites",
        "claimed ε",
        lambda r: r["privacy"]["statement"].update(survivors=1, colluders=0, sites=99),
    ),
    ("no trusted sites", "claimed ε", lambda r: r["privacy"]["statement"].pop("survivors")),
    ("unit", "claimed ε", lambda r: r["privacy"]["statement"].update(unit="hospital")),
    ("no claim", "claimed ε", lambda r: r.pop("privacy")),
    ("head", "claimed ledgers", lambda r: r["ledgers"]["A"].update(hash="0" * 64)),
    ("file digest", "files", lambda r: r["files"].update({"synthetic.csv": "0" * 64})),
    ("another file", "files", lambda r: r["files"].update({"plan.json": "0" * 64})),
    ("file outside", "file ../x", lambda r: r["files"].update({"../x": "0" * 64})),
    ("no files", "files", lambda r: r.pop("files")),
]


@pytest.mark.parametrize(("what", "check", "edit"), CLAIMS, ids=[name for name, _, _ in CLAIMS])
def test_a_false_claim_is_found(study: Path, what: str, check: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    change(study / "result.json", edit)
    assert check in failed(audit(study))


def test_changed_files_are_found(study: Path) -> None:
    (study / "synthetic.csv").write_bytes(b"a,c\n")
    assert failed(audit(study)) == {"file synthetic.csv"}
    (study / "synthetic.csv").unlink()
    assert "file synthetic.csv" in failed(audit(study))


def test_a_changed_plan_or_key_is_found(study: Path) -> None:
    change(study / "plan.json", lambda plan: plan.update(epsilon=(9.0).hex()))
    assert "plan" in failed(audit(study))
    stranger = KEYS["A"].public_key().public_bytes_raw().hex()
    change(study / "manifest.json", lambda m: m["public_keys"]["sites"].update(B=stranger))
    assert "ledger B" in failed(audit(study))


def test_a_rehearsal_without_noise_does_not_pass(tmp_path: Path, plan: Plan) -> None:
    stages = tuple(replace(stage, noise_multiplier=0.0) for stage in plan.stages)
    write_study(tmp_path, replace(plan, stages=stages))
    report = audit(tmp_path)
    assert failed(report) == {"budget"}
    assert report.epsilons[0]["epsilon"] == "inf"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["privacy"]["sentence"].startswith("No privacy guarantee")


@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.json", "result.json", "run/ledger.jsonl", "sites/C/ledger.jsonl"]
)
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_missing_and_broken_files_are_findings_not_tracebacks(study: Path, name: str, content: bytes | None) -> None:
    path = study / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if name == "manifest.json":
        with pytest.raises(UsageError, match="AUDIT-MANIFEST"):
            audit(study)
    else:
        assert not audit(study).ok
