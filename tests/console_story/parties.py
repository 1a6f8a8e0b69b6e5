"""A coordinator and four hospitals as processes of their own on this machine, started and stopped by a test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

COMMAND = Path(sys.executable).parent / "cohortium"
PASSPHRASE = "words that open the root key"
HERE = Path(str(resources.files("cohortium.simulations")))
SITES = {"budapest": "Budapest", "cleveland": "Cleveland", "long-beach": "Long Beach", "zurich": "Zurich/Basel"}


def free_ports(many: int) -> list[int]:
    """Ports of the loopback interface that are free now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(many)]
    found = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return found


def wait_for(what: Callable[[], Any], told: str, *, seconds: float = 60.0) -> Any:
    """The first true answer; AssertionError with `told` when the time is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:.0f} s for {told}")


@dataclass(kw_only=True)
class Parties:
    """Folders and processes. Everything started is stopped at the end, by its process id."""

    folder: Path
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def consortium(self) -> Path:
        return self.folder / "heart"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def site(self, name: str) -> Path:
        return self.folder / name / "site"

    def command(self, *words: str | Path, given: dict[str, str] | None = None) -> str:
        """A command's stdout; a failure shows what it said."""
        done = subprocess.run(
            [COMMAND, *map(str, words)], env=environment(given), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        """A process that stays, with its output in NAME.log, in a group of its own."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [COMMAND, *map(str, words)],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.running[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def ready(self, name: str) -> None:
        def looked() -> bool:
            assert self.running[name].poll() is None, self.log(name)
            return "ready" in self.log(name)

        wait_for(looked, f"{name} to be ready:\n{self.log(name)}", seconds=90)

    def cut(self, name: str) -> None:
        """Kill a party with all its processes, as a power cut does."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    # ---- steps that have no page ----------------------------------------------------------------------------

    def found_consortium(self) -> None:
        """An empty installation: a consortium without members, and nobody who may sign in."""
        service, enrol, fleet, superlink = free_ports(4)
        self.command(
            *("consortium", "init", self.consortium, "--name", "heart", "--host", "127.0.0.1"),
            *("--passphrase", "env:ROOT_WORDS", "--service-port", str(service), "--enrol-port", str(enrol)),
            *("--fleet-port", str(fleet), "--superlink-port", str(superlink)),
            given={"ROOT_WORDS": PASSPHRASE},
        )
        text = (self.consortium / "consortium.toml").read_text()
        (self.consortium / "consortium.toml").write_text(
            text.replace("answer_timeout_s = 600", "answer_timeout_s = 20")
        )
        (self.consortium / "console.toml").write_text(f"[console]\nport = {self.port}\n")

    def join(self, name: str, invitation: bytes) -> None:
        """What a hospital's IT does with the invitation that it was sent: two commands."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        (home / "invitation").write_bytes(invitation)
        rows = pd.read_parquet(HERE / "data" / "heart.parquet")
        rows[rows["hospital"] == SITES[name]].to_parquet(home / "data.parquet", index=False)
        self.command(
            *("site", "init", self.site(name), "--invitation", home / "invitation", "--table", home / "data.parquet"),
            *("--lifetime-epsilon", "9", "--lifetime-delta", "1e-6", "--unit", "patient", "--hospitals", "1"),
            *("--minimum-sites", "4", "--minimum-colluders", "1", "--minimum-patients", "50", "--generator", "joined"),
            *("--strategy", "secure-sum", "--evaluation", "--officer-passphrase", "env:OFFICER"),
            given={"OFFICER": officer_words(name)},
        )
        self.start(name, "site", "join", self.site(name))

    def run_row(self, run: str) -> dict[str, Any]:
        found = json.loads(self.command("watch", self.consortium, run, "--json"))
        return dict(found[0] if isinstance(found, list) else found)


def officer_words(site: str) -> str:
    return f"the officer of {site} says so"


def environment(given: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(given or {})}


@contextmanager
def parties(folder: Path) -> Iterator[Parties]:
    made = Parties(folder=folder, port=free_ports(1)[0])
    made.found_consortium()
    try:
        yield made
    finally:
        made.end()
