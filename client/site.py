"""A hospital's directory: what lies where, who may read it, and how it is made.

    SITE/guard/    site.toml site.key officer.pub ledger.db …      the guard's user only
    SITE/courier/  courier.toml root.pem leaf.pem leaf.key supernode supernode.pub   the courier's user only
    SITE/officer/  officer.key                                     the officer's commands only; may be kept elsewhere
    SITE/run/      guard.sock                                      both may enter
    SITE/logs/     what the two processes print                    whoever runs `cohortium site join`
The courier's user can read neither records nor keys of the guard, and the guard's user has no certificate.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.client.policy import Policy
from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private, refuse_all, refuse_open
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.certificates import read_private, write_file
from cohortium.common.protocol.invitation import Invitation
from cohortium.common.protocol.signing import fingerprint, generate, load_private, save_private, save_public
from cohortium.common.study import toml_text

GUARD_SECRETS = ("site.key", "ledger.db", "vault.db", "witness.db")
COURIER_SECRETS = ("leaf.key", "supernode")
SETTINGS = (
    *("name", "consortium", "service_address", "fleet_address"),
    *("enrol_address", "coordinator_key", "socket"),
)


@dataclass(frozen=True, slots=True)
class Site:
    """The places in one site's directory."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> Site:
        """A directory that `site init` made. UsageError SITE-MISSING for any other."""
        site = cls(root.resolve())
        if not site.policy_path.exists() and not site.settings_path.exists():
            try:
                found = site.guard.is_dir() or site.courier.is_dir()
            except PermissionError:
                found = True
            raise UsageError(
                "SITE-MISSING",
                "this user may not read the site's directories" if found else "this is not a site's directory",
                where=(str(root),),
                hint="run the command as the site's owner" if found else "cohortium site init DIR --invitation FILE",
            )
        return site

    @property
    def guard(self) -> Path:
        return self.root / "guard"

    @property
    def courier(self) -> Path:
        return self.root / "courier"

    @property
    def officer(self) -> Path:
        return self.root / "officer"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def socket(self) -> Path:
        return self.run / "guard.sock"

    @property
    def policy_path(self) -> Path:
        return self.guard / "site.toml"

    @property
    def settings_path(self) -> Path:
        return self.courier / "courier.toml"

    @property
    def paused(self) -> Path:
        return self.guard / "paused"

    @property
    def left(self) -> Path:
        return self.guard / "left"

    def policy(self) -> Policy:
        return Policy.load(self.policy_path)

    def settings(self) -> dict[str, str]:
        """courier.toml as it is; UsageError COURIER-SETTINGS."""
        try:
            found = tomllib.loads(self.settings_path.read_text(encoding="utf-8"))
            return {name: str(found[name]) for name in SETTINGS}
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError):
            raise UsageError(
                "COURIER-SETTINGS", "courier.toml cannot be read", where=(str(self.settings_path),)
            ) from None

    def refuse_open_guard(self) -> None:
        """Refused MODE-OPEN, with the chmod to run, where others may use the guard's directory or keys."""
        refuse_open(self.guard)
        refuse_all(self.guard / name for name in GUARD_SECRETS)

    def refuse_open_courier(self) -> None:
        """The same for the courier's directory and keys."""
        refuse_open(self.courier)
        refuse_all(self.courier / name for name in COURIER_SECRETS)

    def refuse_open_officer(self) -> None:
        """The same for the officer's key, where it lies here."""
        refuse_all((self.officer, self.officer / "officer.key"))


# ---- making one ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """What hospital IT and the coordinator read to each other by telephone after `site init`."""

    site: Site
    name: str
    consortium: str
    identity: str  # fingerprints
    officer: str
    root: str
    coordinator: str

    def to_json(self) -> dict[str, str]:
        shown = ("name", "consortium", "identity", "officer", "root", "coordinator")
        return {"site": str(self.site.root), **{name: getattr(self, name) for name in shown}}


def new_site(root: Path, *, policy: Policy, identity: Ed25519PrivateKey, officer: Ed25519PublicKey) -> Site:
    """Make SITE/guard, so that a guard opens it, and SITE/run. Never overwrites a key or a ledger."""
    site = Site(root.resolve())
    make_private(site.root)
    make_private(site.guard)
    make_private(site.run)
    save_private(identity, site.guard / "site.key")
    save_public(officer, site.guard / "officer.pub")
    policy.save(site.policy_path)
    os.chmod(site.policy_path, 0o600)
    Ledger.create(site.guard / "ledger.db", policy.name, identity).close()
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        if (site.guard / name).exists():
            os.chmod(site.guard / name, 0o600)
    return site


