"""Who takes part: tokens work once, revocation lasts, runs only go forward, processes see each other's words."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from consortium import enrol_member, public, supernode

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol.invitation import token_bytes
from cohortium.common.protocol.messages import digest
from cohortium.server.register import Register


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def register(tmp_path: Path, clock: Clock) -> Register:
    return Register(tmp_path / "register.db", clock=clock)


def refused(code: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(CohortiumError) as caught:
        call(*args, **options)
    assert caught.value.code == code


# ---- tokens -------------------------------------------------------------------------------------------------


def test_a_token_works_once(register: Register) -> None:
    token = register.invite("north")
    assert len(token_bytes(token)) == 16
    assert register.invited(token) == ("north", "site")
    assert register.redeem(token) == ("north", "site")
    assert register.invited(token) is None
    refused("INVITE-REFUSED", register.redeem, token)


def test_a_token_ends(register: Register, clock: Clock) -> None:
    token = register.invite("north", valid_s=60)
    clock.now += 59
    assert register.invited(token) is not None
    clock.now += 1
    assert register.invited(token) is None
    refused("INVITE-REFUSED", register.redeem, token)


def test_a_new_invitation_replaces_the_old_one(register: Register) -> None:
    first, second = register.invite("north"), register.invite("north", role="researcher")
    assert first != second
    refused("INVITE-REFUSED", register.redeem, first)
    assert register.redeem(second) == ("north", "researcher")


def test_no_token_is_on_disk(register: Register, tmp_path: Path) -> None:
    """Red when the token is stored instead of its hash."""
    token = register.invite("north")
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"north" in everything
    raw = token_bytes(token)
    for form in (token.encode(), token.replace("-", "").encode(), raw, raw.hex().encode()):
        assert form not in everything


def test_of_many_at_once_one_redeems(tmp_path: Path) -> None:
    register = Register(tmp_path / "register.db")
    token = register.invite("north")

    def attempt(_: int) -> bool:
        try:
            Register(tmp_path / "register.db").redeem(token)
        except CohortiumError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


def test_no_site_has_the_coordinators_name(register: Register) -> None:
    """Its ledger, its co-signatures and its place in a run's folder would be the coordinator's."""
    refused("INVITE-NAME", register.invite, "coordinator")
    register.invite("coordinator", role="coordinator")


def test_odd_invitations_are_refused(register: Register) -> None:
    refused("CERT-NAME", register.invite, "Not a name")
    refused("INVITE-VALUE", register.invite, "north", role="service")
    refused("INVITE-VALUE", register.invite, "north", valid_s=0)
    refused("INVITE-VALUE", register.invite, "north", valid_s=31 * 86_400)
    for text in ("", "x", "A" * 26 + "!"):
        refused("INVITE-REFUSED", register.redeem, text)


def test_a_refused_enrolment_does_not_use_the_token_up(register: Register) -> None:
    enrol_member(register, "south")
    token = register.invite("north")
    stolen = {"identity": public("south"), "officer": public("o"), "supernode": "k", "request": ""}
    refused("MEMBER-KEYS", register.admit, token, **stolen)
    assert register.invited(token) == ("north", "site")
    assert register.admit(token, **(stolen | {"identity": public("north")})).name == "north"
    assert register.invited(token) is None


# ---- members ------------------------------------------------------------------------------------------------


def test_an_enrolled_member_is_found_and_stays(register: Register, tmp_path: Path) -> None:
    made = enrol_member(register, "north")
    again = Register(tmp_path / "register.db")
    assert again.member("north") == made and made.active
    assert again.members() == [made]
    assert again.member("south") is None
    assert (tmp_path / "register.db").stat().st_mode & 0o777 == 0o600


def test_a_key_has_one_owner_and_one_duty(register: Register) -> None:
    enrol_member(register, "north")
    good = {"name": "south", "role": "site", "identity": public("s"), "officer": public("o"), "supernode": "k"}
    taken = (
        {"identity": public("north")},
        {"officer": public("north")},
        {"identity": public("officer of north")},
        {"supernode": supernode("north")},
        {"officer": public("s")},
        {"identity": b""},
        {"officer": b"short"},
        {"supernode": ""},
    )
    for change in taken:
        refused("MEMBER-KEYS", register.enrol, **(good | change))
    assert register.enrol(**good).name == "south"


def test_other_keys_for_an_enrolled_name_need_a_revocation_first(register: Register, clock: Clock) -> None:
    """Otherwise whoever writes invitations could exchange a hospital's identity without its old key."""
    first = enrol_member(register, "north")
    keys = {"identity": public("new"), "officer": public("officer of north"), "supernode": supernode("north")}
    refused("MEMBER-EXISTS", register.enrol, name="north", role="site", **keys)
    refused("MEMBER-EXISTS", register.enrol, name="north", role="researcher", identity=b"", officer=b"", supernode="")
    assert enrol_member(register, "north").identity == first.identity  # the same again: its answer was lost
    register.revoke("north")
    clock.now += 10
    member = register.enrol(name="north", role="site", **keys)
    assert member.active and member.revoked_at == 1_000_000
    assert [key for key, _ in register.identities("north")] == [public("north"), public("new")]


