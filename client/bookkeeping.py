"""A site's ledger as its hospital reads it: what was charged by run and in total, the head, who witnessed it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from cohortium.client.inspection import account
from cohortium.client.site import Site
from cohortium.common.errors import CheckFailed
from cohortium.common.privacy import chain
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.protocol.signing import load_private, public_from_raw


def statement(site: Site, *, verify: bool = False) -> dict[str, Any]:
    """Everything that `site ledger` prints. Opening checks every hash and the last signature; verify: all of them."""
    policy = site.policy()
    with Ledger.open(site.guard / "ledger.db") as ledger:
        if verify:
            public = public_from_raw(bytes.fromhex(ledger.public_key))
            chain.replay(ledger.lines(), owner=policy.name, public=public)
        elif ledger.owner != policy.name:
            raise CheckFailed("LEDGER-OWNER", f"the ledger of {ledger.owner!r}, not of {policy.name!r}")
        book, head = ledger.book, ledger.head()
        firsts: dict[str, int] = {}
        for line in ledger.lines():
            if line.body["kind"] == "reserve":
                firsts.setdefault(line.body["run"], int(line.body["at"]))
        runs = []
        for run in dict.fromkeys(entry.run for entry in book.entries.values()):
            mine = [entry for entry in book.entries.values() if entry.run == run]
            cost = epsilon(book.charged_events(run), delta=policy.lifetime_delta, hospitals=policy.hospitals)
            runs.append(
                {
                    "run": run,
                    "plan": mine[0].plan,
                    "releases": len(mine),
                    "epsilon": "inf" if cost == float("inf") else cost,
                    "first": firsts[run],
                    "states": dict(sorted(Counter(entry.state for entry in mine).items())),
                    "rehearsal": bool(book.noted(chain.REHEARSAL, run)),
                }
            )
        total = account(policy, book.charged_events())
    return {
        "site": policy.name,
        "cap": {"epsilon": policy.lifetime_epsilon, "delta": policy.lifetime_delta, "hospitals": policy.hospitals},
        "runs": runs,
        "total": total.to_json(),
        "head": {"size": head.size, "hash": head.hash},
        "verified": "all" if verify else "hashes and last signature",
        "witnessed": _witnessed(site),
        "earlier": [str(path) for path in sorted((site.guard / "ledgers").glob("*.db"))],
    }


def _witnessed(site: Site) -> list[dict[str, Any]]:
    """The heads that witnesses confirmed, of the guard's own memory: one a run, the newest start."""
    path = site.guard / "vault.db"
    if not path.exists():
        return []
    query = "SELECT name, value FROM vault WHERE substr(name, 1, 6) = 'start/' ORDER BY name"
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)
        try:
            rows = db.execute(query).fetchall()
        finally:
            db.close()
    except sqlite3.Error:
        return []
    found = []
    for name, value in rows:
        size, _, head = bytes(value).decode("ascii", "replace").partition(" ")
        if size.isdigit():
            found.append({"run": str(name).removeprefix("start/"), "size": int(size), "hash": head})
    return found


def export(site: Site, path: Path) -> str:
    """All lines as JSONL, which `cohortium audit` and chain.replay verify without the database."""
    with Ledger.open(site.guard / "ledger.db") as ledger:
        chain.write_jsonl(ledger.lines(), path)
    return str(path)


def accept_clock(site: Site) -> None:
    """Note that this machine's clock was ahead. The guard must not run: it holds the ledger."""
    with Ledger.open(site.guard / "ledger.db", load_private(site.guard / "site.key")) as ledger:
        ledger.accept_clock()
