"""A member without records: a researcher's directory, its certificate, and the rows it may fetch.

    MEMBER/root.pem leaf.key leaf.pem member.toml     nothing else is kept; a site's own courier directory serves too

A certificate lives for a day. Each call renews one that is past two thirds of its life; `renew_if_due` from a timer
keeps it alive through days without a call. One that ended is made again by a new invitation for the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cohortium.client.connect import explain, open_channel, read_leaf  # before grpc: it turns TLS 1.2 off
from cohortium.client.enrolment import Enrolled, enrol, renew

import grpc  # isort: skip

from cohortium.common.errors import CohortiumError, ProtocolError, UsageError
from cohortium.common.modes import make_private, refuse_all, refuse_open
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.certificates import SITE, renew_at, write_file
from cohortium.common.protocol.invitation import Invitation
from cohortium.common.protocol.service import ROWS_S
from cohortium.common.study import toml_text

TIMEOUT_S = 30.0
T = TypeVar("T")
FORMATS = ("parquet", "csv")
SETTINGS = "courier.toml"
"""Of the same name as a site's, so that a site's courier directory is a member's directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """rows of a run on this machine. bytes: size of the file; sha256: of the file."""

    path: Path
    bytes: int
    sha256: str


def join(directory: Path, invitation: Invitation) -> Enrolled:
    """Enrol by an invitation and write the member's directory.

    A directory that has a certificate takes a new one of the same name (the last may have ended); UsageError
    INVITE-ROLE for a site's invitation, MEMBER-OTHER where another name or consortium lives there.
    """
    if invitation.role == SITE:
        raise UsageError(
            "INVITE-ROLE", "this invitation is for a hospital", hint="cohortium site init DIR --invitation FILE"
        )
    make_private(directory)
    if (directory / "leaf.pem").exists() and _named(directory) != (invitation.consortium, invitation.name):
        raise UsageError(
            "MEMBER-OTHER",
            "another member's certificate lies in this directory",
            where=(str(directory),),
            hint="take an empty directory",
        )
    made = enrol(invitation)
    settings = {"name": made.name, "consortium": made.consortium, "service_address": made.service_address}
    text = "".join(f"{name} = {toml_text(value)}\n" for name, value in settings.items())
    write_file(directory / SETTINGS, text.encode(), 0o600)
    made.save(directory)
    return made


def renew_if_due(directory: Path) -> bool:
    """Take a new certificate when two thirds of the old one's life are over; whether it did."""
    place = _place(directory)
    chain, _ = read_leaf(place)
    if datetime.now(UTC) < renew_at(chain):
        return False
    renew(place)
    return True


def runs(directory: Path, run: str = "") -> dict[str, Any]:
    """What the coordinator says of a run, or {"runs": […]} of all that this member may see."""
    said = _call(directory, lambda stub: stub.Status(pb.RunName(run=run), timeout=TIMEOUT_S))
    try:
        found = json.loads(said.json)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ProtocolError("COORDINATOR-OTHER", "the coordinator's answer cannot be read")
    return found


def fetch(
    directory: Path,
    run: str,
    out: Path,
    *,
    rows: int = 0,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Fetched:
    """Stream a finished run's rows to a file, whole or not at all. rows: 0 for the published table.

    The format is the file's suffix. The same number of rows of a run is the same file every time, so a fetch that
    broke off is simply made again. UsageError ROWS-FORMAT, FILE-EXISTS; what the service refuses, with its fix.
    """
    kind = out.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise UsageError("ROWS-FORMAT", f"{out.name}: rows come as .parquet or .csv", hint="--out rows.parquet")
    if out.exists():
        raise UsageError("FILE-EXISTS", "the file exists", where=(str(out),), hint="remove it, or choose another name")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")

    def receive(stub: rpc.ConsortiumStub) -> Fetched:
        total, digest = 0, hashlib.sha256()
        with open(part, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            for chunk in stub.Rows(pb.RowsRequest(run=run, rows=rows, format=kind), timeout=ROWS_S):
                file.write(chunk.data)
                digest.update(chunk.data)
                total += len(chunk.data)
                on_bytes(total)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
        return Fetched(path=out, bytes=total, sha256=digest.hexdigest())

    try:
        return _call(directory, receive)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def _call(directory: Path, work: Callable[[rpc.ConsortiumStub], T]) -> T:
    place = _place(directory)
    with suppress(CohortiumError):  # what hinders the renewal hinders the call too, and is told there
        renew_if_due(place)
    with closing(open_channel(place)) as channel:
        try:
            return work(rpc.ConsortiumStub(channel))  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise explain(error, place) from None


def _place(directory: Path) -> Path:
    """The directory with the certificate: the member's own, or the courier's below a site's."""
    place = directory / "courier" if (directory / "courier" / SETTINGS).exists() else directory
    refuse_open(place)
    refuse_all([place / "leaf.key"])
    return place


def _named(directory: Path) -> tuple[str, str]:
    from cohortium.common.protocol.certificates import owner_of

    owner = owner_of((directory / "leaf.pem").read_bytes())
    return owner.consortium, owner.name
