"""Where a hospital's table comes from: a small registry, so that a database is one more reader.

A reader takes a location and gives the table as it is, un-checked; client/records checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from cohortium.common.errors import TableError

Reader = Callable[[str], pd.DataFrame]
_READERS: dict[str, Reader] = {}


def register(ending: str, reader: Reader) -> None:
    """Readers are found by how a location ends (".csv") or begins ("postgresql://")."""
    if ending in _READERS:
        raise ValueError(f"two readers for {ending!r}")
    _READERS[ending] = reader


def read(location: str | Path) -> pd.DataFrame:
    """The table at a location, with rows numbered from 0. Raises TableError with the file and the fix."""
    from cohortium.client.sources import files  # noqa: F401  registers its readers

    text = str(location)
    for ending in sorted(_READERS, key=len, reverse=True):
        if text.lower().endswith(ending) or (ending.endswith("://") and text.startswith(ending)):
            return _READERS[ending](text)
    raise TableError(
        "TABLE-KIND",
        "the kind of table is not known by the end of its name",
        where=(text,),
        hint=f"known: {', '.join(sorted(_READERS))}",
    )
