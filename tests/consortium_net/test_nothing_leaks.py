"""10,000 strings planted at hospitals: none is in what leaves them, whether their tables are good or fail to load.

Watched: every byte between courier and guard (a superset of what leaves a hospital, in the clear), every byte on the
coordinator's TCP port, every byte between hub and ServerApp, all files of the coordinator (databases with their WAL,
keys, runs, answers, the model) and of the couriers, and what couriers, service and test printed. The strings are
patients' names, levels that no dictionary has, names of columns and files, cells of wrong types, damaged files, and
parts of queries, so that the readers' own error texts hold them. Flower's part is a pipe, as in test_cuts: it carries
a hello and a ticket, and the courier's end of it is covered by tests/client/test_app.py.

Planted bugs that turn this red, and do so below: a guard whose refusals say why; a line in a courier's log; a row
in a database of the coordinator.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from net_party import Party
from planted import Planted, dresses, tokens
from recorders import Recorder
from small import make_quick, small_study, small_table

from cohortium.common.errors import PeerUnreachable
from cohortium.server.runs import RunFolder, drive
from cohortium.server.stream import StreamCourier, Timings

SITES = ("site-1", "site-2", "site-3", "site-4")
PARQUET, CSV, SQLITE, ZIPPED = SITES
TIMINGS = Timings(reopen_s=1.0, reopen_again_s=2.0, message_s=5.0, opening_s=20.0, lost_s=30.0, hub_s=0.05)
PEOPLE = 2000


@pytest.mark.parametrize("dress", sorted(dresses("a")))
def test_the_search_finds_every_dress(dress: str) -> None:
    planted = tokens(200)
    assert Planted(planted).hits(dresses(planted[77])[dress])
    assert not Planted(planted).hits(dresses(tokens(1, seed=9)[0])[dress])
    assert not Planted(planted).hits(np.random.default_rng(1).bytes(1 << 20))


@dataclass
class Hospitals:
    """Four sites' tables, which hold nothing but planted strings where a text may stand."""

    party: Party
    left: list[str]
    used: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    good: dict[str, pd.DataFrame] = field(default_factory=dict)

    def some(self, count: int) -> list[str]:
        """Tokens that were not used yet."""
        taken, self.left = self.left[:count], self.left[count:]
        self.used += taken
        assert len(taken) == count
        return taken

    def table(self, people: int) -> pd.DataFrame:
        made = small_table(people).drop_duplicates("id").reset_index(drop=True)
        made["seen"] = made["seen"].dt.strftime("%Y-%m-%d")
        made["id"] = self.some(len(made))
        strange = made.index[::10]
        made["sex"] = made["sex"].astype(object)
        made.loc[strange, "sex"] = self.some(len(strange))  # a level that the dictionary does not have
        return made

    def place(self, site: str) -> Path:
        return self.party.site(site) / self.names[site]

    def settle(self) -> None:
        """Each site's table under a planted name, and site.toml with it."""
        for site in SITES:
            (self.party.site(site) / "data.parquet").unlink()
            (self.party.site(site) / "rows.npy").unlink()
        self.good = {site: self.table(PEOPLE) for site in SITES}
        for site, ending in zip(SITES, ("parquet", "csv", "sqlite", "csv.gz"), strict=True):
            name = self.names[site] = f"{self.some(1)[0]}.{ending}"
            query = {"table": f"sqlite:///{name}", "query_file": "patients.sql"} if site == SQLITE else {"table": name}
            self.party.policy(site, **query)
        self.mend()

    def mend(self) -> None:
        """The good tables, and nothing else."""
        (self.party.site(PARQUET) / "rows.npy").unlink(missing_ok=True)
        for site in SITES:
            self.write(site, self.good[site])

    def write(self, site: str, table: pd.DataFrame) -> None:
        path = self.place(site)
        path.unlink(missing_ok=True)
        if site == PARQUET:
            table.to_parquet(path, index=False)
        elif site == SQLITE:
            with contextlib.closing(sqlite3.connect(path)) as db:
                table.to_sql("patients", db, index=False)
            self.query("SELECT * FROM patients")
        else:
            table.to_csv(path, index=False)

    def query(self, text: str) -> None:
        (self.party.site(SQLITE) / "patients.sql").write_text(text)

    def wrong_cells(self) -> None:
        """Cells of the wrong type, in each kind of source."""
        for site, column in ((PARQUET, "age"), (CSV, "seen"), (SQLITE, "dose"), (ZIPPED, "grade")):
            table = self.good[site].astype({column: str})
            table.loc[[3, 5, 8], column] = self.some(3)
            self.write(site, table)

    def wrong_columns(self) -> None:
        """Columns under other names, twice the same name, one too many; a query for a column that is not there."""
        one, twice, more, absent, text = self.some(5)
        self.write(PARQUET, self.good[PARQUET].rename(columns={"sex": one}))
        self.place(CSV).write_text(f"id,{twice},{twice},age\n1,2,3,4\n")
        self.query(f"SELECT p.\"{absent}\", '{text}' FROM patients AS p")
        self.write(ZIPPED, self.good[ZIPPED].assign(**{more: self.some(PEOPLE)}))

    def damaged(self) -> None:
        """Files that no reader can read; bytes that are no UTF-8; a query that is no SQL."""
        self.place(PARQUET).write_bytes(b"PAR1" + " ".join(self.some(20)).encode() + b"PAR1")
        rows = "\n".join(f"{token},{token},1,2,3,4,5,6,7,8" for token in self.some(20))
        self.place(CSV).write_text(f"id,sex,age,dose,seen,smoker,grade\n{rows}\n")
        self.query(f'SELEKT * FROM "{self.some(1)[0]}"')
        self.place(ZIPPED).write_bytes(gzip.compress(b"id,sex\n" + self.some(1)[0].encode("latin-1"))[:-5])

    def surprising(self) -> None:
        """What a reader does not expect: names of rows that are no array, bytes in a text, a file that went."""
        names = self.party.site(PARQUET) / "rows.npy"
        names.write_bytes(self.some(1)[0].encode())
        token = self.some(1)[0]
        self.place(CSV).write_bytes(b"id,sex,age,dose,seen,smoker,grade\n" + token.encode("utf-16") + b"\xff\xfe,1\n")
        with contextlib.closing(sqlite3.connect(self.place(SQLITE))) as db:
            db.execute("UPDATE patients SET sex = CAST(? AS TEXT)", (token.encode("latin-1") + b"\xff",))
            db.execute("UPDATE patients SET sex = CAST(sex || x'ff' AS TEXT)")
            db.commit()
        self.query("SELECT * FROM patients")
        self.place(ZIPPED).unlink()


