"""Every registered generator passes this suite, with and without noise, on ordinary and on odd tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from checks_worlds import SCHEMA, encoded, facts_for, plain_ask, small_table

from cohortium.common.errors import StudyError, UsageError
from cohortium.common.generators.base import Facts, Model, Settings
from cohortium.common.generators.sampling import table, tables
from cohortium.common.registry import GENERATORS, choose, generator, load_model
from cohortium.common.schema import Schema

REAL = tuple(name for name in GENERATORS if name != "auto")


def fitted(
    name: str,
    schema: Schema,
    data: pd.DataFrame,
    *,
    mu: float | None = 1.5,
    seed: int = 0,
    epsilon: float = 3.0,
) -> Model:
    made, records = encoded(schema, data)
    facts = facts_for(schema, made, epsilon=epsilon, patients=len(data) or None)
    chosen = generator(name, facts, rounds=4)
    phases = chosen.phases(facts)
    assert sum(p.share for p in phases) == pytest.approx(1.0)
    ask = plain_ask(records, phases, mu=mu, seed=seed)
    return chosen.fit(ask, schema=schema, grids=made, facts=facts, settings=Settings(seed=seed), progress=None)


@pytest.fixture(scope="module", params=REAL)
def small(request: pytest.FixtureRequest) -> tuple[str, Model]:
    return request.param, fitted(request.param, SCHEMA, small_table(3000))


def grids_of(schema: Schema):  # type: ignore[no-untyped-def]
    return encoded(schema, pd.DataFrame({c.name: [] for c in schema.columns}))[0]


def test_rows_look_like_the_dictionary(small: tuple[str, Model]) -> None:
    rows = table(small[1], SCHEMA, grids_of(SCHEMA), 1500, seed=1)
    assert list(rows.columns) == [c.name for c in SCHEMA.columns]
    assert len(rows) == 1500
    assert rows["age"].between(18, 100).all()
    assert rows["sex"].notna().all() and rows["dead"].notna().all() and rows["age"].notna().all()
    assert set(rows["stage"].dropna()) <= {"I", "II", "III", "IV"}
    assert 0.1 < rows["bp"].isna().mean() < 0.3
    assert (rows["lab"] * 10 % 1).round(6).isin([0.0, 1.0]).mean() > 0.7  # a lab that is written to a tenth


def test_same_seed_same_rows_other_seed_other_rows(small: tuple[str, Model]) -> None:
    made = grids_of(SCHEMA)
    a, b, c = (table(small[1], SCHEMA, made, 300, seed=s) for s in (5, 5, 6))
    pd.testing.assert_frame_equal(a, b)
    assert not a.equals(c)


def test_a_model_comes_back_from_its_arrays(small: tuple[str, Model]) -> None:
    arrays, header = small[1].to_arrays()
    again = load_model(arrays, json.loads(json.dumps(header)))
    assert (again.sample(200, seed=3) == small[1].sample(200, seed=3)).all()


def test_conditions_hold_and_agree_with_selection(small: tuple[str, Model]) -> None:
    made = grids_of(SCHEMA)
    rows = table(small[1], SCHEMA, made, 800, seed=1, where={"sex": "F", "age": (70, None)})
    assert set(rows["sex"]) == {"F"}
    assert rows["age"].between(70, 100).all()
    everyone = table(small[1], SCHEMA, made, 8000, seed=2)
    chosen = everyone[(everyone["sex"] == "F") & (everyone["age"] >= 70)]
    assert abs(rows["dead"].mean() - chosen["dead"].mean()) < 0.1


def test_balanced_classes_are_equal(small: tuple[str, Model]) -> None:
    rows = table(small[1], SCHEMA, grids_of(SCHEMA), 900, seed=1, balance="dead")
    assert rows["dead"].sum() == 450


def test_unknown_conditions_are_told(small: tuple[str, Model]) -> None:
    made = grids_of(SCHEMA)
    for bad in ({"nose": 1}, {"sex": "X"}, {"age": 400}):
        with pytest.raises(UsageError):
            table(small[1], SCHEMA, made, 10, seed=1, where=bad)
    with pytest.raises(UsageError):
        table(small[1], SCHEMA, made, 10, seed=1, balance="nose")


def test_dependence_is_learned(small: tuple[str, Model]) -> None:
    real, rows = small_table(3000), table(small[1], SCHEMA, grids_of(SCHEMA), 3000, seed=1)
    truth = np.corrcoef(real["age"], real["dead"])[0, 1]
    found = np.corrcoef(rows["age"].astype(float), rows["dead"].astype(float))[0, 1]
    if small[0] != "autoregressive":  # four cold steps learn little
        assert found > 0.6 * truth


@pytest.mark.parametrize("name", REAL)
def test_the_same_answers_give_the_same_model(name: str) -> None:
    one, two = (fitted(name, SCHEMA, small_table(400), mu=None).to_arrays()[0] for _ in range(2))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[k], two[k]) for k in one)


ONE = Schema.from_dict(
    {
        "name": "one",
        "fields": [{"name": "x", "type": "integer", "constraints": {"minimum": 0, "maximum": 500}}],
    },
    where="one.json",
)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("mu", [None, 1.0, 1e-4])
def test_odd_tables(name: str, mu: float | None) -> None:
    constant = small_table(200)
    constant["age"], constant["sex"], constant["lab"] = 50, "F", 1.0
    hollow = small_table(200)
    hollow[["bp", "lab", "stage", "seen"]] = None
    for schema, data in (
        (ONE, pd.DataFrame({"x": [3] * 40 + [None] * 10})),
        (SCHEMA, constant),
        (SCHEMA, hollow),
        (SCHEMA, small_table(1)),
        (SCHEMA, small_table(5).head(0)),
    ):
        model = fitted(name, schema, data, mu=mu)
        made = grids_of(schema)
        rows = table(model, schema, made, 50, seed=0)
        assert len(rows) == 50
        for column in schema.columns:
            if column.required:
                assert rows[column.name].notna().all()
        for count in (1, 2, 3):
            assert len(table(model, schema, made, count, seed=0)) == count


@pytest.mark.slow
def test_five_hundred_columns() -> None:
    """The mixture alone at this width: tests/simulations/test_cli.py, with everything around it."""
    name = "joined"
    fields = [
        {"name": f"n{i}", "type": "number", "constraints": {"minimum": 0, "maximum": 100}} for i in range(250)
    ] + [{"name": f"s{i}", "type": "string", "constraints": {"enum": ["a", "b", "c"]}} for i in range(250)]
    wide = Schema.from_dict({"name": "wide", "fields": fields}, where="wide.json")
    rng = np.random.default_rng(0)
    data = pd.DataFrame(
        {f"n{i}": rng.uniform(0, 100, 60) for i in range(250)}
        | {f"s{i}": rng.choice(["a", "b", "c"], 60) for i in range(250)}
    )
    model = fitted(name, wide, data)
    assert table(model, wide, grids_of(wide), 20, seed=0).shape == (20, 500)


def test_blocks_do_not_change_what_a_seed_means() -> None:
    model, made = fitted("mixture", SCHEMA, small_table(500)), grids_of(SCHEMA)
    parts = list(tables(model, SCHEMA, made, 1000, seed=4, block=300))
    assert [len(p) for p in parts] == [300, 300, 300, 100]


@pytest.mark.parametrize(
    ("epsilon", "patients", "columns", "mode", "wanted"),
    [
        (1.0, 50_000, 10, "secure-sum", "mixture"),
        (3.0, 900, 14, "secure-sum", "mixture"),
        (3.0, None, 14, "secure-sum", "mixture"),
        (3.0, 6_000, 36, "secure-sum", "joined"),
        (10.0, 6_000, 36, "local", "mixture"),
        (10.0, 6_000, 500, "secure-sum", "mixture"),
        (10.0, 6_000, 1, "secure-sum", "mixture"),
    ],
)
def test_auto_is_a_rule_on_public_facts(
    epsilon: float, patients: int | None, columns: int, mode: str, wanted: str
) -> None:
    facts = Facts(
        columns=(("integer", 50, False),) * columns,
        epsilon=epsilon,
        patients=patients,
        sites=5,
        mode=mode,  # type: ignore[arg-type]
        target=None,
    )
    assert choose(facts) == wanted
    assert generator("auto", facts).name == wanted


def test_an_unknown_generator_is_told() -> None:
    with pytest.raises(StudyError, match="mixtrue") as caught:
        generator("mixtrue", facts_for(ONE, grids_of(ONE)))
    assert "joined" in caught.value.hint


@pytest.mark.parametrize(
    ("patients", "sites", "rounds"), [(1999, 5, 40), (2000, 5, 100), (2000, 30, 100), (2000, 31, 40), (None, 5, 100)]
)
def test_few_patients_and_many_sites_have_fewer_rounds(patients: int | None, sites: int, rounds: int) -> None:
    facts = Facts(
        columns=(("number", 50, False), ("level", 4, True)),
        epsilon=3.0,
        patients=patients,
        sites=sites,
        mode="secure-sum",
        target=1,
    )
    for name in ("joined", "autoregressive"):
        assert [p.repeats for p in generator(name, facts).phases(facts)][-1] == rounds
