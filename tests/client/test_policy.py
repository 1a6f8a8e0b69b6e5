"""site.toml: what the officer wrote is what holds, nothing has a lax default, and what is not allowed is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hospital import plan, policy, stage

from cohortium.client.policy import Policy, Rehearsal
from cohortium.common.errors import Refused, UsageError

SETTINGS = (
    "lifetime_epsilon",
    "lifetime_delta",
    "minimum_sites",
    "minimum_patients",
    "generators",
    "strategies",
    "evaluation",
    "name",
    "coordinator_key",
    "table",
    "unit",
    "hospitals",
    "minimum_colluders",
)


@pytest.mark.parametrize("rehearsal", [None, Rehearsal(), Rehearsal(seed=3), Rehearsal(seed=3, noise=False)])
def test_a_policy_survives_its_file(rehearsal: Rehearsal | None, tmp_path: Path) -> None:
    made = policy('A "quoted" \\ ward: Zürich', rehearsal=rehearsal, lifetime_delta=1e-7, minimum_patients=50)
    made.save(tmp_path / "site.toml")
    assert Policy.load(tmp_path / "site.toml") == made
    pinned = policy("a", peers=(('Zürich "2"', "ab" * 32), ("b", "0" * 64)), minimum_colluders=2, hospitals=3)
    pinned.save(tmp_path / "site.toml")
    assert Policy.load(tmp_path / "site.toml") == pinned
    policy("a", peers=()).save(tmp_path / "site.toml")
    assert Policy.load(tmp_path / "site.toml").peers == ()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_has_a_default(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    policy("a").save(path)
    lines = path.read_text().splitlines()
    assert sum(line.startswith(setting + " =") for line in lines) == 1
    path.write_text("\n".join(line for line in lines if not line.startswith(setting + " =")))
    with pytest.raises(UsageError) as caught:
        Policy.load(path)
    assert caught.value.code == "SITE-KEY" and setting in caught.value.sentence


BAD = {
    "lifetime_epsilon": ["0.0", "-1.0", "nan", "inf", '"x"', "[]"],
    "lifetime_delta": ["0.0", "0.01", "1.0", "nan"],
    "minimum_sites": ["0", "-1", "1.5", "true", '"3"'],
    "minimum_patients": ["-1", "2.5", "true"],
    "minimum_colluders": ["-1", "0.5", "true", '"0"'],
    "hospitals": ["0", "1.0", '"1"'],
    "unit": ['""', "1", "[]"],
    "generators": ['"mixture"', "[1]", "3"],
    "strategies": ['"local"', "[true]"],
    "evaluation": ['"false"', "0", "[]"],
    "coordinator_key": ['"ab"', "5"],
}


@pytest.mark.parametrize(("setting", "value"), [(s, v) for s, values in BAD.items() for v in values])
def test_a_setting_of_another_type_or_range_is_refused(setting: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    policy("a").save(path)
    lines = [f"{setting} = {value}" if x.startswith(setting + " =") else x for x in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError) as caught:
        Policy.load(path)
    assert caught.value.code in ("SITE-TOML", "SITE-CAP", "SITE-POLICY")


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SITE-MISSING"):
        Policy.load(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("[site")
    with pytest.raises(UsageError, match="SITE-TOML"):
        Policy.load(tmp_path / "site.toml")


def test_a_cap_must_be_one() -> None:
    for epsilon, delta in ((0.0, 1e-6), (math.inf, 1e-6), (math.nan, 1e-6), (1.0, 0.0), (1.0, 1e-3)):
        with pytest.raises(UsageError, match="SITE-CAP"):
            policy("a", lifetime_epsilon=epsilon, lifetime_delta=delta)


def test_a_peers_key_must_be_one(tmp_path: Path) -> None:
    for key in ("", "ab", "zz" * 32, "AB" * 32):
        with pytest.raises(UsageError, match="SITE-POLICY"):
            policy("a", peers=(("b", key),))
    policy("a").save(tmp_path / "site.toml")
    good = (tmp_path / "site.toml").read_text()
    for value in ('"b"', "{b = 1}", "[]"):
        (tmp_path / "site.toml").write_text(good + f"peers = {value}\n")
        with pytest.raises(UsageError, match="SITE-TOML"):
            Policy.load(tmp_path / "site.toml")


THREE = plan(("a", "b", "c"), mode="secure-sum")
SILENT = [stage("one", "counts", 0, noise_multiplier=0.0)]
HELD = [stage("one", "counts", 0), stage("two", "counts", 1, part="holdout")]
ATTACKED = [*HELD, stage("three", "tallies", 2, part="train")]
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "POLICY-SITE": ({}, plan(("b",))),
    "POLICY-SITES": ({"minimum_sites": 2}, plan()),
    "POLICY-UNIT": ({}, plan(unit="row")),
    "POLICY-HOSPITALS": ({"hospitals": 2}, plan()),
    "POLICY-COLLUDERS": ({"minimum_colluders": 1}, THREE),
    "POLICY-GENERATOR": ({"generators": ("joined",)}, plan()),
    "POLICY-STRATEGY": ({"strategies": ("secure-sum",)}, plan()),
    "POLICY-EVALUATION": ({"evaluation": False}, plan(stages=HELD)),
    "POLICY-ATTACKS": ({}, plan(stages=ATTACKED)),
    "POLICY-NOISE": ({}, plan(stages=SILENT)),
    "POLICY-DELTA": ({"lifetime_delta": 1e-7}, plan()),
}


@pytest.mark.parametrize("code", CASES)
def test_a_plan_that_is_not_allowed_is_refused(code: str) -> None:
    options, agreed = CASES[code]
    with pytest.raises(Refused) as caught:
        policy("a", **options).check(agreed)
    assert caught.value.code == code and caught.value.hint


def test_a_plan_that_is_allowed_passes() -> None:
    policy("a").check(plan())
    policy("a").check(plan(hospitals=2))
    policy("a", minimum_colluders=1).check(plan())  # in local mode nobody else is trusted anyway
    policy("a", minimum_colluders=1).check(plan(("a", "b", "c"), mode="secure-sum", survivors=3, colluders=1))
    policy("a").check(plan(stages=HELD))
    policy("a", attacks=True).check(plan(stages=ATTACKED))


@pytest.mark.parametrize("kind", ["tallies", "sums", "estimates"])
def test_training_patients_are_asked_about_the_table_only_where_the_policy_says_so(kind: Any, tmp_path: Path) -> None:
    """Whatever the stage is called: a plan cannot hide such a question behind a name."""
    agreed = plan(stages=[stage("ranges", kind, 0, part="train")])
    with pytest.raises(Refused, match="POLICY-ATTACKS"):
        policy("a").check(agreed)
    policy("a", attacks=True).save(tmp_path / "site.toml")
    assert Policy.load(tmp_path / "site.toml").attacks
    policy("a").save(tmp_path / "site.toml")
    assert not Policy.load(tmp_path / "site.toml").attacks


def test_the_cap_is_told_only_where_the_officer_says_so(tmp_path: Path) -> None:
    assert not policy("a").tell_cap
    for told in (True, False):
        policy("a", tell_cap=told).save(tmp_path / "site.toml")
        assert Policy.load(tmp_path / "site.toml").tell_cap is told


def test_only_a_rehearsal_without_noise_may_switch_noise_off() -> None:
    policy("a", rehearsal=Rehearsal(noise=False)).check(plan(stages=SILENT))
    for rehearsal in (None, Rehearsal(), Rehearsal(seed=1)):
        with pytest.raises(Refused, match="POLICY-NOISE"):
            policy("a", rehearsal=rehearsal).check(plan(stages=SILENT))


# ---- databases, officers, unknown settings --------------------------------------------------------------------

DATABASE = {"table": "postgresql://reader@db/ward", "query_file": "patients.sql", "password": "env:WARD_PASSWORD"}


def test_a_database_and_several_officers_survive_their_file(tmp_path: Path) -> None:
    for options in (
        DATABASE,
        {"table": "duckdb:////data/w.duckdb", "query": 'SELECT "a" FROM b', "several_rows": True},
        {"officers": ("ab" * 32, "cd" * 32), "officers_needed": 2},
    ):
        made = policy("a", **options)
        made.save(tmp_path / "site.toml")
        assert Policy.load(tmp_path / "site.toml") == made
    assert policy("a", **DATABASE).one_row and not policy("a").one_row
    assert not policy("a", **DATABASE, several_rows=True).one_row


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"table": "postgresql://reader:pw@db/ward"}, "SITE-PASSWORD"),
        ({"table": "mysql://reader@db/ward"}, "SITE-URL"),
        ({"query": "SELECT 1"}, "SITE-QUERY"),  # beside query_file
        ({"query_file": None}, "SITE-QUERY"),
        ({"table": "data.parquet"}, "SITE-QUERY"),
        ({"password": "hunter2"}, "SECRET-FORM"),
        ({"table": ""}, "SITE-TABLE"),
    ],
)
def test_a_database_that_is_not_described_whole_is_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError, match=code) as caught:
        policy("a", **(DATABASE | options))
    assert "hunter2" not in "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    "options",
    [
        {"officers": ()},
        {"officers": ("ab" * 32, "ab" * 32)},
        {"officers": ("xyz",)},
        {"officers": ("ab" * 32,), "officers_needed": 2},
        {"officers": ("ab" * 32,), "officers_needed": 0},
        {"officers_needed": 2},
    ],
)
def test_officers_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="SITE-OFFICERS"):
        policy("a", **options)


@pytest.mark.parametrize("line", ["peer = {}", "minimum_site = 3", "officer = []"])
def test_a_misspelt_setting_is_not_a_lax_default(line: str, tmp_path: Path) -> None:
    policy("a").save(tmp_path / "site.toml")
    text = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(text.replace("[policy]", f"[policy]\n{line}"))
    with pytest.raises(UsageError, match="SITE-UNKNOWN") as caught:
        Policy.load(tmp_path / "site.toml")
    assert line.split()[0] in caught.value.sentence
