"""A whole consortium as processes, started by its own commands on loopback, for tests that kill its parts.

    FOLDER/python/          the Python that everything runs with: the tests' own, and kill_trace.py as sitecustomize
    FOLDER/coordinator/     what `consortium init` makes        FOLDER/SITE/  what `site init` makes
    FOLDER/simulated/       tables, and the same study run without interruption

`serve` and the four `site join` are each started again when they end, as a service manager does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import site as python_site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small import small_study

from cohortium.client.loading import ROW_NAMES
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import public_from_raw
from cohortium.server.audit import audit
from cohortium.server.conduct import is_stopped
from cohortium.server.register import Register, RunRow
from cohortium.server.runs import RunFolder
from cohortium.simulations.run import Request, prepare
from cohortium.simulations.run import run as simulate

COMPONENTS = ("guard", "courier", "SuperNode", "SuperLink", "ServerApp", "service")
AT_SITES = ("guard", "courier", "SuperNode")
SEED = 7  # of the hospitals' noise in these rehearsals
ENDED = ("finished", "failed", "void")
PATIENCE_S = 240.0


def own_python(folder: Path) -> Path:
    """A Python with everything that this one has, and the trace; its bin folder holds Flower's commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    shutil.copy(Path(__file__).with_name("kill_trace.py"), packages / "sitecustomize.py")
    (packages / "trace").mkdir()
    places = [
        p for p in [*python_site.getsitepackages(), *sys.path] if Path(p).name in ("site-packages", "dist-packages")
    ]
    lines = [
        p for p in sys.path if p and (Path(p) / "cohortium" / "__init__.py").exists()
    ]  # a copy that is not installed
    lines += [f"import site; site.addsitedir({place!r})" for place in dict.fromkeys(places)]
    (packages / "all.pth").write_text("\n".join(lines) + "\n")
    python = folder / "bin" / "python"
    for name in ("cohortium", "flower-superexec", "flower-superlink", "flower-supernode", "flwr-serverapp"):
        script = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        assert script is not None, f"there is no command {name}"
        _, rest = Path(script).read_text().split("\n", 1)
        (folder / "bin" / name).write_text(f"#!{python}\n{rest}")
        (folder / "bin" / name).chmod(0o755)
    return python


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(kw_only=True)
class Kept:
    """A command that is started again whenever it ends."""

    command: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    stopped: bool = False

    def look(self) -> None:
        if not self.stopped and (self.process is None or self.process.poll() is not None):
            with open(self.log, "ab") as out:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment
                )
            self.starts += 1

    def stop(self) -> None:
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def gone(self) -> None:
        if self.process is not None:
            try:
                self.process.wait(45)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended. dropped: release -> sites that were left out of it, where any were. drawn: what the guards
    let out. problems: what must not be, in words; none of it is good."""

    state: str
    message: str
    same: bool
    dropped: dict[str, list[str]]
    drawn: int
    tries: int
    problems: list[str]

    @property
    def how(self) -> str:
        if self.problems:
            return "BROKEN"
        if self.state == "finished":
            return "same hash" if self.same else "finished, sites dropped"
        return f"clean {self.state}"


@dataclass(kw_only=True)
class Whole:
    """The consortium. start() first, then propose(), then wait(); stop() in every case."""

    folder: Path
    sites: tuple[str, ...] = ("site-1", "site-2", "site-3", "site-4")
    survivors: int = 4
    study_options: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._names: dict[str, str] = {}

    # ---- start and stop -------------------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        return self.folder / "coordinator" / "try"

    @property
    def trace(self) -> Path:
        return next((self.folder / "python" / "lib").glob("python*/site-packages/trace"))

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._python = own_python(self.folder / "python")
        options: dict[str, Any] = {"generator": "mixture", "survivors": self.survivors, **self.study_options}
        self.study, self.table = small_study(self.folder / "study", **options)
        first = self.folder / "tables"
        prepare(Request(study=self.study, table=self.table, split=f"iid:{len(self.sites)}", out=first, seed=SEED))
        (self.folder / "coordinator").mkdir(mode=0o700)
        passphrase = self.folder / "coordinator" / "passphrase"
        passphrase.write_text("words that open the root key")
        passphrase.chmod(0o600)
        ports = free_ports(4)
        named = ("--superlink-port", "--service-port", "--enrol-port", "--fleet-port")
        given = [str(word) for pair in zip(named, ports, strict=True) for word in pair]
        self.command(
            *("consortium", "init", str(self.root), "--name", "try", "--host", "127.0.0.1"),
            *("--passphrase-file", str(passphrase), *given),
        )
        self._keep("service", "serve", str(self.root))
        keeper = threading.Thread(target=self._look, daemon=True)
        keeper.start()
        for site in self.sites:
            (self.folder / site).mkdir(mode=0o700)
            shutil.copy(first / "sites" / site / "data.parquet", self.folder / site / "data.parquet")
        self._wait_for("service", "ready")
        self._at_each(lambda s: ["sites", "invite", str(self.root), s, "--out", str(self.folder / s / "invitation")])
        self._at_each(self._init)
        for site in self.sites:
            self._keep(site, "site", "join", str(self.folder / site / "site"))
        for site in self.sites:
            self._wait_for(site, "ready: ")

    def _init(self, site: str) -> list[str]:
        home = self.folder / site
        return [
            *("site", "init", str(home / "site"), "--invitation", str(home / "invitation")),
            *("--table", str(home / "data.parquet"), "--lifetime-epsilon", "100000", "--lifetime-delta", "0.0009"),
            *("--unit", "id", "--hospitals", "1", "--minimum-sites", "1", "--minimum-colluders", "0"),
            *("--minimum-patients", "1", "--generator", "mixture", "--generator", "joined"),
            *("--strategy", "secure-sum", "--evaluation", "--rehearsal-seed", str(SEED)),
        ]

    def _environment(self) -> dict[str, str]:
        made = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        made |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        return made | {"PATH": f"{self._python.parent}{os.pathsep}{made['PATH']}", "NO_COLOR": "1", "COLUMNS": "200"}

    def _start(self, *words: str) -> subprocess.Popen[str]:
        command = [str(self._python.parent / "cohortium"), *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._environment()
        )

    def command(self, *words: str, code: int = 0) -> str:
        """The output of one command, which must end with `code`."""
        started = self._start(*words)
        said, _ = started.communicate(timeout=180)
        assert started.returncode == code, f"{' '.join(words)}: {started.returncode}\n{said}"
        return said

    def _at_each(self, words: Callable[[str], list[str]]) -> None:
        """A command for each site, side by side."""
        running = {site: self._start(*words(site)) for site in self.sites}
        for site, process in running.items():
            said, _ = process.communicate(timeout=180)
            assert process.returncode == 0, f"{site}: {said}"

    def _keep(self, name: str, *words: str) -> None:
        kept = Kept(
            command=[str(self._python.parent / "cohortium"), *words],
            log=self.folder / f"{name}.log",
            environment=self._environment(),
        )
        kept.look()
        self.kept[name] = kept

    def _look(self) -> None:
        while not self._over.wait(0.5):
            for kept in list(self.kept.values()):
                kept.look()

    def _wait_for(self, name: str, word: str) -> None:
        kept, until = self.kept[name], time.monotonic() + PATIENCE_S
        while word not in kept.log.read_text():
            assert time.monotonic() < until, f"no {word!r} of {name}:\n{kept.log.read_text()}"
            time.sleep(0.1)

    def stop(self) -> None:
        self._over.set()
        for kept in reversed(self.kept.values()):
            kept.stop()
        for kept in self.kept.values():
            kept.gone()
        until = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ---- processes ------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that runs with this consortium's Python."""
        found, mine = {}, str(self.folder / "python" / "bin")
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if words.startswith(mine):
                        found[int(entry.name)] = words
        return found

    def pids(self, component: str, site: str = "") -> list[int]:
        """Of a component now; none while it is away. site: whose, for those that each site has."""
        if component == "service":
            process = self.kept["service"].process
            return [process.pid] if process is not None and process.poll() is None else []
        home = str(self.folder / site / "site")
        words = {
            "guard": ("cohortium.client.guard_service", f"{home}/guard"),
            "courier": ("cohortium.client.courier", f"{home}/courier"),
            "SuperNode": ("cohortium.client.supernode", f"{home}/courier"),
            "SuperLink": ("cohortium.server.superlink",),
            "ServerApp": ("flwr-serverapp",),
        }[component]
        return [pid for pid, line in self.processes().items() if all(word in line for word in words)]

    def there(self, component: str, site: str = "", *, within_s: float = 60.0) -> bool:
        """Wait for a part that an earlier kill took away; whether it is there."""
        until = time.monotonic() + within_s
        while not self.pids(component, site) and time.monotonic() < until:
            time.sleep(0.05)
        return bool(self.pids(component, site))

    def kill(self, component: str, site: str = "") -> int:
        """SIGKILL, and wait until it is gone; how many processes that were (0: there was none at this moment)."""
        pids = self.pids(component, site)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while set(pids) & set(self.processes()) and time.monotonic() < until:
            time.sleep(0.01)
        return len(pids)

    # ---- runs -----------------------------------------------------------------------------------------------

    def propose(self, seed: int) -> str:
        """A run that all sites approved."""
        said = self.command("run", str(self.root), str(self.study), "--seed", str(seed), "--yes", "--detach", "--json")
        run = str(json.loads(said[said.index("{") :])["run"])
        self._at_each(lambda site: ["site", "approve", str(self.folder / site / "site"), run, "--yes"])
        return run

    def row(self, run: str) -> RunRow:
        register = Register(self.root / "register.db")
        try:
            return register.run_row(run)
        finally:
            register.close()

    def run_folder(self, run: str) -> RunFolder:
        return RunFolder(root=self.root / "runs" / run)

    def held(self, run: str) -> bool:
        return is_stopped(self.row(run))

    def ended(self, run: str) -> bool:
        row = self.row(run)
        return row.state in ENDED or is_stopped(row)

    def wait(self, run: str, *, timeout_s: float = PATIENCE_S) -> bool:
        until = time.monotonic() + timeout_s
        while not self.ended(run):
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    # ---- what must hold -------------------------------------------------------------------------------------

    def reference(self, seed: int) -> dict[str, bytes]:
        """The model of the same run without interruption: in process, from the same tables and the sites' seed."""
        out = self.folder / f"simulated-{seed}"
        if not out.exists():
            split = f"iid:{len(self.sites)}"
            prepare(Request(study=self.study, table=self.table, split=split, out=out, seed=seed))
            for site in self.sites:
                policy, table = out / "sites" / site / "site.toml", self.folder / site / "data.parquet"
                policy.write_text(policy.read_text().replace(f"seed = {seed}\n", f"seed = {SEED}\n"))
                shutil.copy(table, out / "sites" / site / "data.parquet")
                (out / "sites" / site / ROW_NAMES).unlink()  # of the table that this one takes the place of
            simulate(out)
        return arrays(RunFolder(root=out))

    def site_book(self, site: str) -> Book:
        """A site's ledger as it lies there, chain and signatures verified."""
        keys = {m.name: m.identity for m in self._members()}
        ledger = Ledger.open(self.folder / site / "site" / "guard" / "ledger.db")
        try:
            return chain.replay(ledger.lines(), owner=site, public=public_from_raw(keys[site]))[0]
        finally:
            ledger.close()

    def _members(self) -> Sequence[Any]:
        register = Register(self.root / "register.db")
        try:
            return register.members()
        finally:
            register.close()

    def traced(self, name: str, run: str) -> list[dict[str, Any]]:
        path = self.trace / name
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["run"] == run]

    def unpaid(self, run: str) -> list[str]:
        """Whatever a guard let out and whatever the ServerApp got, each site's ledger has charged."""
        found = []
        books = {site: self.site_book(site) for site in self.sites}
        for line in self.traced("left.jsonl", run):
            if (run, line["index"]) not in books[line["site"]].entries:
                found.append(f"{line['site']} let release {line['index']} out and did not charge it")
        for line in self.traced("points.jsonl", run):
            if line["when"] == "after" and line["label"].endswith("/mask"):
                for site in line["sites"]:
                    index = line["label"].split("/")[0]
                    entry = books[site].entries.get((run, index))
                    if entry is None or entry.state not in ("SEALED", "UNMASKED", "RELEASED"):
                        state = "no line" if entry is None else entry.state
                        found.append(f"{site} answered release {index}, and its ledger says {state}")
        return found

    def end(self, run: str, seed: int) -> End:
        """Judge a run that ended."""
        row, folder = self.row(run), self.run_folder(run)
        problems = self.unpaid(run)
        study_ledger = folder.inner / "ledger.db"
        entries = {}
        if study_ledger.exists():
            ledger = Ledger.open(study_ledger)
            try:
                book = chain.replay(ledger.lines(), owner="coordinator", public=folder.key().public_key())[0]
                entries = {int(entry.release): entry.state for entry in book.entries.values()}
            finally:
                ledger.close()
        dropped = {}
        for path in sorted((folder.inner / "answers").glob("*.npz")):
            index = int(path.stem)
            if index not in entries:
                problems.append(f"release {index} is on disk and not in the study's ledger")
        for event in folder.events():
            if event["event"] == "release" and event["dropped"]:
                dropped[str(event["index"])] = event["dropped"]
        same = False
        if row.state == "finished":
            if sorted(entries) != list(range(folder.plan().releases)) or set(entries.values()) != {"RELEASED"}:
                problems.append(f"the study's ledger holds {entries}")
            report = audit(folder.root)
            problems += [f"audit: {check.name}: {check.detail}" for check in report.checks if not check.ok]
            same = arrays(folder) == self.reference(seed)
            if not same and not dropped:
                problems.append("another model, although no site was left out of any release")
        elif row.state not in ENDED:
            problems.append(f"the run is {row.state}: {row.message}")
        elif "spent" not in row.message.lower():
            problems.append(f"the end does not say what was spent: {row.message}")
        return End(
            state=row.state,
            message=row.message,
            same=same,
            dropped=dropped,
            drawn=len(self.traced("left.jsonl", run)),
            tries=row.attempts,
            problems=problems,
        )


def arrays(folder: RunFolder) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in folder.model().to_arrays()[0].items()}
