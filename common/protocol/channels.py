"""Channels between sites that a server relays but cannot read.

Once per run every site publishes an X25519 key signed by its Ed25519 identity. The identities come from the
plan that each site's officer approved, so a server cannot put itself in the middle. In each round a site
seals to every peer the peer's shares of two secrets. ChaCha20-Poly1305 (RFC 8439) with a key that is bound to
run, round, sender, receiver and the sender's key of this round; that key is fresh, so every AEAD key seals
one message and the nonce may be zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.masks import agree, derive
from cohortium.common.protocol.messages import Message
from cohortium.common.protocol.shamir import SHARE_BYTES
from cohortium.common.protocol.signing import sign_statement, verify_statement
from cohortium.common.protocol.wire import LabelledBytes, expect, hexadecimal, rows, text

SEALED_BYTES = 2 * SHARE_BYTES + 16
_NONCE = bytes(12)
_PURPOSE = "channel-key"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelKey:
    """A site's X25519 public key (32 bytes) for one run, signed (64 bytes) by its identity."""

    run_id: str
    site: str
    public: bytes
    signature: bytes

    def statement(self) -> dict[str, str]:
        return {"run": self.run_id, "site": self.site, "public": self.public.hex()}

    def to_message(self) -> Message:
        fields = {"run": self.run_id, "public": self.public.hex(), "signature": self.signature.hex()}
        return Message(kind="sum.channel", sender=self.site, fields=fields)

    @classmethod
    def from_message(cls, message: Message) -> ChannelKey:
        fields = expect(message, "sum.channel", {"run", "public", "signature"})
        return cls(
            run_id=text(fields["run"]),
            site=message.sender,
            public=hexadecimal(fields["public"], 32),
            signature=hexadecimal(fields["signature"], 64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelKeys:
    """What the server relays to every site: all channel keys of a run."""

    run_id: str
    keys: tuple[ChannelKey, ...]

    def to_message(self, *, sender: str = "coordinator") -> Message:
        listed = [[k.site, k.public.hex(), k.signature.hex()] for k in self.keys]
        return Message(kind="sum.channels", sender=sender, fields={"run": self.run_id, "keys": listed})

    @classmethod
    def from_message(cls, message: Message) -> ChannelKeys:
        fields = expect(message, "sum.channels", {"run", "keys"})
        run_id = text(fields["run"])
        keys = tuple(
            ChannelKey(
                run_id=run_id,
                site=text(site),
                public=hexadecimal(public, 32),
                signature=hexadecimal(signature, 64),
            )
            for site, public, signature in rows(fields["keys"], 3)
        )
        return cls(run_id=run_id, keys=keys)


def open_channel(
    *, run_id: str, site: str, identity: Ed25519PrivateKey, entropy: LabelledBytes
) -> tuple[X25519PrivateKey, ChannelKey]:
    """A fresh channel key for a run, and its signed public part to publish."""
    private = X25519PrivateKey.from_private_bytes(entropy.bytes_for(f"secure-sum/{run_id}/{site}/channel", 32))
    unsigned = ChannelKey(run_id=run_id, site=site, public=private.public_key().public_bytes_raw(), signature=bytes(64))
    signature = sign_statement(identity, _PURPOSE, unsigned.statement())
    return private, ChannelKey(run_id=run_id, site=site, public=unsigned.public, signature=signature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Directory:
    """Whom a run knows: identities (from the plan) and the channel keys that they signed.

    A site without a channel key takes no part; how many may be missing is the threshold's business.
    agreed: own site -> {peer's channel key: their X25519 secret}, filled by `seal_shares` and `open_shares`. Channel
    keys last a run, so the secret is the same in each round; it is as secret as the key, and goes with this object.
    """

    run_id: str
    identities: Mapping[str, Ed25519PublicKey]
    channels: Mapping[str, bytes]
    agreed: dict[str, dict[bytes, bytes]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def verified(
        cls, *, run_id: str, identities: Mapping[str, Ed25519PublicKey], keys: Iterable[ChannelKey]
    ) -> Directory:
        """Raises SUM-CONTEXT (another run), SUM-SENDER (unknown or twice), SUM-SIGNATURE."""
        channels: dict[str, bytes] = {}
        for key in keys:
            if key.run_id != run_id:
                raise ProtocolError("SUM-CONTEXT", "a channel key belongs to another run")
            if key.site not in identities or key.site in channels:
                raise ProtocolError("SUM-SENDER", "a channel key of an unknown site, or a site's second one")
            verify_statement(identities[key.site], _PURPOSE, key.statement(), key.signature, code="SUM-SIGNATURE")
            channels[key.site] = key.public
        return cls(run_id=run_id, identities=dict(identities), channels=channels)


def seal_shares(
    shares: tuple[bytes, bytes],
    *,
    private: X25519PrivateKey,
    public: bytes,
    context: str,
    round_key: bytes,
    sender: str,
    receiver: str,
    agreed: dict[bytes, bytes] | None = None,
) -> bytes:
    """Encrypt (seed share, key share), 33 bytes each, from sender to receiver: 82 bytes.

    agreed: secrets that this private key has agreed on before, by public key; looked up and added to.
    """
    secret = _secret(private, public, agreed)
    key = _key(secret, context=context, round_key=round_key, sender=sender, receiver=receiver)
    return ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(shares), None)


def open_shares(
    sealed: bytes,
    *,
    private: X25519PrivateKey,
    public: bytes,
    context: str,
    round_key: bytes,
    sender: str,
    receiver: str,
    agreed: dict[bytes, bytes] | None = None,
) -> tuple[bytes, bytes]:
    """(seed share, key share) that the sender sealed for exactly this round and receiver; else SUM-SEAL."""
    secret = _secret(private, public, agreed)
    key = _key(secret, context=context, round_key=round_key, sender=sender, receiver=receiver)
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise ProtocolError("SUM-SEAL", f"the shares from {sender} cannot be opened") from None
    if len(plain) != 2 * SHARE_BYTES:
        raise ProtocolError("SUM-SEAL", f"the shares from {sender} have a wrong length")
    return plain[:SHARE_BYTES], plain[SHARE_BYTES:]


def _secret(private: X25519PrivateKey, public: bytes, agreed: dict[bytes, bytes] | None) -> bytes:
    found = None if agreed is None else agreed.get(public)
    if found is None:
        found = agree(private, public)
        if agreed is not None:
            agreed[public] = found
    return found


def _key(secret: bytes, *, context: str, round_key: bytes, sender: str, receiver: str) -> bytes:
    return derive(
        secret,
        "shares",
        context=context,
        round_key=round_key.hex(),
        sender=sender,
        receiver=receiver,
    )
