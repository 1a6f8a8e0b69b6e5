"""A site that is not as ours are may say anything: what people are shown of it is a code or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hospital import key

from cohortium.common.protocol.messages import Message, seal
from cohortium.server.mirror import Mirror
from cohortium.server.session import Session
from cohortium.strategies.base import COORDINATOR


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ("REFUSED-DATA", "REFUSED-DATA"),
        ("\x1b[2J", "MSG-FORM"),
        ("X" * 5000, "MSG-FORM"),
        ("[bold]", "MSG-FORM"),
        (7, "MSG-FORM"),
        (None, "MSG-FORM"),
        ({"A": "B"}, "MSG-FORM"),
    ],
)
def test_a_refusal_is_a_code(said: Any, noted: str, tmp_path: Path) -> None:
    class Answering:
        def exchange(self, messages: Mapping[str, bytes], **_: Any) -> dict[str, bytes]:
            reply = Message(kind="site.refused", sender="a", fields={"code": said})
            return {site: seal(reply, key(site)) for site in messages}

    identities = {"a": key("a").public_key()}
    with Mirror(tmp_path / "mirror.db", identities) as mirror:
        session = Session(
            courier=Answering(), key=key(COORDINATOR), identities=identities, mirror=mirror, timeout_s=1.0
        )
        hello = Message(kind="run.hello", sender=COORDINATOR, fields={})
        assert session.exchange({"a": hello}, "hello") == {} and session.refusals == {"a": noted}
