"""The guard as the courier sees it in the field: one Unix socket. Nothing here reads data or knows the guard's code."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import grpc

from cohortium.common.errors import PeerUnreachable
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol import consortium_pb2_grpc as rpc
from cohortium.common.protocol.sockets import local_options

NAME_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0
PATIENCE_S = 20.0
AGAIN_S = 0.2


class SocketGuard:
    """A GuardPort over the guard's socket. Any number of threads may use it; the guard takes one message at a time.

    patience_s: how long to wait for a guard that is not there, as while it restarts. An envelope may then be handed
    over twice: the guard gives the same bytes to the same question. answer_s: the longest that one answer may take.
    Raises PeerUnreachable GUARD-DOWN where no guard comes, GUARD-FAILED where it broke down over a message or was late.
    """

    def __init__(self, socket: Path, *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_TIMEOUT_S) -> None:
        self.path = Path(socket)
        self._patience_s, self._answer_s = patience_s, answer_s
        self._channel = grpc.insecure_channel(f"unix:{self.path.absolute()}", options=local_options())
        self._stub = rpc.GuardStub(self._channel)  # type: ignore[no-untyped-call]
        self._stop = threading.Event()

    @property
    def site(self) -> str:
        """The site's name, as its guard says it now: a guard that is not there has none."""
        try:
            return str(self._stub.Name(pb.Nothing(), timeout=NAME_TIMEOUT_S, wait_for_ready=True).name)
        except grpc.RpcError as error:
            raise self._down(error) from None

    def handle(self, envelope: bytes) -> bytes:
        started = time.monotonic()
        while True:
            left_s = self._patience_s - (time.monotonic() - started)
            try:
                answer = self._stub.Handle(pb.Envelope(envelope=envelope), timeout=self._answer_s)
                return bytes(answer.envelope)
            except grpc.RpcError as error:
                # UNAVAILABLE: the guard is not there, or was killed over this very message.
                if _status(error) is not grpc.StatusCode.UNAVAILABLE or left_s <= 0:
                    raise self._down(error) from None
            if self._stop.wait(min(AGAIN_S, left_s)):
                raise PeerUnreachable("GUARD-DOWN", "the courier stopped while it waited for its guard")

    def close(self) -> None:
        self._stop.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _down(self, error: grpc.RpcError) -> PeerUnreachable:
        if _status(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return PeerUnreachable(
                "GUARD-DOWN", "the guard does not answer", where=(str(self.path),), hint="start it: cohortium site join"
            )
        return PeerUnreachable(
            "GUARD-FAILED",
            "the guard broke down over a message, or took too long",
            where=(str(self.path),),
            hint="the guard's own log, guard.log, says what it was",
        )


def _status(error: grpc.RpcError) -> grpc.StatusCode:
    call = cast("object", error)  # what a stub raises is a Call as well, which the type stubs deny
    return call.code() if isinstance(call, grpc.Call) else grpc.StatusCode.UNKNOWN
