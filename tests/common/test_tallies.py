"""Tallies: a patient weighs one in each histogram, whatever the program; sums do not depend on order or split."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hospital import Ward, people, plan, stage, ward
from planting import planted
from programs import additive, cox, decades, forest, joint, logistic, nearest, scored, sizes

from cohortium.client.records import records as read_records
from cohortium.common import tallies as module
from cohortium.common.derived import MAX_WORK, Additive, AnyDerived, Joint, Nearest, Scored, Trees
from cohortium.common.encoding import Records
from cohortium.common.errors import ProtocolError
from cohortium.common.estimates import Estimates, Sums
from cohortium.common.privacy.plan import Plan
from cohortium.common.queries import AnyQuery, Counts, Tallies, from_wire
from cohortium.common.tallies import MAX_DERIVED


def programs() -> tuple[AnyDerived, ...]:
    return (joint(), scored(by=joint()), Scored(score=forest(), edges=np.array([-0.5, 0.0, 0.7])), nearest())


def tallies(some: tuple[AnyDerived, ...] | None = None) -> Tallies:
    return Tallies(derived=programs() if some is None else some)


def of_one_patient(rows: np.ndarray) -> Records:
    return Records(
        codes=rows.astype(np.int32),
        patient=np.zeros(len(rows), np.int64),
        identity=np.zeros((1, 16), np.uint8),
        rows_per_patient=np.array([len(rows)]),
    )


# ---- the bound ----------------------------------------------------------------------------------------------


def check_one_patient_moves_tallies_at_most_by_their_sensitivity() -> None:
    """Taking out any patient, of 1 to 40 rows, equal rows among them."""
    records, query = people(10, seed=5, most_rows=40), tallies()
    same = records.codes.copy()
    same[:] = same[records.patient * 3 % len(same)]  # all rows of a patient alike: the bound is reached
    for codes in (records.codes, same):
        table = Records(
            codes=codes,
            patient=records.patient,
            identity=records.identity,
            rows_per_patient=records.rows_per_patient,
        )
        whole = query.contribution(table).units
        for patient in range(table.patients):
            rest = table.subset(np.arange(table.patients) != patient)
            moved = (whole - query.contribution(rest).units) * query.lattice
            assert np.linalg.norm(moved) <= query.sensitivity_l2, (patient, np.linalg.norm(moved))


def check_a_patient_is_tallied_alike_whoever_else_is_there() -> None:
    """The pooled answer is the sum over single patients, bit for bit."""
    records = people(15, seed=6, most_rows=5)
    for program in (*programs(), scored()):
        query = tallies((program,))
        single = [
            query.contribution(records.subset(np.arange(records.patients) == p)).units for p in range(records.patients)
        ]
        assert np.array_equal(query.contribution(records).units, np.sum(single, axis=0)), program.kind


def check_every_patient_weighs_exactly_one_in_every_histogram() -> None:
    records, query = people(60, seed=7, most_rows=7), tallies()
    for histogram in query.unpack(query.contribution(records).units * query.lattice):
        assert histogram.sum() == records.patients and histogram.min() >= 0


def check_a_tree_never_walks_astray() -> None:
    """Whatever is drawn as a forest is refused or gives every row a finite score within a second."""
    rng = np.random.default_rng(3)
    rows, refused = people(20).codes, 0
    for _ in range(300):
        n = int(rng.integers(1, 6))
        feature, threshold = rng.integers(-1, 1, n), rng.integers(0, 100, n)
        left, right = rng.integers(-1, n + 1, (2, n))
        try:
            trees = Trees(
                columns=(2,),
                maps=(np.arange(sizes()[2], dtype=np.int32),),
                feature=feature.astype(np.int32),
                threshold=threshold.astype(np.int32),
                left=left.astype(np.int32),
                right=right.astype(np.int32),
                value=rng.normal(size=n),
                roots=rng.integers(0, n, 2).astype(np.int32),
            )
        except ProtocolError:
            refused += 1
            continue
        assert np.isfinite(trees.score(rows)).all()
    assert 0 < refused < 300


CHECKS = (
    check_one_patient_moves_tallies_at_most_by_their_sensitivity,
    check_a_patient_is_tallied_alike_whoever_else_is_there,
    check_every_patient_weighs_exactly_one_in_every_histogram,
    check_a_tree_never_walks_astray,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_guarantee(check: Callable[[], None]) -> None:
    check()


BUGS: dict[str, tuple[Callable[[], None], Callable[..., Any], tuple[str, str]]] = {
    "each row counts one": (
        CHECKS[0],
        module._units,
        ("units * (place + 1) // of_patient - units * place // of_patient", "units + 0 * place"),
    ),
    "shares are rounded up": (
        CHECKS[0],
        module._units,
        ("units * (place + 1) // of_patient - units * place // of_patient", "-(-units // of_patient)"),
    ),
    "shares are rounded down": (
        CHECKS[2],
        module._units,
        ("units * (place + 1) // of_patient - units * place // of_patient", "units // of_patient"),
    ),
    "the sensitivity of one histogram for all": (CHECKS[0], Tallies.sensitivity_l2.fget, ("self.clip_norm_l2", "1.0")),  # type: ignore[attr-defined]
    "a distance divided by the farthest row's": (
        CHECKS[1],
        Nearest.distance,
        ("/ len(self.columns)", "/ max(out.max(initial=0.1), 0.1)"),
    ),
    "edges that move with the rows": (
        CHECKS[1],
        Scored.assign,
        ("self.score.score(codes)", "self.score.score(codes) - self.score.score(codes).mean()"),
    ),
    "places that go on from patient to patient": (
        CHECKS[1],
        module._units,
        ("place, 0)", "0 * place, 0)"),
    ),
    "children may stand anywhere": (
        CHECKS[3],
        Trees.__post_init__,
        ("(child <= inner).any() or (child >= nodes).any()", "False"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_check_red(name: str) -> None:
    check, function, change = BUGS[name]
    check()
    with planted(function, change), pytest.raises((AssertionError, IndexError, ValueError)):
        check()


def test_the_bound_is_reached_so_noise_is_not_wasted() -> None:
    one = people(1, most_rows=1)
    assert np.linalg.norm(tallies().contribution(one).units * tallies().lattice) == tallies().sensitivity_l2 == 2.0


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000, 70_000])
def test_however_many_rows_a_patient_has(rows: int) -> None:
    query = tallies((joint(), scored(), scored(by=joint())))
    records = of_one_patient(np.tile([[0, 1, 50, 1]], (rows, 1)))
    moved = query.contribution(records).units * query.lattice
    assert np.linalg.norm(moved) == pytest.approx(math.sqrt(3), abs=1e-12) and moved.max() == 1.0


# ---- order, split and choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [1, 3, 10])
def test_any_split_sums_to_the_pooled_answer_bit_for_bit(sites: int) -> None:
    records, query = people(60, seed=2), tallies()
    home = np.random.default_rng(sites).integers(0, sites, records.patients)
    parts = [query.contribution(records.subset(home == site)).units for site in range(sites)]
    whole = query.contribution(records).units
    assert whole.dtype == np.int64 and np.array_equal(np.sum(parts, axis=0), whole)


def test_chunks_choice_and_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    records, query = people(40, seed=3), tallies()
    whole = query.contribution(records).units
    monkeypatch.setattr(module, "_CHUNK_ROWS", 7)
    assert np.array_equal(query.contribution(records).units, whole)
    chosen = np.arange(records.patients) % 3 == 0
    assert np.array_equal(query.contribution(records, chosen).units, query.contribution(records.subset(chosen)).units)
    nothing = query.contribution(records, np.zeros(records.patients, bool)).units
    assert nothing.shape == (query.dim,) and not nothing.any()


def test_a_joint_of_one_column_counts_as_counts_do() -> None:
    records = people(50, most_rows=1)
    simple = Counts(columns=(2,), maps=(decades(),), bins=(5,))
    same = tallies((Joint(columns=(2,), maps=(decades(),), sizes=(5,)),))
    left, right = (q.contribution(records).units * q.lattice for q in (simple, same))
    assert np.array_equal(left, right)


def test_without_noise_shares_of_several_rows_are_good_to_a_billionth() -> None:
    records, query = people(80, seed=8, most_rows=7), tallies((joint(),))
    weight = 1.0 / records.rows_per_patient[records.patient]
    by_hand = np.bincount(joint().assign(records.codes), weights=weight, minlength=20)
    found = query.contribution(records).units * query.lattice
    assert np.abs(found - by_hand).max() / records.patients < 1e-9


# ---- the wire and hostile forms -----------------------------------------------------------------------------


def test_the_wire_form_comes_back_as_it_went() -> None:
    records, query = people(20), tallies()
    fields, blobs = query.to_wire()
    again = from_wire("tallies", fields, blobs)
    assert again.to_wire() == (fields, blobs) and again.dim == query.dim == 20 + 100 + 4 + 5
    assert np.array_equal(again.contribution(records).units, query.contribution(records).units)
    with pytest.raises(TypeError, match="never leaves"):
        pickle.dumps(again.contribution(records))
    with pytest.raises(TypeError, match="never leaves"):
        copy.deepcopy(again.contribution(records))


def changed(fields: dict[str, Any], place: int, **values: Any) -> dict[str, Any]:
    out = copy.deepcopy(fields)
    out["derived"][place].update(values)
    return out


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f, b: ({**f, "derived": []}, b),
        lambda f, b: ({**f, "derived": f["derived"] * 2}, b),
        lambda f, b: ({**f, "derived": f["derived"][:3]}, b),
        lambda f, b: ({**f, "derived": [None] * 4}, b),
        lambda f, b: ({**f, "derived": "joint"}, b),
        lambda f, b: ({**f, "part": "all"}, b),
        lambda f, b: ({"derived": f["derived"]}, b),
        lambda f, b: (f, {}),
        lambda f, b: (f, {**b, "stray": b""}),
        lambda f, b: (f, {**b, "00009.map00000": b""}),
        lambda f, b: (changed(f, 0, sizes=[1 << 40, 1 << 40]), b),
        lambda f, b: (changed(f, 0, sizes=[True, 4]), b),
        lambda f, b: (changed(f, 0, columns=[2, 2]), b),
        lambda f, b: (changed(f, 0, columns=[-1, 1]), b),
        lambda f, b: (changed(f, 0, columns=list(range(20_000))), b),
        lambda f, b: (changed(f, 0, kind="scored"), b),
        lambda f, b: (changed(f, 1, score={"kind": "scored"}), b),
        lambda f, b: (changed(f, 1, score=None), b),
        lambda f, b: (changed(f, 1, by=f["derived"][3]), b),
        lambda f, b: (changed(f, 2, score={**f["derived"][2]["score"], "base": "nan"}), b),
        lambda f, b: (changed(f, 2, score={**f["derived"][2]["score"], "base": 0.5}), b),
        lambda f, b: (changed(f, 3, ordinal=[1, 0, 0, 1]), b),
        lambda f, b: (f, {**b, "00001.edges": np.array([0.0, np.nan, 1, 2]).tobytes()}),
        lambda f, b: (f, {**b, "00002.score.roots": np.array([2**31 - 1], "<i4").tobytes()}),
        lambda f, b: (f, {**b, "00003.rows": np.full(4, 2**31 - 1, "<i4").tobytes()}),
        lambda f, b: (f, {**b, "00003.rows": np.zeros(7, "<i4").tobytes()}),
    ],
)
def test_a_spoilt_wire_form_is_refused_by_code(spoil: Callable[..., Any]) -> None:
    fields, blobs = tallies().to_wire()
    with pytest.raises(ProtocolError, match="QUERY-"):
        from_wire("tallies", *spoil(fields, blobs))


@pytest.mark.parametrize("kind", ["tallying", "", None, ["tallies"], {"kind": "tallies"}, 3])
def test_an_unknown_kind_is_refused_by_code(kind: Any) -> None:
    with pytest.raises(ProtocolError, match="QUERY-KIND"):
        from_wire(kind, *tallies().to_wire())


def test_random_bytes_in_place_of_any_array_are_refused_or_still_bounded() -> None:
    """Four hundred of them: whatever is let through keeps the bound and does not fail on a record."""
    rng = np.random.default_rng(1)
    fields, blobs = tallies().to_wire()
    records, names, passed = people(3, most_rows=3), sorted(tallies().to_wire()[1]), 0
    for i in range(400):
        name = names[i % len(names)]
        blob = bytearray(blobs[name])
        blob[int(rng.integers(len(blob)))] = int(rng.integers(256))
        try:
            query = from_wire("tallies", fields, {**blobs, name: bytes(blob)})
            query.check_codes(sizes())
        except ProtocolError:
            continue
        passed += 1
        units = query.contribution(records).units * query.lattice
        assert np.linalg.norm(units) <= records.patients * query.sensitivity_l2
    assert 10 < passed < 390


def test_more_derived_columns_or_work_than_a_site_does_are_refused() -> None:
    assert Tallies(derived=(joint(),) * 10).dim == 200
    with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
        Tallies(derived=())
    with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
        Tallies(derived=(joint(),) * (MAX_DERIVED + 1))
    heavy = nearest(rows=MAX_WORK // 8)
    with pytest.raises(ProtocolError, match="QUERY-SIZE"):
        Tallies(derived=(heavy, heavy))
    long = Scored(score=additive(), edges=np.arange(1e6))
    with pytest.raises(ProtocolError, match="QUERY-SIZE"):
        Tallies(derived=(long,) * 9)


# ---- through gate, guard and strategy -----------------------------------------------------------------------

EVALUATION = {"holdout": 0.4, "unit": "pid"}


def evaluation_plan(mode: str) -> Plan:
    quiet = {"noise_multiplier": 0.0, "part": "holdout"}
    stages = [stage(kind, kind, i, **quiet) for i, kind in enumerate(("tallies", "sums", "estimates"))]
    return plan(("a", "b", "c"), mode=mode, stages=stages, **EVALUATION)


def pooled(consortium: Ward, query: AnyQuery) -> np.ndarray:
    """The same table in one place: all sites' held-out patients."""
    import pandas as pd
    from hospital import schema

    from cohortium.client.guard import held_out

    tables = [pd.read_parquet(consortium.directory(site) / "data.parquet") for site in consortium.plan.sites]
    rows = read_records(schema(), pd.concat(tables, ignore_index=True), unit="pid")
    held = held_out(rows, study=consortium.plan.study, share=consortium.plan.holdout)
    assert 0 < held.sum() < rows.patients
    return query.contribution(rows, held).units


