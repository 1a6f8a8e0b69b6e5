"""Distances, association and exact scores against independent answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from threadpoolctl import threadpool_limits

from cohortium.common.errors import TableError
from cohortium.common.evaluation import cells, fidelity, references
from cohortium.common.evaluation.base import Scores
from cohortium.common.evaluation.exact import exact_scores
from cohortium.common.evaluation.fidelity import Ruler
from cohortium.common.schema import Schema

DOCUMENT = {
    "name": "toy",
    "missingValues": [""],
    "fields": [
        {"name": "pid", "type": "integer", "role": "identifier"},
        {"name": "age", "type": "integer", "constraints": {"minimum": 0, "maximum": 110}, "unit": "years"},
        {"name": "bmi", "type": "number", "constraints": {"minimum": 10, "maximum": 60}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        {"name": "grade", "type": "integer", "constraints": {"enum": [1, 2, 3]}},
        {"name": "smoker", "type": "boolean"},
        {"name": "dead", "type": "integer", "constraints": {"enum": [0, 1]}, "role": "target"},
    ],
}
SCHEMA = Schema.from_dict(DOCUMENT)


def population(rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(60, 14, rows), 0, 110).round()
    bmi = np.clip(22 + age / 15 + rng.normal(0, 4, rows), 10, 60).round(1)
    grade = 1 + (rng.random(rows) < 0.5) + (age > 65)
    risk = 1 / (1 + np.exp(-(age - 62) / 6))
    table = pd.DataFrame(
        {
            "pid": np.arange(rows) // 2,
            "age": age,
            "bmi": np.where(rng.random(rows) < 0.2, np.nan, bmi),
            "sex": np.where(rng.random(rows) < 0.4, "f", "m"),
            "grade": grade,
            "smoker": rng.random(rows) < 0.3,
            "dead": (rng.random(rows) < risk).astype(int),
        }
    )
    table.loc[rng.random(rows) < 0.05, "sex"] = None
    return table


def score(synthetic: pd.DataFrame, *, test: pd.DataFrame | None = None, **more: object) -> Scores:
    arguments = {"target": "dead", "unit": "pid"} | more
    held_out = population(400, 2) if test is None else test
    return exact_scores(schema=SCHEMA, train=population(900, 1), test=held_out, synthetic=synthetic, **arguments)


def test_the_three_figures_equal_the_benchmark() -> None:
    bench = Path(__file__).parents[4] / "shared" / "bench" / "score.py"
    if not bench.exists():
        pytest.skip("the benchmark is not beside this checkout")
    spec = importlib.util.spec_from_file_location("bench_score", bench)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, test = population(900, 1), population(400, 2)
    synthetic = references.shuffled(population(700, 3), seed=0)
    with threadpool_limits(limits=1, user_api="openmp"):
        expected = module.score(DOCUMENT, "dead", train, test, synthetic)
    got = exact_scores(schema=SCHEMA, train=train, test=test, synthetic=synthetic, target="dead", unit="pid").figures
    for key, name in (("tvd1", "tvd1"), ("tvd2", "tvd2"), ("tstr_auc", "tstr_auc"), ("trtr_auc", "trtr_auc")):
        assert got[key].value == pytest.approx(expected[name], abs=5.1e-5), key
    assert got["tvd1"].reference == pytest.approx(expected["floor1"], abs=5.1e-5)
    assert got["tvd2"].reference == pytest.approx(expected["floor2"], abs=5.1e-5)


def test_distances_by_hand() -> None:
    column = SCHEMA.column("sex")
    ruler = Ruler(cells=(cells.by_level(column, pd.Series(["f", "m", "m", None])),))
    real = ruler.encode(pd.DataFrame({"sex": ["f", "m", "m", None]}))
    made = ruler.encode(pd.DataFrame({"sex": ["f", "f", "x", "m"]}))
    assert real.codes.tolist() == [[0, 1, 1, 3]]
    assert made.codes.tolist() == [[0, 0, 2, 1]]  # a level never seen has its own cell, before missing
    assert fidelity.column_distances(real, made, ruler.sizes) == pytest.approx([0.5])
    assert fidelity.column_distances(real, real, ruler.sizes) == pytest.approx([0.0])


def test_booleans_match_however_they_are_written() -> None:
    cell = cells.by_level(SCHEMA.column("smoker"), pd.Series([True, False, None]))
    for written in ([True, False, None], ["true", "FALSE", None], [1, 0, None], [1.0, 0.0, np.nan]):
        assert cell.encode(pd.Series(written, dtype=object)).tolist() == [1, 0, 3]


def test_kolmogorov_smirnov_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200).round(1), rng.normal(0.3, 1, size=311).round(1)
    assert fidelity.kolmogorov_smirnov(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic, abs=1e-12)
    assert fidelity.kolmogorov_smirnov(np.append(a, np.nan), b) == fidelity.kolmogorov_smirnov(a, b)
    assert fidelity.kolmogorov_smirnov(np.array([np.nan]), b) is None


def test_cramers_v_is_one_for_equal_columns_and_zero_on_average_for_independent_ones() -> None:
    assert fidelity.cramers_v(np.diag([30, 40, 50])) == pytest.approx(1.0, abs=1e-9)
    assert fidelity.cramers_v(np.array([[5, 7]])) == 0.0
    rng = np.random.default_rng(1)
    drawn = [rng.multinomial(100, np.full(30, 1 / 30)).reshape(5, 6) for _ in range(200)]
    plain = [np.sqrt(stats.chi2_contingency(t[t.sum(1) > 0][:, t.sum(0) > 0])[0] / 100 / 4) for t in drawn]
    assert np.mean(plain) > 0.2  # what the correction is for
    assert np.mean([fidelity.cramers_v(t) for t in drawn]) < 0.06


def test_a_fresh_real_sample_scores_inside_its_reference_and_shuffled_columns_do_not() -> None:
    fresh = score(population(900, 7))
    tvd1, tvd2 = fresh.figures["tvd1"], fresh.figures["tvd2"]
    assert tvd2.reference_low is not None and tvd2.reference_high is not None and tvd2.floor is not None
    assert tvd2.reference_low * 0.9 < tvd2.value < tvd2.reference_high * 1.1
    assert tvd1.low is not None and tvd1.low <= tvd1.value <= tvd1.high
    gap = fresh.figures["association_gap"]
    assert gap.value < 0.5 * gap.floor
    assert {v.use: v.word for v in fresh.verdicts}["Strength of relations"] == "good"
    mixed = score(references.shuffled(population(900, 1), seed=3))
    words = {v.use: v.word for v in mixed.verdicts}
    assert words["Strength of relations"] == "not fit"
    assert words["Training a prediction model"] == "not fit"
    assert words["Describing one column at a time"] == "good"
    assert mixed.associations is not None
    assert {mixed.associations.worst[0].first, mixed.associations.worst[0].second} & {"age", "grade", "dead"}


def test_the_sampling_band_holds_a_second_real_sample() -> None:
    """The band is the 95 % range of one cell; a fresh sample stays inside about that often, not always."""
    inside = []
    for seed in range(6):
        table = population(1800, 50 + seed)
        table["pid"] = np.arange(len(table))
        scores = exact_scores(
            schema=SCHEMA,
            train=table[:900],
            test=table[900:1300],
            synthetic=table[900:].iloc[-500:],
            unit="pid",
        )
        for c in scores.columns:
            inside += [low <= s <= high for low, s, high in zip(c.band_low, c.synthetic, c.band_high)]
    assert 0.85 < np.mean(inside) < 0.995


def test_jackknife_width_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=1000)
    group = references.patient_groups(np.arange(1000), seed=0)
    without = np.array([x[group != g].mean() for g in range(10)])
    half = references.jackknife_half_width(without)
    assert half is not None
    assert 0.4 < float(half) / (1.96 * x.std() / np.sqrt(1000)) < 2.0
    assert references.jackknife_half_width(without[:1]) is None


def test_patients_stay_together_when_dealt() -> None:
    patients = np.repeat(np.arange(30), 4)
    for part in references.deals(patients, 0.3, 20, seed=1):
        assert part.sum() == 36
        assert all(len(set(part[patients == p])) == 1 for p in range(30))


def test_the_same_seed_gives_the_same_json_and_json_comes_back() -> None:
    a, b = (score(population(300, 3)) for _ in range(2))
    assert a.to_json() == b.to_json()
    assert Scores.from_json(a.to_json()).to_json() == a.to_json()


@pytest.mark.parametrize("what", ["column", "rows"])
def test_tables_that_do_not_fit_are_refused(what: str) -> None:
    synthetic = population(50, 3)
    synthetic = synthetic.drop(columns="bmi") if what == "column" else synthetic.iloc[:0]
    with pytest.raises(TableError) as caught:
        score(synthetic)
    assert caught.value.code == ("EVAL-COLUMNS" if what == "column" else "EVAL-EMPTY")


def test_in_sample_is_labelled() -> None:
    scores = exact_scores(
        schema=SCHEMA,
        train=population(300, 1),
        test=None,
        synthetic=population(300, 3),
        target="dead",
        unit="pid",
    )
    assert scores.in_sample and "in-sample" in scores.basis and "in-sample" in scores.headline
    assert "in-sample" in scores.figures["tstr_auc"].how
    assert scores.figures["tvd2"].reference is not None


@pytest.mark.parametrize("spoil", ["missing", "constant", "one-row", "inf"])
def test_degenerate_tables_are_scored(spoil: str) -> None:
    train, test, synthetic = population(60, 1), population(30, 2), population(40, 3)
    for table in (train, test, synthetic):
        if spoil == "missing":
            for name in table.columns[1:]:
                table[name] = None
        elif spoil == "constant":
            for name, value in (
                ("age", 5),
                ("bmi", 20.0),
                ("sex", "f"),
                ("grade", 1),
                ("smoker", True),
                ("dead", 0),
            ):
                table[name] = value
        elif spoil == "inf":
            table["bmi"] = [np.inf, -np.inf] * (len(table) // 2)
    if spoil == "one-row":
        train, test, synthetic = train[:1], test[:1], synthetic[:1]
    scores = exact_scores(schema=SCHEMA, train=train, test=test, synthetic=synthetic, target="dead", unit="pid")
    assert scores.figures["tvd1"].value is not None
    if spoil != "inf":
        assert scores.figures["tstr_auc"].value is None and scores.figures["tstr_auc"].reason


def test_one_column_has_no_pairs() -> None:
    schema = Schema.from_dict({**DOCUMENT, "fields": DOCUMENT["fields"][:2]})
    scores = exact_scores(schema=schema, train=population(60, 1), test=population(30, 2), synthetic=population(40, 3))
    assert scores.associations is None
    assert scores.figures["tvd2"].value is None
    assert any("tvd2" in line for line in scores.unassessed)


def test_dates_are_compared_but_not_averaged() -> None:
    field = {
        "name": "seen",
        "type": "date",
        "constraints": {"minimum": "2000-01-01", "maximum": "2020-12-31"},
    }
    schema = Schema.from_dict({**DOCUMENT, "fields": [*DOCUMENT["fields"], field]})

    def dated(rows: int, seed: int, start: str) -> pd.DataFrame:
        days = np.random.default_rng(seed).integers(0, 900, rows)
        return population(rows, seed).assign(seen=pd.Timestamp(start) + pd.to_timedelta(days, unit="D"))

    scores = exact_scores(
        schema=schema,
        train=dated(200, 1, "2001-01-01"),
        test=dated(100, 2, "2001-01-01"),
        synthetic=dated(200, 3, "2010-01-01"),
    )
    by_name = {c.name: c for c in scores.columns}
    assert by_name["seen"].ks is not None and by_name["seen"].ks.value == 1.0
    assert scores.figures["tvd1"].value < 0.3
    assert any("seen" in line for line in scores.unassessed)
