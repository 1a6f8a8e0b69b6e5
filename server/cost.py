"""What a study will take: bytes, exchanges, minutes and memory, from public facts alone and before anything runs.

    amounts    how much of each kind of work a plan holds (rows × columns, numbers masked, products of its fit ...)
    machine    seconds, bytes or megabytes for one unit of each: measured, never written down by hand
    forecast   their products, added up, and the range that the measured studies left

The coefficients come from `python -m cohortium.simulations.benchmarks.cost_model`, which runs whole studies and fits
them; the package ships one such file (data/cost.json). Another machine's file is named by COHORTIUM_MACHINE or by
`study check --machine`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from cohortium.common.errors import UsageError
from cohortium.common.evaluation.phases import ATTACK
from cohortium.common.generators.joined import MOST_PRETRAIN_ROWS, PRETRAIN_BATCH, PRETRAIN_EPOCHS
from cohortium.common.privacy.plan import Plan
from cohortium.server.cost_shape import ASSUMED_PATIENTS, Asked, Shape
from cohortium.server.evaluate import ROWS_AT_LEAST, ROWS_AT_MOST, ROWS_PER_PATIENT
from cohortium.server.sampling import BLOCK_ROWS

FORMAT = 1
MACHINE = "COHORTIUM_MACHINE"
NUMBER_BYTES = 8  # of a number that leaves a hospital
SCORED_ROWS = 100_000  # as simulations/finish.py has it, which is too heavy to import here
TRANSPORTS = ("stream", "flower")

Amounts = dict[str, float]
"""Kind of work -> how much of it."""

SITE = ("site.begin", "site.answer")
COORDINATOR = ("coordinator.begin", "coordinator.round", "fit", "evaluate", "sample", "publish")
SIMULATION = ("start", "prepare", *SITE, *COORDINATOR, "score")
"""Groups of work whose seconds make up a hospital's, the coordinator's and a whole simulation's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is public of a study's size. rows: of all hospitals together, held-out patients included."""

    rows: int
    patients: int

    @classmethod
    def of(cls, plan: Plan, patients: int | None, rows: int | None = None) -> Self:
        """rows: where patients have several; else as many as patients × the rows that count in full."""
        told = patients or ASSUMED_PATIENTS
        return cls(rows=rows or told * plan.rows_per_patient, patients=told)


def exchanges(plan: Plan) -> int:
    """Envelopes to each hospital, and back: three a release in secure-sum (mask, agree, unmask), one in local.

    Round keys cost one more, except where they ride on the answer before (the later releases of a gradient stage).
    Hello, start and farewell are three; with three hospitals or more they confirm one another's ledgers first.
    """
    frame = 4 if len(plan.sites) > 2 else 3
    if plan.mode != "secure-sum":
        return frame + plan.releases
    return frame + sum(3 * s.repeats + (1 if s.kind == "gradient" else s.repeats) for s in plan.stages)


# ---- amounts ------------------------------------------------------------------------------------------------


def amounts(plan: Plan, shape: Shape, size: Size) -> dict[str, Amounts]:
    """Group of work -> amounts, of a whole study."""
    n, rows, held = len(plan.sites), size.rows, size.rows * plan.holdout
    cell = float(rows * shape.columns)
    grams = shape.width if any(a.stage.kind == "moments" and a.stage.part == "train" for a in shape.asked) else 0
    batches = max(4, min(MOST_PRETRAIN_ROWS, 5 * size.patients) // PRETRAIN_BATCH) if plan.generator == "joined" else 0
    warmed = PRETRAIN_EPOCHS * batches * PRETRAIN_BATCH
    judged = min(max(ROWS_PER_PATIENT * held, ROWS_AT_LEAST), ROWS_AT_MOST) if held else 0
    scored = min(rows, SCORED_ROWS) + min(plan.rows, SCORED_ROWS)
    largest = max(a.dim for a in shape.asked)
    block = min(plan.rows, BLOCK_ROWS)
    network, mixture = shape.hidden * shape.bins, shape.bins if not shape.hidden else 0
    memory = {
        "base": 1.0,
        "exchange": float(n * largest),
        "fit": float(shape.components * (shape.bins + shape.width)),
        "block": float(block * shape.columns),
        "drawn": float(block * shape.width),
    }
    return {
        "start": {"base": 1.0},
        "prepare": {"base": 1.0, "site": float(n), "pair": float(n * n), "cell": cell},
        "site.begin": {"site": float(n), "pair": float(n * n), "cell": cell},
        "site.answer": _summed(site_amounts(a, plan, shape, size) for a in shape.asked),
        "coordinator.begin": {"base": 1.0, "site": float(n), "pair": float(n * n)},
        "coordinator.round": _summed(round_amounts(a, plan) for a in shape.asked),
        "fit": {
            "base": 1.0,
            "cell": float(shape.cells),
            "table": float(shape.components * shape.steps * shape.tables),
            "gram": float(shape.components * shape.steps * grams**2),
            "warm": float(warmed * network),
            "warm-row": float(warmed * shape.columns * shape.hidden),
        },
        "evaluate": {"base": float(held > 0), "judged": float(judged * shape.columns)},
        "sample": {
            "base": 1.0,
            "cell": float(plan.rows * shape.columns),
            "mixture": float(plan.rows * mixture),
            "network": float(plan.rows * network),
            "herded": float(plan.rows * shape.width),
        },
        "score": {
            "base": 1.0,
            "cell": float(scored * shape.columns),
            "pair": float(scored * shape.columns**2),
            "judged": float(judged * shape.columns),
        },
        "publish": {"base": 1.0, "line": float(n * plan.releases), "judged": float(judged * shape.columns)},
        "simulation.mb": {**memory, "site": float(n), "cell": cell, "scored": float(scored * shape.columns)},
        # Gradients need a library of their own, and numbers for each row of a block.
        "hospital.mb": {
            "base": 1.0,
            "cell": cell / n,
            "network": float(shape.hidden > 0),
            "block": float(shape.block * (shape.hidden * shape.columns + shape.bins)) if shape.hidden else 0.0,
        },
        "coordinator.mb": memory,
    }


def site_amounts(asked: Asked, plan: Plan, shape: Shape, size: Size) -> Amounts:
    """One stage at all hospitals together."""
    stage, n = asked.stage, len(plan.sites)
    repeats, held = float(stage.repeats), stage.part == "holdout"
    rows = size.rows * (plan.holdout if held else 1.0 - plan.holdout)
    found = {
        "release": n * repeats,
        "number": n * repeats * asked.dim,
        "question": n * repeats * asked.wire,
    }
    if plan.mode == "secure-sum":
        found |= {"peer": n * n * repeats, "masked": n * n * repeats * asked.dim}
    if stage.kind == "gradient":
        # Products take a fixed number of rows at once: a small hospital's batch is filled up.
        batch = rows * stage.event.probability / n
        filled = n * shape.block * math.ceil(batch / shape.block) * repeats * stage.steps
        found |= {
            "gradient": filled * shape.hidden * shape.bins,
            "softmax": filled * shape.bins,
            "gradient-row": filled * shape.columns * shape.hidden,
        }
    elif held or stage.name == ATTACK:
        found[f"held-{stage.kind}"] = repeats * rows * shape.columns
    elif stage.kind == "moments":
        found |= {"gram": repeats * rows * asked.width**2, "feature": repeats * rows * asked.width}
    else:
        found["counted"] = repeats * rows * asked.counted
    return found


def round_amounts(asked: Asked, plan: Plan) -> Amounts:
    """One stage at the coordinator, its messages' way included."""
    n, repeats = len(plan.sites), float(asked.stage.repeats)
    return {
        "release": repeats,
        "site": n * repeats,
        "peer": n * n * repeats if plan.mode == "secure-sum" else 0.0,
        "number": repeats * asked.dim,
        "site-number": n * repeats * asked.dim,
        "question": n * repeats * asked.wire,
    }


