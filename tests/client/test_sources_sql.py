"""Hospitals' databases: real servers and files, read by a user who can only read; every trouble a clear local error.

Each guarantee names the bug that turns it red where it is not plain.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from cohortium.client.policy import Policy
from cohortium.client.records import records, table_digest
from cohortium.client.sources import sql
from cohortium.client.sources.base import Batches, Source, read, read_source
from cohortium.common.encoding import Records, grids
from cohortium.common.errors import TableError
from cohortium.common.schema import Column, Schema

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "simulations" / "data"
sys.path.insert(0, str(ROOT / "tests"))

from postgres import PASSWORD, READER, Server, server  # noqa: E402

HEART_TYPES = {"Int64": "bigint", "Int32": "integer", "Int8": "smallint", "boolean": "boolean", "float64": "float8"}


@pytest.fixture(scope="module")
def pg() -> Iterator[Server]:
    with server() as made:
        yield made


@pytest.fixture
def clean(pg: Server) -> Server:
    """The server with nothing in it but the reader."""
    pg.run(
        "DROP SCHEMA public CASCADE",
        "CREATE SCHEMA public",
        f"GRANT USAGE ON SCHEMA public TO {READER}",
        f"ALTER ROLE {READER} RESET ALL",
    )
    return pg


def ask(made: Server, query: str, **options: Any) -> Batches:
    return read_source(Source(url=made.url, query=query, **({"password": PASSWORD} | options)))


def refused(code: str, act: Callable[[], object]) -> TableError:
    with pytest.raises(TableError) as caught:
        act()
    error = caught.value
    assert error.code == code and error.hint and error.where, error.lines()
    # The words of the database stay in neither the error nor what Python keeps of its cause
    assert "SECRET" not in "".join(error.lines()) and PASSWORD not in "".join(error.lines())
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    return error


def same(a: Records, b: Records) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Records))


# ---- what a source is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("SOURCE-QUERY", {"url": "sqlite:////x.db"}),
        ("SOURCE-QUERY", {"url": "sqlite:////x.db", "query": "SELECT 1", "table": "t"}),
        ("SOURCE-TIMEOUT", {"url": "sqlite:////x.db", "query": "SELECT 1", "timeout_s": 0}),
        ("SOURCE-URL", {"url": "mysql://a@b/c", "query": "SELECT 1"}),
        ("SOURCE-URL", {"url": "no address", "query": "SELECT 1"}),
        ("SOURCE-URL", {"url": "sqlite://", "query": "SELECT 1"}),
        ("SOURCE-URL", {"url": "sqlite:///:memory:", "query": "SELECT 1"}),
        ("SOURCE-URL", {"url": "duckdb:////x.db?access_mode=read_write", "query": "SELECT 1"}),
        (
            "SOURCE-URL",
            {"url": "postgresql://a@127.0.0.1/c?options=-cdefault_transaction_read_only=off", "query": "SELECT 1"},
        ),
        ("SOURCE-URL", {"url": "postgresql://127.0.0.1/c", "query": "SELECT 1"}),
        ("SOURCE-PASSWORD", {"url": "postgresql://a:SECRET@127.0.0.1/c", "query": "SELECT 1"}),
        ("SOURCE-TLS", {"url": "postgresql://a@db.hospital.example/c?sslmode=disable", "query": "SELECT 1"}),
        ("SOURCE-TLS", {"url": "postgresql://a@db.hospital.example/c?sslmode=prefer", "query": "SELECT 1"}),
        ("SOURCE-TLS", {"url": "postgresql://a@/c?host=db.hospital.example&sslmode=allow", "query": "SELECT 1"}),
        ("SOURCE-UNREACHABLE", {"url": "sqlite:////nowhere/x.db", "query": "SELECT 1"}),
        ("SOURCE-UNREACHABLE", {"url": "duckdb:////nowhere/x.db", "query": "SELECT 1"}),
    ],
)
def test_a_source_that_cannot_be_used(code: str, options: dict[str, Any]) -> None:
    refused(code, lambda: read_source(Source(**options)))


def test_a_password_is_never_printed() -> None:
    assert "SECRET" not in repr(Source(url="postgresql://a@b/c", query="SELECT 1", password="SECRET"))


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO t VALUES (1)",
        "DELETE FROM t",
        "/* SELECT */ DROP TABLE t",
        "-- SELECT\nUPDATE t SET a = 1",
        "ATTACH 'other.db' AS o",
        "PRAGMA query_only = OFF",
        "COPY t TO '/x'",
        "SET transaction_read_only = off",
        "selection",
        "",
    ],
)
def test_what_does_not_begin_as_a_question_is_not_sent(query: str, tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "x.db").close()
    refused("SOURCE-QUERY", lambda: read_source(Source(url=f"sqlite:///{tmp_path / 'x.db'}", query=query)))


# ---- PostgreSQL: the demo's table ---------------------------------------------------------------------------


def heart(made: Server) -> tuple[Schema, pd.DataFrame]:
    table = read(DATA / "heart.parquet")
    types = {name: HEART_TYPES.get(str(kind), "text") for name, kind in table.dtypes.items()}
    made.fill("heart", table, types)
    return Schema.load(DATA / "heart.schema.json"), table


def test_the_demo_table_from_a_server_gives_the_records_of_the_file(clean: Server) -> None:
    schema, table = heart(clean)
    for hospital in [None, *table["hospital"].unique()]:
        where = "" if hospital is None else f" WHERE hospital = '{hospital}'"
        chosen = table if hospital is None else table[table["hospital"] == hospital]
        wanted = records(schema, chosen, unit="patient", one_row=True)
        for order in ("", " ORDER BY age DESC, patient", " ORDER BY random()"):
            found = records(schema, ask(clean, f"SELECT * FROM heart{where}{order}"), unit="patient", one_row=True)
            assert same(found, wanted)
    assert same(
        records(schema, read_source(Source(url=clean.url, table="public.heart", password=PASSWORD)), unit="patient"),
        records(schema, table, unit="patient"),
    )


@pytest.mark.slow
def test_a_run_over_a_server_gives_the_files_of_a_run_over_parquet(
    clean: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same seed, same hospitals, same plan: the synthetic table is the same byte for byte."""
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import ROW_NAMES, Request, prepare, run

    heart(clean)
    monkeypatch.setenv("HEART_PASSWORD", PASSWORD)
    demo = (ROOT / "simulations" / "scenarios" / "demo.toml").read_text(encoding="utf-8")
    for old, new in (("../data/", f"{DATA}/"), ('name = "joined"', 'name = "mixture"')):
        assert old in demo
        demo = demo.replace(old, new)
    (tmp_path / "study.toml").write_text(demo, encoding="utf-8")
    rows = {}
    for kind in ("file", "server"):
        out = tmp_path / kind
        table = DATA / "heart.parquet"
        plan = prepare(Request(study=tmp_path / "study.toml", table=table, split="by:hospital", out=out, seed=5))
        if kind == "server":
            for name in plan.sites:
                site = out / "sites" / name
                ids = ", ".join(str(i) for i in read(site / "data.parquet")["patient"])
                query = f"SELECT * FROM heart WHERE patient IN ({ids}) ORDER BY random()"
                policy = Policy.load(site / "site.toml")
                policy = dataclasses.replace(policy, table=clean.url, query=query, password="env:HEART_PASSWORD")
                policy.save(site / "site.toml")
                (site / ROW_NAMES).unlink()
                (site / "data.parquet").unlink()
        run(out)
        finish(out, score=False)
        rows[kind] = (out / "synthetic.csv").read_bytes()
    assert rows["file"] == rows["server"] and len(rows["file"]) > 10_000


