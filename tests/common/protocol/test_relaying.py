"""Both ends' bookkeeping: whatever breaks, an answer belongs to its question, and none is worked out for nothing."""

from __future__ import annotations

import random

import pytest

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.relaying import (
    MOST_UNANSWERED,
    TICKET_BYTES,
    Answering,
    Asking,
    check_run,
    invitation,
    read_invitation,
)


class Link:
    """One connection: what each end still has to send over it."""

    def __init__(self, hub: Asking, courier: Answering) -> None:
        self.down = hub.resume(courier.received, courier.numbering)
        courier.resume(hub.received, hub.numbering)
        self.up = hub.received


def world(seed: int) -> tuple[int, int, int]:
    """Random operations; (exchanges answered, times the guard was asked, restarts). Every answer is checked."""
    dice = random.Random(seed)
    hub, courier = Asking(numbering=b"0"), Answering()
    link: Link | None = None
    asked, answered, handled, restarts, lives = 0, set[int](), list[tuple[int, bytes]](), 0, 0
    for step in range(400):
        what = dice.random()
        if what < 0.2 and len(hub.waiting) < MOST_UNANSWERED:
            asked += 1
            hub.ask(asked, b"%d" % asked)
        elif what < 0.3:
            link = Link(hub, courier)
        elif what < 0.35:
            link = None  # frames under way are lost, however far they were
        elif what < 0.37:
            courier, link, restarts, lives = Answering(), None, restarts + 1, lives + 1
        elif what < 0.39:
            # The hub forgets everything; the ServerApp attaches again and repeats what it still waits for.
            waiting = list(hub.waiting.values())
            hub, link, restarts, lives = Asking(numbering=b"%d" % (step + 1)), None, restarts + 1, lives + 1
            for exchange, envelope in waiting:
                hub.ask(exchange, envelope)
        elif link is not None and what < 0.7:
            found = hub.after(link.down)
            if found is not None:
                link.down, envelope = found
                courier.acknowledged(hub.received)
                if courier.take(link.down):
                    handled.append((lives, envelope))
                    courier.answer(link.down, b"answer to " + envelope)
        elif link is not None:
            number = courier.after(link.up)
            if number is not None:
                link.up = number
                envelope, _ = courier.kept[number]
                exchange = hub.answered(number)
                if exchange is not None:
                    assert envelope == b"answer to %d" % exchange
                    assert exchange not in answered
                    answered.add(exchange)
    assert len(courier.kept) <= MOST_UNANSWERED and len(hub.waiting) <= MOST_UNANSWERED
    assert len(set(handled)) == len(handled), "while both ends live, a question reaches the guard once"
    return len(answered), len(handled), restarts


def test_random_worlds() -> None:
    answered = handled = restarts = 0
    for seed in range(300):
        one = world(seed)
        answered, handled, restarts = answered + one[0], handled + one[1], restarts + one[2]
    assert answered > 5000 and restarts > 1000
    assert handled < answered + 2 * restarts + 300


def test_the_oldest_question_gives_way() -> None:
    hub = Asking(numbering=b"n")
    for exchange in (1, 2, 2, 3):
        hub.ask(exchange, b"q%d" % exchange)
    assert hub.waiting == {2: (2, b"q2"), 3: (3, b"q3")}
    assert hub.answered(1) is None and hub.answered(2) == 2 and hub.answered(2) is None


@pytest.mark.parametrize("acknowledged", [2, 2**60])
def test_an_acknowledgement_of_what_was_never_sent_is_refused(acknowledged: int) -> None:
    hub = Asking(numbering=b"n")
    hub.ask(1, b"q")
    with pytest.raises(ProtocolError):
        hub.resume(acknowledged, b"n")
    assert hub.resume(acknowledged, b"another hub's") == 0


def test_invitations() -> None:
    ticket = bytes(range(TICKET_BYTES))
    said = invitation("run-1", ticket)
    assert read_invitation(said) == ("run-1", ticket)
    for wrong in (
        b"",
        b"[]",
        b"null",
        b"{",
        said + b" ",
        said.replace(b"run-1", b""),
        invitation("run-1", ticket[1:]),
        invitation("r" * 201, ticket),
        said.replace(b'"run-1"', b"7"),
        said.replace(b"run-1", b"r\\nn"),
        b'{"extra":1,' + said[1:],
        b"[" * 700,
        said.replace(b"0001", b"000G"),
        b"x" * 10_000,
    ):
        with pytest.raises(ProtocolError) as caught:
            read_invitation(wrong)
        assert caught.value.code == "RELAY-INVITATION"


def test_names_of_runs() -> None:
    assert check_run("demo-1a2b")
    assert not any(check_run(name) for name in ("", "ü", "a\nb", "x" * 201, None, 7))