def frame_amounts(plan: Plan) -> Amounts:
    """What one hospital sends, or gets, beside answers and questions: envelopes, keys, shares, votes, ledger lines."""
    n, releases = float(len(plan.sites)), float(plan.releases)
    if plan.mode == "secure-sum":
        return {"base": 1.0, "site": n, "release": releases, "release-site": n * releases}
    return {"base": 1.0, "site": n, "local-release": releases}


def asked_amounts(asked: Asked, shape: Shape) -> Amounts:
    """What a question of the evaluation weighs: it is made from the synthetic table, which is not there yet."""
    return {"base": 1.0, "cell": float(shape.cells), "number": float(asked.dim)}


def _summed(parts: Any) -> Amounts:
    out: Amounts = {}
    for part in parts:
        for name, value in part.items():
            out[name] = out.get(name, 0.0) + value
    return out


# ---- a machine's coefficients -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Measured coefficients. each: group -> kind of work -> seconds (bytes, megabytes) of one unit.

    spread: figure -> (low, high), the observed over the predicted of studies that the fit had not seen.
    exchange_s: transport -> seconds of an exchange without the parties' own work. about: the machine, and when.
    """

    each: Mapping[str, Mapping[str, float]]
    spread: Mapping[str, tuple[float, float]]
    exchange_s: Mapping[str, float]
    about: Mapping[str, Any]

    def of(self, group: str, amounts: Amounts) -> float:
        known = self.each.get(group, {})
        return sum(known.get(name, 0.0) * amount for name, amount in amounts.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "exchange_s": dict(self.exchange_s),
            "spread": {name: list(pair) for name, pair in self.spread.items()},
            "each": {group: dict(units) for group, units in self.each.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises KeyError, TypeError or ValueError for what `to_json` would not have written."""
        if value["format"] != FORMAT:
            raise ValueError("another format")
        numbers = {g: {k: float(v) for k, v in units.items()} for g, units in value["each"].items()}
        if not all(math.isfinite(v) and v >= 0 for units in numbers.values() for v in units.values()):
            raise ValueError("a coefficient is below 0")
        return cls(
            each=numbers,
            spread={name: (float(low), float(high)) for name, (low, high) in value["spread"].items()},
            exchange_s={name: float(value["exchange_s"][name]) for name in TRANSPORTS},
            about=dict(value["about"]),
        )


