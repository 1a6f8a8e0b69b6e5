"""A site's directory: made closed, enrolled whole or not at all, its keys never leave, two users share one socket."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from consortium import Party, start_party
from hospital import RUN, key, plan, policy, proposal, table

from cohortium.client.approval import approve
from cohortium.client.guard import Guard
from cohortium.client.site import (
    Site,
    give_to,
    join_consortium,
    load_officer,
    new_site,
    save_officer,
    user,
)
from cohortium.client.supernode import load_key
from cohortium.common.errors import CohortiumError, PeerUnreachable, Refused, UsageError
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.protocol.signing import load_private
from cohortium.strategies.base import COORDINATOR

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    made = start_party(tmp_path_factory.mktemp("party"))
    yield made
    made.stop()


def small_site(root: Path) -> Site:
    """SITE/guard of hospital `a` with a table, as the other tests know it."""
    made = new_site(root, policy=policy("a"), identity=key("a"), officer=key("officer of a").public_key())
    table(30, prefix="a").to_parquet(made.guard / "data.parquet")
    return made


def modes(place: Path) -> dict[str, int]:
    return {str(p.relative_to(place)): stat.S_IMODE(p.lstat().st_mode) for p in [place, *place.rglob("*")]}


def test_a_guard_opens_what_was_made(tmp_path: Path) -> None:
    site = small_site(tmp_path / "site")
    approve(site.guard, proposal(plan()), key("officer of a"))
    guard = Guard(site.guard)
    hello = Message(kind="run.hello", sender=COORDINATOR, fields={"run": RUN, "mirrored": 0})
    said = unseal(guard.handle(seal(hello, key(COORDINATOR))), key("a").public_key(), sender="a")
    assert said.kind == "site.hello"
    guard.close()
    assert Site.open(tmp_path / "site") == site and site.policy().name == "a"


def test_everything_is_closed_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        site = small_site(tmp_path / "site")
        approve(site.guard, proposal(plan()), key("officer of a"))
    finally:
        os.umask(before)
    found = modes(site.root)
    for name in (".", "guard", "run", "guard/approved", f"guard/approved/{RUN}"):
        assert found[name] == 0o700, name
    for name in ("guard/site.key", "guard/site.toml", "guard/ledger.db", f"guard/approved/{RUN}/approval.sig"):
        assert found[name] == 0o600, name
    site.refuse_open_guard()
    for name in ("site.key", "ledger.db", "."):
        (site.guard / name).chmod(0o740)
        with pytest.raises(Refused, match="MODE-OPEN"):
            site.refuse_open_guard()
        (site.guard / name).chmod(0o700 if name == "." else 0o600)


def test_a_site_enrols_and_nobody_else_has_its_keys(party: Party, tmp_path: Path) -> None:
    root = tmp_path / "site"
    given = policy("x", lifetime_epsilon=3.0)
    joined = join_consortium(root, invitation=party.invitation("north"), policy=given, passphrase="four random words")
    site = joined.site
    member = party.register.member("north")
    secret = load_private(site.guard / "site.key")
    assert member is not None and member.identity == secret.public_key().public_bytes_raw()
    assert member.supernode == (site.courier / "supernode.pub").read_text().strip()
    assert load_key(site.courier / "supernode").curve.name == "secp384r1"
    kept = site.policy()
    assert kept.name == "north" and kept.lifetime_epsilon == 3.0 and kept.table == given.table
    assert kept.coordinator_key == key("coordinator").public_key().public_bytes_raw().hex()
    settings = site.settings()
    assert settings["service_address"] == party.address and settings["socket"] == str(site.socket)
    with Ledger.open(site.guard / "ledger.db") as ledger:
        assert ledger.owner == "north" and ledger.public_key == member.identity.hex()
    officer = load_officer(site.officer / "officer.key", "four random words")
    assert officer.public_key().public_bytes_raw() == member.officer
    site.refuse_open_guard(), site.refuse_open_courier(), site.refuse_open_officer()
    # What the coordinator's machine holds: no private key of the site in any form.
    raw_key, leaf_key = secret.private_bytes_raw(), (site.courier / "leaf.key").read_bytes()
    for path in party.folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert not any(one in raw for one in (raw_key, raw_key.hex().encode(), leaf_key))
    with pytest.raises(UsageError, match="SITE-EXISTS"):
        join_consortium(root, invitation=party.invitation("north-2"), policy=given)


@pytest.mark.parametrize("how", ["used", "unreachable", "role", "expired"])
def test_what_cannot_be_enrolled_leaves_nothing_behind(how: str, party: Party, tmp_path: Path) -> None:
    invitation = party.invitation(f"east-{how}")
    if how == "used":
        join_consortium(tmp_path / "first", invitation=invitation, policy=policy("x"))
    elif how == "unreachable":
        invitation = party.invitation(f"east-{how}", enrol_address="127.0.0.1:1")
    elif how == "role":
        invitation = party.invitation(f"east-{how}", role="researcher")
    else:
        from datetime import UTC, datetime, timedelta

        invitation = party.invitation(f"east-{how}", valid_until=datetime.now(UTC) - timedelta(seconds=1))
    root = tmp_path / "site"
    with pytest.raises(CohortiumError) as caught:
        join_consortium(root, invitation=invitation, policy=policy("x"))
    codes = {"used": "INVITE-REFUSED", "unreachable": "COORDINATOR-UNREACHABLE", "role": "INVITE-ROLE"}
    assert (caught.value.code == codes.get(how, "INVITE-EXPIRED") and caught.value.hint) or how == "role"
    assert not root.exists()
    assert how != "unreachable" or isinstance(caught.value, PeerUnreachable)


def test_the_officers_key_may_lie_elsewhere(party: Party, tmp_path: Path) -> None:
    officer = key("an officer with a safe")
    joined = join_consortium(
        tmp_path / "site", invitation=party.invitation("south"), policy=policy("x"), officer=officer.public_key()
    )
    assert not joined.site.officer.exists()
    member = party.register.member("south")
    assert member is not None and member.officer == officer.public_key().public_bytes_raw()


def test_an_officers_key_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    path = tmp_path / "officer.key"
    save_officer(key("o"), path, "right words")
    assert b"ENCRYPTED" in path.read_bytes() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_officer(path, "right words").public_key() == key("o").public_key()
    for wrong in (None, "wrong words", ""):
        with pytest.raises(UsageError, match="OFFICER-PASSPHRASE"):
            load_officer(path, wrong)
    with pytest.raises(UsageError, match="KEY-EXISTS"):
        save_officer(key("o"), path, "right words")
    with pytest.raises(UsageError, match="OFFICER-PASSPHRASE"):
        save_officer(key("o"), tmp_path / "other.key", "")
    path.chmod(0o640)
    with pytest.raises(UsageError, match="KEY-MODE"):
        load_officer(path, "right words")


@root_only
def test_two_users_share_the_socket_and_nothing_else(tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents):  # pytest's own folders are closed
        if place.name.startswith(("test_", "popen-", "pytest-")):
            place.chmod(0o711)
    site = small_site(tmp_path / "site")
    (site.root / "courier").mkdir(mode=0o700)
    (site.courier / "leaf.key").touch(mode=0o600)
    guard, courier = user("51001"), user("51002")
    give_to(site, guard=guard, courier=courier)

    def may(who: int, path: Path, how: str) -> bool:
        asked = subprocess.run(["test", how, path], user=who, group=who, extra_groups=[], check=False)
        return asked.returncode == 0

    assert may(51001, site.guard / "site.key", "-r") and may(51001, site.run, "-w")
    assert not may(51002, site.guard, "-r") and not may(51002, site.guard / "site.key", "-r")
    assert may(51002, site.courier / "leaf.key", "-r") and not may(51001, site.courier / "leaf.key", "-r")
    assert may(51002, site.run, "-x") and not may(51002, site.run, "-w")
    assert site.run.stat().st_mode & stat.S_ISGID
    for who in (51001, 51002, 51003):
        assert not may(who, site.root, "-r")
    with pytest.raises(Refused, match="SITE-USERS"):
        give_to(site, guard=guard, courier=guard)
    with pytest.raises(Refused, match="SITE-USERS"):
        give_to(site, guard=user("0"), courier=courier)
    with pytest.raises(UsageError, match="SITE-USER"):
        user("nobody-of-this-name")


def test_any_other_directory_is_told(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="SITE-MISSING"):
            Site.open(place)


@root_only
def test_a_second_name_of_somebody_elses_file_is_not_given_away(tmp_path: Path) -> None:
    """Whoever took over the courier's user leaves a link to a file of root's for the next start as root to give it."""
    site = small_site(tmp_path / "site")
    (site.root / "courier").mkdir(mode=0o700)
    theirs = tmp_path / "shadow"
    theirs.write_text("root's")
    (site.courier / "soft").symlink_to(theirs)
    give_to(site, guard=user("51001"), courier=user("51002"))
    assert theirs.stat().st_uid == 0
    os.link(theirs, site.courier / "hard")
    with pytest.raises(Refused, match="SITE-OWNER"):
        give_to(site, guard=user("51001"), courier=user("51002"))
    assert theirs.stat().st_uid == 0
