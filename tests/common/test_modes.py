"""File modes: what others may use is refused, and the error names the command that closes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_like_parent, make_private, refuse_all, refuse_open, write_private


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "a.key"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o200, 0o000, 0o700])
def test_a_closed_file_passes(mode: int, key: Path) -> None:
    key.chmod(mode)
    refuse_open(key)


@pytest.mark.parametrize("bit", [0o040, 0o020, 0o010, 0o004, 0o002, 0o001])
def test_every_single_bit_for_others_is_refused_and_the_command_repairs_it(bit: int, key: Path) -> None:
    for path, closed in ((key, 0o600), (make_private(key.parent / "keys"), 0o700)):
        path.chmod(closed | bit)
        with pytest.raises(Refused) as caught:
            refuse_open(path)
        assert caught.value.code == "MODE-OPEN" and str(path) in caught.value.where
        assert caught.value.hint == f"chmod {closed:o} {path}"
        subprocess.run(caught.value.hint.split(), check=True)
        refuse_open(path)


def test_a_shared_directory_is_open_to_its_group_only(tmp_path: Path) -> None:
    run = make_private(tmp_path / "run")
    run.chmod(0o2750)
    refuse_open(run, group=True)
    with pytest.raises(Refused, match="MODE-OPEN"):
        refuse_open(run)
    run.chmod(0o2751)
    with pytest.raises(Refused, match="MODE-OPEN"):
        refuse_open(run, group=True)


def test_a_link_is_refused_and_a_missing_file_is_told(key: Path) -> None:
    link = key.with_name("link")
    link.symlink_to(key)
    with pytest.raises(Refused, match="MODE-OPEN"):
        refuse_open(link)
    with pytest.raises(UsageError, match="MODE-MISSING"):
        refuse_open(key.with_name("none"))
    refuse_all([key, key.with_name("none")])
    with pytest.raises(Refused):  # a link that leads nowhere is a link all the same
        dangling = key.with_name("dangling")
        dangling.symlink_to("nowhere")
        refuse_all([dangling])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_refused_to_a_user_and_not_to_root(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(key, 51111, 51111)
    refuse_open(key)
    monkeypatch.setattr(os, "geteuid", lambda: 51112)
    with pytest.raises(Refused, match="another user"):
        refuse_open(key)
    monkeypatch.setattr(os, "geteuid", lambda: 51111)
    refuse_open(key)


def test_private_directories_are_closed_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_private(tmp_path / "a" / "b")
        write_private(made / "file", b"x")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700 and (made / "file").stat().st_mode & 0o777 == 0o600


def test_a_file_is_replaced_and_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = make_private(tmp_path / "place")
    (place / "a").symlink_to(victim)
    (place / f".a.{os.getpid()}.new").symlink_to(victim)
    write_private(place / "a", b"theirs")
    assert victim.read_text() == "mine" and (place / "a").read_bytes() == b"theirs" and not (place / "a").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_writes_belongs_to_the_directorys_owner(tmp_path: Path) -> None:
    place = make_private(tmp_path / "place")
    os.chown(place, 51111, 51112)
    write_private(place / "a", b"x")
    made = make_like_parent(place / "b")
    for path in (place / "a", made):
        assert (path.stat().st_uid, path.stat().st_gid) == (51111, 51112)
