"""site.toml: where a hospital's data is, and what its officer lets happen to it. Nothing here has a lax default.

[site]    name, coordinator_key (hex of the coordinator's Ed25519 key)
[data]    table (a Parquet or CSV file, relative to site.toml)
[policy]  lifetime_epsilon, lifetime_delta, minimum_sites, minimum_patients, generators, strategies, evaluation
[rehearsal]  seed, noise: only in simulations; a guard with it never claims privacy
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohortium.common.errors import Refused, UsageError
from cohortium.common.privacy.plan import Plan
from cohortium.common.study import toml_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """A simulation's licence to be reproducible (seed) or noiseless (noise=False). Never private."""

    seed: int | None = None
    noise: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What one hospital allows. lifetime_epsilon, lifetime_delta: the cap over all runs on this data, for ever."""

    name: str
    coordinator_key: str
    table: str
    lifetime_epsilon: float
    lifetime_delta: float
    minimum_sites: int
    minimum_patients: int
    generators: tuple[str, ...]
    strategies: tuple[str, ...]
    evaluation: bool
    rehearsal: Rehearsal | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite(self.lifetime_epsilon) and self.lifetime_epsilon > 0
        if not finite or not 0 < self.lifetime_delta < 1e-3:
            raise UsageError("SITE-CAP", "a lifetime cap is an epsilon above 0 and a delta below 0.001")
        if self.minimum_sites < 1 or self.minimum_patients < 0 or len(self.coordinator_key) != 64:
            raise UsageError("SITE-POLICY", "minimum_sites, minimum_patients or coordinator_key out of range")

    @classmethod
    def load(cls, path: Path) -> Policy:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
            site, policy = document["site"], document["policy"]
            rehearsal = document.get("rehearsal")
            return cls(
                name=site["name"],
                coordinator_key=site["coordinator_key"],
                table=document["data"]["table"],
                lifetime_epsilon=float(policy["lifetime_epsilon"]),
                lifetime_delta=float(policy["lifetime_delta"]),
                minimum_sites=_whole(policy["minimum_sites"]),
                minimum_patients=_whole(policy["minimum_patients"]),
                generators=_words(policy["generators"]),
                strategies=_words(policy["strategies"]),
                evaluation=_boolean(policy["evaluation"]),
                rehearsal=None
                if rehearsal is None
                else Rehearsal(seed=rehearsal.get("seed"), noise=_boolean(rehearsal.get("noise", True))),
            )
        except FileNotFoundError:
            raise UsageError("SITE-MISSING", "this is not a site's directory", where=(str(path),)) from None
        except KeyError as error:
            raise UsageError(
                "SITE-KEY",
                f"site.toml lacks {error}",
                where=(str(path),),
                hint="every policy setting is required",
            ) from None
        except (tomllib.TOMLDecodeError, TypeError, ValueError):
            raise UsageError("SITE-TOML", "site.toml cannot be read", where=(str(path),)) from None

    def save(self, path: Path) -> None:
        """Write site.toml; for simulations and `site init`."""
        lines = [
            "[site]", f"name = {toml_text(self.name)}", f"coordinator_key = {toml_text(self.coordinator_key)}", "",
            "[data]", f"table = {toml_text(self.table)}", "",
            "[policy]",
            f"lifetime_epsilon = {self.lifetime_epsilon!r}", f"lifetime_delta = {self.lifetime_delta!r}",
            f"minimum_sites = {self.minimum_sites}", f"minimum_patients = {self.minimum_patients}",
            f"generators = {toml_text(list(self.generators))}", f"strategies = {toml_text(list(self.strategies))}",
            f"evaluation = {str(self.evaluation).lower()}",
        ]  # fmt: skip
        if self.rehearsal is not None:
            lines += [
                "",
                "# A rehearsal's noise can be removed by whoever knows the seed: never publish from it.",
            ]
            lines += ["[rehearsal]", f"noise = {str(self.rehearsal.noise).lower()}"]
            lines += [] if self.rehearsal.seed is None else [f"seed = {self.rehearsal.seed}"]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def check(self, plan: Plan) -> None:
        """Refuse a plan that this hospital does not allow; before any record is read."""

        def refuse(code: str, sentence: str, hint: str) -> None:
            raise Refused(code, sentence, hint=hint)

        if self.name not in plan.sites:
            refuse(
                "POLICY-SITE", "the plan does not name this hospital", "ask the coordinator for another plan"
            )
        if len(plan.sites) < self.minimum_sites:
            refuse(
                "POLICY-SITES",
                f"the plan has fewer than {self.minimum_sites} sites",
                "[policy] minimum_sites",
            )
        if plan.generator not in self.generators:
            refuse(
                "POLICY-GENERATOR", f"generator {plan.generator!r} is not allowed here", "[policy] generators"
            )
        if plan.mode not in self.strategies:
            refuse("POLICY-STRATEGY", f"strategy {plan.mode!r} is not allowed here", "[policy] strategies")
        if any(s.part == "holdout" for s in plan.stages) and not self.evaluation:
            refuse(
                "POLICY-EVALUATION",
                "evaluation on held-out patients is not allowed here",
                "[policy] evaluation",
            )
        if not plan.private and (self.rehearsal is None or self.rehearsal.noise):
            refuse(
                "POLICY-NOISE",
                "the plan has a release without noise",
                "only a rehearsal may switch noise off",
            )
        if plan.delta > self.lifetime_delta:
            refuse("POLICY-DELTA", "the plan's delta is above this hospital's", "[policy] lifetime_delta")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):  # bool("false") is true: a text here would allow what was to be forbidden
        raise TypeError("true or false expected")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a whole number expected")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError("a list of texts expected")
    return tuple(value)
