"""A rehearsal with canaries: five simulated hospitals, real guards, ledgers and secure sums, and an auditor who asks.

Each canary is a patient who is in by a fair coin, with a mark of their own. The coordinator asks within the approved
plan, but as badly as it can: queries in which a canary's whole clipped vector lies on one coordinate. Three paths are
audited by themselves, against what the sites' ledgers charged for each: counts, moments, and sampled gradient steps.
The queries' vectors are longer than their bounds, so a clip that does not hold shows as well.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from cohortium.client.guard import open_guard
from cohortium.common.errors import PeerUnreachable
from cohortium.common.generators.base import Answer
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy import accountant
from cohortium.common.privacy.auditing import guess, one_run_epsilon, planned_guesses, uniform_bytes_p_value
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, compile_plan
from cohortium.common.privacy.pld import gaussian_mu
from cohortium.common.protocol.messages import Message
from cohortium.common.protocol.signing import public_from_raw
from cohortium.common.queries import AnyQuery, Counts, Gradient, Moments
from cohortium.common.study import Study
from cohortium.server import witnesses
from cohortium.server.asking import FederatedAsk
from cohortium.server.mirror import Mirror
from cohortium.server.runs import RunFolder
from cohortium.server.session import Session
from cohortium.server.transport import GridCourier
from cohortium.simulations import engines
from cohortium.simulations.run import Request, build
from cohortium.simulations.worlds import split
from cohortium.strategies.base import COORDINATOR
from cohortium.strategies.secure_sum import SecureSum

SITES = 5
CANARIES = 1000
OTHERS = 200
ROWS_EACH = 2
STEPS, RATE = 20, 0.75
EPSILON, DELTA = 5.0, 1e-5
CONFIDENCE = 0.95

FULL = 1.0
"""What a canary adds to counts and to moments, and the sensitivity of both, by the auditor's own reckoning: one count;
half the bound S = 2 of two columns that weigh alike (moments fall short of it by what rounding takes, 0.4 %)."""

Path_ = Literal["counts", "moments", "gradient"]
PATHS: tuple[Path_, ...] = ("counts", "moments", "gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditPhase:
    """One phase of the rehearsal's plan (privacy/plan.PhaseLike)."""

    name: Path_
    kind: Path_
    max_dim: int
    share: float
    repeats: int = 1
    sampling_rate: float = 1.0
    purpose: str = "one-run audit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One path's audit: `bound` on epsilon from `correct` of `guesses` about `canaries`, at `confidence`.

    promised: what the calibrated plan asks for the path alone; charged: what the sites' ledgers say.
    """

    path: Path_
    canaries: int
    guesses: int
    correct: int
    confidence: float
    delta: float
    bound: float
    promised: float
    charged: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """All that one rehearsal showed.

    promised, charged: epsilon of the whole plan. residuals: what the sum of a path's release holds beside the exact
    sum, in lattice units, and the standard deviation that was promised for it. masked: p-value of what left the sites.
    """

    found: tuple[Found, ...]
    promised: float
    charged: float
    residuals: Mapping[str, tuple[np.ndarray, float]] = field(repr=False)
    masked: float


def rehearse(*, canaries: int = CANARIES, noise: bool = True, seed: int | None = None, steps: int = STEPS) -> Rehearsal:
    """Make the hospitals, run the plan, guess. seed: None takes coins and noise from the operating system."""
    with tempfile.TemporaryDirectory() as name:
        world = _world(Path(name), canaries=canaries, noise=noise, seed=seed, steps=steps)
        return engines.run(
            lambda courier: _audited(courier, world),
            sites=[world.out / "sites" / site for site in world.plan.sites],
            engine=engines.InProcess(),
            log=world.out / "run" / "flower.log",
            opener=open_guard,
        )


# ---- the hospitals ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    out: Path
    plan: Plan
    promise: Plan
    coins: np.ndarray


def _world(folder: Path, *, canaries: int, noise: bool, seed: int | None, steps: int) -> _World:
    (folder / "dictionary.json").write_text(json.dumps(_dictionary(canaries)))
    (folder / "study.toml").write_text(_STUDY.format(sites=SITES, epsilon=EPSILON, delta=DELTA, patients=canaries))
    study = Study.load(folder / "study.toml")
    rng = np.random.default_rng(seed)
    coins = rng.integers(0, 2, canaries).astype(bool)
    marks = np.concatenate([np.flatnonzero(coins), np.full(OTHERS, canaries)])
    table = pd.DataFrame({"patient": [f"p{i:05d}" for i in range(len(marks))], "mark": marks, "flag": "false"})
    table = pd.concat([table] * ROWS_EACH, ignore_index=True)
    worlds = split(table, f"iid:{SITES}", unit="patient", seed=int(rng.integers(2**31)))
    names = sorted(worlds)
    phases = (
        AuditPhase(name="counts", kind="counts", max_dim=canaries + 2, share=0.25),
        AuditPhase(name="moments", kind="moments", max_dim=canaries + 2, share=0.375),
        AuditPhase(
            name="gradient",
            kind="gradient",
            max_dim=_network(canaries).size,
            share=0.375,
            repeats=steps,
            sampling_rate=RATE,
        ),
    )
    promise = compile_plan(study, sites=names, generator="mixture", phases=phases)
    plan = promise if noise else compile_plan(study, sites=names, generator="mixture", phases=phases, noise=False)
    out = folder / "out"
    out.mkdir()
    request = Request(
        study=folder / "study.toml",
        table=folder / "none",
        split=f"iid:{SITES}",
        out=out,
        seed=seed,
        noise=noise,
    )
    build(request, study, plan, worlds)
    return _World(out=out, plan=plan, promise=promise, coins=coins)


def _dictionary(canaries: int) -> dict[str, object]:
    """A mark for each canary and one for everybody else; a cell of the grid each, up to 1,024."""
    return {
        "name": "audit",
        "fields": [
            {"name": "patient", "type": "string", "role": "identifier"},
            {"name": "mark", "type": "integer", "constraints": {"minimum": 0, "maximum": canaries}},
            {"name": "flag", "type": "boolean"},
        ],
    }


_STUDY = """\
[study]
id = "audit"
title = "A rehearsal with canaries"
dictionary = "dictionary.json"
target = "flag"
patients = {patients}

