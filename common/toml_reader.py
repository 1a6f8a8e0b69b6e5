"""A TOML file read strictly: every error names file:line and the line to write.

tomllib keeps no line numbers, so the place of a key is found by scanning the text; where a file is written in
an unusual way (inline tables, dotted keys) the place falls back to the section's line or the file.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import StudyError


@dataclass(frozen=True, kw_only=True, slots=True)
class TomlFile:
    """A parsed file and its text."""

    where: str
    text: str
    data: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> TomlFile:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise StudyError(
                "STUDY-FILE",
                f"the study cannot be read: {error.strerror or 'not a file'}",
                where=(str(path),),
                hint="`cohortium study new --table FILE` writes a study to complete",
            ) from None
        except ValueError:
            raise StudyError("STUDY-TOML", "not a text in UTF-8", where=(str(path),), hint="save it as UTF-8") from None
        return cls.parse(text, where=str(path))

    @classmethod
    def parse(cls, text: str, *, where: str) -> TomlFile:
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
            line = re.search(r"line (\d+)", str(error))
            place = f"{where}:{line[1]}" if line else where
            raise StudyError("STUDY-TOML", f"not TOML: {error}", where=(place,), hint="correct this line") from None
        return cls(where=where, text=text, data=data)

    def has(self, section: str) -> bool:
        return section in self.data

    def only(self, *known: str) -> None:
        """Refuse a section that is not known."""
        for name in self.data:
            if name not in known:
                raise StudyError(
                    "STUDY-UNKNOWN",
                    f"there is no section [{name}]",
                    where=(self.place(name, None),),
                    hint=_nearest(name, known, "[{}]"),
                )

    def section(self, name: str, wanted: str) -> Table:
        value = self.data.get(name)
        if value is None:
            raise StudyError(
                "STUDY-MISSING",
                f"the section [{name}] is missing",
                where=(self.where,),
                hint=f"add [{name}] with {wanted}",
            )
        if not isinstance(value, Mapping):
            raise StudyError(
                "STUDY-TYPE",
                f"{name} is not a section",
                where=(self.place(name, None),),
                hint=f"write [{name}] on its own line",
            )
        return Table(file=self, name=name, data=value)

    def place(self, section: str, key: str | None) -> str:
        """file:line of a key, else of its section, else the file."""
        header = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]")
        inside, found = "", None
        for number, line in enumerate(self.text.splitlines(), start=1):
            match = header.match(line)
            if match:
                inside = match[1].strip("\"'")
                if inside == section and found is None:
                    found = number
            elif (key is None and inside == "" and re.match(rf"\s*[\"']?{re.escape(section)}[\"']?\s*[.=]", line)) or (
                key is not None and inside == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line)
            ):
                return f"{self.where}:{number}"
        return f"{self.where}:{found}" if found else self.where


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One section; each method reads one key, checks it, and raises StudyError with its place and a fix."""

    file: TomlFile
    name: str
    data: Mapping[str, Any]

    def place(self, key: str) -> str:
        return self.file.place(self.name, key)

    def error(self, key: str, sentence: str, fix: str, *, code: str = "STUDY-VALUE") -> StudyError:
        return StudyError(code, sentence, where=(self.place(key),), hint=f"[{self.name}] {fix}")

    def has(self, key: str) -> bool:
        return key in self.data

    def only(self, *known: str) -> None:
        for key in self.data:
            if key not in known:
                raise StudyError(
                    "STUDY-UNKNOWN",
                    f"[{self.name}] has no setting {key!r}",
                    where=(self.place(key),),
                    hint=_nearest(key, known, "{}"),
                )

    def inner(self, key: str) -> Table | None:
        """The section inside, [NAME.key], or None."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            fix = f"write [{self.name}.{key}] on its own line"
            raise self.error(key, f"{key} is not a section", fix, code="STUDY-TYPE")
        return Table(file=self.file, name=f"{self.name}.{key}", data=value)

    def inners(self, key: str) -> tuple[Table, ...]:
        """The sections [[NAME.key]], in order."""
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            fix = f"write [[{self.name}.{key}]] on its own line"
            raise self.error(key, f"{key} is not a list of sections", fix, code="STUDY-TYPE")
        return tuple(Table(file=self.file, name=f"{self.name}.{key}", data=item) for item in value)

    def _get(self, key: str, example: str) -> Any:
        if key not in self.data:
            raise self.error(
                key,
                f"[{self.name}] {key} is missing and has no default",
                f"add: {example}",
                code="STUDY-MISSING",
            )
        return self.data[key]

    def text(self, key: str, *, example: str) -> str:
        value = self._get(key, example)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise self.error(key, f"{key} is not a text", example, code="STUDY-TYPE")
        return value

    def text_or_none(self, key: str) -> str | None:
        return self.text(key, example=f'{key} = "..."') if key in self.data else None

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.error(key, f"{key} is not a list of texts", f'{key} = ["a", "b"]', code="STUDY-TYPE")
        return tuple(value)

    def choice(self, key: str, known: Sequence[str]) -> str:
        value = self._get(key, f'{key} = "{known[0]}"')
        if not isinstance(value, str) or value not in known:
            fix = _nearest(str(value), known, f'{key} = "{{}}"')
            raise self.error(key, f"{key} = {value!r} is not known", fix)
        return value

    def number(
        self,
        key: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float,
        example: str = "",
    ) -> float:
        value = self._get(key, example or f"{key} = {most:g}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"{key} is not a number", example or f"{key} = {most:g}", code="STUDY-TYPE")
        low = above if above is not None else least
        wrong = not (-1e308 < value < 1e308) or not math.isfinite(value) or value > most
        if wrong or (above is not None and value <= above) or (least is not None and value < least):
            bounds = f"{'above' if above is not None else 'at least'} {low:g} and at most {most:g}"
            raise self.error(key, f"{key} = {value} must be {bounds}", example or f"{key} = {most:g}")
        return float(value)

    def whole(self, key: str, *, least: int, most: int, example: str) -> int:
        value = self._get(key, example)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{key} is not a whole number", example, code="STUDY-TYPE")
        if not least <= value <= most:
            raise self.error(key, f"{key} must be from {least} to {most}", example)
        return value

    def whole_or_none(self, key: str, *, least: int, most: int) -> int | None:
        return self.whole(key, least=least, most=most, example=f"{key} = {least}") if key in self.data else None


def _nearest(word: str, known: Sequence[str], form: str) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {form.format(close[0])}?"
    return f"known: {', '.join(known)}"
