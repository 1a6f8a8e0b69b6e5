"""GridCourier against a Grid that answers exactly what a test says, when it says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cohortium.common.errors import PeerUnreachable, ProtocolError
from cohortium.common.protocol.flower import Parcel, Refusal, reply, unpack
from cohortium.server.app import coordinator_app
from cohortium.server.transport import Absence, Clock, GridCourier, WallClock

Answer = Callable[[Message], list[tuple[float, Message]]]
NAMES = {1: "ulm", 2: "bern", 3: "graz"}


class ScriptedGrid(Grid):
    """Nodes answer hello with their name and all else by `answer`: pairs of seconds from now and reply."""

    def __init__(self, names: dict[int, str], answer: Answer | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 99
        self.names, self.answer = dict(names), answer or echo
        self.time, self.sent, self.on_way = 0.0, 0, []  # type: ignore[var-annotated]
        self.pushed: list[Message] = []
        self.delivered: set[str] = set()
        self.refuse_push: set[int] = set()
        self.down = False
        self.on_sleep: Callable[[float], None] = lambda now: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds
        self.on_sleep(self.time)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.refuse_push:
                continue  # as Flower's in-memory grid does: fewer ids than messages
            self.sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self.sent}"
            ids.append(f"m{self.sent}")
            self.pushed.append(message)
            if message.metadata.message_type == "query.hello":
                answers = [(0.0, reply(Parcel(site=self.names[node]), to=message))] if self.names[node] else []
            else:
                answers = self.answer(message)
            self.on_way += [(self.time + wait, answer) for wait, answer in answers]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.down:
            raise ConnectionError("the link is down")
        for name in message_ids:
            if name in self.delivered:
                raise KeyError(name)  # as Flower's in-memory state does
        here = [pair for pair in self.on_way if pair[0] <= self.time]
        self.on_way = [pair for pair in self.on_way if pair[0] > self.time]
        self.delivered |= {message.metadata.reply_to_message_id for _, message in here}
        return [message for _, message in here]

    def set_run(self, run: Run) -> None:
        raise AssertionError

    @property
    def run(self) -> Run:
        raise AssertionError

    def create_message(self, *args: object, **more: object) -> Message:
        raise AssertionError

    def send_and_receive(self, *args: object, **more: object) -> Iterable[Message]:
        raise AssertionError("it sleeps three seconds")


def echo(message: Message) -> list[tuple[float, Message]]:
    parcel = unpack(message.content)
    return [(0.0, reply(Parcel(envelope=b"re:" + parcel.envelope, site=parcel.site), to=message))]


def from_node(node: int, message: Message) -> Message:
    message.metadata.__dict__["_src_node_id"] = node
    return message


def ready(answer: Answer | None = None) -> tuple[ScriptedGrid, GridCourier]:
    grid = ScriptedGrid(NAMES, answer)
    courier = GridCourier(grid)
    courier.discover(NAMES.values(), timeout_s=10)
    return grid, courier


EACH = {"ulm": b"u", "bern": b"b", "graz": b"g"}


def test_each_site_gets_its_own_envelope_and_order_is_by_name() -> None:
    grid, courier = ready()
    assert courier.sites == ("bern", "graz", "ulm")
    got = courier.exchange(EACH, timeout_s=10, label="round-1")
    assert list(got.items()) == [("bern", b"re:b"), ("graz", b"re:g"), ("ulm", b"re:u")]
    assert courier.absent == {} and courier.ignored == 0
    assert {m.metadata.group_id for m in grid.pushed[3:]} == {"round-1"}
    assert grid.time == 0.0, "nothing to wait for"
    assert courier.exchange({"graz": b"2"}, timeout_s=10) == {"graz": b"re:2"}


def by_site(rules: dict[str, Answer]) -> Answer:
    return lambda message: rules.get(unpack(message.content).site, echo)(message)


def failing(message: Message) -> list[tuple[float, Message]]:
    return [(0.0, Message(Error(code=2, reason="patient 17"), reply_to=message))]


def superlink_says_gone(message: Message) -> list[tuple[float, Message]]:
    answer = Message(Error(code=5, reason="node unavailable"), reply_to=message)
    return [(53.0, from_node(99, answer))]


def refusing(message: Message) -> list[tuple[float, Message]]:
    return [(0.0, reply(Parcel(refusal=Refusal.GUARD_FAILED), to=message))]


def talkative(message: Message) -> list[tuple[float, Message]]:
    return [(0.0, Message(RecordDict({"metrics": ConfigRecord({"examples": 17})}), reply_to=message))]


def impostor(message: Message) -> list[tuple[float, Message]]:
    return [(0.0, from_node(1, reply(Parcel(envelope=b"forged", site="graz"), to=message)))]


def silent(message: Message) -> list[tuple[float, Message]]:
    return []


@pytest.mark.parametrize(
    ("answer", "reason", "waited"),
    [
        (failing, Absence.FLOWER, 0.0),
        (superlink_says_gone, Absence.FLOWER, 53.0),
        (refusing, Absence.REFUSED, 0.0),
        (talkative, Absence.MALFORMED, 0.0),
        (silent, Absence.TIMEOUT, 60.0),
        (impostor, Absence.MALFORMED, 0.0),
    ],
)
def test_a_site_that_does_not_deliver_is_absent(answer: Answer, reason: Absence, waited: float) -> None:
    grid, courier = ready(by_site({"graz": answer}))
    got = courier.exchange(EACH, timeout_s=60)
    assert got == {"bern": b"re:b", "ulm": b"re:u"}
    assert courier.absent == {"graz": reason}
    assert waited <= grid.time <= waited + 0.3
    # and the next exchange starts clean
    grid.answer = echo
    assert set(courier.exchange(EACH, timeout_s=60)) == set(EACH) and courier.absent == {}


def test_a_late_answer_never_counts_for_a_later_exchange() -> None:
    def late(message: Message) -> list[tuple[float, Message]]:
        return [(90.0, answer) for _, answer in echo(message)]

    grid, courier = ready(by_site({"graz": late}))
    assert "graz" not in courier.exchange(EACH, timeout_s=60)
    grid.sleep(40)
    grid.answer = by_site({"graz": silent})
    assert "graz" not in courier.exchange(EACH, timeout_s=60)
    assert courier.ignored == 1


def test_the_first_of_two_answers_counts() -> None:
    def twice(message: Message) -> list[tuple[float, Message]]:
        second = reply(Parcel(envelope=b"second", site="graz"), to=message)
        return [*echo(message), (0.0, second)]

    _, courier = ready(by_site({"graz": twice}))
    assert courier.exchange(EACH, timeout_s=60)["graz"] == b"re:g"
    assert courier.ignored == 1


def test_an_answer_to_nothing_is_ignored() -> None:
    def stray(message: Message) -> list[tuple[float, Message]]:
        other = reply(Parcel(envelope=b"stray"), to=message)
        metadata = other.metadata
        metadata.__dict__["_reply_to_message_id"] = "never sent"
        return [(0.0, make_message(metadata=metadata, content=other.content))]

    _, courier = ready(by_site({"graz": stray}))
    assert "graz" not in courier.exchange(EACH, timeout_s=1)
    assert courier.ignored == 1


def test_quorum_waits_only_the_grace_for_stragglers() -> None:
    def slow(message: Message) -> list[tuple[float, Message]]:
        return [(30.0, answer) for _, answer in echo(message)]

    grid, courier = ready(by_site({"graz": slow}))
    got = courier.exchange(EACH, timeout_s=60, quorum=2, grace_s=5)
    assert set(got) == {"bern", "ulm"} and courier.absent == {"graz": Absence.STOPPED}
    assert 5 <= grid.time <= 5.3
    got = courier.exchange(EACH, timeout_s=60, quorum=3, grace_s=5)
    assert set(got) == set(EACH)
    # a site may still arrive within the grace
    got = courier.exchange(EACH, timeout_s=60, quorum=2, grace_s=31)
    assert set(got) == set(EACH)
    # the grace never prolongs the wait
    start = grid.time
    courier.exchange(EACH, timeout_s=10, quorum=2, grace_s=31)
    assert grid.time - start <= 10.3 and courier.absent == {"graz": Absence.TIMEOUT}


def test_unknown_sites_and_refused_pushes_do_not_disturb_the_others() -> None:
    grid, courier = ready()
    grid.refuse_push = {1}
    got = courier.exchange({**EACH, "oslo": b"o"}, timeout_s=60)
    assert set(got) == {"bern", "graz"}
    assert courier.absent == {"ulm": Absence.NOT_SENT, "oslo": Absence.UNKNOWN}


def test_messages_outlive_the_wait() -> None:
    grid, courier = ready()
    courier.exchange(EACH, timeout_s=1000)
    assert all(message.metadata.ttl > 1000 for message in grid.pushed[3:])


def test_discover_waits_for_sites_that_come_later() -> None:
    grid = ScriptedGrid({1: "ulm"})
    grid.on_sleep = lambda now: grid.names.update({2: "bern"}) if now > 6 else None
    courier = GridCourier(grid)
    assert courier.discover(["ulm", "bern"], timeout_s=60) == ("bern", "ulm")
    assert 6 <= grid.time <= 10
    assert len(grid.pushed) == 2, "a node that answered is not asked again"


def test_discover_asks_again_where_hello_was_lost() -> None:
    grid = ScriptedGrid({1: "ulm", 2: ""})
    grid.on_sleep = lambda now: grid.names.update({2: "bern"}) if now > 3 else None
    assert GridCourier(grid).discover(["ulm", "bern"], timeout_s=60) == ("bern", "ulm")


def test_discover_with_a_quorum_and_without() -> None:
    grid = ScriptedGrid({1: "ulm", 2: "stranger"})
    courier = GridCourier(grid)
    assert courier.discover(["ulm", "bern"], timeout_s=5, quorum=1) == ("ulm",)
    with pytest.raises(PeerUnreachable) as caught:
        courier.discover(["ulm", "bern"], timeout_s=5)
    assert caught.value.code == "GRID-TOO-FEW-SITES" and caught.value.where == ("bern",)
    assert courier.exchange({"ulm": b"u"}, timeout_s=1) == {"ulm": b"re:u"}


def test_two_nodes_with_one_name_are_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        GridCourier(ScriptedGrid({1: "ulm", 2: "ulm"})).discover(["ulm"], timeout_s=5)
    assert caught.value.code == "GRID-SITE-TWICE"


def test_a_dead_superlink_is_unreachable() -> None:
    grid, courier = ready()
    grid.down = True
    with pytest.raises(PeerUnreachable) as caught:
        courier.exchange(EACH, timeout_s=60)
    assert caught.value.code == "GRID-DOWN"


def test_stop_ends_the_next_wait() -> None:
    stop = threading.Event()
    grid = ScriptedGrid(NAMES, silent)
    courier = GridCourier(grid, stop=stop)
    courier.discover(NAMES.values(), timeout_s=10)
    grid.on_sleep = lambda now: stop.set() if now > 20 else None
    with pytest.raises(PeerUnreachable) as caught:
        courier.exchange(EACH, timeout_s=1000)
    assert caught.value.code == "RUN-STOPPED" and grid.time < 21


def test_wall_clock_wakes_when_stopped() -> None:
    stop = threading.Event()
    clock = WallClock(stop)
    assert isinstance(clock, Clock)
    before = clock.now()
    clock.sleep(0.02)
    assert clock.now() - before >= 0.015
    stop.set()
    clock.sleep(60)
    assert clock.now() - before < 30


def test_the_server_app_hands_over_a_courier() -> None:
    seen: list[tuple[str, ...]] = []
    server = coordinator_app(lambda courier, _: seen.append(courier.discover(["ulm"], timeout_s=1)))
    server(ScriptedGrid(NAMES), None)  # type: ignore[arg-type]
    assert seen == [("ulm",)]
