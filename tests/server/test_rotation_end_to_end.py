"""A site changes its key between two runs: the next run begins, the cap goes on counting, and no charge gets lost.

Power: a mirror without `_check_carried` begins the run of a site that left charges out; one that knew ledgers by name
alone begins none after an honest change; a witness without the table `owners` confirms the old key's backup.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hospital import RUN, Ward, counts, key, plan, schema, ward

from cohortium.client import rotation
from cohortium.client.approval import approve
from cohortium.client.rotation import rotate
from cohortium.client.site import Site
from cohortium.common.errors import Refused
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.invitation import check_rotation
from cohortium.common.protocol.messages import Message, seal, unseal
from cohortium.common.protocol.signing import load_private, public_from_raw
from cohortium.server import witnesses
from cohortium.server.mirror import Mirror
from cohortium.server.register import Register
from cohortium.server.session import Session
from cohortium.strategies.base import COORDINATOR, ask_message

SITES = ("a", "b", "c")
NEXT = "run-2"
CAP = 0.36
"""Three releases of counts fit, four do not."""


class Flat(Site):
    """A site whose guard's directory is the site's own, as the wards of tests have it."""

    __slots__ = ()

    @property
    def guard(self) -> Path:
        return self.root


class Consortium:
    """A ward with a register; whoever changed its key is known by the new one."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.agreed = plan(SITES, mode="local")
        self.ward: Ward = ward(folder / "sites", self.agreed, seed=None, **policy)
        self.register = Register(folder / "register.db")
        for site in SITES:
            officer = key("officer of " + site).public_key().public_bytes_raw()
            identity = key(site).public_key().public_bytes_raw()
            self.register.enrol(name=site, role="site", identity=identity, officer=officer, supernode="ssh " + site)
        self.refusals: dict[str, str] = {}

    def identity(self, site: str) -> Ed25519PrivateKey:
        return load_private(self.ward.directory(site) / "site.key")

    def rotate(self, site: str = "a") -> None:
        def tell(new: bytes, by_old: bytes, by_new: bytes, by_officer: bytes) -> None:
            member = self.register.member(site)
            assert member is not None
            old, fresh, officer = (public_from_raw(raw) for raw in (member.identity, new, member.officer))
            for signer, signature in ((old, by_old), (fresh, by_new), (officer, by_officer)):
                check_rotation(signer, signature, site=site, old=old, new=fresh)
            self.register.rotate(site, new)

        self.ward.kill(site)
        rotate(Flat(self.ward.directory(site)), key("officer of " + site), tell=tell, known=lambda: "")

    def begin(self, run: str = NEXT, *, approved: bool = True) -> tuple[str, ...]:
        """A run as `propose` and `drive` make it, with the register's identities; who has begun."""
        members = {site: self.register.member(site) for site in SITES}
        identities = {site: member.identity for site, member in members.items() if member is not None}
        envelope = seal(
            proposal_message(
                run=run,
                plan=self.agreed,
                identities={site: raw.hex() for site, raw in identities.items()},
                schema=schema(),
            ),
            key(COORDINATOR),
        )
        for site in SITES if approved else ():
            approve(self.ward.directory(site), envelope, key("officer of " + site), check_table=False)
        publics = {site: public_from_raw(raw) for site, raw in identities.items()}
        earlier = {site: self.register.earlier(site) for site in SITES}
        self.refusals = {}
        with Mirror(self.ward.folder / "mirror.db", publics, earlier=earlier) as mirror:
            session = Session(courier=self, key=key(COORDINATOR), identities=publics, mirror=mirror, timeout_s=60.0)
            session.refusals = self.refusals
            answered = session.exchange(witnesses.hellos(run, SITES, mirror), "hello")
            return witnesses.start(
                plan=self.agreed,
                run=run,
                key=key(COORDINATOR),
                identities=publics,
                mirror=mirror,
                exchange=session.exchange,
                answered=answered,
                refusals=self.refusals,
            )

    def exchange(self, messages: Mapping[str, bytes], **_: Any) -> dict[str, bytes]:
        return {site: self.ward.guard(site).handle(envelope) for site, envelope in messages.items()}

    def ask(self, site: str, index: int, *, run: str = NEXT) -> Message:
        envelope = self.ward.guard(site).handle(seal(ask_message(run, index, counts(), mirrored=0), key(COORDINATOR)))
        return unseal(envelope, self.identity(site).public_key(), sender=site)

    def charged(self, site: str = "a") -> int:
        self.ward.kill(site)
        with Ledger.open(self.ward.directory(site) / "ledger.db") as ledger:
            return len(ledger.charged_events())

    def told(self, site: str) -> str:
        """The last sentence in a site's own log."""
        lines = (self.ward.directory(site) / "guard.log").read_text().splitlines()
        return str(json.loads(lines[-1])["text"])

    def close(self) -> None:
        self.ward.close()
        self.register.close()


@pytest.fixture
def consortium(tmp_path: Path) -> Any:
    made = Consortium(tmp_path)
    assert made.begin(RUN, approved=False) == SITES  # the ward's own run, in the mirror too
    for index in (0, 1):
        assert made.ask("a", index, run=RUN).kind == "site.noised"
    assert made.begin(RUN, approved=False) == SITES  # the charges are in the mirror and with the witnesses
    yield made
    made.close()


def test_after_a_change_of_keys_the_next_run_begins_and_is_answered(consortium: Consortium) -> None:
    consortium.rotate()
    assert consortium.register.earlier("a") == [key("a").public_key().public_bytes_raw().hex()]
    assert consortium.begin() == SITES and not consortium.refusals
    assert consortium.ask("a", 0).kind == "site.noised"
    assert consortium.charged() == 3
    # What the old key was asked stays asked, under the old run's name too.
    assert consortium.ask("a", 0, run=RUN).fields == {"code": "REFUSED"}
    consortium.rotate()
    assert consortium.begin("run-3") == SITES and consortium.charged() == 3


