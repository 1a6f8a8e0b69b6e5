"""Every shell line of the README, run as it stands there, in its order, by its own words.

What a reader has to supply is supplied: answers to prompts, a host, ports, a completed study, three more hospitals.
`make demo` and `make test` are the two lines that CI itself runs or stands for; the demo's command is run here.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from parties import HERE, PASSPHRASE, SITES, Parties, free_ports, officer_words, wait_for

ROOT = Path(__file__).resolve().parents[2]
MADE = ("make demo", "make test")
LINES = [
    line.strip()
    for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
NORTH = "Cleveland"
"""The rows of the hospital that the README calls north."""
POLICY = (
    *("--lifetime-epsilon", "9", "--lifetime-delta", "1e-6", "--unit", "patient", "--hospitals", "1"),
    *("--minimum-sites", "4", "--minimum-colluders", "1", "--minimum-patients", "50", "--generator", "mixture"),
    *("--strategy", "secure-sum", "--evaluation", "--officer-passphrase", "env:OFFICER"),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parties]:
    """Somebody with an empty folder, the demo's files where the README has them, and a table of one hospital."""
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    rows = pd.read_parquet(HERE / "data" / "heart.parquet")
    rows[rows["hospital"] == NORTH].to_parquet(tmp_path / "stroke.parquet", index=False)
    monkeypatch.chdir(tmp_path)
    made = Parties(folder=tmp_path, port=free_ports(1)[0])
    try:
        yield made
    finally:
        made.end()


def study(folder: Path, **changes: str) -> None:
    """The demo's study, quick, as a reader completes a draft by hand."""
    text = (HERE / "scenarios" / "demo.toml").read_text("utf-8").replace('"joined"', '"mixture"')
    for old, new in changes.items():
        text = re.sub(rf"(?m)^{old} = \S+", f"{old} = {new}", text)
    (folder / "dictionary.json").write_bytes((HERE / "data" / "heart.schema.json").read_bytes())
    (folder / "study.toml").write_text(re.sub(r"(?m)^dictionary = .*$", 'dictionary = "dictionary.json"', text))


class Walk:
    """Runs one line after the other; `done` is what was run, word for word."""

    def __init__(self, reader: Parties) -> None:
        self.reader, self.done, self.run = reader, [], ""

    def line(self, line: str, *more: str, given: dict[str, str] | None = None, **words: str) -> str:
        """A line with a reader's own words in it and what the prompts would have asked for."""
        self.done.append(line)
        return self.reader.command(*self._words(line, words), *more, given=given)

    def start(self, name: str, line: str, *more: str, **words: str) -> None:
        self.done.append(line)
        self.reader.start(name, *self._words(line, words), *more)

    def _words(self, line: str, words: dict[str, str]) -> list[str]:
        program, *found = shlex.split(line)
        assert program == "cohortium"
        return [words.get(word.replace(".", "_").replace("-", "_").replace("/", "_"), word) for word in found]


def test_every_line_of_the_readme(reader: Parties) -> None:
    walk, lines = Walk(reader), [line for line in LINES if line not in MADE]

    def of(start: str) -> str:
        (found,) = [line for line in lines if line.startswith(f"cohortium {start}")]
        return found

    folder = reader.folder
    reader.command("demo", "--out", "demo-result")
    walk.line(of("study new"))
    with pytest.raises(
        AssertionError, match="STUDY-MISSING"
    ):  # the draft is not complete: the README shows the message
        walk.line(of("study check my-study"))
    study(folder / "my-study")
    reader.command(*walk._words(of("study check my-study"), {}))
    walk.line(of("study check simulations"))
    for start in ("simulate", "report", "sample result -n 100000", "sample result -n 5000"):
        walk.line(of(start))
    assert "Everything holds." in walk.line(of("audit"))
    assert len(pd.read_parquet(folder / "women.parquet")) == 100_000

    _consortium(walk, of, reader)
    assert sorted(walk.done) == sorted(lines), set(lines) - set(walk.done)


def _consortium(walk: Walk, of: Any, reader: Parties) -> None:
    folder = reader.folder
    service, enrol, fleet, superlink = map(str, free_ports(4))
    walk.line(
        of("consortium init"),
        *("--passphrase", "env:ROOT_WORDS", "--service-port", service, "--enrol-port", enrol),
        *("--fleet-port", fleet, "--superlink-port", superlink),
        given={"ROOT_WORDS": PASSPHRASE},
        coordinator_example_org="127.0.0.1",
    )
    (folder / "stroke" / "console.toml").write_text(f"[console]\nport = {reader.port}\n")
    walk.line(of("console user add"), "--password", "env:WORDS", given={"WORDS": "four hospitals and a heart"})
    walk.start("serve", of("serve"))
    reader.ready("serve")
    assert reader.address in reader.command("console", "open", "stroke")

    walk.line(of("sites invite"))
    officer = {"OFFICER": officer_words("north")}
    walk.line(of("site init"), *POLICY, given=officer, _data_stroke_parquet="stroke.parquet")
    walk.start("north", of("site join"))
    rows = pd.read_parquet(HERE / "data" / "heart.parquet")
    others = {name: hospital for name, hospital in SITES.items() if hospital != NORTH}
    for name, hospital in others.items():
        rows[rows["hospital"] == hospital].to_parquet(folder / f"{name}.parquet", index=False)
        reader.command("sites", "invite", "stroke", name)
        words = ("site", "init", f"site-{name}", "--invitation", f"{name}.invitation", "--table", f"{name}.parquet")
        reader.command(*words, *POLICY, given={"OFFICER": officer_words(name)})
        reader.start(name, "site", "join", f"site-{name}")
    for name in ("north", *others):
        reader.ready(name)

    study(folder)
    walk.line(of("run"), "--yes", "--detach")
    (run,) = [path.name for path in (folder / "stroke" / "runs").iterdir() if not path.name.startswith(".")]
    yes = ("--yes", "--officer-passphrase", "env:OFFICER")
    walk.line(of("site approve"), *yes, given=officer, stroke_2026_5f0c11aa=run)
    for name in others:
        reader.command("site", "approve", f"site-{name}", run, *yes, given={"OFFICER": officer_words(name)})
    walk.start("page", of("site page"), "--no-browser")
    wait_for(lambda: "/open?key=" in reader.log("page"), "the page's link")
    result = folder / "stroke" / "runs" / run
    wait_for(lambda: (result / "summary.pdf").exists(), "the run's result", seconds=180)
    assert "Everything holds." in reader.command("audit", result)
    shutil.rmtree(folder / "demo-result")