# ---- PostgreSQL: who may read, and how ----------------------------------------------------------------------


def test_a_user_who_can_write_is_refused_with_the_fix(clean: Server) -> None:
    """Red if the check looks at the queried table only: another table of the database counts too."""
    clean.run("CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)", "CREATE TABLE other (a int, b int)")
    clean.run(f"GRANT SELECT ON t, other TO {READER}")
    assert len(ask(clean, "SELECT a FROM t").whole()) == 1
    for right in ("INSERT", "UPDATE", "DELETE", "TRUNCATE", "UPDATE (b)", "INSERT (b)"):
        for whom in (READER, "PUBLIC"):
            clean.run(f"GRANT {right} ON other TO {whom}")
            error = refused("SOURCE-WRITES", lambda: ask(clean, "SELECT a FROM t"))
            assert "public.other" in error.sentence and "REVOKE ALL ON public.other" in error.hint
            for statement in re.findall(r"(?:REVOKE|GRANT)[^;]*", error.hint):
                clean.run(statement)  # the fix is one that works
            assert len(ask(clean, "SELECT a FROM t").whole()) == 1
    clean.run(f"ALTER TABLE other OWNER TO {READER}")
    refused("SOURCE-WRITES", lambda: ask(clean, "SELECT a FROM t"))
    clean.run(
        "ALTER TABLE other OWNER TO admin",
        f"GRANT owner_of_tables TO {READER}",
        "ALTER TABLE other OWNER TO owner_of_tables",
    )
    refused("SOURCE-WRITES", lambda: ask(clean, "SELECT a FROM t"))
    clean.run(f"REVOKE owner_of_tables FROM {READER}", f"GRANT pg_write_all_data TO {READER}")
    refused("SOURCE-WRITES", lambda: ask(clean, "SELECT a FROM t"))
    clean.run(f"REVOKE pg_write_all_data FROM {READER}", f"ALTER ROLE {READER} SUPERUSER")
    assert "superuser" in refused("SOURCE-WRITES", lambda: ask(clean, "SELECT a FROM t")).sentence
    clean.run(f"ALTER ROLE {READER} NOSUPERUSER")
    assert len(ask(clean, "SELECT a FROM t").whole()) == 1


