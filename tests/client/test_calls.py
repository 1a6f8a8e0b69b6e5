"""What the coordinator's service says is shown to people: words that are none are not shown.

Power: without the check the first terminal that prints a proposal's name does what the coordinator wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cohortium.client import calls
from cohortium.client.site import Site
from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import consortium_pb2 as pb


def answering(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    @contextmanager
    def service(site: Site) -> Iterator[Any]:
        yield SimpleNamespace(**{name: lambda *_, value=value, **__: value for name, value in answers.items()})

    monkeypatch.setattr(calls, "service", service)


@pytest.mark.parametrize("word", ["", "run\x1b[2J", "Run", "a b", "run\n", "x" * 65, "run\u202e"])
def test_a_word_that_is_none_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(Path("/nowhere"))
    for run, state in ((word, "open"), ("run-1", word)):
        answering(monkeypatch, Proposals=[pb.Proposal(run=run, envelope=b"x", state=state)])
        with pytest.raises(ProtocolError, match="COORDINATOR-OTHER"):
            calls.proposals(site)
    for name, role, state in ((word, "site", "enrolled"), ("a", word, "enrolled"), ("a", "site", word)):
        answering(monkeypatch, Members=pb.MemberList(members=[pb.Member(name=name, role=role, state=state)]))
        with pytest.raises(ProtocolError, match="COORDINATOR-OTHER"):
            calls.members(site)


def test_words_come_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(Path("/nowhere"))
    answering(
        monkeypatch,
        Proposals=[pb.Proposal(run="run-1", envelope=b"x", state="declined")],
        Members=pb.MemberList(members=[pb.Member(name="a", role="site", state="revoked", identity=b"\x01", since=7)]),
    )
    assert calls.proposals(site) == [calls.Offered(run="run-1", envelope=b"x", state="declined")]
    assert calls.members(site) == [{"name": "a", "role": "site", "state": "revoked", "identity": "01", "since": 7}]
