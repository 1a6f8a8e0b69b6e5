"""Lets the console's tests import the helper that lies beside this file: `large_world`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