def test_nothing_is_written_whatever_the_query_and_the_role_say(clean: Server) -> None:
    """Red without READ ONLY: the function would write as its owner, past what the reader may do."""
    clean.run("CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)", "CREATE SEQUENCE s")
    clean.run(
        "CREATE FUNCTION sly() RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS "
        "$$ BEGIN INSERT INTO t VALUES (2); RETURN 1; END $$",
        f"GRANT SELECT ON t TO {READER}",
        f"GRANT ALL ON SEQUENCE s TO {READER}",
        f"ALTER ROLE {READER} SET default_transaction_read_only = off",
    )
    for query in (
        "SELECT sly() AS a",
        "SELECT nextval('s') AS a",
        "SELECT set_config('transaction_read_only', 'off', true) AS a",
        "SELECT a FROM t FOR UPDATE",
    ):
        assert ask_code(clean, query) in ("SOURCE-WRITES", "SOURCE-PERMISSION")
    for query in (
        "WITH d AS (INSERT INTO t VALUES (3) RETURNING a) SELECT a FROM d",
        "SELECT 1 AS a; INSERT INTO t VALUES (4)",
        "SELECT 1 AS a; COMMIT; DROP TABLE t",
        "SELECT a INTO u FROM t",
    ):
        assert ask_code(clean, query) == "SOURCE-QUERY"
    with clean.admin() as admin:
        assert admin.execute("SELECT array_agg(a) FROM t").fetchone() == ([1],)
        assert admin.execute("SELECT is_called FROM s").fetchone() == (False,)


def ask_code(made: Server, query: str) -> str:
    with pytest.raises(TableError) as caught:
        list(ask(made, query))
    return caught.value.code


def test_a_run_sees_one_state_while_the_table_changes(clean: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red with READ COMMITTED and two statements; the cursor's snapshot outlives rows that are deleted meanwhile."""
    monkeypatch.setattr("cohortium.client.sources.postgres.BATCH_ROWS", 100)
    clean.run(
        "CREATE TABLE t (a int)", "INSERT INTO t SELECT generate_series(1, 1000)", f"GRANT SELECT ON t TO {READER}"
    )
    batches = ask(clean, "SELECT a FROM t")
    clean.run("DELETE FROM t WHERE a > 150", "INSERT INTO t VALUES (9999)")
    assert sorted(batches.whole()["a"]) == list(range(1, 1001))
    assert len(ask(clean, "SELECT a FROM t").whole()) == 151


# ---- PostgreSQL: every trouble ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "query"),
    [
        ("SOURCE-QUERY", "SELECT FROM WHERE"),
        ("SOURCE-QUERY", "SELECT nothing FROM t"),
        ("SOURCE-QUERY", "SELECT a FROM nowhere"),
        ("SOURCE-QUERY", "SELECT nofunction(a) FROM t"),
        ("SOURCE-PERMISSION", "SELECT a FROM hidden"),
        ("SOURCE-VALUE", "SELECT note::int AS a FROM t"),
        ("SOURCE-VALUE", "SELECT 1 / (a - a) AS a FROM t"),
        ("SOURCE-VALUE", "SELECT 'infinity'::date AS a FROM t"),
        ("SOURCE-VALUE", "SELECT '0044-03-15 BC'::timestamptz AS a FROM t"),
        ("SOURCE-TYPE", "SELECT ARRAY[note] AS a FROM t"),
        ("SOURCE-TYPE", "SELECT '1 day'::interval AS a FROM t"),
        ("SOURCE-TYPE", "SELECT to_json(note) AS a FROM t"),
        ("SOURCE-TYPE", "SELECT note::bytea AS a FROM t"),
        ("SOURCE-TYPE", "SELECT t AS a FROM t"),
        ("SOURCE-TYPE", "SELECT '10:00'::time AS a FROM t"),
        ("TABLE-HEADER", "SELECT a, note AS a FROM t"),
        ("TABLE-HEADER", 'SELECT a, note AS " " FROM t'),
        ("TABLE-EMPTY", "SELECT a FROM t WHERE a > 5"),
    ],
)
def test_a_query_that_cannot_be_used(clean: Server, code: str, query: str) -> None:
    clean.run("CREATE TABLE t (a int, note text)", "INSERT INTO t VALUES (1, 'SECRET')", "CREATE TABLE hidden (a int)")
    clean.run(f"GRANT SELECT ON t TO {READER}")
    refused(code, lambda: list(ask(clean, query)))


def test_a_wrong_password_database_or_port(clean: Server) -> None:
    refused("SOURCE-LOGIN", lambda: ask(clean, "SELECT 1 AS a", password="SECRET"))
    refused("SOURCE-LOGIN", lambda: ask(clean, "SELECT 1 AS a", password=None))
    for url, code in (
        (clean.url.replace("/clinic", "/ward"), "SOURCE-UNREACHABLE"),
        (clean.url.replace(str(clean.port), "1"), "SOURCE-UNREACHABLE"),
        (clean.url + "?sslmode=require", "SOURCE-TLS"),
        (clean.url.replace(READER, "nobody"), "SOURCE-LOGIN"),
    ):
        refused(code, lambda url=url: read_source(Source(url=url, query="SELECT 1 AS a", password=PASSWORD)))


