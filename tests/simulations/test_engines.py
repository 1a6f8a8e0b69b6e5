"""Both engines run the same apps and give the same bytes; nothing of them stays behind."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

import psutil
import pytest

from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.server.transport import Absence, GridCourier
from cohortium.simulations.engines import InProcess, Ray, run
from cohortium.simulations.faults import Fault, Faults

NAMES = ("basel", "budapest", "cleveland", "long-beach")


class Chain:
    """A guard whose answers depend on all that it was ever asked, kept on disk and nowhere else."""

    def __init__(self, directory: Path) -> None:
        self.site, self.state = directory.name, directory / "state"

    def handle(self, envelope: bytes) -> bytes:
        if envelope == b"fail":
            raise ValueError("patient 17")
        before = self.state.read_bytes() if self.state.exists() else b""
        after = hashlib.sha256(before + self.site.encode() + envelope).digest()
        self.state.write_bytes(after)
        return after * 100

    def close(self) -> None: ...


def sites(home: Path) -> list[Path]:
    for name in NAMES:
        (home / "sites" / name).mkdir(parents=True)
    return [home / "sites" / name for name in NAMES]


def three_exchanges(courier: GridCourier) -> str:
    """The study's loop in small: each request depends on all the answers before it."""
    courier.discover(NAMES, timeout_s=120)
    said, said_by_all = hashlib.sha256(), dict.fromkeys(NAMES, b"start")
    for at in range(3):
        got = courier.exchange(said_by_all, timeout_s=120, label=f"round-{at}")
        assert tuple(got) == NAMES, courier.absent
        for answer in got.values():
            said.update(answer)
        said_by_all = {name: name.encode() + said.digest() for name in NAMES}
    # A failing guard is absent, the others go on.
    got = courier.exchange({**said_by_all, "basel": b"fail"}, timeout_s=120)
    assert tuple(got) == NAMES[1:] and courier.absent == {"basel": Absence.REFUSED}
    return said.hexdigest()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("expected")
    plain = InProcess(wire=False)
    return run(three_exchanges, sites=sites(home), engine=plain, log=home / "e.log", opener=Chain)


@pytest.mark.parametrize("engine", [InProcess(threads=4), InProcess(threads=4, wire=False)])
def test_sums_of_sites_side_by_side_keep_to_one_thread(tmp_path: Path, engine: InProcess) -> None:
    """The setting is the process's: were each site to put it back, another one's sum would change its order."""
    import torch

    seen: list[int] = []

    def work(courier: GridCourier) -> None:
        three_exchanges(courier)
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(work, sites=sites(tmp_path), engine=engine, log=tmp_path / "e.log", opener=Chain)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", [InProcess(), InProcess(threads=2), InProcess(threads=4, wire=False)])
def test_in_process_same_bytes(tmp_path: Path, expected: str, engine: InProcess) -> None:
    got = run(three_exchanges, sites=sites(tmp_path), engine=engine, log=tmp_path / "e.log", opener=Chain)
    assert got == expected


def test_a_run_can_be_made_anew_in_the_same_place(tmp_path: Path, expected: str) -> None:
    for _ in range(2):
        for path in sites(tmp_path / "run"):
            assert not list(path.iterdir())
        got = run(
            three_exchanges,
            sites=list((tmp_path / "run" / "sites").iterdir()),
            engine=InProcess(),
            log=tmp_path / "e.log",
            opener=Chain,
        )
        assert got == expected, "the order of the directories does not matter"
        (tmp_path / "run").rename(tmp_path / f"kept-{_}")


def test_what_the_work_raises_comes_out(tmp_path: Path) -> None:
    def work(courier: GridCourier) -> None:
        courier.discover([*NAMES, "oslo"], timeout_s=30)

    with pytest.raises(PeerUnreachable) as caught:
        run(work, sites=sites(tmp_path), engine=InProcess(), log=tmp_path / "e.log", opener=Chain)
    assert caught.value.where == ("oslo",)


def test_faults_reach_the_grid(tmp_path: Path) -> None:
    def work(courier: GridCourier) -> set[str]:
        courier.discover(NAMES, timeout_s=30)
        return set(courier.exchange(dict.fromkeys(NAMES, b"x"), timeout_s=30, label="one"))

    engine = InProcess(faults=Faults([Fault(kind="lost", site="b*", label="one")]))
    got = run(work, sites=sites(tmp_path), engine=engine, log=tmp_path / "e.log", opener=Chain)
    assert got == {"cleveland", "long-beach"}


def test_flowers_words_go_to_the_log_and_its_handlers_come_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flower = logging.getLogger("flwr")
    before = list(flower.handlers)
    run(
        lambda courier: flower.warning("a word of Flower's"),
        sites=sites(tmp_path),
        engine=InProcess(),
        log=tmp_path / "deep" / "e.log",
        opener=Chain,
    )
    assert "a word of Flower's" in (tmp_path / "deep" / "e.log").read_text()
    assert flower.handlers == before
    assert capfd.readouterr() == ("", "")


def test_no_sites_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(lambda courier: None, sites=[], engine=InProcess(), log=tmp_path / "e.log")


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        run(three_exchanges, sites=sites(tmp_path), engine=Ray(), log=tmp_path / "e.log")
    assert caught.value.code == "ENGINE-NO-RAY"


def children() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.slow
def test_ray_same_bytes_and_nothing_left_running(
    tmp_path: Path, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray import cloudpickle

    # Ray's workers cannot import a test module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before = children()
    got = run(three_exchanges, sites=sites(tmp_path), engine=Ray(cpus=2), log=tmp_path / "e.log", opener=Chain)
    assert got == expected
    assert children() <= before
    assert capfd.readouterr() == ("", ""), "the terminal belongs to the study"
    assert (tmp_path / "e.log").stat().st_size > 0


@pytest.mark.slow
def test_ray_what_the_work_raises_comes_out(tmp_path: Path) -> None:
    def work(courier: GridCourier) -> None:
        raise PeerUnreachable("TEST-CODE", "the study gave up")

    before = children()
    with pytest.raises(PeerUnreachable) as caught:
        run(work, sites=sites(tmp_path), engine=Ray(cpus=1), log=tmp_path / "e.log")
    assert caught.value.code == "TEST-CODE"
    assert children() <= before
