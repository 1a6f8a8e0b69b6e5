"""The coverage benchmark: its population has the truth it claims, it goes on, and reads its file as it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cohortium.common.encoding import encode
from cohortium.simulations.benchmarks import coverage

SETTINGS = {"epsilon": 1.0, "patients": 2000, "refits": 5, "seed": 1}


def test_the_population_has_the_truth_it_claims() -> None:
    """Within 4 standard errors at 150,000 patients; each truth moved by 8 of them would be seen."""
    study, _, estimands, _ = coverage.setting(1.0, 2000)
    codes = encode(study.schema, coverage.people(150_000, np.random.default_rng(8)), "row").codes
    fits = [one.fit(codes) for one in estimands]
    values, errors = (np.concatenate([getattr(f, what) for f in fits]) for what in ("values", "errors"))
    assert (np.abs(values - coverage.truths()) < 4 * errors).all()
    assert np.concatenate([one.names for one in estimands]).tolist()[1:] == [*coverage.DEATH, *coverage.HAZARD]


@pytest.mark.slow
def test_a_replicate_knows_more_doubt_than_the_naive_analysis() -> None:
    line = coverage.replicate(0, **SETTINGS)
    assert len(line["terms"]) == len(coverage.truths())
    for term in line["terms"]:
        low, high = term["naive_interval"]
        assert term["interval"] is None or term["interval"][1] - term["interval"][0] > high - low
    as_released = coverage.replicate(0, **SETTINGS, imposed=False)
    assert {term["slope"] for term in as_released["terms"]} == {1.0}
    assert [t["naive"] for t in as_released["terms"]] == [t["naive"] for t in line["terms"]]


def planted(path: Path, offsets: list[float], *, half: float = 1.0) -> None:
    """A file of replicates whose combined interval is truth + offset ± half, the naive one a tenth as wide."""
    lines: list[dict[str, object]] = [{"settings": SETTINGS}]
    for number, offset in enumerate(offsets):
        terms = [
            {
                "analysis": "mean",
                "term": str(k),
                "estimate": truth + offset,
                "interval": [truth + offset - half, truth + offset + half],
                "naive": truth + offset,
                "naive_interval": [truth + offset - half / 10, truth + offset + half / 10],
                "real": truth,
            }
            for k, truth in enumerate(coverage.truths())
        ]
        lines.append({"replicate": number, "terms": terms})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_coverage_is_counted_as_planted(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    planted(path, [0.0, 0.5, -0.5, 2.0])
    found = coverage.summary(coverage.run(path, replicates=4, workers=1, settings=SETTINGS))
    assert {row["coverage"] for row in found} == {0.75} and {row["naive_coverage"] for row in found} == {0.25}
    low, high = found[0]["coverage_interval"]
    assert (low, high) == pytest.approx((0.1941, 0.9937), abs=1e-4)  # Clopper & Pearson, 3 of 4
    assert found[0]["width"] == pytest.approx(2.0) and found[0]["without_interval"] == 0


def test_a_file_is_gone_on_with_and_one_of_other_settings_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.jsonl"
    planted(path, [0.0, 0.0, 0.0])
    whole = path.read_text()
    path.write_text(whole[:-40])  # a crash cut the last line short
    asked: list[int] = []

    class Pool:
        def __init__(self, max_workers: int) -> None:
            pass

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, _: object, number: int, **settings: object) -> Pool:
            asked.append(number)
            self.line = json.loads(whole.splitlines()[3])
            return self

        def result(self) -> dict[str, object]:
            return dict(self.line)

    monkeypatch.setattr(coverage, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(coverage, "as_completed", list)
    lines = coverage.run(path, replicates=3, workers=1, settings=SETTINGS)
    assert asked == [2] and [line["replicate"] for line in lines] == [0, 1, 2]
    assert path.read_text() == whole
    with pytest.raises(SystemExit, match="other settings"):
        coverage.run(path, replicates=3, workers=1, settings={**SETTINGS, "epsilon": 2.0})
