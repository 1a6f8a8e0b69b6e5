"""Rows a second: encoding a table at a site, and finished synthetic rows from a fitted model to a Parquet file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from cohortium.client.records import records
from cohortium.common.encoding import encode
from cohortium.common.study import Study
from cohortium.server.runs import RunFolder
from cohortium.server.sampling import write_rows
from cohortium.simulations.benchmarks.tables import made_up, write_study
from cohortium.simulations.benchmarks.timing import Figure
from cohortium.simulations.run import Request, prepare, run

SAMPLED = 131_072  # two blocks
ENCODED = 1_000_000
FITTED_ON = 20_000
SAMPLE_LIMIT = 20_000.0
ENCODE_LIMIT = 100_000.0


def sampling(*, generator: str = "mixture", rows: int = SAMPLED, repeats: int = 3) -> Figure:
    """Rows drawn in excess, herded, decoded and written; the model is fitted to 20,000 made-up patients first."""
    with tempfile.TemporaryDirectory() as name:
        folder = fitted(Path(name), generator=generator)
        cpu, wall = _rate(lambda: write_rows(folder, rows, [Path(name) / "out.parquet"], seed=1), rows, repeats)
    return Figure(
        name=f"sampling-{generator}",
        unit="rows/s",
        value=cpu,
        limit=SAMPLE_LIMIT,
        better="higher",
        what=f"finished rows a second of a ten-column table from the {generator} model",
        details={"rows a second by the clock": wall, "rows": rows},
    )


def encoding(*, rows: int = ENCODED, repeats: int = 3) -> Iterator[Figure]:
    """Codes by public rule; then the same with every cell checked against the dictionary first, as a site does."""
    table = made_up(rows)
    with tempfile.TemporaryDirectory() as name:
        schema = Study.load(write_study(Path(name), rows=rows, sites=5)).schema
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(schema, table, "patient"),
        "check and encode": lambda: records(schema, table, unit="patient"),
    }
    for what, work in works.items():
        cpu, wall = _rate(work, rows, repeats)
        yield Figure(
            name=f"encoding-{what.replace(' ', '-')}",
            unit="rows/s",
            value=cpu,
            limit=ENCODE_LIMIT,
            better="higher",
            what=f"rows a second of a ten-column table: {what}",
            details={"rows a second by the clock": wall, "rows": rows},
        )


def fitted(folder: Path, *, generator: str) -> RunFolder:
    """A finished run over five made-up hospitals."""
    folder.mkdir(exist_ok=True)
    table = folder / "table.parquet"
    made_up(FITTED_ON).to_parquet(table)
    study = write_study(folder, rows=FITTED_ON, sites=5, generator=generator)
    prepare(Request(study=study, table=table, split="iid:5", out=folder / "out"))
    run(folder / "out")
    return RunFolder(root=folder / "out")


def _rate(work: Callable[[], object], rows: int, repeats: int) -> tuple[float, float]:
    """(rows per CPU second, rows per second)."""
    cpu, wall = [], []
    for _ in range(repeats):
        at, begun = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - at)
        wall.append(time.perf_counter() - begun)
    return rows / median(cpu), rows / median(wall)
