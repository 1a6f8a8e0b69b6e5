"""A rehearsal with canaries beside a run: what an auditor could prove about ε, for the report.

The canaries' rehearsal has a plan of its own (five hospitals, a thousand marked patients): it audits the software that
made the run, path by path, not the run's own patients, who carry no mark.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cohortium.server.finish import AUDITED
from cohortium.simulations.benchmarks.audit_run import STEPS, Rehearsal, rehearse


def audited(*, seed: int | None = None, steps: int = STEPS) -> dict[str, Any]:
    """One rehearsal: the largest lower bound, how it was found, and each path's bound beside what was charged.

    steps: of the gradient path.
    """
    return facts_of(rehearse(seed=seed, steps=steps))


def facts_of(found: Rehearsal) -> dict[str, Any]:
    paths = [
        {
            "path": one.path,
            "epsilon_lower": round(one.bound, 4),
            "epsilon_charged": round(one.charged, 4),
            "canaries": one.canaries,
            "guesses": one.guesses,
            "right": one.correct,
        }
        for one in found.found
    ]
    first = found.found[0]
    said = "; ".join(f"{p['path']} {p['epsilon_lower']:.2f} of {p['epsilon_charged']:.2f} charged" for p in paths)
    return {
        "epsilon_lower": max(float(p["epsilon_lower"]) for p in paths),
        "method": (
            f"One-run audit (Steinke, Nasr and Jagielski 2023) of a rehearsal with {first.canaries:,} canaries in five "
            f"hospitals, {first.confidence:.0%} confidence: {said}. It audits this software, not this run's patients."
        ),
        "paths": paths,
    }


def write_audit(out: Path, *, seed: int | None = None, steps: int = STEPS) -> Path:
    """RUN/rehearsal_audit.json, which the run's result takes up when it is published."""
    path = out / AUDITED
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(audited(seed=seed, steps=steps), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path
