"""The audited bound that a report shows: from a real rehearsal, below what was charged, and signed away by nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cohortium.server.finish import AUDITED
from cohortium.simulations.finish import finish
from cohortium.simulations.rehearsal import write_audit


def test_the_bound_is_below_what_was_charged_and_reaches_the_report(simulate: Callable[..., Path]) -> None:
    out = simulate("iid:3")
    kept = json.loads(write_audit(out, seed=4, steps=4).read_text())
    assert {p["path"] for p in kept["paths"]} == {"counts", "moments", "gradient"}
    assert all(0 < p["epsilon_lower"] < p["epsilon_charged"] for p in kept["paths"])
    assert kept["epsilon_lower"] == max(p["epsilon_lower"] for p in kept["paths"])
    assert finish(out, score=False)["rehearsal_audit"] == kept
    assert f"{kept['epsilon_lower']:.2f}" in (out / "report.html").read_text()
    (out / AUDITED).unlink()
    assert finish(out, score=False)["rehearsal_audit"] is None
