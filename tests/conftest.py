"""Lets every test import the helpers that lie beside this file: `checks`, `hospital`, `planting`."""

from __future__ import annotations

import sys
from pathlib import Path

import cohortium  # noqa: F401  before anything loads gRPC: it decides there which TLS is spoken

sys.path.insert(0, str(Path(__file__).parent))
