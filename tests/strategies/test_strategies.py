"""What the coordinator does with answers: exact sums, honest variance, and malformed answers counted as absence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pytest
from hospital import Ward, counts, plan, stage, ward

from cohortium.common.errors import PeerUnreachable, ProtocolError
from cohortium.common.protocol.messages import Message
from cohortium.strategies.base import SiteSum

SITES = ("a", "b", "c", "d")
QUIET = [stage("one", "counts", 0, noise_multiplier=0.0)]
Spoil = Callable[[Message], Message | None]


@pytest.fixture(params=["local", "secure-sum"])
def consortium(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = ward(tmp_path, plan(SITES, mode=request.param, stages=QUIET), noise=False)
    yield made
    made.close()


def answer(made: Ward, spoil: Mapping[str, Spoil], step: str) -> SiteSum:
    """Release 0 where some sites' replies of one step arrive changed, or not at all (None)."""

    def changed(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        replies = made.exchange(messages, label)
        if label.endswith(step):
            spoilt = {s: spoil[s](r) if s in spoil else r for s, r in replies.items()}
            replies = {s: r for s, r in spoilt.items() if r is not None}
        return replies

    return made.strategy(exchange=changed).answer(0, made.plan.stage_of(0), counts())


def step_of(made: Ward) -> str:
    return "/noised" if made.plan.mode == "local" else "/mask"


def fields(**change: Any) -> Spoil:
    return lambda reply: dataclasses.replace(reply, fields={**reply.fields, **change})


def blobs(**change: bytes) -> Spoil:
    return lambda reply: dataclasses.replace(reply, blobs=dict(change))


def test_all_answers_sum_exactly(consortium: Ward) -> None:
    total = answer(consortium, {}, step_of(consortium))
    assert np.array_equal(total.values, checks.plain_sum(consortium, counts(), SITES))
    assert total.sites == SITES and total.dropped == () and set(total.sent_bytes) == set(SITES)
    shares = {"local": 4.0, "secure-sum": 4 / 3}[consortium.plan.mode]
    assert total.variance_factor == pytest.approx(shares)


BAD: dict[str, Spoil] = {
    "no answer": lambda reply: None,
    "another kind": lambda reply: dataclasses.replace(reply, kind="site.finished"),
    "no blob": blobs(),
    "a short vector": blobs(values=bytes(8)),
    "a torn vector": blobs(values=bytes(13)),
    "no fields": lambda reply: dataclasses.replace(reply, fields={}),
    "another round": fields(index=7, context="00" * 32),
    "another lattice": fields(lattice="0x1p-3", roster="00" * 32),
}


@pytest.mark.parametrize("why", BAD)
def test_a_malformed_answer_is_that_sites_absence(why: str, consortium: Ward) -> None:
    total = answer(consortium, {"b": BAD[why]}, step_of(consortium))
    assert total.sites == ("a", "c", "d") and total.dropped == ("b",)
    assert np.array_equal(total.values, checks.plain_sum(consortium, counts(), ("a", "c", "d")))


def test_nobody_or_too_few_give_no_sum(consortium: Ward) -> None:
    few = SITES[:2] if consortium.plan.mode == "secure-sum" else SITES
    with pytest.raises(ProtocolError, match="SUM-TOO-FEW"):
        answer(consortium, dict.fromkeys(few, BAD["no answer"]), step_of(consortium))


def test_an_answer_out_of_range_is_left_out(tmp_path: Path) -> None:
    made = ward(tmp_path, plan(SITES, stages=QUIET), noise=False)
    huge = np.full(counts().dim, 2**62, dtype="<i8").tobytes()
    assert answer(made, {"c": blobs(values=huge)}, "/noised").sites == ("a", "b", "d")
    made.close()


@pytest.mark.parametrize("step", ["/prepare", "/agree", "/unmask"])
@pytest.mark.parametrize("why", ["no answer", "no fields", "another kind"])
def test_one_site_that_fails_in_any_exchange_does_not_spoil_the_sum(step: str, why: str, tmp_path: Path) -> None:
    made = ward(tmp_path, plan(SITES, mode="secure-sum", stages=QUIET), noise=False)
    total = answer(made, {"b": BAD[why]}, step)
    assert np.array_equal(total.values, checks.plain_sum(made, counts(), total.sites))
    assert set(total.sites) >= {"a", "c", "d"}
    made.close()


def test_prepares_that_ride_ahead_and_cannot_be_read_are_asked_for_again(tmp_path: Path) -> None:
    two = [*QUIET, stage("two", "counts", 1, noise_multiplier=0.0)]
    made = ward(tmp_path, plan(SITES, mode="secure-sum", stages=two), noise=False)

    def spoil(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        replies = made.exchange(messages, label)
        if label == "0/unmask":
            replies["b"] = fields(prepared={"context": 3})(replies["b"])  # type: ignore[assignment]
            replies["c"] = fields(prepared="x")(replies["c"])  # type: ignore[assignment]
        return replies

    strategy = made.strategy(exchange=spoil)
    for index in (0, 1):
        total = strategy.answer(index, made.plan.stage_of(index), counts(), next_dim=counts().dim)
        assert total.sites == SITES
        assert np.array_equal(total.values, checks.plain_sum(made, counts(), SITES))
    made.close()


def test_a_secure_sum_does_not_start_with_too_few_sites(tmp_path: Path) -> None:
    made = ward(tmp_path, plan(SITES, mode="secure-sum", stages=QUIET), noise=False)
    hello = Message(kind="run.hello", sender="coordinator", fields={"run": "run-1", "mirrored": 0})
    hellos = made.exchange(dict.fromkeys(SITES, hello), "hello")
    made.close()
    strategy = checks_strategy(made)
    hellos["a"] = dataclasses.replace(hellos["a"], fields={"channel": {"public": 5}})
    hellos["b"] = dataclasses.replace(hellos["b"], fields={})
    with pytest.raises(PeerUnreachable, match="SUM-TOO-FEW"):
        strategy.start(hellos)


def checks_strategy(made: Ward) -> Any:
    from hospital import RUN, key

    from cohortium.strategies.secure_sum import SecureSum

    identities = {site: key(site).public_key() for site in SITES}
    return SecureSum(plan=made.plan, run=RUN, identities=identities, exchange=made.exchange, mirrored=lambda site: 0)
