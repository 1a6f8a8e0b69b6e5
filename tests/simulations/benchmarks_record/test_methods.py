"""Names, families, splits: what the command line may ask for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cohortium.common.errors import UsageError
from cohortium.common.study import Study
from cohortium.simulations.benchmarks.record.methods import chosen, methods
from cohortium.simulations.benchmarks.record.worlds import DEMO, WORLDS, World, rough, study_text
from cohortium.simulations.worlds import Split


@dataclass
class Peer:
    private: bool
    bins: tuple[str, ...]


PEERS = {
    "good": Peer(True, ("declared", "oracle")),
    "told": Peer(True, ("oracle",)),
    "open": Peer(False, ("declared",)),
}


def test_a_peer_is_there_once_for_each_kind_of_bins() -> None:
    found = methods(PEERS, ["alone"])
    assert found["good"].family == "peer" and found["good+oracle"].family == "oracle"
    assert found["good+oracle"].part == "good" and found["good+oracle"].bins == "oracle"
    assert "told" not in found and "told+oracle" in found, "what reads the raw rows never stands among the honest"
    assert found["open"].family == "public" and not found["open"].private
    assert found["alone"].family == "baseline" and found["alone"].split == "iid"
    assert next(iter(found)) == "real"


def test_two_methods_of_one_name_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="alone"):
        methods(PEERS, ["alone", "alone"])


def test_families_and_names_are_chosen_in_a_fixed_order() -> None:
    known = methods(PEERS, ["alone"])
    ours = ["ours-iid", "ours-iid-c0", "ours-site", "ours-skewed"]
    assert [m.name for m in chosen(known, ["good", "ours"])] == [*ours, "good"]
    assert chosen(known, []) == list(known.values())


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'good'"):
        chosen(methods(PEERS, []), ["goood"])


@pytest.mark.parametrize("world", [*WORLDS.values(), DEMO], ids=lambda w: w.table)
def test_every_split_can_be_read(world: World) -> None:
    for name in world.splits:
        Split.parse(world.split(name))
    assert ("site" in world.splits) == (world.site is not None)


def test_a_split_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="has no split 'site'"):
        WORLDS["rotterdam"].split("site")


@pytest.mark.parametrize(("exact", "public"), [(1, 1000), (499, 1000), (1501, 2000), (71518, 72000)])
def test_the_number_of_patients_is_told_roughly(exact: int, public: int) -> None:
    assert rough(exact) == public


def test_the_study_says_what_was_asked(tmp_path) -> None:
    from importlib import resources
    from pathlib import Path

    dictionary = Path(str(resources.files("cohortium.simulations") / "data" / "heart.schema.json"))
    facts = {"dictionary": dictionary, "epsilon": 0.5, "delta": 1e-5, "rows": 600, "patients": 1000}
    study = Study.parse(study_text(DEMO, sites=5, **facts), folder=tmp_path)
    assert (study.privacy.epsilon, study.privacy.delta, study.privacy.unit) == (0.5, 1e-5, "patient")
    assert (study.strategy.name, study.strategy.survivors, study.strategy.colluders) == ("secure-sum", 5, 1)
    assert study.generator.name == "auto" and study.target == "disease"
    assert Study.parse(study_text(DEMO, **facts), folder=tmp_path).strategy.name == "local"