def load_machine(path: Path | None = None) -> Machine:
    """path: a file of the benchmark; else what COHORTIUM_MACHINE names; else the one that comes with the package.

    Raises UsageError COST-MACHINE for a file that the benchmark did not write.
    """
    named = path or (Path(os.environ[MACHINE]) if os.environ.get(MACHINE) else None)
    try:
        shipped = resources.files("cohortium.server") / "data" / "cost.json"
        return Machine.from_json(json.loads((named or shipped).read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            "COST-MACHINE",
            "the file of this machine's speed cannot be read",
            where=(str(named or "cost.json"),),
            hint="write it: python -m cohortium.simulations.benchmarks.cost_model --out FILE",
        ) from error


# ---- the forecast -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """A figure with its range."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Seconds on one core, bytes of one hospital, megabytes at the peak. assumed: what the study did not tell.

    network: transport -> seconds with every hospital on a machine of its own, without the line's own delay.
    """

    exchanges: int
    sent: About
    received: About
    simulation_s: About
    hospital_s: About
    coordinator_s: About
    network_s: Mapping[str, About]
    simulation_mb: About
    hospital_mb: About
    coordinator_mb: About
    patients: int
    rows: int
    assumed: bool
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "patients": self.patients,
            "rows": self.rows,
            "patients_assumed": self.assumed,
            "exchanges": self.exchanges,
            "bytes_sent_per_site": self.sent.to_json(),
            "bytes_received_per_site": self.received.to_json(),
            "seconds": {
                "simulation": self.simulation_s.to_json(),
                "hospital": self.hospital_s.to_json(),
                "coordinator": self.coordinator_s.to_json(),
                **{f"network_{name}": about.to_json() for name, about in self.network_s.items()},
            },
            "megabytes": {
                "simulation": self.simulation_mb.to_json(),
                "hospital": self.hospital_mb.to_json(),
                "coordinator": self.coordinator_mb.to_json(),
            },
            "measured_on": dict(self.machine),
        }


def forecast(plan: Plan, shape: Shape, machine: Machine, *, patients: int | None, rows: int | None = None) -> Forecast:
    """Everything `study check` says about time, bytes and memory."""
    size, n = Size.of(plan, patients, rows), len(plan.sites)
    work = amounts(plan, shape, size)
    seconds = {group: machine.of(group, work[group]) for group in SIMULATION}
    site = sum(seconds[group] for group in SITE) / n
    coordinator = sum(seconds[group] for group in COORDINATOR)
    rounds = exchanges(plan)
    sent, received = traffic(plan, shape, machine)

    def about(name: str, value: float) -> About:
        low, high = machine.spread.get(name, (1.0, 1.0))
        return About(value=value, low=value * low, high=value * high)

    start = seconds["start"]
    network = {t: about("simulation_s", site + coordinator) for t in TRANSPORTS}
    return Forecast(
        exchanges=rounds,
        sent=about("sent", sent),
        received=about("received", received),
        simulation_s=about("simulation_s", sum(seconds.values())),
        hospital_s=about("hospital_s", start + site),
        coordinator_s=about("coordinator_s", start + coordinator),
        network_s={t: _later(worked, rounds * machine.exchange_s[t] + start) for t, worked in network.items()},
        simulation_mb=about("simulation_mb", machine.of("simulation.mb", work["simulation.mb"])),
        hospital_mb=about("hospital_mb", machine.of("hospital.mb", work["hospital.mb"])),
        coordinator_mb=about("coordinator_mb", machine.of("coordinator.mb", work["coordinator.mb"])),
        patients=size.patients,
        rows=size.rows,
        assumed=patients is None,
        machine=machine.about,
    )


def traffic(plan: Plan, shape: Shape, machine: Machine) -> tuple[float, float]:
    """Bytes that one hospital sends and gets."""
    frame = frame_amounts(plan)
    answers = sum(a.stage.repeats * a.dim * NUMBER_BYTES for a in shape.asked)
    questions = sum(
        a.stage.repeats * (a.wire or machine.of(f"question.{a.stage.kind}", asked_amounts(a, shape)))
        for a in shape.asked
    )
    return answers + machine.of("sent.bytes", frame), questions + machine.of("received.bytes", frame)


def _later(about: About, seconds: float) -> About:
    return About(value=about.value + seconds, low=about.low + seconds, high=about.high + seconds)
