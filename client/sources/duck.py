"""DuckDB, by its own interface: read-only, without other files, network or extensions, as Arrow batches.

Its own and not SQLAlchemy's, which needs one package more for it and would make Python objects of every cell.
"""

from __future__ import annotations

import threading
import time

import duckdb
import pandas as pd
import pyarrow as pa
from sqlalchemy.dialects.postgresql.base import PGIdentifierPreparer
from sqlalchemy.engine.default import DefaultDialect

from cohortium.client.sources.files import frame_of
from cohortium.client.sources.sql import BATCH_ROWS, Job, Parts
from cohortium.common.errors import TableError

_CONFIG = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
    "memory_limit": "512MB",
    "threads": "2",
}

_VALUES = (
    duckdb.ConversionException,
    duckdb.OutOfRangeException,
    duckdb.InvalidInputException,
    OSError,  # the same, where it happens while rows are streamed
)


def read(job: Job) -> Parts:
    """The statement's rows in pieces of Arrow; DuckDB reads one state."""
    statement = job.statement(PGIdentifierPreparer(DefaultDialect()).quote_identifier)
    try:
        connection = duckdb.connect(str(job.file), read_only=True, config=_CONFIG)
    except duckdb.Error as error:
        raise _explain(job, error, opening=True) from None
    # DuckDB has no timeout of its own
    alarm = threading.Timer(max(job.until - time.monotonic(), 0.01), connection.interrupt)
    alarm.daemon = True
    try:
        alarm.start()
        found = connection.extract_statements(statement)
        if len(found) != 1 or found[0].type != duckdb.StatementType.SELECT:
            raise job.error("SOURCE-QUERY", "the query is not one SELECT statement", "one SELECT statement")
        reader = connection.sql(statement).to_arrow_reader(BATCH_ROWS)
        try:
            _refuse_types(job, reader.schema)
            names, rows = reader.schema.names, 0
            for batch in reader:
                if len(batch):
                    rows += len(batch)
                    yield _frame(batch, names, job)
                    job.check_time()
            if not rows:
                yield pd.DataFrame({}, columns=names)
        finally:
            reader.close()
    except TableError:
        raise
    except Exception as error:  # its words may quote a cell
        raise _explain(job, error) from None
    finally:
        alarm.cancel()
        connection.close()


def _frame(batch: pa.RecordBatch, names: list[str], job: Job) -> pd.DataFrame:
    unique = batch.rename_columns([str(place) for place in range(len(names))])
    frame = frame_of(unique, job.label)
    frame.columns = pd.Index(names)  # two columns of one name are refused later, and by name
    return frame


def _refuse_types(job: Job, schema: pa.Schema) -> None:
    t = pa.types
    for column in schema:
        kind = column.type.value_type if t.is_dictionary(column.type) else column.type
        if (
            t.is_nested(kind)
            or t.is_binary(kind)
            or t.is_large_binary(kind)
            or t.is_time(kind)
            or t.is_duration(kind)
            or t.is_interval(kind)
            or isinstance(kind, pa.BaseExtensionType)
        ):
            raise job.error(
                "SOURCE-TYPE",
                f"column {column.name!r} is of the type {'list or struct' if t.is_nested(kind) else kind}",
                "leave it out, or make a number, text, boolean or date of it in the query",
            )


def _explain(job: Job, error: Exception, *, opening: bool = False) -> TableError:
    if isinstance(error, duckdb.InterruptException) or (not opening and time.monotonic() > job.until):
        return job.timeout()
    name = type(error).__name__
    if opening:
        if "lock" in str(error).lower():
            return job.error(
                "SOURCE-BUSY", "another program has the file open for writing", "close it, or copy the file"
            )
        if "permission" in str(error).lower():
            return job.error("SOURCE-PERMISSION", "the file may not be opened", "may the guard's user read it?")
        return job.error(
            "SOURCE-DATABASE", f"the file cannot be opened as a DuckDB database ({name})", "check the path"
        )
    if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return job.error("SOURCE-QUERY", f"the database does not accept the query ({name})", "run it by hand")
    if isinstance(error, duckdb.PermissionException):
        return job.error(
            "SOURCE-WRITES", "the query reaches for something outside the file", "tables of this file only"
        )
    if isinstance(error, _VALUES):
        return job.error(
            "SOURCE-VALUE",
            f"a value cannot be computed in the query ({name})",
            "a cast or an arithmetic of the query fails for some row: TRY_CAST, NULLIF",
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return job.error("SOURCE-MEMORY", "the query needs too much memory", "a simpler query, or a table made of it")
    return job.error("SOURCE-DATABASE", f"the database failed ({name})", "run the query by hand")
