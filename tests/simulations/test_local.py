"""`local`: nobody is trusted. Each hospital's own message carries the whole noise; several steps at the hospital."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohortium.common.errors import UsageError
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Stage
from cohortium.common.queries import AnyQuery, Gradient
from cohortium.server.audit import audit
from cohortium.server.runs import RunFolder
from cohortium.simulations.finish import finish
from cohortium.strategies.base import Exchange, SiteSum
from cohortium.strategies.local_noise import LocalNoise

Simulate = Callable[..., Path]
Messages = dict[int, dict[str, np.ndarray]]


@pytest.fixture
def overheard(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[int, AnyQuery], Messages]:
    """(questions, vectors of the last run by release and site): what the coordinator sees."""
    questions: dict[int, AnyQuery] = {}
    vectors: Messages = {}
    really = LocalNoise.answer

    def listen(self: LocalNoise, index: int, stage: Stage, query: AnyQuery, **rest: Any) -> SiteSum:
        questions[index] = query
        carry: Exchange = self._exchange

        def noted(messages: Any, label: str) -> Any:
            replies = carry(messages, label)
            vectors[index] = {s: np.frombuffer(r.blobs["values"], "<i8") for s, r in replies.items()}
            return replies

        self._exchange = noted
        try:
            return really(self, index, stage, query, **rest)
        finally:
            self._exchange = carry

    monkeypatch.setattr(LocalNoise, "answer", listen)
    return questions, vectors


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_each_message_carries_the_whole_noise(
    simulate: Simulate, overheard: tuple[dict[int, AnyQuery], Messages], sites: int
) -> None:
    """Not a share of it: a message minus the same hospital's noiseless answer has the plan's σ."""
    questions, vectors = overheard
    noisy = simulate(f"iid:{sites}", strategy="local")
    said = {index: dict(by_site) for index, by_site in vectors.items()}
    simulate(f"iid:{sites}", strategy="local", noise=False)
    stage = RunFolder(root=noisy).plan().stages[1]
    query = questions[1]
    planned = stage.noise_multiplier * query.sensitivity_l2
    differences = {site: (said[1][site] - vectors[1][site]) * query.lattice for site in said[1]}
    assert len(differences) == sites
    for site, difference in differences.items():
        # Some 500 coordinates: standard error .032 of the ratio; a share of 1/√2 or 2/3 of σ is 9 of them away.
        assert len(difference) > 400 and 0.84 < difference.std() / planned < 1.16, site
    if sites > 1:
        a, b = list(differences.values())[:2]
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2, "two hospitals draw their own noise"


def test_a_study_of_one_hospital_runs_and_is_audited(simulate: Simulate) -> None:
    out = simulate("iid:1", strategy="local")
    result = finish(out)
    assert audit(out).ok
    assert "local" in str(result["privacy"]["statement"]) and float(result["privacy"]["prices"][0]["epsilon"]) <= 20.0


@pytest.mark.parametrize("server_step", ["average", "momentum", "adam"])
@pytest.mark.parametrize("fedprox", [0.0, 0.5])
def test_three_local_steps_a_round(
    simulate: Simulate, overheard: tuple[dict[int, AnyQuery], Messages], server_step: str, fedprox: float
) -> None:
    """E = 3: the site takes three noised steps, is charged three events in one line, and sends one update."""
    questions, vectors = overheard
    more = f'local_steps = 3\nserver_step = "{server_step}"\nfedprox_mu = {fedprox}\n'
    out = simulate("iid:3", strategy="local", generator="autoregressive", rounds=2, more=more)
    plan = RunFolder(root=out).plan()
    trained = [index for index in range(plan.releases) if plan.stage_of(index).kind == "gradient"]
    assert len(trained) == 2 and plan.stage_of(trained[0]).steps == 3
    for index in trained:
        query = questions[index]
        assert isinstance(query, Gradient) and query.local is not None
        assert query.local.steps == 3 and query.local.fedprox_mu == fedprox
        assert all(vector.any() for vector in vectors[index].values())
    moved = questions[trained[1]].parameters - questions[trained[0]].parameters  # type: ignore[union-attr]
    assert np.isfinite(moved).all() and moved.any()
    ledger = Ledger.open(out / "sites" / "site-1" / "ledger.db")
    charged = [
        count
        for event, count in ledger.charged_events(str(RunFolder(root=out).facts()["run"]))
        if event.kind == "poisson-gaussian"
    ]
    ledger.close()
    assert sum(charged) == 6
    finish(out, score=False)
    assert audit(out).ok


def test_server_steps_differ_and_repeat(simulate: Simulate) -> None:
    found = {}
    for server_step in ("average", "momentum", "adam", "average"):
        more = f'local_steps = 2\nserver_step = "{server_step}"\nfedprox_mu = 0.0\n'
        out = simulate("iid:2", strategy="local", generator="autoregressive", rounds=2, more=more)
        parameters = RunFolder(root=out).model().to_arrays()[0]
        key = next(name for name in parameters if "param" in name)
        if server_step in found:
            assert (found[server_step] == parameters[key]).all()
        found[server_step] = parameters[key]
    assert (found["average"] != found["momentum"]).any() and (found["average"] != found["adam"]).any()


def test_local_steps_belong_to_local(simulate: Simulate) -> None:
    with pytest.raises(UsageError):
        simulate("iid:3", more="local_steps = 3")
