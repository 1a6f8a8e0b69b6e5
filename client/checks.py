"""`cohortium site check`: everything that a round needs, asked before a round needs it. Nothing leaves.

Each check is a function from the site to one line: what was found, what is wrong, what to do. A check that cannot be
made (no proposal yet, another user's directory) says so and does not count as passed or failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import pwd
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cohortium.client import calls
from cohortium.client.approval import approvals, load_approved
from cohortium.client.inspection import account, read_charges, was_rehearsed
from cohortium.client.policy import Policy
from cohortium.client.reach import look
from cohortium.client.site import COURIER_SECRETS, GUARD_SECRETS, Site
from cohortium.common.errors import CohortiumError
from cohortium.common.modes import too_open
from cohortium.common.privacy.ledger import CLOCK_SLACK_S, Ledger
from cohortium.common.proposals import read_proposal
from cohortium.common.protocol.certificates import CLIENT, check_chain, expires, fits, load_chain, renew_at
from cohortium.common.protocol.signing import load_private, public_from_raw
from cohortium.common.schema import Schema

Word = Literal["ok", "warn", "fail", "skip"]
FREE_BYTES = 1_000_000_000
FLWR = "1.41."
NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "lustre", "glusterfs", "ceph")
PACKAGES = ("cohortium", "flwr", "torch", "cryptography", "grpcio", "pyarrow", "dp-accounting")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    word: Word
    result: str
    problem: str = ""
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        shown = ("name", "word", "result", "problem", "fix")
        return {("check" if name == "name" else name): getattr(self, name) for name in shown}


def ok(name: str, result: str) -> Check:
    return Check(name=name, word="ok", result=result)


def fail(name: str, result: str, problem: str, fix: str) -> Check:
    return Check(name=name, word="fail", result=result, problem=problem, fix=fix)


def warn(name: str, result: str, problem: str, fix: str) -> Check:
    return Check(name=name, word="warn", result=result, problem=problem, fix=fix)


def skip(name: str, why: str) -> Check:
    return Check(name=name, word="skip", result=why)


def run_checks(site: Site, *, dictionary: Path | None = None, network: bool = True) -> list[Check]:
    """All checks, in the order in which a person would repair things.

    dictionary: hold the table against this file; else against every approved proposal. network: look at the ports.
    """
    return [one for found in each_check(site, dictionary=dictionary, network=network) for one in found]


def each_check(site: Site, *, dictionary: Path | None = None, network: bool = True) -> Iterator[list[Check]]:
    """The same, one step after the other, for whoever wants to watch; a step has one check or more."""
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("policy", lambda: [check_policy(site)]),
        ("files and modes", lambda: [check_modes(site)]),
        ("users", lambda: [check_users(site)]),
        ("keys", lambda: [check_keys(site)]),
        ("ledger", lambda: [check_ledger(site)]),
        ("witnesses", lambda: [check_witness(site)]),
        ("certificate", lambda: [check_certificate(site)]),
        ("clock", lambda: [check_clock(site)]),
        ("data", lambda: check_data(site, dictionary, network=network)),
        ("approvals", lambda: [check_approvals(site)]),
        ("disk", lambda: [check_disk(site)]),
        ("file system", lambda: [check_filesystem(site)]),
        ("versions", lambda: [check_versions()]),
        ("GPU", lambda: [check_gpu()]),
    ]
    if network:
        steps.insert(8, ("ports", lambda: check_ports(site)))
    for name, step in steps:
        try:
            found = step()
        except CohortiumError as error:
            found = [fail(name, error.code, error.sentence + _places(error), error.hint)]
        except PermissionError:
            found = [skip(name, "this user may not look: run the command as the site's owner")]
        except OSError as error:
            found = [fail(name, "cannot be checked", error.strerror or type(error).__name__, "is the disk sound?")]
        yield found


def _places(error: CohortiumError) -> str:
    return f" ({'; '.join(error.where)})" if error.where else ""


# ---- the site itself ----------------------------------------------------------------------------------------


def check_policy(site: Site) -> Check:
    policy = site.policy()
    cap = f"lifetime cap ε = {policy.lifetime_epsilon:g} at δ = {policy.lifetime_delta:g}"
    if policy.rehearsal is not None:
        return warn(
            "policy",
            cap,
            "[rehearsal]: whoever knows the seed can take the noise away; nothing from here is private",
            "for real patients make a new site without --rehearsal-seed",
        )
    if policy.peers is None:
        return warn(
            "policy",
            cap,
            "no [policy] peers: any site that the coordinator names is accepted",
            "compare fingerprints by telephone, then: cohortium site approve DIR RUN --pin-peers",
        )
    return ok("policy", f"{cap}; {len(policy.peers)} known sites")


def check_modes(site: Site) -> Check:
    private = [site.guard, site.courier, site.officer, site.officer / "officer.key"]
    private += [site.guard / name for name in GUARD_SECRETS] + [site.courier / name for name in COURIER_SECRETS]
    seen, others = 0, []
    for path in private:
        if not os.path.lexists(path):
            continue
        if path in private[:3] and _of_another(path):  # guard and courier are two users: each looks after its own
            others.append(path.name)
            continue
        seen += 1
        found = too_open(path)
        if found is not None:
            return fail("files and modes", found.code, f"{path}: {found.sentence}", found.hint)
    if os.path.lexists(site.run) and not _of_another(site.run):
        found = too_open(site.run, group=True)
        if found is not None:
            return fail("files and modes", found.code, f"{site.run}: {found.sentence}", found.hint)
    guards = (site.policy_path, site.guard / "ledger.db")
    missing = [] if site.guard.name in others else [path.name for path in guards if not path.exists()]
    if missing:
        return fail("files and modes", "missing", f"SITE/guard lacks {', '.join(missing)}", "restore it, or init anew")
    more = f"; another user's: {', '.join(others)}" if others else ""
    return ok("files and modes", f"{seen} keys and directories, all closed to others{more}")


def _of_another(path: Path) -> bool:
    """Whether a place belongs to another user and is closed to this one, as two users' places should be."""
    status = os.lstat(path)
    return os.geteuid() not in (0, status.st_uid) and status.st_uid != 0 and not status.st_mode & 0o007


