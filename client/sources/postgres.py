"""PostgreSQL through SQLAlchemy and psycopg: a user who can only read, one snapshot, a cursor at the server.

Three fences against writing, each enough: the user has no right to (checked, else refused), the transaction is READ
ONLY, and a cursor takes nothing but a query.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import pandas as pd
import psycopg
import pyarrow as pa
from psycopg.adapt import Buffer, Loader
from psycopg.types.string import TextLoader
from sqlalchemy import create_engine, exc
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from cohortium.client.sources.files import frame_of
from cohortium.client.sources.sql import BATCH_ROWS, CONNECT_S, Job, Parts
from cohortium.common.errors import TableError

_OPTIONS = frozenset({"host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "channel_binding"})
_NOWHERE = "/nonexistent/cohortium"
_TLS = ("require", "verify-ca", "verify-full")
_TYPES: dict[int, pa.DataType] = {
    16: pa.bool_(),
    20: pa.int64(),
    21: pa.int16(),
    23: pa.int32(),
    26: pa.int64(),  # oid
    700: pa.float64(),
    701: pa.float64(),
    1700: pa.float64(),  # numeric, as the nearest float64
    18: pa.string(),
    19: pa.string(),
    25: pa.string(),
    705: pa.string(),
    1042: pa.string(),
    1043: pa.string(),
    2950: pa.string(),  # uuid
    1082: pa.date32(),
    1114: pa.timestamp("us"),
    1184: pa.timestamp("us", "UTC"),
}
_WRITABLE = """
SELECT n.nspname || '.' || c.relname
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
  AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
  AND (pg_catalog.has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
       OR pg_catalog.has_any_column_privilege(c.oid, 'INSERT, UPDATE')
       OR pg_catalog.pg_has_role(c.relowner, 'USAGE'))
ORDER BY 1 LIMIT 4"""
_STATE = """
SELECT r.rolsuper, pg_catalog.current_setting('transaction_read_only'),
       pg_catalog.current_setting('transaction_isolation'), r.rolname
FROM pg_catalog.pg_roles r WHERE r.rolname = current_user"""


class _Decimal(Loader):
    """numeric as the nearest float64; the driver's own loader quotes a number that is too large in its error."""

    def load(self, data: Buffer) -> float:
        return float(bytes(data))


def read(job: Job) -> Parts:
    """The statement's rows in pieces, typed by what the server says its columns are."""
    engine = create_engine(_address(job), poolclass=NullPool, use_native_hstore=False, connect_args=_arguments(job))
    statement = job.statement(engine.dialect.identifier_preparer.quote_identifier)
    connected = False
    try:
        connection = engine.connect().execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection, connection.begin():
            connected = True
            raw = connection.connection.dbapi_connection
            assert isinstance(raw, psycopg.Connection)
            raw.adapters.register_loader("numeric", _Decimal)
            raw.adapters.register_loader("uuid", TextLoader)
            limit = max(int(job.source.timeout_s * 1000), 1)
            raw.execute(f"SET LOCAL statement_timeout = {limit}")
            raw.execute("SET LOCAL TimeZone = 'UTC'")
            raw.execute("SET LOCAL DateStyle = 'ISO'")
            raw.execute("SET LOCAL cursor_tuple_fraction = 1")  # all rows will be read
            _check_reads_only(job, raw)
            with raw.cursor(name="cohortium") as cursor:
                cursor.execute(statement)
                description = cursor.description or []
                names = [column.name for column in description]
                types = _types(job, raw, [(column.name, column.type_code) for column in description])
                rows = cursor.fetchmany(BATCH_ROWS)
                yield _frame(job, names, types, rows)
                while len(rows) == BATCH_ROWS:
                    job.check_time()
                    rows = cursor.fetchmany(BATCH_ROWS)
                    if rows:
                        yield _frame(job, names, types, rows)
    except TableError:
        raise
    except Exception as error:  # the driver's errors are of many classes, and some quote a cell
        raise _explain(job, error, connected) from None
    finally:
        engine.dispose()


