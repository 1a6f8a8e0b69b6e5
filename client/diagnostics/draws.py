"""Choices that anyone can repeat: which patients, rows and columns a diagnosis looks at.

At a hospital nothing but the noise draws random numbers, and a diagnosis has no need of any: a public hash of a fixed
seed orders what there is. The same table gives the same page. These choices protect nobody and are not meant to.
Source: SplitMix64 (Steele, Lea, Flood 2014, OOPSLA, figure 17) as a hash of the place.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def bits(label: str, count: int) -> NDArray[np.uint64]:
    """`count` 64-bit integers that look uniform, the same for the same label."""
    start = np.uint64(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big"))
    z = start + _STEP * np.arange(1, count + 1, dtype=np.uint64)  # modulo 2^64, as meant
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def uniforms(label: str, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1)."""
    return (bits(label, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(label: str, count: int, below: int) -> Ints:
    """`count` integers in [0, below)."""
    return np.minimum(np.floor(uniforms(label, count) * below), below - 1).astype(np.int64)


def order(label: str, count: int) -> Ints:
    """A permutation of 0 … count - 1."""
    return np.argsort(bits(label, count), kind="stable").astype(np.int64)


def some(label: str, count: int, most: int) -> Ints:
    """At most `most` different places of `count`, ascending; all of them where that is enough."""
    return np.arange(count, dtype=np.int64) if count <= most else np.sort(order(label, count)[:most])
