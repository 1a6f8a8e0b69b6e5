"""What hospital IT's commands say to the coordinator's service, over the site's own certificate.

The guard never comes here: these are calls of people's commands. Everything received is verified by whoever uses it:
a proposal by the coordinator's signature, a list of members by telephone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cohortium.client.site import Site
from cohortium.common.errors import ProtocolError, UsageError

if TYPE_CHECKING:
    from cohortium.common.protocol import consortium_pb2_grpc as rpc

TIMEOUT_S = 30.0
MOST_PROPOSALS = 1000
STATES = ("open", "approved", "declined")
_WORD = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def _nonsense() -> ProtocolError:
    """What comes from there is shown on a terminal: a word that is none could make it show something else."""
    return ProtocolError("COORDINATOR-OTHER", "the coordinator's answer holds a name that is none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered:
    """A proposal as the coordinator's service gives it, not verified yet. state: open, approved, declined."""

    run: str
    envelope: bytes
    state: str


@contextmanager
def service(site: Site) -> Iterator[rpc.ConsortiumStub]:
    """A stub over mutual TLS. Statuses come out as CohortiumErrors with their fix."""
    import grpc

    from cohortium.client.connect import explain, open_channel
    from cohortium.common.protocol import consortium_pb2_grpc as rpc

    site.refuse_open_courier()
    channel = open_channel(site.courier)
    try:
        yield rpc.ConsortiumStub(channel)  # type: ignore[no-untyped-call]
    except grpc.RpcError as error:
        raise explain(error, site.courier) from None
    finally:
        channel.close()


def proposals(site: Site) -> list[Offered]:
    """The proposals that name this site and have not ended."""
    from cohortium.common.protocol import consortium_pb2 as pb

    with service(site) as stub:
        found = []
        for item in stub.Proposals(pb.Nothing(), timeout=TIMEOUT_S):
            if not (_WORD.fullmatch(item.run) and item.state in STATES):
                raise _nonsense()
            found.append(Offered(run=item.run, envelope=item.envelope, state=item.state))
            if len(found) >= MOST_PROPOSALS:
                break
        return found


def proposal(site: Site, run: str) -> Offered:
    """One of them; UsageError RUN-UNKNOWN."""
    found = proposals(site)
    for offered in found:
        if offered.run == run:
            return offered
    names = ", ".join(offered.run for offered in found) or "none"
    raise UsageError(
        "RUN-UNKNOWN", f"the coordinator has no open proposal {run!r} for this site", hint=f"open are: {names}"
    )


def say_approved(site: Site, *, run: str, proposal: str, signature: bytes, declined: bool = False) -> None:
    """Tell the coordinator that the officer approved or declined. proposal: SHA-256 of the envelope, hex."""
    from cohortium.common.protocol import consortium_pb2 as pb

    with service(site) as stub:
        stub.Approve(pb.Approval(run=run, proposal=proposal, signature=signature, declined=declined), timeout=TIMEOUT_S)


def members(site: Site) -> list[dict[str, Any]]:
    """Who takes part, by the coordinator's word: name, role, state, identity (hex), since."""
    from cohortium.common.protocol import consortium_pb2 as pb

    with service(site) as stub:
        found = stub.Members(pb.Nothing(), timeout=TIMEOUT_S).members
        if not all(_WORD.fullmatch(word) for m in found for word in (m.name, m.role, m.state)):
            raise _nonsense()
        return [
            {"name": m.name, "role": m.role, "state": m.state, "identity": m.identity.hex(), "since": m.since}
            for m in found
        ]


def rotate(site: Site, *, identity: bytes, by_old: bytes, by_new: bytes, by_officer: bytes) -> None:
    """Register another identity of this site."""
    from cohortium.common.protocol import consortium_pb2 as pb

    with service(site) as stub:
        stub.Rotate(
            pb.Rotation(identity=identity, by_old=by_old, by_new=by_new, by_officer=by_officer), timeout=TIMEOUT_S
        )
