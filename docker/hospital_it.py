"""What hospital IT and the officer run: one `cohortium site` command, then each directory back to its own user.

    docker compose run --rm it COMMAND /site …

Guard and courier are two users, and neither may read the other's directory; joining, approving and checking need both.
So this container is root, for one command of a person, and has four capabilities: to read across the two directories
(DAC_OVERRIDE) and to give back what it wrote (CHOWN, FOWNER, and FSETID for the socket's directory). The officer's key
stays root's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SITE = Path("/site")


def give_back() -> None:
    from cohortium.client.site import Site, give_to, user

    if (SITE / "guard").is_dir():
        give_to(Site(SITE), guard=user("guard"), courier=user("app"))


def main(arguments: list[str]) -> int:
    try:
        return subprocess.call(["/python/venv/bin/cohortium", "site", *arguments])
    finally:
        give_back()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
