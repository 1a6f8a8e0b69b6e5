"""site.toml: where a hospital's data is, and what its officer lets happen to it. Nothing here has a lax default.

[site]    name, coordinator_key (hex of the coordinator's Ed25519 key)
[data]    table: a Parquet or CSV file or a folder of them (relative to site.toml), or a database's address
          (postgresql://, sqlite:///, duckdb:///) with query or query_file; password: where the password lies
          (env:, file:, keyring:), never the password; one_row = false where a query gives several rows a patient
[policy]  lifetime_epsilon, lifetime_delta, unit, hospitals, minimum_sites, minimum_colluders, minimum_patients,
          generators, strategies, evaluation. May be absent: attacks and tell_cap (absent: false); peers, {name =
          hex of a site's key}; officers, a list of hex keys (absent: the one in officer.pub) with officers_needed,
          how many of them must sign (absent: 1)
[rehearsal]  seed, noise: only in simulations and rehearsals; a guard with it never claims privacy

One directory, one source, one ledger: the lifetime cap is the cap of this source.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.client.references import check_reference, refuse_literal_secret
from cohortium.common.errors import Refused, UsageError
from cohortium.common.privacy.cap import Cap
from cohortium.common.privacy.chain import is_hex
from cohortium.common.privacy.plan import Plan
from cohortium.common.study import toml_text

JUDGING = ("tallies", "sums", "estimates")
"""Questions that judge a synthetic table by patients."""
DATABASES = ("postgresql://", "sqlite:///", "duckdb:///")
KNOWN = {
    "site": {"name", "coordinator_key"},
    "data": {"table", "query", "query_file", "password", "one_row"},
    "policy": {
        *("lifetime_epsilon", "lifetime_delta", "unit", "hospitals", "minimum_sites", "minimum_colluders"),
        *("minimum_patients", "generators", "strategies", "evaluation", "attacks", "tell_cap", "peers"),
        *("officers", "officers_needed"),
    },
    "rehearsal": {"seed", "noise"},
}
"""A misspelt setting that may be absent would be a lax default: what is not listed here is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """A simulation's licence to be reproducible (seed) or noiseless (noise=False). Never private."""

    seed: int | None = None
    noise: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What one hospital allows.

    lifetime_epsilon, lifetime_delta: the cap over all runs on this data, for ever, always counted for a patient in
    `hospitals` hospitals. unit: the column that names the patient, or "row". minimum_colluders: how many of the
    others the hospital does not want to trust. peers: (name, hex of the Ed25519 key) of every site it knows; None
    takes any, then the officer compares fingerprints. attacks: whether training patients may be asked what tells how
    well an attack on the table works, as a noised sum. tell_cap: whether the coordinator is told the lifetime cap.
    officers: hex of the keys that may approve; None: the one in officer.pub. query, query_file, password,
    several_rows: for a database only.
    """

    name: str
    coordinator_key: str
    table: str
    lifetime_epsilon: float
    lifetime_delta: float
    unit: str
    hospitals: int
    minimum_sites: int
    minimum_colluders: int
    minimum_patients: int
    generators: tuple[str, ...]
    strategies: tuple[str, ...]
    evaluation: bool
    peers: tuple[tuple[str, str], ...] | None = None
    rehearsal: Rehearsal | None = None
    query: str | None = None
    query_file: str | None = None
    password: str | None = None
    several_rows: bool = False
    officers: tuple[str, ...] | None = None
    officers_needed: int = 1
    attacks: bool = False
    tell_cap: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.lifetime_epsilon) and self.lifetime_epsilon > 0
        if not finite or not 0 < self.lifetime_delta < 1e-3:
            raise UsageError("SITE-CAP", "a lifetime cap is an epsilon above 0 and a delta below 0.001")
        if self.minimum_sites < 1 or self.minimum_patients < 0 or len(self.coordinator_key) != 64:
            raise UsageError("SITE-POLICY", "minimum_sites, minimum_patients or coordinator_key out of range")
        if self.minimum_colluders < 0 or self.hospitals < 1 or not self.unit:
            raise UsageError("SITE-POLICY", "minimum_colluders, hospitals or unit out of range")
        if not all(is_hex(key, 32) for _, key in self.peers or ()):
            raise UsageError("SITE-POLICY", "a peer's key is the hex of 32 bytes")
        _check_source(self)
        _check_officers(self)

    @property
    def cap(self) -> Cap:
        """The lifetime cap: the same for every plan, or its meaning would change with each."""
        return Cap(epsilon=self.lifetime_epsilon, delta=self.lifetime_delta, hospitals=self.hospitals)

    @property
    def database(self) -> bool:
        """Whether the records come from a database."""
        return "://" in self.table

    @property
    def one_row(self) -> bool:
        """Whether a patient with several rows is a mistake: of a query's join, unless site.toml says otherwise."""
        return self.database and not self.several_rows

    @classmethod
    def load(cls, path: Path) -> Policy:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
            site, data, policy = document["site"], document["data"], document["policy"]
            rehearsal = document.get("rehearsal")
            _refuse_unknown(document, path)
            return cls(
                name=site["name"],
                coordinator_key=site["coordinator_key"],
                table=_text(data["table"]),
                lifetime_epsilon=float(policy["lifetime_epsilon"]),
                lifetime_delta=float(policy["lifetime_delta"]),
                unit=_text(policy["unit"]),
                hospitals=_whole(policy["hospitals"]),
                minimum_sites=_whole(policy["minimum_sites"]),
                minimum_colluders=_whole(policy["minimum_colluders"]),
                minimum_patients=_whole(policy["minimum_patients"]),
                generators=_words(policy["generators"]),
                strategies=_words(policy["strategies"]),
                evaluation=_boolean(policy["evaluation"]),
                attacks=_boolean(policy.get("attacks", False)),
                tell_cap=_boolean(policy.get("tell_cap", False)),
                peers=None if "peers" not in policy else _peers(policy["peers"]),
                rehearsal=None
                if rehearsal is None
                else Rehearsal(seed=rehearsal.get("seed"), noise=_boolean(rehearsal.get("noise", True))),
                query=None if "query" not in data else _text(data["query"]),
                query_file=None if "query_file" not in data else _text(data["query_file"]),
                password=None if "password" not in data else _text(data["password"]),
                several_rows=not _boolean(data.get("one_row", True)),
                officers=None if "officers" not in policy else _words(policy["officers"]),
                officers_needed=_whole(policy.get("officers_needed", 1)),
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
            "[site]",
            f"name = {toml_text(self.name)}",
            f"coordinator_key = {toml_text(self.coordinator_key)}",
            "",
            "[data]",
            f"table = {toml_text(self.table)}",
            *(
                f"{name} = {toml_text(value)}"
                for name in ("query", "query_file", "password")
                if (value := getattr(self, name)) is not None
            ),
            *(["one_row = false"] if self.several_rows else []),
            "",
            "[policy]",
            f"lifetime_epsilon = {self.lifetime_epsilon!r}",
            f"lifetime_delta = {self.lifetime_delta!r}",
            f"unit = {toml_text(self.unit)}",
            f"hospitals = {self.hospitals}",
            f"minimum_sites = {self.minimum_sites}",
            f"minimum_colluders = {self.minimum_colluders}",
            f"minimum_patients = {self.minimum_patients}",
            f"generators = {toml_text(list(self.generators))}",
            f"strategies = {toml_text(list(self.strategies))}",
            f"evaluation = {str(self.evaluation).lower()}",
            *(["attacks = true"] if self.attacks else []),
            *(["tell_cap = true"] if self.tell_cap else []),
        ]
        if self.peers is not None:
            pins = ", ".join(f"{toml_text(name)} = {toml_text(key)}" for name, key in self.peers)
            lines.append(f"peers = {{{pins}}}")
        if self.officers is not None:
            lines.append(f"officers = {toml_text(list(self.officers))}")
            lines.append(f"officers_needed = {self.officers_needed}")
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
            refuse("POLICY-SITE", "the plan does not name this hospital", "ask the coordinator for another plan")
        if len(plan.sites) < self.minimum_sites:
            refuse(
                "POLICY-SITES",
                f"the plan has fewer than {self.minimum_sites} sites",
                "[policy] minimum_sites",
            )
        if plan.unit != self.unit:
            refuse("POLICY-UNIT", f"the plan protects another unit than {self.unit!r}", "[policy] unit")
        if plan.hospitals < self.hospitals:
            refuse(
                "POLICY-HOSPITALS",
                f"the plan is priced for patients in fewer than {self.hospitals} hospitals",
                "[policy] hospitals",
            )
        if plan.mode == "secure-sum" and plan.colluders < self.minimum_colluders:
            refuse(
                "POLICY-COLLUDERS",
                f"the plan tolerates fewer than {self.minimum_colluders} colluding sites",
                "[policy] minimum_colluders",
            )
        if plan.generator not in self.generators:
            refuse("POLICY-GENERATOR", f"generator {plan.generator!r} is not allowed here", "[policy] generators")
        if plan.mode not in self.strategies:
            refuse("POLICY-STRATEGY", f"strategy {plan.mode!r} is not allowed here", "[policy] strategies")
        if any(s.part == "holdout" for s in plan.stages) and not self.evaluation:
            refuse(
                "POLICY-EVALUATION",
                "evaluation on held-out patients is not allowed here",
                "[policy] evaluation",
            )
        # By kind, not by name: no generator asks training patients such questions.
        if any(s.part == "train" and s.kind in JUDGING for s in plan.stages) and not self.attacks:
            refuse(
                "POLICY-ATTACKS",
                "asking training patients how near they lie to the synthetic table is not allowed here",
                "[policy] attacks",
            )
        if not plan.private and (self.rehearsal is None or self.rehearsal.noise):
            refuse(
                "POLICY-NOISE",
                "the plan has a release without noise",
                "only a rehearsal may switch noise off",
            )
        if plan.delta > self.lifetime_delta:
            refuse("POLICY-DELTA", "the plan's delta is above this hospital's", "[policy] lifetime_delta")

    def check_peers(self, identities: Mapping[str, Ed25519PublicKey]) -> None:
        """Refuse sites whose keys this hospital does not know, where it listed those that it does."""
        if self.peers is None:
            return
        known = dict(self.peers)
        for site, key in sorted(identities.items()):
            if site != self.name and known.get(site) != key.public_bytes_raw().hex():
                raise Refused(
                    "POLICY-PEERS",
                    f"{site!r} is not a site whose key this hospital knows",
                    hint="compare its fingerprint over another channel, then add it to [policy] peers",
                )


