"""SQLite, opened read-only and held to reading by an authorizer: it could otherwise attach other files."""

from __future__ import annotations

import sqlite3
import time
import urllib.parse
from typing import Any

import pandas as pd
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cohortium.client.sources.sql import BATCH_ROWS, CONNECT_S, Job, Parts
from cohortium.common.errors import TableError

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}


def read(job: Job) -> Parts:
    """The statement's rows in pieces; cells are what SQLite stores: numbers, texts, bytes, nothing."""
    assert job.file is not None
    address = "file:" + urllib.parse.quote(str(job.file.absolute())) + "?mode=ro"
    engine = create_engine(
        "sqlite://",
        poolclass=NullPool,
        creator=lambda: sqlite3.connect(address, uri=True, timeout=CONNECT_S, check_same_thread=False),
    )
    statement = job.statement(engine.dialect.identifier_preparer.quote_identifier)
    cells = 0
    try:
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.execute("PRAGMA query_only = ON")
            raw.execute("BEGIN")  # one state, also for a statement that reads twice
            raw.execute("SELECT count(*) FROM sqlite_master").fetchone()  # is it a database at all?
            raw.set_authorizer(_authorize)
            raw.set_progress_handler(lambda: int(time.monotonic() > job.until), 10_000)
            try:
                cursor = raw.execute(statement)
                names = [column[0] for column in cursor.description]
                while rows := cursor.fetchmany(BATCH_ROWS):
                    cells += len(rows)
                    yield _frame(names, rows)
                    job.check_time()
                if not cells:
                    yield _frame(names, [])
            finally:
                raw.set_progress_handler(None, 0)
                raw.set_authorizer(None)
    except TableError:
        raise
    except Exception as error:  # its words may quote a cell
        raise _explain(job, error) from None
    finally:
        engine.dispose()


def _frame(names: list[str], rows: list[tuple[object, ...]]) -> pd.DataFrame:
    columns = zip(*rows) if rows else [()] * len(names)
    series = [pd.Series(cells, dtype=object) for cells in columns]
    frame = pd.concat(series, axis=1) if series else pd.DataFrame()
    frame.columns = pd.Index(names)  # two columns of one name are refused later, and by name
    return frame


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_DENY if second == "load_extension" else sqlite3.SQLITE_OK
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _explain(job: Job, error: Exception) -> TableError:
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    primary = "_".join(name.split("_")[:2])
    if primary == "SQLITE_INTERRUPT":
        return job.timeout()
    if "not authorized" in str(error):
        primary = "SQLITE_AUTH"
    code, sentence, hint = {
        "SQLITE_AUTH": ("SOURCE-WRITES", "the query does more than read", "one SELECT on this file alone"),
        "SQLITE_READONLY": ("SOURCE-WRITES", "the query or the file needs writing", "one SELECT; a file at rest"),
        "SQLITE_BUSY": ("SOURCE-BUSY", "another program holds the file", "try again when it is finished"),
        "SQLITE_LOCKED": ("SOURCE-BUSY", "another program holds the file", "try again when it is finished"),
        "SQLITE_CANTOPEN": ("SOURCE-PERMISSION", "the file may not be opened", "may the guard's user read it?"),
        "SQLITE_PERM": ("SOURCE-PERMISSION", "the file may not be opened", "may the guard's user read it?"),
        "SQLITE_NOTADB": ("SOURCE-DATABASE", "the file is not an SQLite database", "check the path"),
        "SQLITE_CORRUPT": ("SOURCE-DATABASE", "the file is damaged", "restore it from a copy"),
        "SQLITE_ERROR": ("SOURCE-QUERY", "the database does not accept the query", "run it by hand: sqlite3 -readonly"),
        "ProgrammingError": ("SOURCE-QUERY", "the query is not one statement", "one SELECT statement"),
        # The module's own error for bytes that are no text; it quotes them.
        "OperationalError": ("SOURCE-VALUE", "a text is not in UTF-8", "correct the cell, or leave the column out"),
    }.get(primary, ("SOURCE-DATABASE", f"the database failed ({primary})", "run the query by hand"))
    return job.error(code, sentence, hint)
