"""The script of the docs, run as it stands: a coordinator and four hospitals as separate processes under separate
users, real TLS on loopback, and at the end the byte-identical table that `cohortium simulate` gives."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "consortium-on-one-machine.sh"
PARTIES = ("coord", "guard", "courier")


def first_of_four_free_ports() -> int:
    for first in range(21_440, 31_000, 40):
        try:
            for port in range(first, first + 4):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError("no four free ports in a row")


def where_everybody_may_run_python(command: list[str]) -> list[str]:
    """A mount namespace in which other users reach this interpreter, where it lies in a home directory of root's."""
    real = Path(sys.executable).resolve()
    closed = [parent for parent in real.parents if parent != Path("/") and not parent.stat().st_mode & 0o001]
    if not closed:
        return command
    home = closed[-1]
    keep = home / real.relative_to(home).parts[0]
    inside = (
        f"set -e; mount --make-rprivate /; held=$(mktemp -d); mount --bind {keep} $held; "
        f'mount -t tmpfs -o mode=0755 tmpfs {home}; mkdir -p {keep}; mount --bind $held {keep}; exec "$@"'
    )
    return ["unshare", "--mount", "bash", "-c", inside, "bash", *command]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_of_the_docs() -> None:
    # Not below pytest's own folder: another session that starts takes the parties' way through it.
    with tempfile.TemporaryDirectory(prefix="cohortium-", ignore_cleanup_errors=True) as folder:
        _run_the_script(Path(folder))


def _run_the_script(tmp_path: Path) -> None:
    work = tmp_path / "try"
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)  # the parties' users pass through
    # The demo's study with 8 rounds of DP-SGD instead of 40: everything else is as it stands there.
    here = Path(str(resources.files("cohortium.simulations")))
    text = (here / "scenarios" / "demo.toml").read_text("utf-8")
    text = text.replace("../data/heart.schema.json", str(here / "data" / "heart.schema.json"))
    quick = re.sub(r'(?m)^(name = "secure-sum")$', r"\1\nrounds = 8", text)
    assert quick != text
    study = tmp_path / "study.toml"
    study.write_text(quick, encoding="utf-8")
    study.chmod(0o644)
    environment = {
        **os.environ,
        "COHORTIUM_TRY_STUDY": str(study),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COHORTIUM_TRY_PORTS": str(first_of_four_free_ports()),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(SCRIPT), str(work)]
    if os.getuid() == 0:
        command = where_everybody_may_run_python(command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    said = f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert "byte for byte" in done.stdout, said
    results = list((work / "coordinator" / "try" / "runs").iterdir())
    assert len(results) == 1
    ours, simulated = results[0] / "synthetic.csv", work / "simulated" / "synthetic.csv"
    assert ours.read_bytes() == simulated.read_bytes() and ours.stat().st_size > 10_000
    if os.getuid() == 0:
        # Nine users: the coordinator's and, at each hospital, the guard's and the courier's.
        sites = [path.parent for path in work.glob("*/site")]
        owners = {
            (work / "coordinator" / "try").stat().st_uid,
            *(part.stat().st_uid for site in sites for part in (site / "site" / "guard", site / "site" / "courier")),
        }
        assert len(sites) == 4 and len(owners) == 9 and 0 not in owners


def test_a_hospital_needs_three_commands() -> None:
    """What the script does at one hospital: init, join, approve."""
    text = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    assert re.findall(r"^\s*cohortium site (\w+)", text, re.MULTILINE) == ["init", "join", "approve"]


def test_the_script_is_sound() -> None:
    assert shutil.which("bash")
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
