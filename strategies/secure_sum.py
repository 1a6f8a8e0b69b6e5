"""`secure-sum`: the coordinator learns only the sum of the surviving sites' noised vectors.

Three exchanges a release: mask (question and roster out, masked vector back), agree (survivor set, signature),
unmask (signatures, shares; the next release's round keys ride on this answer). A site that has no keys for a round
gets one exchange more. Design and rules: common/protocol/secure_sum.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import PeerUnreachable, ProtocolError
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.protocol.channels import ChannelKey, ChannelKeys, Directory
from cohortium.common.protocol.fixedpoint import from_ring
from cohortium.common.protocol.messages import Message, content_digest
from cohortium.common.protocol.round_messages import Masked, Prepared, Revealed, RoundParams, SurvivorVote
from cohortium.common.protocol.secure_sum import ServerRound
from cohortium.common.queries import AnyQuery
from cohortium.strategies.base import COORDINATOR, Exchange, SiteSum, ask_message


class SecureSum:
    """One run's secure sums.

    mirrored: how many ledger lines of a site the mirror already has. notebook: a folder for what must survive the
    coordinator's crash inside a round: channel keys, prepares, the survivor set. All of it is public to the server.
    """

    mode = "secure-sum"

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        identities: Mapping[str, Ed25519PublicKey],
        exchange: Exchange,
        mirrored: Callable[[str], int],
        notebook: Path | None = None,
    ) -> None:
        self._notebook = notebook
        self._plan, self._run, self._identities = plan, run, dict(identities)
        self._exchange, self._mirrored = exchange, mirrored
        self._channels: ChannelKeys | None = None
        self._directory: Directory | None = None  # of these channel keys, verified once
        self._told: set[str] = set()
        self._ready: dict[str, Prepared] = {}  # prepares that rode on the last round's answers
        self._ready_for: tuple[int, int] | None = None

    def start(self, hellos: Mapping[str, Message]) -> None:
        known = self._read("channels")
        if known is not None:  # a resumed run: sites accept one list of keys per run
            self._channels = ChannelKeys.from_message(Message(kind="sum.channels", sender=COORDINATOR, fields=known))
            return
        keys: list[ChannelKey] = []
        for site in sorted(hellos):
            _admit(lambda r: keys.append(ChannelKey.from_message(_inner(r, "channel"))), hellos[site])
        if len(keys) < self._plan.survivors:
            raise PeerUnreachable(
                "SUM-TOO-FEW",
                f"{len(keys)} sites answered, {self._plan.survivors} are needed",
                hint="start the missing sites and resume the run",
            )
        self._channels = ChannelKeys(run_id=self._run, keys=tuple(keys))
        self._write("channels", self._channels.to_message().fields)

    @property
    def channels(self) -> ChannelKeys:
        assert self._channels is not None
        return self._channels

    def _read(self, name: str) -> dict[str, Any] | None:
        path = None if self._notebook is None else self._notebook / f"{name}.json"
        return json.loads(path.read_text()) if path is not None and path.exists() else None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Whole or not at all, before the message that depends on it is sent."""
        if self._notebook is None:
            return
        self._notebook.mkdir(parents=True, exist_ok=True)
        path = self._notebook / f"{name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(value))
        path.with_suffix(".tmp").replace(path)

    def answer(self, index: int, stage: Stage, query: AnyQuery, *, next_dim: int | None = None) -> SiteSum:
        plan = self._plan
        params = RoundParams(
            run_id=self._run,
            round=index,
            sites=plan.sites,
            survivors=plan.survivors,
            colluders=plan.colluders,
            dim=query.dim,
        )
        if self._directory is None:
            self._directory = Directory.verified(run_id=self._run, identities=self._identities, keys=self.channels.keys)
        server = ServerRound(params=params, directory=self._directory)
        sent: dict[str, int] = {}

        noted = self._read("round") or {}
        if noted.get("context") != params.digest():
            noted = {"context": params.digest(), "prepared": {}, "survivors": None, "votes": None}
            for site, prepared in self._prepared(params, sent).items():
                if _admit(server.add_prepared, prepared):
                    noted["prepared"][site] = _to_json(prepared.to_message())
            self._write("round", noted)
        else:  # the coordinator died inside this round: the same roster goes out again
            for site, value in noted["prepared"].items():
                _admit(server.add_prepared, Prepared.from_message(_from_json("sum.prepared", site, value)))
        fields, blobs = query.to_wire()
        rosters = server.roster(content_digest(query.kind, fields, blobs))
        asks = {}
        for site, roster in rosters.items():
            said = roster.to_message()
            asks[site] = ask_message(
                self._run,
                index,
                query,
                mirrored=self._mirrored(site),
                extra={"roster": said.fields},
                extra_blobs={f"roster/{peer}": blob for peer, blob in said.blobs.items()},
            )
        for site, reply in self._ask(asks, f"{index}/mask", sent).items():
            if noted["survivors"] is None or site in noted["survivors"]:
                _admit(lambda r: server.add_masked(Masked.from_message(r)), reply)

        chosen = server.survivors()
        noted["survivors"] = list(chosen.survivors)
        self._write("round", noted)
        if noted.get("votes") is None:
            fields = {"run": self._run, "index": index, "survivors": chosen.to_message().fields}
            vote = Message(kind="run.survivors", sender=COORDINATOR, fields=fields)
            for reply in self._ask(dict.fromkeys(chosen.survivors, vote), f"{index}/agree", sent).values():
                _admit(lambda r: server.add_vote(SurvivorVote.from_message(r)), reply)
        else:  # it died after the signatures: a site that has revealed answers the very same request, no other
            for site, fields in noted["votes"].items():
                said = Message(kind="sum.vote", sender=site, fields=fields)
                _admit(lambda r: server.add_vote(SurvivorVote.from_message(r)), said)

        request = server.reveal_request()
        ballot = chosen.digest()
        noted["votes"] = {
            site: SurvivorVote(context=chosen.context, ballot=ballot, site=site, signature=signature)
            .to_message()
            .fields
            for site, signature in request.votes.items()
        }
        self._write("round", noted)
        following = None if next_dim is None or index + 1 >= plan.releases else [index + 1, next_dim]
        reveals = {
            site: Message(
                kind="run.reveal",
                sender=COORDINATOR,
                fields={
                    "run": self._run,
                    "index": index,
                    "reveal": request.to_message().fields,
                    "next": following,
                    "mirrored": self._mirrored(site),
                },
            )
            for site in server.waiting_for()
        }
        self._ready, self._ready_for = {}, None if following is None else (index + 1, following[1])
        for site, reply in self._ask(reveals, f"{index}/unmask", sent).items():
            _admit(lambda r: server.add_revealed(Revealed.from_message(_inner(r, "revealed"))), reply)
            if following is not None and reply.fields.get("prepared") is not None:
                # One that cannot be read is asked for again in the next round.
                _admit(
                    lambda r, site=site: self._ready.update({site: Prepared.from_message(_inner(r, "prepared"))}), reply
                )
        total = server.sum()
        stayed = server.survivor_names
        return SiteSum(
            values=from_ring(total),
            lattice=query.lattice,
            sites=stayed,
            variance_factor=len(stayed) / plan.shares,
            dropped=tuple(s for s in plan.sites if s not in stayed),
            sent_bytes=sent,
        )

    def _prepared(self, params: RoundParams, sent: dict[str, int]) -> dict[str, Prepared]:
        """This round's prepares: those that rode ahead, and one exchange for the sites that have none."""
        ready = self._ready if self._ready_for == (params.round, params.dim) else {}
        missing = [key.site for key in self.channels.keys if key.site not in ready]
        messages = {}
        for site in missing:
            fields: dict[str, object] = {"run": self._run, "index": params.round, "dim": params.dim}
            if site not in self._told:
                fields["channels"] = self.channels.to_message().fields
            messages[site] = Message(kind="run.prepare", sender=COORDINATOR, fields=fields)
        # Nobody is missing in most rounds; then this costs nothing.
        replies = self._ask(messages, f"{params.round}/prepare", sent) if messages else {}
        self._told |= set(replies)
        fresh = {}
        for site, reply in replies.items():
            _admit(lambda r, site=site: fresh.update({site: Prepared.from_message(r)}), reply)
        return {**ready, **fresh}

    def _ask(self, messages: Mapping[str, Message], label: str, sent: dict[str, int]) -> dict[str, Message]:
        replies = self._exchange(messages, label)
        for site, reply in replies.items():
            sent[site] = sent.get(site, 0) + sum(len(blob) for blob in reply.blobs.values()) + 1024
        return replies


def _admit(take: Callable[..., object], message: object) -> bool:
    """Hand a site's message to the round; one that breaks the rules counts as that site's absence."""
    try:
        take(message)
    except ProtocolError as error:
        if error.code == "SUM-VOID":
            raise
        return False
    return True


def _inner(reply: Message, name: str) -> Message:
    """A message of the round that rides inside a site's reply."""
    fields = reply.fields.get(name)
    if not isinstance(fields, dict):
        raise ProtocolError("SUM-FORMAT", f"a reply without its part {name!r}")
    blobs = reply.blobs if name == "prepared" else {}
    return Message(kind=f"sum.{name}", sender=reply.sender, fields=fields, blobs=blobs)


def _to_json(message: Message) -> dict[str, Any]:
    return {"fields": message.fields, "blobs": {name: blob.hex() for name, blob in message.blobs.items()}}


def _from_json(kind: str, site: str, value: dict[str, Any]) -> Message:
    blobs = {name: bytes.fromhex(text) for name, text in value["blobs"].items()}
    return Message(kind=kind, sender=site, fields=value["fields"], blobs=blobs)