def test_revocation_is_seen_by_another_connection_at_once(register: Register, tmp_path: Path) -> None:
    enrol_member(register, "north")
    other = Register(tmp_path / "register.db")
    assert other.member("north").active  # type: ignore[union-attr]
    token = register.invite("north")
    register.revoke("north")
    assert not other.member("north").active  # type: ignore[union-attr]
    assert other.revoked() == {"north"}
    refused("INVITE-REFUSED", other.redeem, token)
    refused("MEMBER-UNKNOWN", other.revoke, "south")


def test_rotation_takes_a_key_that_was_never_used(register: Register) -> None:
    enrol_member(register, "north")
    enrol_member(register, "south")
    assert register.rotate("north", public("next")).identity == public("next")
    for used in (public("north"), public("next"), public("south"), public("officer of south")):
        refused("MEMBER-KEYS", register.rotate, "north", used)
    register.revoke("north")
    refused("MEMBER-UNKNOWN", register.rotate, "north", public("later"))


# ---- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(register: Register) -> str:
    for name in ("north", "south", "west"):
        enrol_member(register, name)
    register.propose("run-1", folder="runs/run-1", envelope=b"signed", sites=["north", "south"])
    return "run-1"


def test_a_proposal_is_open_at_its_sites_and_nowhere_else(register: Register, run: str) -> None:
    assert register.proposals("north") == [(run, b"signed", "open")]
    assert register.proposals("west") == []
    assert register.approvals(run) == {"north": "open", "south": "open"}
    assert register.envelope(run) == b"signed"
    refused("RUN-EXISTS", register.propose, run, folder="x", envelope=b"other", sites=["north"])
    refused("MEMBER-UNKNOWN", register.propose, "run-2", folder="x", envelope=b"e", sites=["north", "east"])
    assert register.approvals("run-2") == {}


def test_approvals(register: Register, run: str) -> None:
    good = {"proposal": digest(b"signed"), "signature": b"s" * 64, "declined": False}
    refused("PROPOSAL-OTHER", register.approve, run, "north", **(good | {"proposal": digest(b"other")}))
    refused("RUN-UNKNOWN", register.approve, run, "west", **good)
    refused("RUN-UNKNOWN", register.approve, "run-9", "north", **good)
    register.approve(run, "north", **good)
    register.approve(run, "south", **(good | {"signature": b"", "declined": True}))
    assert register.approvals(run) == {"north": "approved", "south": "declined"}
    assert register.signatures(run) == {"north": b"s" * 64}
    register.approve(run, "south", **good)  # thought better of it
    register.set_run(run, state="approved")
    register.approve(run, "north", **good)  # said again
    refused("RUN-CLOSED", register.approve, run, "north", **(good | {"signature": b"", "declined": True}))


def test_a_run_that_ended_stays_as_it_ended(register: Register, run: str, clock: Clock) -> None:
    clock.now += 5
    row = register.set_run(run, state="running", flower_id=12345678901234567890, attempts=2, message="m")
    assert (row.flower_id, row.attempts, row.message, row.since) == ("12345678901234567890", 2, "m", 1_000_005)
    clock.now += 5
    assert register.set_run(run, attempts=3).since == 1_000_005
    assert register.runs() == [register.run_row(run)]
    register.set_run(run, state="finished")
    refused("RUN-ENDED", register.set_run, run, state="running")
    assert register.proposals("north") == []
    refused("RUN-STATE", register.set_run, run, state="gone")
    refused("RUN-UNKNOWN", register.set_run, "run-9", state="failed")
    refused("RUN-UNKNOWN", register.run_row, "run-9")


def test_who_is_entitled(register: Register, run: str) -> None:
    for name, role in (("mia", "researcher"), ("eve", "researcher"), ("ann", "coordinator")):
        enrol_member(register, name, role=role)
    register.grant(run, "mia")
    entitled = {n for n in ("north", "south", "west", "mia", "eve", "ann", "nobody") if register.entitled(run, n)}
    assert entitled == {"north", "south", "mia", "ann"}
    assert not register.entitled("run-9", "ann")
    register.revoke("mia")
    register.revoke("south")
    assert not register.entitled(run, "mia") and not register.entitled(run, "south")
    refused("MEMBER-UNKNOWN", register.grant, run, "nobody")
    refused("RUN-UNKNOWN", register.grant, "run-9", "eve")


# ---- processes and threads ----------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from cohortium.server.register import Register
register = Register(Path(sys.argv[1]))
for i in range(20):
    register.invite(f"{sys.argv[2]}-{i}")
    register.enrol(name=f"{sys.argv[2]}-{i}", role="researcher", identity=b"", officer=b"", supernode="")
"""


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "register.db"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), name]) for name in ("a", "b", "c")]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert len(Register(path).members()) == 60


def test_threads_share_a_register_and_leave_no_connection_behind(register: Register) -> None:
    enrol_member(register, "north")
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            assert all(m is not None for m in pool.map(lambda _: register.member("north"), range(64)))
    assert len(register._opened) <= 2
    register.close()


def test_another_version_is_not_touched(register: Register, tmp_path: Path) -> None:
    with register._write() as db:
        db.execute("PRAGMA user_version = 99")
    refused("REGISTER-VERSION", Register, tmp_path / "register.db")
