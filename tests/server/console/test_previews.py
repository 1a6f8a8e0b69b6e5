"""The preview says what `study check` says, and a hostile text costs a child its life and the console nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small import DICTIONARY, small_study
from typer.testing import CliRunner

from cohortium.server.console import previews as work
from cohortium.server.console.previews import MOST_CELLS, MOST_COLUMNS, MOST_DICTIONARY, Previews

SITES = ("x", "y", "z")


@pytest.fixture(scope="module")
def real() -> Iterator[Previews]:
    made = Previews(limit_s=20.0)
    yield made
    made.close()


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    path, _ = small_study(tmp_path / "s", epsilon=3.0, evaluation="[evaluation]\nepsilon = 1.0\nholdout = 0.2\n")
    return path.read_text(), (path.parent / "dictionary.json").read_text()


def columns(count: int, levels: int = 2) -> str:
    """A dictionary of so many columns beside the unit and the target."""
    enum = [str(level) for level in range(levels)]
    more = [{"name": f"c{i}", "type": "string", "constraints": {"enum": enum}} for i in range(count)]
    fields = [DICTIONARY["fields"][0], {"name": "smoker", "type": "boolean"}, *more]
    return json.dumps({"name": "wide", "missingValues": [""], "fields": fields})


def code(facts: Any) -> str:
    return str(facts["error"]["error"])


# ---- what it says -------------------------------------------------------------------------------------------


def test_it_says_what_study_check_says(real: Previews, texts: tuple[str, str], tmp_path: Path) -> None:
    from cohortium.simulations.cli import app

    (tmp_path / "study.toml").write_text(texts[0])
    (tmp_path / "dictionary.json").write_text(texts[1])
    facts = real.of("ada", *texts, hospitals=3)
    found = CliRunner().invoke(app, ["study", "check", str(tmp_path / "study.toml"), "--sites", "3", "--json"])
    told = json.loads(found.stdout)
    assert facts is not None
    cost = told.pop("cost")
    exchanges = told.pop("exchanges")
    assert facts["plan"] == told and facts["cost"] == {**cost, "exchanges": exchanges}
    assert facts["plan"]["statement"].startswith("(3.000, 1e-06)")
    assert [row["name"] for row in facts["dictionary"]] == [field["name"] for field in DICTIONARY["fields"]]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("epsilon = 3.0", "epsilon = 'three'"),
        ("delta = 1e-6", ""),
        ("epsilon = 3.0", "epsilom = 3.0"),
        ("survivors = 2", "survivors = 99"),
        ('unit = "id"', 'unit = "nobody"'),
        ("[release]", "[release"),
    ],
)
def test_its_errors_are_those_of_study_check(
    real: Previews, texts: tuple[str, str], tmp_path: Path, was: str, now: str
) -> None:
    from cohortium.simulations.cli import app

    study = texts[0].replace(was, now, 1)
    assert study != texts[0]
    (tmp_path / "study.toml").write_text(study)
    (tmp_path / "dictionary.json").write_text(texts[1])
    found = CliRunner().invoke(app, ["study", "check", str(tmp_path / "study.toml"), "--sites", "3", "--json"])
    said = json.loads(found.stdout or found.output)
    facts = real.of("ada", study, texts[1], hospitals=3)
    assert facts is not None
    assert json.dumps(facts["error"]) == json.dumps(said).replace(f"{tmp_path}/", "")
    assert all(place.startswith("study.toml") for place in facts["error"]["where"])


def test_a_signed_plan_is_told_as_it_was_signed(real: Previews, texts: tuple[str, str], tmp_path: Path) -> None:
    """A later version of the program may compile another plan: what hospitals approved is shown."""
    from cohortium.common.study import Study
    from cohortium.server.planning import plan_for

    (tmp_path / "dictionary.json").write_text(texts[1])
    study = Study.parse(texts[0], folder=tmp_path)
    plan = plan_for(study, SITES)[0]
    value = plan.to_json()
    louder = {**value, "stages": [{**s, "noise_multiplier": (50.0).hex()} for s in value["stages"]]}
    facts = real.of("ada", *texts, plan=json.dumps(louder))
    assert facts is not None and {s["noise_multiplier"] for s in facts["plan"]["stages"]} == {50.0}
    assert facts["plan"]["epsilon"]["add-remove"]["1"] < 1.0 and facts["cost"] is None
    facts = real.of("ada", *texts, plan=json.dumps(value))
    assert facts is not None and facts["plan"]["plan"] == plan.digest and facts["cost"]["exchanges"] > 0


def test_whom_it_asks(real: Previews, texts: tuple[str, str]) -> None:
    facts = real.of("ada", *texts, sites=SITES)
    assert facts is not None and facts["sites"] == list(SITES)
    assert code(real.of("ada", *texts)) == "CONSORTIUM-SITES"
    named = texts[0] + '\n[sites]\nnames = ["x", "y", "stranger"]\n'
    facts = real.of("ada", named, texts[1], sites=SITES)
    assert code(facts) == "CONSORTIUM-SITES" and facts is not None and "stranger" in facts["error"]["sentence"]


# ---- hostile texts ------------------------------------------------------------------------------------------


def test_no_other_file_of_this_machine_is_read(real: Previews, texts: tuple[str, str], tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(texts[1])
    for path in (str(secret), "../secret.json", "/etc/hostname"):
        study = texts[0].replace('dictionary = "dictionary.json"', f'dictionary = "{path}"')
        facts = real.of("ada", study, texts[1], sites=SITES)
        assert facts is not None and code(facts) == "STUDY-VALUE" and "dictionary.json" in facts["error"]["fix"]


def test_a_dictionary_beyond_the_limits_is_refused_at_once(real: Previews, texts: tuple[str, str]) -> None:
    fine = real.of("ada", texts[0], columns(40), sites=SITES)
    assert fine is not None and "plan" in fine
    began = time.monotonic()
    assert code(real.of("ada", texts[0], columns(10_000), sites=SITES)) == "PREVIEW-COLUMNS"
    assert code(real.of("ada", texts[0], columns(MOST_COLUMNS), sites=SITES)) == "PREVIEW-COLUMNS"
    assert time.monotonic() - began < 15
    assert code(real.of("ada", texts[0], "x" * (MOST_DICTIONARY + 1), sites=SITES)) == "PREVIEW-SIZE"
    assert code(real.of("ada", "[a]\n" + "a." * 40_000 + "b = 1", texts[1], sites=SITES)) == "STUDY-TOML"
    assert code(real.of("ada", texts[0], "[" * 100_000, sites=SITES)) == "DICT-JSON"
    assert code(real.of("ada", texts[0], '{"fields": [1e999]}', sites=SITES)).startswith("DICT-")
    # A range of 10⁹ whole numbers is one column of some hundred cells.
    wide = json.dumps(DICTIONARY).replace('"maximum": 99', '"maximum": 999999999')
    facts = real.of("ada", texts[0], wide, sites=SITES)
    assert facts is not None and "plan" in facts
    assert MOST_CELLS < 10**6


def test_what_takes_too_long_ends_the_child(real: Previews, texts: tuple[str, str]) -> None:
    """A hundred thousand levels, the last one twice: looking for it compares each with all before."""
    levels = [f"{i:x}" for i in range(90_000)]
    field = {"name": "c", "type": "string", "constraints": {"enum": [*levels, levels[-1]]}}
    bad = json.dumps({"name": "n", "fields": [DICTIONARY["fields"][0], field]}, separators=(",", ":"))
    assert len(bad) < MOST_DICTIONARY
    real.warm()
    assert code(real.of("ada", texts[0].replace("1e-6", "2e-6"), texts[1], sites=SITES)) == "STUDY-VALUE"
    child = real._child
    assert child is not None
    real.limit_s, began = 1.0, time.monotonic()
    assert code(real.of("ada", texts[0], bad, sites=SITES)) == "PREVIEW-TIME"
    assert time.monotonic() - began < 3.0
    assert child.poll() is not None and not psutil.pid_exists(child.pid), "nothing goes on computing"
    began = time.monotonic()
    assert code(real.of("ada", texts[0], bad, sites=SITES)) == "PREVIEW-TIME"
    assert time.monotonic() - began < 0.1, "the same text again is not tried again"


# ---- one at a time ------------------------------------------------------------------------------------------

ECHO = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    time.sleep(float(asked["study"].split()[0]))
    if "die" in asked["study"]: sys.exit(3)
    print(json.dumps({"told": asked["study"]}), flush=True)
"""