def _address(job: Job) -> URL:
    """The address for psycopg. A server elsewhere is asked for its certificate unless the address says how."""
    url = job.url
    unknown = sorted(set(url.query) - _OPTIONS)
    if unknown or any(not isinstance(value, str) for value in url.query.values()):
        raise job.error(
            "SOURCE-URL",
            f"the address has an option that is not allowed: {unknown[0] if unknown else 'one that is given twice'}",
            f"allowed: {', '.join(sorted(_OPTIONS))}",
        )
    if not url.username:
        raise job.error("SOURCE-URL", "the address names no user", "postgresql://USER@HOST/DATABASE")
    host = str(url.query.get("host", url.host or ""))
    mode = url.query.get("sslmode")
    if not _is_local(host):
        if mode is not None and mode not in _TLS:
            raise job.error(
                "SOURCE-TLS",
                "the password and the rows would cross the network in the clear",
                "sslmode=verify-full&sslrootcert=/PATH/ca.pem",
            )
        if mode is None:
            url = url.update_query_dict({"sslmode": "verify-full"})
            if "sslrootcert" not in url.query:
                url = url.update_query_dict({"sslrootcert": "system"})
    return url.set(drivername="postgresql+psycopg", password=job.source.password)


def _arguments(job: Job) -> dict[str, Any]:
    keep_alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
    # An own password file, which is not there: what lies on the machine for other programs may not log in here
    return keep_alive | {"connect_timeout": CONNECT_S, "passfile": _NOWHERE, "client_encoding": "utf8"}


def _is_local(host: str) -> bool:
    if not host or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_reads_only(job: Job, raw: psycopg.Connection[Any]) -> None:
    state = raw.execute(_STATE).fetchone()
    if state is None or state[1] != "on" or state[2] != "repeatable read":
        raise job.error(
            "SOURCE-WRITES", "the transaction is not a read-only snapshot", "connect without a pooler that changes it"
        )
    if state[0]:
        raise job.error(
            "SOURCE-WRITES",
            f"the user {state[3]!r} is a superuser",
            "CREATE ROLE cohortium LOGIN PASSWORD '…'; GRANT SELECT ON … TO cohortium;",
        )
    writable = [row[0] for row in raw.execute(_WRITABLE).fetchall()]
    if writable:
        first = writable[0]
        raise job.error(
            "SOURCE-WRITES",
            f"the user {state[3]!r} can change {', '.join(writable[:3])}{' and others' if len(writable) > 3 else ''}",
            f"REVOKE ALL ON {first} FROM {state[3]}, PUBLIC; GRANT SELECT ON {first} TO {state[3]}; "
            "or make a user that owns nothing",
        )


def _types(job: Job, raw: psycopg.Connection[Any], columns: list[tuple[str, int]]) -> list[pa.DataType]:
    """What each column becomes; enumerations and text-like types of extensions are texts, anything else is refused."""
    unknown = sorted({code for _, code in columns if code not in _TYPES})
    texts: set[int] = set()
    if unknown:
        found = raw.execute(
            "SELECT oid FROM pg_catalog.pg_type WHERE oid = ANY(%s) AND typcategory IN ('E', 'S') AND typtype <> 'c'",
            [unknown],
        )
        texts = {row[0] for row in found.fetchall()}
    for name, code in columns:
        if code not in _TYPES and code not in texts:
            shown = raw.execute("SELECT pg_catalog.format_type(%s, NULL)", [code]).fetchone()
            raise job.error(
                "SOURCE-TYPE",
                f"column {name!r} is of the type {shown[0] if shown else 'unknown'}",
                "leave it out, or make a number, text, boolean or date of it in the query",
            )
    return [_TYPES.get(code, pa.string()) for _, code in columns]


