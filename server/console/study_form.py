"""A study as a form: what people type becomes the text of study.toml, and back where the form can say all of it.

Nothing has a default that decides about privacy: a field that is left empty is a line that the file lacks, and the
file's own check says what is missing. What is typed into a number's field is written as a number only where it is
one; anything else becomes a text in quotes, so that nobody writes other lines through a field.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import Refused, UsageError
from cohortium.common.modes import make_private
from cohortium.common.study import GENERATORS, SERVER_STEPS, STRATEGIES, toml_text
from cohortium.server.console.jobs import digest_of
from cohortium.server.console.previews import DOTTED, FILE, MOST_DICTIONARY, MOST_STUDY, too_dotted

NAME = r"[a-z0-9][a-z0-9-]{0,63}"
MOST_DRAFTS = 200
MOST_FIELD = 2000
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One setting. section, key: its place in study.toml. kind: text, number, list, or the choices."""

    name: str
    section: str
    key: str
    title: str
    hint: str = ""
    kind: str = "text"
    choices: tuple[tuple[str, str], ...] = ()
    only: str = ""
    """The strategy that has this setting."""


def _chosen(first: str, *known: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("", first), *known)


_TOLD = {
    "auto": "auto: by the public rule (ε, patients, columns)",
    "mixture": "mixture: two rounds, for small ε or few patients",
    "autoregressive": "autoregressive: a network by DP-SGD",
    "joined": "joined: mixture and network",
    "secure-sum": "secure-sum: nobody sees one hospital's answer",
    "local": "local: each hospital's answer is private by itself",
}
_GENERATORS = tuple((name, _TOLD.get(name, name)) for name in GENERATORS)
FIELDS: tuple[Field, ...] = (
    Field(name="id", section="study", key="id", title="Short name", hint="small letters, digits and dashes"),
    Field(name="title", section="study", key="title", title="Title: what the study is for"),
    Field(name="target", section="study", key="target", title="Target column", hint="may be empty"),
    Field(
        name="patients",
        section="study",
        key="patients",
        title="Patients, roughly",
        kind="number",
        hint="a public figure, of all hospitals together: never a count of today's records",
    ),
    Field(
        name="rows_per_patient",
        section="study",
        key="rows_per_patient",
        title="Rows of a patient that count in full",
        kind="number",
        hint="may be empty: one",
    ),
    Field(name="exclude", section="study", key="exclude", title="Columns left out", kind="list", hint="with commas"),
    Field(name="epsilon", section="privacy", key="epsilon", title="ε of the whole study", kind="number"),
    Field(name="delta", section="privacy", key="delta", title="δ", kind="number", hint="such as 1e-6"),
    Field(
        name="delta_reason",
        section="privacy",
        key="delta_reason",
        title="Why δ is above 1e-6",
        hint="only where it is",
    ),
    Field(
        name="unit",
        section="privacy",
        key="unit",
        title="Whose privacy: the column that names the patient",
        hint="or row, where each row is another patient",
    ),
    Field(
        name="adjacency",
        section="privacy",
        key="adjacency",
        title="Neighbouring tables",
        choices=_chosen("choose", ("add-remove", "add-remove: with or without one patient")),
    ),
    Field(
        name="hospitals_per_patient",
        section="privacy",
        key="hospitals_per_patient",
        title="Hospitals that one patient may be in",
        kind="number",
        hint="the budget holds for that many",
    ),
    Field(name="generator", section="generator", key="name", title="Generator", choices=_GENERATORS),
    Field(
        name="strategy",
        section="strategy",
        key="name",
        title="Trust mode",
        choices=_chosen("choose", *((name, _TOLD[name]) for name in STRATEGIES)),
    ),
    Field(
        name="survivors",
        section="strategy",
        key="survivors",
        title="Survivors: hospitals that must stay in a round",
        kind="number",
        only="secure-sum",
    ),
    Field(
        name="colluders",
        section="strategy",
        key="colluders",
        title="Colluders: hospitals that may side with the coordinator",
        kind="number",
        only="secure-sum",
    ),
    Field(name="rounds", section="strategy", key="rounds", title="DP-SGD rounds", kind="number", hint="may be empty"),
    Field(
        name="local_steps",
        section="strategy",
        key="local_steps",
        title="Steps at a hospital in one round",
        kind="number",
        only="local",
        hint="may be empty: one",
    ),
    Field(
        name="server_step",
        section="strategy",
        key="server_step",
        title="Server step",
        choices=_chosen("as it is", *((name, name) for name in SERVER_STEPS)),
        only="local",
    ),
    Field(
        name="evaluation_epsilon",
        section="evaluation",
        key="epsilon",
        title="ε of the evaluation",
        kind="number",
        hint="held-out patients pay it; empty: nobody is held out",
    ),
    Field(
        name="holdout",
        section="evaluation",
        key="holdout",
        title="Share of patients held out",
        kind="number",
        hint="such as 0.2",
    ),
    Field(name="rows", section="release", key="rows", title="Rows of the synthetic table", kind="number"),
    Field(
        name="sites",
        section="sites",
        key="names",
        title="Hospitals asked",
        kind="list",
        hint="with commas; empty: all that are enrolled",
    ),
)
GROUPS: tuple[tuple[str, str], ...] = (
    ("study", "What the study is"),
    ("privacy", "Privacy: no setting has a default"),
    ("strategy", "Trust: what the hospitals need not believe"),
    ("generator", "Generator"),
    ("evaluation", "Evaluation on held-out patients"),
    ("release", "What is published"),
    ("sites", "Hospitals"),
)
EMPTY: Mapping[str, str] = {field.name: "auto" if field.name == "generator" else "" for field in FIELDS}
_SECTIONS = ("study", "privacy", "generator", "strategy", "evaluation", "release", "sites")
_NEEDED = ("study", "privacy", "generator", "strategy", "release")