def join_consortium(
    root: Path,
    *,
    invitation: Invitation,
    policy: Policy,
    officer: Ed25519PublicKey | None = None,
    passphrase: str | None = None,
    socket: Path | None = None,
) -> Joined:
    """Make a site's directory and enrol it. The site's keys are made here and never leave this machine.

    policy: whole but for name and coordinator_key, which the consortium gives. officer: the public half of a key
    that lies elsewhere; None: a new key in SITE/officer, encrypted where a passphrase is given. socket: where the
    courier finds the guard (default SITE/run/guard.sock). Nothing is left of the directory when it fails before the
    coordinator has agreed; afterwards the invitation is used up, and what was made stays.
    """
    from cohortium.client.enrolment import enrol

    refuse_used(root)
    if invitation.role != "site":
        raise UsageError("INVITE-ROLE", f"this invitation is for a {invitation.role}, not for a site")
    identity, transport = generate(), ec.generate_private_key(ec.SECP384R1())
    with _undone(root):
        site = new_site(
            root,
            policy=replace(policy, name=invitation.name),
            identity=identity,
            officer=officer or _new_officer(root, passphrase),
        )
        make_private(site.courier)
        make_private(site.logs)
        supernode = _save_supernode(site, transport)
        write_file(site.courier / "root.pem", invitation.root_pem, 0o644)
        officer_key = officer_public(site)
        enrolled = enrol(invitation, identity=identity, officer_public=officer_key, supernode_public=supernode)
    enrolled.save(site.courier)
    replace(policy, name=enrolled.name, coordinator_key=enrolled.coordinator.hex()).save(site.policy_path)
    given = {
        "name": enrolled.name,
        "consortium": enrolled.consortium,
        "service_address": enrolled.service_address,
        "fleet_address": enrolled.fleet_address,
        "enrol_address": invitation.enrol_address,
        "coordinator_key": enrolled.coordinator.hex(),
        "socket": str(socket or site.socket),
    }
    text = "".join(f"{name} = {toml_text(given[name])}\n" for name in SETTINGS)
    write_file(site.settings_path, text.encode(), 0o600)
    coordinator = Ed25519PublicKey.from_public_bytes(enrolled.coordinator)
    return Joined(
        site=site,
        name=enrolled.name,
        consortium=enrolled.consortium,
        identity=fingerprint(identity.public_key()),
        officer=fingerprint(officer_key),
        root=invitation.root_fingerprint,
        coordinator=fingerprint(coordinator),
    )


