"""Lattice integers ↔ the ring Z_2^64 in which masked sums are taken.

A site's noised sum is a vector of integers (multiples of the lattice step γ). Two's complement maps them onto
uint64, where addition wraps, so masks are uniform and cancel exactly. 64 bits rather than 32, because with
γ = C·2⁻²⁰ a sum over N patients reaches N·2²¹ and leaves 32 bits behind at N = 1,024.

Overflow rules:
- a sum over `parties` sites is exact while every summand lies within ±capacity(parties), so `to_ring` refuses
  (FIXED-RANGE) a vector with a larger entry instead of wrapping it; at 100 sites that is about 9.2e16;
- floats must be whole numbers within ±2^53, where float64 holds every integer; else FIXED-WHOLE;
- NaN and ±inf are FIXED-WHOLE too.
A refusal depends on the vector as it would have left (already noised), so it tells nothing that the noise
protects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cohortium.common.errors import ProtocolError

Ring = npt.NDArray[np.uint64]
_FLOAT_LIMIT = 2**53


def capacity(parties: int) -> int:
    """Largest |summand| for which a sum over `parties` sites stays inside int64."""
    if parties < 1:
        raise ProtocolError("FIXED-PARTIES", "a sum has at least one summand")
    return (2**63 - 1) // parties


def to_ring(values: npt.NDArray[Any], *, parties: int) -> Ring:
    """int64 or whole float64 [d] → uint64 [d], a new array. Raises FIXED-RANGE, FIXED-WHOLE, FIXED-TYPE."""
    if values.dtype == np.float64:
        whole = _whole(values)
    elif values.dtype == np.int64:
        whole = values
    else:
        raise ProtocolError("FIXED-TYPE", f"lattice values are int64 or float64, not {values.dtype}")
    limit = capacity(parties)
    # min and max rather than abs: |-2^63| does not exist in int64.
    if whole.size and (int(whole.min()) < -limit or int(whole.max()) > limit):
        raise ProtocolError("FIXED-RANGE", f"a lattice value is too large for a sum over {parties} sites")
    return whole.astype(np.uint64)


def from_ring(values: Ring) -> npt.NDArray[np.int64]:
    """uint64 [d] → int64 [d], a new array: the representative in [-2^63, 2^63)."""
    if values.dtype != np.uint64:
        raise ProtocolError("FIXED-TYPE", f"ring values are uint64, not {values.dtype}")
    return values.astype(np.int64)


def _whole(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    # NaN fails both comparisons, inf the second: no separate test is needed.
    if not bool(np.all((np.abs(values) <= _FLOAT_LIMIT) & (np.rint(values) == values))):
        raise ProtocolError("FIXED-WHOLE", "float lattice values are whole numbers within ±2^53")
    return values.astype(np.int64)
