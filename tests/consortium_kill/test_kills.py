"""SIGKILL to every part of a consortium of real processes: nothing is unpaid, nothing is lost, the model is the same.

Guard, courier, SuperNode, SuperLink, ServerApp and the coordinator's service die at named points of a run (killing.py:
POINTS) and, where asked for, at random moments. Afterwards, always:

- every release of which a guard let something out, or the ServerApp got something, is charged in that site's ledger;
- every release that the study used stands in the study's ledger, each once, and `cohortium audit` passes;
- the model is the one of a run that nobody disturbed, bit for bit; or a site was left out of a release, which the
  study's record says; or the run ends as void or failed with a sentence on what was spent.

    COHORTIUM_FULL_KILLS=1      all six parts at all twelve points, instead of each part twice
    COHORTIUM_KILLS=300         so many kills at random moments as well; by chance, so not in the daily check
    COHORTIUM_KILLS_LOG=FILE    a JSON line for each kill

Planted and seen red: a study's notebook that is never read again (the run goes on with keys that no guard knows, and
ends void, where it should end in the same model). The judge itself is shown a release that nobody paid for.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import Kill, Story, all_points, at_points, at_random, record
from small import make_quick
from whole import AT_SITES, COMPONENTS, Whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 3600 if os.environ.get("COHORTIUM_KILLS") else 900)]
FULL = bool(os.environ.get("COHORTIUM_FULL_KILLS"))
KILLS = int(os.environ.get("COHORTIUM_KILLS", "0"))
LOG = os.environ.get("COHORTIUM_KILLS_LOG", "")

# Each part twice, at the points where there is most to lose; parts that die together save the test's time.
SOME = [
    Kill(component="guard", point=7, release=0, site="site-1"),
    Kill(component="courier", point=8, release=0, site="site-2"),
    Kill(component="SuperNode", point=8, release=0, site="site-3"),
    Kill(component="ServerApp", point=8, release=0),
    Kill(component="SuperLink", point=8, release=0),
    Kill(component="guard", point=10, release=1, site="site-3"),
    Kill(component="SuperNode", point=10, release=1, site="site-1"),
    Kill(component="courier", point=11, release=2, site="site-4"),
    Kill(component="SuperLink", point=11, release=2),
    Kill(component="service", point=11, release=2),
    Kill(component="ServerApp", point=12),
    Kill(component="service", point=12),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        made = Whole(folder=tmp_path_factory.mktemp("whole"))
        try:
            made.start()
            yield made
        finally:
            made.stop()


def check(story: Story, *, killed: int) -> None:
    if LOG:
        record(LOG, story)
    assert not story.end.problems, (story.end, story.kills)
    assert not story.missed and sum(done.processes > 0 for done in story.kills) == killed, (story.missed, story.kills)


@pytest.mark.skipif(FULL, reason="the whole table runs instead")
def test_killed_at_the_hard_points(whole: Whole) -> None:
    story = at_points(whole, 101, SOME)
    check(story, killed=len(SOME))
    assert story.end.how == "same hash" and story.end.drawn == len(whole.sites) * 4, story.end
    assert all(sum(kill.component == part for kill in SOME) >= 2 for part in COMPONENTS)
    said = whole.command("audit", str(whole.run_folder(story.run).root))
    assert "FAILED" not in said


@pytest.mark.skipif(not FULL, reason="COHORTIUM_FULL_KILLS=1")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", sorted(all_points(("site-1", "site-2", "site-3", "site-4"))))
def test_killed_at_every_point(whole: Whole, name: str) -> None:
    kills = all_points(whole.sites)[name]
    story = at_points(whole, 200 + sorted(all_points(whole.sites)).index(name), kills)
    check(story, killed=len(kills))
    assert story.end.how == "same hash", story.end


@pytest.mark.skipif(not KILLS, reason="COHORTIUM_KILLS=300")
def test_killed_at_random_moments(whole: Whole) -> None:
    """Six to twelve kills a run. A guard that dies inside its answer makes the release void: a clean end, too."""
    dice, killed, ends, seed = random.Random(KILLS), 0, list[str](), 1000
    while killed < KILLS:
        story = at_random(whole, seed, dice, kills=min(dice.randint(6, 12), KILLS - killed))
        check(story, killed=len(story.kills))
        killed, seed = killed + len(story.kills), seed + 1
        ends.append(story.end.how)
    assert "same hash" in ends or KILLS < 20, ends
    assert set(ends) <= {"same hash", "finished, sites dropped", "clean failed", "clean void"}


def test_the_judge_sees_a_release_that_nobody_paid_for(whole: Whole) -> None:
    trace = whole.trace / "left.jsonl"
    kept = trace.read_text() if trace.exists() else ""
    with open(trace, "a") as file:
        file.write(json.dumps({"site": "site-1", "run": "small-unpaid", "index": "0"}) + "\n")
    try:
        assert whole.unpaid("small-unpaid") == ["site-1 let release 0 out and did not charge it"]
    finally:
        trace.write_text(kept)


def test_every_part_is_named(whole: Whole) -> None:
    """The harness finds a process for each part, or its kills would be of nothing."""
    for component in COMPONENTS:
        if component != "ServerApp":
            for site in whole.sites if component in AT_SITES else ("",):
                assert len(whole.pids(component, site)) == 1, (component, site)
    assert Path(whole.root / "register.db").exists()