def enrol_again(site: Site, invitation: Invitation) -> None:
    """Another certificate for the keys that this site has, by a new invitation: for a courier that was off too long.

    Identity, ledger, policy and officer stay: a new directory would begin a new ledger and forget what was charged.
    Raises Refused ENROL-OTHER for an invitation of another name, consortium, root or coordinator.
    """
    from cohortium.client.enrolment import enrol

    site.refuse_open_guard()
    settings, policy = site.settings(), site.policy()
    same = (invitation.name, invitation.consortium, invitation.role) == (
        settings["name"],
        settings["consortium"],
        "site",
    )
    if not same or invitation.root_pem != (site.courier / "root.pem").read_bytes():
        raise _other()
    enrolled = enrol(
        invitation,
        identity=load_private(site.guard / "site.key"),
        officer_public=officer_public(site),
        supernode_public=(site.courier / "supernode.pub").read_text(encoding="ascii").strip(),
    )
    if enrolled.coordinator.hex() != policy.coordinator_key:
        raise _other()
    enrolled.save(site.courier)
    settings |= {"service_address": enrolled.service_address, "fleet_address": enrolled.fleet_address}
    settings |= {"enrol_address": invitation.enrol_address}
    text = "".join(f"{name} = {toml_text(settings[name])}\n" for name in SETTINGS)
    write_file(site.settings_path, text.encode(), 0o600)
    owner = os.stat(site.courier)
    if os.geteuid() == 0:
        for name in ("root.pem", "leaf.pem", "leaf.key", "courier.toml"):
            os.chown(site.courier / name, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _other() -> Refused:
    return Refused(
        "ENROL-OTHER",
        "this invitation is for another name, consortium, root or coordinator than this site's",
        hint="compare the fingerprints with the coordinator by telephone; do not use it before",
    )


def refuse_used(root: Path) -> None:
    """UsageError SITE-EXISTS unless the directory is new or empty: a site is never started over."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(
            "SITE-EXISTS",
            "the directory is not empty",
            where=(str(root),),
            hint="name a new one: keys and ledger are never overwritten; for another certificate: cohortium site renew",
        )


@contextmanager
def _undone(root: Path) -> Iterator[None]:
    """Remove what was made when it fails: the coordinator knows of none of these keys."""
    existed = root.exists()
    try:
        yield
    except BaseException:
        for path in list(root.iterdir()) if root.is_dir() else []:
            shutil.rmtree(path, ignore_errors=True)
        if not existed:
            shutil.rmtree(root, ignore_errors=True)
        raise


def _save_supernode(site: Site, key: ec.EllipticCurvePrivateKey) -> str:
    """Flower's own key pair of this node, in OpenSSH's format; the public half."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_file(site.courier / "supernode", private, 0o600)
    write_file(site.courier / "supernode.pub", public + b"\n", 0o644)
    return public.decode("ascii")


# ---- the officer's key --------------------------------------------------------------------------------------


def _new_officer(root: Path, passphrase: str | None) -> Ed25519PublicKey:
    make_private(root)
    make_private(root / "officer")
    key = generate()
    save_officer(key, root / "officer" / "officer.key", passphrase)
    save_public(key.public_key(), root / "officer" / "officer.pub")
    return key.public_key()


def save_officer(key: Ed25519PrivateKey, path: Path, passphrase: str | None) -> None:
    """A new PEM file (PKCS #8), mode 0600, encrypted where a passphrase is given; never overwrites."""
    if passphrase is None:
        save_private(key, path)
        return
    if not passphrase:
        raise UsageError("OFFICER-PASSPHRASE", "an empty passphrase protects nothing")
    if path.exists():
        raise UsageError("KEY-EXISTS", "a key file is never overwritten", where=(str(path),))
    how = serialization.BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    write_file(path, pem, 0o600)


def officer_is_encrypted(path: Path) -> bool:
    return b"ENCRYPTED" in read_private(path)


def load_officer(path: Path, passphrase: str | None) -> Ed25519PrivateKey:
    """The officer's key. UsageError KEY-MISSING, KEY-MODE, KEY-FORMAT, OFFICER-PASSPHRASE."""
    pem = read_private(path)
    if passphrase is not None and b"ENCRYPTED" not in pem:
        passphrase = None
    try:
        key = serialization.load_pem_private_key(pem, None if passphrase is None else passphrase.encode())
    except TypeError:
        raise UsageError(
            "OFFICER-PASSPHRASE",
            "the officer's key is encrypted",
            where=(str(path),),
            hint="--officer-passphrase env:NAME, file:PATH or keyring:SERVICE/USER",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        code = "OFFICER-PASSPHRASE" if b"ENCRYPTED" in pem else "KEY-FORMAT"
        raise UsageError(code, "the officer's key cannot be read", where=(str(path),)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError("KEY-FORMAT", "an officer's key is an Ed25519 key", where=(str(path),))
    return key


def officer_public(site: Site) -> Ed25519PublicKey:
    from cohortium.common.protocol.signing import load_public

    return load_public(site.guard / "officer.pub")


# ---- users --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def user(name: str) -> User:
    """A user of this machine, by name, or by a number that needs no account; UsageError SITE-USER."""
    if name.isdecimal():
        number = int(name)
        return User(name=name, uid=number, gid=number, groups=(number,))
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(
            "SITE-USER",
            f"this machine has no user {name!r}",
            hint=f"useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
        ) from None
    return User(name=name, uid=entry.pw_uid, gid=entry.pw_gid, groups=tuple(os.getgrouplist(name, entry.pw_gid)))


def give_to(site: Site, *, guard: User, courier: User) -> None:
    """Hand the directories to their two users, as root; the officer's stays with whoever ran `site init`.

    run/ belongs to the guard; the courier's group may enter it and, by the setgid bit, the socket is of that group.
    """
    if os.geteuid() != 0:
        raise UsageError("SITE-ROOT", "only root gives directories to other users", hint="sudo cohortium site join …")
    if guard.uid == courier.uid or guard.uid == 0 or courier.uid == 0:
        raise Refused(
            "SITE-USERS", "guard and courier are two users, and neither is root", hint="--guard-user, --courier-user"
        )
    if courier.gid in guard.groups and guard.gid in courier.groups and guard.gid == courier.gid:
        raise Refused("SITE-USERS", "guard and courier have the same first group", hint="give each a group of its own")
    os.chmod(site.root, 0o711)  # both pass through, neither can list
    for place, owner in ((site.guard, guard), (site.courier, courier)):
        if place.exists():
            _chown_tree(place, owner.uid, owner.gid)
    make_private(site.run)
    os.chown(site.run, guard.uid, courier.gid)
    os.chmod(site.run, 0o2750)


def _chown_tree(place: Path, uid: int, gid: int) -> None:
    """As root, in a place that an unprivileged user may change meanwhile: by open directories, never by paths.

    Refused SITE-OWNER for a file with a second name: that one may lie elsewhere and be somebody else's.
    """
    for folder, folders, files, handle in os.fwalk(place, follow_symlinks=False):
        for name in (*folders, *files):
            status = os.stat(name, dir_fd=handle, follow_symlinks=False)
            if (status.st_uid, status.st_gid) == (uid, gid):
                continue
            if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
                raise Refused(
                    "SITE-OWNER",
                    "a file of the site has a second name (a hard link)",
                    where=(str(Path(folder) / name),),
                    hint="replace it by a copy",
                )
            os.chown(name, uid, gid, dir_fd=handle, follow_symlinks=False)
    os.chown(place, uid, gid, follow_symlinks=False)


def describe(joined: Joined) -> list[tuple[str, Any]]:
    """What `site init` prints, in order."""
    return [
        ("this site's identity", joined.identity),
        ("the consortium's root", joined.root),
        ("the coordinator's key", joined.coordinator),
        ("the officer's key", joined.officer),
    ]
