"""The release primitive: clip, sum, lattice, noise. The only place where noise is drawn, and its price with it.

    query.contribution   per patient: mean over rows of clipped vectors, on an integer lattice; summed
    + rint(σ Δ/γ /√h · z) z standard normal from the site's AES keystream, h noise shares per sum
    = Released(values, event)

On an integer lattice, rounding Gaussian noise and adding it equals adding Gaussian noise to an integer and
rounding the sum: post-processing of the exact Gaussian mechanism, with no holes in the lattice for an observer of
floating-point bits (Mironov 2012). With h shares the noise is a sum of h rounded Gaussians, each with a standard
deviation of about 2^20/√h lattice steps; its law differs from a rounded Gaussian by less than e^(−2π²σ²), with σ
in steps (Kairouz, Liu, Steinke 2021, Prop. 27): far below any float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cohortium.common.encoding import Records
from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.budget import WHOLE, Event
from cohortium.common.privacy.entropy import Entropy, Keystream, Purpose, patient_uniforms
from cohortium.common.queries import MAX_PARAMETER, AnyQuery, Gradient

_BLOCK = 1 << 20
UPDATE_LATTICE = 2.0**-24
"""Step of the fixed-point grid on which an update of several local steps travels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """How one release is made private: all of it comes from the plan, none from the query or the data.

    noise_multiplier: σ, standard deviation of the noise in the SUM over the query's sensitivity; 0 = noise off.
    rate: sampling numerator over 2^64. shares: h, how many sites' noise together make σ (1: all of it here).
    """

    noise_multiplier: float
    rate: int = WHOLE
    shares: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ProtocolError("RELEASE-NOISE", "a noise multiplier is finite and at least 0")
        if not 0 < self.rate <= WHOLE or not 1 <= self.shares <= 1000:
            raise ProtocolError("RELEASE-VALUE", "sampling rate or number of shares out of range")

    @property
    def event(self) -> Event:
        """What this mechanism costs. Noise off is non-private: infinite epsilon."""
        if self.noise_multiplier == 0:
            return Event.non_private()
        if self.rate == WHOLE:
            return Event.gaussian(self.noise_multiplier)
        return Event.poisson_gaussian(self.rate, self.noise_multiplier)


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """values: int64 [d] in lattice units, noised; lattice: the unit; event and count: what was spent."""

    values: np.ndarray
    lattice: float
    event: Event
    count: int = 1


class Stream(Protocol):
    def words(self, count: int) -> np.ndarray: ...


def release(
    *, query: AnyQuery, records: Records, mechanism: Mechanism, entropy: Entropy, run: str, index: int, head: str
) -> Released:
    """One site's share of the answer, noised, and the event it costs.

    run, index (of the release in the plan) and head (of the ledger at reservation) name the keys.

    Guarantees: noise of standard deviation σΔ/√h in every coordinate, whatever the records hold.
        no patients   pure noise      one patient   as any       noise off   event is non-private
        a local-steps query           σΔ in every step; the update is post-processing of noised sums
    """
    if isinstance(query, Gradient) and query.local is not None:
        return _local_steps(query, records, mechanism, entropy, run, index, head)
    values = _noised_sum(query, records, mechanism, entropy, run, index, 0, head)
    return Released(values=values, lattice=query.lattice, event=mechanism.event)


def _noised_sum(
    query: AnyQuery, records: Records, how: Mechanism, entropy: Entropy, run: str, index: int, step: int, head: str
) -> np.ndarray:
    chosen = None
    if how.rate < WHOLE:
        key = entropy.key(Purpose(label="sampling", run=run, release=index, step=step, head=head))
        chosen = patient_uniforms(key, records.identity) < np.uint64(how.rate)
    units = query.contribution(records, chosen).units
    if how.noise_multiplier == 0:
        return units
    key = entropy.key(Purpose(label="noise", run=run, release=index, step=step, head=head))
    sigma = how.noise_multiplier * query.sensitivity_l2 / query.lattice / math.sqrt(how.shares)
    return units + lattice_noise(Keystream(key), sigma_units=sigma, size=len(units))


def _local_steps(
    query: Gradient, records: Records, how: Mechanism, entropy: Entropy, run: str, index: int, head: str
) -> Released:
    """E steps of DP-SGD at the site, each with its own sample and its own whole noise (trust mode `local`)."""
    local = query.local
    assert local is not None
    if how.shares != 1:
        raise ProtocolError("RELEASE-VALUE", "local steps need the whole noise at the site")
    start = query.parameters.astype(np.float64)
    theta = start.copy()
    for step in range(local.steps):
        at = Gradient(
            network=query.network,
            maps=query.maps,
            parameters=theta.astype(np.float32),
            clip_norm_l2=query.clip_norm_l2,
            path=query.path,
            part=query.part,
        )
        noised = _noised_sum(at, records, how, entropy, run, index, step, head) * query.lattice
        gradient = noised / local.denominator + local.fedprox_mu * (theta - start)
        theta = theta - local.learning_rate * gradient
        np.nan_to_num(theta, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        np.clip(theta, -MAX_PARAMETER, MAX_PARAMETER, out=theta)  # what the next step's gradient may be asked at
    values = np.rint((theta - start) / UPDATE_LATTICE)
    bounded = np.clip(values, -(2.0**60), 2.0**60).astype(np.int64)
    return Released(values=bounded, lattice=UPDATE_LATTICE, event=how.event, count=local.steps)


def lattice_noise(stream: Stream, *, sigma_units: float, size: int) -> np.ndarray:
    """rint(σ z) with z standard normal: int64 [size].

    sigma_units: standard deviation in lattice steps; at least 1024, else the lattice is too coarse for the
    Gaussian's price to hold exactly, and the release is refused. At most 2^56, so that 12.2 σ fits an int64.
    """
    if not 1024 <= sigma_units <= 2.0**56:
        raise ProtocolError("RELEASE-NOISE", "the noise is too small or too large for its lattice")
    out = np.empty(size, dtype=np.int64)
    for at in range(0, size, _BLOCK):
        count = min(_BLOCK, size - at)
        out[at : at + count] = np.rint(sigma_units * _normals(stream, count))
    return out


def _normals(stream: Stream, count: int) -> np.ndarray:
    """Standard normals by Box–Muller (1958) in float64, with a first uniform of 106 bits: tails to 12.1 σ."""
    pairs = (count + 1) // 2
    words = stream.words(3 * pairs).reshape(3, pairs)
    high, low, turn = ((w >> np.uint64(11)).astype(np.float64) for w in words)
    uniform = high * 2.0**-53 + (low + 0.5) * 2.0**-106  # in (0, 1): never 0, so the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(uniform))
    angle = turn * (2.0 * math.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