class Watched:
    """The consortium with an ear at every way out."""

    def __init__(self, folder: Path, study: Path, table: Path) -> None:
        self.party = Party(folder, study=study, table=table, sites=len(SITES))
        self.study = study
        self.hospitals = Hospitals(self.party, tokens(12_000))
        self.hospitals.settle()
        self.recorders: dict[str, Recorder] = {}
        self.hub = folder / "h.sock"
        self.said: list[str] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.party.running():
            for site in SITES:
                self.party.between[site] = self.party.folder / f"c-{site}.sock"
                ear = Recorder(self.party.guard_socket(site), at=self.party.between[site])
                self.recorders[f"guard of {site}"] = ear
            self.party.start_coordinator()
            port = self.recorders["service"] = Recorder(self.party.port)
            self.recorders["hub"] = Recorder(self.party.coordinator / "hub.sock", at=self.hub)
            for site in SITES:
                self.party.start_site(site, port=port.port)
            self.party.ready()
            try:
                yield
            finally:
                for ear in self.recorders.values():
                    ear.close()

    def run(self, name: str) -> Path:
        root = self.party.new_run(self.study, name=name)
        with StreamCourier(self.party.grid(), socket=self.hub, run=name, timings=TIMINGS) as courier:
            drive(courier, root)
        return root

    def fails(self, name: str) -> dict[str, str]:
        """The codes that a run which could not begin was refused with."""
        with pytest.raises(PeerUnreachable) as caught:
            self.run(name)
        assert caught.value.code == "RUN-TOO-FEW"
        self.said += caught.value.lines()
        events = RunFolder(root=self.party.coordinator / "runs" / name).events()
        return dict(next(event["refused"] for event in events if event["event"] == "hello"))

    def outside(self) -> dict[str, bytes]:
        """All that left, by where it is."""
        found: dict[str, bytes] = {}
        for name, ear in self.recorders.items():
            found |= {f"{name}, connection {at}": heard for at, heard in enumerate(ear.heard())}
        for folder in (self.party.coordinator, self.party.folder / "couriers"):
            found |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            found |= {f"name of {path}": str(path).encode() for path in folder.rglob("*")}
        for path in (self.party.folder / "said").iterdir():
            if not path.name.startswith("guard-"):  # a guard prints on the hospital's own terminal
                found[str(path)] = path.read_bytes()
        found["what the coordinator is told"] = "\n".join(self.said).encode()
        return found


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(prefix="leaks") as name, pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        folder = Path(name)
        study, table = small_study(folder / "study", generator="mixture", survivors=3)
        here = Watched(folder, study, table)
        with here.running():
            yield here