def _check_source(policy: Policy) -> None:
    if not policy.table:
        raise UsageError("SITE-TABLE", "[data] table names a file, a folder or a database")
    asked = [name for name in ("query", "query_file") if getattr(policy, name) is not None]
    if not policy.database:
        if asked or policy.password is not None or policy.several_rows:
            raise UsageError("SITE-QUERY", "a query, a password and one_row belong to a database, not to a file")
        return
    if not policy.table.startswith(DATABASES):
        raise UsageError("SITE-URL", "a database of that kind is not known here", hint=f"known: {', '.join(DATABASES)}")
    refuse_literal_secret(policy.table)
    if len(asked) != 1:
        raise UsageError(
            "SITE-QUERY", "a database needs one query", hint='add a line under [data]: query_file = "patients.sql"'
        )
    if policy.password is not None:
        check_reference(policy.password)


def _check_officers(policy: Policy) -> None:
    keys = policy.officers
    if keys is None:
        if policy.officers_needed != 1:
            raise UsageError("SITE-OFFICERS", "officers_needed counts the keys in a list of officers")
        return
    if not keys or len(set(keys)) != len(keys) or not all(is_hex(key, 32) for key in keys):
        raise UsageError("SITE-OFFICERS", "officers lists the hex of one or more Ed25519 keys, each once")
    if not 1 <= policy.officers_needed <= len(keys):
        raise UsageError("SITE-OFFICERS", "officers_needed is from 1 to the number of officers")


def _refuse_unknown(document: Mapping[str, Any], path: Path) -> None:
    for section, names in KNOWN.items():
        extra = sorted(set(document.get(section, {})) - names)
        if extra:
            raise UsageError(
                "SITE-UNKNOWN",
                f"[{section}] has no setting {extra[0]!r}",
                where=(str(path),),
                hint=f"known: {', '.join(sorted(names))}",
            )


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):  # bool("false") is true: a text here would allow what was to be forbidden
        raise TypeError("true or false expected")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a whole number expected")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text expected")
    return value


def _peers(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise TypeError("a table of names and keys expected")
    return tuple(sorted((name, _text(key)) for name, key in value.items()))


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError("a list of texts expected")
    return tuple(value)