def _frame(job: Job, names: list[str], types: list[pa.DataType], rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    columns = zip(*rows) if rows else [()] * len(names)
    try:
        arrays = [pa.array(cells, type=kind) for cells, kind in zip(columns, types)]
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        raise job.error(
            "SOURCE-VALUE", "a value does not fit its column's type", "cast the column in the query"
        ) from None
    frame = frame_of(pa.Table.from_arrays(arrays, names=[str(place) for place in range(len(names))]), job.label)
    frame.columns = pd.Index(names)  # two columns of one name are refused later, and by name
    return frame


_STATES: dict[str, tuple[str, str, str]] = {
    "42501": (
        "SOURCE-PERMISSION",
        "the user may not read what the query names",
        "GRANT USAGE ON SCHEMA …; GRANT SELECT ON … TO the user",
    ),
    "0A000": ("SOURCE-QUERY", "the query does more than a cursor can read", "one SELECT that only reads"),
    "3D000": ("SOURCE-UNREACHABLE", "there is no such database", "check the address"),
    "53300": ("SOURCE-BUSY", "the server has no connection free", "try again"),
    "53200": ("SOURCE-MEMORY", "the server ran out of memory", "a simpler query, or a table made of it every night"),
    "55P03": ("SOURCE-BUSY", "another program holds the table", "try again when it is finished"),
    "40001": ("SOURCE-BUSY", "the server gave the snapshot up (a standby that replays changes)", "try again"),
    "57P03": ("SOURCE-UNREACHABLE", "the server is starting or stopping", "try again"),
}
_CLASSES: dict[str, tuple[str, str, str]] = {
    "08": ("SOURCE-LOST", "the connection to the database broke", "try again; is the network or the server down?"),
    "57": ("SOURCE-LOST", "the server ended the connection", "try again; was the server stopped?"),
    "28": ("SOURCE-LOGIN", "the server does not accept this user or password", "[data] password; pg_hba.conf"),
    "25": ("SOURCE-WRITES", "the query tries to write", "one SELECT that only reads"),
    "42": ("SOURCE-QUERY", "the database does not accept the query", "run it by hand as this user"),
    "22": (
        "SOURCE-VALUE",
        "a value cannot be computed or read",
        "a cast or an arithmetic of the query fails for some row, or a date is infinite or before year 1",
    ),
}


def _explain(job: Job, error: Exception, connected: bool) -> TableError:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    state = getattr(cause, "sqlstate", None) or ""
    if state == "57014":
        return job.timeout()
    known = _STATES.get(state) or _CLASSES.get(state[:2])
    if known is None and isinstance(cause, psycopg.DataError | ValueError | ArithmeticError):  # the driver's own
        known = _CLASSES["22"]
    if known is None and isinstance(cause, psycopg.OperationalError):
        known = _CLASSES["08"] if connected else _unreachable(str(cause).lower())
    code, sentence, hint = known or ("SOURCE-DATABASE", "the database failed", "run the query by hand")
    place = getattr(getattr(cause, "diag", None), "statement_position", None)
    where: tuple[str, ...] = ()
    if place is not None and code == "SOURCE-QUERY":
        where = (f"character {max(int(place) - len(_DECLARE), 1)} of the query",)
    return job.error(code, f"{sentence} (SQLSTATE {state})" if state else sentence, hint, *where)


_DECLARE = 'DECLARE "cohortium" CURSOR FOR '


def _unreachable(words: str) -> tuple[str, str, str]:
    """libpq tells its failures apart in words only; they are read here and never passed on."""
    if "password" in words or "authentication" in words or "pg_hba" in words or "role" in words:
        return _CLASSES["28"]
    if "ssl" in words or "certificate" in words:
        return (
            "SOURCE-TLS",
            "no encrypted connection to a server that proves who it is",
            "sslmode=verify-full&sslrootcert=/PATH/ca.pem",
        )
    if "database" in words and "does not exist" in words:
        return _STATES["3D000"]
    return "SOURCE-UNREACHABLE", "the database server cannot be reached", "check host, port and firewall"
