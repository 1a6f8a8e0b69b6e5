"""A hospital's database, read by a user who can only read: one statement, streamed in pieces, from one state.

Each kind of database is one file beside this one; what they share is here. Databases quote values and statements in
their errors, so nothing that a database says goes into ours: only its error class or SQLSTATE, which hold no data.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from cohortium.client.sources.base import Batches, Source, check_names
from cohortium.common.errors import TableError

BATCH_ROWS = 20_000
CONNECT_S = 15
_LEADING = re.compile(r"\A(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*", re.DOTALL)
_READS = ("select", "with", "values", "table")

Parts = Generator[pd.DataFrame, None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A source, taken apart. label: how errors name it: no user, no password, no options.

    until: on the clock of time.monotonic, when everything must have been read.
    """

    source: Source
    url: URL
    label: str
    file: Path | None
    until: float

    def error(self, code: str, sentence: str, hint: str, *where: str) -> TableError:
        return TableError(code, sentence, where=(self.label, *where), hint=hint)

    def timeout(self) -> TableError:
        return self.error(
            "SOURCE-TIMEOUT",
            f"the database did not answer the whole query within {self.source.timeout_s:g} s",
            "a simpler query, an index, or a table made of it every night",
        )

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise self.timeout()

    def statement(self, quote: Callable[[str], str]) -> str:
        """The one statement to run, which can only read. The database's own refusals do not depend on this check."""
        if self.source.table is not None:
            return "SELECT * FROM " + ".".join(quote(part) for part in self.source.table.split("."))
        text = (self.source.query or "").strip().rstrip(";").rstrip()
        start = text[_LEADING.match(text).end() :].lstrip("(").lstrip()  # type: ignore[union-attr]
        if "\0" in text or not re.match(rf"(?:{'|'.join(_READS)})\b", start, re.IGNORECASE):
            raise self.error(
                "SOURCE-QUERY", "the query does not begin with SELECT or WITH", "one SELECT statement", "[data] query"
            )
        return text


def open_source(source: Source, *, folder: Path | None = None) -> Batches:
    """Connected, checked and begun: the first piece is read. Raises TableError."""
    job = _job(source, folder)
    kind = job.url.get_backend_name()
    if kind == "postgresql":
        from cohortium.client.sources import postgres

        parts = postgres.read(job)
    elif kind == "sqlite":
        from cohortium.client.sources import sqlite

        parts = sqlite.read(job)
    else:
        from cohortium.client.sources import duck

        parts = duck.read(job)
    first = next(parts)  # a reader always gives one piece, be it an empty one: it holds the names of the columns
    try:
        check_names(job.label, list(first.columns))
        if not len(first):
            raise job.error(
                "TABLE-EMPTY", "the query gives no rows", "run it by hand; may this user see the rows (row security)?"
            )
    except TableError:
        parts.close()
        raise
    return Batches(_numbered(first, parts), first.columns)


def _numbered(first: pd.DataFrame, parts: Parts) -> Parts:
    """Rows of the answer counted from 0, so that an error can name one."""
    rows = 0
    try:
        part: pd.DataFrame | None = first
        del first
        while part is not None:
            part.index = pd.RangeIndex(rows, rows + len(part))
            rows += len(part)
            yield part
            part = next(parts, None)
    finally:
        parts.close()


def _job(source: Source, folder: Path | None) -> Job:
    try:
        url = make_url(source.url)
        kind = url.get_backend_name()
    except (ArgumentError, ValueError):
        url, kind = None, ""
    if url is None or kind not in ("postgresql", "sqlite", "duckdb"):
        raise TableError(
            "SOURCE-URL",
            "the database's address cannot be read or is of a kind that is not known",
            where=("[data]",),
            hint="postgresql://USER@HOST/DATABASE, sqlite:////PATH or duckdb:////PATH",
        )
    if url.password is not None:
        raise TableError(
            "SOURCE-PASSWORD",
            "the database's address holds a password",
            where=("[data]",),
            hint='take it out and write password = "file:…", "env:…" or "keyring:…"',
        )
    file = None
    if kind != "postgresql":
        if url.host or url.username or url.query or not url.database or url.database == ":memory:":
            raise TableError(
                "SOURCE-URL", "a database in a file needs its path alone", where=("[data]",), hint=f"{kind}:////PATH"
            )
        file = (folder or Path()) / url.database
    label = f"{kind}://{url.host or ''}/{url.database or ''}"
    job = Job(source=source, url=url, label=label, file=file, until=time.monotonic() + source.timeout_s)
    if file is not None and not file.is_file():
        raise job.error("SOURCE-UNREACHABLE", "there is no such file", "check the path, and that the guard may read it")
    return job
