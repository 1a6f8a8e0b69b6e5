"""What a finished simulation leaves: warnings that are signed, times that tell little, no keys of its rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cohortium.client.vault import Vault
from cohortium.common.privacy import chain
from cohortium.server.audit import audit
from cohortium.server.runs import RunFolder
from cohortium.simulations.finish import GUESSED, GUESSED_WARNING, finish
from cohortium.simulations.run import Request, prepare, run


def notes(out: Path) -> list[str]:
    return [
        line.body["about"] for line in chain.read_jsonl(out / "run" / "ledger.jsonl") if line.body["kind"] == "note"
    ]


def test_accepted_guesses_are_signed_and_warned_of(
    write_study: Callable[..., tuple[Path, Path]], quick: None, tmp_path: Path
) -> None:
    study, table = write_study()
    path = study.parent / "dictionary.json"
    dictionary = json.loads(path.read_text())
    dictionary["fields"][1]["x-guessed"] = True
    path.write_text(json.dumps(dictionary))
    out = tmp_path / "out"
    prepare(Request(study=study, table=table, split="iid:3", out=out, accept_guessed_ranges=True))
    run(out)
    for _ in range(2):  # signed once, however often the end is written
        result = finish(out, score=False)
        assert result["warnings"] == [GUESSED_WARNING]
    assert notes(out).count(GUESSED) == 1 and audit(out).ok
    assert "guessed from a table" in (out / "report.html").read_text(encoding="utf-8")


def test_a_finished_simulation(simulate: Callable[..., Path]) -> None:
    out = simulate("iid:3")
    result = finish(out, score=False)
    assert GUESSED not in notes(out) and GUESSED_WARNING not in result["warnings"]
    rounds = result["facts"]["rounds"]
    assert rounds and all(r["seconds"] == round(r["seconds"], 1) for r in rounds)
    run_id = str(RunFolder(root=out).facts()["run"])
    for site in (out / "sites").iterdir():
        vault = Vault(site / "vault.db")
        assert vault.names("round/") == vault.names("channel") == [], site
        assert vault.names("closed/") == [f"closed/{run_id}"]
        vault.close()
    for site in (out / "sites").iterdir():  # every release went through a vote that its ledger knew first
        states = [
            line.body["state"] for line in chain.read_jsonl(site / "ledger.jsonl") if line.body["kind"] == "advance"
        ]
        assert states == ["SEALED", "UNMASKED", "RELEASED"] * RunFolder(root=out).plan().releases


def test_scores_and_warnings_are_signed(simulate: Callable[..., Path]) -> None:
    """A better score or a missing warning in result.json is found."""
    out = simulate("iid:3")
    finish(out)
    assert audit(out).ok
    text = (out / "result.json").read_text(encoding="utf-8")
    for change in (
        lambda r: r["scores"]["figures"]["tvd1"].update(value=0.0),
        lambda r: r["scores"].update(headline="Good for everything."),
        lambda r: r.update(scores=None),
        lambda r: r.pop("scores"),
        lambda r: r.update(warnings=["none"]),
    ):
        result = json.loads(text)
        change(result)
        (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
        assert [check.name for check in audit(out).checks if not check.ok] == ["scores"]
