"""How every process of ours tells what happened: one JSON object a line, with a code that stays the same.

    {"at": "2026-11-22T14:05:03.120Z", "level": "warning", "code": "SERVE-RESTART", "event": "restart", "text": "…"}
    and where they apply: run, site, error (the code of a CohortiumError) and the few fields that a code names

CODES is the whole list; docs/monitoring.md explains each, and a test compares the two. A line holds words of ours and
names that the consortium agreed on: never a record's value, a password, a token, or the text of an exception of code
that reads data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

Level = Literal["info", "warning", "error"]
MOST_TEXT = 2000
OWN = ("at", "level", "code", "event", "text", "run", "site")


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """level: how much it matters; event: the word that scripts look for; meaning: a sentence for docs and people."""

    level: Level
    event: str
    meaning: str

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"there is no level {self.level!r}")


def _code(level: Level, event: str, meaning: str) -> Code:
    return Code(level=level, event=event, meaning=meaning)


CODES: Mapping[str, Code] = {
    # the coordinator's service
    "SERVE-READY": _code("info", "ready", "every listener is up"),
    "SERVE-STARTED": _code("info", "started", "one part of the service is up"),
    "SERVE-STOPPING": _code("info", "stopping", "the service ends; runs go on when it is back"),
    "SERVE-RESTART": _code("warning", "restart", "a child process had ended and is started again"),
    "SERVE-RENEWED": _code("info", "renewed", "a certificate of the coordinator's own was renewed"),
    "SERVE-CONSOLE": _code("info", "console", "what the service says of the console that it starts"),
    "SERVE-WARNING": _code("warning", "warning", "something needs a person soon; at most one such line a minute"),
    "SERVE-INTERNAL": _code("error", "error", "a part of the service met an error that it survives"),
    "SERVE-TOLD": _code("info", "told", "anything else that the service says"),
    "MEMBER-ENROLLED": _code("info", "enrolled", "a site or researcher has joined"),
    "MEMBER-REVOKED": _code("warning", "revoked", "a member was shut out everywhere"),
    "RUN-CHANGED": _code("info", "run", "a run is in another state, or waits for something else"),
    "RUN-HELD": _code("warning", "run", "a run was stopped, or cannot go on without a person"),
    "RUN-ENDED-BADLY": _code("error", "run", "a run ended without a result"),
    # the console
    "WEB-STARTED": _code("info", "started", "the console takes requests"),
    "WEB-STOPPED": _code("info", "stopped", "the console has ended"),
    "WEB-ACCESS": _code("info", "access", "one request was answered"),
    "WEB-BUG": _code("error", "error", "a page broke down; its id stands on the page that the person saw"),
    "WEB-SERVER": _code("warning", "server", "the web server has something to say"),
    # a hospital
    "GUARD-REFUSED": _code("warning", "refused", "the guard refused a message; nothing left with it but one code"),
    "GUARD-NOTED": _code("info", "noted", "the guard noticed something and went on"),
    "COURIER-STARTED": _code("info", "started", "the courier started Flower's SuperNode"),
    "COURIER-CONNECTED": _code("info", "connected", "the courier reached the coordinator"),
    "COURIER-ENDED": _code("warning", "ended", "the SuperNode ended and is started again"),
    "COURIER-WAITS": _code("info", "waits", "the courier waits for the coordinator"),
    "COURIER-RENEWED": _code("info", "renewed", "the site's certificate was renewed"),
    "COURIER-NOT-RENEWED": _code("warning", "not-renewed", "the certificate was not renewed; it is tried again"),
    "COURIER-TOLD": _code("info", "told", "anything else that the courier says"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line. at: seconds since 1970. more: fields that the code names, short texts and numbers."""

    code: str
    text: str
    at: float
    run: str = ""
    site: str = ""
    more: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is not in CODES: name it there and in docs/monitoring.md")
        if set(self.more) & set(OWN):
            raise ValueError("a field of that name is every line's own")

    @property
    def level(self) -> Level:
        return CODES[self.code].level

    @property
    def event(self) -> str:
        return CODES[self.code].event

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "at": rfc3339(self.at),
            "level": self.level,
            "code": self.code,
            "event": self.event,
            "text": self.text[:MOST_TEXT],
        }
        facts |= {name: value for name, value in (("run", self.run), ("site", self.site)) if value}
        return facts | {name: _short(value) for name, value in self.more.items()}

    def json(self) -> str:
        """The line, without its end. ASCII, so that no terminal acts on what a name holds."""
        return json.dumps(self.to_json(), allow_nan=False)

    def plain(self) -> str:
        """The same for people: time, event, text; control characters are shown, not obeyed."""
        at = datetime.fromtimestamp(self.at, UTC)
        said = "".join(ch if ch.isprintable() else "\ufffd" for ch in self.text[:MOST_TEXT])
        return f"{at:%Y-%m-%d %H:%M:%S} {self.event}: {said}"


def entry(code: str, text: str, /, *, at: float | None = None, run: str = "", site: str = "", **more: Any) -> Entry:
    """A line of now. ValueError for a code that is not in CODES: codes are a promise to whoever reads logs."""
    return Entry(code=code, text=text, at=time.time() if at is None else at, run=run, site=site, more=more)


def rfc3339(at: float) -> str:
    """2026-11-22T14:05:03.120Z"""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _short(value: str | int | float) -> str | int | float:
    return value[:MOST_TEXT] if isinstance(value, str) else value
