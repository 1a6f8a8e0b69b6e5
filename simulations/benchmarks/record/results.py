"""What the benchmark keeps: one row a cell, in a journal while it runs, then as Parquet and CSV.

A killed run goes on where it stopped: a cell that is written down, made by the same code from the same data, is not
run again. A row that says "failed" or "skipped" is a result too.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cohortium.common.errors import UsageError

JOURNAL, PARQUET, CSV, LOCK = "journal.jsonl", "results.parquet", "results.csv", ".lock"
Status = Literal["ok", "failed", "skipped"]
Key = tuple[str, str, float | None, int]
MADE_BY = ("common", "strategies", "client", "server")
NOT_MADE_BY = re.compile(r"(evaluation|console|console_cli|cli|diagnostics|documents|web|page|cost|cost_shape)")
"""What of the package has no part in a synthetic table: a change there leaves finished cells as they are."""


@cache
def model_of_processor() -> str:
    """The processor's model as it says it, or the architecture."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", words)
    return found[1].strip() if found else platform.machine()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One cell. None: not measured, or it does not apply. Times in seconds, memory in MB, sizes in bytes.

    cpu_s, wall_s, peak_mb: of the whole process, start and sampling included. code, data, ruler: digests of what made
    the cell; a cell is made again when one of them changes.
    """

    table: str
    method: str
    epsilon: float | None
    seed: int
    family: str
    private: bool
    status: Status
    split: str = ""
    bins: str = ""
    failure: str = ""
    tvd1: float | None = None
    tvd2: float | None = None
    tstr_auc: float | None = None
    floor1: float | None = None
    floor2: float | None = None
    trtr_auc: float | None = None
    train_rows: int | None = None
    train_patients: int | None = None
    columns: int | None = None
    delta: float | None = None
    epsilon_spent: float | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    peak_mb: float | None = None
    fit_cpu_s: float | None = None
    fit_wall_s: float | None = None
    sample_wall_s: float | None = None
    rows_per_s: float | None = None
    sites: int | None = None
    rounds: int | None = None
    exchanges: int | None = None
    bytes_up_per_site: float | None = None
    bytes_down_per_site: float | None = None
    package: str = ""
    version: str = ""
    generator: str = ""
    code: str = ""
    data: str = ""
    ruler: str = ""
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    processor: str = field(default_factory=model_of_processor)
    python: str = field(default_factory=platform.python_version)
    made: str = field(default_factory=lambda: date.today().isoformat())
    notes: str = ""

    @property
    def key(self) -> Key:
        return (self.table, self.method, self.epsilon, self.seed)

    def stands(self, *, code: str, data: str, ruler: str, delta: float | None) -> bool:
        """Whether the row was made by what would make it now."""
        return (self.code, self.data, self.ruler, self.delta) == (code, data, ruler, delta)


TYPES = {f.name: str(f.type) for f in fields(Row)}


def from_json(value: dict[str, Any]) -> Row:
    """Raises UsageError for a line of another version of the benchmark."""
    try:
        return Row(**value)
    except TypeError as error:
        raise UsageError(
            "RECORD-ROW", f"a row of the results is of another version: {error}", hint="start a new --results folder"
        ) from None


def without_places(text: str) -> str:
    """Paths cut to their last part: results are published, and where somebody's files lie is nobody's business."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/(?=[\w.+@~-])", "", text)


class Journal:
    """Rows as they come, one JSON line each, on disk before the next cell begins."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL

    def read(self) -> list[Row]:
        """All whole lines; one that a kill cut short is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            rows.append(from_json(value))
        return rows

    def add(self, row: Row) -> None:
        with self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # the torn line stays alone
            file.write(json.dumps(asdict(row), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run at a time writes to a folder. Raises UsageError."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "RECORD-BUSY",
                "another run of the benchmark writes to this folder",
                where=(str(folder),),
                hint="wait for it, or use another --results and bring its rows in later with --from",
            ) from None
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def read(folder: Path) -> list[Row]:
    """The rows of a results folder: its table, then its journal; of equal keys the last one counts."""
    rows: list[Row] = []
    if (folder / PARQUET).exists():
        table = pd.read_parquet(folder / PARQUET)
        rows = [from_json(_plain({str(k): v for k, v in values.items()})) for values in table.to_dict(orient="records")]
    rows += Journal(folder).read()
    return list({row.key: row for row in rows}.values())


def write(folder: Path, rows: Sequence[Row], order: Sequence[str] = ()) -> None:
    """Parquet and CSV, whole or not at all; then the journal has done its work. order: of the tables."""
    place = {name: k for k, name in enumerate(order)}
    ordered = sorted(
        rows, key=lambda r: (place.get(r.table, len(place)), r.table, r.family, r.method, r.epsilon or 0.0, r.seed)
    )
    table = frame(ordered)
    for name, save in ((PARQUET, table.to_parquet), (CSV, table.to_csv)):
        part = folder / (name + ".part")
        save(part, index=False)
        os.replace(part, folder / name)
    Journal(folder).path.unlink(missing_ok=True)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a row, with a type a column that does not depend on which rows there are."""
    table = pd.DataFrame([asdict(row) for row in rows], columns=list(TYPES))
    for name, kind in TYPES.items():
        if kind.startswith("int"):
            table[name] = table[name].astype("Int64")
        elif kind.startswith("float"):
            table[name] = table[name].astype("Float64")
        elif kind == "bool":
            table[name] = table[name].astype(bool)
        else:
            table[name] = table[name].astype("string")
    return table


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a data frame as Row takes it."""
    out = {name: None if pd.isna(value) else value for name, value in values.items()}
    for name, kind in TYPES.items():
        value = out.get(name)
        if value is None:
            out[name] = "" if kind == "str" else None
        elif kind.startswith("int"):
            out[name] = int(value)
        elif kind.startswith("float"):
            out[name] = float(value)
        elif kind == "bool":
            out[name] = bool(value)
    return out


@cache
def our_code() -> str:
    """A digest of the package's code that makes synthetic rows; comments, docstrings and formatting do not count."""
    root = Path(__file__).resolve().parents[3]
    found = hashlib.sha256()
    for top in MADE_BY:
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if not any(NOT_MADE_BY.fullmatch(part) for part in name.split("/")):
                found.update(name.encode() + stripped(path.read_text(encoding="utf-8")).encode())
    return found.hexdigest()[:12]


def stripped(source: str) -> str:
    """A module's syntax tree as text, without docstrings and other bare strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                s
                for s in body
                if not (
                    isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
                )
            ]
    return ast.dump(tree)


def digest_of_code(paths: Iterable[Path], *, more: str) -> str:
    """A digest of modules as our_code takes it."""
    words = [path.name + stripped(path.read_text(encoding="utf-8")) for path in paths]
    return hashlib.sha256("".join([more, *words]).encode()).hexdigest()[:12]


def digest_of(*paths: Path, more: str = "") -> str:
    found = hashlib.sha256(more.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
