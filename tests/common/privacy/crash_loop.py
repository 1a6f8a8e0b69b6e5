"""Run as a script: a release loop on a real ledger, killed with SIGKILL at random moments, then inspected.

Arguments: folder, number of kills, seed of the kill times. Prints one JSON object with what was found. The
loop does what a gate does: reserve, note that the data was read, seal the bytes on disk, record, hand them to
the outbox. Kills are spread over 0 to 4 times what a release takes on this machine right now.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.common.privacy import chain
from cohortium.common.privacy.budget import Event
from cohortium.common.privacy.ledger import Ledger

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EVENT = Event.gaussian(2.0)


def loop(folder: Path, ready: int, times: int | None = None) -> None:
    """Releases for ever. Every third one also uses RUNNING, every second one a late RELEASED line."""
    ledger = Ledger.open(folder / "ledger.db", KEY)
    touched = os.open(folder / "touched", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(ready, b"1")
    while times is None or len(ledger.book.entries) < times:
        number = len(ledger.book.entries)
        name = str(number)
        ledger.reserve(run="r", release_id=name, event=EVENT, count=1, plan_digest="0" * 64, purpose="loop")
        os.write(touched, f"{name}\n".encode())  # from here on the records have been read
        if number % 3 == 0:
            ledger.advance("r", name, "RUNNING")
        data = os.urandom(64)
        (folder / "sealed" / name).write_bytes(data)
        ledger.advance("r", name, "SEALED", hashlib.sha256(data).hexdigest())
        (folder / "outbox" / name).write_bytes(data)
        ledger.advance("r", name, "RELEASED", later=number % 2 == 0)
    ledger.close()


def inspect(folder: Path) -> dict[str, int]:
    """Open after a kill (which recovers) and compare the ledger with what really happened."""
    found = {
        "under": 0,
        "unrecorded": 0,
        "unfinished": 0,
        "double": 0,
        "touched": 0,
        "charged": 0,
        "burned": 0,
    }
    with Ledger.open(folder / "ledger.db", KEY) as ledger:
        book = ledger.book
        touched = (folder / "touched").read_text().split() if (folder / "touched").exists() else []
        found["double"] = len(touched) - len(set(touched))
        found["under"] = sum(("r", name) not in book.entries for name in touched)
        for path in (folder / "outbox").iterdir():
            entry = book.entries.get(("r", path.name))
            data = path.read_bytes()
            good = entry is not None and entry.state in ("SEALED", "RELEASED")
            # A kill during the write leaves a shorter file; the sealed bytes are sent again.
            full = len(data) < 64 or (entry is not None and entry.digest == hashlib.sha256(data).hexdigest())
            found["unrecorded"] += not (good and full)
        found["unfinished"] = sum(e.state in ("RESERVED", "RUNNING") for e in book.entries.values())
        found["burned"] = sum(e.state == "BURNED" for e in book.entries.values())
        found["touched"], found["charged"] = len(set(touched)), len(book.charged_events())
    return found


def main(folder: Path, kills: int, seed: int) -> None:
    """A fresh ledger every 25 kills, so that opening stays quick."""
    times = random.Random(seed)
    total: dict[str, int] = {}
    for batch in range(0, kills, 25):
        for name, value in kill_loop(folder / str(batch), min(25, kills - batch), times).items():
            total[name] = total.get(name, 0) + value
    print(json.dumps({"kills": kills, **total}))


def kill_loop(folder: Path, kills: int, times: random.Random) -> dict[str, int]:
    for name in ("sealed", "outbox"):
        (folder / name).mkdir(parents=True)
    Ledger.create(folder / "ledger.db", "site", KEY).close()
    started = time.monotonic()
    loop(folder, os.open(os.devnull, os.O_WRONLY), 8)
    release_s = (time.monotonic() - started) / 8
    bad = 0
    for _ in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            loop(folder, write)
        os.close(write)
        if times.random() < 0.9:
            os.read(read, 1)  # most kills hit the loop, some the opening itself
        time.sleep(times.random() * 4 * min(0.03, release_s))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(read)
        if not os.WIFSIGNALED(status):
            raise SystemExit("the loop ended by itself")
        found = inspect(folder)
        bad += any(found[name] for name in ("under", "unrecorded", "unfinished", "double"))
    with Ledger.open(folder / "ledger.db", KEY) as ledger:
        ledger.export(folder / "ledger.jsonl")
    chain.replay(chain.read_jsonl(folder / "ledger.jsonl"), owner="site", public=KEY.public_key())
    return found | {"bad": bad}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
