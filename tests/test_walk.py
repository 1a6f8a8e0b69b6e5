"""The two walks through the house. Read this file top to bottom and you know how Cohortium works.

First one patient's record, from a hospital's table to a synthetic row; then one unit of budget, from study.toml to
the audit. Everything here is the real thing; only the transport is left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small import make_quick, small_study, small_table

from cohortium.client.gate import Gate
from cohortium.client.policy import Policy
from cohortium.client.records import records
from cohortium.common.encoding import grids
from cohortium.common.errors import CohortiumError
from cohortium.common.privacy.accountant import epsilon
from cohortium.common.privacy.entropy import SystemEntropy
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.release import release
from cohortium.common.protocol.fixedpoint import from_ring, to_ring
from cohortium.common.protocol.messages import Message, unseal
from cohortium.common.protocol.signing import generate
from cohortium.common.queries import Counts
from cohortium.common.study import Study
from cohortium.server.audit import audit
from cohortium.server.planning import plan_for
from cohortium.simulations.finish import finish
from cohortium.simulations.run import Request, prepare, run

SITES = ("north", "south", "west")


def test_one_records_walk(tmp_path: Path) -> None:
    # The dictionary is public; the table never leaves the hospital.
    study = Study.load(small_study(tmp_path)[0])
    table = small_table(30)

    # 1. Encode by public rule, grouped by patient; the identifier is gone, a missing value is a code of its own.
    rows = records(study.schema, table, unit="id")
    assert rows.patients == 30 and rows.codes.shape == (len(table), 6)

    # 2. A question of the plan: how many patients are of each sex? A patient counts once, however many rows.
    (plan, _, _) = plan_for(study, SITES)
    sex = grids(study.schema)[0]
    question = Counts(columns=(0,), maps=(np.arange(sex.size, dtype=np.int32),), bins=(sex.size,))
    truth = question.contribution(rows).units * question.lattice
    assert truth.sum() == pytest.approx(30, abs=1e-3)

    # 3. The un-noised sum cannot leave: it does not even serialise.
    with pytest.raises(TypeError, match="never leaves"):
        __import__("pickle").dumps(question.contribution(rows))

    # 4. Noise and its price come out of one call, on the integer lattice.
    stage = plan.stages[0]
    released = release(
        query=question,
        records=rows,
        mechanism=stage.mechanism(shares=1),
        entropy=SystemEntropy(),
        run="walk",
        index=0,
        head="0" * 64,
    )
    assert released.values.dtype == np.int64 and released.event == stage.event
    assert (released.values != question.contribution(rows).units).any()

    # 5. Masked, it is a vector of uniform 64-bit numbers; masks cancel in the sum (common/protocol/secure_sum.py).
    masks = np.random.default_rng(0).integers(0, 2**64, size=(3, 3), dtype=np.uint64)
    masks[2] = -(masks[0] + masks[1])
    total = sum((to_ring(released.values, parties=3) + mask for mask in masks), start=np.zeros(3, dtype=np.uint64))
    assert (from_ring(total) == 3 * released.values).all()

    # 6. Whatever the coordinator does with the sum is free: fit, sample, decode.
    assert list(sex.decode(np.array([0, 1, sex.size - 1]), np.zeros(3)).astype(object).fillna("?")) == [
        "F",
        "M",
        "?",
    ]


def test_one_unit_of_budgets_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch.setattr)

    # 1. The study promises ε; the plan spends at most that, release by release, before any record is read.
    file, table = small_study(tmp_path / "study", epsilon=3.0)
    plan, _, _ = plan_for(Study.load(file), SITES)
    assert 2.9 < plan.price() <= 3.0

    # 2. At the door: charged on disk first; a second answer to the same release is refused for ever.
    key, coordinator = generate(), generate()
    policy = Policy(
        name="north",
        coordinator_key=coordinator.public_key().public_bytes_raw().hex(),
        table="data.parquet",
        lifetime_epsilon=9.0,
        lifetime_delta=1e-6,
        unit="id",
        hospitals=1,
        minimum_sites=3,
        minimum_colluders=0,
        minimum_patients=0,
        generators=("mixture",),
        strategies=("secure-sum",),
        evaluation=True,
    )
    ledger = Ledger.create(tmp_path / "ledger.db", "north", key)
    gate = Gate(policy=policy, ledger=ledger, key=key)
    question = Counts(columns=(0,), maps=(np.zeros(3, dtype=np.int32),), bins=(1,))
    codes = [grid.size for grid in grids(Study.load(file).schema)]
    gate.open(plan=plan, run="walk", index=0, query=question, codes=codes)
    assert ledger.state("walk", "0") == "RESERVED"
    with pytest.raises(CohortiumError):
        gate.open(plan=plan, run="walk", index=0, query=question, codes=codes)

    # 3. Only listed kinds of messages leave, signed; numbers from records only with a permit.
    refusal = gate.send(Message(kind="site.refused", sender="north", fields={"code": "REFUSED"}))
    assert unseal(refusal, key.public_key(), sender="north").fields == {"code": "REFUSED"}
    with pytest.raises(CohortiumError):
        gate.send(Message(kind="site.noised", sender="north", fields={"run": "walk"}))

    # 4. The price is recomputed from the ledger's events; a crash now would burn the release, not refund it.
    spent = epsilon(ledger.charged_events("walk"), delta=plan.delta)
    assert 0 < spent < plan.price()
    ledger.close()
    again = Ledger.open(tmp_path / "ledger.db", key)
    assert again.state("walk", "0") == "BURNED" and len(again.charged_events("walk")) == 1
    again.close()

    # 5. The whole of it: hospitals, masks, ledgers, model, rows; then anybody audits the folder from its files alone.
    out = tmp_path / "out"
    prepare(Request(study=file, table=table, split="iid:3", out=out))
    run(out)
    result = finish(out, score=False)
    found = audit(out)
    assert found.ok
    assert float(result["privacy"]["prices"][0]["epsilon"]) <= 3.0
    assert "differential privacy" in result["privacy"]["sentence"]
