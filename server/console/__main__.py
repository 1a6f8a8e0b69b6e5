"""`python -m cohortium.server.console DIR`: the console's process, which `cohortium serve` starts and looks after."""

from __future__ import annotations

import sys
from pathlib import Path

from cohortium.server.console.running import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
