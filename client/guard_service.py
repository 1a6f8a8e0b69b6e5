"""The guard's process: one Unix socket, one message at a time. `python -m cohortium.client.guard_service DIR SOCKET`.

It opens no other socket and starts no other process. What crosses the socket are envelopes and one name: an error is a
gRPC status without words, because words may hold data.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from cohortium.client.guard import Guard
from cohortium.client.site import GUARD_SECRETS
from cohortium.common.errors import CohortiumError
from cohortium.common.modes import refuse_all, refuse_open
from cohortium.common.processes import stopping
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.messages import MAX_ENVELOPE_BYTES
from cohortium.common.protocol.sockets import bind, local_options, only_one, unbind

SOCKET_MODE = 0o660
"""The courier's group may connect; who is in that group is decided by the folder that the socket lies in."""
MOST_CALLS = 8
STOP_WITHIN_S = 30.0
LOCK = "guard.pid"
_PR_SET_DUMPABLE = 4


class _GuardService(rpc.GuardServicer):
    """The guard behind its two calls. A guard that failed is given up; the next message opens it again from disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._guard: Guard | None = Guard(directory)
        self._site = self._guard.site
        # All of the guard's work in one thread: it is serial anyway, and torch keeps its helpers per calling thread.
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guard")

    def Name(self, request: pb.Nothing, context: grpc.ServicerContext) -> pb.SiteName:
        return pb.SiteName(name=self._site)

    def Handle(self, request: pb.Envelope, context: grpc.ServicerContext) -> pb.Envelope:
        answer: bytes | None = None
        with contextlib.suppress(BaseException):  # SystemExit too would leave with its words
            answer = self._work.submit(self._handle, request.envelope).result()
        if answer is None:
            context.abort(grpc.StatusCode.INTERNAL, "GUARD-FAILED")
        return pb.Envelope(envelope=answer or b"")

    def _handle(self, envelope: bytes) -> bytes | None:
        if self._guard is None:
            self._guard = Guard(self._directory)
        try:
            answer = self._guard.handle(envelope)
        except BaseException:
            self._give_up()
            raise
        return answer if len(answer) <= MAX_ENVELOPE_BYTES else None

    def _give_up(self) -> None:
        guard, self._guard = self._guard, None
        with contextlib.suppress(Exception):
            if guard is not None:
                guard.close()

    def close(self) -> None:
        """Finish the message under way, then close the guard's files."""
        self._work.submit(self._give_up)
        self._work.shutdown(wait=True)


def serve_guard(
    directory: Path, socket: Path, *, ready: Callable[[], None] | None = None, stop: threading.Event | None = None
) -> None:
    """Serve the guard of a site's directory until `stop` is set, or a SIGTERM or SIGINT arrives; blocks.

    ready: called when the socket takes messages. Refused SOCKET-BUSY where another process serves this directory;
    what `Guard` raises for a directory that it cannot open.
    """
    directory, socket = Path(directory), Path(socket)
    stop = stop or threading.Event()
    lock = only_one(directory / LOCK)
    try:
        service = _GuardService(directory)
        server = grpc.server(
            ThreadPoolExecutor(max_workers=MOST_CALLS, thread_name_prefix="socket"),
            options=local_options(),
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        try:
            rpc.add_GuardServicer_to_server(service, server)  # type: ignore[no-untyped-call]
            with stopping(stop):
                bind(server, socket, mode=SOCKET_MODE)
                server.start()
                if ready is not None:
                    ready()
                stop.wait()
        finally:
            server.stop(STOP_WITHIN_S).wait()
            unbind(socket)
            service.close()
    finally:
        os.close(lock)


def harden() -> None:
    """Nothing of this process's memory reaches a disk or another process of the same user; files are its own."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # Neither a core dump nor a debugger, whatever the system's settings say.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after a SIGTERM; an error in words goes to the hospital's own terminal."""
    parser = argparse.ArgumentParser(prog="guard_service", description="Serve a hospital's guard on a Unix socket.")
    parser.add_argument("directory", type=Path, help="the guard's directory, with site.toml")
    parser.add_argument("socket", type=Path, help="where the courier connects")
    options = parser.parse_args(arguments)
    harden()
    try:
        refuse_open(options.directory)
        refuse_all(options.directory / name for name in GUARD_SECRETS)
        serve_guard(options.directory, options.socket)
    except CohortiumError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
