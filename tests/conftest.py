"""Lets every test import the helpers that lie beside this file: `checks`, `hospital`, `planting`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cohortium  # noqa: F401  before anything loads gRPC: it decides there which TLS is spoken

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Commands that close it for good, called within the tests' process, leave the next test as it was."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
