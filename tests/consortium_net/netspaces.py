"""Hospitals' machines as network namespaces of Linux: one each, joined by a bridge in the coordinator's namespace.

    coordinator   the test's own namespace, address `host` on the bridge
    site i        a namespace with one veth pair; the pair's outer end hangs on the bridge, and is what `cut` takes down

A link that is down swallows what is sent, as a pulled cable does: nobody is told, and TCP sends again.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest


def needs_root() -> None:
    """Skip where nobody could make a namespace; where root cannot either, the test fails and says why."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Net:
    """One namespace a site. Everything it makes has a random name and goes when it is closed."""

    def __init__(self, sites: Sequence[str]) -> None:
        tag = secrets.token_hex(3)
        third = secrets.randbelow(256)
        self.host = f"198.18.{third}.1"  # of the range for tests between networks (RFC 2544)
        self._bridge = f"cb{tag}"
        self._spaces = {site: f"c{tag}-{at}" for at, site in enumerate(sites)}
        self._outer = {site: f"cv{tag}{at}" for at, site in enumerate(sites)}
        self._lock = threading.Lock()
        self._down: set[str] = set()
        try:
            self._make(third)
        except BaseException:
            self.close()
            raise

    def _make(self, third: int) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for at, (site, space) in enumerate(self._spaces.items()):
            outer = self._outer[site]
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"198.18.{third}.{10 + at}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def within(self, site: str) -> list[str]:
        """The words before a command that is to run on a site's machine."""
        return ["ip", "netns", "exec", self._spaces[site]]

    def cut(self, site: str) -> None:
        with self._lock:
            self._down.add(site)
            _ip("link", "set", self._outer[site], "down")

    def heal(self, site: str) -> None:
        with self._lock:
            _ip("link", "set", self._outer[site], "up")
            self._down.discard(site)

    def is_cut(self, site: str) -> bool:
        return site in self._down

    def close(self) -> None:
        """Remove all of it; the processes in there must have ended."""
        for space in self._spaces.values():
            _ip("netns", "del", space, check=False)
        for outer in self._outer.values():
            _ip("link", "del", outer, check=False)  # a pair whose namespace still has a process
        _ip("link", "del", self._bridge, check=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
