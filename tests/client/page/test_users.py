"""Guard and courier as two real users: each sees its own, is told what it does not see, and to open nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consortium import Party
from page_worlds import make

from cohortium.client.page.sight import HOLDS, WITHOUT, look, open_site
from cohortium.client.site import give_to, user
from cohortium.common.errors import UsageError

GUARD, COURIER = 5001, 5002
LOOK = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import page_worlds as w
from cohortium.client.page.door import Door
from cohortium.client.page.room import Room
from cohortium.client.page.sight import open_site
room = Room.open(open_site(Path(sys.argv[1])), Door())
world = w.World(party=None, site=room.site, ward=None)
client = w.enter(world, room)
for path in ("/", "/left", "/asked/list", "/ledger", "/policy"):
    shown = client.get(path)
    print(path, shown.status_code, "chmod" in shown.text, "sudo -u" in shown.text)
print("pause", w.act(client, "/pause").status_code, room.site.paused.exists() if room.journal else "")
client.post("/check", data={"csrf": client.csrf})
room.checking.wait(60)
print("modes", [one.word for one in room.checking.found if one.name == "files and modes"])
room.close()
"""


@pytest.fixture(scope="module")
def shared(party: Party) -> Iterator[Any]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become two users")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        made = make(folder, party)
        (folder / "data.parquet").chmod(0o644)
        give_to(made.site, guard=user(str(GUARD)), courier=user(str(COURIER)))
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uid", "pages", "pause"),
    [(GUARD, [200, 200, 403, 200, 200], "303 True"), (COURIER, [200, 403, 403, 403, 200], "403 ")],
)
def test_each_user_sees_its_own(shared: Any, uid: int, pages: list[int], pause: str, tmp_path: Path) -> None:
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", LOOK]
    tests = str(Path(__file__).resolve().parents[2])
    given = {**os.environ, "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*become, str(shared.site.root), tests], capture_output=True, text=True, env=given, cwd="/")
    lines = done.stdout.splitlines()
    assert [int(line.split()[1]) for line in lines[:5]] == pages, done.stderr[-2000:]
    assert not any(line.split()[2] == "True" for line in lines[:5])  # nobody is told to open what is closed
    assert (lines[1].split()[3] == "True") == (uid == COURIER)
    assert lines[5] == f"pause {pause}" and lines[6] == "modes ['ok']"
    for path in (shared.site.guard / "page").iterdir():
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (GUARD, 0o600)
    shared.site.paused.unlink(missing_ok=True)


def test_every_place_has_its_words(tmp_path: Path) -> None:
    assert set(HOLDS) == set(WITHOUT) == {"guard", "courier", "officer"}
    with pytest.raises(UsageError, match="SITE-MISSING"):
        open_site(tmp_path)
    (tmp_path / "officer").mkdir()
    found = look(open_site(tmp_path))  # a machine with the officer's key only
    assert found.sees("officer") and not found.sees("guard")
    assert "is not on this machine" in found.place("guard").sentence()
    assert found.place("guard").fix(tmp_path) == "" and found.place("officer").sentence() == ""
