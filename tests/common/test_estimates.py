"""Sums and estimates: a patient's weight is bounded, the vectors are the textbook's, the wire form is strict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import checks
import numpy as np
import pandas as pd
import pytest
from hospital import people
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import planted
from programs import codes, cox, design, logistic, sizes

from cohortium.common import estimates as module
from cohortium.common.derived import MAX_TABLE, Joint
from cohortium.common.encoding import Records
from cohortium.common.errors import ProtocolError
from cohortium.common.estimates import MAX_ETA, Cox, Estimates, Logistic, Sums, norms
from cohortium.common.protocol.fixedpoint import to_ring
from cohortium.common.queries import Tallies, from_wire

Query = Sums | Estimates


def sums(*, seed: int = 0, scale: float = 1.0, clip: float = 1.0) -> Sums:
    rng = np.random.default_rng([seed, 20])
    features = tuple(rng.normal(0, scale, (size, k)) for size, k in zip(sizes(), (2, 0, 3, 1), strict=True))
    return Sums(features=features, clip_norm_l2=clip)


def queries(*, seed: int = 0, scale: float = 1.0, clip: float = 1.0) -> tuple[Query, ...]:
    return (
        sums(seed=seed, scale=scale, clip=clip),
        Estimates(model=logistic(seed=seed, scale=scale), clip_norm_l2=clip),
        Estimates(model=cox(seed=seed, scale=scale), clip_norm_l2=clip),
    )


def alone(rows: np.ndarray) -> Records:
    """Each row a patient of its own."""
    n = len(rows)
    return Records(
        codes=rows,
        patient=np.arange(n),
        identity=np.arange(2 * n, dtype=">u8").view(np.uint8).reshape(n, 16),
        rows_per_patient=np.ones(n, np.int64),
    )


# ---- the bound ----------------------------------------------------------------------------------------------


def check_one_patient_moves_a_sum_at_most_by_its_sensitivity() -> None:
    """Clip far above and far below the data, 1 to 40 rows a patient."""
    records = people(8, seed=5, most_rows=40)
    for scale, clip in ((1.0, 1.0), (1e6, 0.03), (1.0, 1e4), (1e9, 1e-9)):
        for query in queries(scale=scale, clip=clip):
            whole = query.contribution(records).units
            for patient in range(records.patients):
                rest = records.subset(np.arange(records.patients) != patient)
                moved = np.linalg.norm((whole - query.contribution(rest).units) * query.lattice)
                assert moved <= query.sensitivity_l2, (query.kind, scale, clip, moved / query.sensitivity_l2)


def check_a_patient_adds_alike_whoever_else_is_there() -> None:
    """The pooled sum is the sum over single patients, bit for bit."""
    records = people(25, seed=6, most_rows=4)
    for query in queries(clip=0.7):
        single = [
            query.contribution(records.subset(np.arange(records.patients) == p)).units for p in range(records.patients)
        ]
        assert np.array_equal(query.contribution(records).units, np.sum(single, axis=0)), query.kind


def check_rounding_is_priced() -> None:
    """A vector of norm C whose every coordinate, a third of a step below the lattice, rounds up."""
    features = (np.full((sizes()[0], 96 * 96), 1.0 / 96), *(np.zeros((s, 0)) for s in sizes()[1:]))
    query = Sums(features=features, clip_norm_l2=1.0)
    moved = np.linalg.norm(query.contribution(people(1, most_rows=1)).units * query.lattice)
    assert query.clip_norm_l2 * (1 + module.CLIP_SLACK) < moved <= query.sensitivity_l2


def check_every_row_of_a_patient_weighs_alike() -> None:
    """One row far beyond the clip cannot speak for the others: rows are clipped before their mean."""
    features = (np.array([[1e6], [-1.0], [0.0]]), *(np.zeros((s, 0)) for s in sizes()[1:]))
    rows = np.zeros((4, 4), np.int32)
    rows[1:, 0] = 1
    patient = Records(
        codes=rows,
        patient=np.zeros(4, np.int64),
        identity=np.zeros((1, 16), np.uint8),
        rows_per_patient=np.array([4]),
    )
    query = Sums(features=features, clip_norm_l2=1.0)
    assert query.contribution(patient).units[0] * query.lattice == -0.5


CHECKS = (
    check_one_patient_moves_a_sum_at_most_by_its_sensitivity,
    check_a_patient_adds_alike_whoever_else_is_there,
    check_rounding_is_priced,
    check_every_row_of_a_patient_weighs_alike,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_guarantee(check: Callable[[], None]) -> None:
    check()


BUGS: dict[str, tuple[Callable[[], None], Callable[..., Any], tuple[str, str]]] = {
    "clipping off": (CHECKS[0], module._clipped, ("norm > clip", "norm > 1e300")),
    "rows are not averaged": (
        CHECKS[0],
        module._patients_sum,
        (
            "total /= of_patient[begins[first:last], None]\n        units += np.rint(_clipped(total, clip) / lattice)",
            "units += np.rint(total / lattice)",
        ),
    ),
    "only the mean is clipped": (
        CHECKS[3],
        module._patients_sum,
        ("_clipped(vectors(records.codes[rows[some]]), clip)", "vectors(records.codes[rows[some]])"),
    ),
    "the site's sum is rounded once": (
        CHECKS[1],
        module._patients_sum,
        (
            "np.rint(_clipped(total, clip) / lattice).astype(np.int64).sum(axis=0)",
            "np.rint(_clipped(total, clip).sum(axis=0) / lattice).astype(np.int64)",
        ),
    ),
    "a sum is clipped instead of a patient": (
        CHECKS[0],
        module._patients_sum,
        (
            "np.rint(_clipped(total, clip) / lattice).astype(np.int64).sum(axis=0)",
            "np.rint(2 * total.sum(axis=0) / lattice).astype(np.int64)",
        ),
    ),
    "rounding is not priced": (CHECKS[2], module._sensitivity, ("+ math.sqrt(dim) * lattice / 2.0", "")),
    "covariates centred by the site's rows": (
        CHECKS[1],
        Logistic.vectors,
        ("eta = _linear(x, self.beta)", "x = x - x.mean(axis=0)\n    eta = _linear(x, self.beta)"),
    ),
    "risk sets of the site's rows": (
        CHECKS[1],
        Cox.vectors,
        ("np.maximum(passed - 1, 0)", "np.maximum(passed - 1, 0) * 0 + (passed.max() - 1)"),
    ),
    "patients cut at a chunk's border": (
        CHECKS[1],
        module._patients_sum,
        ("of_patient[begins[first:last], None]", "of_patient[begins[first], None]"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_check_red(name: str) -> None:
    check, function, change = BUGS[name]
    with planted(function, change), pytest.raises(AssertionError):
        check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    patients=st.integers(1, 6),
    most_rows=st.sampled_from([1, 3, 30]),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    clip=st.sampled_from([1e-9, 0.01, 1.0, 37.0, 1e6]),
)
def test_no_random_patient_weighs_more_than_the_bound(
    seed: int, patients: int, most_rows: int, scale: float, clip: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, most_rows + 1, patients)
    records = Records(
        codes=codes(int(rows.sum()), seed=seed),
        patient=np.repeat(np.arange(patients), rows),
        identity=rng.integers(0, 256, (patients, 16), dtype=np.uint8),
        rows_per_patient=rows,
    )
    without = records.subset(np.arange(patients) != seed % patients)
    for query in queries(seed=seed, scale=scale, clip=clip):
        moved = query.contribution(records).units - query.contribution(without).units
        assert np.linalg.norm(moved * query.lattice) <= query.sensitivity_l2


def test_the_bound_is_reached_so_noise_is_not_wasted() -> None:
    one = people(1, most_rows=1)
    for query in queries(scale=1e6, clip=0.5):
        weight = np.linalg.norm(query.contribution(one).units * query.lattice)
        assert 0.999999 * query.sensitivity_l2 < weight <= query.sensitivity_l2


def test_the_largest_tables_allowed_still_give_finite_bounded_sums() -> None:
    """±2^40 everywhere, parameters that drive the predictor to its limits: no overflow, no NaN, no warning."""
    big = tuple(np.full((s, 1), (-1.0) ** c * MAX_TABLE) for c, s in enumerate(sizes()))
    most = np.full(12, MAX_TABLE)
    steep = cox()
    models = (
        Logistic(outcome=(3, np.array([0, 1, -1], np.int32)), design=big, beta=np.array([0, 1, -1, 1, -1]) * MAX_TABLE),
        Cox(
            time=steep.time,
            event=steep.event,
            design=big,
            beta=np.array([1.0, -1, 1, -1]) * MAX_TABLE,
            times=steep.times,
            increments=most,
            means=np.full((12, 4), -MAX_TABLE),
        ),
    )
    with np.errstate(all="raise"):
        for query in (Sums(features=big, clip_norm_l2=1.0), *(Estimates(model=m, clip_norm_l2=1.0) for m in models)):
            units = query.contribution(people(5)).units
            assert np.linalg.norm(units * query.lattice) <= 5 * query.sensitivity_l2 and units.any()


# ---- order, split, chunks and choice ------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [1, 3, 10])
@pytest.mark.parametrize("clip", [0.2, 50.0])
def test_any_split_sums_to_the_pooled_answer_bit_for_bit(sites: int, clip: float) -> None:
    records = people(60, seed=2)
    home = np.random.default_rng(sites).integers(0, sites, records.patients)
    for query in queries(clip=clip):
        parts = [query.contribution(records.subset(home == site)).units for site in range(sites)]
        whole = query.contribution(records).units
        assert whole.dtype == np.int64 and np.array_equal(np.sum(parts, axis=0), whole)


@pytest.mark.parametrize("numbers", [1, 7, 40, 300])
def test_chunks_choice_and_nobody(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row and more, smaller and larger than a patient."""
    records = people(30, seed=3, most_rows=9)
    for query in queries():
        whole = query.contribution(records).units
        with monkeypatch.context() as patched:
            patched.setattr(module, "_CHUNK_NUMBERS", numbers)
            assert np.array_equal(query.contribution(records).units, whole)
        chosen = np.arange(records.patients) % 3 == 0
        only = query.contribution(records.subset(chosen)).units
        assert np.array_equal(query.contribution(records, chosen).units, only)
        nothing = query.contribution(records, np.zeros(records.patients, bool)).units
        assert nothing.shape == (query.dim,) and not nothing.any()


