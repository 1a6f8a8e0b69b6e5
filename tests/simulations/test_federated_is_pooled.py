"""Federated = pooled: without noise, any number of hospitals and any split give the model of one pooled table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import small_table

from cohortium.client.sources.base import read
from cohortium.common.evaluation.assess import assess
from cohortium.common.evaluation.base import Figure
from cohortium.common.evaluation.exact import exact_scores
from cohortium.common.generators.base import Model
from cohortium.common.privacy.entropy import SeededEntropy
from cohortium.common.privacy.plan import Stage
from cohortium.common.queries import AnyQuery, Gradient
from cohortium.server import evaluate
from cohortium.server.evaluate import first_rows
from cohortium.server.finish import sample
from cohortium.server.runs import RunFolder
from cohortium.server.sampling import write_rows
from cohortium.simulations.pooled import PooledAsk, fit_pooled
from cohortium.simulations.run import Request, prepare, real_side, run
from cohortium.strategies.base import SiteSum
from cohortium.strategies.local_noise import LocalNoise
from cohortium.strategies.secure_sum import SecureSum

Simulate = Callable[..., Path]
GENERATORS = [("mixture", None), ("autoregressive", 3), ("joined", 3)]
SEED = 5


def pooled(out: Path, table: Path, **options: Any) -> tuple[Model, PooledAsk]:
    """The reference: the same plan asked of one table in memory, without sites, masks or messages."""
    folder = RunFolder(root=out)
    entropy = SeededEntropy(seed=SEED, site="pooled")
    return fit_pooled(
        folder.study(),
        folder.plan(),
        read(table),
        seed=SEED,
        entropy=entropy,
        run=str(folder.facts()["run"]),
        **options,
    )


def arrays(model: Model) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in model.to_arrays()[0].items()}


def csv(out: Path) -> str:
    write_rows(RunFolder(root=out), 200, [out / "rows.csv"], seed=3)
    return hashlib.sha256((out / "rows.csv").read_bytes()).hexdigest()


def answers(out: Path) -> list[np.ndarray]:
    return [np.load(path)["values"] for path in sorted((out / "run" / "answers").glob("*.npz"))]


@pytest.mark.parametrize(("generator", "rounds"), GENERATORS)
def test_any_split_gives_the_bits_of_the_pooled_table(
    simulate: Simulate, tmp_path: Path, generator: str, rounds: int | None
) -> None:
    """K = 1, 3, 5, 10 hospitals, dealt at random, by a column's skew, and with a hospital that has nobody."""
    options: dict[str, Any] = {"generator": generator, "rounds": rounds, "noise": False, "exact": True}
    first = simulate("iid:3", survivors=2, **options)
    reference, ask = pooled(first, tmp_path / "study" / "table.parquet", exact=True)
    others = [
        simulate("iid:5", survivors=3, **options),
        simulate("iid:10", survivors=6, **options),
        simulate("by:grade", survivors=2, **options),
        simulate("dirichlet:sex:6:0.05", survivors=4, **options),
    ]
    sizes = [len(pd.read_parquet(site / "data.parquet")) for site in sorted((others[-1] / "sites").iterdir())]
    assert 0 in sizes, "this seed should leave one hospital empty"
    for out in (first, *others):
        assert all((a == b).all() for a, b in zip(answers(out), ask.answers, strict=True))
        assert arrays(RunFolder(root=out).model()) == arrays(reference)
    assert len({csv(out) for out in (first, *others)}) == 1


@pytest.mark.parametrize(("generator", "rounds"), GENERATORS)
def test_one_hospital_is_the_pooled_table(
    simulate: Simulate, tmp_path: Path, generator: str, rounds: int | None
) -> None:
    """K = 1 needs no secure sum: `local`, without noise."""
    out = simulate("iid:1", strategy="local", generator=generator, rounds=rounds, noise=False, exact=True)
    reference, _ = pooled(out, tmp_path / "study" / "table.parquet", exact=True)
    assert arrays(RunFolder(root=out).model()) == arrays(reference)


def test_rows_as_units_and_held_out_patients_too(simulate: Simulate, tmp_path: Path) -> None:
    models = []
    held = "[evaluation]\nepsilon = 1.0\nholdout = 0.25\n"
    for unit, evaluation, full in (("row", "", 1), ("id", held, 1), ("id", held, 2)):
        out = simulate("iid:4", survivors=3, noise=False, unit=unit, evaluation=evaluation, rows_per_patient=full)
        reference, ask = pooled(out, tmp_path / "study" / "table.parquet")
        assert arrays(RunFolder(root=out).model()) == arrays(reference)
        folder = RunFolder(root=out)
        if evaluation:  # asked after the fit: the same program over the same door
            kept = evaluate.kept(folder)
            task = evaluate.task_for(folder, folder.study(), folder.plan(), reference, ask, seed=SEED)
            assert kept is not None and assess(task).to_json() == kept.to_json()
            assert {s.kind for s in folder.plan().stages if s.part == "holdout"} > {"counts", "moments", "tallies"}
        assert len(answers(out)) == len(ask.answers) == folder.plan().releases
        assert all((a == b).all() for a, b in zip(answers(out), ask.answers, strict=True))
        models.append(arrays(reference))
    assert models[1] != models[2]  # rows that count in full weigh patients of two rows more


