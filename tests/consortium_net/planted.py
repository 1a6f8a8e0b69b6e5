"""Strings that must not leave a hospital, and a search that finds a piece of any of them in any usual dress.

A token is two words of 10 random letters and digits around a sign that every encoding changes. A hit is any 8
characters in a row of a word: plain in any case, with zero bytes between (UTF-16, UTF-32), URL- or JSON-escaped (the
words stay), hexadecimal, base64 at any of its three alignments, and all of that in zip, gzip and zlib streams.
"""

from __future__ import annotations

import base64
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

WINDOW = 8
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", dtype=np.uint8)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_DEFLATED = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]")
_MOST_INFLATED = 64 << 20


def tokens(count: int, *, seed: int = 0) -> list[str]:
    """Different tokens, such as "k3w0x9m2aaü q8f7e6d5c4b3"."""
    drawn = _LETTERS[np.random.default_rng(seed).integers(0, len(_LETTERS), (count, 20))]
    found = [bytes(row).decode() for row in drawn]
    assert len(set(found)) == count
    return [f"{word[:10]}ü {word[10:]}" for word in found]


class Planted:
    """All tokens, ready to be looked for."""

    def __init__(self, planted: Iterable[str]) -> None:
        words = [word.encode() for token in planted for word in token.split("ü ")]
        plain = {word[at : at + WINDOW] for word in words for at in range(len(word) - WINDOW + 1)}
        coded = set()
        for word in words:
            for shift, cut in ((0, 0), (1, 2), (2, 3)):
                coded.add(base64.b64encode(bytes(shift) + word)[cut : cut + WINDOW])
        self._plain, self._hex = _Table(plain), _Table({window.hex().encode()[:WINDOW] for window in plain})
        self._hexed = {window.hex().encode() for window in plain}
        self._coded = _Table(coded)

    def hits(self, data: bytes, *, inside: bool = True) -> list[str]:
        """How it was found and what, for every piece of a token in there. inside: look into compressed streams too."""
        small = data.lower()
        found = [f"plain {hit!r}" for _, hit in self._plain.find(small)]
        if b"\x00" in small:
            found += [f"wide {hit!r}" for _, hit in self._plain.find(small.replace(b"\x00", b""))]
        for at, _ in self._hex.find(small):
            if small[at : at + 2 * WINDOW] in self._hexed:
                found.append(f"hex {small[at : at + 2 * WINDOW]!r}")
        found += [f"base64 {hit!r}" for _, hit in self._coded.find(data)]
        if inside:
            for name, part in _unpacked(data):
                found += [f"{name}: {hit}" for hit in self.hits(part, inside=False)]
        return found


class _Table:
    """Strings of 8 bytes, and where they occur in large data."""

    def __init__(self, windows: set[bytes]) -> None:
        self._windows = windows
        self._marks = np.zeros(1 << 24, dtype=bool)
        self._marks[_slots(np.frombuffer(b"".join(sorted(windows)), dtype="<u8"))] = True

    def find(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        for shift in range(min(WINDOW, max(len(data) - WINDOW + 1, 0))):
            count = (len(data) - shift) // WINDOW
            values = np.frombuffer(data, dtype="<u8", count=count, offset=shift)
            for at in np.flatnonzero(self._marks[_slots(values)]):
                start = shift + WINDOW * int(at)
                if data[start : start + WINDOW] in self._windows:
                    yield start, data[start : start + WINDOW]


def _slots(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (values * _MIX) >> np.uint64(40)


def _unpacked(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What is compressed in there, wherever it begins."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for name in file.namelist():
                yield f"zip {name}", file.read(name)
        return
    for match in _DEFLATED.finditer(data):
        maker = zlib.decompressobj(31 if match[0][:1] == b"\x1f" else 15)
        try:
            part = maker.decompress(data[match.start() :], _MOST_INFLATED)
        except zlib.error:
            continue
        if part:
            yield f"inflated at {match.start()}", part


def dresses(token: str) -> dict[str, bytes]:
    """One token in every dress that the search knows; each must be found."""
    raw = token.encode()
    squeezed, archive = gzip.compress(raw * 3), io.BytesIO()
    np.savez_compressed(archive, text=np.frombuffer(raw, dtype=np.uint8))
    return {
        "plain": b"...." + raw + b"...",
        "upper": token.upper().encode(),
        "piece": raw[2:10],
        "utf-16": b"x" + token.encode("utf-16-le"),
        "utf-16 be": token.encode("utf-16-be"),
        "json": ascii(token).encode(),
        "hex": b"7" + raw.hex().upper().encode(),
        **{f"base64 {n}": base64.b64encode(b"?" * n + raw) for n in range(3)},
        "gzip": b"before" + squeezed,
        "zlib": b"--" + zlib.compress(raw * 5) + b"--",
        "npz": archive.getvalue(),
    }