@pytest.mark.parametrize("query", queries(), ids=lambda q: getattr(getattr(q, "model", q), "name", "sums"))
def test_a_row_has_the_same_bits_wherever_it_stands(query: Query) -> None:
    rows = codes(400, seed=5)
    whole = query.vectors(rows)
    assert np.isfinite(whole).all()
    order = np.random.default_rng(0).permutation(len(rows))
    assert query.vectors(rows[order]).tobytes() == whole[order].tobytes()
    assert b"".join(query.vectors(rows[i : i + 1]).tobytes() for i in range(400)) == whole.tobytes()
    assert norms(whole).tobytes() == b"".join(norms(whole[i : i + 1]).tobytes() for i in range(400))


def test_a_patient_with_many_rows_is_summed_within_bounded_memory() -> None:
    import tracemalloc

    n = 60_000
    rows = np.zeros((n, 4), np.int32)
    one = Records(
        codes=rows,
        patient=np.zeros(n, np.int64),
        identity=np.zeros((1, 16), np.uint8),
        rows_per_patient=np.array([n]),
    )
    wide = Sums(features=tuple(np.full((s, 100), 0.001) for s in sizes()), clip_norm_l2=1.0)
    tracemalloc.start()
    found = wide.contribution(one).units * wide.lattice
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(found - 0.001).max() < 1e-8 and peak < 120e6  # all rows at once would take 190 MB a copy


