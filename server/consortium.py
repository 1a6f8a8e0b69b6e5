"""A consortium on the coordinator's disk: made once, then the place where everything of it is found.

CONSORTIUM/consortium.toml        name, addresses, limits
CONSORTIUM/root/                  offline root and its key under a passphrase; the key may be moved away
CONSORTIUM/pki/                   issuer (90 days) and the coordinator's own leaf
CONSORTIUM/coordinator.key        Ed25519: signs proposals and questions
CONSORTIUM/register.db mirror.db  members, approvals, runs; copies of all sites' ledgers over all runs
CONSORTIUM/runs/RUN/              one run each, as server/runs.drive reads it
CONSORTIUM/superlink/ hub.sock serve.lock
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol import certificates
from cohortium.common.protocol.messages import canonical, seal
from cohortium.common.protocol.signing import generate, load_private, save_private
from cohortium.common.study import Study, toml_text
from cohortium.common.toml_reader import TomlFile
from cohortium.server.pki import Issuer, create_issuer, create_root, save_server_leaf
from cohortium.server.register import Member, Register
from cohortium.server.runs import ANSWER_TIMEOUT_S, HELLO_TIMEOUT_S, RunFolder, new_run_id

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cohortium.common.privacy.plan import Plan

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9a-fA-F:]+")
TRANSPORTS = ("stream", "flower")


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the coordinator is found. host: the name in its certificate; listen: the interface it binds to.

    The first three ports are public; the SuperLink's is for the loopback interface only.
    """

    host: str
    listen: str = "0.0.0.0"
    service_port: int = 7441
    enrol_port: int = 7442
    fleet_port: int = 7443
    superlink_port: int = 7440

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host) or not self.listen:
            raise UsageError("CONSORTIUM-HOST", f"{self.host!r} is no host name", hint="--host coordinator.example.org")
        ports = [self.service_port, self.enrol_port, self.fleet_port, self.superlink_port]
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise UsageError("CONSORTIUM-PORTS", "four different ports between 1 and 65535 are needed")

    @property
    def is_loopback(self) -> bool:
        """Whether this consortium is a rehearsal of processes on one machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def service(self) -> str:
        return _joined(self.host, self.service_port)

    @property
    def enrol(self) -> str:
        return _joined(self.host, self.enrol_port)

    @property
    def fleet(self) -> str:
        return _joined(self.host, self.fleet_port)

    def certified(self) -> tuple[str, ...]:
        """The names in the coordinator's own certificate."""
        return tuple(dict.fromkeys([self.host, "localhost", "127.0.0.1"] if self.is_loopback else [self.host]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """resume_attempts: tries in a row that bring no new release before a run counts as failed. patience_hours: how
    long a run waits for missing sites. free_disk_gb: below it `serve` does not start. hello_timeout_s and
    answer_timeout_s: how long a try waits for its sites to say hello, and for each answer, before it goes on
    without them."""

    resume_attempts: int = 8
    patience_hours: int = 72
    free_disk_gb: int = 1
    hello_timeout_s: int = int(HELLO_TIMEOUT_S)
    answer_timeout_s: int = int(ANSWER_TIMEOUT_S)

    def __post_init__(self) -> None:
        whole = (self.resume_attempts, self.patience_hours, self.hello_timeout_s, self.answer_timeout_s)
        if min(whole) < 1 or self.free_disk_gb < 0:
            raise UsageError("CONSORTIUM-LIMITS", "limits are whole numbers from 1 on")


class Consortium:
    """One consortium's directory. Opening it reads consortium.toml only."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        file = _read(self.root / "consortium.toml")
        head = file.section("consortium", "name")
        head.only("name")
        self.name = _checked_name(head.text("name", example='name = "stroke"'))
        place = file.section("addresses", "host")
        place.only(*(field.name for field in fields(Addresses)))
        ports = {
            field.name: place.whole(field.name, least=1, most=65535, example=f"{field.name} = {field.default}")
            for field in fields(Addresses)
            if field.name.endswith("_port")
        }
        listen = place.text_or_none("listen") or "0.0.0.0"
        self.addresses = Addresses(host=place.text("host", example='host = "…"'), listen=listen, **ports)
        given: dict[str, int] = {}
        if file.has("limits"):
            limits = file.section("limits", "")
            limits.only(*(field.name for field in fields(Limits)))
            for field in fields(Limits):
                value = limits.whole_or_none(field.name, least=0, most=10**6)
                if value is not None:
                    given[field.name] = value
        self.limits = Limits(**given)

    @classmethod
    def create(cls, root: Path, *, name: str, addresses: Addresses, passphrase: str) -> Self:
        """Make a new consortium: root (encrypted), issuer, leaf, the coordinator's key, an empty register.

        Refuses a folder that holds anything. Nothing is left of it when it cannot be finished.
        """
        root = Path(root)
        _checked_name(name)
        if root.exists() and any(root.iterdir()):
            raise UsageError(
                "CONSORTIUM-EXISTS",
                "the folder is not empty",
                where=(str(root),),
                hint="name a new folder: a consortium is never started over",
            )
        make_private(root)
        try:
            create_root(root / "root", name=name, passphrase=passphrase)
            create_issuer(root / "root", root / "pki", passphrase=passphrase)
            save_private(generate(), root / "coordinator.key")
            make_private(root / "runs")
            Register(root / "register.db")
            text = _toml(name, addresses, Limits())
            certificates.write_file(root / "consortium.toml", text.encode(), 0o600)
            made = cls(root)
            made.renew_leaf()
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)  # nothing is in use yet, and half a consortium is none
            raise
        return made

    # ---- places ---------------------------------------------------------------------------------------------

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def mirror(self) -> Path:
        return self.root / "mirror.db"

    @property
    def hub(self) -> Path:
        return self.root / "hub.sock"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def superlink(self) -> Path:
        return self.root / "superlink"

    @property
    def chain(self) -> Path:
        return self.pki / "server.pem"

    @property
    def chain_key(self) -> Path:
        return self.pki / "server.key"

    def secrets(self) -> list[Path]:
        """What only this user may use: the folder and its keys; `serve` refuses to start while others can."""
        names = ("root", "root/root.key", "pki", "pki/issuer.key", "pki/server.key", "coordinator.key", "superlink")
        return [self.root, *(self.root / name for name in names)]

    def folder(self, run: str) -> RunFolder:
        """A run's folder; UsageError RUN-UNKNOWN."""
        if not _NAME.fullmatch(run) or not (self.runs / run / "run.json").exists():
            raise UsageError(
                "RUN-UNKNOWN", f"this consortium has no run {run!r}", hint=f"cohortium watch {self.root} lists them"
            )
        return RunFolder(root=self.runs / run)

    # ---- keys and members -----------------------------------------------------------------------------------

    def register(self) -> Register:
        return Register(self.root / "register.db")

    def issuer(self) -> Issuer:
        return Issuer.load(self.pki)

    def key(self) -> Ed25519PrivateKey:
        return load_private(self.root / "coordinator.key")

    def root_pem(self) -> bytes:
        """The root's certificate: what invitations carry."""
        return self.issuer().root_pem

    def renew_leaf(self) -> None:
        """A new key and certificate of the coordinator's own; running listeners serve it with the next handshake."""
        save_server_leaf(self.pki, self.issuer().server_leaf(self.addresses.certified()))

    def renew_issuer(self, root: Path, *, passphrase: str) -> None:
        """A new issuer for 90 days, signed by the root in that folder (back from where it is kept)."""
        create_issuer(root, self.pki, passphrase=passphrase)
        self.renew_leaf()

    # ---- studies --------------------------------------------------------------------------------------------

    def sites_of(self, study: Study) -> list[Member]:
        """The enrolled sites that a study means: those it names, or all. UsageError CONSORTIUM-SITES."""
        enrolled = {m.name: m for m in self.register().members() if m.role == certificates.SITE and m.active}
        names = study.sites or tuple(sorted(enrolled))
        missing = [name for name in names if name not in enrolled]
        if missing or not names:
            raise UsageError(
                "CONSORTIUM-SITES",
                f"not enrolled: {', '.join(missing)}" if missing else "no site is enrolled yet",
                hint=f"cohortium sites invite {self.root} {missing[0] if missing else 'NAME'}",
            )
        return [enrolled[name] for name in sorted(names)]

    def compile(self, study: Study, *, noise: bool = True) -> Plan:
        """The plan of a study over its enrolled sites."""
        from cohortium.server.planning import plan_for

        return plan_for(study, [site.name for site in self.sites_of(study)], noise=noise)[0]

    def propose(
        self,
        study: Study | Path,
        *,
        seed: int | None = None,
        noise: bool = True,
        exact: bool = False,
        transport: str | None = None,
        accept_guessed_ranges: bool = False,
    ) -> str:
        """Compile a study, sign it as a proposal and put it before its sites' officers; the run's id.

        seed: a rehearsal, whose noise can be computed again; only sites that rehearse with this seed answer.
        transport: None leaves it to `serve`. Nothing is asked before every site's officer approved.
        """
        study = study if isinstance(study, Study) else Study.load(study)
        if not accept_guessed_ranges:
            study.refuse_guesses()
        if transport is not None and transport not in TRANSPORTS:
            raise UsageError("TRANSPORT", f"there is no transport {transport!r}", hint="stream or flower")
        sites = self.sites_of(study)
        plan = self.compile(study, noise=noise)
        run = new_run_id(study.id, seed=seed)
        register = self.register()
        known = {row.run for row in register.runs()}
        final, part = self.runs / run, self.runs / f".{run}.part"
        if run in known:
            raise UsageError(
                "RUN-EXISTS",
                "there was a run of this study with this seed; its charges and keys are bound to its name",
                where=(str(final),),
                hint="take another --seed, or make a new consortium to rehearse again",
            )
        for left in (part, final):  # of a proposal that was killed before the register knew it: nobody has seen it
            shutil.rmtree(left, ignore_errors=True)
        identities = {site.name: site.identity.hex() for site in sites}
        message = proposal_message(
            run=run, plan=plan, identities=identities, schema=study.schema, exclude=study.exclude
        )
        envelope = seal(message, self.key())
        facts = {
            "run": run,
            "consortium": self.name,
            "public_keys": identities,
            "earlier_keys": {site.name: register.earlier(site.name) for site in sites},
            "seed": secrets.randbelow(2**31) if seed is None else seed,
            "rehearsal": seed is not None,
            "noise": noise,
            "exact": exact,
            "guessed_ranges": accept_guessed_ranges and bool(study.schema.guessed),
            "transport": transport,
            "hello_timeout_s": self.limits.hello_timeout_s,
            "answer_timeout_s": self.limits.answer_timeout_s,
            "mirror": "../../mirror.db",
        }
        self._write_run(part, study, plan, envelope, facts)
        os.replace(part, final)
        certificates.sync_folder(self.runs)
        register.propose(run, folder=f"runs/{run}", envelope=envelope, sites=[site.name for site in sites])
        return run

    def _write_run(self, part: Path, study: Study, plan: Plan, envelope: bytes, facts: Mapping[str, Any]) -> None:
        make_private(part)
        study.schema.save(part / "dictionary.json")
        (part / "study.toml").write_text(study.to_toml(dictionary="dictionary.json"), encoding="utf-8")
        (part / "plan.json").write_bytes(canonical(plan.to_json()) + b"\n")
        (part / "proposal.bin").write_bytes(envelope)
        (part / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        # A link and no copy: whoever is given this folder, to audit it, is not given the key.
        (part / "coordinator.key").symlink_to("../../coordinator.key")

    def refuse_full_disk(self) -> None:
        """Refused DISK-FULL below the limit: a run that cannot write its answers would lose what was paid for."""
        free = shutil.disk_usage(self.root).free / 1e9
        if free < self.limits.free_disk_gb:
            raise Refused(
                "DISK-FULL",
                f"{free:.1f} GB are free and {self.limits.free_disk_gb} are wanted",
                where=(str(self.root),),
                hint="make room, or lower [limits] free_disk_gb",
            )


def _read(path: Path) -> TomlFile:
    if not path.is_file():
        raise UsageError(
            "CONSORTIUM-MISSING",
            "this is not a consortium's directory",
            where=(str(path),),
            hint="make one: cohortium consortium init DIR --name NAME --host HOST",
        )
    return TomlFile.load(path)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            "CONSORTIUM-NAME", f"{name!r}: a name has 1 to 63 small letters, digits and dashes", hint="--name stroke"
        )
    return name


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _toml(name: str, addresses: Addresses, limits: Limits) -> str:
    lines = ["[consortium]", f"name = {toml_text(name)}", "", "[addresses]"]
    lines += [f"{field.name} = {toml_text(getattr(addresses, field.name))}" for field in fields(addresses)]
    lines += ["", "[limits]"]
    lines += [f"{field.name} = {toml_text(getattr(limits, field.name))}" for field in fields(limits)]
    return "\n".join(lines) + "\n"
