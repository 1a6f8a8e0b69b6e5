"""The coordinator's side of one run's conversation: seal, send, verify, mirror the ledger lines that come along."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed, ProtocolError
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.server.mirror import Mirror

_CODE = re.compile(r"[A-Z][A-Z-]{2,39}")


class Courier(Protocol):
    """Carries opaque envelopes (server/transport.GridCourier)."""

    def exchange(
        self, messages: Mapping[str, bytes], *, timeout_s: float, quorum: int | None = None, label: str = ""
    ) -> dict[str, bytes]: ...


class Session:
    """Messages out, verified messages in. A site that refuses or sends nonsense counts as absent, with its code."""

    def __init__(
        self,
        *,
        courier: Courier,
        key: Ed25519PrivateKey,
        identities: Mapping[str, Ed25519PublicKey],
        mirror: Mirror,
        timeout_s: float,
        heard: Callable[[str, str, int], None] | None = None,
    ) -> None:
        self._courier, self._key, self._identities = courier, key, dict(identities)
        self.mirror, self._timeout_s, self._heard = mirror, timeout_s, heard
        self.refusals: dict[str, str] = {}
        self.received: dict[str, int] = dict.fromkeys(identities, 0)

    def exchange(self, messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        envelopes = {site: seal(message, self._key) for site, message in messages.items()}
        replies: dict[str, Message] = {}
        for site, envelope in self._courier.exchange(envelopes, timeout_s=self._timeout_s, label=label).items():
            self.received[site] += len(envelope)
            try:
                reply = unseal(envelope, self._identities[site], sender=site)
                if reply.kind == "site.refused":
                    code = reply.fields["code"]
                    # Codes are shown to people: from a site that is not as ours are, it could be any text.
                    self.refusals[site] = code if isinstance(code, str) and _CODE.fullmatch(code) else "MSG-FORM"
                    continue
                if "lines" in reply.fields:
                    self.mirror.receive(site, _lines(reply))
            except (ProtocolError, CheckFailed, KeyError) as error:
                self.refusals[site] = getattr(error, "code", "MSG-FORM")
                continue
            replies[site] = reply
        return replies


def _lines(reply: Message) -> list[dict[str, Any]]:
    lines = reply.fields["lines"]
    if not isinstance(lines, list):
        raise CheckFailed("MIRROR-FORM", "a site's ledger lines are not a list")
    return lines