# ---- what the numbers mean ----------------------------------------------------------------------------------


def test_sums_are_means_over_rows_summed_over_patients() -> None:
    records, query = people(200, seed=4, most_rows=5), sums(clip=64.0)
    vectors = np.concatenate([f[records.codes[:, c]] for c, f in enumerate(query.features)], axis=1)
    by_hand = pd.DataFrame(vectors).groupby(records.patient).mean().sum().to_numpy()
    found = query.contribution(records).units * query.lattice
    assert np.abs(found - by_hand).max() / records.patients < 1e-9 * query.clip_norm_l2


def test_the_logistic_score_is_that_of_statsmodels() -> None:
    """Off the fit: the score vector; at the fit: zero. Without noise and within C, to 1e-9 of C for each patient."""
    api = pytest.importorskip("statsmodels.api")
    rows = codes(500, seed=6)
    rows = rows[rows[:, 3] != 2]  # a missing outcome is not used
    made = logistic(seed=6)
    x = np.concatenate([np.ones((len(rows), 1)), *(t[rows[:, c]] for c, t in enumerate(made.design))], axis=1)
    theirs = api.Logit(rows[:, 3], x)
    query = Estimates(model=made, clip_norm_l2=64.0)
    found = query.contribution(alone(rows)).units * query.lattice
    assert np.abs(found - theirs.score(made.beta)).max() < 1e-9 * len(rows) * query.clip_norm_l2
    assert np.abs(made.vectors(rows).sum(axis=0) - theirs.score(made.beta)).max() < 1e-10
    fitted = logistic(seed=6, beta=theirs.fit(disp=0, tol=1e-12).params)
    assert np.abs(fitted.vectors(rows).sum(axis=0)).max() < 1e-6


