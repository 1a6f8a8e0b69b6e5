"""Every error a person can meet, in one tree: a stable code, a sentence, where, what is left, the fix.

    CohortiumError
    ├── UsageError        exit 2   a file, a flag or a study that cannot be used
    │   ├── DictionaryError        the data dictionary
    │   ├── TableError             a table that does not fit its dictionary (row numbers stay at the site)
    │   └── StudyError             study.toml
    ├── CheckFailed       exit 1   a verification found something wrong (audit, chain, signature)
    ├── Refused           exit 3   policy or budget says no
    ├── PeerUnreachable   exit 4   too few sites answered
    └── ProtocolError     exit 3   a message that breaks the protocol's rules
Anything else that surfaces is our bug and exits with 70.
"""

from __future__ import annotations

NOTHING_LEFT = "Nothing left this hospital."


class CohortiumError(Exception):
    """An error with a stable code and a fix.

    code: short, stable, upper case with dashes, e.g. "DICT-LEVELS"; the only part that may cross a network.
    where: "file:field" or "file:line" places, most useful first.
    left: what remains after the failure (budget, finished rounds), or "".
    hint: the fix, naming a command or the line to add.
    """

    exit_code = 70

    def __init__(
        self, code: str, sentence: str, *, where: tuple[str, ...] = (), left: str = "", hint: str = ""
    ) -> None:
        super().__init__(f"{code}: {sentence}")
        self.code = code
        self.sentence = sentence
        self.where = where
        self.left = left
        self.hint = hint

    def lines(self) -> list[str]:
        """The error as a person reads it, one fact a line."""
        out = [f"{self.code}: {self.sentence}"]
        out += [f"  at    {place}" for place in self.where]
        if self.left:
            out.append(f"  left  {self.left}")
        if self.hint:
            out.append(f"  fix   {self.hint}")
        return out

    def as_json(self) -> dict[str, object]:
        return {
            "error": self.code,
            "sentence": self.sentence,
            "where": list(self.where),
            "left": self.left,
            "fix": self.hint,
        }


class UsageError(CohortiumError):
    exit_code = 2


class DictionaryError(UsageError):
    pass


class TableError(UsageError):
    pass


class StudyError(UsageError):
    pass


class CheckFailed(CohortiumError):
    exit_code = 1


class Refused(CohortiumError):
    exit_code = 3


class ProtocolError(CohortiumError):
    exit_code = 3


class PeerUnreachable(CohortiumError):
    exit_code = 4
