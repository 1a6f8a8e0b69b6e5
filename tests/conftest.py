"""Lets every test import the helpers that lie beside this file: `checks`, `hospital`, `planting`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cohortium  # noqa: F401  before anything loads gRPC: it decides there which TLS is spoken

sys.path.insert(0, str(Path(__file__).parent))


CROWDS = (
    "console_story/test_story.py",
    "docker/test_containers.py",
    "consortium_kill/test_kills.py",
    "test_consortium_on_one_machine.py",
    "console_story/test_readme_commands.py",
    "console_story/test_first_paint.py",
    "consortium_net/test_cuts.py",
)
"""Modules that start a dozen processes. Two at once on two cores would mostly wait for each other, so they are spread
evenly between the others; the first begins at once."""
SLOW_S, QUICK_S = 12.0, 0.15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders modules; `make test` runs each in one process, where what its fixtures build is built once."""
    here, crowds, rest, whole = Path(__file__).parent, dict[str, list[pytest.Item]](), list[tuple[float, int]](), 0.0
    for at, item in enumerate(items):
        name = item.path.relative_to(here).as_posix()
        if name in CROWDS:
            crowds.setdefault(name, []).append(item)
        else:
            rest.append((whole, at))
            whole += SLOW_S if item.get_closest_marker("slow") else QUICK_S
    begins = {items[at].path: at for _, at in reversed(rest)}
    named = [name for name in CROWDS if name in crowds]
    ordered: list[pytest.Item] = []
    for seconds, at in rest:
        first = begins[items[at].path] == at  # between two modules, never inside one
        while named and first and seconds >= whole * (len(crowds) - len(named)) / len(crowds):
            ordered += crowds[named.pop(0)]
        ordered.append(items[at])
    items[:] = [*ordered, *(item for name in named for item in crowds[name])]


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Commands that close it for good, called within the tests' process, leave the next test as it was."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