@pytest.mark.slow
def test_no_planted_string_leaves(
    watched: Watched, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    here, hospitals = watched, watched.hospitals
    root = here.run("good")
    assert (root / "run" / "model.npz").exists()
    for name, spoil in {
        "cells": hospitals.wrong_cells,
        "columns": hospitals.wrong_columns,
        "damaged": hospitals.damaged,
        "surprising": hospitals.surprising,
    }.items():
        hospitals.mend()
        spoil()
        assert here.fails(name) == dict.fromkeys(SITES, "REFUSED-DATA"), name
    hospitals.mend()
    hospitals.place(CSV).write_text("\n".join(hospitals.some(60)))
    three = here.run("three")  # three good tables and one that is not
    assert RunFolder(root=three).events()[1]["refused"] == {CSV: "REFUSED-DATA"}
    found = here.outside()
    printed = capfd.readouterr()
    found |= {"stdout": printed.out.encode(), "stderr": printed.err.encode(), "logging": caplog.text.encode()}
    assert len(hospitals.used) >= 10_000
    known = Planted(hospitals.used)
    leaks = {place: hits[:3] for place, data in found.items() if (hits := known.hits(data))}
    assert not leaks, leaks
    # The ears were open: each guard's and the hub's words are there, and are Cohortium's envelopes.
    for place in [*(f"guard of {site}" for site in SITES), "hub"]:
        heard = b"".join(data for name, data in found.items() if name.startswith(place))
        assert len(heard) > 50_000 and (b"sum.masked" in heard or place == f"guard of {CSV}"), place
    assert sum(len(data) for name, data in found.items() if name.startswith("service")) > 200_000
    # The strings were there to be found, and the readers had words about them.
    for site in SITES:
        assert known.hits(hospitals.place(site).read_bytes())
        local = [json.loads(line) for line in (here.party.site(site) / "guard.log").read_text().splitlines()]
        assert len({entry["local"] for entry in local}) >= 3, local


@pytest.mark.slow
def test_a_leak_is_found(watched: Watched) -> None:
    """A guard whose refusals say why is found at its courier and at the hub; so are a courier's log and a WAL's row."""
    hospitals = watched.hospitals
    hospitals.mend()
    (column,) = hospitals.some(1)
    hospitals.write(PARQUET, hospitals.good[PARQUET].assign(**{column: 1}))
    watched.party.children.pop(f"guard-{PARQUET}").stop()
    watched.party.start_guard(PARQUET, kind="leaky-guard").wait("ready")
    watched.run("leak")
    line, row = hospitals.some(2)
    with open(watched.party.folder / "couriers" / CSV / "courier.log", "w") as log:
        log.write(f"cannot read {line}\n")
    with contextlib.closing(sqlite3.connect(watched.party.coordinator / "register.db")) as register:
        register.execute("CREATE TABLE planted (said TEXT)")
        register.execute("INSERT INTO planted VALUES (?)", (row,))
        register.commit()
        found = watched.outside()  # before the WAL is put into the database
    for token, expected in (
        (column, (f"guard of {PARQUET}", "hub")),
        (line, ("courier.log",)),
        (row, ("register.db-wal",)),
    ):
        known = Planted([token])
        places = [place for place, data in found.items() if known.hits(data)]
        assert all(any(part in place for place in places) for part in expected), (expected, places)