def test_a_password_of_the_machine_is_not_used(clean: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Red without an own `passfile`: the machine's files could log in. Its options are set anew."""
    kept = tmp_path / "pgpass"
    kept.write_text(f"*:*:*:*:{PASSWORD}\n")
    kept.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(kept))
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_read_only=off -c statement_timeout=60000")
    refused("SOURCE-LOGIN", lambda: ask(clean, "SELECT 1 AS a", password=None))
    assert ask(clean, "SELECT current_setting('statement_timeout') AS a").whole()["a"].tolist() == ["1h"]


def test_a_query_that_takes_too_long(clean: Server) -> None:
    began = time.monotonic()
    refused("SOURCE-TIMEOUT", lambda: ask(clean, "SELECT a::text FROM (SELECT pg_sleep(30) AS a) x", timeout_s=0.5))
    slow = "SELECT i AS a, pg_sleep(0.0002)::text AS b FROM generate_series(1, 10000000) AS i"
    refused("SOURCE-TIMEOUT", lambda: list(ask(clean, slow, timeout_s=1.0)))
    assert time.monotonic() - began < 15


def test_a_connection_that_breaks_while_rows_come(clean: Server) -> None:
    batches = ask(clean, "SELECT i AS a, repeat('x', 200) AS b FROM generate_series(1, 1000000) AS i")
    next(iter(batches))
    clean.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{READER}'")
    refused("SOURCE-LOST", lambda: list(batches))