def check_users(site: Site) -> Check:
    owners = {place.name: os.stat(place).st_uid for place in (site.guard, site.courier) if place.exists()}
    names = {place: _user_name(uid) for place, uid in owners.items()}
    if len(owners) < 2:
        return ok("users", f"{', '.join(f'{place}: {name}' for place, name in names.items())}; the other is elsewhere")
    if len(set(owners.values())) == 2:
        if 0 in owners.values():
            return fail("users", f"{names}", "one of the two runs as root", "--guard-user and --courier-user at join")
        return ok("users", f"guard: {names['guard']}, courier: {names['courier']}")
    return warn(
        "users",
        f"guard and courier: {next(iter(names.values()), '?')}",
        "one user owns both: a broken courier could read records and keys",
        "as root: cohortium site join DIR --guard-user U --courier-user V, or two containers",
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def check_keys(site: Site) -> Check:
    policy = site.policy()
    key = load_private(site.guard / "site.key")
    with Ledger.open(site.guard / "ledger.db") as ledger:
        if ledger.public_key != key.public_key().public_bytes_raw().hex():
            return fail("keys", "site.key", "the ledger belongs to another key", "finish it: cohortium site rotate DIR")
        if ledger.owner != policy.name:
            return fail("keys", "site.toml", "the ledger is of another site", "correct [site] name")
    if site.settings_path.exists():
        settings = site.settings()
        if settings["coordinator_key"] != policy.coordinator_key or settings["name"] != policy.name:
            return fail(
                "keys", "courier.toml", "site.toml and courier.toml name another site or coordinator", "correct one"
            )
        chain, private = (site.courier / "leaf.pem").read_bytes(), (site.courier / "leaf.key").read_bytes()
        if not fits(chain, private):
            return fail("keys", "leaf.key", "certificate and key do not fit", "ask for a new invitation")
    return ok("keys", "identity, ledger and certificate belong together")


def check_ledger(site: Site) -> Check:
    policy = site.policy()
    charged = read_charges(site)
    stand = account(policy, charged)
    with Ledger.open(site.guard / "ledger.db") as ledger:
        size = ledger.head().size
    if policy.rehearsal is None and was_rehearsed(site, charged):
        return fail(
            "ledger",
            f"{size} lines",
            "something was computed without noise, or with noise from a seed: no cap holds any more",
            "a rehearsal's ledger is not a hospital's: make a new site",
        )
    used = f"{size} lines, chain and signature hold; {min(stand.used, 9.99):.0%} of the lifetime cap used"
    if stand.used > 0.9:
        return warn("ledger", used, "the cap is almost used up", "the officer decides about [policy] lifetime_epsilon")
    return ok("ledger", used)


def check_witness(site: Site) -> Check:
    path = site.guard / "witness.db"
    if not path.exists():
        return skip("witnesses", "no round yet")
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        seen = db.execute("SELECT count(*) FROM seen").fetchone()[0]
        conflicts = db.execute("SELECT count(*) FROM conflicts").fetchone()[0]
    except sqlite3.Error:
        return fail("witnesses", "damaged", "witness.db cannot be read", "restore it, newest copy only")
    finally:
        db.close()
    if conflicts:
        return warn(
            "witnesses",
            f"{seen} ledgers seen",
            f"{conflicts} contradictions: another site's ledger was rolled back or copied",
            "tell the coordinator and that site; witness.db holds both signed checkpoints",
        )
    return ok("witnesses", f"{seen} ledgers of other sites seen, none contradicts itself")


def check_approvals(site: Site) -> Check:
    now, policy = int(time.time()), site.policy()
    found = approvals(site.guard)
    good, over, broken = [], [], []
    for run, approval in found.items():
        if approval is None:
            continue
        if approval.over(now):
            over.append(run)
            continue
        try:
            load_approved(site.guard, policy, run, now=now)
            good.append(run)
        except CohortiumError:
            broken.append(run)
    if broken:
        return fail(
            "approvals",
            f"{len(good)} in force",
            f"signatures are missing or wrong: {', '.join(broken)}",
            f"cohortium site approve DIR {broken[0]}",
        )
    if site.paused.exists():
        return warn("approvals", "paused", "the guard refuses every message", "cohortium site unpause DIR")
    return ok("approvals", f"{len(good)} in force, {len(over)} expired")


# ---- certificates, clock, ports -----------------------------------------------------------------------------


def check_certificate(site: Site) -> Check:
    if not site.settings_path.exists():
        return skip("certificate", "no courier here")
    chain, root = (site.courier / "leaf.pem").read_bytes(), (site.courier / "root.pem").read_bytes()
    owner = check_chain(chain, root, usage=CLIENT)
    settings = site.settings()
    if (owner.consortium, owner.role, owner.name) != (settings["consortium"], "site", settings["name"]):
        return fail("certificate", str(owner.name), "it names another site", "ask for a new invitation")
    left = expires(chain) - datetime.now(UTC)
    hours = left.total_seconds() / 3600
    if datetime.now(UTC) > renew_at(chain):
        return warn(
            "certificate", f"ends in {hours:.1f} h", "it should have been renewed by now", "is the courier running?"
        )
    return ok("certificate", f"{owner.name} of {owner.consortium}, {hours:.1f} h left, renewed at 2/3 of its life")


def check_clock(site: Site) -> Check:
    """Against the certificate, which the coordinator dated, and against the ledger's newest line."""
    now = time.time()
    fix = "timedatectl set-ntp true, then check again"
    ledger_path = site.guard / "ledger.db"
    if ledger_path.exists():
        with Ledger.open(ledger_path) as ledger:
            behind = ledger.book.at - now
        if behind > CLOCK_SLACK_S:
            return fail("clock", _spell(-behind), "it is before the ledger's newest line: the guard refuses", fix)
    leaf_path = site.courier / "leaf.pem"
    if leaf_path.exists():
        leaf = load_chain(leaf_path.read_bytes())[0]
        early = leaf.not_valid_before_utc.timestamp() - now
        if early > 0:
            return fail("clock", _spell(-early), "it is before the certificate was issued", fix)
    return ok("clock", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, after certificate and ledger")


def _spell(seconds: float) -> str:
    size = f"{abs(seconds) / 86_400:.1f} days" if abs(seconds) > 86_400 else f"{abs(seconds) / 60:.0f} minutes"
    return f"{size} {'behind' if seconds < 0 else 'ahead'}"


def check_ports(site: Site) -> list[Check]:
    if not site.settings_path.exists():
        return [skip("ports", "no courier here")]
    settings, found = site.settings(), []
    for name, what in (("service_address", "service port"), ("fleet_address", "fleet port")):
        answer = look(settings[name], site.courier / "root.pem")
        if not answer.problem:
            found.append(ok(what, f"{answer.address}: TLS 1.3, a certificate of the consortium"))
        elif answer.off_s:
            fix = "set this machine's clock; if it is right, tell the coordinator"
            found.append(fail(what, answer.address, f"the certificate is {_spell(answer.off_s)} by our clock", fix))
        else:
            fix = f"let this machine open TCP to {answer.address}; nothing needs to come in"
            found.append(fail(what, answer.address, answer.problem, fix))
    return found


# ---- data ---------------------------------------------------------------------------------------------------


def check_data(site: Site, dictionary: Path | None, *, network: bool = True) -> list[Check]:
    policy = site.policy()
    if dictionary is not None:
        return [_against(site, policy, Schema.load(dictionary), policy.unit, (), dictionary.name)]
    found = []
    coordinator = public_from_raw(bytes.fromhex(policy.coordinator_key))
    for run, approval in approvals(site.guard).items():
        if approval is None or approval.over(int(time.time())):
            continue
        proposal = read_proposal((site.guard / "approved" / run / "proposal.bin").read_bytes(), coordinator)
        found.append(_against(site, policy, proposal.schema, proposal.plan.unit, proposal.exclude, run))
    for offer in _offers(site) if network else []:
        proposal = read_proposal(offer.envelope, coordinator)
        found.append(_against(site, policy, proposal.schema, proposal.plan.unit, proposal.exclude, offer.run))
    return found or [_readable(site, policy)]


def _offers(site: Site) -> list[calls.Offered]:
    """The open proposals, where the coordinator can be asked; whether it can is another check's matter."""
    try:
        return [offer for offer in calls.proposals(site) if offer.state == "open"]
    except (CohortiumError, OSError, ImportError):
        return []


def _against(site: Site, policy: Policy, schema: Schema, unit: str, exclude: tuple[str, ...], name: str) -> Check:
    from cohortium.client.loading import load_records

    started = time.monotonic()
    # How many patients there are stays inside: a screen is photographed, a ticket is mailed.
    load_records(site.guard, policy, schema=schema, unit=unit, exclude=exclude)
    return ok("data", f"the table fits {name}, read in {time.monotonic() - started:.1f} s")


def _readable(site: Site, policy: Policy) -> Check:
    if policy.database:
        return skip("data", "nothing is approved yet: --dictionary FILE asks the database now")
    path = site.guard / policy.table
    if not path.exists():
        return fail("data", policy.table, "there is no such file or folder", "[data] table in SITE/guard/site.toml")
    if not os.access(path, os.R_OK):
        return fail("data", policy.table, "this user may not read it", "let the guard's user read it")
    return skip("data", "it is there; --dictionary FILE, or an approval, holds it against a dictionary")


# ---- the machine --------------------------------------------------------------------------------------------


def check_disk(site: Site) -> Check:
    free = shutil.disk_usage(site.root).free
    shown = f"{free / 1e9:.1f} GB free"
    if free < FREE_BYTES:
        return fail("disk", shown, "a full disk stops a round in the middle", "make room: 1 GB or more")
    return ok("disk", shown)


def check_filesystem(site: Site) -> Check:
    kind = filesystem_of(site.guard, Path("/proc/self/mountinfo"))
    if kind in NETWORK_FILESYSTEMS:
        return fail(
            "file system",
            kind,
            "SQLite's locks and flushes cannot be trusted over a network: the ledger could lose a charge",
            "move SITE/guard to a local disk",
        )
    return ok("file system", kind or "local")


def filesystem_of(path: Path, mounts: Path) -> str:
    """The kind of file system that a path lies on, of Linux' list of mounts; "" where there is none."""
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    real, best, kind = str(path.resolve()), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split(" ")[0]
    return kind


def check_versions() -> Check:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return fail("versions", name, "it is not installed", f"pip install {name}")
    if not versions["flwr"].startswith(FLWR):
        return fail(
            "versions", f"flwr {versions['flwr']}", f"another Flower than {FLWR}x", f"pip install 'flwr=={FLWR}*'"
        )
    if sqlite3.sqlite_version_info < (3, 37):
        return fail("versions", f"SQLite {sqlite3.sqlite_version}", "the ledger needs STRICT tables", "SQLite 3.37")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return ok("versions", f"Python {platform.python_version()}, {shown}")


def check_gpu(drivers: Path = Path("/proc/driver/nvidia/gpus")) -> Check:
    """What the driver shows; nothing of torch is started for it."""
    models = []
    for card in sorted(drivers.glob("*/information")):
        text = card.read_text(encoding="utf-8", errors="replace")
        models += [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model:")]
    return ok("GPU", ", ".join(models) or "none: the CPU is used")
