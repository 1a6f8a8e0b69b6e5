"""What was run and what it is worth: events (the mechanisms) and the statement (the guarantee in a sentence).

An event names the mechanism, never its epsilon: whoever reads a ledger recomputes epsilons from its events.
The vocabulary only ever grows; a kind that this version does not know is refused, not skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Self

from cohortium.common.errors import ProtocolError

Kind = Literal["gaussian", "poisson-gaussian", "non-private"]
Relation = Literal["add-remove", "replace-one"]
Mode = Literal["secure-sum", "local"]

KINDS: tuple[Kind, ...] = ("gaussian", "poisson-gaussian", "non-private")
RELATIONS: tuple[Relation, ...] = ("add-remove", "replace-one")
MODES: tuple[Mode, ...] = ("secure-sum", "local")
WHOLE = 2**64
"""Sampling rates are numerators over 2**64: a patient is in when a uniform 64-bit integer is below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One mechanism run on the patients' records.

    kind: "gaussian" (all patients), "poisson-gaussian" (each patient in with probability rate / 2**64),
        "non-private" (no noise worth the name: infinite epsilon).
    noise_multiplier: standard deviation of the noise over the L2 sensitivity of one patient at one site.
    rate: numerator of the sampling probability over 2**64; WHOLE when nobody is left out.

    Guarantees: noise_multiplier 0, negative, NaN, inf    refused (0 is spelled "non-private")
                rate 0, negative, above 2**64, a float    refused
                unknown kind                              refused
    """

    kind: Kind
    noise_multiplier: float = 0.0
    rate: int = WHOLE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ProtocolError("EVENT-KIND", f"unknown kind of event {str(self.kind)[:40]!r}")
        if type(self.noise_multiplier) is not float or type(self.rate) is not int:
            raise ProtocolError("EVENT-TYPE", "noise_multiplier is a float and rate an integer over 2**64")
        if self.kind == "non-private":
            if self.noise_multiplier != 0.0 or self.rate != WHOLE:
                raise ProtocolError("EVENT-VALUE", "a non-private event has no noise and no sampling rate")
            return
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ProtocolError("EVENT-VALUE", "a noise multiplier is finite and above 0")
        if self.kind == "gaussian" and self.rate != WHOLE:
            raise ProtocolError("EVENT-VALUE", "a gaussian event runs on all patients: no sampling rate")
        if self.kind == "poisson-gaussian" and not 0 < self.rate < WHOLE:
            raise ProtocolError("EVENT-VALUE", "a sampling rate is above 0 and below 2**64")

    @classmethod
    def gaussian(cls, noise_multiplier: float) -> Self:
        return cls(kind="gaussian", noise_multiplier=float(noise_multiplier))

    @classmethod
    def poisson_gaussian(cls, rate: int, noise_multiplier: float) -> Self:
        """rate is the integer over 2**64; `rate_of` makes it from a probability."""
        return cls(kind="poisson-gaussian", noise_multiplier=float(noise_multiplier), rate=rate)

    @classmethod
    def non_private(cls) -> Self:
        return cls(kind="non-private")

    @property
    def probability(self) -> float:
        """The sampling probability as a float, rounded up: a price is never rounded in our favour."""
        value = self.rate / WHOLE
        return value if Fraction(value) >= Fraction(self.rate, WHOLE) else math.nextafter(value, math.inf)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without floats; equal events give equal JSON."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.kind != "non-private":
            out["noise_multiplier"] = self.noise_multiplier.hex()
        if self.kind == "poisson-gaussian":
            out["rate"] = str(self.rate)  # above 2**53: a string survives every JSON reader
        return out

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The event of its JSON; ProtocolError for anything that to_json would not have written."""
        if not isinstance(value, dict) or value.get("kind") not in KINDS:
            raise ProtocolError("EVENT-KIND", "an event of an unknown kind")
        noise, rate = value.get("noise_multiplier", "0x0.0p+0"), value.get("rate", str(WHOLE))
        if not (isinstance(noise, str) and isinstance(rate, str) and len(noise) <= 40 and len(rate) <= 20):
            raise ProtocolError("EVENT-TYPE", "an event's numbers are strings")
        try:
            event = cls(kind=value["kind"], noise_multiplier=float.fromhex(noise), rate=int(rate))
        except (ValueError, OverflowError):
            raise ProtocolError("EVENT-TYPE", "an event's numbers cannot be read") from None
        if event.to_json() != value:
            raise ProtocolError("EVENT-FORM", "an event has exactly one spelling")
        return event

    def __str__(self) -> str:
        if self.kind == "non-private":
            return "non-private"
        noise = f"noise multiplier {self.noise_multiplier:.4g}"
        return f"{self.kind}, {noise}" + (f", rate {self.probability:.4g}" if self.rate != WHOLE else "")


