"""What each kind of message of the gate holds and what it cannot hold, for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """title: in a word. holds, cannot: one sentence each. records: whether numbers made from records are in it."""

    title: str
    holds: str
    cannot: str
    records: bool = False


NOTHING = "No number made from records: the gate lets none into a message of this kind."
CHARGED = "charged"
"""Not a message: a release that was paid for, and of which nothing left."""
KINDS: dict[str, Kind] = {
    "site.hello": Kind(
        title="Hello",
        holds="The plan's name, signed ledger lines that the coordinator lacked, a checkpoint, a key of this run. "
        "With tell_cap in the policy, the lifetime cap.",
        cannot=NOTHING,
    ),
    "site.witnessed": Kind(
        title="Witness's signatures", holds="Signatures under the other hospitals' ledger heads.", cannot=NOTHING
    ),
    "site.started": Kind(title="Ready", holds="The run's name: this hospital may begin.", cannot=NOTHING),
    "sum.prepared": Kind(
        title="Round keys",
        holds="Public keys of one round and sealed shares of fixed length for the other hospitals.",
        cannot=NOTHING,
    ),
    "sum.masked": Kind(
        title="Masked noised sum",
        holds="One vector: a clipped sum over patients, with this hospital's noise, under a mask that only the sum of "
        "all hospitals removes.",
        cannot="No row, no exact count, no number that can be read alone: without the other hospitals' vectors each "
        "number is uniform. After unmasking, the total alone is seen, with noise.",
        records=True,
    ),
    "sum.vote": Kind(title="Vote", holds="A signature under the list of hospitals that answered.", cannot=NOTHING),
    "site.revealed": Kind(
        title="Unmasking",
        holds="Shares that remove the masks from the total, signed ledger lines, keys of the next round.",
        cannot=NOTHING,
    ),
    "site.noised": Kind(
        title="Noised sum",
        holds="One vector: a clipped sum over patients with noise enough to protect each patient by itself, and signed "
        "ledger lines.",
        cannot="No row and no exact count: every number has noise of the approved size.",
        records=True,
    ),
    "site.finished": Kind(title="Farewell", holds="Signed ledger lines and a signed checkpoint.", cannot=NOTHING),
    "site.refused": Kind(
        title="Refusal",
        holds="One word from a fixed list.",
        cannot="No reason, no text, no number. That this hospital said no at that moment is the one thing it tells.",
    ),
    CHARGED: Kind(
        title="Charged, nothing left",
        holds="Nothing: the release was paid for in the ledger, and then a crash or a stop came between.",
        cannot="It is not sent later. The charge stays, because the records may have been read.",
    ),
}
