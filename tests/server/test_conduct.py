"""The conductor: every state, every way out of it, and a crash of the service in each of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conducting import SITES, FakeEngine, Stage, make, say_yes, study_of

from cohortium.common.errors import CheckFailed, PeerUnreachable, Refused
from cohortium.server.conduct import (
    LONGEST_WAIT_S,
    STOP,
    STOP_GRACE_S,
    UNKNOWN_S,
    Tries,
    ask_to_resume,
    ask_to_stop,
    is_stopped,
    told_state,
)
from cohortium.server.consortium import Consortium
from cohortium.server.driving import driving


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A consortium with one proposed run, to be copied: compiling a plan takes its time."""
    folder = tmp_path_factory.mktemp("template")
    made = make(folder / "consortium")
    return made.root, made.propose(study_of(folder / "study"))


@pytest.fixture
def proposed(template: tuple[Path, str], tmp_path: Path) -> tuple[Stage, str]:
    shutil.copytree(template[0], tmp_path / "consortium", symlinks=True)
    return Stage(made=Consortium(tmp_path / "consortium")), template[1]


@pytest.fixture
def running(proposed: tuple[Stage, str]) -> tuple[Stage, str]:
    stage, run = proposed
    say_yes(stage.made, run)
    stage.tick()
    return stage, run


def test_from_the_proposal_to_the_end(proposed: tuple[Stage, str]) -> None:
    stage, run = proposed
    stage.tick()
    say_yes(stage.made, run, *SITES[:2])
    stage.tick()
    assert stage.row(run).state == "proposed" and not stage.engine.configs, "one officer has not spoken"
    say_yes(stage.made, run, SITES[2])
    stage.tick()
    assert stage.row(run).state == "running" and stage.row(run).attempts == 1
    assert stage.engine.configs == [
        {
            "run-directory": str((stage.made.runs / run).resolve()),
            "transport": "stream",
            "hub": str(stage.made.hub.resolve()),
        }
    ]
    for status in ("pending", "starting", "running"):
        stage.engine.runs[1] = status
        stage.tick()
        assert stage.row(run).state == "running" and not stage.finished
    stage.fitted(run)
    stage.tick()
    assert stage.row(run).state == "running", "Flower has not let go yet"
    stage.end(run, "completed")
    stage.tick()
    assert stage.row(run).state == "finished" and stage.finished == [run] and len(stage.engine.configs) == 1
    stage.tick()
    assert stage.finished == [run], "the end comes once"
    assert [state for state, _ in stage.log] == ["approved", "running", "running", "running", "finished"]


def test_a_dead_serverapp_is_noticed_before_flower_does(running: tuple[Stage, str]) -> None:
    stage, run = running
    root = stage.folder(run).root
    with driving(root, 1):
        stage.tick()
        assert stage.row(run).state == "running" and not stage.engine.stopped
    stage.tick()
    assert stage.row(run).state == "approved" and "RUN-KILLED" in stage.row(run).message
    assert stage.engine.stopped == [1], "Flower is told"
    stage.tick(seconds=10.0)
    assert stage.row(run).state == "running" and len(stage.engine.configs) == 2
    stage.tick()
    assert stage.row(run).state == "running", "the lock of the first try says nothing about the second"


def test_a_dead_serverapp_whose_flower_is_away_is_noticed_too(running: tuple[Stage, str]) -> None:
    stage, run = running
    with driving(stage.folder(run).root, 1):
        stage.engine.down = True
    stage.tick()
    assert stage.row(run).state == "approved"


