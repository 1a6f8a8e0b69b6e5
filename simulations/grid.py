"""A Flower Grid inside one process: the same ServerApp and ClientApps, no SuperLink, scripted faults.

A SuperNode starts a process for every message, which takes seconds; here a message is a function call. The
grid is also the courier's clock: waiting for a site that will never answer moves simulated seconds on and
costs no time, so a run with faults is as fast, and as repeatable, as one without.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cohortium.common.protocol.flower import blank_context
from cohortium.simulations.faults import Fault, Faults, flip_bit, swap_envelope


@dataclass(slots=True)
class _Node:
    """A simulated SuperNode: what it was sent and what it did last, for the faults that need a past."""

    site: str
    context: Context
    last: Future[list[Message]] | None = None
    request: Message | None = None
    answer: Message | None = None
    held: list[Message] = field(default_factory=list)


class InProcessGrid(Grid):
    """sites: names, one per partition. wire: pass every message through Flower's own serialisation.
    threads > 1: sites compute side by side; what is returned, and in which order, stays the same.

    An app that raises looks as it would behind a SuperLink: an error reply with the exception's text.
    """

    def __init__(
        self,
        client: ClientApp,
        sites: Sequence[str],
        *,
        node_config: Mapping[str, str | int] | None = None,
        faults: Faults | None = None,
        wire: bool = True,
        threads: int = 1,
    ) -> None:
        run_id = secrets.randbits(62)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
        self._client = client
        self._run = Run.create_empty(run_id=run_id)
        self._faults = faults or Faults()
        self._wire = wire
        self._pool = ThreadPoolExecutor(threads, "site") if threads > 1 else None
        self._now = 0.0
        self._arriving: dict[str, tuple[float, Future[list[Message]]]] = {}
        self._nodes: dict[int, _Node] = {}
        for at, site in enumerate(sites):
            config = {**(node_config or {}), "partition-id": at, "num-partitions": len(sites)}
            context = blank_context(run_id=run_id, node_id=1 + at, node_config=config, run_config={})
            self._nodes[1 + at] = _Node(site, context)

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have arrived by now, in the order asked for; each is handed out once."""
        out: list[Message] = []
        for name in message_ids:
            due, answers = self._arriving.get(name, (0.0, None))
            if answers is not None and due <= self._now:
                del self._arriving[name]
                out += [self._carried(answer) for answer in answers.result()]
        return out

    def close(self) -> None:
        """Wait for work under way, so that no site is left in the middle of a message."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _push(self, message: Message) -> str:
        name = secrets.token_hex(16)
        node = self._nodes[message.metadata.dst_node_id]
        message = self._carried(message)
        message.metadata.__dict__["_message_id"] = name
        fault = self._faults.next(node.site, message.metadata.group_id)
        kind = fault.kind if fault else None
        if kind == "lost":
            return name
        if kind == "held":
            node.held.append(message)
            return name
        before, answers = node.last, Future[list[Message]]()
        node.last = answers

        def work() -> None:
            # A site handles one message at a time and in the order sent, whatever the pool does.
            if before is not None:
                before.exception()
            try:
                answers.set_result(self._handle(node, message, fault))
            except BaseException as stop:
                answers.set_exception(stop)
                if self._pool is None:
                    raise

        if self._pool is None:
            work()
        else:
            self._pool.submit(work)
        if kind != "reply-lost":
            self._arriving[name] = (self._now + (fault.seconds if fault else 0.0), answers)
        return name

    def _handle(self, node: _Node, message: Message, fault: Fault | None) -> list[Message]:
        """Everything that happens at one site because of one message; the answers that set out."""
        kind = fault.kind if fault else None
        if kind == "absent":
            return [_failure(message, ErrorCode.NODE_UNAVAILABLE, "")]
        if kind == "crash":
            return [_failure(message, ErrorCode.CLIENT_APP_CRASHED, "")]
        if kind == "replay" and node.request is not None:
            self._run_app(node, node.request)
        if kind == "tamper-request" and fault is not None:
            flip_bit(message, fault.bit)
        answers = [self._run_app(node, message) for _ in range(2 if kind == "twice" else 1)]
        for late in node.held:
            self._run_app(node, late)
        node.held.clear()
        previous, node.request, node.answer = node.answer, message, copy(answers[0])
        if kind == "crash-after":
            return [_failure(message, ErrorCode.CLIENT_APP_CRASHED, "")]
        for answer in answers:
            if answer.has_error():
                continue
            if kind == "tamper-reply" and fault is not None:
                flip_bit(answer, fault.bit)
            if kind == "stale" and previous is not None and not previous.has_error():
                swap_envelope(answer, previous)
        return answers

    def _run_app(self, node: _Node, message: Message) -> Message:
        try:
            return self._client(message=message, context=node.context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _failure(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>")

    def _carried(self, message: Message) -> Message:
        """The message as it comes out at the other end of the wire."""
        if not self._wire:
            return deepcopy(message)  # cheap: bytes are shared
        with no_object_id_recompute():  # as Flower's own grid does; without it each hash is taken four times
            parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
            return inflate_object_from_contents(message.object_id, parts)

    # What Flower's interface asks for and the courier does not use.
    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def _failure(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)