def risk_sets(rows: np.ndarray, made: Cox) -> Cox:
    """The same regression with event times, hazard and means of these very rows (Breslow)."""
    when, event = made.time[1][rows[:, 2]], rows[:, 3] == 1
    x = np.concatenate([t[rows[:, c]] for c, t in enumerate(made.design)], axis=1)
    risk = np.exp(x @ made.beta)
    times = np.unique(when[event])
    at_risk = when[None, :] >= times[:, None]
    weight = at_risk @ risk
    return Cox(
        time=made.time,
        event=made.event,
        design=made.design,
        beta=made.beta,
        times=times,
        increments=np.array([(event & (when == t)).sum() for t in times]) / weight,
        means=(at_risk * risk) @ x / weight[:, None],
    )


def test_the_cox_score_is_that_of_statsmodels_and_its_rows_those_of_lin_and_wei() -> None:
    duration = pytest.importorskip("statsmodels.duration.hazard_regression")
    rows = codes(400, seed=7)
    rows = rows[(rows[:, 3] != 2) & (rows[:, 2] != sizes()[2] - 1)]
    made = risk_sets(rows, cox(seed=7))
    x = np.concatenate([t[rows[:, c]] for c, t in enumerate(made.design)], axis=1)
    theirs = duration.PHReg(rows[:, 2].astype(float), x, status=rows[:, 3], ties="breslow")
    assert np.abs(made.vectors(rows).sum(axis=0) - theirs.score(made.beta)).max() < 1e-9
    query = Estimates(model=made, clip_norm_l2=64.0)
    found = query.contribution(alone(rows)).units * query.lattice
    assert np.abs(found - theirs.score(made.beta)).max() < 1e-9 * len(rows) * query.clip_norm_l2
    for row, vector in zip(rows[:25], made.vectors(rows[:25]), strict=True):
        xi = np.concatenate([t[row[c]] for c, t in enumerate(made.design)])
        t, place = float(row[2]), max(int((made.times <= row[2]).sum()) - 1, 0)
        by_hand = (row[3] == 1) * (xi - made.means[place])
        for k, step in enumerate(made.times):
            if step <= t:
                by_hand = by_hand - (xi - made.means[k]) * math.exp(xi @ made.beta) * made.increments[k]
        assert np.abs(vector - by_hand).max() < 1e-12


def test_rows_that_are_not_used_add_nothing_and_still_count_among_their_patients() -> None:
    for model in (logistic(), cox()):
        rows = codes(50)
        rows[:, 3] = 2  # missing
        assert not model.vectors(rows).any()
    rows = codes(50)
    rows[:, 2] = sizes()[2] - 1  # no time
    assert not cox().vectors(rows).any()
    rows = codes(2, seed=1)
    rows[:, 3] = [1, 2]
    pair = Records(
        codes=rows,
        patient=np.zeros(2, np.int64),
        identity=np.zeros((1, 16), np.uint8),
        rows_per_patient=np.array([2]),
    )
    query = Estimates(model=logistic(), clip_norm_l2=100.0)
    both = query.contribution(pair).units * query.lattice
    assert np.allclose(both, logistic().vectors(rows)[0] / 2, atol=1e-6)