def test_an_error_ends_the_connection(clean: Server) -> None:
    """Red if a refused table leaves its transaction open: the server would keep its snapshot for hours."""
    clean.run("CREATE TABLE t (pid int, age text)", "INSERT INTO t SELECT 1, 'SECRET' FROM generate_series(1, 60000)")
    clean.run(f"GRANT SELECT ON t TO {READER}")
    refused("TABLE-VALUE", lambda: records(PEOPLE, ask(clean, "SELECT pid, age FROM t"), unit="pid"))
    ask(clean, "SELECT pid FROM t").close()
    until = time.monotonic() + 5
    with clean.admin() as admin:
        while time.monotonic() < until:
            row = admin.execute(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{READER}'").fetchone()
            if row == (0,):
                return
            time.sleep(0.05)
    pytest.fail("a connection is left open")


# ---- types, and what the dictionary says of them ------------------------------------------------------------

PEOPLE = Schema(
    name="people",
    columns=(
        Column(name="pid", kind="integer", role="identifier"),
        Column(name="age", kind="integer", minimum=0.0, maximum=110.0),
    ),
)
KINDS = Schema(
    name="kinds",
    columns=(
        Column(name="pid", kind="string", role="identifier"),
        Column(name="whole", kind="integer", minimum=0.0, maximum=100.0),
        Column(name="part", kind="number", minimum=0.0, maximum=10.0),
        Column(name="level", kind="string", levels=("F", "M")),
        Column(name="flag", kind="boolean"),
        Column(name="day", kind="date", minimum=0.0, maximum=20000.0),
        Column(name="moment", kind="datetime", minimum=0.0, maximum=2e9),
    ),
)
CELLS = [
    ("a", 7, 2.5, "F", True, "2001-02-03", "2001-02-03 04:05:06"),
    ("b", None, None, None, None, None, None),
    ("c", 99, 9.75, "M", False, "1999-12-31", "1999-12-31 23:59:59"),
]
SQL_KINDS = [
    "text, smallint, numeric(6,3), sex, boolean, date, timestamptz",
    "uuidlike, bigint, real, char(3), boolean, date, timestamp",
    "varchar(9), numeric, double precision, varchar(4), integer, timestamp, timestamptz",
]


def rows_of(text: str) -> str:
    return (
        ", ".join("(" + ", ".join("NULL" if v is None else repr(v) for v in row) + ")" for row in CELLS)
        .replace("True", "'1'" if "integer, timestamp" in text else "true")
        .replace("False", "'0'" if "integer, timestamp" in text else "false")
    )


def from_file() -> Records:
    frame = pd.DataFrame(CELLS, columns=["pid", "whole", "part", "level", "flag", "day", "moment"])
    return records(KINDS, frame.astype(object), unit="pid")


@pytest.mark.parametrize("kinds", SQL_KINDS)
def test_every_kind_of_column_becomes_what_a_file_says(clean: Server, kinds: str) -> None:
    """Also where the server's clock lives elsewhere: a moment is one moment. Red if TimeZone is the server's."""
    clean.run("CREATE TYPE sex AS ENUM ('F', 'M')", "CREATE DOMAIN uuidlike AS text CHECK (value <> '')")
    columns = ", ".join(f"{c.name} {kind.strip()}" for c, kind in zip(KINDS.columns, re.split(r",(?!\d)", kinds)))
    clean.run("SET TimeZone = 'UTC'", f"CREATE TABLE t ({columns})")
    with clean.admin() as admin:
        admin.execute("SET TimeZone = 'UTC'")
        admin.execute(f"INSERT INTO t VALUES {rows_of(kinds)}")
    clean.run(f"GRANT SELECT ON t TO {READER}", f"ALTER ROLE {READER} SET TimeZone = 'Asia/Tokyo'")
    clean.run(f"ALTER ROLE {READER} SET DateStyle = 'German'", f"ALTER ROLE {READER} SET extra_float_digits = 0")
    assert same(records(KINDS, ask(clean, "SELECT * FROM t ORDER BY pid DESC"), unit="pid"), from_file())
    day = ask(clean, "SELECT ('2000-01-01 20:00Z'::timestamptz)::date AS a").whole()["a"][0]
    assert day == pd.Timestamp(2000, 1, 1)


def test_numbers_beyond_float64_and_none_at_all(clean: Server) -> None:
    found = ask(
        clean, "SELECT 'NaN'::numeric AS a, 1e400::numeric AS b, '-Infinity'::float8 AS c, 0.1::numeric AS d"
    ).whole()
    assert np.isnan(found["a"][0]) and found["b"][0] == np.inf and found["c"][0] == -np.inf and found["d"][0] == 0.1


@pytest.mark.parametrize(
    ("code", "query"),
    [
        ("TABLE-PATIENT", "SELECT NULL::int AS pid, 1 AS age"),
        ("TABLE-PATIENT", "SELECT 1.5 AS pid, 1 AS age"),
        ("TABLE-VALUE", "SELECT 1 AS pid, 'SECRET' AS age"),
        ("TABLE-VALUE", "SELECT 1 AS pid, 1.5 AS age"),
        ("TABLE-VALUE", "SELECT 1 AS pid, now() AS age"),
        ("TABLE-VALUE", "SELECT 1 AS pid, true AS age"),
        ("TABLE-COLUMN", "SELECT 1 AS pid"),
        ("TABLE-EXTRA", "SELECT 1 AS pid, 1 AS age, 'SECRET' AS note"),
        ("TABLE-DUPLICATE", "SELECT i % 3 AS pid, 1 AS age FROM generate_series(1, 9) AS i"),
    ],
)
def test_an_answer_that_is_not_what_the_dictionary_says(clean: Server, code: str, query: str) -> None:
    refused(code, lambda: records(PEOPLE, ask(clean, query), unit="pid", where="the query", one_row=True))


def test_a_bad_row_far_down_is_named(clean: Server) -> None:
    query = "SELECT i AS pid, CASE WHEN i = 45000 THEN 'SECRET' ELSE '5' END AS age FROM generate_series(1, 50000) AS i"
    error = refused("TABLE-VALUE", lambda: records(PEOPLE, ask(clean, query), unit="pid", where="q"))
    assert error.where[0] == "q:age, row 45000"


# ---- SQLite and DuckDB --------------------------------------------------------------------------------------


def sqlite_file(path: Path, *statements: str) -> Callable[..., Batches]:
    with sqlite3.connect(path) as made:
        for statement in statements:
            made.execute(statement)
    made.close()
    return lambda query, **options: read_source(Source(url=f"sqlite:///{path}", query=query, **options))


def duckdb_file(path: Path, *statements: str) -> Callable[..., Batches]:
    with duckdb.connect(str(path)) as made:
        for statement in statements:
            made.execute(statement)
    return lambda query, **options: read_source(Source(url=f"duckdb:///{path}", query=query, **options))


FILES = {"sqlite": sqlite_file, "duckdb": duckdb_file}


@pytest.fixture(params=list(FILES))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Callable[..., Batches]]:
    return lambda *statements: FILES[request.param](tmp_path / "clinic.db", *statements)


def test_files_give_the_same_records(file: Callable[..., Callable[..., Batches]]) -> None:
    put = "INSERT INTO t VALUES " + rows_of("").replace("true", "1").replace("false", "0")
    reader = file(
        "CREATE TABLE t (pid TEXT, whole INTEGER, part REAL, level TEXT, flag INTEGER, day DATE, moment TIMESTAMP)", put
    )
    assert same(records(KINDS, reader("SELECT * FROM t ORDER BY pid DESC;"), unit="pid"), from_file())


def test_files_stay_as_they_are(file: Callable[..., Callable[..., Batches]], tmp_path: Path) -> None:
    reader = file("CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)")
    before = (tmp_path / "clinic.db").read_bytes()
    for query in (
        "WITH x AS (SELECT 2 AS a) INSERT INTO t SELECT a FROM x",
        "SELECT 1 AS a; DROP TABLE t",
        "SELECT a FROM t; SELECT a FROM t",
    ):
        refused_any(lambda query=query: list(reader(query)), "SOURCE-QUERY", "SOURCE-WRITES")
    assert reader("SELECT a FROM t").whole()["a"].tolist() == [1]
    assert (tmp_path / "clinic.db").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clinic.db"]


def refused_any(act: Callable[[], object], *codes: str) -> None:
    with pytest.raises(TableError) as caught:
        act()
    assert caught.value.code in codes, caught.value.lines()


