"""Where a hospital's table comes from: files and folders by their ending, databases by a Source.

A reader gives the table as it is, un-checked; client/records checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cohortium.common.errors import TableError

Reader = Callable[[str], pd.DataFrame]
_READERS: dict[str, Reader] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A hospital's database and what to read from it: one query, or one table with all its columns.

    url: "postgresql://user@host/database", "sqlite:////absolute/path" or "duckdb:////absolute/path"; it never holds a
    password. table: "name" or "schema.name". password: the secret itself, already looked up where its reference says.
    timeout_s: the longest that reading everything may take. Raises TableError.
    """

    url: str
    query: str | None = None
    table: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if (self.query is None) == (self.table is None):
            raise TableError(
                "SOURCE-QUERY",
                "a database needs a query or a table, not both",
                where=("[data]",),
                hint='query_file = "patients.sql"',
            )
        if not self.timeout_s > 0:
            raise TableError("SOURCE-TIMEOUT", "a timeout is above 0 s", where=("[data]",), hint="timeout_s = 3600")


class Batches:
    """A database's answer in pieces, so that it never lies in memory as a whole. Can be read once.

    Rows have no order in a database, so these have no numbers that could name a patient: `numbered` is False.
    """

    numbered = False

    def __init__(self, parts: Iterable[pd.DataFrame], columns: Iterable[str]) -> None:
        self._parts = iter(parts)
        self.columns = tuple(columns)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return self._parts

    def close(self) -> None:
        """End the transaction and the connection; also where the rows are not read to the end."""
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()

    def whole(self) -> pd.DataFrame:
        """Everything in one table, for small ones."""
        with closing(self):
            return pd.concat(list(self), ignore_index=True)


def register(ending: str, reader: Reader) -> None:
    """Readers are found by how a location ends (".csv"), begins ("ward://"), or "/" for a folder."""
    if ending in _READERS:
        raise ValueError(f"two readers for {ending!r}")
    _READERS[ending] = reader


def read(location: str | Path) -> pd.DataFrame:
    """The table in a file or in a folder of files, with rows numbered from 0. Raises TableError with the fix."""
    from cohortium.client.sources import files, folders  # noqa: F401  register their readers

    text = str(location)
    if Path(text).is_dir():
        return _READERS["/"](text)
    for ending in sorted(_READERS, key=len, reverse=True):
        if text.lower().endswith(ending) or (ending.endswith("://") and text.startswith(ending)):
            return _READERS[ending](text)
    raise TableError(
        "TABLE-KIND",
        "the kind of table is not known by the end of its name",
        where=(text,),
        hint=f"known: {', '.join(sorted(ending for ending in _READERS if ending != '/'))} and folders of them",
    )


def read_source(source: Source, *, folder: Path | None = None) -> Batches:
    """A database's answer to a query; connected, checked to be read-only and begun when this returns.

    folder: where a relative path of a SQLite or DuckDB file starts. Raises TableError SOURCE-...: never with the
    database's own words, because they may quote a record.
    """
    from cohortium.client.sources.sql import open_source

    return open_source(source, folder=folder)


def check_names(location: str, names: list[str]) -> None:
    """Every column has a name of its own. Raises TableError TABLE-HEADER."""
    seen: set[str] = set()
    for place, name in enumerate(names, start=1):
        if not name.strip():
            raise TableError("TABLE-HEADER", f"column {place} has no name", where=(location,), hint="name every column")
        if name in seen:
            raise TableError("TABLE-HEADER", f"two columns are called {name!r}", where=(location,), hint="rename one")
        seen.add(name)
