"""What was done in the page: an append-only, hash-chained, signed record in guard/page, made of ledger lines.

It has a key and a file of its own. The site's key signs for the hospital to the outside, and a second chain under that
key would look to witnesses like a forked ledger; nothing of this journal ever leaves. Each action has two lines:
"asked", with who, what, about what and why, on disk before anything is done; then "done" or "refused".
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.modes import make_like_parent, refuse_open
from cohortium.common.privacy.chain import Line
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import generate, load_private, save_private

OWNER = "site-page"
ASKED, DONE, REFUSED = "asked", "done", "refused"
LEAST_REASON, MOST_REASON = 3, 500
T = TypeVar("T")


class Journal:
    """SITE/guard/page/journal.db. One process has it open: Refused PAGE-BUSY for a second page of the site."""

    def __init__(self, guard: Path) -> None:
        folder = make_like_parent(guard / "page")
        refuse_open(folder)
        self.path, key = folder / "journal.db", folder / "journal.key"
        for path in (key, self.path):
            if path.is_symlink():
                raise Refused("MODE-OPEN", "the page's journal may not be a symbolic link", where=(str(path),))
        if not key.exists():
            save_private(generate(), key)
        private = load_private(key)
        try:
            new = not self.path.exists()
            self._ledger = Ledger.create(self.path, OWNER, private) if new else Ledger.open(self.path, private)
        except Refused as error:
            if error.code != "LEDGER-BUSY":
                raise
            raise Refused(
                "PAGE-BUSY", "another page of this site is open", where=(str(folder),), hint="end that one: Ctrl-C"
            ) from None
        self._lock = threading.Lock()
        self._hand_over(folder)

    def _hand_over(self, folder: Path) -> None:
        """Made by root, the files are the guard's user's like all that lies there."""
        owner = os.stat(folder)
        for path in folder.glob("journal.*"):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(handle, 0o600)
                if os.geteuid() == 0:
                    os.fchown(handle, owner.st_uid, owner.st_gid)
            finally:
                os.close(handle)

    def act(self, by: str, action: str, about: str, reason: str, do: Callable[[], T]) -> T:
        """Do something in a person's name, with a line before and one after. UsageError ACTION-REASON without one."""
        reason = " ".join(reason.split())
        if not LEAST_REASON <= len(reason) <= MOST_REASON or not reason.isprintable():
            raise UsageError("ACTION-REASON", f"say why, in {LEAST_REASON} to {MOST_REASON} characters")
        number = self._write(ASKED, by=by, action=action, on=about, reason=reason)
        try:
            result = do()
        except BaseException as error:
            code = error.code if isinstance(error, CohortiumError) else "INTERNAL"
            self._write(REFUSED, by=by, action=action, on=about, asked=number, code=code)
            raise
        self._write(DONE, by=by, action=action, on=about, asked=number)
        return result

    def _write(self, about: str, /, **fields: Any) -> int:
        with self._lock:
            return self._ledger.note(about, **fields).number

    def lines(self) -> list[Line]:
        with self._lock:
            return self._ledger.lines()

    def close(self) -> None:
        with self._lock:
            self._ledger.close()


def told(lines: list[Line]) -> list[dict[str, Any]]:
    """The actions, newest first: at, by, action, on, reason, and how each ended."""
    asked: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.body["kind"] != "note":
            continue
        fields, about = line.body["fields"], line.body["about"]
        if about == ASKED:
            asked[line.number] = {"n": line.number, "at": line.body["at"], **fields, "ended": "cut off"}
        elif fields.get("asked") in asked:
            asked[fields["asked"]]["ended"] = "done" if about == DONE else f"refused: {fields['code']}"
    return list(reversed(asked.values()))