def test_the_transport_of_a_run_is_its_own(template: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(template[0], tmp_path / "consortium", symlinks=True)
    stage = Stage(made=Consortium(tmp_path / "consortium"))
    run = stage.made.propose(study_of(tmp_path / "study"), transport="flower")
    say_yes(stage.made, run)
    stage.tick()
    assert stage.engine.configs[0]["transport"] == "flower"


def test_one_officer_declines(proposed: tuple[Stage, str]) -> None:
    stage, run = proposed
    say_yes(stage.made, run, *SITES[:2])
    say_yes(stage.made, run, SITES[2], declined=True)
    stage.tick()
    row = stage.row(run)
    assert row.state == "void" and "declined by site-3" in row.message and "nothing was spent" in row.message
    assert not stage.engine.configs


def test_a_site_is_revoked_before_the_start(proposed: tuple[Stage, str]) -> None:
    stage, run = proposed
    say_yes(stage.made, run, *SITES[:2])
    stage.register.revoke(SITES[2])
    stage.tick()
    assert stage.row(run).state == "void" and "no longer a member: site-3" in stage.row(run).message


def test_withdrawn_before_it_began(proposed: tuple[Stage, str]) -> None:
    stage, run = proposed
    ask_to_stop(stage.register, run)
    stage.tick()
    assert stage.row(run).state == "void" and "Nothing was asked" in stage.row(run).message
    with pytest.raises(Refused) as caught:
        ask_to_resume(stage.made, stage.register, run)
    assert caught.value.code == "RUN-NOT-STOPPED" and "propose the study again" in caught.value.hint


def test_one_run_at_a_time_oldest_first(proposed: tuple[Stage, str], tmp_path: Path) -> None:
    stage, first = proposed
    second = stage.made.propose(study_of(tmp_path / "study"))
    say_yes(stage.made, second)
    say_yes(stage.made, first)
    stage.tick()
    stage.tick()
    assert (stage.row(first).state, stage.row(second).state) == ("running", "approved")
    stage.fitted(first)
    stage.end(first)
    stage.tick()
    assert (stage.row(first).state, stage.row(second).state) == ("finished", "running")


# ---- failures ------------------------------------------------------------------------------------------------


def test_a_killed_process_is_started_again_with_back_off(running: tuple[Stage, str]) -> None:
    stage, run = running
    stage.event(run, "start")
    stage.end(run)
    stage.tick()
    row = stage.row(run)
    assert row.state == "approved" and "RUN-KILLED" in row.message and "Nothing was spent" in row.message
    stage.tick(1)
    assert len(stage.engine.configs) == 1, "too early"
    stage.tick(5)
    assert len(stage.engine.configs) == 2 and stage.row(run).attempts == 2


def test_waits_grow_and_have_an_end(running: tuple[Stage, str]) -> None:
    stage, run = running
    waits = []
    while stage.row(run).state == "running":
        stage.end(run)
        stage.tick(0)
        waited = 0.0
        while stage.row(run).state == "approved" and waited < 10 * LONGEST_WAIT_S:
            stage.tick(1)
            waited += 1
        waits.append(waited)
    assert waits[:-1] == [2, 4, 8, 16, 32, 64, 128]
    row = stage.row(run)
    assert told_state(row) == "stopped" and "Gave up after 8 tries" in row.message and "cohortium resume" in row.message
    assert len(stage.engine.configs) == stage.made.limits.resume_attempts


def test_progress_makes_patience_new(running: tuple[Stage, str]) -> None:
    """A run that gets a release further each time is never given up."""
    stage, run = running
    for attempt in range(2, 30):
        stage.release(run)
        stage.end(run)
        stage.tick(0)
        assert stage.row(run).state == "approved"
        stage.tick(6)
        assert stage.row(run).attempts == attempt and stage.row(run).state == "running"


@pytest.mark.parametrize("code", ["RUN-TOO-FEW", "GRID-TOO-FEW-SITES", "SUPERLINK-CALL"])
def test_missing_sites_are_waited_for(running: tuple[Stage, str], code: str) -> None:
    """Far more tries than a crash gets, until the consortium's patience ends."""
    stage, run = running
    started = stage.now
    while stage.row(run).state in ("running", "approved"):
        if stage.row(run).state == "running":
            stage.event(run, "failed", code=code, sentence="1 of 3 sites can take part")
            stage.end(run)
        stage.tick(450)
    hours = (stage.now - started) / 3600
    assert hours == pytest.approx(stage.made.limits.patience_hours, abs=0.2)
    assert is_stopped(stage.row(run)) and code in stage.row(run).message and len(stage.engine.configs) > 100


def test_what_nothing_mends_fails_at_once(running: tuple[Stage, str]) -> None:
    stage, run = running
    stage.event(run, "failed", code="RUN-VOID", sentence="release 3 is void", fix="new run")
    stage.end(run)
    stage.tick()
    assert stage.row(run).state == "failed" and "RUN-VOID: release 3 is void" in stage.row(run).message
    assert "Propose the study again" in stage.row(run).message


@pytest.mark.parametrize("code", ["RUN-PLAN", "RESUME-QUERY", "RUN-HUB"])
def test_what_a_person_has_to_mend_is_held(running: tuple[Stage, str], code: str) -> None:
    stage, run = running
    stage.event(run, "failed", code=code, sentence="another version", fix="resume with the version that began it")
    stage.end(run)
    stage.tick()
    assert is_stopped(stage.row(run)) and "resume with the version" in stage.row(run).message


def test_an_old_failure_is_not_the_new_one(running: tuple[Stage, str]) -> None:
    """The second try dies without a word: what the first one said does not count for it."""
    stage, run = running
    stage.event(run, "failed", code="RUN-TOO-FEW", sentence="too few")
    stage.end(run)
    stage.tick()
    stage.tick(10)
    stage.end(run)
    stage.tick()
    assert "RUN-KILLED" in stage.row(run).message


def test_the_superlink_is_away_when_a_run_starts(proposed: tuple[Stage, str]) -> None:
    stage, run = proposed
    say_yes(stage.made, run)
    stage.engine.down = True
    stage.tick()
    assert stage.row(run).state == "approved" and "SUPERLINK-CALL" in stage.row(run).message
    stage.engine.down = False
    stage.tick(10)
    assert stage.row(run).state == "running"


def test_the_superlink_is_away_for_a_moment(running: tuple[Stage, str]) -> None:
    stage, run = running
    stage.engine.down = True
    for _ in range(5):
        stage.tick(10)
    assert stage.row(run).state == "running"
    stage.engine.down = False
    stage.tick()
    assert stage.row(run).state == "running" and len(stage.engine.configs) == 1


@pytest.mark.parametrize("lost", ["down", "forgotten"])
def test_a_run_that_flower_lost_is_resumed(running: tuple[Stage, str], lost: str) -> None:
    stage, run = running
    stage.tick()
    if lost == "down":
        stage.engine.down = True
    else:
        stage.engine.runs.clear()  # the SuperLink came back without its state
    stage.tick()
    stage.tick(UNKNOWN_S + 1)
    assert stage.row(run).state == "approved"


# ---- stop and resume -----------------------------------------------------------------------------------------


def test_stop_lets_a_release_end_and_resume_goes_on(running: tuple[Stage, str]) -> None:
    stage, run = running
    ask_to_stop(stage.register, run)
    stage.tick()
    assert (stage.folder(run).root / STOP).exists() and not stage.engine.stopped
    stage.event(run, "stopped")
    stage.end(run, "completed")
    stage.tick()
    assert told_state(stage.row(run)) == "stopped" and "Stopped." in stage.row(run).message
    for _ in range(3):
        stage.tick(1000)
    assert len(stage.engine.configs) == 1, "stopped is stopped"
    ask_to_resume(stage.made, stage.register, run)
    stage.tick()
    assert stage.row(run).state == "running" and not (stage.folder(run).root / STOP).exists()
    assert len(stage.engine.configs) == 2


def test_a_run_that_does_not_stop_is_stopped(running: tuple[Stage, str]) -> None:
    stage, run = running
    ask_to_stop(stage.register, run)
    stage.tick(STOP_GRACE_S - 5)
    assert not stage.engine.stopped
    stage.tick(10)
    assert stage.engine.stopped == [1]
    stage.tick()
    assert is_stopped(stage.row(run))


def test_stopped_while_it_waits_for_its_next_try(running: tuple[Stage, str]) -> None:
    stage, run = running
    stage.end(run)
    stage.tick()
    ask_to_stop(stage.register, run)
    stage.tick(1000)
    assert is_stopped(stage.row(run)) and len(stage.engine.configs) == 1


def test_stop_comes_too_late(running: tuple[Stage, str]) -> None:
    """The model is there: it is paid for, so it is published."""
    stage, run = running
    ask_to_stop(stage.register, run)
    stage.fitted(run)
    stage.end(run, "completed")
    stage.tick()
    assert stage.row(run).state == "finished"


def test_only_a_stopped_run_is_resumed(running: tuple[Stage, str]) -> None:
    stage, run = running
    with pytest.raises(Refused, match="RUN-NOT-STOPPED"):
        ask_to_resume(stage.made, stage.register, run)


def test_resuming_gives_all_tries_again(running: tuple[Stage, str]) -> None:
    stage, run = running
    while not is_stopped(stage.row(run)):
        if stage.row(run).state == "running":
            stage.end(run)
        stage.tick(400)
    ask_to_resume(stage.made, stage.register, run)
    stage.tick()
    assert Tries.load(stage.folder(run).root).count == 1
    stage.end(run)
    stage.tick()
    assert stage.row(run).state == "approved"


# ---- the end of a run ----------------------------------------------------------------------------------------


def test_a_publication_that_fails_is_tried_again_by_resume(running: tuple[Stage, str]) -> None:
    stage, run = running
    stage.fitted(run)
    stage.end(run, "completed")
    stage.finish_error = CheckFailed("LEDGER-HASH", "a copy of a ledger is damaged")
    stage.tick()
    assert is_stopped(stage.row(run)) and "LEDGER-HASH" in stage.row(run).message
    stage.finish_error = None
    ask_to_resume(stage.made, stage.register, run)
    stage.tick()
    assert stage.row(run).state == "finished" and len(stage.engine.configs) == 1, "no site is asked for that"


def test_a_model_without_its_last_line_is_not_fitted(running: tuple[Stage, str]) -> None:
    """Killed between the model and its evaluation: resumed, not published."""
    stage, run = running
    stage.fitted(run)
    (stage.folder(run).inner / "events.jsonl").write_text('{"at": 1, "event": "start"}\n{"at": 2, "event": "fit')
    stage.end(run)
    stage.tick()
    assert stage.row(run).state == "approved" and not stage.finished


# ---- the service crashes -------------------------------------------------------------------------------------


def reach(state: str, stage: Stage, run: str) -> None:
    """Bring a proposed run to a state, as a crash may meet it."""
    if state == "proposed":
        return
    say_yes(stage.made, run)
    if state.startswith("starting"):
        stage.engine.die = state.removeprefix("starting-")
        with pytest.raises(KeyboardInterrupt):
            stage.tick()
        stage.engine.die = ""
        return
    stage.tick()
    if state == "approved":
        stage.end(run)
        stage.tick()
    elif state == "stopping":
        ask_to_stop(stage.register, run)
        stage.tick()
    elif state == "stopped":
        stage.end(run)
        ask_to_stop(stage.register, run)
        stage.tick()
    elif state == "publishing":
        stage.fitted(run)
        stage.end(run, "completed")
        stage.finish_error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            stage.tick()
        stage.finish_error = None


STATES = ("proposed", "approved", "starting-before", "starting-after", "running", "stopping", "stopped", "publishing")


@pytest.mark.parametrize("flower", ["failed", "forgotten"])
@pytest.mark.parametrize("state", STATES)
def test_the_service_dies_and_comes_back(proposed: tuple[Stage, str], state: str, flower: str) -> None:
    """Nothing is lost, nothing is done twice: whatever the state, the run comes to its end after a restart.

    flower: what the SuperLink that came back with it says of the run that it had.
    """
    stage, run = proposed
    reach(state, stage, run)
    if flower == "forgotten":
        stage.engine.runs.clear()
    else:
        stage.engine.runs = dict.fromkeys(stage.engine.runs, "finished:failed")
    before = stage.row(run)
    stage.restart()
    stage.tick()
    if state == "proposed":
        assert stage.row(run) == before
        say_yes(stage.made, run)
    if state == "stopped":
        assert stage.row(run) == before
    if state in ("stopping", "stopped"):
        stage.tick(UNKNOWN_S + 1)
        assert is_stopped(stage.row(run)), "a stop survives the restart"
        ask_to_resume(stage.made, stage.register, run)
    for _ in range(10):
        if stage.row(run).state == "finished":
            break
        if stage.row(run).state == "running" and stage.row(run).flower_id in map(str, stage.engine.runs):
            stage.fitted(run)
            stage.end(run, "completed")
        stage.tick(UNKNOWN_S + 1)
    assert stage.row(run).state == "finished" and stage.finished == [run]


def test_a_restart_of_the_service_costs_seconds(running: tuple[Stage, str]) -> None:
    """However long the back-off had become: the run's process died because the service stopped it."""
    stage, run = running
    for _ in range(5):
        stage.end(run)
        stage.tick()
        stage.tick(LONGEST_WAIT_S)
    stage.end(run)
    stage.restart()
    stage.tick()
    assert stage.row(run).state == "approved"
    stage.tick(6)
    assert stage.row(run).state == "running"


def test_the_intention_is_on_disk_before_flower_hears_of_it(proposed: tuple[Stage, str]) -> None:
    """Else a crash inside start_run would start a second run beside the first, without back-off and for ever."""
    stage, run = proposed
    say_yes(stage.made, run)
    seen: list[str] = []

    class Looking(FakeEngine):
        def start_run(self, run_config: object, /) -> int:  # type: ignore[override]
            seen.append(f"{stage.row(run).state} {stage.row(run).attempts}")
            raise PeerUnreachable("SUPERLINK-CALL", "gone")

    stage.engine = Looking()
    stage.restart()
    stage.tick()
    assert seen == ["running 1"] and Tries.load(stage.folder(run).root).count == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"count": "many", "other": 1}'])
def test_a_damaged_note_of_tries_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tries.json").write_text(text)
    assert Tries.load(tmp_path) == Tries()


def test_messages_name_no_path(running: tuple[Stage, str]) -> None:
    """Members read them, too."""
    stage, run = running
    stage.event(run, "failed", code="RUN-HUB", sentence="the hub's socket", where=[str(stage.made.root)], fix="x")
    stage.end(run)
    stage.tick()
    assert not [message for _, message in stage.log if str(stage.made.root) in message]
