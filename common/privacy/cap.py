"""A hospital's lifetime cap: what it allows, and how much of it some charges use. The one rule of gate and displays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.accountant import Charges, RdpFilter
from cohortium.common.privacy.budget import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class Cap:
    """(epsilon, delta) over all runs on a source, for ever, counted for a patient in `hospitals` hospitals."""

    epsilon: float
    delta: float
    hospitals: int

    def filter(self) -> RdpFilter:
        """A filter with nothing spent; UsageError CAP-VALUE."""
        return RdpFilter(epsilon=self.epsilon, delta=self.delta, hospitals=self.hospitals)

    def allows(self, charges: Charges) -> bool:
        """Whether all charges together stay inside; never where one has no price (`private` leaves those out)."""
        return self.filter().allows(charges)

    def used(self, charges: Charges) -> float:
        """The share of the cap that these charges use, 0 to 1 and above; what has no price is left out."""
        whole = self.filter()
        return sum(whole.price(event, count) for event, count in private(charges)) / whole.room

    def to_json(self) -> dict[str, Any]:
        """Numbers as texts that give the same floats again: no float stands in a signed line."""
        return {"epsilon": repr(self.epsilon), "delta": repr(self.delta), "hospitals": self.hospitals}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """ProtocolError CAP-FORM: not a cap that a site.toml may state."""
        try:
            if set(value) != {"epsilon", "delta", "hospitals"} or type(value["hospitals"]) is not int:
                raise ValueError
            epsilon, delta = (float(_short(value[name])) for name in ("epsilon", "delta"))
            if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1e-3 and 1 <= value["hospitals"] <= 10**6):
                raise ValueError
            return cls(epsilon=epsilon, delta=delta, hospitals=value["hospitals"])
        except (TypeError, ValueError, KeyError):
            raise ProtocolError("CAP-FORM", "that is not a lifetime cap") from None


def private(charges: Charges) -> list[tuple[Event, int]]:
    """The charges without a rehearsal's releases that had no noise: those have no price that a cap could hold."""
    return [(event, count) for event, count in charges if event.kind != "non-private"]


def _short(text: Any) -> str:
    if not isinstance(text, str) or len(text) > 40:
        raise ValueError
    return text