[privacy]
epsilon = {epsilon}
delta = {delta}
delta_reason = "a rehearsal with made-up patients"
unit = "patient"
adjacency = "add-remove"
hospitals_per_patient = 1

[generator]
name = "mixture"

[strategy]
name = "secure-sum"
survivors = {sites}
colluders = 0

[release]
rows = 1
"""


# ---- the questions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """A query, where each canary's coordinate is in its answer, and the sign of a canary's part there."""

    query: AnyQuery
    at: np.ndarray
    sign: float


def _network(canaries: int) -> Nade:
    return Nade({"kind": "nade", "bins": [canaries + 2, 3], "hidden": 1})


def questions(canaries: int) -> dict[Path_, _Question]:
    """Each canary's vector is as long as the query allows, and on one coordinate (of the gradient: but for 1/m)."""
    codes, everybody = canaries + 2, np.arange(canaries)
    mark, flag = np.arange(codes, dtype=np.int32), np.arange(3, dtype=np.int32)
    counts = Counts(columns=(0,), maps=(mark,), bins=(codes,))
    # Ten times longer than its bound, which holds only because each row is clipped.
    moments = Moments(features=(10.0 * np.eye(codes), np.full((3, 1), 10.0)), bound_sq=2.0)
    net = _network(canaries)
    theta = np.zeros(net.size, dtype=np.float32)
    theta[0] = -1.0  # the hidden unit is off, so that only output biases have a gradient
    theta[-3:] = (40.0, -40.0, -40.0)  # the flag is known, so that its bias has none
    at = 1 + 2 * codes + everybody  # after b, E and V of the first column
    gradient = Gradient(network=net.spec, maps=(mark, flag), parameters=theta, clip_norm_l2=0.1)
    return {
        "counts": _Question(query=counts, at=everybody, sign=1.0),
        "moments": _Question(query=moments, at=everybody, sign=1.0),
        "gradient": _Question(query=gradient, at=at, sign=-1.0),
    }


# ---- the run ------------------------------------------------------------------------------------------------


