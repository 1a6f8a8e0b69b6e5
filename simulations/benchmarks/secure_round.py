"""A whole secure-sum round over five in-process sites against the sum of its parts.

The round is everything between a generator's question and its answer: strategy, envelopes, Flower's messages, guards,
ledgers, mirror, the answer on disk. The parts are what cannot be left out, each run by itself on the same data:
clipped sums, noise, the protocol's state machines, seal and unseal of every message, the ledgers' lines and their
mirror, the vault's writes. What is left is glue, and glue may cost half as much again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.client.guard import open_guard
from cohortium.client.loading import ROW_NAMES
from cohortium.client.records import records
from cohortium.client.sources.base import read
from cohortium.client.vault import Vault
from cohortium.common.encoding import Records, grids
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy.budget import rate_of
from cohortium.common.privacy.entropy import Keystream, Material, patient_uniforms
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.privacy.release import lattice_noise
from cohortium.common.protocol.channels import Directory, open_channel
from cohortium.common.protocol.fixedpoint import from_ring, to_ring
from cohortium.common.protocol.messages import Message, digest, seal, unseal
from cohortium.common.protocol.round_messages import RoundParams
from cohortium.common.protocol.secure_sum import ServerRound, SiteRound
from cohortium.common.protocol.signing import generate, load_private, public_from_raw
from cohortium.common.queries import Gradient
from cohortium.common.study import Study
from cohortium.server import witnesses
from cohortium.server.asking import FederatedAsk
from cohortium.server.mirror import Mirror
from cohortium.server.planning import plan_for
from cohortium.server.runs import RunFolder
from cohortium.server.session import Session
from cohortium.server.transport import GridCourier
from cohortium.simulations import engines
from cohortium.simulations.benchmarks.tables import made_up, write_study
from cohortium.simulations.benchmarks.timing import Figure
from cohortium.simulations.run import Request, build
from cohortium.simulations.worlds import split
from cohortium.strategies.base import COORDINATOR, ask_message
from cohortium.strategies.secure_sum import SecureSum

SITES = 5
PATIENTS = 2000
RATE = 0.25
SIZES = (
    (15, 16),
    (40, 64),
    (100, 128),
)  # (bins of a column, hidden units): about 5, 50 and 250 thousand parameters
LIMIT = 1.5


def figures(*, repeats: int = 15) -> Iterator[Figure]:
    for bins, hidden in SIZES:
        yield measure(bins, hidden, repeats=repeats)


def measure(bins: int, hidden: int, *, repeats: int) -> Figure:
    """CPU seconds of rounds and of parts, which take turns."""
    with tempfile.TemporaryDirectory() as name:
        world = _world(Path(name), bins, hidden, repeats + 2)
        box: list[Figure] = []
        engines.run(
            lambda courier: box.append(_compare(courier, world, repeats)),
            sites=[world.out / "sites" / site for site in world.plan.sites],
            engine=engines.InProcess(),
            log=world.out / "run" / "flower.log",
            opener=open_guard,
        )
        return box[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    out: Path
    plan: Plan
    query: Gradient


def _world(folder: Path, bins: int, hidden: int, rounds: int) -> _World:
    """Five hospitals whose officers approved a plan of nothing but gradient rounds."""
    path = write_study(folder, rows=PATIENTS, sites=SITES)
    study = Study.load(path)
    worlds = split(made_up(PATIENTS), f"iid:{SITES}", unit=study.privacy.unit)
    made = grids(study.schema)
    network = Nade({"kind": "nade", "bins": [bins] * len(made), "hidden": hidden})
    stage = Stage(
        name="train",
        purpose="gradients",
        kind="gradient",
        part="train",
        first=0,
        repeats=rounds,
        rate=rate_of(RATE),
        noise_multiplier=20.0,
        max_dim=network.size,
    )
    plan = replace(plan_for(study, sorted(worlds))[0], stages=(stage,))
    request = Request(study=path, table=folder / "none", split=f"iid:{SITES}", out=folder / "out", seed=None)
    request.out.mkdir()
    build(request, study, plan, worlds)
    start = network.start(tuple(np.full(bins, 1.0 / bins) for _ in made), seed=1)
    maps = tuple(np.arange(grid.size, dtype=np.int32) % bins for grid in made)
    query = Gradient(network=network.spec, maps=maps, parameters=start, clip_norm_l2=1.0)
    return _World(out=request.out, plan=plan, query=query)


def _compare(courier: GridCourier, world: _World, repeats: int) -> Figure:
    with _asking(courier, world) as ask, tempfile.TemporaryDirectory() as spare:
        parts = _Parts(world, Path(spare))
        whole: list[float] = []
        each: dict[str, list[float]] = {}
        for turn in range(repeats + 2):
            started = time.process_time()
            ask()
            took = time.process_time() - started
            costs = parts.run(turn)
            if turn >= 2:
                whole.append(took)
                for name, seconds in costs.items():
                    each.setdefault(name, []).append(seconds)
    typical = {name: median(seconds) for name, seconds in each.items()}
    total = sum(typical.values())
    return Figure(
        name=f"secure-sum-{world.query.dim}",
        unit="×",
        value=median(whole) / total,
        limit=LIMIT,
        what=f"whole secure-sum round of {world.query.dim} numbers, {SITES} sites, over the sum of its parts",
        details={
            "round_ms": 1e3 * median(whole),
            "parts_ms": 1e3 * total,
            **{f"{name}_ms": 1e3 * seconds for name, seconds in typical.items()},
        },
    )


@contextmanager
def _asking(courier: GridCourier, world: _World) -> Iterator[Callable[[], object]]:
    """The coordinator up to its first question, as server/runs.drive does it."""
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
        courier.discover(world.plan.sites, timeout_s=60.0)
        answered = session.exchange(witnesses.hellos(run, world.plan.sites, mirror), "hello")
        witnesses.start(
            plan=world.plan,
            run=run,
            key=key,
            identities=identities,
            mirror=mirror,
            exchange=session.exchange,
            answered=answered,
            refusals=session.refusals,
        )
        strategy = SecureSum(
            plan=world.plan,
            run=run,
            identities=identities,
            exchange=session.exchange,
            mirrored=mirror.size,
            notebook=folder.inner / "notebook",
        )
        strategy.start(answered)
        ask = FederatedAsk(
            plan=world.plan,
            run=run,
            strategy=strategy,
            ledger=ledger,
            folder=folder.inner / "answers",
            on_release=lambda facts: None,
        )

        def once() -> object:
            answer = ask("train", world.query)
            assert answer.sites == SITES, session.refusals
            return answer

        yield once


class _Parts:
    """What a round cannot do without, one after the other, with its own keys, ledgers and vaults."""

    def __init__(self, world: _World, folder: Path) -> None:
        self._query, self._plan, self._folder = world.query, world.plan, folder
        study = Study.load(world.out / "study.toml")
        self._server_key = load_private(world.out / "coordinator.key")
        self._keys: dict[str, Ed25519PrivateKey] = {site: generate() for site in world.plan.sites}
        self._records: dict[str, Records] = {}
        for site in world.plan.sites:
            directory = world.out / "sites" / site
            table = read(directory / "data.parquet")
            table.index = np.load(directory / ROW_NAMES)
            self._records[site] = records(study.schema, table, unit=study.privacy.unit)
        self._ledgers = {s: Ledger.create(folder / s / "ledger.db", s, self._keys[s]) for s in self._keys}
        self._vaults = {site: Vault(folder / site / "vault.db") for site in self._keys}
        self._mirror = Mirror(folder / "mirror.db", {site: key.public_key() for site, key in self._keys.items()})
        self._study = Ledger.create(folder / "study.db", COORDINATOR, self._server_key)
        opened = {
            site: open_channel(run_id="run", site=site, identity=key, entropy=Material(bytes([at]) * 32))
            for at, (site, key) in enumerate(self._keys.items())
        }
        self._channels = {site: private for site, (private, _) in opened.items()}
        self._directory = Directory.verified(
            run_id="run",
            identities={s: k.public_key() for s, k in self._keys.items()},
            keys=[public for _, public in opened.values()],
        )

    def run(self, turn: int) -> dict[str, float]:
        """CPU seconds of each part."""
        costs: dict[str, float] = {}

        @contextmanager
        def part(name: str) -> Iterator[None]:
            started = time.process_time()
            yield
            costs[name] = costs.get(name, 0.0) + time.process_time() - started

        plan, query = self._plan, self._query
        params = RoundParams(
            run_id="run",
            round=turn,
            sites=plan.sites,
            survivors=plan.survivors,
            colluders=plan.colluders,
            dim=query.dim,
        )
        mechanism = plan.stages[0].mechanism(shares=plan.shares)
        sigma = mechanism.noise_multiplier * query.sensitivity_l2 / query.lattice / plan.shares**0.5
        server = ServerRound(params=params, directory=self._directory)
        rounds = {
            site: SiteRound(
                params=params,
                site=site,
                identity=self._keys[site],
                channel=self._channels[site],
                directory=self._directory,
            )
            for site in plan.sites
        }
        for site, round_ in rounds.items():
            with part("protocol"):
                said = round_.prepare(Material(np.random.default_rng(turn).bytes(32)))
                server.add_prepared(said)
            with part("envelopes"):
                self._carry(said.to_message(), site)
        rosters = server.roster()
        for site, round_ in rounds.items():
            with part("ledger"):
                self._ledgers[site].reserve(
                    run="run",
                    release_id=str(turn),
                    event=mechanism.event,
                    count=1,
                    plan_digest=plan.digest,
                    purpose="train",
                )
            roster = rosters[site].to_message()
            with part("envelopes"):
                asked = ask_message(
                    "run",
                    turn,
                    query,
                    mirrored=0,
                    extra={"roster": roster.fields},
                    extra_blobs={f"roster/{peer}": blob for peer, blob in roster.blobs.items()},
                )
                unseal(seal(asked, self._server_key), self._server_key.public_key(), sender=COORDINATOR)
            with part("gradient"):
                rows = self._records[site]
                chosen = patient_uniforms(bytes(32), rows.identity) < np.uint64(mechanism.rate)
                units = query.contribution(rows, chosen).units
            with part("noise"):
                units = units + lattice_noise(Keystream(bytes(32)), sigma_units=sigma, size=query.dim)
            with part("masks"):
                masked = round_.mask(rosters[site], to_ring(units, parties=SITES))
            with part("envelopes"):
                envelope = seal(masked.to_message(), self._keys[site])
                unseal(envelope, self._keys[site].public_key(), sender=site)
            with part("vault"):
                self._vaults[site].put({"sealed": envelope, f"round/{turn}": round_.to_state()})
            with part("ledger"):
                self._ledgers[site].advance("run", str(turn), "SEALED", digest=digest(envelope))
            with part("server"):
                server.add_masked(masked)
        chosen_set = server.survivors()
        for site, round_ in rounds.items():
            with part("envelopes"):
                self._carry(chosen_set.to_message(), None)
            with part("protocol"):
                vote = round_.sign_survivors(chosen_set)
                server.add_vote(vote)
            with part("ledger"):
                self._ledgers[site].advance("run", str(turn), "UNMASKED", digest=vote.ballot)
            with part("vault"):
                self._vaults[site].put({f"round/{turn}": round_.to_state()})
            with part("envelopes"):
                self._carry(vote.to_message(), site)
        request = server.reveal_request()
        for site, round_ in rounds.items():
            with part("envelopes"):
                self._carry(request.to_message(), None)
            with part("protocol"):
                revealed = round_.reveal(request)
                server.add_revealed(revealed)
            with part("vault"):
                self._vaults[site].put({f"round/{turn}": round_.to_state(), f"round/{turn - 1}": None})
            with part("ledger"):
                self._ledgers[site].advance("run", str(turn), "RELEASED", later=True)
                self._ledgers[site].flush()
                lines = [line.to_json() for line in self._ledgers[site].lines(self._mirror.size(site))]
            with part("mirror"):
                self._mirror.receive(site, lines)
            with part("envelopes"):
                self._carry(revealed.to_message(), site)
        with part("server"):
            total = from_ring(server.sum())
        with part("study"):
            with open(self._folder / "answer.npz", "wb") as file:
                np.savez(file, values=total)
            self._study.reserve(
                run="run",
                release_id=str(turn),
                event=mechanism.event,
                count=1,
                plan_digest=plan.digest,
                purpose="train",
            )
            self._study.advance("run", str(turn), "SEALED", digest=digest(total.tobytes()))
            self._study.advance("run", str(turn), "RELEASED", later=True)
        return costs

    def _carry(self, message: Message, site: str | None) -> None:
        key = self._server_key if site is None else self._keys[site]
        unseal(seal(message, key), key.public_key(), sender=COORDINATOR if site is None else site)
