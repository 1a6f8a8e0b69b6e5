"""How a run begins: hello, witnesses, start. Nobody is asked anything before its ledger was co-signed.

    run.hello    -> site.hello      a new signed line with a nonce, and the checkpoint of the ledger that ends in it
    run.witness  -> site.witnessed  everybody's checkpoints, and what shows that each goes on from what was seen last
    run.start    -> site.started    a site's own checkpoint, co-signed; its guard counts for itself

The coordinator is a witness too, by its mirror over all runs. A site whose ledger was rolled back, forked or copied is
told so, for its guard's log, and takes no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain, witness
from cohortium.common.privacy.chain import Checkpoint
from cohortium.common.privacy.plan import Plan
from cohortium.common.protocol.messages import Message
from cohortium.server.mirror import Mirror
from cohortium.strategies.base import COORDINATOR, Exchange


def quorum_of(plan: Plan) -> int:
    """How many sites must be there when a run begins."""
    return witness.quorum(sites=len(plan.sites), survivors=plan.survivors, colluders=plan.colluders)


def hellos(run: str, sites: Sequence[str], mirror: Mirror, *, at: int | None = None) -> dict[str, Message]:
    """The first message of a run to each site: how far its ledger is known here, by its own signature."""
    now = int(time.time()) if at is None else at
    return {
        site: Message(
            kind="run.hello",
            sender=COORDINATOR,
            fields={"run": run, "mirrored": mirror.size(site), "seen": mirror.seen(site), "at": now},
        )
        for site in sites
    }


def start(
    *,
    plan: Plan,
    run: str,
    key: Ed25519PrivateKey,
    identities: Mapping[str, Ed25519PublicKey],
    mirror: Mirror,
    exchange: Exchange,
    answered: Mapping[str, Message],
    refusals: dict[str, str],
) -> tuple[str, ...]:
    """Have the ledgers of the sites that said hello co-signed, and start these sites; who has begun, sorted.

    answered: the hellos, whose ledger lines are in the mirror already. refusals: a code is added for every site that
    does not begin; sites that the mirror refused are told by what is in there.
    """
    notes: dict[str, str] = {}
    own: dict[str, str] = {}
    for site, reply in sorted(answered.items()):
        note = reply.fields.get("checkpoint")
        try:
            own[site] = mirror.cosign(site, note if isinstance(note, str) else "", key)
        except CheckFailed as error:
            refusals[site] = error.code
            continue
        notes[site] = str(note)
    words = _gather(plan, run, mirror, exchange, notes, answered, identities)
    starts = {}
    told = {site for site, code in refusals.items() if code.startswith(("MIRROR-", "LEDGER-", "CHECKPOINT-"))}
    for site in sorted(set(notes) | told & set(plan.sites)):
        signatures, refused = words.get(site, ({}, {}))
        if site in own:
            signatures = {COORDINATOR: own[site], **signatures}
        else:
            refused = {COORDINATOR: refusals[site], **refused}
        starts[site] = Message(
            kind="run.start",
            sender=COORDINATOR,
            fields={"run": run, "signatures": signatures, "refused": refused},
        )
    begun = exchange(starts, "start") if starts else {}
    return tuple(sorted(site for site, reply in begun.items() if reply.kind == "site.started"))


Words = tuple[dict[str, str], dict[str, str]]
"""Of one site's ledger: witness -> co-signature, and witness -> WITNESS-... code."""


def _gather(
    plan: Plan,
    run: str,
    mirror: Mirror,
    exchange: Exchange,
    notes: Mapping[str, str],
    answered: Mapping[str, Message],
    identities: Mapping[str, Ed25519PublicKey],
) -> dict[str, Words]:
    words: dict[str, Words] = {site: ({}, {}) for site in notes}
    if len(plan.sites) < 3 or len(notes) < 2:
        return words  # nobody else to ask, or nobody needs to be
    heads = {site: chain.verify_checkpoint(note, identities[site], owner=site) for site, note in notes.items()}
    known: dict[tuple[str, int], bytes] = {}
    asks: dict[str, Message] = {}
    for asked in notes:
        before = answered[asked].fields.get("witnessed")
        sizes: Mapping[str, Any] = before if isinstance(before, dict) else {}
        blobs = {}
        for site in notes:
            size, head = sizes.get(site, 0), heads[site]
            if site == asked or type(size) is not int or not 0 <= size < head.size:
                continue
            if (site, size) not in known:
                known[site, size] = mirror.digests(site, size, head.size)
            blobs[f"proof/{site}"] = known[site, size]
        others = {site: note for site, note in notes.items() if site != asked}
        asks[asked] = Message(
            kind="run.witness", sender=COORDINATOR, fields={"run": run, "checkpoints": others}, blobs=blobs
        )
    for asked, reply in exchange(asks, "witness").items():
        if reply.kind != "site.witnessed":
            continue
        for at, name in ((0, "signatures"), (1, "refused")):
            said = reply.fields.get(name)
            for site, word in said.items() if isinstance(said, dict) else ():
                if site in words and site != asked and (at == 1 or _good(word, heads[site], site, asked, identities)):
                    words[site][at][asked] = str(word)[:128]
    return words


def _good(word: object, head: Checkpoint, owner: str, asked: str, identities: Mapping[str, Ed25519PublicKey]) -> bool:
    """A co-signature that its site's guard will count."""
    return witness.cosigned(head, word, owner=identities[owner], witness=asked, public=identities[asked])


def only(exchange: Exchange, sites: Sequence[str]) -> Exchange:
    """An exchange that speaks with these sites alone: those that have not begun are not asked anything."""
    allowed: Callable[[str], bool] = frozenset(sites).__contains__

    def asked(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        return exchange({site: message for site, message in messages.items() if allowed(site)}, label)

    return asked


def between_runs(mirror: Mirror, owner: str, checkpoint: str, key: Ed25519PrivateKey) -> list[str]:
    """The coordinator's co-signature for a site that asks outside a run: ["coordinator HEX"], or [] for lines not
    seen here yet (the next run brings them).

    Raises CheckFailed MIRROR-ROLLBACK or MIRROR-FORK, CHECKPOINT-... where the note is not the owner's.
    """
    try:
        return [f"{COORDINATOR} {mirror.cosign(owner, checkpoint, key)}"]
    except CheckFailed as error:
        if error.code == "MIRROR-AHEAD":
            return []
        raise
