"""Unix sockets of one mode and one owner; options that both ends agree on."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cohortium.common.errors import Refused, UsageError
from cohortium.common.protocol.sockets import (
    FRAME_ROOM_BYTES,
    KeepAlive,
    bind,
    client_options,
    local_options,
    only_one,
    server_options,
    unbind,
)


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_socket_appears_with_its_mode_and_nothing_else(tmp_path: Path, mode: int) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    path = tmp_path / "a.sock"
    path.write_text("what a crash left behind")
    before = os.umask(0)
    try:
        bind(server, path, mode=mode)
    finally:
        os.umask(before)
    server.start()
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == mode
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.sock"]
    with grpc.insecure_channel(f"unix:{path}", options=local_options()) as channel:
        grpc.channel_ready_future(channel).result(timeout=5)
    server.stop(0).wait()
    unbind(path)
    unbind(path)
    assert not path.exists()


def test_a_path_that_no_socket_can_have_is_said_so(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    for path in (deep / "a.sock", tmp_path / ("n" * 108)):
        with pytest.raises(UsageError) as caught:
            bind(grpc.server(ThreadPoolExecutor(1)), path, mode=0o600)
        assert caught.value.code == "SOCKET-PATH"


def test_only_one_process_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "guard.pid"
    lock = only_one(path)
    assert path.read_text() == f"{os.getpid()}\n" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(Refused) as caught:
        only_one(path)
    assert caught.value.code == "SOCKET-BUSY"
    os.close(lock)
    # A killed process lets it go.
    code = (
        "import os, sys; from pathlib import Path; from cohortium.common.protocol.sockets import only_one\n"
        "only_one(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    os.close(only_one(path))


def test_both_ends_agree() -> None:
    keep = KeepAlive(ping_s=2.0, answer_s=3.0)
    client, server = (
        dict(client_options(keep, max_envelope_bytes=10)),
        dict(server_options(keep, max_envelope_bytes=10)),
    )
    for options in (client, server, dict(local_options(max_envelope_bytes=10))):
        assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"]
        assert options["grpc.max_receive_message_length"] == 10 + FRAME_ROOM_BYTES
    assert client["grpc.keepalive_time_ms"] == 2000 and client["grpc.keepalive_timeout_ms"] == 3000
    # A server that allowed pings less often than clients send them would close their connections.
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    default = KeepAlive()
    assert default.ping_s + default.answer_s <= 20
    for ping_s, answer_s in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(UsageError):
            KeepAlive(ping_s=ping_s, answer_s=answer_s)
