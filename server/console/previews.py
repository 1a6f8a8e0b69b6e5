"""A study's plan and price while it is typed, compiled in a child process that can be ended.

The text may be anything: a dictionary of ten thousand columns would keep a thread busy for minutes, and a thread cannot
be ended. So one child, started with the first preview and kept warm, answers one request after the other; one that
takes too long costs the child its life and is refused. An account has one preview at a time: a newer one sends the
older away unanswered. Equal texts are compiled once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from cohortium.common.errors import CohortiumError, StudyError, UsageError
from cohortium.common.processes import leave_with_parent, parent
from cohortium.common.protocol.messages import digest
from cohortium.server.console.desk import Desk

LIMIT_S = 30.0
"""By the clock: a plan takes a second or two, and several times as long on a machine that runs a study beside it."""
START_S = 90.0
"""A child loads its libraries once, which takes seconds, and longer on a machine that is busy."""
IDLE_S = 600.0
MOST_STUDY, MOST_DICTIONARY = 100_000, 900_000
"""Characters of the two texts."""
MOST_COLUMNS = 1500
MOST_CELLS = 400_000
"""Fine codes of all columns together: the first question has one number for each."""
MOST_BYTES = 12_000_000_000
"""Address space of the child."""
MOST_DOTS = 300
"""In one line of study.toml: the reader's time grows with the square of a key's parts, a minute for 100 kB."""
DOTTED = f"not TOML that people write: a line has more than {MOST_DOTS} dots"
KEPT = 64
FILE = "dictionary.json"
"""What a study in the console calls its dictionary: any other path would have this machine read a file of its own."""

Facts = dict[str, Any]
"""{"error": as CohortiumError.as_json()} or what `compiled` gives."""


class Previews:
    """Threads may share it; `close` ends the child."""

    def __init__(self, *, limit_s: float = LIMIT_S, command: Sequence[str] = ()) -> None:
        self.limit_s = limit_s
        self._command = list(command) or [sys.executable, "-m", "cohortium.server.console.previews"]
        self._child: subprocess.Popen[bytes] | None = None
        self._busy, self._guard = threading.Lock(), threading.Lock()
        self._turn: dict[str, int] = {}
        self._kept: OrderedDict[str, Facts] = OrderedDict()

    def of(
        self,
        account: str,
        study: str,
        dictionary: str,
        *,
        sites: Sequence[str] = (),
        hospitals: int | None = None,
        plan: str = "",
        accept_guessed: bool = False,
    ) -> Facts | None:
        """The facts, or None where a newer request of this account has come meanwhile.

        study: the text of study.toml. sites: who is enrolled. hospitals: compile for so many, whoever they are.
        plan: JSON of a signed plan,
        to be told and not compiled again.
        """
        if len(study) > MOST_STUDY or len(dictionary) > MOST_DICTIONARY:
            return _refused("PREVIEW-SIZE", "the study or its dictionary is too long", hint="a dictionary below 900 kB")
        if too_dotted(study):
            return _refused("STUDY-TOML", DOTTED, hint="correct this line")
        asked = {
            "study": study,
            "dictionary": dictionary,
            "sites": list(sites),
            "hospitals": hospitals,
            "plan": plan,
            "accept_guessed": accept_guessed,
        }
        line = json.dumps(asked).encode()
        name = digest(line)
        with self._guard:
            self._turn[account] = mine = self._turn.get(account, 0) + 1
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        until = time.monotonic() + self.limit_s + START_S
        while not self._busy.acquire(timeout=0.05):
            if self._turn[account] != mine:
                return None
            if time.monotonic() > until:
                return _refused("PREVIEW-BUSY", "other previews take their time", hint="try again in a moment")
        try:
            if self._turn[account] != mine:
                return None
            found = self._ask(line)
        finally:
            self._busy.release()
        with self._guard:
            if found.get("error", {}).get("error") != "PREVIEW-START":
                self._kept[name] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def warm(self) -> None:
        """Start the child in the background, so that it is there when somebody has typed."""

        def start() -> None:
            if self._busy.acquire(blocking=False):
                try:
                    self._started()
                finally:
                    self._busy.release()

        if self._child is None or self._child.poll() is not None:
            threading.Thread(target=start, daemon=True).start()

    def close(self) -> None:
        child, self._child = self._child, None
        _end(child)

    def _started(self) -> subprocess.Popen[bytes] | None:
        child = self._child
        if child is not None and child.poll() is None:
            return child
        _end(child)
        self._child = child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **parent(), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        if _line(child, START_S) is None:
            self.close()
            return None
        return child

    def _ask(self, line: bytes) -> Facts:
        answer = None
        for _ in range(2):  # one that has just left because nobody asked is started again
            child = self._started()
            if child is None or child.stdin is None:
                return _refused("PREVIEW-START", "the preview's process did not start", hint="see the console's log")
            began = time.monotonic()
            try:
                child.stdin.write(line + b"\n")
                child.stdin.flush()
                answer = _line(child, self.limit_s)
            except OSError:
                answer = None
            if answer is not None:
                return answer
            late = time.monotonic() - began >= self.limit_s
            self.close()
            if late:
                return _refused(
                    "PREVIEW-TIME",
                    f"the plan was not compiled within {self.limit_s:g} seconds",
                    hint="fewer columns, or fewer levels; `cohortium study check` has no limit",
                )
        return _refused("PREVIEW-ENDED", "compiling this study ended the process", hint="fewer columns or levels")


def too_dotted(study: str) -> bool:
    return any(line.count(".") > MOST_DOTS for line in study.split("\n"))


def _line(child: subprocess.Popen[bytes], within_s: float) -> Facts | None:
    """The child's next line; None where it does not come in time or the child ends."""
    assert child.stdout is not None
    until, parts = time.monotonic() + within_s, bytearray()
    place = child.stdout.fileno()
    while not parts.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([place], [], [], left)[0]:
            return None
        some = os.read(place, 1 << 16)
        if not some:
            return None
        parts += some
    found: Facts = json.loads(parts)
    return found


