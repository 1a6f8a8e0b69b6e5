"""One run of a study at the coordinator: hello, ask the plan's releases, fit, score, keep the model.

    RUN/study.toml dictionary.json plan.json proposal.bin run.json manifest.json
    RUN/coordinator.key                     the coordinator's Ed25519 key, mode 0600
    RUN/run/ledger.db mirror.db model.npz evaluation.json events.jsonl answers/ notebook/

`drive` knows sites by name and carries envelopes; whether they travel in process, by Ray or over a network is the
courier's business. Everything is on disk after each release, so a run that was interrupted is driven again.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.encoding import Grid, grids
from cohortium.common.errors import CheckFailed, PeerUnreachable, Refused, UsageError
from cohortium.common.generators.base import Model, Settings
from cohortium.common.generators.steps import ServerStep
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import Message, digest
from cohortium.common.protocol.signing import load_private, public_from_raw
from cohortium.common.registry import load_model
from cohortium.common.study import Study
from cohortium.server import witnesses
from cohortium.server.asking import FederatedAsk
from cohortium.server.mirror import Mirror
from cohortium.server.planning import plan_for
from cohortium.server.session import Courier, Session
from cohortium.strategies.base import COORDINATOR, Strategy
from cohortium.strategies.local_noise import LocalNoise
from cohortium.strategies.secure_sum import SecureSum

HELLO_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 600.0
SAMPLES = ("synthetic.parquet", "synthetic.csv")
"""The released rows, in a run's folder."""

OnEvent = Callable[[dict[str, Any]], None]


class RunCourier(Courier, Protocol):
    def discover(self, expected: Sequence[str], *, timeout_s: float, quorum: int | None = None) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's directory."""

    root: Path

    @property
    def inner(self) -> Path:
        return self.root / "run"

    def study(self) -> Study:
        return Study.load(self.root / "study.toml")

    def plan(self) -> Plan:
        return Plan.loads(self._read("plan.json"))

    def facts(self) -> dict[str, Any]:
        """run.json: run id, seed of everything that is not noise, noise on or off, public keys."""
        return dict(json.loads(self._read("run.json")))

    def key(self) -> Ed25519PrivateKey:
        return load_private(self.root / "coordinator.key")

    def model(self) -> Model:
        """The fitted model; UsageError before the fit is done."""
        path = self.inner / "model.npz"
        if not path.exists():
            raise UsageError(
                "RUN-NO-MODEL",
                "this run has no fitted model",
                where=(str(path),),
                hint=f"finish it: cohortium simulate --resume {self.root}",
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "header"}
            return load_model(arrays, json.loads(str(file["header"])))

    def grids(self) -> tuple[Grid, ...]:
        return grids(self.study().schema)

    def events(self) -> list[dict[str, Any]]:
        """What happened so far; a line that a crash cut short is left out."""
        path, found = self.inner / "events.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found.append(dict(json.loads(line)))
            except ValueError:
                continue
        return found

    def note(self, event: str, /, **facts: Any) -> None:
        """Something happened outside `drive`: a line among its events."""
        self.inner.mkdir(exist_ok=True)
        _Events(self.inner / "events.jsonl", None).say(event, **facts)

    def releases_done(self) -> int:
        """How many releases are answered and on disk."""
        return sum(1 for _ in (self.inner / "answers").glob("*.npz"))

    def _read(self, name: str) -> str:
        path = self.root / name
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(
                "RUN-MISSING",
                "this is not a run's directory",
                where=(str(path),),
                hint="name the folder that `cohortium simulate --out` made",
            ) from None


def new_run_id(study: str, *, seed: int | None = None) -> str:
    """study-XXXXXXXX; by seed in a rehearsal, because keys and noise are bound to it."""
    tail = secrets.token_hex(4) if seed is None else f"{seed:08x}"
    return f"{re.sub('[^a-z0-9-]', '-', study.lower())[:48].strip('-')}-{tail}"