@pytest.fixture
def echo() -> Iterator[Previews]:
    made = Previews(limit_s=5.0, command=[sys.executable, "-c", ECHO])
    yield made
    made.close()


def test_a_newer_request_sends_the_older_away(echo: Previews) -> None:
    found: dict[str, Any] = {}

    def ask(name: str, account: str, study: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: echo.of(account, study, "")}))
        thread.start()
        time.sleep(0.15)
        return thread

    threads = [
        ask("first", "ada", "0.8 a"),
        ask("second", "ada", "0 b"),
        ask("other", "kim", "0 c"),
        ask("third", "ada", "0 d"),
    ]
    for thread in threads:
        thread.join(10)
    assert found["second"] is None, "nobody waits for it any more"
    assert found["third"] == {"told": "0 d"} and found["other"] == {"told": "0 c"}, "another account's stays"


def test_equal_texts_are_compiled_once(echo: Previews) -> None:
    began = time.monotonic()
    first = echo.of("ada", "0.4 x", "d")
    assert time.monotonic() - began >= 0.4
    echo.close()  # whatever is told now is not told by a child
    began = time.monotonic()
    assert echo.of("kim", "0.4 x", "d") == first and time.monotonic() - began < 0.1
    assert echo._child is None
    assert echo.of("kim", "0.4 x", "other") == first and echo._child is not None, "another dictionary is another text"


def test_a_child_that_dies_is_an_error_and_not_the_end(echo: Previews) -> None:
    assert code(echo.of("ada", "0 die", "")) == "PREVIEW-ENDED"
    assert echo.of("ada", "0 fine", "") == {"told": "0 fine"}


def test_a_child_that_does_not_start_is_an_error() -> None:
    made = Previews(command=[sys.executable, "-c", "raise SystemExit(1)"])
    assert code(made.of("ada", "x", "y")) == "PREVIEW-START"


def test_the_child_leaves_with_the_console(tmp_path: Path) -> None:
    """A console that is killed leaves no process behind."""
    import subprocess

    script = (
        "import os, sys\nfrom cohortium.server.console.previews import Previews\n"
        "p = Previews(command=[sys.executable, '-c', 'from cohortium.common.processes import leave_with_parent; "
        'leave_with_parent(); print("{}", flush=True); import time; time.sleep(60)\'])\n'
        "p._started(); print(p._child.pid, flush=True); os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid, until = int(done.stdout), time.monotonic() + 8
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_an_infinite_price_is_plain_json() -> None:
    assert work._finite({"a": [float("inf"), 1.0, {"b": float("nan")}]}) == {"a": ["inf", 1.0, {"b": "nan"}]}