@pytest.mark.parametrize("mode", ["local", "secure-sum"])
def test_the_federated_sum_is_the_pooled_sum_bit_for_bit(mode: str, tmp_path: Path) -> None:
    """Every new kind, over guards, gate and strategy, on held-out patients."""
    consortium = ward(tmp_path, evaluation_plan(mode), noise=False)
    features = tuple(np.linspace(-1, 1, size)[:, None] for size in sizes())
    queries: tuple[AnyQuery, ...] = (
        tallies(),
        Sums(features=features, clip_norm_l2=1.5),
        Estimates(model=logistic(), clip_norm_l2=1.0),
    )
    for index, query in enumerate(queries):
        assert np.array_equal(consortium.answer(index, query).values, pooled(consortium, query)), query.kind
    consortium.close()


def test_a_guard_refuses_by_code_what_does_not_fit_and_charges_nothing(tmp_path: Path) -> None:
    consortium = ward(tmp_path, evaluation_plan("local"), noise=False)
    short = Additive(columns=(2,), tables=(np.zeros(100),))
    wrong: tuple[tuple[str, AnyQuery], ...] = (
        ("BAD-QUERY", Tallies(derived=(Scored(score=short, edges=np.array([0.0])),))),  # another dictionary
        ("REFUSED", Estimates(model=cox(), clip_norm_l2=1.0)),  # another kind
        ("REFUSED", Tallies(derived=(scored(by=joint()),) * 30)),  # longer than the plan says
        ("REFUSED", Tallies(derived=programs(), part="train")),  # patients who trained the generator
    )
    for code, query in wrong:
        reply = consortium.ask("a", 0, query)
        assert reply.kind == "site.refused" and reply.fields == {"code": code}
        assert consortium.state("a", 0) == "NONE"
    assert consortium.ask("a", 0, tallies()).kind == "site.noised"
    consortium.close()
