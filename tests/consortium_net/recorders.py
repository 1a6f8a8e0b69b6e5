"""Stream sockets with an ear: all that passes between two processes, in both directions."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

End = Path | int
"""A Unix socket, or a TCP port on loopback."""


class Recorder:
    """Listens in the place of `upstream` and keeps every byte of both directions, each connection's on its own."""

    def __init__(self, upstream: End, *, at: Path | None = None) -> None:
        self._upstream = upstream
        if at is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port = int(self._listener.getsockname()[1])
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(at))
            self._listener.listen(16)
        self._kept: list[bytearray] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def heard(self) -> list[bytes]:
        return [bytes(kept) for kept in self._kept]

    def close(self) -> None:
        for end in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = self._connect()
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                kept = bytearray()
                self._kept.append(kept)
                threading.Thread(target=_pump, args=(source, target, kept), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._upstream, int):
            return socket.create_connection(("127.0.0.1", self._upstream))
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(self._upstream))
        return made


def _pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            kept += data
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