def test_the_cap_still_counts(tmp_path: Path) -> None:
    made = Consortium(tmp_path, lifetime_epsilon=CAP)
    assert made.begin(RUN, approved=False) == SITES
    kinds = [made.ask("a", index, run=RUN).kind for index in (0, 1)]
    assert kinds == ["site.noised", "site.noised"]
    made.rotate()
    assert made.begin() == SITES
    answers = [made.ask("a", index).fields.get("code") for index in (0, 1)]
    assert "lifetime cap" in made.told("a")
    made.rotate("b")  # whose ledger is empty
    assert made.begin("run-3") == SITES
    fresh = [made.ask("b", index, run="run-3").kind for index in (0, 1)]
    assert answers == [None, "REFUSED"] and fresh == ["site.noised", "site.noised"]
    made.close()


def _without(monkeypatch: pytest.MonkeyPatch, forget: Callable[[Any], bool], *, note: bool) -> None:
    """A site that carries some of its charges only, or does not say whose they are."""
    real = rotation._carry

    def carry(ledger: Ledger, work: Path, name: str, new: Ed25519PrivateKey) -> None:
        entries = dict(ledger.book.entries)
        for found in [k for k, entry in entries.items() if forget(entry)]:
            del ledger.book.entries[found]
        real(ledger, work, name, new)
        ledger.book.entries.clear()
        ledger.book.entries.update(entries)

    monkeypatch.setattr(rotation, "_carry", carry)
    if not note:
        monkeypatch.setattr(rotation, "CARRIED", "other")


@pytest.mark.parametrize(
    ("forget", "note"),
    [(lambda entry: entry.release == "1", True), (lambda entry: True, True), (lambda entry: False, False)],
    ids=["one charge", "all charges", "whose they are"],
)
def test_a_change_of_keys_cannot_hide_a_charge(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch, forget: Callable[[Any], bool], note: bool
) -> None:
    _without(monkeypatch, forget, note=note)
    consortium.rotate()
    assert "a" not in consortium.begin()
    assert consortium.told("a").endswith("coordinator: MIRROR-CARRIED")


def test_a_key_between_two_changes_that_no_run_saw(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    consortium.rotate()
    consortium.rotate()
    assert consortium.begin() == SITES and consortium.charged() == 2
    with monkeypatch.context() as patched:
        _without(patched, lambda entry: entry.run == RUN, note=True)
        consortium.rotate()
        consortium.rotate()
    consortium.begin("run-3")
    assert consortium.told("a").endswith("coordinator: MIRROR-CARRIED")


def test_a_new_enrolment_begins_an_empty_ledger(consortium: Consortium) -> None:
    """A lost disk: no ledger to carry. The register shows it, and the officers decide what of the cap is left."""
    consortium.register.revoke("a")
    place = consortium.ward.directory("a")
    consortium.ward.kill("a")
    for path in (*place.glob("ledger.db*"), *place.glob("vault.db*"), place / "site.key"):
        path.unlink()
    new = key("a, new disk")
    from cohortium.common.protocol.signing import save_private

    save_private(new, place / "site.key")
    Ledger.create(place / "ledger.db", "a", new).close()
    member = consortium.register.member("a")
    assert member is not None and member.revoked_at is not None
    consortium.register._clock = lambda: float(member.revoked_at or 0) + 2
    raw = new.public_key().public_bytes_raw()
    consortium.register.enrol(name="a", role="site", identity=raw, officer=member.officer, supernode=member.supernode)
    assert consortium.register.earlier("a") == []
    assert consortium.begin() == SITES


def test_a_backup_of_the_old_key_is_not_confirmed(consortium: Consortium, tmp_path: Path) -> None:
    """A dishonest coordinator proposes with the key that was given up, to have what came after it forgotten."""
    consortium.ward.kill("a")
    shutil.copytree(consortium.ward.directory("a"), tmp_path / "backup")
    consortium.rotate()
    assert consortium.begin() == SITES and consortium.ask("a", 0).kind == "site.noised"
    consortium.ward.kill("a")
    shutil.rmtree(consortium.ward.directory("a"))
    shutil.copytree(tmp_path / "backup", consortium.ward.directory("a"))
    (consortium.ward.folder / "mirror.db").unlink()  # it forgets what it likes
    db = consortium.register._read()
    db.execute("UPDATE members SET identity = ? WHERE name = 'a'", (key("a").public_key().public_bytes_raw(),))
    begun = consortium.begin("run-3")
    assert "a" not in begun
    log = (consortium.ward.directory("a") / "guard.log").read_text()
    assert "WITNESS-FEW" in log and "b: WITNESS-ROLLBACK" in log


def test_a_rehearsal_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise can be computed from a seed: no later change of keys or of site.toml makes its ledger a private one."""
    from hospital import policy

    from cohortium.client.gate import Gate

    made = ward(tmp_path, plan(("a",)), seed=1)
    assert made.ask("a", 0, counts()).kind == "site.noised"
    made.close()
    site = Flat(made.directory("a"))
    policy("a").save(site.policy_path)
    rotate(site, key("officer of a"), tell=lambda *_: None, known=lambda: "")
    new = load_private(site.guard / "site.key")
    with Ledger.open(site.guard / "ledger.db", new) as ledger, pytest.raises(Refused, match="GATE-CAP"):
        Gate(policy=policy("a"), ledger=ledger, key=new)._check_cap(made.plan, made.plan.stages[0])