def test_a_difference_in_one_cell_is_seen(simulate: Simulate, tmp_path: Path) -> None:
    """The comparison has power: one patient's one changed value gives another model."""
    out = simulate("iid:3", noise=False)
    path = tmp_path / "study" / "table.parquet"
    table = read(path)
    table.loc[0, "age"] = 99 - int(table.loc[0, "age"])
    table.to_parquet(path, index=False)
    reference, _ = pooled(out, path)
    assert arrays(RunFolder(root=out).model()) != arrays(reference)


@pytest.mark.parametrize("sites", [3, 5, 10])
def test_the_fast_path_is_off_by_half_a_unit_per_site(
    simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: int
) -> None:
    """Asked the same question, each hospital's one rounding adds at most half a lattice unit (DESIGN 1)."""
    asked: list[Gradient] = []
    really = SecureSum.answer

    def noted(self: SecureSum, index: int, stage: Stage, query: AnyQuery, **rest: Any) -> SiteSum:
        if isinstance(query, Gradient):
            asked.append(query)
        return really(self, index, stage, query, **rest)

    monkeypatch.setattr(SecureSum, "answer", noted)
    out = simulate(f"iid:{sites}", survivors=sites // 2 + 1, generator="autoregressive", rounds=4, noise=False)
    questions = iter(asked)

    def same_question(query: AnyQuery) -> AnyQuery:
        """The federation's own parameters, so that rounding does not add up over the steps."""
        return next(questions) if isinstance(query, Gradient) else query

    plan = RunFolder(root=out).plan()
    _, ask = pooled(out, tmp_path / "study" / "table.parquet", before=same_question)
    assert len(asked) == 4 and all(query.path == "fast" for query in asked)
    gaps = []
    for index, (mine, theirs) in enumerate(zip(answers(out), ask.answers, strict=True)):
        gap = int(np.abs(mine - theirs).max())
        if plan.stage_of(index).kind != "gradient":
            assert gap == 0
            continue
        gaps.append(gap)
        assert gap <= sites / 2 + 1 / 2  # the last half is the reference's own rounding
    assert max(gaps) > 0  # there is something to bound


@pytest.mark.parametrize("sites", [1, 3, 5])
def test_seeded_noise_is_the_sum_of_the_sites_own(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, sites: int
) -> None:
    """`local` with a seed: the answer minus the pooled sum is noise of √K σ; the same seed gives it again."""
    asked: dict[int, AnyQuery] = {}
    really = LocalNoise.answer

    def noted(self: LocalNoise, index: int, stage: Stage, query: AnyQuery, **rest: Any) -> SiteSum:
        asked[index] = query
        return really(self, index, stage, query, **rest)

    monkeypatch.setattr(LocalNoise, "answer", noted)
    first = simulate(f"iid:{sites}", strategy="local")
    again = simulate(f"iid:{sites}", strategy="local")
    assert all((a == b).all() for a, b in zip(answers(first), answers(again), strict=True))
    assert arrays(RunFolder(root=first).model()) == arrays(RunFolder(root=again).model())
    assert csv(first) == csv(again)
    quiet = simulate(f"iid:{sites}", strategy="local", noise=False)
    stage = RunFolder(root=first).plan().stages[1]  # the fine histograms: asked on the public grid
    noise = (answers(first)[1] - answers(quiet)[1]) * asked[1].lattice
    planned = stage.noise_multiplier * asked[1].sensitivity_l2 * np.sqrt(sites)
    # Some 500 coordinates: the ratio's standard error is .032; 2/3 and 3/2 of the planned noise lie outside.
    assert len(noise) > 400 and 0.84 < noise.std() / planned < 1.16


def distances(out: Path, seed: int) -> dict[str, Figure]:
    """How far a finished run's rows are from the hospitals' own, without the report around it."""
    folder, real = RunFolder(root=out), real_side(out, most_rows=10_000)
    sample(folder)
    synthetic = first_rows(out / "synthetic.parquet", 10_000)
    schema, unit = folder.study().schema, folder.plan().unit
    return exact_scores(
        schema=schema, train=real.train, test=real.test, synthetic=synthetic, unit=unit, seed=seed
    ).figures


@pytest.mark.slow
def test_with_noise_the_scores_agree_within_the_seeds_spread(
    tmp_path: Path, write_study: Callable[..., tuple[Path, Path]]
) -> None:
    """Five seeds of 5 hospitals and of the same patients in 10: same law, so the same scores up to the seed.

    The difference of two means of five has a standard error of s √(2/5); 4 of them is a false alarm of 1 in 250
    at 8 degrees of freedom. The reference, shuffled columns, lies far outside.
    """
    study, table = write_study(table=small_table(300), survivors=5, epsilon=10.0, rows=400)
    scores: dict[str, list[dict[str, float]]] = {}
    for split, survivors in (("iid:5", 5), ("iid:10", 10)):
        text = study.read_text()
        (tmp_path / "study" / "now.toml").write_text(text.replace("survivors = 5", f"survivors = {survivors}"))
        for seed in range(5):
            out = tmp_path / f"{split}-{seed}".replace(":", "")
            prepare(Request(study=tmp_path / "study" / "now.toml", table=table, split=split, out=out, seed=seed))
            run(out)
            found = distances(out, seed)
            scores.setdefault(split, []).append({name: found[name].value for name in ("tvd1", "tvd2")})
            floor = found["tvd2"].floor
    for name in ("tvd1", "tvd2"):
        a, b = (np.array([score[name] for score in scores[split]]) for split in ("iid:5", "iid:10"))
        spread = max(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2), 1e-3)
        assert abs(a.mean() - b.mean()) <= 4 * spread * np.sqrt(2 / 5), (name, a, b)
    assert all(score["tvd2"] < floor for split in scores.values() for score in split)