def _end(child: subprocess.Popen[bytes] | None) -> None:
    if child is None:
        return
    child.kill()  # it holds nothing
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


def _refused(code: str, sentence: str, *, hint: str) -> Facts:
    return {"error": UsageError(code, sentence, hint=hint).as_json()}


# ---- in the child -------------------------------------------------------------------------------------------


def compiled(asked: Facts, folder: Path) -> Facts:
    """Plan, price and cost of one study. folder: an empty place for its dictionary. Raises CohortiumError."""
    from cohortium.common.privacy.plan import Plan
    from cohortium.common.study import Study
    from cohortium.server.cli import plan_facts
    from cohortium.server.console.study_view import column_rows
    from cohortium.server.cost import forecast, load_machine
    from cohortium.server.cost_shape import planned, shape_of
    from cohortium.server.planning import plan_for

    refuse_paths(asked["study"])
    (folder / FILE).write_text(asked["dictionary"], encoding="utf-8")
    study = Study.parse(asked["study"], folder=folder)
    if not asked["accept_guessed"]:
        study.refuse_guesses()
    refuse_large(study)
    shape = None
    if asked["plan"]:
        plan = Plan.loads(asked["plan"])
        again, generator, public = plan_for(study, plan.sites, noise=plan.private)
        # Another version of the program may compile it otherwise: what was signed is told, and no forecast for it.
        if again.digest == plan.digest:
            shape = shape_of(study, plan, generator, public)
    else:
        made = planned(study, sites=asked["hospitals"] or sites_of(study, asked["sites"]))
        plan, shape = made.plan, made.shape
    cost = None
    if shape is not None:
        said = forecast(plan, shape, load_machine(), patients=study.patients)
        cost = {**said.to_json(), "exchanges": said.exchanges}
    return {
        "plan": plan_facts(plan),
        "cost": cost,
        "sites": list(plan.sites),
        "dictionary": column_rows(study.schema),
        "study": {
            "id": study.id,
            "title": study.title,
            "target": study.target,
            "patients": study.patients,
            "columns": len(study.schema.modelled),
            "identifiers": len(study.schema.columns) - len(study.schema.modelled),
            "guessed": list(study.schema.guessed),
            "auto": study.generator.name == "auto",
            "epsilon": study.privacy.epsilon,
            "evaluation": None if study.evaluation is None else study.evaluation.epsilon,
            "holdout": None if study.evaluation is None else study.evaluation.holdout,
            "hospitals": study.privacy.hospitals_per_patient,
            "rows": study.release.rows,
        },
    }


