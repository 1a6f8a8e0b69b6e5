"""What a strategy is: how one query is answered by many sites. It speaks messages and carries none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cohortium.common.privacy.plan import Stage
from cohortium.common.protocol.messages import Message
from cohortium.common.queries import AnyQuery

COORDINATOR = "coordinator"

Exchange = Callable[[Mapping[str, Message], str], dict[str, Message]]
"""exchange({site: message}, label) -> {site: verified reply}; sites that did not answer or refused are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSum:
    """What came out of a round: values int64 [d] in lattice units, and whose they are.

    noise_shares: how many noise shares of 1/√h each the sum holds, in units of the planned σ: variance is
    (noise_shares / h) σ². sent_bytes: what the sites sent, by site. dropped: sites that began and did not end.
    """

    values: np.ndarray
    lattice: float
    sites: tuple[str, ...]
    variance_factor: float
    dropped: tuple[str, ...] = ()
    sent_bytes: dict[str, int] = field(default_factory=dict)


class Strategy(Protocol):
    """Answers the plan's releases one after the other. Raises ProtocolError SUM-TOO-FEW (void) if too few stay."""

    mode: str

    def start(self, hellos: Mapping[str, Message]) -> None:
        """The sites' hellos, once per run."""
        ...

    def answer(self, index: int, stage: Stage, query: AnyQuery, *, next_dim: int | None = None) -> SiteSum:
        """The noised sum for release `index`; next_dim: length of the following release where it is known."""
        ...


def ask_message(
    run: str,
    index: int,
    query: AnyQuery,
    *,
    mirrored: int,
    extra: dict[str, Any] | None = None,
    extra_blobs: Mapping[str, bytes] | None = None,
) -> Message:
    """The question as a site gets it; blobs of the query under query/."""
    fields, blobs = query.to_wire()
    named = {f"query/{name}": blob for name, blob in blobs.items()}
    return Message(
        kind="run.ask",
        sender=COORDINATOR,
        fields={
            "run": run,
            "index": index,
            "kind": query.kind,
            "query": fields,
            "mirrored": mirrored,
            **(extra or {}),
        },
        blobs={**named, **(extra_blobs or {})},
    )
