"""A real PostgreSQL server for tests: made anew in a folder of its own, stopped by its process id.

PostgreSQL refuses to run as root, so root lends the server to another user. Without the server's programs the tests
fail: a check that is left out in silence shows nothing. COHORTIUM_NO_POSTGRES=1 leaves them out on purpose.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

READER = "cohortium"
PASSWORD = "only-to-read-7"
WAIT_S = 60


@dataclass(kw_only=True)
class Server:
    """A running server with the database `clinic`; `READER` may connect and read what `grant` names."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    user: dict[str, Any]

    @property
    def url(self) -> str:
        """As a hospital writes it: no password."""
        return f"postgresql://{READER}@127.0.0.1:{self.port}/clinic"

    def admin(self, database: str = "clinic") -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=str(self.folder), port=self.port, user="admin", dbname=database, autocommit=True, connect_timeout=10
        )

    def run(self, *statements: str) -> None:
        with self.admin() as connection:
            for statement in statements:
                connection.execute(statement)

    def fill(self, table: str, frame: Any, types: dict[str, str]) -> None:
        """A table with a frame's rows, which READER may read."""
        columns = ", ".join(f'"{name}" {types[name]}' for name in frame.columns)
        self.run(f"DROP TABLE IF EXISTS {table}", f"CREATE TABLE {table} ({columns})")
        rows = frame.astype(object).where(frame.notna(), None).itertuples(index=False)
        with self.admin() as connection, connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        self.run(f"GRANT SELECT ON {table} TO {READER}")


@contextmanager
def server() -> Iterator[Server]:
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="cohortium-pg-"))
    user: dict[str, Any] = {}
    if os.getuid() == 0:
        owner = next(pwd.getpwnam(name) for name in ("postgres", "nobody") if _is_user(name))
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    process = None
    try:
        data = folder / "data"
        options = ["--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            # Local roles are trusted on the socket in a folder that only their owner enters; the network asks.
            [
                programs / "initdb",
                "-D",
                data,
                "-U",
                "admin",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                *options,
            ],
            cwd=folder,
            capture_output=True,
            **user,
        )
        assert made.returncode == 0, made.stderr.decode(errors="replace")
        port = _free_port()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", data, *arguments], cwd=folder, stdout=log, stderr=log, **user
            )
        made_server = Server(folder=folder, port=port, process=process, user=user)
        _wait(made_server)
        with made_server.admin("postgres") as connection:
            connection.execute("CREATE DATABASE clinic")
        made_server.run(f"CREATE ROLE {READER} LOGIN PASSWORD '{PASSWORD}'", "CREATE ROLE owner_of_tables")
        yield made_server
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # "fast": connections are ended
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    if os.environ.get("COHORTIUM_NO_POSTGRES") == "1":
        pytest.skip("COHORTIUM_NO_POSTGRES=1")
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found is None and not folders:
        pytest.fail("no PostgreSQL server here: install Debian's package postgresql, or set COHORTIUM_NO_POSTGRES=1")
    return Path(found).resolve().parent if found else folders[-1].parent


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(made: Server) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            made.admin("postgres").close()
            return
        except psycopg.OperationalError:
            if made.process.poll() is not None or time.monotonic() > until:
                pytest.fail("the server did not start: " + (made.folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)
