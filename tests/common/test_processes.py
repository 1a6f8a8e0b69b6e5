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
    child = "import os, time; from cohortium.common.processes import leave_with; leave_with({}); time.sleep(60)"
    parent = (
        "import os, subprocess, sys\n"
        f"code = {child!r}.format(os.getpid())\n"
        "print(subprocess.Popen([sys.executable, '-c', code]).pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError("it outlived its parent")