@pytest.mark.parametrize(
    ("code", "query"),
    [
        ("SOURCE-QUERY", "SELECT FROM"),
        ("SOURCE-QUERY", "SELECT nothing FROM t"),
        ("SOURCE-QUERY", "SELECT a FROM nowhere"),
        ("TABLE-EMPTY", "SELECT a FROM t WHERE a > 5"),
        ("TABLE-HEADER", "SELECT a, note AS a FROM t"),
    ],
)
def test_files_and_queries_that_cannot_be_used(
    file: Callable[..., Callable[..., Batches]], code: str, query: str
) -> None:
    reader = file("CREATE TABLE t (a INTEGER, note TEXT)", "INSERT INTO t VALUES (1, 'SECRET')")
    refused(code, lambda: list(reader(query)))


def test_files_that_take_too_long(file: Callable[..., Callable[..., Batches]]) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
    count = numbers + "SELECT count(*) AS a FROM n, n AS m"
    refused("SOURCE-TIMEOUT", lambda: list(file("CREATE TABLE t (a INTEGER)")(count, timeout_s=0.5)))


def test_files_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"SECRET, not a database" * 200)
    for kind in FILES:
        refused(
            "SOURCE-DATABASE",
            lambda kind=kind: read_source(Source(url=f"{kind}:///{tmp_path}/x.db", query="SELECT 1 AS a")),
        )


def test_a_relative_path_starts_at_the_folder(file: Callable[..., Callable[..., Batches]], tmp_path: Path) -> None:
    kind = "sqlite" if file("CREATE TABLE t (a INTEGER)").__code__.co_filename and _is_sqlite(tmp_path) else "duckdb"
    source = Source(url=f"{kind}:///clinic.db", query="SELECT 7 AS a")
    assert read_source(source, folder=tmp_path).whole()["a"].tolist() == [7]
    refused("SOURCE-UNREACHABLE", lambda: read_source(source, folder=tmp_path / "elsewhere"))


def _is_sqlite(folder: Path) -> bool:
    return (folder / "clinic.db").read_bytes()[:6] == b"SQLite"


def test_sqlite_reaches_nothing_but_its_file(tmp_path: Path) -> None:
    reader = sqlite_file(tmp_path / "x.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES (x'00'), ('SECRET'), (3)")
    refused("SOURCE-WRITES", lambda: list(reader("SELECT load_extension('x') AS a")))
    refused("TABLE-VALUE", lambda: records(PEOPLE, reader("SELECT 1 AS pid, a AS age FROM t"), unit="pid"))
    with sqlite3.connect(tmp_path / "x.db") as made:
        made.execute("CREATE TABLE u AS SELECT CAST(x'ff5345435245ff' AS TEXT) AS a")
    refused("SOURCE-VALUE", lambda: list(reader("SELECT a FROM u")))


