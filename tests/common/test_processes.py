from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from cohortium.common.processes import stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops(number: signal.Signals) -> None:
    stop, before = threading.Event(), signal.getsignal(number)
    with stopping(stop):
        signal.raise_signal(number)
        assert stop.wait(10)
    assert signal.getsignal(number) == before


@pytest.mark.timeout(30, method="signal")
def test_a_signal_that_arrives_while_the_wait_begins_does_not_hang() -> None:
    stop = threading.Event()
    with stopping(stop):
        with stop._cond:  # what the main thread holds for an instant inside wait()
            signal.raise_signal(signal.SIGTERM)
        assert stop.wait(10)


def test_only_the_impatient_are_thrown_out() -> None:
    for impatient in (False, True):
        stop = threading.Event()
        stop.set()
        with stopping(stop, impatient=impatient):
            if impatient:
                signal.raise_signal(signal.SIGTERM)
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            else:
                signal.raise_signal(signal.SIGINT)


def test_in_another_thread_it_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stopping(threading.Event()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_child_leaves_with_its_parent() -> None:
    pid = orphan("leave_with_parent(); time.sleep(60)")
    assert gone(pid)


def test_a_child_that_is_slow_to_begin_leaves_too() -> None:
    """Its supervisor is dead before the child asks who that is; red with os.getppid() at that time."""
    assert gone(orphan("time.sleep(1.5); leave_with_parent(); time.sleep(60)"))


def test_a_child_that_hears_no_sigterm_is_killed() -> None:
    deaf = "processes.LEAVE_WITHIN_S = 0.5; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert gone(orphan(deaf + "leave_with_parent(); time.sleep(60)"))


def orphan(does: str) -> int:
    """The process of a child whose supervisor was killed as soon as it had started it."""
    child = (
        f"import signal, time; from cohortium.common import processes; from cohortium.common.processes import *; {does}"
    )
    supervisor = (
        "import os, subprocess, sys; from cohortium.common.processes import parent\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | parent(), stdout=2)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", supervisor], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        return int(process.stdout.readline())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False
