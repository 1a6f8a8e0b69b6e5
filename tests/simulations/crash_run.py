"""Runs prepared simulations in forks of one warm process, and kills a fork at its n-th durable step if told so.

A job a line on stdin: {"out": folder, "die_at": n or null}. Two lines back: the fork's pid, then how it ended:
{"signal": 9 or 0, "code": the error's code or "", "steps": durable steps so far, 0 after a kill}.
A durable step is a ledger line, a vault entry or a file moved into place; it may die before and after each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork_ends(out: Path, die_at: int | None) -> tuple[str, int]:
    """In the fork: run on, counting steps; (error code, steps)."""
    from cohortium.client.vault import Vault
    from cohortium.common.errors import CohortiumError
    from cohortium.common.privacy.ledger import Ledger
    from cohortium.simulations.run import run

    steps = 0

    def step() -> None:
        nonlocal steps
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            step()
            value = call(*args, **kwargs)
            step()
            return value

        return stepped

    for owner, name in ((Ledger, "_write"), (Vault, "put"), (Path, "replace")):
        setattr(owner, name, around(getattr(owner, name)))
    try:
        run(out)
    except CohortiumError as error:
        return error.code, steps
    return "", steps


def main() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from small import make_quick

    make_quick()
    from cohortium.server.runs import RunFolder, plan_for_run

    for line in sys.stdin:
        job = json.loads(line)
        folder = RunFolder(root=Path(job["out"]))
        plan_for_run(folder.study(), folder.plan())  # its calibration is remembered by the forks
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                ended = fork_ends(Path(job["out"]), job["die_at"])
            except BaseException as error:
                ended = f"BUG {type(error).__name__}: {error}", 0
            os.write(write, json.dumps(ended).encode())
            os._exit(0)
        os.close(write)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        code, steps = json.loads(said) if said else ("", 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": ended_by, "code": code, "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
