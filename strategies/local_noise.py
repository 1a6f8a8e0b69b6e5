"""`local`: every site adds the whole noise itself; nobody has to be trusted, and the sum holds √n times more noise.

One exchange a release. A release may be several DP-SGD steps at the site (`LocalSteps`); what leaves then is the
site's noised update. Sites weigh alike or by constants of the plan, never by their number of patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cohortium.common.errors import ProtocolError
from cohortium.common.privacy.plan import Plan, Stage
from cohortium.common.privacy.release import UPDATE_LATTICE
from cohortium.common.protocol.fixedpoint import capacity
from cohortium.common.protocol.messages import Message
from cohortium.common.queries import AnyQuery, Gradient
from cohortium.strategies.base import Exchange, SiteSum, ask_message


class LocalNoise:
    """One run's plain sums of locally noised vectors."""

    mode = "local"

    def __init__(self, *, plan: Plan, run: str, exchange: Exchange, mirrored: Callable[[str], int]) -> None:
        self._plan, self._run = plan, run
        self._exchange, self._mirrored = exchange, mirrored

    def start(self, hellos: Mapping[str, Message]) -> None:
        pass

    def answer(self, index: int, stage: Stage, query: AnyQuery, *, next_dim: int | None = None) -> SiteSum:
        lattice = query.lattice
        if isinstance(query, Gradient) and query.local is not None:
            lattice = UPDATE_LATTICE
        messages = {
            site: ask_message(self._run, index, query, mirrored=self._mirrored(site)) for site in self._plan.sites
        }
        replies = self._exchange(messages, f"{index}/noised")
        total, heard, sent = np.zeros(query.dim, dtype=np.int64), [], {}
        limit = capacity(len(self._plan.sites))
        for site in sorted(replies):
            reply = replies[site]
            blob = reply.blobs.get("values", b"")
            expected = {"run": self._run, "index": index, "lattice": lattice.hex()}
            if reply.kind != "site.noised" or any(reply.fields.get(k) != v for k, v in expected.items()):
                continue
            if len(blob) != 8 * query.dim:
                continue
            values = np.frombuffer(blob, dtype="<i8")
            if len(values) and (int(values.min()) < -limit or int(values.max()) > limit):
                continue
            total += values
            heard.append(site)
            sent[site] = values.nbytes + 1024
        if not heard:
            raise ProtocolError("SUM-TOO-FEW", "no site answered", left="what was charged stays charged")
        return SiteSum(
            values=total,
            lattice=lattice,
            sites=tuple(heard),
            variance_factor=float(len(heard)),
            dropped=tuple(s for s in self._plan.sites if s not in heard),
            sent_bytes=sent,
        )
