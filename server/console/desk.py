"""All that the console's pages work with: the consortium's folder, accounts, journal, and what was worked out of them.

Reads come from files and registers that other processes write; whatever takes long is worked out beside the requests
and kept. Nothing here talks to a site.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cohortium.common.modes import make_private
from cohortium.server import seen
from cohortium.server.backing import row_facts
from cohortium.server.conduct import told_state
from cohortium.server.console.accounts import SITE, Account, Accounts
from cohortium.server.console.books import Books
from cohortium.server.console.journal import Journal
from cohortium.server.console.settings import Settings
from cohortium.server.consortium import Consortium
from cohortium.server.progress import Progress
from cohortium.server.register import Register, RunRow
from cohortium.server.runs import RunFolder


class Desk:
    """One consortium, as the console sees it. Threads may share it."""

    def __init__(self, consortium: Consortium, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self.consortium, self.settings, self.clock = consortium, settings, clock
        make_private(self.folder)
        self.register: Register = consortium.register()
        self.accounts = Accounts(
            self.folder / "accounts.db",
            session_s=settings.session_hours * 3600,
            idle_s=settings.idle_minutes * 60,
            clock=clock,
        )
        self.journal = Journal(self.folder / "journal.db", consortium.key())
        self.progress = Progress(consortium.mirror)
        self.books = Books(consortium, self.register, clock=clock)

    @property
    def folder(self) -> Path:
        """CONSORTIUM/console: everything that is the console's own."""
        return self.consortium.root / "console"

    def start(self) -> None:
        """Begin to read what others write, beside the requests. Without it everything is read by `books.refresh`."""
        self.books.start()

    def close(self) -> None:
        self.books.close()
        self.journal.close()
        self.accounts.close()
        self.register.close()

    # ---- who sees what --------------------------------------------------------------------------------------

    def sees_run(self, account: Account, run: str) -> bool:
        """A site's member sees the runs that name its site; coordinator and auditor see all."""
        return account.role != SITE or account.site in self.register.approvals(run)

    def sees_site(self, account: Account, name: str) -> bool:
        return account.role != SITE or account.site == name

    def runs(self, account: Account) -> list[RunRow]:
        """The runs that an account sees, newest first."""
        rows = list(reversed(self.register.runs()))
        if account.role != SITE:
            return rows
        seen = self.register.runs_that_name(account.site)
        return [row for row in rows if row.run in seen]

    # ---- reads ----------------------------------------------------------------------------------------------

    def run_folder(self, row: RunRow) -> RunFolder:
        return RunFolder(root=self.consortium.root / row.folder)

    def run_facts(self, row: RunRow) -> dict[str, Any]:
        """One run as `cohortium watch --json` tells it."""
        return row_facts(self.consortium, self.register, row, self.progress)

    def seen(self) -> dict[str, dict[str, Any]]:
        """When `serve` last heard of each member."""
        return seen.load(self.consortium.root / "seen.json")

    @staticmethod
    def state(row: RunRow) -> str:
        return told_state(row)