def test_before_the_first_step_there_is_no_hazard_and_the_first_mean() -> None:
    made = cox()
    row = codes(1)
    row[0, 2], row[0, 3] = 0, 1
    x = np.concatenate([t[row[0, c]] for c, t in enumerate(made.design)])
    assert np.array_equal(made.vectors(row)[0], x - made.means[0])


# ---- the wire and hostile forms -----------------------------------------------------------------------------


def test_the_wire_form_comes_back_as_it_went() -> None:
    records = people(20)
    for query in queries(clip=0.3):
        fields, blobs = query.to_wire()
        again = from_wire(query.kind, fields, blobs)
        assert type(again) is type(query) and again.to_wire() == (fields, blobs)
        assert again.sensitivity_l2 == query.sensitivity_l2 and again.lattice == query.lattice
        assert np.array_equal(again.contribution(records).units, query.contribution(records).units)


@pytest.mark.parametrize("query", queries(), ids=lambda q: getattr(getattr(q, "model", q), "name", "sums"))
def test_a_wire_form_with_a_piece_missing_or_swapped_is_refused_by_code(query: Query) -> None:
    fields, blobs = query.to_wire()

    def refused(f: Any, b: Any) -> None:
        with pytest.raises(ProtocolError, match="QUERY-"):
            from_wire(query.kind, f, b).check_codes(sizes())

    for key in fields:
        refused({k: v for k, v in fields.items() if k != key}, blobs)
        for bad in ("nan", "x", None, -1, 10**9, 0.5, [], [0.5], [-1] * 4, [10**12] * 4, {}, "-0x1p0", "0x1p200"):
            refused({**fields, key: bad}, blobs)
    for key, blob in blobs.items():
        refused(fields, {k: v for k, v in blobs.items() if k != key})
        refused(fields, {**blobs, key: blob + b"\0"})
        if blob:
            refused(fields, {**blobs, key: blob + blob})
            refused(fields, {**blobs, key: blob[: len(blob) // 2]})
        if blob and key != "time":  # these bytes are a NaN there: a code that is not used
            refused(fields, {**blobs, key: np.full(len(blob) // 4, 2**31 - 1, "<i4").tobytes()})
        if key not in ("event", "outcome") and len(blob):
            poisoned = [np.inf, -np.inf, 1e300] + ([] if key == "time" else [np.nan])
            for value in poisoned:
                numbers = np.frombuffer(blob, "<f8").copy()
                numbers[-1] = value
                refused(fields, {**blobs, key: numbers.tobytes()})


def altered(model: Cox, **changes: Any) -> Cox:
    names = ("time", "event", "design", "beta", "times", "increments", "means")
    return Cox(**({n: getattr(model, n) for n in names} | changes))


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("SHAPE", lambda: Sums(features=(), clip_norm_l2=1.0)),
        ("SHAPE", lambda: Sums(features=tuple(np.zeros((s, 0)) for s in sizes()), clip_norm_l2=1.0)),
        ("SHAPE", lambda: Sums(features=(np.zeros(3),), clip_norm_l2=1.0)),
        ("SHAPE", lambda: Sums(features=(np.zeros((3, 1), np.float32),), clip_norm_l2=1.0)),
        ("SHAPE", lambda: Sums(features=(np.zeros((0, 1)),), clip_norm_l2=1.0)),
        ("SIZE", lambda: Sums(features=(np.zeros((1, 1 << 16)),), clip_norm_l2=1.0)),
        ("SIZE", lambda: Sums(features=(np.broadcast_to(np.zeros(1), (9000, 1000)),), clip_norm_l2=1.0)),
        ("VALUE", lambda: Sums(features=(np.array([[np.nan]]),), clip_norm_l2=1.0)),
        *(("CLIP", lambda bad=bad: sums(clip=bad)) for bad in (0.0, -1.0, math.nan, math.inf, 2.0**101)),
        ("CLIP", lambda: Estimates(model=cox(), clip_norm_l2=math.nan)),
        ("SHAPE", lambda: logistic(beta=np.zeros(4))),
        ("VALUE", lambda: logistic(beta=np.full(5, np.nan))),
        ("VALUE", lambda: Logistic(outcome=(3, np.array([0, 1, 2], np.int32)), design=design(), beta=np.zeros(5))),
        ("VALUE", lambda: Logistic(outcome=(3, np.array([0, 1, -2], np.int32)), design=design(), beta=np.zeros(5))),
        ("SHAPE", lambda: Logistic(outcome=(3, np.array([0.0, 1, 0])), design=design(), beta=np.zeros(5))),
        ("VALUE", lambda: altered(cox(), times=cox().times[::-1])),
        ("VALUE", lambda: altered(cox(), times=np.zeros(12))),
        ("VALUE", lambda: altered(cox(), increments=-cox().increments)),
        ("VALUE", lambda: altered(cox(), increments=np.full(12, np.nan))),
        ("VALUE", lambda: altered(cox(), means=np.full((12, 3), np.inf))),
        ("SHAPE", lambda: altered(cox(), means=np.zeros((3, 12)))),
        ("SHAPE", lambda: altered(cox(), increments=np.zeros(11))),
        ("SIZE", lambda: altered(cox(), times=np.zeros(0), increments=np.zeros(0), means=np.zeros((0, 3)))),
        ("VALUE", lambda: altered(cox(), time=(2, np.full(sizes()[2], np.inf)))),
        ("SHAPE", lambda: altered(cox(), time=(2, np.arange(sizes()[2])))),
        ("SHAPE", lambda: altered(cox(), design=tuple(np.zeros((s, 0)) for s in sizes()), beta=np.zeros(0))),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(code: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ProtocolError, match=f"QUERY-{code}"):
        make()


def test_tables_of_another_dictionary_are_refused() -> None:
    for query in queries():
        query.check_codes(sizes())
        for wrong in ((), sizes()[:3], (*sizes(), 3), tuple(s + 1 for s in sizes())):
            with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
                query.check_codes(wrong)
    for away in (4, -1):
        with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
            altered(cox(), time=(away, cox().time[1])).check_codes(sizes())
        with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
            Logistic(outcome=(away, np.array([0, 1, -1], np.int32)), design=design(), beta=np.zeros(5)).check_codes(
                sizes()
            )


def test_a_contribution_never_leaves_and_a_predictor_is_held() -> None:
    query = queries()[0]
    with pytest.raises(TypeError, match="never leaves"):
        copy.deepcopy(query.contribution(people(3)))
    steep = logistic(beta=np.array([1e6, 0, 0, 0, 0.0]))
    rows = codes(4)
    rows[:, 3] = 0
    assert np.array_equal(steep.vectors(rows)[:, 0], np.full(4, -1.0 / (1.0 + math.exp(-MAX_ETA))))


# ---- the noise ----------------------------------------------------------------------------------------------


def test_the_noise_is_that_of_the_stated_sensitivity() -> None:
    """One release of 500 numbers each: the noise's SD within 20 % of multiplier · sensitivity (false alarm 1e-9)."""
    wide = tuple(np.tile(f, (1, 100)) for f in sums().features)
    joint = Joint(columns=(0,), maps=(np.arange(sizes()[0], dtype=np.int32),), sizes=(500,))
    fat = design()
    big = Logistic(
        outcome=(3, np.array([0, 1, -1], np.int32)),
        design=tuple(np.tile(t, (1, 125)) for t in fat),
        beta=np.zeros(501),
    )
    for query in (
        Sums(features=wide, clip_norm_l2=0.3),
        Estimates(model=big, clip_norm_l2=5.0),
        Tallies(derived=(joint,)),
    ):
        noise = checks.noise_of(query, people(5), noise=3.0) * query.lattice
        assert 0.8 < noise.std() / (3.0 * query.sensitivity_l2) < 1.2, query.kind


@pytest.mark.parametrize("clip", [2.0**-100, 1e-9, 1.0, 1e6, 2.0**100])
@pytest.mark.parametrize("noise", [0.01, 1e6])
def test_neither_noise_nor_ring_is_left_behind_by_the_finer_lattice(clip: float, noise: float) -> None:
    """The smallest and largest noise of any plan, with the ring of a hundred sites."""
    for query in (sums(clip=clip), Tallies(derived=(Joint(columns=(0,), maps=(np.zeros(3, np.int32),), sizes=(1,)),))):
        values = checks.released(query, people(5), noise=noise).values
        assert len(to_ring(values, parties=100)) == query.dim
