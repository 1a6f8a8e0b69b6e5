"""Secrets by reference: found where the reference says, never in site.toml, never in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohortium.client.references import check_reference, refuse_literal_secret, resolve
from cohortium.common.errors import CohortiumError, Refused, UsageError

SECRET = "correct-horse-4711"


def test_a_secret_is_found_where_its_reference_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARD_PASSWORD", SECRET)
    assert resolve("env:WARD_PASSWORD") == SECRET
    (tmp_path / "password").write_text(SECRET + "\nsecond line\n")
    (tmp_path / "password").chmod(0o600)
    assert resolve(f"file:{tmp_path / 'password'}") == resolve("file:password", relative_to=tmp_path) == SECRET
    import keyring

    monkeypatch.setattr(
        keyring, "get_password", lambda service, user: SECRET if (service, user) == ("a", "b") else None
    )
    assert resolve("keyring:a/b") == SECRET


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET)
    path.chmod(0o644)
    with pytest.raises(Refused, match="MODE-OPEN") as caught:
        resolve(f"file:{path}")
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    "reference", [SECRET, "", "env:", "file:", "keyring:", "keyring:a", "keyring:/b", "keyring:a/", "vault:a", "ENV:A"]
)
def test_what_is_no_reference_is_refused_and_not_shown(reference: str) -> None:
    for call in (check_reference, resolve):
        with pytest.raises(UsageError, match="SECRET-FORM") as caught:
            call(reference)
        assert SECRET not in "\n".join(caught.value.lines())


def test_a_secret_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring

    def broken(service: str, user: str) -> str:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(keyring, "get_password", broken)
    (tmp_path / "empty").touch(mode=0o600)
    for reference in ("env:NOT_SET_HERE", f"file:{tmp_path / 'none'}", f"file:{tmp_path / 'empty'}", "keyring:a/b"):
        with pytest.raises(UsageError, match="SECRET-MISSING") as caught:
            resolve(reference)
        assert SECRET not in "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://reader:{SECRET}@db/ward",
        f"postgresql://reader@db/ward?password={SECRET}",
        f"postgresql://reader@db/ward?sslmode=require&sslpassword={SECRET}",
        f"postgresql://reader@db/ward?PWD={SECRET}",
        f"postgresql://reader:@db/{SECRET}",
        f"postgresql://[{SECRET}/ward",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(CohortiumError) as caught:
        refuse_literal_secret(url)
    assert caught.value.code in ("SITE-PASSWORD", "SITE-URL") and SECRET not in "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    "url", ["postgresql://reader@db:5432/ward?sslmode=verify-full", "sqlite:////data/ward.db", "duckdb:///ward.duckdb"]
)
def test_an_address_without_one_passes(url: str) -> None:
    refuse_literal_secret(url)
