"""Who takes part: our federated runs and their references, peers on the pooled table, and a consortium's other ways.

ours-iid, ours-site, ours-skewed   federated, secure sum, five equal hospitals, the table's real sites, skewed ones
ours-iid-c0                        as ours-iid, but no hospital may side with the coordinator: the pooled table's noise
ours-pooled, ours-local            the same budget asked of one table; trust mode `local`
NAME, NAME+oracle                  a peer that sees all rows in one place; oracle: told bins from the raw rows
NAME                               a baseline on five equal hospitals
real, shuffled                     the training rows themselves; each column permuted by itself
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cohortium.common.errors import UsageError
from cohortium.simulations.benchmarks.record.worlds import World

Family = Literal["ours", "pooled", "local", "peer", "oracle", "baseline", "public", "reference"]
GROUPS: dict[str, str] = {
    "ours": "ours, federated (secure sum)",
    "pooled": "ours on one pooled table",
    "local": "ours, federated, local mode",
    "peer": "peers on the pooled table, told what is public (levels, ranges)",
    "oracle": "peers on the pooled table, told bins and levels of the raw rows (not honest)",
    "baseline": "federated baselines",
    "public": "peers without privacy",
    "reference": "references",
}
"""Families in the order in which they are shown."""
REAL, SHUFFLED = "real", "shuffled"
CONTENDER, POOLED = "ours-iid", "ours-pooled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to make a synthetic table.

    part: the peer's or baseline's own name; split: of the hospitals; colluders: how many of them a secure sum tolerates
    beside the coordinator, which costs noise.
    """

    name: str
    family: Family
    part: str = ""
    split: str = ""
    bins: str = ""
    colluders: int = 1

    @property
    def private(self) -> bool:
        """Whether it has an ε. Peers without privacy and the references run once, not once an ε."""
        return self.family not in ("public", "reference")

    @property
    def seeded(self) -> bool:
        return self.name != REAL

    def fits(self, world: World) -> bool:
        return not self.split or self.split in world.splits


OURS = (
    Method(name=CONTENDER, family="ours", split="iid"),
    Method(name="ours-iid-c0", family="ours", split="iid", colluders=0),
    Method(name="ours-site", family="ours", split="site"),
    Method(name="ours-skewed", family="ours", split="skewed"),
    Method(name=POOLED, family="pooled"),
    Method(name="ours-local", family="local", split="iid"),
)
REFERENCES = (Method(name=REAL, family="reference"), Method(name=SHUFFLED, family="reference"))


def methods(peers: Mapping[str, Any], baselines: Iterable[str]) -> dict[str, Method]:
    """All methods by name, references first and peers last, because they may take long.

    peers: peers.PEERS. Raises ValueError for two methods of one name.
    """
    found = [*REFERENCES, *OURS]
    found += [Method(name=name, family="baseline", part=name, split="iid") for name in baselines]
    for name, peer in peers.items():
        if not peer.private:
            found.append(Method(name=name, family="public", part=name, bins=peer.bins[0] if peer.bins else ""))
            continue
        for bins in peer.bins:
            oracle = bins == "oracle"
            found.append(
                Method(
                    name=f"{name}+oracle" if oracle else name,
                    family="oracle" if oracle else "peer",
                    part=name,
                    bins=bins,
                )
            )
    names = [method.name for method in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two methods have one name: {sorted({n for n in names if names.count(n) > 1})}")
    return {method.name: method for method in found}


def chosen(known: Mapping[str, Method], wanted: Sequence[str]) -> list[Method]:
    """Methods by name or family, in the order of `known`; all without a wish. Raises UsageError for an unknown one."""
    if not wanted:
        return list(known.values())
    names: set[str] = set()
    for wish in wanted:
        of_family = {m.name for m in known.values() if m.family == wish}
        if not of_family and wish not in known:
            near = difflib.get_close_matches(wish, [*known, *GROUPS], n=1)
            raise UsageError(
                "RECORD-METHOD",
                f"there is no method {wish!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                where=("--methods",),
                hint=f"a family ({', '.join(GROUPS)}) or one of {', '.join(known)}",
            )
        names |= of_family or {wish}
    return [method for name, method in known.items() if name in names]
