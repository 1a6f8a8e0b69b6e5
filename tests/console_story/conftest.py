"""Lets the story import the helpers that lie beside it, and the large world of the console's tests."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "server" / "console")]