def drive(
    courier: RunCourier,
    root: Path,
    *,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] = lambda: False,
    mirror: Path | None = None,
) -> None:
    """Run, or run on, the study in `root` until its model is fitted and scored.

    mirror: where the sites' ledgers are copied to; one file for all runs of a consortium, so that a roll-back
    between two runs is seen (default: what run.json names, or RUN/run/mirror.db).
    Raises Stopped when `stop` says so between two releases; PeerUnreachable when too few sites are there.
    """
    from cohortium.server.evaluate import evaluate  # loads what only a fit needs; the console reads runs without it

    folder = RunFolder(root=root)
    study, plan, facts = folder.study(), folder.plan(), folder.facts()
    run, key = str(facts["run"]), folder.key()
    folder.inner.mkdir(exist_ok=True)
    events = _Events(folder.inner / "events.jsonl", on_event)
    identities = {site: public_from_raw(bytes.fromhex(k)) for site, k in facts["public_keys"].items()}
    place = mirror or root / str(facts.get("mirror", "run/mirror.db"))
    copies = Mirror(place, identities, earlier=facts.get("earlier_keys"))
    session = Session(
        courier=courier,
        key=key,
        identities=identities,
        mirror=copies,
        timeout_s=float(facts.get("answer_timeout_s", ANSWER_TIMEOUT_S)),
    )
    ledger = _study_ledger(folder.inner / "ledger.db", key)
    final = False
    try:
        events.say("start", run=run, releases=plan.releases, plan=plan.digest)
        ledger.note("start", run=run, plan=plan.digest)
        quorum = witnesses.quorum_of(plan)
        present = courier.discover(
            plan.sites, timeout_s=float(facts.get("hello_timeout_s", HELLO_TIMEOUT_S)), quorum=quorum
        )
        answered = session.exchange(witnesses.hellos(run, present, copies), "hello")
        # A ledger that was rolled back, forked or copied: its site takes no part, or a release could be drawn twice.
        begun = witnesses.start(
            plan=plan,
            run=run,
            key=key,
            identities=identities,
            mirror=copies,
            exchange=session.exchange,
            answered=answered,
            refusals=session.refusals,
        )
        answered = {site: answered[site] for site in begun}
        events.say("hello", sites=sorted(answered), refused=session.refusals)
        if len(answered) < quorum:
            codes = ", ".join(f"{s}: {c}" for s, c in sorted(session.refusals.items())) or "no answer"
            raise PeerUnreachable(
                "RUN-TOO-FEW",
                f"{len(answered)} of {len(plan.sites)} sites can take part, {quorum} are needed ({codes})",
                hint="each site's guard.log says why it refused",
            )
        if any(reply.fields["plan"] != plan.digest for reply in answered.values()):
            raise CheckFailed("RUN-PLAN", "a site approved another plan than this run's")
        asked = witnesses.only(session.exchange, begun)
        strategy: Strategy
        if plan.mode == "secure-sum":
            strategy = SecureSum(
                plan=plan,
                run=run,
                identities=identities,
                exchange=asked,
                mirrored=copies.size,
                notebook=folder.inner / "notebook",
            )
        else:
            strategy = LocalNoise(plan=plan, run=run, exchange=asked, mirrored=copies.size)
        strategy.start(answered)
        ask = FederatedAsk(
            plan=plan,
            run=run,
            strategy=strategy,
            ledger=ledger,
            folder=folder.inner / "answers",
            on_release=lambda f: events.say("release", **f),
            stop=stop,
        )
        seed = int(facts["seed"])
        _, chosen, public = plan_for_run(study, plan)
        model = chosen.fit(
            ask,
            schema=study.schema,
            grids=folder.grids(),
            facts=public,
            settings=settings_of(study, seed=seed, exact=bool(facts.get("exact"))),
            progress=lambda what, share: events.tell("fit", what=what, share=share),
        )
        _keep_model(folder.inner / "model.npz", model)
        if any(stage.part == "holdout" for stage in plan.stages):
            evaluate(
                folder,
                study,
                plan,
                model,
                ask,
                seed=seed,
                progress=lambda what: events.tell("evaluate", what=what),
            )
        ledger.note("end", run=run, plan=plan.digest, model=digest((folder.inner / "model.npz").read_bytes()))
        events.say("fitted", run=run)
        final = True
    finally:
        _farewell(session, plan, run, copies, key, final=final)
        ledger.export(folder.inner / "ledger.jsonl")
        ledger.close()
        copies.close()


def _study_ledger(path: Path, key: Ed25519PrivateKey) -> Ledger:
    """The study's ledger, begun if need be; a crash may have left a file without its first line."""
    if not path.exists():
        return Ledger.create(path, COORDINATOR, key)
    try:
        return Ledger.open(path, key)
    except CheckFailed as damaged:
        try:
            return Ledger.create(path, COORDINATOR, key)
        except (CheckFailed, Refused):
            raise damaged from None


def settings_of(study: Study, *, seed: int, exact: bool = False) -> Settings:
    """How the generator goes about its work, as far as it costs no budget."""
    strategy = study.strategy
    local = strategy.name == "local"
    return Settings(
        seed=seed,
        exact=exact,
        local_steps=strategy.local_steps if local else 1,
        server_step=cast(ServerStep, strategy.server_step),  # one of the three: the study file checked it
        fedprox_mu=strategy.fedprox_mu,
    )


def plan_for_run(study: Study, plan: Plan) -> tuple[Plan, Any, Any]:
    """The plan again from its study: a run goes on only with the very plan that the sites approved."""
    again, chosen, facts = plan_for(study, plan.sites, noise=plan.private)
    if again.digest != plan.digest:
        raise CheckFailed(
            "RUN-PLAN",
            "the study no longer compiles to the approved plan",
            hint="resume with the version of Cohortium that began the run, or start a new run",
        )
    return again, chosen, facts


def _farewell(session: Session, plan: Plan, run: str, mirror: Mirror, key: Ed25519PrivateKey, *, final: bool) -> None:
    """Fetch the sites' last ledger lines and checkpoints; a site that is gone is asked again when the run resumes.

    final: the run came to its end and is not resumed, so the sites erase its keys.
    """
    try:
        messages = {
            site: Message(
                kind="run.finish",
                sender=COORDINATOR,
                fields={"run": run, "mirrored": mirror.size(site), "final": final},
            )
            for site in plan.sites
        }
        for site, reply in session.exchange(messages, "finish").items():
            with contextlib.suppress(CheckFailed):
                mirror.cosign(site, str(reply.fields.get("checkpoint")), key)
    except (PeerUnreachable, CheckFailed):
        return


def _keep_model(path: Path, model: Model) -> None:
    arrays, header = model.to_arrays()
    with open(path.with_suffix(".tmp"), "wb") as file:
        named: dict[str, Any] = {"header": np.array(json.dumps(header)), **arrays}
        np.savez_compressed(file, **named)
    path.with_suffix(".tmp").replace(path)


class _Events:
    """What happened, for people who watch: a line each on disk, and a call."""

    def __init__(self, path: Path, on_event: OnEvent | None) -> None:
        self._path, self._on_event = path, on_event

    def say(self, name: str, /, **facts: Any) -> None:
        entry = {"at": round(time.time(), 3), "event": name, **facts}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.tell(name, **facts)

    def tell(self, name: str, /, **facts: Any) -> None:
        """Only the call: progress inside a step is not worth a line."""
        if self._on_event is not None:
            self._on_event({"event": name, **facts})