def rate_of(probability: float) -> int:
    """floor(q * 2**64), exactly; 1.0 gives WHOLE. Raises ProtocolError outside (0, 1]."""
    if not (isinstance(probability, (int, float)) and 0.0 < probability <= 1.0):
        raise ProtocolError("EVENT-VALUE", "a sampling probability is above 0 and at most 1")
    rate = int(Fraction(probability) * WHOLE)
    if rate == 0:
        raise ProtocolError("EVENT-VALUE", "a sampling probability below 2**-64 samples nobody")
    return rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """The guarantee, as printed wherever results are. Made from a ledger's events, never typed in.

    epsilon: infinity when something non-private was run. hospitals: in how many sites one patient may be.
    survivors, colluders, sites: t, c and n of a secure sum, whose guarantee holds under no other condition; None in
    local mode, which has none.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: Relation
    mode: Mode
    hospitals: int = 1
    survivors: int | None = None
    colluders: int | None = None
    sites: int | None = None

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ProtocolError("STATEMENT-VALUE", "an epsilon is 0 or more")
        if not 0 < self.delta < 1:
            raise ProtocolError("STATEMENT-VALUE", "a delta lies between 0 and 1")
        if self.adjacency not in RELATIONS or self.mode not in MODES:
            raise ProtocolError("STATEMENT-VALUE", "unknown adjacency or trust mode")
        if not self.unit or type(self.hospitals) is not int or self.hospitals < 1:
            raise ProtocolError("STATEMENT-VALUE", "a statement names its unit and at least one hospital")
        trusted = (self.colluders, self.survivors, self.sites)
        if self.mode == "local" and trusted != (None, None, None):
            raise ProtocolError("STATEMENT-VALUE", "in local mode no number of sites is trusted")
        if self.mode == "secure-sum":
            whole = [number for number in trusted if type(number) is int]
            if len(whole) != 3 or not 0 <= whole[0] < whole[1] <= whole[2]:
                raise ProtocolError("STATEMENT-VALUE", "a secure sum's statement names 0 <= c < t <= n")

    def sentence(self) -> str:
        """One sentence; epsilon is rounded up, so that the printed number is never below the real one."""
        where = "one hospital" if self.hospitals == 1 else f"up to {self.hospitals} hospitals"
        side = {0: "none of them sides", 1: "at most 1 of them sides"}
        who = {
            "secure-sum": f"as long as at least {self.survivors} of {self.sites} sites stay to the end of each round "
            f"and {side.get(self.colluders or 0, f'at most {self.colluders} of them side')} with the coordinator",
            "local": "even if every other hospital and the coordinator are dishonest",
        }[self.mode]
        if math.isinf(self.epsilon):
            return "No privacy guarantee: something was computed from the records without enough noise."
        change = {"add-remove": "Adding or removing", "replace-one": "Replacing"}[self.adjacency]
        thing = "one record" if self.unit == "row" else f"all records of one {self.unit}"
        return (
            f"({rounded_up(self.epsilon)}, {self.delta:g})-differential privacy: {change.lower()} {thing} "
            f"({self.adjacency} adjacency, in {where}) changes the odds of any result from this one run at most "
            f"by that much, {who} (trust mode {self.mode})."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon.hex(),
            "delta": self.delta.hex(),
            "unit": self.unit,
            "adjacency": self.adjacency,
            "mode": self.mode,
            "hospitals": self.hospitals,
            "survivors": self.survivors,
            "colluders": self.colluders,
            "sites": self.sites,
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        try:
            return cls(
                epsilon=float.fromhex(value["epsilon"]),
                delta=float.fromhex(value["delta"]),
                unit=value["unit"],
                adjacency=value["adjacency"],
                mode=value["mode"],
                hospitals=value["hospitals"],
                survivors=value["survivors"],
                colluders=value["colluders"],
                sites=value["sites"],
            )
        except (KeyError, TypeError, ValueError):
            raise ProtocolError("STATEMENT-FORM", "a statement that cannot be read") from None


def rounded_up(epsilon: float, digits: int = 3) -> str:
    """Decimal text with `digits` decimals that is never below the number."""
    if math.isinf(epsilon):
        return "inf"
    steps = math.ceil(Fraction(epsilon) * 10**digits)
    return f"{steps // 10**digits}.{steps % 10**digits:0{digits}d}"
