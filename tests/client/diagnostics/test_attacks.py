"""Attacks: a copied table is given away, rows of strangers are not, and a weak attack says that it is one."""

from __future__ import annotations

import numpy as np
import pytest
from diagnosing import cohort, held, missing, people, schema, synthetic

from cohortium.client.diagnostics import attacks, intervals, linking
from cohortium.client.diagnostics import singling_out as singling
from cohortium.client.diagnostics.attacks import Attack
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.common.encoding import grids
from cohortium.common.evaluation.base import Figure


def residual(attack: Attack) -> tuple[float, float]:
    """The residual risk's interval."""
    assert attack.control is not None
    found = intervals.residual(*attack.train, *attack.control)
    assert found is not None
    return found[1]


def every(found: Cohort, seed: int = 0) -> dict[str, Attack]:
    link = linking.linkability(found, seed=seed)
    assert link is not None
    made = [*singling.singling_out(found, missing=missing(), seed=seed), link]
    made += linking.inference(found, missing=missing(), seed=seed)
    return {attack.key: attack for attack in made}


def test_a_copied_table_is_given_away() -> None:
    """Red if an attack ran on the wrong patients, used the secret's own column the wrong way, or lost its nearest."""
    found = every(cohort("copy", 800, 1200))
    assert residual(found["linkability"])[0] > 0.6
    assert residual(found["inference_6"])[0] > 0.15 and residual(found["inference_7"])[0] > 0.3
    many = found["singling_many"]
    assert many.control is not None and many.train[0] > many.control[0]


def test_rows_of_strangers_give_no_patient_away() -> None:
    for key, attack in every(cohort("fresh", 800, 1200)).items():
        assert residual(attack)[0] <= 0, key


def test_shuffled_rows_make_weak_attacks_that_say_so() -> None:
    found = cohort("shuffled", 800, 1200)
    attack = every(found)["inference_7"]
    assert attack.weak and all("says nothing either way" in i.limits for i in attacks.items(found, attack)[:1])
    assert not every(cohort("copy", 800, 1200))["linkability"].weak


def test_the_secret_itself_is_not_among_what_the_attacker_knows() -> None:
    """Red if the nearest row were sought with the secret: on a copied table with permuted secrets it would be right."""
    records = people(600)
    kept = held(records)
    rows = records.subset(~kept).codes.copy()
    rows[:, 7] = np.random.default_rng(0).permutation(rows[:, 7])
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, kept, rows, seed=0)
    attack = next(a for a in linking.inference(found, missing=missing(), seed=0) if a.key == "inference_7")
    assert attack.train[0] / attack.train[1] < 0.75


def test_a_number_is_guessed_to_a_twentieth_of_the_rows() -> None:
    found = cohort("fresh", 400, 400)
    scale = found.scales[1]
    truth = np.array([50, 50, 50], dtype=np.int32)
    near = int(np.flatnonzero(np.abs(scale.place[:-1] - scale.place[50]) <= linking.NEAR_ENOUGH)[-1])
    guess = np.array([near, near + 1, grids(schema())[1].missing], dtype=np.int32)
    assert linking._right(found, 1, truth, guess).tolist() == [True, False, False]


def test_only_patients_whose_secret_is_known_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linking, "secrets", lambda columns, seed: (3,))
    found = cohort("fresh", 400, 400)
    (attack,) = linking.inference(found, missing=missing(), seed=0)
    gone = missing()[3]
    assert attack.train[1] == (found.train[:, 3] != gone).sum() < 200
    assert attack.control is not None and attack.control[1] == (found.control[:, 3] != gone).sum()


def test_a_condition_means_what_it_says() -> None:
    gone = missing()
    codes = np.array([[0, 10, 5, gone[3], 0, 0, 0, 0], [1, 20, 5, 7, 0, 0, 0, 0]], dtype=np.int32)
    assert singling.met(((1, singling.AT_LEAST, 20),), codes, gone).tolist() == [False, True]
    assert singling.met(((1, singling.AT_MOST, 10), (0, singling.SAME, 0)), codes, gone).tolist() == [True, False]
    # a missing number is in no range, and can be asked for
    assert singling.met(((3, singling.AT_LEAST, 0),), codes, gone).tolist() == [False, True]
    assert singling.met(((3, singling.SAME, int(gone[3])),), codes, gone).tolist() == [True, False]


def test_training_and_control_are_of_one_size_for_singling_out() -> None:
    """Red if all training patients were attacked: a condition isolates among few patients more easily."""
    records = people(600)
    few = np.arange(records.patients) % 10 == 0
    found = Cohort.of(tuple(schema().modelled), grids(schema()), records, few, synthetic("fresh", records, 600), seed=0)
    train, control = found.equal_parts()
    assert len(train) == len(control) == 60
    one, several = singling.singling_out(found, missing=missing(), seed=0)
    assert one.control is not None and several.control is not None and several.train[1] == several.control[1] <= 15


@pytest.mark.slow
@pytest.mark.parametrize("key", ["singling_many", "linkability", "inference_6"])
def test_the_residual_risk_covers_nothing_at_its_rate(key: str) -> None:
    """40 made-up hospitals whose synthetic rows are of strangers: 0 is inside 95 times in 100 (at least 34 of 40)."""
    inside = 0
    for seed in range(40):
        found = cohort("fresh", 160, 160, seed=seed)
        if key == "singling_many":
            attack = singling.singling_out(found, missing=missing(), seed=seed)[1]
        elif key == "linkability":
            attack = linking.linkability(found, seed=seed) or pytest.fail("no attack")
        else:
            attack = next(a for a in linking.inference(found, missing=missing(), seed=seed) if a.key == key)
        low, high = residual(attack)
        inside += low <= 0 <= high
    assert inside >= 34


def test_nothing_to_try_is_not_a_success_rate() -> None:
    found = cohort("fresh", 100, 100)
    none = Attack(key="x", label="X", guess="", train=(0, 0), control=(0, 0), blind=(1, 10))
    assert [item.figure.value for item in attacks.items(found, none)] == [None, None, None, 0.1]
    alone = Attack(key="x", label="X", guess="", train=(1, 10), control=None, blind=(1, 10))
    told = attacks.items(found, alone)
    assert told[0].figure.value is None and "control" in told[0].figure.reason
    assert isinstance(told[1].figure, Figure) and told[1].figure.value == 0.1


def test_sides_follow_the_dictionary_and_cover_it() -> None:
    columns = tuple(schema().modelled)
    assert linking.sides(columns) == ((0, 1), (2, 3, 4, 5, 6, 7))
    plain = tuple(c for c in columns if not c.role)
    assert linking.sides(plain) == ((0, 2), (1, 3))
    assert linking.secrets(columns, seed=0) == (6, 7) and len(linking.secrets(plain, seed=0)) == 4
