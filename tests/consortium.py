"""A consortium's keys, its services on loopback and its members' directories, for tests of what connects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cohortium.common.protocol.certificates import (  # before grpc: it turns TLS 1.2 off
    SITE,
    key_pem,
    make_csr,
    new_key,
    write_file,
)

import grpc  # isort: skip
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.client.connect import connect_with
from cohortium.common.errors import Refused
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.invitation import Invitation
from cohortium.common.protocol.signing import from_seed
from cohortium.server.listening import Listening
from cohortium.server.pki import Issuer, create_issuer, create_root, save_server_leaf
from cohortium.server.register import Member, Register
from cohortium.server.service import start_enrolment, start_service

NAME = "rare-tumours"
PASSPHRASE = "correct horse battery"
HOUR = timedelta(hours=1)


def signer(name: str) -> Ed25519PrivateKey:
    """An Ed25519 key that only depends on its name."""
    return from_seed(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    return signer(name).public_key().public_bytes_raw()


def supernode(name: str) -> str:
    """An OpenSSH public key on P-384 that only depends on its name."""
    key = ec.derive_private_key(int.from_bytes(hashlib.sha256(name.encode()).digest()), ec.SECP384R1())
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def make_pki(folder: Path, *, name: str = NAME, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> Issuer:
    """root/ and pki/ with a server's leaf."""
    create_root(folder / "root", name=name, passphrase=PASSPHRASE)
    create_issuer(folder / "root", folder / "pki", passphrase=PASSPHRASE)
    issuer = Issuer.load(folder / "pki")
    save_server_leaf(folder / "pki", issuer.server_leaf(hosts))
    return issuer


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A member's chain and key in PEM."""

    chain: bytes
    key: bytes


def leaf(issuer: Issuer, name: str, *, role: str = SITE, now: datetime | None = None, hours: float = 24) -> Leaf:
    key = new_key()
    csr = make_csr(key, consortium=issuer.consortium, role=role, name=name)
    return Leaf(chain=issuer.sign_csr(csr, role=role, name=name, now=now, hours=hours), key=key_pem(key))


def enrol_member(register: Register, name: str, *, role: str = SITE) -> Member:
    if role != SITE:
        return register.enrol(name=name, role=role, identity=b"", officer=b"", supernode="")
    return register.enrol(
        name=name,
        role=role,
        identity=public(name),
        officer=public("officer of " + name),
        supernode=supernode(name),
    )


class EchoHub:
    """Sends every frame back and remembers who was revoked."""

    def __init__(self) -> None:
        self.revoked: list[str] = []
        self.streams: list[str] = []

    def relay(self, site: str, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        self.streams.append(site)
        for frame in frames:
            yield pb.Frame(seq=frame.seq, envelope=frame.envelope, run=site)

    def revoke(self, site: str) -> None:
        self.revoked.append(site)


class PlainBacking:
    """Answers that a test can recognise; `fail` is raised instead where it is set."""

    def __init__(self) -> None:
        self.fail: Exception | None = None
        self.stopped: list[str] = []

    def _may_fail(self) -> None:
        if self.fail is not None:
            raise self.fail

    def status(self, run: str | None, member: Member) -> dict[str, Any]:
        self._may_fail()
        return {"run": run, "asked_by": member.name}

    def rows(self, run: str, rows: int, format: str) -> Iterator[bytes]:
        yield b"a,b\n"
        self._may_fail()
        yield b"x" * 600_000

    def stop(self, run: str) -> None:
        self._may_fail()
        self.stopped.append(run)

    def witness(self, site: str, checkpoint: str) -> list[str]:
        if checkpoint == "forked":
            raise Refused("CHECKPOINT-FORK", "patient 4711 was seen")
        self._may_fail()
        return [f"coordinator {site}"]


@dataclass(frozen=True, kw_only=True)
class Addresses:
    service: str
    fleet: str


@dataclass(kw_only=True)
class Party:
    """A consortium with its two services on free ports of loopback."""

    folder: Path
    issuer: Issuer
    register: Register
    hub: Any = field(default_factory=EchoHub)
    backing: Any = field(default_factory=PlainBacking)
    enrolled: list[tuple[Member, str]] = field(default_factory=list)
    service: Listening | None = None
    enrolment: Listening | None = None

    def start(self) -> None:
        given: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "issuer": self.issuer,
            "register": self.register,
            "server_chain": self.folder / "pki" / "server.pem",
            "server_key": self.folder / "pki" / "server.key",
            "coordinator_key_public": signer("coordinator").public_key(),
            "consortium": NAME,
        }
        self.service = start_service(hub=self.hub, backing=self.backing, **given)
        addresses = Addresses(service=self.address, fleet="127.0.0.1:1")
        self.enrolment = start_enrolment(
            addresses=addresses, on_enrolled=lambda *told: self.enrolled.append(told), **given
        )

    def stop(self) -> None:
        for running in (self.service, self.enrolment):
            if running is not None:
                running.stop(0).wait()
        self.register.close()

    @property
    def address(self) -> str:
        assert self.service is not None
        return f"127.0.0.1:{self.service.port}"

    @property
    def enrol_address(self) -> str:
        assert self.enrolment is not None
        return f"127.0.0.1:{self.enrolment.port}"

    def invitation(self, name: str, *, role: str = SITE, **changes: Any) -> Invitation:
        token = self.register.invite(name, role=role)
        settings: dict[str, Any] = {
            "consortium": NAME,
            "name": name,
            "role": role,
            "enrol_address": self.enrol_address,
            "root_pem": self.issuer.root_pem,
            "token": token,
            "valid_until": datetime.now(UTC) + 24 * HOUR,
        }
        return Invitation(**(settings | changes))

    def channel(self, who: Leaf | None) -> grpc.Channel:
        return connect_with(self.address, self.issuer.root_pem, *(() if who is None else (who.chain, who.key)))

    def stub(self, who: Leaf | None) -> Any:
        """Calls with exactly these credentials, whatever the client's own checks would say to them."""
        return rpc.ConsortiumStub(self.channel(who))  # type: ignore[no-untyped-call]

    def member(self, name: str, *, role: str = SITE) -> Leaf:
        enrol_member(self.register, name, role=role)
        return leaf(self.issuer, name, role=role)

    def directory(self, name: str, who: Leaf | None) -> Path:
        """A member's directory as `Enrolled.save` and `site init` leave it."""
        place = self.folder / name / "courier"
        place.mkdir(parents=True, exist_ok=True)
        write_file(place / "root.pem", self.issuer.root_pem, 0o644)
        write_file(place / "courier.toml", f'service_address = "{self.address}"\n'.encode(), 0o600)
        if who is not None:
            write_file(place / "leaf.key", who.key, 0o600)
            write_file(place / "leaf.pem", who.chain, 0o644)
        return place


def start_party(folder: Path) -> Party:
    made = Party(folder=folder, issuer=make_pki(folder), register=Register(folder / "register.db"))
    made.start()
    return made
