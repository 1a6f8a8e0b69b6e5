"""console.toml in a consortium's folder: where the console listens and how people may sign in. All of it has defaults.

    [console]  listen = "127.0.0.1"  port = 7445  names = ["console.example.org"]
               certificate = "cert.pem"  certificate_key = "key.pem"  session_hours = 12  idle_minutes = 60
               behind_tls = false  proxies = ["127.0.0.1", "::1"]  public_port = 443
    [oidc]     issuer = "https://login.example.org"  client_id = "…"  client_secret = "env:NAME"
    [oidc.roles], [oidc.sites]   who gets which role: a value of the claim -> role, or -> site

Anything but the loopback interface is served over TLS, with a certificate that the house's browsers know, or stands
behind a proxy that ends TLS (behind_tls). There is no third way: a password is not sent in the clear.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from cohortium.common.errors import UsageError
from cohortium.common.modes import refuse_open
from cohortium.common.toml_reader import Table, TomlFile

FILE = "console.toml"
PORT = 7445
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROVIDER_ROLES = ("coordinator", "auditor")
"""What [oidc.roles] may give; a site's members come by [oidc.sites]."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9a-fA-F:]+")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Oidc:
    """A hospital's identity provider. roles: a value of `claim` in the ID token -> role here; sites: value -> site.

    Whoever has none of the values is not let in: a provider knows many people, a consortium few. acr: sign-ins of one
    of these classes only; amr: all of these methods were used. They are how a house says that its provider asked for
    a second factor. Without them the provider is trusted to have done so.
    """

    issuer: str
    client_id: str
    client_secret: str | None = field(repr=False)
    claim: str
    roles: Mapping[str, str]
    sites: Mapping[str, str]
    title: str = "your organisation"
    scopes: tuple[str, ...] = ("openid", "profile")
    acr: tuple[str, ...] = ()
    amr: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = urlsplit(self.issuer)
        clear = parts.scheme == "http" and parts.hostname in LOOPBACK
        if not (parts.scheme == "https" or clear) or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(
                "CONSOLE-ISSUER",
                "an issuer is an https address without query",
                where=(f"{FILE}: [oidc] issuer",),
                hint='issuer = "https://login.example.org"',
            )
        if not set(self.roles.values()) <= set(PROVIDER_ROLES) or not (self.roles or self.sites):
            raise UsageError(
                "CONSOLE-ROLES",
                "it is not said whom the provider's people are here",
                where=(f"{FILE}: [oidc.roles]",),
                hint='[oidc.roles] "their group" = "coordinator" or "auditor"; [oidc.sites] "their group" = "site-1"',
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """proxies: addresses or networks from which a proxy that ends TLS may come (behind_tls); nobody else is served.

    public_port: the port that browsers use, where it is not `port`; 443 behind a proxy.
    """

    listen: str = "127.0.0.1"
    port: int = PORT
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    certificate_key: Path | None = None
    behind_tls: bool = False
    proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    public_port: int | None = None
    session_hours: int = 12
    idle_minutes: int = 60
    oidc: Oidc | None = field(default=None)

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.certificate_key is None):
            raise UsageError("CONSOLE-TLS", "certificate and certificate_key are given together", where=(FILE,))
        if not self.is_loopback and self.certificate is None and not self.behind_tls:
            raise UsageError(
                "CONSOLE-TLS",
                f"listening on {self.listen} needs TLS",
                where=(f"{FILE}: [console] listen",),
                hint="give certificate and certificate_key, or behind_tls = true behind a proxy that ends TLS",
            )
        if self.certificate is not None and self.behind_tls:
            raise UsageError(
                "CONSOLE-TLS",
                "TLS ends either here or at a proxy",
                where=(f"{FILE}: [console] behind_tls",),
                hint="give certificate and certificate_key, or behind_tls = true",
            )
        if not (self.is_loopback and not self.behind_tls) and not self.names:
            raise UsageError(
                "CONSOLE-NAMES",
                "the names are missing under which browsers come",
                where=(f"{FILE}: [console] names",),
                hint='names = ["console.example.org"]',
            )
        for name in self.names:
            if not _HOST.fullmatch(name):
                raise UsageError(
                    "CONSOLE-NAMES",
                    f"{name!r} is no host name",
                    where=(f"{FILE}: [console] names",),
                    hint='names = ["console.example.org"], without https:// and without a port',
                )
        for proxy in self.proxies:
            if not _is_proxy(proxy):
                raise UsageError(
                    "CONSOLE-PROXY",
                    f"{proxy!r} is neither an address nor a network",
                    where=(f"{FILE}: [console] proxies",),
                    hint='proxies = ["10.0.0.7"]: only they may say from where somebody comes',
                )

    @property
    def is_loopback(self) -> bool:
        try:
            return self.listen == "localhost" or ipaddress.ip_address(self.listen).is_loopback
        except ValueError:
            return False

    @property
    def secure(self) -> bool:
        """Whether browsers reach it over TLS: then cookies are Secure and the answer says so for a year."""
        return self.certificate is not None or self.behind_tls

    @property
    def known(self) -> tuple[str, ...]:
        """Names that a Host header may have."""
        return (*self.names, *(LOOPBACK if self.is_loopback else ()))

    @property
    def address(self) -> str:
        """Where browsers find it."""
        scheme, usual = ("https", 443) if self.secure else ("http", 80)
        port = self.public_port or (443 if self.behind_tls else self.port)
        name = self.names[0] if self.names else self.listen
        host = f"[{name}]" if ":" in name else name
        return f"{scheme}://{host}" if port == usual else f"{scheme}://{host}:{port}"

    @classmethod
    def load(cls, root: Path) -> Self:
        """Of a consortium's folder; the defaults where there is no file. UsageError names the line."""
        path = root / FILE
        if not path.exists():
            return cls()
        file = TomlFile.load(path)
        file.only("console", "oidc")
        given: dict[str, Any] = {}
        if file.has("console"):
            table = file.section("console", "")
            table.only(*(known.name for known in fields(cls) if known.name != "oidc"))
            for key in ("names", "proxies"):
                if table.has(key):
                    given[key] = table.texts(key)
            given.update({key: root / table.text(key, example="") for key in _FILES if table.has(key)})
            given.update(
                {
                    key: table.whole(key, least=least, most=most, example=f"{key} = {example}")
                    for key, (least, most, example) in _WHOLE.items()
                    if table.has(key)
                }
            )
            if table.has("listen"):
                given["listen"] = table.text("listen", example='listen = "127.0.0.1"')
            if table.has("behind_tls"):
                given["behind_tls"] = _yes_or_no(table, "behind_tls")
        if file.has("oidc"):
            given["oidc"] = _oidc(file.section("oidc", ""), root)
        return cls(**given)