def _audited(courier: GridCourier, world: _World) -> Rehearsal:
    asked = questions(len(world.coins))
    scores: dict[Path_, np.ndarray] = {}
    residuals: dict[str, tuple[np.ndarray, float]] = {}
    left: list[bytes] = []
    with _asking(courier, world, left) as ask:
        for path in PATHS:
            question, stage = asked[path], next(s for s in world.plan.stages if s.name == path)
            answers = [ask(stage.name, question.query) for _ in range(stage.repeats)]
            summed = np.sum([answer.values for answer in answers], axis=0)[question.at] * question.sign
            scores[path] = summed - np.median(summed)
            if path != "gradient":
                # What the auditor knows for certain: who is in. The rest is noise, and its size was promised.
                lattice = question.query.lattice
                noise = np.rint(answers[0].values[question.at] / lattice) - np.rint(world.coins * FULL / lattice)
                planned = next(s for s in world.promise.stages if s.name == stage.name).noise_multiplier
                residuals[path] = (noise.astype(np.int64), planned * FULL / lattice)
    found = tuple(_judged(path, scores[path], world) for path in PATHS)
    return Rehearsal(
        found=found,
        promised=world.promise.price(),
        charged=max(_charged(world, site, None) for site in world.plan.sites),
        residuals=residuals,
        masked=min(1.0, len(left) * min(uniform_bytes_p_value(vector) for vector in left)),
    )


def _judged(path: Path_, scores: np.ndarray, world: _World) -> Found:
    stage = next(stage for stage in world.promise.stages if stage.kind == path)
    promised = accountant.epsilon([(stage.event, stage.count)], delta=DELTA)
    guesses = planned_guesses(mu=gaussian_mu(promised, DELTA), canaries=len(scores), delta=DELTA, confidence=CONFIDENCE)
    said = guess(scores, guesses=guesses)
    correct = int((said == np.where(world.coins, 1, -1)).sum())
    return Found(
        path=path,
        canaries=len(scores),
        guesses=guesses,
        correct=correct,
        confidence=CONFIDENCE,
        delta=DELTA,
        bound=one_run_epsilon(
            canaries=len(scores), guesses=guesses, correct=correct, delta=DELTA, confidence=CONFIDENCE
        ),
        promised=promised,
        charged=max(_charged(world, site, path) for site in world.plan.sites),
    )


def _charged(world: _World, site: str, path: Path_ | None) -> float:
    """Epsilon of what a site's own ledger charged, for one path or all."""
    with Ledger.open(world.out / "sites" / site / "ledger.db") as ledger:
        entries = ledger.book.entries.values()
        events = [(entry.event, entry.count) for entry in entries if path is None or entry.purpose == path]
    return accountant.epsilon(events, delta=DELTA)


@contextmanager
def _asking(courier: GridCourier, world: _World, left: list[bytes]) -> Iterator[Callable[[str, AnyQuery], Answer]]:
    """The coordinator as server/runs.drive makes it, but for who chooses the questions.

    left: gets every vector that leaves a site, as it leaves.
    """
    folder = RunFolder(root=world.out)
    facts = folder.facts()
    run, key = str(facts["run"]), folder.key()
    folder.inner.mkdir(exist_ok=True)
    identities = {site: public_from_raw(bytes.fromhex(raw)) for site, raw in facts["public_keys"].items()}
    with (
        Mirror(folder.inner / "mirror.db", identities) as mirror,
        Ledger.create(folder.inner / "ledger.db", COORDINATOR, key) as ledger,
    ):
        session = Session(courier=courier, key=key, identities=identities, mirror=mirror, timeout_s=600.0)

        def exchange(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
            replies = session.exchange(messages, label)
            left.extend(reply.blobs["values"] for reply in replies.values() if label.endswith("/mask"))
            return replies

        courier.discover(world.plan.sites, timeout_s=60.0)
        answered = session.exchange(witnesses.hellos(run, world.plan.sites, mirror), "hello")
        begun = witnesses.start(
            plan=world.plan,
            run=run,
            key=key,
            identities=identities,
            mirror=mirror,
            exchange=session.exchange,
            answered=answered,
            refusals=session.refusals,
        )
        if begun != world.plan.sites:
            raise PeerUnreachable("AUDIT-SITES", f"not every simulated site began: {session.refusals}")
        strategy = SecureSum(
            plan=world.plan,
            run=run,
            identities=identities,
            exchange=exchange,
            mirrored=mirror.size,
            notebook=folder.inner / "notebook",
        )
        strategy.start(answered)
        yield FederatedAsk(
            plan=world.plan,
            run=run,
            strategy=strategy,
            ledger=ledger,
            folder=folder.inner / "answers",
            on_release=lambda facts: None,
        )