def refuse_paths(text: str) -> None:
    """StudyError unless the study calls its dictionary dictionary.json: nothing else of this machine is read."""
    from cohortium.common.toml_reader import TomlFile

    file = TomlFile.parse(text, where="study.toml")
    part = file.section("study", "title, dictionary")
    named = part.text("dictionary", example=f'dictionary = "{FILE}"')
    if named != FILE:
        raise part.error(
            "dictionary", "a study in the console keeps its dictionary beside it", f'dictionary = "{FILE}"'
        )


def refuse_large(study: Any) -> None:
    from cohortium.common.encoding import grids

    columns = len(study.schema.modelled)
    if columns > MOST_COLUMNS:
        raise StudyError(
            "PREVIEW-COLUMNS",
            f"{columns:,} columns, and the console compiles {MOST_COLUMNS:,} at most",
            where=(FILE,),
            hint="[study] exclude = [...], or cohortium study check in a terminal",
        )
    cells = sum(grid.size for grid in grids(study.schema))
    if cells > MOST_CELLS:
        raise StudyError(
            "PREVIEW-LEVELS",
            f"{cells:,} levels and cells of numbers, and the console compiles {MOST_CELLS:,} at most",
            where=(FILE,),
            hint="fewer levels: group rare ones, or leave columns out",
        )


def sites_of(study: Any, enrolled: Sequence[str]) -> Sequence[str]:
    """Whom the study asks: those it names, else all that are enrolled (consortium.Consortium.sites_of)."""
    names: Sequence[str] = study.sites or enrolled
    missing = [name for name in names if name not in enrolled]
    if missing or not names:
        raise UsageError(
            "CONSORTIUM-SITES",
            f"not enrolled: {', '.join(missing[:12])}" if missing else "no site is enrolled yet",
            hint="invite it on the page Sites, or say above for how many hospitals to compile",
        )
    return names


def _answer(line: bytes) -> Facts:
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return _finite(compiled(json.loads(line), Path(folder)))
            except CohortiumError as error:
                facts = error.as_json()
                # The folder is nobody's business: "dictionary.json:age", as where the two files lie side by side.
                return {"error": json.loads(json.dumps(facts).replace(json.dumps(folder + "/")[1:-1], ""))}
    except MemoryError:
        return _refused("PREVIEW-MEMORY", "the plan needs more memory than a preview may have", hint="fewer columns")
    except Exception as error:
        return _refused("INTERNAL", f"compiling failed ({type(error).__name__}): our bug, not yours", hint="tell us")


def _finite(value: Any) -> Any:
    """Plain JSON: an infinite ε is the text "inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    import resource

    leave_with_parent()
    os.nice(5)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import cohortium.server.cost_shape  # noqa: F401  what takes long to load, before it says that it is ready

    questions = sys.stdin.buffer
    answers.write(b'{"ready": true}\n')
    answers.flush()
    while select.select([questions.fileno()], [], [], IDLE_S)[0]:
        line = questions.readline()
        if not line:
            break
        answers.write(json.dumps(_answer(line), allow_nan=False).encode() + b"\n")
        answers.flush()
    return 0


# ---- one a desk ---------------------------------------------------------------------------------------------

_OF: WeakKeyDictionary[Desk, Previews] = WeakKeyDictionary()
_OF_LOCK = threading.Lock()


def previews_of(desk: Desk) -> Previews:
    with _OF_LOCK:
        if desk not in _OF:
            _OF[desk] = Previews()
        return _OF[desk]


def close_previews(desk: Desk) -> None:
    with _OF_LOCK:
        found = _OF.pop(desk, None)
    if found is not None:
        found.close()


if __name__ == "__main__":
    sys.exit(main())
