"""Runs in every state with events as the ServerApp writes them, for tests of the pages about runs and sites."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cohortium.common.privacy.cap import Cap
from cohortium.server.console.books_picture import SiteBook, SourceSpent
from cohortium.server.consortium import Consortium
from cohortium.server.register import RunRow

sys.path.insert(0, str(Path(__file__).parent / "server" / "console"))
from large_world import large_world

ROUNDS = 12


def world(folder: Path) -> Consortium:
    """4 sites; 12 runs: 8 finished, one failed, void, running and proposed. No events: `answered` writes them."""
    made = large_world(folder / "consortium", sites=4, runs=12, lines=60, seats=4, rounds=ROUNDS)
    for row in made.register().runs():
        (made.root / row.folder / "run" / "events.jsonl").unlink(missing_ok=True)
        for answer in (made.root / row.folder / "run" / "answers").glob("*"):
            answer.unlink()
    return made


def of_state(made: Consortium, state: str) -> RunRow:
    return next(row for row in reversed(made.register().runs()) if row.state == state)


def answered(
    made: Consortium,
    run: str,
    indices: Sequence[int],
    *,
    dropped: Mapping[int, Sequence[str]] | None = None,
    void: Mapping[int, str] | None = None,
) -> None:
    """Releases with these indices, as server/asking.py tells them."""
    folder = made.folder(run)
    plan, gone = folder.plan(), dropped or {}
    (folder.inner / "answers").mkdir(parents=True, exist_ok=True)
    for index in indices:
        out = list(gone.get(index, ()))
        facts: dict[str, Any] = {
            "index": index,
            "purpose": plan.stage_of(index).name,
            "query": "0" * 64,
            "sites": [site for site in plan.sites if site not in out],
            "dropped": out,
            "seconds": 1.5,
            "void": (void or {}).get(index, ""),
            "variance_factor": "0x1.8p+0",
            "lattice": "0x1.0p-20",
            "bytes": 4772,
        }
        (folder.inner / "answers" / f"{index:05d}.npz").write_bytes(b"")
        folder.note("release", **facts)


class FakeBooks:
    """What `desk.books` says of a site whose ledger has a problem, or of one that told its cap and spent nothing."""

    trouble = ""

    def __init__(self, caps: Mapping[str, Cap] | None = None, **problems: str) -> None:
        self._caps, self._problems = dict(caps or {}), problems

    def site(self, name: str) -> SiteBook:
        problem = self._problems.get(name.replace("-", "_"))
        cap = self._caps.get(name)
        sources = (
            SourceSpent(
                name="records",
                epsilon=0.0,
                delta=1e-6,
                hospitals=1,
                cap=cap,
                releases=0,
                shares={},
                steps=(),
                charges={},
            ),
        )
        return dataclasses.replace(
            SiteBook.empty(name), problem=problem, size=7 if problem is None else 3, sources=sources if cap else ()
        )
