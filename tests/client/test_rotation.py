"""Another identity: three signatures, no charge lost, nothing asked twice, and a crash anywhere goes on or refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hospital import RUN, key, plan, policy, proposal, table

from cohortium.client import rotation
from cohortium.client.approval import approve
from cohortium.client.gate import Gate
from cohortium.client.guard import Guard
from cohortium.client.rotation import Rotated, rotate
from cohortium.client.site import Site, new_site
from cohortium.common.errors import CohortiumError, PeerUnreachable, Refused
from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.invitation import check_rotation
from cohortium.common.protocol.signing import load_private, public_from_raw

OFFICER = key("officer of a")
EVENT = Event(kind="gaussian", noise_multiplier=20.0)


class Coordinator:
    """Verifies the three signatures as the service does, and may be cut off before or after it has."""

    def __init__(self, identity: str) -> None:
        self.identity, self.cut = identity, ""

    def tell(self, new: bytes, by_old: bytes, by_new: bytes, by_officer: bytes) -> None:
        if self.cut == "before":
            raise PeerUnreachable("COORDINATOR-UNREACHABLE", "no")
        old, fresh = public_from_raw(bytes.fromhex(self.identity)), public_from_raw(new)
        for signer, signature in ((old, by_old), (fresh, by_new), (OFFICER.public_key(), by_officer)):
            check_rotation(signer, signature, site="a", old=old, new=fresh)
        self.identity = new.hex()
        if self.cut == "after":
            raise PeerUnreachable("COORDINATOR-TIMEOUT", "no")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = new_site(tmp_path / "site", policy=policy("a"), identity=key("a"), officer=OFFICER.public_key())
    table(30, prefix="a").to_parquet(made.guard / "data.parquet")
    approve(made.guard, proposal(plan()), OFFICER)
    with Ledger.open(made.guard / "ledger.db", key("a")) as ledger:
        for index in range(3):
            ledger.reserve(
                run=RUN, release_id=str(index), event=EVENT, count=index + 1, plan_digest="0" * 64, purpose="test"
            )
        ledger.advance(RUN, "0", "SEALED", digest="1" * 64)
        ledger.advance(RUN, "0", "RELEASED")
    return made


def charges(site: Site) -> Any:
    with Ledger.open(site.guard / "ledger.db") as ledger:
        return ledger.charged_events()


def change(site: Site, coordinator: Coordinator) -> Rotated:
    return rotate(site, OFFICER, tell=coordinator.tell, known=lambda: coordinator.identity)


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator(key("a").public_key().public_bytes_raw().hex())


def test_a_new_key_keeps_every_charge_and_the_old_ledger(site: Site, coordinator: Coordinator) -> None:
    before = charges(site)
    done = change(site, coordinator)
    new = load_private(site.guard / "site.key")
    assert (
        coordinator.identity
        == new.public_key().public_bytes_raw().hex()
        != key("a").public_key().public_bytes_raw().hex()
    )
    assert charges(site) == before and done.carried == 3 and done.withdrawn == (RUN,)
    with Ledger.open(site.guard / "ledger.db", new) as ledger:
        assert {ledger.state(RUN, str(i)) for i in range(3)} == {"BURNED"}
        with pytest.raises(Refused, match="LEDGER-ONCE"):  # what was answered once cannot be asked for again
            ledger.reserve(run=RUN, release_id="0", event=EVENT, count=1, plan_digest="0" * 64, purpose="x")
    (old,) = (site.guard / "ledgers").glob("*.jsonl")
    book, _ = chain.replay(chain.read_jsonl(old), owner="a", public=key("a").public_key())
    assert book.charged_events() == before
    assert book.notes[-1]["fields"]["public_key"] == new.public_key().public_bytes_raw().hex()
    assert not (site.guard / "rotation").exists()
    # And once more, from the second key.
    assert change(site, coordinator).carried == 3 and charges(site) == before
    assert len(list((site.guard / "ledgers").glob("*.db"))) == 2


def test_the_cap_goes_on_counting(site: Site, coordinator: Coordinator) -> None:
    """A cap that three more releases would pass is passed after the rotation just the same."""
    agreed = plan()
    tight = policy("a", lifetime_epsilon=0.9)

    def refused() -> bool:
        with Ledger.open(site.guard / "ledger.db", load_private(site.guard / "site.key")) as ledger:
            gate = Gate(policy=tight, ledger=ledger, key=key("a"))
            for index in range(60):
                ledger.reserve(
                    run="other",
                    release_id=f"{index}-{ledger.head().size}",
                    event=EVENT,
                    count=1,
                    plan_digest="0" * 64,
                    purpose="x",
                )
            try:
                gate._check_cap(agreed, agreed.stages[0])
            except Refused as error:
                assert error.code == "GATE-CAP"
                return True
        return False

    assert refused()
    change(site, coordinator)
    new = load_private(site.guard / "site.key")
    with Ledger.open(site.guard / "ledger.db", new) as ledger, pytest.raises(Refused, match="GATE-CAP"):
        Gate(policy=tight, ledger=ledger, key=new)._check_cap(agreed, agreed.stages[0])


def test_nothing_changes_while_the_coordinator_cannot_be_told(site: Site, coordinator: Coordinator) -> None:
    coordinator.cut = "before"
    with pytest.raises(PeerUnreachable):
        change(site, coordinator)
    assert load_private(site.guard / "site.key").public_key() == key("a").public_key()
    guard = Guard(site.guard)
    guard.close()
    with Ledger.open(site.guard / "ledger.db", key("a")) as ledger:  # a round in between is carried over too
        ledger.reserve(run="later", release_id="0", event=EVENT, count=1, plan_digest="0" * 64, purpose="x")
    coordinator.cut = ""
    assert change(site, coordinator).carried == 4


def test_an_answer_that_was_lost_is_found_out(site: Site, coordinator: Coordinator) -> None:
    coordinator.cut = "after"
    assert change(site, coordinator).carried == 3
    assert coordinator.identity == load_private(site.guard / "site.key").public_key().public_bytes_raw().hex()


def test_a_running_guard_is_not_rotated_under_its_feet(site: Site, coordinator: Coordinator) -> None:
    with Ledger.open(site.guard / "ledger.db", key("a")), pytest.raises(Refused, match="LEDGER-BUSY"):
        change(site, coordinator)


@pytest.mark.parametrize("at", range(14))
def test_a_crash_at_any_step_goes_on_where_it_stopped(
    at: int, site: Site, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before its n-th change of a file; the guard then refuses or is the old one; a repeat ends it."""
    before, count = charges(site), 0

    class Killed(BaseException):
        pass

    def dying(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == at:
                raise Killed
            count += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(rotation.os, "replace", dying(rotation.os.replace))
        patch.setattr(rotation.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(rotation, "withdraw", dying(rotation.withdraw))
        patch.setattr(rotation, "save_private", dying(rotation.save_private))
        patch.setattr(rotation, "make_private", dying(rotation.make_private))
        patch.setattr(Path, "write_bytes", dying(Path.write_bytes))
        patch.setattr(Ledger, "note", dying(Ledger.note))
        patch.setattr(Ledger, "export", dying(Ledger.export))
        try:
            change(site, coordinator)
            ended = True
        except Killed:
            ended = False
    if not ended:
        key_now = load_private(site.guard / "site.key")
        try:
            with Ledger.open(site.guard / "ledger.db", key_now) as ledger:
                assert ledger.charged_events() == before  # never a ledger that forgot a charge
        except CohortiumError as error:
            assert error.code in ("LEDGER-KEY", "LEDGER-FILE")
        change(site, coordinator)
    assert charges(site) == before
    new = load_private(site.guard / "site.key").public_key().public_bytes_raw().hex()
    assert coordinator.identity == new
    Guard(site.guard).close()
    assert len(list((site.guard / "ledgers").glob("*.db"))) >= 1
