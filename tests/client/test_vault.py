"""The vault: whole or not at all, only its owner may read it, and what was removed is gone from the files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import checks
import pytest

from cohortium.client.vault import Vault


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault.db")
    assert vault.get("x") is None
    vault.put({"x": b"1", "y": b""})
    vault.put({"x": b"2"})
    vault.close()
    again = Vault(tmp_path / "vault.db")
    assert (again.get("x"), again.get("y")) == (b"2", b"")
    again.put({"x": None, "z": None})
    assert again.get("x") is None
    again.close()


def test_a_put_is_whole_or_not_at_all(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault.db")
    vault.put({"x": b"old"})
    with pytest.raises(Exception):  # noqa: B017  any failure in the middle
        vault.put({"x": b"new", "y": object()})  # type: ignore[dict-item]
    assert (vault.get("x"), vault.get("y")) == (b"old", None)
    vault.put({"x": b"new"})
    assert vault.get("x") == b"new"
    vault.close()


def test_a_put_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    """A second connection sees it while the first is open, as it would after a kill."""
    vault = Vault(tmp_path / "vault.db")
    vault.put({"x": b"1"})
    assert Vault(tmp_path / "vault.db").get("x") == b"1"
    vault.close()


def test_only_the_owner_may_read_its_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        vault = Vault(tmp_path / "vault.db")
        vault.put({"x": b"1"})
    finally:
        os.umask(old)
    files = list(tmp_path.iterdir())
    assert len(files) >= 2
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    vault.close()


def test_a_removed_secret_is_in_no_file_any_more() -> None:
    checks.passes(checks.check_removed_secrets_are_in_no_file_any_more)
