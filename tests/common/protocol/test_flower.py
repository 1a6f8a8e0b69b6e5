"""A parcel survives Flower's own serialisation, and nothing but a parcel is accepted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol import flower
from cohortium.common.protocol.flower import Parcel, Refusal, pack, unpack


def through_flower(records: RecordDict) -> RecordDict:
    children = {child.object_id: child for child in (records.children or {}).values()}
    parts = {name: type(child).inflate(child.deflate()) for name, child in children.items()}
    return RecordDict.inflate(records.deflate(), children=parts)


words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(envelope=st.binary(max_size=300), site=words, refusal=st.sampled_from([None, *Refusal]))
def test_round_trip(envelope: bytes, site: str, refusal: Refusal | None) -> None:
    parcel = Parcel(envelope=b"" if refusal else envelope, site=site, refusal=refusal)
    assert unpack(pack(parcel)) == parcel
    assert unpack(through_flower(pack(parcel))) == parcel


GOOD = {"envelope": b"x", "site": "a", "refusal": ""}


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord(GOOD)}),
        RecordDict({"cohortium": ConfigRecord(GOOD), "metrics": MetricRecord({"loss": 0.1})}),
        RecordDict({"cohortium": ConfigRecord(GOOD), "arrays": ArrayRecord()}),
        RecordDict({"cohortium": MetricRecord({"envelope": 1})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "examples": 920})}),
        RecordDict({"cohortium": ConfigRecord({"envelope": b"x", "site": "a"})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "envelope": "x"})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "envelope": [b"x"]})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "site": 3})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "site": "a\nb"})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "site": "a" * 201})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "refusal": "patient 17 has a bad date"})}),
        RecordDict({"cohortium": ConfigRecord({**GOOD, "refusal": "COURIER-NO-GUARD"})}),
    ],
)
def test_anything_else_is_refused(records: RecordDict) -> None:
    with pytest.raises(ProtocolError) as caught:
        unpack(records)
    assert caught.value.code == "FLOWER-FORMAT"


def test_an_envelope_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "MAX_ENVELOPE_BYTES", 10)
    Parcel(envelope=b"x" * 10)
    with pytest.raises(ProtocolError, match="FLOWER-SIZE"):
        Parcel(envelope=b"x" * 11)


@pytest.mark.parametrize("first", ["flwr.clientapp, flwr.simulation", "cohortium.common.errors"])
def test_flower_reports_nothing_to_its_makers(first: str, tmp_path: Path) -> None:
    code = (
        f"import {first}\n"
        "import cohortium.common.protocol.flower\n"
        "from flwr.supercore import telemetry\n"
        "assert telemetry.FLWR_TELEMETRY_ENABLED == '0'\n"
        "assert telemetry.event(telemetry.EventType.PING).result(timeout=30) == 'disabled'\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert not list(tmp_path.iterdir()), "nor is an id kept for next time"
