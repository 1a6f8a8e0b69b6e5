"""How commands speak: results to stdout, progress to stderr, errors with their fix, fixed exit codes.

0 ok · 1 a check failed · 2 usage · 3 refused by policy or budget · 4 peer unreachable · 70 our bug
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from cohortium.common.errors import CohortiumError

out = Console(highlight=False, emoji=False)  # a fingerprint holds ":CD:"
err = Console(stderr=True, highlight=False, emoji=False)


def emit(value: Any, *, as_json: bool, show: Callable[[], None]) -> None:
    """The result, once: JSON for machines or `show` for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")
    else:
        show()


@contextmanager
def failures(*, as_json: bool = False) -> Iterator[None]:
    """Turn every failure into its message and exit code; never a traceback (COHORTIUM_DEBUG=1 shows it)."""
    try:
        yield
    except CohortiumError as error:
        report(error, as_json=as_json)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        told = CohortiumError(
            "FILE",
            f"{error.strerror or type(error).__name__}",
            where=(str(error.filename or ""),),
            hint="check that the path exists, that it may be written and that the disk has room",
        )
        report(told, as_json=as_json)
        raise typer.Exit(2) from None
    except MemoryError:
        report(
            CohortiumError("MEMORY", "not enough memory", hint="fewer columns, or a larger machine"), as_json=as_json
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if os.environ.get("COHORTIUM_DEBUG"):
            traceback.print_exc()
        told = CohortiumError(
            "BUG",
            f"an error we did not foresee: {type(error).__name__}",
            hint="run again with COHORTIUM_DEBUG=1 and report what it prints (read it first: it may show values)",
        )
        report(told, as_json=as_json)
        raise typer.Exit(70) from None


def report(error: CohortiumError, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(error.as_json(), indent=1) + "\n")
        return
    first, *rest = error.lines()
    err.print(Text(first, style="bold red"), soft_wrap=True)
    for line in rest:
        err.print(Text(line), soft_wrap=True)  # a path stays whole, to be copied
