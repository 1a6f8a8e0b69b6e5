"""A what-if as a child process of the console: `python -m cohortium.simulations.what_if_job FOLDER`.

The console starts it by this name and imports nothing of it: an uploaded table is parsed here and nowhere else.

    FOLDER/job.json study.toml dictionary.json table.*    written by the console
    FOLDER/progress.json error.json out/                  written here; out/ as what_if.py has it

Ends with its console; SIGTERM ends it after the fit under way. Exit code 0 done, 75 interrupted, 1 an error, whose
facts are in error.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

from cohortium.common.errors import CohortiumError
from cohortium.common.processes import leave_with_parent, stopping

NICE = 10
MOST_BYTES = 16_000_000_000
"""Address space: a table that unfolds to more ends this process, not the machine."""
INTERRUPTED = 75


def main(folder: Path) -> int:
    leave_with_parent()
    os.nice(NICE)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    (folder / "error.json").unlink(missing_ok=True)
    stop = threading.Event()
    with stopping(stop):
        return _work(folder, stop)


def _work(folder: Path, stop: threading.Event) -> int:
    from cohortium.simulations.tune import Interrupted
    from cohortium.simulations.what_if import Request, replace_file, what_if

    def tell(what: str, done: int, of: int) -> None:
        replace_file(folder / "progress.json", json.dumps({"what": what, "done": done, "of": of}))

    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        request = Request(
            study=folder / "study.toml",
            table=folder / job["table"],
            out=folder / "out",
            split=job["split"],
            epsilons=tuple(job["epsilons"]),
            seeds=job["seeds"],
        )
        what_if(request, progress=tell, stop=stop.is_set)
    except Interrupted:
        return INTERRUPTED
    except CohortiumError as error:
        return _failed(folder, error.as_json())
    except MemoryError:
        much = CohortiumError("WHAT-IF-MEMORY", "the table needs more memory than it may have", hint="fewer rows")
        return _failed(folder, much.as_json())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        told = CohortiumError("INTERNAL", "the simulation broke off: this is our bug", hint="see log.txt in its folder")
        return _failed(folder, told.as_json())
    return 0


def _failed(folder: Path, facts: dict[str, Any]) -> int:
    from cohortium.simulations.what_if import replace_file

    with contextlib.suppress(OSError):
        replace_file(folder / "error.json", json.dumps(facts))
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
