"""Inviting a member: what `cohortium sites invite` and the console's form both do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cohortium.common.errors import Refused
from cohortium.common.protocol.invitation import Invitation
from cohortium.server.consortium import Consortium
from cohortium.server.register import Register

MOST_HOURS = 720


def make_invitation(consortium: Consortium, register: Register, name: str, *, role: str, hours: int) -> Invitation:
    """A one-time invitation. Its token is in it and nowhere else: the caller hands it over and keeps no copy.

    hours: how long it can be used, 1 to 720. Refused MEMBER-EXISTS; UsageError INVITE-NAME, INVITE-VALUE and those of
    a member's name. It replaces the name's earlier invitations.
    """
    member = register.member(name)
    if member is not None and member.active:
        raise Refused(
            "MEMBER-EXISTS",
            f"{name} is enrolled",
            hint=f"cohortium sites revoke {consortium.root} {name} first, if its keys are to change",
        )
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours)
    token = register.invite(name, role=role, valid_s=hours * 3600)
    return Invitation(
        consortium=consortium.name,
        name=name,
        role=role,
        enrol_address=consortium.addresses.enrol,
        root_pem=consortium.root_pem(),
        token=token,
        valid_until=until,
    )
