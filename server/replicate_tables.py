"""`cohortium sample --replicates M`: tables for analyses that `cohortium analyze` does not know.

    rows_world.parquet      the population that the release is replayed on: the released model's rows
    rows_00.parquet         from the run's own answers, unshrunk: gives q₀
    rows_01 … _MM.parquet   from replays of the release on patients out of rows_world: give q_i

    estimate and interval   combining.combine(q₀, [q_1 … q_M], q of rows_world)

This undoes what sampling, noise and fit do to an analysis, not what the generator cannot express at all
(docs/analyze.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cohortium.common.errors import UsageError
from cohortium.common.evaluation.combining import FEWEST
from cohortium.common.generators.sampling import decode
from cohortium.server.playing import POPULATION_BLOCKS
from cohortium.server.replicates import ROWS, of_run
from cohortium.server.runs import RunFolder


def write_replicates(
    folder: RunFolder,
    count: int,
    rows: int,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write them beside `out` (its name with _world, _00, _01, … before .parquet); all but the world have `rows` rows.

    progress: how many tables are written. The same run, seed, rows and number of a table give the same table.
    """
    if count < FEWEST:
        raise UsageError("SAMPLE-REPLICATES", f"at least {FEWEST} replicates", hint="--replicates 20")
    if out.suffix != ".parquet":
        raise UsageError("SAMPLE-FILE", f"{out.name}: replicates are written as .parquet", hint="-o rows.parquet")
    model, schema, grids = folder.model(), folder.study().schema, folder.grids()
    release, kept = of_run(folder)
    everything = range(len(grids))
    world = np.asarray(model.sample(max(rows, POPULATION_BLOCKS * ROWS), seed=seed))

    def tables() -> Iterator[tuple[str, np.ndarray]]:
        yield "world", world
        own, total = release.rows(kept, everything, seed=seed, count=rows)
        yield "00", own
        for i in range(1, count + 1):
            rng = np.random.default_rng([seed, i, 0x7274])
            people = world[rng.integers(len(world), size=round(total))]
            yield f"{i:02d}", release.replay(people, everything, seed=int(rng.integers(2**62)), count=rows)

    out.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for number, (name, codes) in enumerate(tables()):
        path = out.with_name(f"{out.stem}_{name}{out.suffix}")
        part = path.with_name(path.name + ".part")
        decoded = decode(schema, grids, codes, np.random.default_rng([seed, number, 0x6463]))
        decoded.to_parquet(part, index=False)
        part.replace(path)
        written.append(path)
        progress(len(written))
    return written
