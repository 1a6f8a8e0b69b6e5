"""console.toml: what it may say, each refusal with its line, secrets by reference only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cohortium.common.errors import CohortiumError
from cohortium.server.console.settings import FILE, Oidc, Settings, secret_of

WHOLE = """\
[console]
listen = "0.0.0.0"
port = 8443
names = ["console.example.org", "console"]
certificate = "tls/cert.pem"
certificate_key = "/etc/tls/key.pem"
session_hours = 8
idle_minutes = 20

[oidc]
issuer = "https://login.example.org/realms/one"
client_id = "cohortium"
client_secret = "env:CONSOLE_SECRET"
claim = "realm_access.roles"
title = "Example Hospital"
scopes = ["profile", "groups"]
acr = ["gold"]
amr = ["pwd", "otp"]

[oidc.roles]
"synthetic data: coordinators" = "coordinator"
reviewers = "auditor"

[oidc.sites]
"north: data office" = "site-1"
"""
OIDC = """\
[oidc]
issuer = "https://login.example.org"
client_id = "c"
[oidc.roles]
x = "auditor"
"""


def load(folder: Path, text: str) -> Settings:
    (folder / FILE).write_text(text)
    return Settings.load(folder)


def refused(folder: Path, text: str) -> CohortiumError:
    with pytest.raises(CohortiumError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 2 or caught.value.code == "MODE-OPEN"
    return caught.value


def test_without_a_file_it_is_for_this_machine_only(tmp_path: Path) -> None:
    found = Settings.load(tmp_path)
    assert found == Settings() and found.address == "http://127.0.0.1:7445" and not found.secure
    assert load(tmp_path, "") == Settings()


def test_everything_it_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSOLE_SECRET", "s3cret")
    found = load(tmp_path, WHOLE)
    assert found.certificate == tmp_path / "tls/cert.pem" and found.certificate_key == Path("/etc/tls/key.pem")
    assert (found.session_hours, found.idle_minutes, found.port) == (8, 20, 8443)
    assert found.address == "https://console.example.org:8443" and found.secure
    assert found.known == ("console.example.org", "console"), "not by the loopback names: it listens elsewhere"
    oidc = found.oidc
    assert oidc is not None and oidc.client_secret == "s3cret" and "s3cret" not in repr(found)
    assert oidc.roles == {"synthetic data: coordinators": "coordinator", "reviewers": "auditor"}
    assert oidc.sites == {"north: data office": "site-1"} and oidc.scopes == ("openid", "profile", "groups")
    assert (oidc.acr, oidc.amr, oidc.claim) == (("gold",), ("pwd", "otp"), "realm_access.roles")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({"names": ("c.example.org",), "behind_tls": True}, "https://c.example.org"),
        ({"names": ("c.example.org",), "behind_tls": True, "public_port": 8443}, "https://c.example.org:8443"),
        ({"listen": "::1"}, "http://[::1]:7445"),
        ({"port": 80}, "http://127.0.0.1"),
    ],
)
def test_the_address_is_the_one_that_browsers_use(given: dict[str, Any], address: str) -> None:
    assert Settings(**given).address == address


@pytest.mark.parametrize(
    ("text", "code", "line", "word"),
    [
        ("[console]\nprot = 1\n", "STUDY-UNKNOWN", 2, "port"),
        ("\n\n[consle]\n", "STUDY-UNKNOWN", 3, "console"),
        ("[console]\nport = 'x'\n", "STUDY-TYPE", 2, "port"),
        ("[console]\nport = 0\n", "STUDY-VALUE", 2, "port"),
        ("[console]\nsession_hours = 1000\n", "STUDY-VALUE", 2, "session_hours"),
        ("[console]\nbehind_tls = 1\n", "STUDY-TYPE", 2, "true"),
        ("[console]\nlisten = ''\n", "STUDY-TYPE", 2, "listen"),
        ("[console\n", "STUDY-TOML", 1, ""),
        ("[console]\nlisten = '0.0.0.0'\n", "CONSOLE-TLS", None, "behind_tls"),
        ("[console]\nlisten = '0.0.0.0'\nbehind_tls = true\n", "CONSOLE-NAMES", None, "names"),
        ("[console]\nbehind_tls = true\n", "CONSOLE-NAMES", None, "names"),
        ("[console]\ncertificate = 'a'\n", "CONSOLE-TLS", None, ""),
        (
            "[console]\nbehind_tls = true\nnames = ['a']\ncertificate = 'a'\ncertificate_key = 'b'\n",
            "CONSOLE-TLS",
            None,
            "",
        ),
        ("[console]\nnames = ['https://a.example']\n", "CONSOLE-NAMES", None, "without"),
        ("[console]\nproxies = ['proxy.example.org']\n", "CONSOLE-PROXY", None, "10.0.0.7"),
        ("[console]\nproxies = ['*']\n", "CONSOLE-PROXY", None, ""),
        ("[console]\nproxies = ['0.0.0.0/0']\n", "CONSOLE-PROXY", None, ""),
        ("[oidc]\nclient_id = 'c'\n", "STUDY-MISSING", 1, "issuer"),
        ("[oidc]\nissuer = 'https://a.example'\nclient_id = 'c'\n", "CONSOLE-ROLES", None, "oidc.roles"),
        (OIDC + "y = 'root'\n", "STUDY-VALUE", 6, "auditor"),
        (OIDC + "y = 'site'\n", "STUDY-VALUE", 6, "auditor"),
        (OIDC + "[oidc.sites]\ny = 'No Site'\n", "STUDY-VALUE", 7, "site-1"),
        (OIDC.replace("https://login", "http://login"), "CONSOLE-ISSUER", None, "https"),
        (OIDC.replace("example.org", "example.org/?a=b"), "CONSOLE-ISSUER", None, "https"),
        (OIDC.replace("client_id", "client_ident"), "STUDY-UNKNOWN", 3, "client_id"),
    ],
)
def test_a_refusal_names_the_line_and_the_fix(
    tmp_path: Path, text: str, code: str, line: int | None, word: str
) -> None:
    error = refused(tmp_path, text)
    assert error.code == code and word in error.hint
    assert FILE in error.where[0] and (line is None or error.where[0].endswith(f":{line}"))


def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    error = refused(tmp_path, OIDC.replace('client_id = "c"', 'client_id = "c"\nclient_secret = "hunter2hunter2"'))
    assert error.code == "CONSOLE-SECRET" and error.where[0].endswith(f"{FILE}:4") and "env:NAME" in error.hint
    assert "hunter2" not in "".join(error.lines())


def test_a_secret_in_another_file_must_be_closed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("abc\n")
    text = OIDC.replace('client_id = "c"', 'client_id = "c"\nclient_secret = "file:secret"')
    (tmp_path / "secret").chmod(0o644)
    assert refused(tmp_path, text).code == "MODE-OPEN"
    (tmp_path / "secret").chmod(0o600)
    oidc = load(tmp_path, text).oidc
    assert oidc is not None and oidc.client_secret == "abc", "beside console.toml, wherever it was started"


@pytest.mark.parametrize("reference", ["env:NOT_SET_ANYWHERE", "env:", "file:", "abc", ""])
def test_references_that_lead_nowhere(reference: str) -> None:
    with pytest.raises(CohortiumError) as caught:
        secret_of(reference, where="here")
    assert caught.value.code == "CONSOLE-SECRET"


def test_a_provider_in_the_clear_only_on_this_machine() -> None:
    made: dict[str, Any] = {"client_id": "c", "client_secret": None, "claim": "groups", "sites": {}}
    made["roles"] = {"a": "auditor"}
    assert Oidc(issuer="http://127.0.0.1:9", **made).issuer
    with pytest.raises(CohortiumError):
        Oidc(issuer="http://127.0.0.1.example.org", **made)


def test_the_documents_examples_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "console.md").read_text(encoding="utf-8")
    examples = [
        body for body in re.findall(r"^```ini\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "[console]" in body
    ]
    assert len(examples) >= 2
    (tmp_path / "oidc.secret").write_text("s")
    (tmp_path / "oidc.secret").chmod(0o600)
    for body in examples:
        assert load(tmp_path, body).names == ("console.example.org",)
