"""The private evaluation of a run: kept whole, shown on a terminal, and a void round costs its figures alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cohortium.common.errors import PeerUnreachable
from cohortium.common.evaluation.task import Unanswered
from cohortium.common.generators.base import Answer
from cohortium.server import evaluate
from cohortium.server.runs import RunFolder
from cohortium.server.showing import evaluation_shown
from cohortium.simulations.finish import finish

Simulate = Callable[..., Path]
HELD = "[evaluation]\nepsilon = 20.0\nholdout = 0.4\ngroups = []\n"


def shown(result: dict[str, Any]) -> str:
    text = StringIO()
    console = Console(file=text, width=200)
    for part in evaluation_shown(result):
        console.print(part)
    return text.getvalue()


def test_a_run_keeps_its_findings_and_its_result_says_them(simulate: Simulate) -> None:
    out = simulate("iid:3", evaluation=HELD, epsilon=20.0)
    folder = RunFolder(root=out)
    findings = evaluate.kept(folder)
    assert findings is not None and findings.figure("column_agreement") is not None
    assert not list(folder.inner.glob("*.tmp"))
    result = finish(out)
    assert result["exact_evaluation"]["column_agreement"] > 0.5
    # What may be handed on holds no exact figure; the report and the terminal of a simulation show both.
    assert all(f["exact"] is None for s in result["evaluation"]["sections"] for f in s["findings"])
    value = result["exact_evaluation"]["column_agreement"]
    assert f"{value:.3f}" in shown(result) and "Mean column agreement" in shown(result)
    assert f"{value:.3f}" not in shown({**result, "exact_evaluation": None})


def test_without_held_out_patients_nothing_is_shown(simulate: Simulate) -> None:
    out = simulate("iid:3")
    assert evaluate.kept(RunFolder(root=out)) is None
    assert shown(finish(out, score=False)) == ""


def test_a_changed_figure_is_seen_by_the_audit(simulate: Simulate) -> None:
    from cohortium.server.audit import audit

    out = simulate("iid:3", evaluation=HELD, epsilon=20.0)
    finish(out)
    assert audit(out).ok
    path = out / "result.json"
    for key in ("evaluation", "exact_evaluation"):
        before = path.read_text()
        result = json.loads(before)
        if key == "evaluation":
            result[key]["sections"][0]["findings"][0]["named"]["figure"]["value"] = 0.999
        else:
            result[key]["column_agreement"] = 0.999
        path.write_text(json.dumps(result))
        assert not audit(out).ok, key
        path.write_text(before)


@pytest.mark.parametrize(("code", "raised"), [("RUN-VOID", Unanswered), ("RUN-TOO-FEW", PeerUnreachable)])
def test_only_a_void_round_is_forgiven(code: str, raised: type[Exception]) -> None:
    def ask(phase: str, query: Any) -> Answer:
        raise PeerUnreachable(code, "gone")

    with pytest.raises(raised):
        evaluate._patiently(ask)("evaluation-columns", None)


def test_an_answer_passes_unchanged() -> None:
    answer = Answer(values=np.arange(3.0), sigma=1.0, sites=3)
    assert evaluate._patiently(lambda phase, query: answer)("a", None) is answer