def toml_of(values: Mapping[str, str]) -> str:
    """study.toml as the form says it. Optional sections are there where one of their fields is filled."""
    lines: list[str] = []
    for section in _SECTIONS:
        own = [line for field in FIELDS if field.section == section and (line := _line(field, values))]
        if not own and section not in _NEEDED:
            continue
        lines += [f"[{section}]", *own]
        if section == "study":
            lines.append(f"dictionary = {toml_text(FILE)}")
        lines.append("")
    return "\n".join(lines)


def _line(field: Field, values: Mapping[str, str]) -> str:
    text = " ".join(values.get(field.name, "")[:MOST_FIELD].split())
    if not text or (field.only and values.get("strategy", "") not in ("", field.only)):
        return ""
    if field.kind == "list":
        return f"{field.key} = {toml_text([part.strip() for part in text.split(',') if part.strip()])}"
    if field.kind == "number" and _NUMBER.fullmatch(text):
        return f"{field.key} = {text}"
    return f"{field.key} = {toml_text(_plain(text))}"


def _plain(text: str) -> str:
    """Without characters that no TOML file may hold."""
    return "".join(ch if ch.isprintable() else "\ufffd" for ch in text)


def values_of(text: str) -> dict[str, str] | None:
    """The form's fields for a study.toml, or None where the form cannot say all that it says."""
    try:
        data = parsed(text)
    except ValueError:
        return None
    values = {field.name: "" for field in FIELDS}
    for field in FIELDS:
        section = data.get(field.section, {})
        if not isinstance(section, dict) or field.key not in section:
            continue
        value = section[field.key]
        if field.kind == "list":
            if not isinstance(value, list) or not all(isinstance(v, str) and "," not in v for v in value):
                return None
            values[field.name] = ", ".join(value)
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        else:
            values[field.name] = str(value)
    try:
        return values if tomllib.loads(toml_of(values)) == data else None
    except ValueError:
        return None


# ---- drafts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A study that was not proposed yet, as it was typed: it need not be complete. at: seconds since 1970."""

    name: str
    study: str
    dictionary: str
    by: str
    at: float

    @property
    def digest(self) -> str:
        return digest_of(self.study, self.dictionary)

    @property
    def title(self) -> str:
        return head_of(self.study)[1]


