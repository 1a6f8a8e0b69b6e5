"""Flower's own engine on Ray and our in-process grid: the same seed gives the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cohortium.server.audit import audit
from cohortium.simulations.engines import Ray
from cohortium.simulations.finish import finish
from cohortium.simulations.run import run

pytest.importorskip("ray")
FILES = ("synthetic.csv", "synthetic.parquet", "run/model.npz")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_and_in_process_give_the_same_bytes(simulate: Callable[..., Path]) -> None:
    digests = []
    for engine in (None, Ray(cpus=2)):
        out = simulate("iid:3", run=False, generator="joined", rounds=2, rows=200)
        run(out, engine=engine)
        finish(out, score=False)
        assert audit(out).ok
        digests.append([hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES])
    assert digests[0] == digests[1]
