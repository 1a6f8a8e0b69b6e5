"""Peak memory of a whole simulation: a made-up table of a million rows over ten sites, mixture, sampling and report.

`python -m cohortium.simulations.benchmarks.memory ROWS SITES` runs it in this process and prints the peak after each
stage as JSON; `measure` does so in a process of its own, so that nothing else is counted.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cohortium.simulations.benchmarks.timing import Figure

ROWS, SITES = 1_000_000, 10
LIMIT_GB = 2.0
LIBRARIES_GB = 0.7  # torch, Flower, scikit-learn and their like, before the first row


def measure(*, rows: int = ROWS, sites: int = SITES, limit_gb: float = LIMIT_GB) -> Figure:
    command = [sys.executable, "-m", "cohortium.simulations.benchmarks.memory", str(rows), str(sites)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = json.loads(done.stdout.splitlines()[-1])
    return Figure(
        name=f"memory-{rows}",
        unit="GB",
        value=stages["finish"]["peak_gb"],
        limit=limit_gb,
        what=f"peak memory of a simulation of {rows:,} rows over {sites} sites",
        details=stages,
    )


def peak_bytes(pid: int | None = None) -> int:
    """What this process, or another of this machine, took at most.

    From /proc where there is one: getrusage also counts what the process was before it became this program, so a test
    worker's own size would be measured. Raises OSError for another process where there is none.
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii")
    except OSError:
        if pid is not None:
            raise
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def simulate(rows: int, sites: int) -> dict[str, dict[str, float]]:
    """Peak of the process so far (GB) and seconds, after each stage."""
    stages: dict[str, dict[str, float]] = {}
    begun = time.perf_counter()

    def reached(stage: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        peak = peak_bytes()
        stages[stage] = {"peak_gb": round(peak / 1e9, 3), "seconds": round(now - begun, 1)}
        begun = now

    from cohortium.simulations.benchmarks.tables import made_up, write_study
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import Request, prepare, run

    reached("libraries")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up(rows).to_parquet(folder / "table.parquet")
        study = write_study(folder, rows=rows, sites=sites)
        reached("table")
        prepare(Request(study=study, table=folder / "table.parquet", split=f"iid:{sites}", out=folder / "out"))
        reached("prepare")
        run(folder / "out")
        reached("run")
        finish(folder / "out")
        reached("finish")
    return stages


if __name__ == "__main__":
    print(json.dumps(simulate(int(sys.argv[1]), int(sys.argv[2]))))
