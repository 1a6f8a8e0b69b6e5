"""Enough of a container engine to run a service of a compose file for real: buildah's images, crun, namespaces.

What of the compose file is carried out: image, entrypoint, command, user, read_only, tmpfs, cap_drop, cap_add,
no-new-privileges, bind and volume mounts, `network_mode: none`, healthcheck tests; and the default seccomp profile that
engines use. What is not: cgroup limits, `init`, restarts, schedules of health checks, and networks: services that
have one share one network namespace with only a loopback interface, where every service's name is 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SECCOMP = Path("/usr/share/containers/seccomp.json")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*)|:?\?([^}]*))?\}")
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Compose's variables: ${NAME}, ${NAME:-default}, ${NAME:?message}; KeyError for a missing one without default."""

    def value(found: re.Match[str]) -> str:
        name, default, message = found.groups()
        if variables.get(name):
            return variables[name]
        if default is None:
            raise KeyError(f"{name}: {message or 'not set'}")
        return default

    return _VARIABLE.sub(value, text)


def compose(path: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(interpolated(path.read_text(encoding="utf-8"), variables))
    return found


@dataclass(frozen=True, slots=True)
class Buildah:
    """One private storage of images below `home`; removed with it."""

    home: Path
    driver: str

    @classmethod
    def at(cls, home: Path) -> Buildah:
        """With overlay mounts where the file system allows them, else with plain copies (vfs: slow and large)."""
        home.mkdir(parents=True)
        lower, upper, work, on = (home / name for name in ("l", "u", "w", "m"))
        for folder in (lower, upper, work, on):
            folder.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mounted = subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", on], capture_output=True)
        if mounted.returncode == 0:
            subprocess.run(["umount", on], check=True)
        return cls(home, "overlay" if mounted.returncode == 0 else "vfs")

    def __call__(self, *arguments: str | Path, cwd: Path | None = None, before: Sequence[str] = ()) -> str:
        storage = ["--storage-driver", self.driver, "--root", self.home / "root", "--runroot", self.home / "run"]
        done = subprocess.run(
            [*before, "buildah", *storage, *arguments],
            env=os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": self.driver},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    def base(self, rootfs: Path, name: str) -> None:
        container = self("from", "scratch")
        self("add", "--quiet", container, rootfs, "/")
        self("commit", "--quiet", "--rm", "--disable-compression", container, name)

    def build(self, file: Path, *, context: Path, tag: str, base: str) -> None:
        """Without network: in a namespace that has none, because chroot isolation alone would use the machine's."""
        options = ["--pull=never", "--layers", "--force-rm", "--disable-compression", "--format", "docker"]
        ignore = ["--ignorefile", file.with_name(file.name + ".dockerignore")]
        names = ["--build-arg", f"BASE={base}", "--file", file, "--tag", tag]
        self("bud", *options, *ignore, *names, ".", cwd=context, before=["unshare", "--net"])

    def config(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))
        return found

    def close(self) -> None:
        # Every mounted image, and overlay storage's own folder, which is mounted on itself.
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for place in reversed([place for place in mounts if Path(place).is_relative_to(self.home)]):
            subprocess.run(["umount", "--lazy", place], check=True)
        shutil.rmtree(self.home, ignore_errors=True)


def seccomp(capabilities: Sequence[str]) -> dict[str, Any]:
    """The engines' common default profile for these capabilities, as an OCI runtime reads it."""
    profile = json.loads(SECCOMP.read_text(encoding="utf-8"))
    rules = []
    for rule in profile["syscalls"]:
        needs, spares = rule.get("includes") or {}, rule.get("excludes") or {}
        if not set(needs.get("caps", ())) <= set(capabilities) or set(spares.get("caps", ())) & set(capabilities):
            continue
        if ("arches" in needs and "amd64" not in needs["arches"]) or "amd64" in spares.get("arches", ()):
            continue
        kept = {name: rule[name] for name in ("names", "action", "errnoRet") if rule.get(name) is not None}
        rules.append(kept | ({"args": rule["args"]} if rule.get("args") else {}))
    return {
        "defaultAction": profile["defaultAction"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }


@dataclass(kw_only=True)
class Container:
    """One run of a service; `log` holds what it prints."""

    name: str
    log: Path
    service: dict[str, Any]
    cwd: str
    process: subprocess.Popen[bytes]
    pid: int = 0


@dataclass(kw_only=True)
class Engine:
    """Runs services of one compose file. `volumes`: where its named volumes lie; `hosts`: names for 127.0.0.1."""

    buildah: Buildah
    folder: Path
    project: dict[str, Any]
    hosts: Sequence[str] = ()
    network: int = 0  # the process whose network namespace is "the network"
    containers: dict[str, Container] = field(default_factory=dict)
    _count: int = 0

    def run(
        self, service: str, *command: str, variables: Mapping[str, str] | None = None, timeout_s: float = 300
    ) -> str:
        """`compose run --rm SERVICE COMMAND`; its standard output. AssertionError when it fails."""
        made = self._start(service, list(command), variables or {})
        code = made.process.wait(timeout_s)
        text = made.log.read_text(encoding="utf-8", errors="replace")
        assert code == 0, f"{service} {' '.join(command)}: exit code {code}\n{text[-3000:]}"
        return text

    def up(self, service: str, *, timeout_s: float = 300) -> Container:
        """`compose up SERVICE`, and wait until its health check passes."""
        made = self.containers[service] = self._start(service, [], {})
        until = time.monotonic() + timeout_s
        test = made.service["healthcheck"]["test"]
        assert test[0] == "CMD"
        while True:
            assert made.process.poll() is None, f"{service} ended:\n{self.said(service)}"
            done = self.exec(service, *test[1:], check=False)
            if done.returncode == 0:
                return made
            assert time.monotonic() < until, f"{service}: {done.stdout}{done.stderr}\n{self.said(service)}"
            time.sleep(0.5)

    def exec(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`compose exec SERVICE COMMAND`, as the service's user."""
        made = self.containers[service]
        done = self._crun(
            "exec", "--user", made.service["user"], "--cwd", made.cwd, "--no-new-privs", made.name, *command
        )
        assert not check or done.returncode == 0, f"{service} {' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def said(self, service: str) -> str:
        return self.containers[service].log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def stop(self, service: str, *, timeout_s: float = 45) -> int:
        """SIGTERM to its first process, as engines do; its exit code."""
        made = self.containers.pop(service)
        self._crun("kill", made.name, "TERM")
        try:
            return made.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._crun("kill", made.name, "KILL")
            return made.process.wait(10)

    def close(self) -> None:
        for service in reversed(list(self.containers)):
            self.stop(service, timeout_s=10)

    # ---- a bundle -------------------------------------------------------------------------------------------

    def _start(self, service: str, command: Sequence[str], variables: Mapping[str, str]) -> Container:
        wanted = self.project["services"][service]
        self._count += 1
        name = f"{service}-{os.getpid()}-{self._count}"
        bundle = self.folder / name
        bundle.mkdir(parents=True)
        image = self.buildah.config(f"localhost/{wanted['image']}")["Docker"]["config"]
        rootfs = self.buildah("mount", self.buildah("from", "--pull-never", f"localhost/{wanted['image']}"))
        entrypoint = wanted.get("entrypoint") or image["Entrypoint"]
        environment = [*image["Env"], *(f"{key}={value}" for key, value in variables.items())]
        spec = self._spec(wanted, rootfs, bundle)
        spec["process"] |= {
            "args": [*entrypoint, *(command or wanted.get("command") or image["Cmd"])],
            "env": environment,
            "cwd": image["WorkingDir"],
        }
        (bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        log = bundle / "log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                self._command("run", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        made = Container(name=name, log=log, service=wanted, cwd=image["WorkingDir"], process=process)
        until = time.monotonic() + 60
        while not (bundle / "pid").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        made.pid = int((bundle / "pid").read_text()) if (bundle / "pid").exists() else 0
        return made

    def _spec(self, wanted: Mapping[str, Any], rootfs: str, bundle: Path) -> dict[str, Any]:
        assert wanted["cap_drop"] == ["ALL"]
        capabilities = [f"CAP_{name}" for name in wanted.get("cap_add", ())]
        uid, gid = (int(number) for number in wanted["user"].split(":"))
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
        own_network = wanted.get("network_mode") == "none" or not self.network
        path = {} if own_network else {"path": f"/proc/{self.network}/ns/net"}
        (bundle / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self.hosts)))
        return {
            "ociVersion": "1.0.2",
            "root": {"path": rootfs, "readonly": wanted["read_only"]},
            "process": {
                "user": {"uid": uid, "gid": gid},
                "noNewPrivileges": "no-new-privileges:true" in wanted["security_opt"],
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            },
            "hostname": bundle.name[:60],
            "mounts": [*_system_mounts(), *self._mounts(wanted), _bind(bundle / "hosts", "/etc/hosts", read_only=True)],
            "linux": {
                "namespaces": [*namespaces, {"type": "network", **path}],
                "seccomp": seccomp(capabilities),
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
        }

    def _mounts(self, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
        made = []
        for entry in wanted["tmpfs"]:
            target, _, options = entry.partition(":")
            made.append({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options.split(",")})
        for volume in wanted["volumes"]:
            named = volume["type"] == "volume"
            source = self.folder / "volumes" / volume["source"] if named else Path(volume["source"])
            assert source.is_dir(), f"{source} is not there"
            made.append(_bind(source, volume["target"], read_only=volume.get("read_only", False)))
        return made

    def _crun(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command(*arguments), capture_output=True, text=True, timeout=60)

    def _command(self, *arguments: str) -> list[str]:
        # crun refuses machines that have both versions of cgroups; it needs none, so it sees the first one only.
        script = 'umount --lazy /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"'
        crun = ["--root", str(self.folder / "state"), "--cgroup-manager=disabled", *arguments]
        return ["unshare", "--mount", "sh", "-c", script, "crun", *crun]


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    options = ["rbind", "nosuid", "nodev", "ro" if read_only else "rw"]
    return {"destination": target, "type": "bind", "source": str(source), "options": options}


def _system_mounts() -> list[dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*quiet, "mode=1777", "size=65536k"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*quiet, "ro"]},
    ]
