"""Hospitals for tests: real site directories with real keys, policies, approvals, ledgers; tables of a few rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.client.approval import approve
from cohortium.client.guard import Guard
from cohortium.client.policy import Policy, Rehearsal
from cohortium.client.records import records
from cohortium.common.encoding import Records, grids
from cohortium.common.privacy.budget import WHOLE
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.protocol.signing import from_seed, save_private, save_public
from cohortium.common.queries import AnyQuery, Counts, Gradient, Moments
from cohortium.common.schema import Schema
from cohortium.server import witnesses
from cohortium.server.mirror import Mirror
from cohortium.server.session import Session
from cohortium.strategies.base import COORDINATOR, SiteSum, Strategy, ask_message
from cohortium.strategies.local_noise import LocalNoise
from cohortium.strategies.secure_sum import SecureSum

RUN = "run-1"
DICTIONARY = {
    "name": "ward",
    "fields": [
        {"name": "pid", "type": "string", "role": "identifier"},
        {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"]}},
        {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
        {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 99}},
        {"name": "dead", "type": "boolean", "role": "target"},
    ],
}
HIDDEN = 3


@lru_cache
def schema() -> Schema:
    return Schema.from_dict(DICTIONARY)


def sizes() -> tuple[int, ...]:
    """Fine codes of each modelled column: 3, 4, 101, 3."""
    return tuple(grid.size for grid in grids(schema()))


def key(name: str) -> Ed25519PrivateKey:
    return from_seed(hashlib.sha256(name.encode()).digest())


def table(patients: int, *, seed: int = 0, most_rows: int = 3, prefix: str = "p") -> pd.DataFrame:
    """Rows of some patients, 1 to most_rows each, mixed, with a few cells missing."""
    rng = np.random.default_rng(seed)
    pid = np.repeat(np.arange(patients), rng.integers(1, most_rows + 1, patients))
    rng.shuffle(pid)
    rows = len(pid)
    out = pd.DataFrame(
        {
            "pid": [f"{prefix}{i:05d}" for i in pid],
            "sex": rng.choice(["F", "M"], rows),
            "stage": rng.choice(["I", "II", "III"], rows, p=[0.6, 0.3, 0.1]),
            "age": rng.integers(20, 95, rows),
            "dead": rng.choice(["true", "false"], rows),
        }
    )
    out.loc[rng.random(rows) < 0.1, "stage"] = ""
    return out


def people(patients: int, *, seed: int = 0, most_rows: int = 3, prefix: str = "p") -> Records:
    return records(schema(), table(patients, seed=seed, most_rows=most_rows, prefix=prefix), unit="pid")


def counts(**options: Any) -> Counts:
    """All columns in their fine codes: 111 bins."""
    chosen = tuple(options.pop("columns", range(len(sizes()))))
    maps = tuple(np.arange(sizes()[c], dtype=np.int32) for c in chosen)
    return Counts(columns=chosen, maps=maps, bins=tuple(sizes()[c] for c in chosen), **options)


def moments(*, seed: int = 0, bound_sq: float = 4.0, by: bool = False, scale: float = 2.0) -> Moments:
    rng = np.random.default_rng([seed, 1])
    features = tuple(rng.normal(0, scale, (size, k)) for size, k in zip(sizes(), (2, 1, 3, 1), strict=True))
    classes = (3, np.arange(3, dtype=np.int32), 3) if by else None
    return Moments(features=features, bound_sq=bound_sq, by=classes)


def maps() -> tuple[np.ndarray, ...]:
    """Fine codes to 3, 4, 5 and 3 bins."""
    fine = [np.arange(size, dtype=np.int32) for size in sizes()]
    return tuple(np.minimum(f // 20, 4).astype(np.int32) if len(f) > 100 else f for f in fine)


def gradient(*, seed: int = 0, clip_norm_l2: float = 0.5, **options: Any) -> Gradient:
    from cohortium.common.registry import network

    spec = {"kind": "nade", "bins": [3, 4, 5, 3], "hidden": HIDDEN}
    size = network(spec).size
    parameters = np.random.default_rng([seed, 2]).normal(0, 0.7, size).astype(np.float32)
    settings = {"path": "exact", "parameters": parameters, "network": spec, "maps": maps()} | options
    return Gradient(clip_norm_l2=clip_norm_l2, **settings)


def stage(name: str, kind: str, first: int, **options: Any) -> Stage:
    settings: dict[str, Any] = {
        "purpose": "test",
        "part": "train",
        "repeats": 1,
        "rate": WHOLE,
        "noise_multiplier": 20.0,
        "max_dim": 2000,
    }
    return Stage(name=name, kind=kind, first=first, **(settings | options))  # type: ignore[arg-type]


def plan(
    sites: Sequence[str] = ("a",),
    *,
    mode: str = "local",
    stages: Sequence[Stage] | None = None,
    **options: Any,
) -> Plan:
    """Two releases of counts unless told otherwise; noise enough for a cap of 8."""
    secure = mode == "secure-sum"
    settings: dict[str, Any] = {
        "study": "ward",
        "study_digest": "0" * 64,
        "dictionary_digest": schema().digest(),
        "generator": "mixture",
        "survivors": len(sites) // 2 + 1 if secure else 0,
        "colluders": 0,
        "epsilon": 8.0,
        "delta": 1e-6,
        "unit": "pid",
        "hospitals": 1,
        "holdout": 0.0,
        "rows": 10,
    }
    some = tuple(stages) if stages is not None else (stage("one", "counts", 0), stage("two", "counts", 1))
    return Plan(mode=mode, sites=tuple(sites), stages=some, **(settings | options))  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Ward:
    """A consortium in a folder, its coordinator's key, and one open guard a site."""

    folder: Path
    plan: Plan
    guards: dict[str, Guard] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    """Every envelope that a guard gave out, in order."""
    mirror: Mirror | None = None
    """The coordinator's copies of the ledgers, over all runs; made with the first start."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Why a site did not begin."""

    def directory(self, site: str) -> Path:
        return self.folder / site

    def guard(self, site: str) -> Guard:
        if site not in self.guards:
            self.guards[site] = Guard(self.directory(site))
        return self.guards[site]

    def kill(self, site: str) -> None:
        """What a crash leaves: the disk. Unwritten lines are lost, locks are let go."""
        guard = self.guards.pop(site, None)
        if guard is not None and guard._ledger is not None:
            guard._ledger._later.clear()
        if guard is not None:
            guard.close()

    def close(self) -> None:
        for site in list(self.guards):
            self.guards.pop(site).close()
        if self.mirror is not None:
            self.mirror.close()
            self.mirror = None

    def start(self, *, run: str = RUN, sites: Sequence[str] | None = None) -> tuple[str, ...]:
        """Hello, witnesses, start, as the coordinator does it; the sites that have begun."""
        identities = {site: key(site).public_key() for site in self.plan.sites}
        if self.mirror is None:
            self.mirror = Mirror(self.folder / "mirror.db", identities)
        self.refusals = {}
        session = Session(
            courier=_Straight(self),
            key=key(COORDINATOR),
            identities=identities,
            mirror=self.mirror,
            timeout_s=60.0,
        )
        session.refusals = self.refusals
        there = self.plan.sites if sites is None else sites
        answered = session.exchange(witnesses.hellos(run, there, self.mirror), "hello")
        return witnesses.start(
            plan=self.plan,
            run=run,
            key=key(COORDINATOR),
            identities=identities,
            mirror=self.mirror,
            exchange=session.exchange,
            answered=answered,
            refusals=self.refusals,
        )

    def say(self, site: str, message: Message) -> Message:
        """One message to a site and its verified reply."""
        envelope = self.guard(site).handle(seal(message, key(COORDINATOR)))
        self.sent.append(envelope)
        return unseal(envelope, key(site).public_key(), sender=site)

    def ask(self, site: str, index: int, query: AnyQuery) -> Message:
        """A release in local mode."""
        return self.say(site, ask_message(RUN, index, query, mirrored=0))

    def exchange(self, messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        replies = {site: self.say(site, message) for site, message in messages.items()}
        return {site: reply for site, reply in replies.items() if reply.kind != "site.refused"}

    def strategy(
        self, *, exchange: Callable[[Mapping[str, Message], str], dict[str, Message]] | None = None
    ) -> Strategy:
        """A started strategy over all sites."""
        given: dict[str, Any] = {"plan": self.plan, "run": RUN, "exchange": exchange or self.exchange}
        given["mirrored"] = lambda site: 0
        made: Strategy
        if self.plan.mode == "local":
            made = LocalNoise(**given)
        else:
            made = SecureSum(**given, identities={site: key(site).public_key() for site in self.plan.sites})
        hello = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
        made.start(self.exchange(dict.fromkeys(self.plan.sites, hello), "hello"))
        return made

    def answer(self, index: int, query: AnyQuery) -> SiteSum:
        return self.strategy().answer(index, self.plan.stage_of(index), query)

    def state(self, site: str, index: int) -> str:
        """What the ledger on disk says."""
        with Ledger.open(self.directory(site) / "ledger.db") as ledger:
            return ledger.state(RUN, str(index))


@dataclass(frozen=True)
class _Straight:
    """A courier without a way between: envelopes from hand to hand."""

    ward: Ward

    def exchange(self, messages: Mapping[str, bytes], **_: Any) -> dict[str, bytes]:
        replies = {site: self.ward.guard(site).handle(envelope) for site, envelope in messages.items()}
        self.ward.sent += replies.values()
        return replies


def policy(site: str, **options: Any) -> Policy:
    settings: dict[str, Any] = {
        "coordinator_key": key(COORDINATOR).public_key().public_bytes_raw().hex(),
        "table": "data.parquet",
        "lifetime_epsilon": 8.0,
        "lifetime_delta": 1e-5,
        "unit": "pid",
        "hospitals": 1,
        "minimum_sites": 1,
        "minimum_colluders": 0,
        "minimum_patients": 0,
        "peers": None,
        "generators": ("mixture",),
        "strategies": ("secure-sum", "local"),
        "evaluation": True,
        "rehearsal": None,
    }
    return Policy(name=site, **(settings | options))


def ward(
    folder: Path,
    agreed: Plan,
    *,
    tables: Mapping[str, pd.DataFrame] | None = None,
    seed: int | None = 1,
    noise: bool = True,
    approved: bool = True,
    started: bool = True,
    **policy_options: Any,
) -> Ward:
    """Make the consortium's directories. seed None: noise from the operating system, as in the field.

    started: the run has begun already, at every site that could say hello; no guard is left open.
    """
    rehearsal = Rehearsal(seed=seed, noise=noise) if seed is not None or not noise else None
    made = Ward(folder=folder, plan=agreed)
    for site in agreed.sites:
        place = made.directory(site)
        place.mkdir(parents=True)
        place.chmod(0o700)
        save_private(key(site), place / "site.key")
        save_public(key("officer of " + site).public_key(), place / "officer.pub")
        policy(site, **({"rehearsal": rehearsal} | policy_options)).save(place / "site.toml")
        Ledger.create(place / "ledger.db", site, key(site), clock=lambda: 0).close()
        mine = table(30, seed=len(site), prefix=site) if tables is None else tables[site]
        mine.to_parquet(place / "data.parquet")
        if approved:
            approve(place, proposal(agreed), key("officer of " + site), check_table=False)
    if approved and started:
        made.start()
        made.close()
        made.sent.clear()
    for site in agreed.sites:
        for path in made.directory(site).iterdir():
            path.chmod(0o700 if path.is_dir() else 0o600)  # as `site init` makes them
    return made


def proposal(agreed: Plan, *, run: str = RUN, signer: str = COORDINATOR) -> bytes:
    identities = {site: key(site).public_key().public_bytes_raw().hex() for site in agreed.sites}
    message = proposal_message(run=run, plan=agreed, identities=identities, schema=schema())
    return seal(message, key(signer))