_FILES = ("certificate", "certificate_key")
_WHOLE = {
    "port": (1, 65535, PORT),
    "public_port": (1, 65535, 443),
    "session_hours": (1, 168, 12),
    "idle_minutes": (1, 1440, 60),
}


def _oidc(table: Table, root: Path) -> Oidc:
    table.only(*(known.name for known in fields(Oidc)))
    roles, sites = _texts_of(table, "roles"), _texts_of(table, "sites")
    for key, role in roles.items():
        if role not in PROVIDER_ROLES:
            inner = table.inner("roles")
            assert inner is not None
            raise inner.error(key, f"{role!r} is no role here", '"their group" = "coordinator" or "auditor"')
    for key, site in sites.items():
        if not _SITE.fullmatch(site):
            inner = table.inner("sites")
            assert inner is not None
            raise inner.error(key, f"{site!r} is no site's name", '"their group" = "site-1"')
    given: dict[str, Any] = {key: table.texts(key) for key in ("acr", "amr") if table.has(key)}
    if table.has("scopes"):
        given["scopes"] = tuple(dict.fromkeys(("openid", *table.texts("scopes"))))
    if table.has("title"):
        given["title"] = table.text("title", example='title = "Example Hospital"')
    secret = table.text_or_none("client_secret")
    return Oidc(
        issuer=table.text("issuer", example='issuer = "https://login.example.org"'),
        client_id=table.text("client_id", example='client_id = "cohortium"'),
        client_secret=None if secret is None else secret_of(secret, where=table.place("client_secret"), root=root),
        claim=table.text("claim", example='claim = "groups"') if table.has("claim") else "groups",
        roles=roles,
        sites=sites,
        **given,
    )


def _texts_of(table: Table, key: str) -> dict[str, str]:
    inner = table.inner(key)
    if inner is None:
        return {}
    return {name: inner.text(name, example=f'"{name}" = "…"') for name in inner.data}


def _yes_or_no(table: Table, key: str) -> bool:
    value = table.data[key]
    if not isinstance(value, bool):
        raise table.error(key, f"{key} is true or false", f"{key} = true", code="STUDY-TYPE")
    return value


def _is_proxy(text: str) -> bool:
    """An address, or a network that is not the whole world."""
    try:
        return ipaddress.ip_network(text).prefixlen > 0
    except ValueError:
        return False


def secret_of(reference: str, *, where: str, root: Path | None = None, code: str = "CONSOLE-SECRET") -> str:
    """What env:NAME or file:PATH refers to. UsageError for anything else, not repeated: it may be the secret."""
    kind, _, what = reference.partition(":")
    if kind == "env" and what:
        value = os.environ.get(what)
        if not value:
            raise UsageError(code, f"the environment has no {what}", where=(where,))
        return value
    if kind == "file" and what:
        path = (root or Path()) / what
        refuse_open(path)
        return path.read_text(encoding="utf-8").removesuffix("\n")
    raise UsageError(code, "a secret is given by reference", where=(where,), hint="env:NAME or file:PATH")
