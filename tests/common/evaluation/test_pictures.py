from __future__ import annotations

import re

from cohortium.common.evaluation.base import PlanRow
from cohortium.common.evaluation.pictures import Identifiers, burn_down


def row(name: str, epsilon: float) -> PlanRow:
    return PlanRow(
        id=name,
        purpose=name,
        kind="counts",
        repeats=1,
        sampling_rate=1.0,
        noise_multiplier=4.0,
        epsilon_cumulated=epsilon,
    )


def test_held_out_patients_begin_at_zero() -> None:
    """Their ε is not added to that of the patients who were trained on, and not hidden behind it."""
    rows = [row("bins", 1.0), row("train", 3.0), row("evaluation", 1.0)]
    text = burn_down(Identifiers(), rows, total=3.0, amounts=["1", "3", "1"])
    pale, dark = (
        [float(w) for w in re.findall(rf'class="{c}"[^>]* width="([\d.]+)"', text)] for c in ("before", "syn")
    )
    assert pale[0] == 0 and pale[1] == dark[0] and pale[2] == 0
    assert dark[2] == dark[0] and abs(pale[1] + dark[1] - 3 * dark[0]) < 0.2
