from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cohortium.common.errors import Refused
from cohortium.server.driving import driving, has_ended


def test_it_lives_and_it_has_ended(tmp_path: Path) -> None:
    assert not has_ended(tmp_path, 5), "nobody took it yet"
    with driving(tmp_path, 5):
        assert not has_ended(tmp_path, 5)
    assert has_ended(tmp_path, 5) and not has_ended(tmp_path, 55), "the attempt, not a part of its number"
    with driving(tmp_path, 6):
        assert not has_ended(tmp_path, 5), "a later attempt has the run: the first is not asked about"
    assert has_ended(tmp_path, 6) and not has_ended(tmp_path, 5)


def test_two_do_not_drive_one_run(tmp_path: Path) -> None:
    with driving(tmp_path, 1), pytest.raises(Refused) as caught, driving(tmp_path, 2, wait_s=0.2):
        raise AssertionError
    assert caught.value.code == "RUN-DRIVEN"
    assert has_ended(tmp_path, 1), "who was refused has written nothing"


def test_a_killed_process_is_noticed_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cohortium.server.driving import driving\n"
        "with driving(Path(sys.argv[1]), 9): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    assert not has_ended(tmp_path, 9)
    process.kill()
    process.wait()
    process.stdout.close()
    assert has_ended(tmp_path, 9)
