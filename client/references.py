"""Secrets by reference: site.toml names where a password lies and never holds one.

    env:NAME                an environment variable of the guard's process
    file:PATH               a file that only the guard's user may read (a container's secret); its first line
    keyring:SERVICE/USER    the operating system's key ring
A secret is read when it is needed, never printed, and no error quotes it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cohortium.common.errors import UsageError
from cohortium.common.modes import refuse_open

KINDS = ("env", "file", "keyring")
MAX_SECRET_BYTES = 64 * 1024
_SECRET_OPTIONS = re.compile(r"pass|pwd|secret|token", re.IGNORECASE)


def check_reference(reference: str) -> None:
    """Raise UsageError SECRET-FORM unless the text has the form of a reference."""
    kind, mark, rest = reference.partition(":")
    service, slash, user = rest.partition("/")
    if kind not in KINDS or not mark or not rest or (kind == "keyring" and not (slash and service and user)):
        # The text itself is not shown: it may be a password in the wrong place.
        raise UsageError(
            "SECRET-FORM",
            "a secret is given by reference",
            hint='"env:NAME", "file:PATH" or "keyring:SERVICE/USER"',
        )


def resolve(reference: str, *, relative_to: Path = Path()) -> str:
    """The secret that a reference names. Raises UsageError SECRET-FORM, SECRET-MISSING; Refused MODE-OPEN."""
    check_reference(reference)
    kind, _, rest = reference.partition(":")
    found = {"env": _from_env, "file": _from_file, "keyring": _from_keyring}[kind](rest, relative_to)
    if not found:
        raise UsageError(
            "SECRET-MISSING", "a secret that site.toml refers to is not there", where=(reference,), hint=_FIX[kind]
        )
    return found


_FIX = {
    "env": "set this variable for the guard's process",
    "file": "write the secret into this file, readable by the guard's user only",
    "keyring": "store it with: keyring set SERVICE USER",
}


def _from_env(name: str, relative_to: Path) -> str:
    return os.environ.get(name, "")


def _from_file(name: str, relative_to: Path) -> str:
    path = relative_to / name
    if not path.is_file():
        return ""
    refuse_open(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SECRET_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text.split("\n", 1)[0].rstrip("\r")


def _from_keyring(name: str, relative_to: Path) -> str:
    service, _, user = name.partition("/")
    try:
        import keyring

        return keyring.get_password(service, user) or ""
    except Exception:  # a locked or missing key ring has many faces, and its texts may hold the name of the secret
        return ""


def refuse_literal_secret(url: str) -> None:
    """Raise UsageError SITE-PASSWORD when a database's address carries a password or anything like one."""
    try:
        parts = urlsplit(url)
        secret = parts.password is not None or any(_SECRET_OPTIONS.search(key) for key, _ in parse_qsl(parts.query))
    except ValueError:
        raise UsageError(
            "SITE-URL", "a database's address cannot be read", hint="postgresql://USER@HOST/NAME"
        ) from None
    if secret:
        raise UsageError(
            "SITE-PASSWORD",
            "a database's address may not hold a password",
            hint='take it out of `table` and add a line: password = "env:NAME", "file:PATH" or "keyring:SERVICE/USER"',
        )
