"""A coordinator's folder with enrolled sites, an engine that does as it is told, and hospitals that really answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from consortium import PASSPHRASE, public, supernode
from small import small_study

from cohortium.client.approval import approve
from cohortium.common.errors import PeerUnreachable
from cohortium.common.protocol.messages import digest
from cohortium.common.protocol.signing import generate, save_public
from cohortium.server.conduct import Conductor
from cohortium.server.consortium import Addresses, Consortium
from cohortium.server.register import RunRow
from cohortium.server.runs import RunFolder, drive

SITES = ("site-1", "site-2", "site-3")
PORTS = {"service_port": 7441, "enrol_port": 7442, "fleet_port": 7443, "superlink_port": 7440}


def make(folder: Path, *, identities: Mapping[str, bytes] | None = None) -> Consortium:
    """A consortium with three enrolled sites."""
    addresses = Addresses(host="127.0.0.1", listen="127.0.0.1", **PORTS)
    made = Consortium.create(folder, name="rare-tumours", addresses=addresses, passphrase=PASSPHRASE)
    register = made.register()
    for site in SITES:
        identity = public(site) if identities is None else identities[site]
        officer = public("officer of " + site)
        register.enrol(name=site, role="site", identity=identity, officer=officer, supernode=supernode(site))
    return made


def say_yes(made: Consortium, run: str, *sites: str, declined: bool = False) -> None:
    register = made.register()
    for site in sites or SITES:
        name = digest(register.envelope(run))
        register.approve(run, site, proposal=name, signature=b"x" * 64, declined=declined)


@dataclass(kw_only=True)
class FakeEngine:
    """Flower as the conductor sees it: runs stand as the test says. down: every call fails."""

    down: bool = False
    runs: dict[int, str] = field(default_factory=dict)
    configs: list[dict[str, str]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    die: str = ""
    """Break down inside start_run "before" or "after" Flower took the run."""

    def start_run(self, run_config: Mapping[str, str], /) -> int:
        self._call()
        if self.die == "before":
            raise KeyboardInterrupt
        self.configs.append(dict(run_config))
        name = len(self.configs)
        self.runs[name] = "running"
        if self.die == "after":
            raise KeyboardInterrupt
        return name

    def run_status(self, run_id: int, /) -> str:
        self._call()
        return self.runs[run_id]

    def stop_run(self, run_id: int, /) -> None:
        self._call()
        self.stopped.append(run_id)
        self.runs[run_id] = "finished:stopped"

    def _call(self) -> None:
        if self.down:
            raise PeerUnreachable("SUPERLINK-CALL", "the SuperLink did not answer")


@dataclass(kw_only=True)
class Stage:
    """A conductor with a clock, and what the ServerApp of its run does, by hand."""

    made: Consortium
    engine: FakeEngine = field(default_factory=FakeEngine)
    now: float = 1_000_000.0
    finished: list[str] = field(default_factory=list)
    finish_error: BaseException | None = None
    log: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.register = self.made.register()
        self.register._clock = lambda: self.now
        self.restart()

    def restart(self) -> None:
        """A new conductor, as after a crash of the service: it has the disk and nothing else."""
        self.conductor = Conductor(
            consortium=self.made,
            register=self.register,
            engine=self.engine,
            finish=self._finish,
            clock=lambda: self.now,
            say=lambda run, state, message: self.log.append((state, message)),
        )

    def _finish(self, folder: RunFolder, mirror: Path) -> None:
        if self.finish_error is not None:
            raise self.finish_error
        self.finished.append(folder.root.name)

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.conductor.tick()

    def row(self, run: str) -> RunRow:
        return self.register.run_row(run)

    def folder(self, run: str) -> RunFolder:
        return self.made.folder(run)

    def event(self, run: str, name: str, **facts: object) -> None:
        """A line of the ServerApp."""
        self.folder(run).note(name, **facts)

    def release(self, run: str) -> None:
        """One more answer on disk."""
        answers = self.folder(run).inner / "answers"
        answers.mkdir(parents=True, exist_ok=True)
        (answers / f"{len(list(answers.iterdir())):05d}.npz").write_bytes(b"")

    def fitted(self, run: str) -> None:
        folder = self.folder(run)
        folder.inner.mkdir(exist_ok=True)
        np.savez(folder.inner / "model.npz", header=np.array("{}"))
        folder.note("fitted", run=run)

    def end(self, run: str, how: str = "failed") -> None:
        """Flower's run of this row ends."""
        self.engine.runs[int(self.row(run).flower_id or 0)] = f"finished:{how}"


def study_of(folder: Path) -> Path:
    return small_study(folder)[0]


@dataclass(kw_only=True)
class Field:
    """A consortium whose sites are hospitals of a simulation, to be driven in process."""

    made: Consortium
    sites: Path

    def approve(self, run: str) -> None:
        """Every officer approves, at the site and by the register."""
        envelope = self.made.register().envelope(run)
        for site in SITES:
            directory = self.sites / site
            shutil.rmtree(directory / "approved", ignore_errors=True)
            (directory / "officer.pub").unlink()
            officer = generate()
            save_public(officer.public_key(), directory / "officer.pub")
            approve(directory, envelope, officer, check_table=False)
        say_yes(self.made, run)

    def drive(self, run: str) -> RunFolder:
        """What the ServerApp does, with the sites in this process."""
        from cohortium.simulations import engines

        folder = self.made.folder(run)
        folder.inner.mkdir(exist_ok=True)
        engines.run(
            lambda courier: drive(courier, folder.root),
            sites=[self.sites / site for site in SITES],
            engine=engines.InProcess(),
            log=folder.inner / "flower.log",
        )
        return folder


def in_the_field(folder: Path, prepared: Path) -> Field:
    """The hospitals of a prepared simulation as members of a consortium; the study is prepared/study.toml."""
    facts = json.loads((prepared / "run.json").read_text())
    made = make(folder, identities={site: bytes.fromhex(key) for site, key in facts["public_keys"].items()})
    (made.root / "coordinator.key").unlink()
    shutil.copy2(prepared / "coordinator.key", made.root / "coordinator.key")  # the one that the sites know
    shutil.copytree(prepared / "sites", folder.parent / "hospitals")
    return Field(made=made, sites=folder.parent / "hospitals")
