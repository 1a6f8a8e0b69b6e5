"""A site's table as its guard uses it: read, held against the dictionary, encoded. Its troubles are the site's own.

Used when the officer approves a plan and again by the guard: what would be refused later is seen before anything
leaves. Whatever is wrong is a TableError or POLICY-PATIENTS, which look alike from outside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cohortium.client.policy import Policy
from cohortium.client.records import records
from cohortium.client.references import resolve
from cohortium.client.sources.base import Batches, Source, read, read_source
from cohortium.common.encoding import Records
from cohortium.common.errors import CohortiumError, Refused, TableError
from cohortium.common.schema import Schema

ROW_NAMES = "rows.npy"


def load_records(
    directory: Path, policy: Policy, *, schema: Schema, unit: str, exclude: tuple[str, ...] = ()
) -> Records:
    """The site's records, checked. Raises TableError, or Refused POLICY-PATIENTS where there are too few patients."""
    try:
        table = load_table(directory, policy)
        names = directory / ROW_NAMES
        # A simulated site: rows keep the names they have in the whole table.
        if isinstance(table, pd.DataFrame) and names.exists():
            table.index = np.load(names, allow_pickle=False)
        found = records(schema, table, unit=unit, where=policy.table, exclude=exclude, one_row=policy.one_row)
    except CohortiumError:
        raise
    except Exception as error:  # a reader's own errors too: from outside they must look like any other
        raise TableError(
            "TABLE-UNREADABLE", f"the table cannot be read ({type(error).__name__})", where=(policy.table,)
        ) from None
    if found.patients < policy.minimum_patients:
        raise Refused(
            "POLICY-PATIENTS",
            "fewer patients than the policy's minimum_patients",
            hint="[policy] minimum_patients",
        )
    return found


def load_table(directory: Path, policy: Policy) -> pd.DataFrame | Batches:
    """The table as it is, un-checked: a file or folder, or what the query of a database gives, in pieces."""
    if not policy.database:
        return read(directory / policy.table)
    query = policy.query
    if policy.query_file is not None:
        try:
            query = (directory / policy.query_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise TableError(
                "TABLE-QUERY", "the query's file cannot be read", where=(policy.query_file,), hint="[data] query_file"
            ) from None
    try:
        password = None if policy.password is None else resolve(policy.password, relative_to=directory)
    except CohortiumError as error:  # from outside this too is one more table that cannot be read
        raise TableError("TABLE-SECRET", error.sentence, where=error.where, hint=error.hint) from None
    return read_source(Source(url=policy.table, query=query, password=password), folder=directory)