def test_sqlite_waits_for_a_writer_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cohortium.client.sources.sqlite.CONNECT_S", 0.2)
    reader = sqlite_file(tmp_path / "x.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)")
    with sqlite3.connect(tmp_path / "x.db", isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        refused("SOURCE-BUSY", lambda: list(reader("SELECT a FROM t")))
        writer.execute("ROLLBACK")
    assert len(reader("SELECT a FROM t").whole()) == 1


def test_duckdb_reaches_nothing_but_its_file(tmp_path: Path) -> None:
    """Red with external access: a query could read the guard's keys as a table."""
    (tmp_path / "key.csv").write_text("k\nSECRET\n")
    reader = duckdb_file(
        tmp_path / "x.db", "CREATE TABLE t AS SELECT 1 AS a, 'SECRET' AS note, [1] AS l, 'x'::BLOB AS b"
    )
    for query in (f"SELECT * FROM read_csv('{tmp_path}/key.csv')", f"SELECT * FROM '{tmp_path}/key.csv'"):
        refused_any(lambda query=query: list(reader(query)), "SOURCE-WRITES", "SOURCE-QUERY")
    refused("SOURCE-VALUE", lambda: list(reader("SELECT note::INTEGER AS a FROM t")))
    refused("SOURCE-VALUE", lambda: list(reader("SELECT error(note) AS a FROM t")))
    for column in ("l", "b", "TIME '10:00'", "INTERVAL 1 DAY", "{'a': 1}", "MAP {'a': 1}"):
        refused("SOURCE-TYPE", lambda column=column: list(reader(f"SELECT {column} AS a FROM t")))
    found = reader(
        "SELECT 1::HUGEINT AS h, 0.1::DECIMAL(5,2) AS d, 'a'::ENUM('a') AS e, NULL AS n, uuid() AS u"
    ).whole()
    assert found["h"][0] == 1 and float(found["d"][0]) == 0.1 and found["e"][0] == "a" and pd.isna(found["n"][0])


def test_duckdb_that_another_program_writes(tmp_path: Path) -> None:
    reader = duckdb_file(tmp_path / "x.db", "CREATE TABLE t AS SELECT 1 AS a")
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x.db"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        refused("SOURCE-BUSY", lambda: reader("SELECT a FROM t"))
    finally:
        writer.kill()
        writer.communicate()
    assert len(reader("SELECT a FROM t").whole()) == 1


def test_duckdb_is_read_beside_other_readers(tmp_path: Path) -> None:
    """Red if the file is not opened read-only: two that may write cannot have it open."""
    reader = duckdb_file(tmp_path / "x.db", "CREATE TABLE t AS SELECT 1 AS a")
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, tmp_path / "x.db"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        assert len(reader("SELECT a FROM t").whole()) == 1
    finally:
        other.kill()
        other.communicate()


def test_sqlite_is_opened_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = sqlite_file(tmp_path / "x.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)")
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def note(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", note)
    batches = reader("SELECT a FROM t")
    (raw,) = opened
    raw.set_authorizer(None)
    raw.execute("PRAGMA query_only = OFF")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        raw.execute("INSERT INTO t VALUES (2)")
    batches.close()


def test_a_reader_in_another_thread(tmp_path: Path) -> None:
    """A guard answers from a pool of threads; what one began another may go on with."""
    for kind, make in FILES.items():
        batches = make(tmp_path / f"{kind}.db", "CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)")(
            "SELECT a FROM t"
        )
        found: list[int] = []
        thread = threading.Thread(target=lambda b=batches, f=found: f.append(len(b.whole())))
        thread.start()
        thread.join()
        assert found == [1]


# ---- one row a patient from OMOP ----------------------------------------------------------------------------

OMOP = {
    "person": "person_id integer, gender_concept_id integer, year_of_birth integer",
    "visit_occurrence": "visit_occurrence_id integer, person_id integer, visit_concept_id integer, "
    "visit_start_date date",
    "condition_occurrence": "person_id integer, condition_concept_id integer, condition_start_date date",
    "measurement": "measurement_id integer, person_id integer, measurement_concept_id integer, measurement_date date, "
    "value_as_number numeric, unit_concept_id integer",
    "death": "person_id integer, death_date date",
    "concept_ancestor": "ancestor_concept_id integer, descendant_concept_id integer",
}
OMOP_ROWS = {
    "person": [(1, 8532, 1950), (2, 8507, 1980), (3, 0, 1960), (4, 8507, 1940), (5, 8532, 2005)],
    "visit_occurrence": [
        (1, 1, 9201, "2016-03-01"),
        (2, 1, 9202, "2016-02-01"),
        (3, 1, 9202, "2014-02-01"),  # before the window
        (4, 2, 262, "2024-12-31"),
        (5, 3, 9202, "2015-01-01"),
        (6, 4, 9201, "2025-01-01"),  # after the window: no row for 4
        (7, 5, 9201, "2020-01-01"),  # a child
    ],
    "condition_occurrence": [
        (1, 201826, "2016-01-01"),  # type 2 diabetes, below 201820
        (1, 201826, "2017-01-01"),  # twice: still one row
        (1, 316866, "2010-01-01"),
        (2, 316139, "2025-06-01"),  # after the window
        (3, 999, "2016-01-01"),
    ],
    "measurement": [
        (1, 1, 3004249, "2016-01-01", 150, 8876),
        (2, 1, 3004249, "2017-01-01", 130, 8876),
        (3, 1, 3004249, "2017-01-01", 135, 8876),  # the same day: the later number counts
        (4, 1, 3016723, "2016-01-01", 1.25, 8840),
        (5, 2, 3016723, "2016-01-01", 88, 8749),  # micromol/L: left out
        (6, 2, 3004410, "2016-01-01", 6.1, 8554),
        (7, 3, 3004249, "2026-01-01", 120, 8876),  # after the window
    ],
    "death": [(2, "2024-12-31"), (3, "2025-01-01")],
    "concept_ancestor": [(201820, 201820), (201820, 201826), (316866, 316866), (316139, 316139), (255573, 255573)],
}
OMOP_ANSWER = [
    (1, "female", 1950, dt.date(2016, 2, 1), 2, 1, True, True, False, False, 135.0, 1.25, None, False),
    (2, "male", 1980, dt.date(2024, 12, 31), 1, 1, False, False, False, False, None, None, 6.1, True),
    (3, "other", 1960, dt.date(2015, 1, 1), 1, 0, False, False, False, False, None, None, None, False),
]


def omop_statements() -> list[str]:
    out = []
    for name, columns in OMOP.items():
        rows = ", ".join(repr(row) for row in OMOP_ROWS[name])
        out += [f"CREATE TABLE {name} ({columns})", f"INSERT INTO {name} VALUES {rows}"]
    return out


@pytest.mark.parametrize("kind", ["postgresql", "sqlite", "duckdb"])
def test_the_omop_query_gives_one_row_a_patient(clean: Server, kind: str, tmp_path: Path) -> None:
    query = (DATA / "omop.sql").read_text(encoding="utf-8")
    schema = Schema.load(DATA / "omop.schema.json")
    if kind == "postgresql":
        clean.run("DROP SCHEMA IF EXISTS cdm CASCADE", "CREATE SCHEMA cdm")
        clean.run(*(s.replace("TABLE ", "TABLE cdm.").replace("INTO ", "INTO cdm.") for s in omop_statements()))
        clean.run(f"GRANT USAGE ON SCHEMA cdm TO {READER}", f"GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO {READER}")
        clean.run(f"ALTER ROLE {READER} SET search_path = cdm")
        batches = ask(clean, query)
    else:
        batches = FILES[kind](tmp_path / "omop.db", *omop_statements())(query)
    names = [column.name for column in schema.columns]
    assert list(batches.columns) == names
    found = records(schema, batches, unit="person_id", where="omop.sql", one_row=True)
    wanted = records(schema, pd.DataFrame(OMOP_ANSWER, columns=names), unit="person_id")
    assert found.patients == 3 and same(found, wanted)
    assert len(grids(schema)) == len(names) - 1


# ---- a table that changes, and one that is large ------------------------------------------------------------


def test_a_changed_table_has_another_digest(clean: Server) -> None:
    key = b"k" * 16
    clean.run(
        "CREATE TABLE t AS SELECT i AS pid, i % 90 AS age FROM generate_series(1, 500) AS i",
        f"GRANT SELECT ON t TO {READER}",
    )

    def digest(order: str = "") -> str:
        return table_digest(records(PEOPLE, ask(clean, f"SELECT * FROM t{order}"), unit="pid"), key=key)

    first = digest()
    assert digest(" ORDER BY random()") == first
    for change in (
        "UPDATE t SET age = age + 1 WHERE pid = 7",
        "DELETE FROM t WHERE pid = 9",
        "INSERT INTO t VALUES (1, 5)",
    ):
        before = digest()
        clean.run(change)
        assert digest() != before
    clean.run("TRUNCATE t", "INSERT INTO t SELECT i, i % 90 FROM generate_series(500, 1, -1) AS i")
    assert digest() == first


LARGE = """
CREATE TABLE large AS
SELECT i AS pid, (i * 7919) % 100 AS age, (ARRAY['F', 'M'])[1 + i % 2] AS sex, 'stage ' || (i % 5) AS stage,
       ((i * 31) % 2000 / 10.0)::numeric(6, 1) AS weight, (i % 1000)::float8 / 7 AS crea, i % 3 = 0 AS dead,
       date '2000-01-01' + (i % 8000)::int AS day, timestamptz '2010-01-01 00:00Z' + i * interval '1 second' AS seen,
       CASE WHEN i % 4 > 0 THEN (i % 40)::smallint END AS score
FROM generate_series(1::bigint, 2000000) AS i"""
LARGE_SCHEMA = {
    "name": "large",
    "fields": [
        {"name": "pid", "type": "integer", "role": "identifier"},
        {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 110}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["F", "M"]}},
        {"name": "stage", "type": "string", "constraints": {"enum": [f"stage {i}" for i in range(5)]}},
        {"name": "weight", "type": "number", "constraints": {"minimum": 0, "maximum": 200}},
        {"name": "crea", "type": "number", "constraints": {"minimum": 0, "maximum": 150}},
        {"name": "dead", "type": "boolean"},
        {"name": "day", "type": "date", "constraints": {"minimum": "2000-01-01", "maximum": "2025-01-01"}},
        {
            "name": "seen",
            "type": "datetime",
            "constraints": {"minimum": "2010-01-01T00:00:00Z", "maximum": "2011-01-01T00:00:00Z"},
        },
        {"name": "score", "type": "integer", "constraints": {"minimum": 0, "maximum": 40}},
    ],
}
MEASURE = """
import json, sys, time
from cohortium.client.guard import held_out
from cohortium.client.records import records, table_digest
from cohortium.client.sources.base import Source, read_source
from cohortium.common.schema import Schema
from cohortium.simulations.benchmarks.memory import peak_bytes
schema = Schema.from_dict(json.loads(sys.argv[1]))
began = time.monotonic()
source = Source(url=sys.argv[2], query="SELECT * FROM large", password=sys.argv[3])
found = records(schema, read_source(source), unit="pid", where="large")
digest = table_digest(found, key=bytes(16))
held = held_out(found, study="s", share=0.2)
parts = [found.subset(~held), found.subset(held)]
print(json.dumps({
    "rows": found.rows, "patients": found.patients, "held": parts[1].patients, "digest": digest,
    "seconds": time.monotonic() - began, "mib": peak_bytes() / 2**20,
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_million_rows_stream_below_one_gigabyte(clean: Server) -> None:
    """From the server to records in their two parts, in a process of its own; red if the answer is held as objects."""
    clean.run(LARGE, f"GRANT SELECT ON large TO {READER}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(LARGE_SCHEMA), clean.url, PASSWORD],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    print(said)
    assert said["rows"] == said["patients"] == 2_000_000 and 390_000 < said["held"] < 410_000
    assert said["mib"] < 1000


def test_batches_are_small(clean: Server) -> None:
    assert max(len(part) for part in ask(clean, "SELECT generate_series(1, 100000) AS a")) <= sql.BATCH_ROWS