class Drafts:
    """CONSORTIUM/console/studies/NAME/{study.toml, dictionary.json, draft.json}."""

    def __init__(self, root: Path, *, clock: Callable[[], float]) -> None:
        self.root, self._clock = root, clock

    def all(self) -> list[Draft]:
        """By name."""
        if not self.root.is_dir():
            return []
        names = sorted(path.name for path in self.root.iterdir() if re.fullmatch(NAME, path.name))
        return [draft for name in names if (draft := self._read(name)) is not None]

    def draft(self, name: str) -> Draft:
        """Refused DRAFT-UNKNOWN."""
        found = self._read(name) if re.fullmatch(NAME, name) else None
        if found is None:
            raise Refused("DRAFT-UNKNOWN", "there is no such draft")
        return found

    def _read(self, name: str) -> Draft | None:
        folder = self.root / name
        try:
            about = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
            # As bytes: to the digest, which people agree on, another end of line is another text.
            study, dictionary = ((folder / file).read_bytes().decode("utf-8") for file in ("study.toml", FILE))
            return Draft(name=name, study=study, dictionary=dictionary, by=str(about["by"]), at=float(about["at"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, study: str, dictionary: str, *, by: str, base: str = "") -> Draft:
        """Keep a draft under its study's id. base: digest of the draft that was edited, "" for a new one.

        UsageError DRAFT-NAME, PREVIEW-SIZE; Refused DRAFT-CHANGED (somebody saved another text meanwhile), DRAFT-FULL.
        """
        if len(study) > MOST_STUDY or len(dictionary) > MOST_DICTIONARY:
            raise UsageError(
                "PREVIEW-SIZE", "the study or its dictionary is too long", hint="a dictionary below 900 kB"
            )
        name = head_of(study)[0]
        if too_dotted(study):
            raise UsageError("STUDY-TOML", DOTTED, where=("study.toml",), hint="correct this line")
        if not re.fullmatch(NAME, name):
            raise UsageError(
                "DRAFT-NAME",
                "the draft needs a short name: small letters, digits and dashes",
                where=("study.toml",),
                hint='[study] id = "stroke-2026"',
            )
        known = self._read(name)
        if known is not None and known.digest not in (base, digest_of(study, dictionary)):
            raise Refused(
                "DRAFT-CHANGED",
                f"there is another draft called {name}, or somebody changed it meanwhile",
                hint="open the draft and put your changes into it, or take another short name",
            )
        if known is None and len(self.all()) >= MOST_DRAFTS:
            raise Refused("DRAFT-FULL", f"there are {MOST_DRAFTS} drafts already", hint="remove some")
        folder = self.root / name
        make_private(self.root)
        make_private(folder)
        about = json.dumps({"by": by, "at": self._clock()})
        for file, text in (("study.toml", study), (FILE, dictionary), ("draft.json", about)):
            part = folder / f".{file}.part"
            part.write_text(text, encoding="utf-8", newline="")
            os.replace(part, folder / file)
        return self.draft(name)

    def remove(self, name: str) -> None:
        self.draft(name)
        shutil.rmtree(self.root / name)


def parsed(study: str) -> dict[str, Any]:
    """A study.toml that may be incomplete; ValueError where it is no TOML or not one that people write."""
    if too_dotted(study):
        raise ValueError("too many dots")
    try:
        return tomllib.loads(study)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def head_of(study: str) -> tuple[str, str]:
    """(id, title) of a study.toml, "" where it does not say."""
    try:
        head = parsed(study).get("study", {})
    except ValueError:
        return "", ""
    if not isinstance(head, dict):
        return "", ""
    return tuple(v if isinstance(v := head.get(key), str) else "" for key in ("id", "title"))  # type: ignore[return-value]


def stated(study: str, section: str, key: str) -> Any:
    """One setting of a study.toml that may be incomplete, or None."""
    try:
        part = parsed(study).get(section, {})
    except ValueError:
        return None
    return part.get(key) if isinstance(part, dict) else None
