"""A site's table as its guard uses it: read, held against the dictionary, encoded. Its troubles are the site's own.

Used when the officer approves a plan and again by the guard: what would be refused later is seen before anything
leaves. Whatever is wrong is a TableError or POLICY-PATIENTS, which look alike from outside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cohortium.client.policy import Policy
from cohortium.client.records import records
from cohortium.client.sources.base import read
from cohortium.common.encoding import Records
from cohortium.common.errors import CohortiumError, Refused, TableError
from cohortium.common.schema import Schema

ROW_NAMES = "rows.npy"


def load_records(
    directory: Path, policy: Policy, *, schema: Schema, unit: str, exclude: tuple[str, ...] = ()
) -> Records:
    """The site's records, checked. Raises TableError, or Refused POLICY-PATIENTS where there are too few patients."""
    try:
        table = read(directory / policy.table)
        names = directory / ROW_NAMES
        if names.exists():  # a simulated site: rows keep the names they have in the whole table
            table.index = np.load(names, allow_pickle=False)
        found = records(schema, table, unit=unit, where=policy.table, exclude=exclude)
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
