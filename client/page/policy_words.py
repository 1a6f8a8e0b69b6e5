"""The site's policy as sentences, each beside the setting that says it."""

from __future__ import annotations

from dataclasses import dataclass

from cohortium.client.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """setting: as site.toml calls it. value: what it says. means: in words. care: something to think about, or ""."""

    setting: str
    value: str
    means: str
    care: str = ""


def rules(policy: Policy) -> list[Rule]:
    unit = "each row" if policy.unit == "row" else "all rows of one patient, named by this column, together"
    known = "any site that the coordinator names" if policy.peers is None else f"{len(policy.peers)} named keys"
    officers = (
        "the key in officer.pub" if policy.officers is None else f"{policy.officers_needed} of {len(policy.officers)}"
    )
    found = [
        Rule(
            setting="lifetime_epsilon, lifetime_delta",
            value=f"ε = {policy.lifetime_epsilon:g}, δ = {policy.lifetime_delta:g}",
            means="The cap over all runs on these records, for ever. The guard refuses what would pass it.",
        ),
        Rule(setting="unit", value=policy.unit, means=f"Whom the guarantee protects: {unit}."),
        Rule(
            setting="hospitals",
            value=str(policy.hospitals),
            means="In how many hospitals one patient may have records; plans that count fewer are refused.",
        ),
        Rule(
            setting="minimum_sites",
            value=str(policy.minimum_sites),
            means="A plan with fewer hospitals is refused.",
            care="With one hospital the sum is this hospital's alone." if policy.minimum_sites < 2 else "",
        ),
        Rule(
            setting="minimum_colluders",
            value=str(policy.minimum_colluders),
            means="How many of the other hospitals need not be trusted; plans that tolerate fewer are refused.",
        ),
        Rule(
            setting="minimum_patients",
            value=str(policy.minimum_patients),
            means="With fewer patients here nothing is answered.",
        ),
        Rule(setting="generators", value=", ".join(policy.generators), means="Which generators a plan may use."),
        Rule(setting="strategies", value=", ".join(policy.strategies), means="Which trust modes a plan may use."),
        Rule(
            setting="evaluation",
            value=_yes(policy.evaluation),
            means="Whether held-out patients may be asked for scores, with noise.",
        ),
        Rule(
            setting="attacks",
            value=_yes(policy.attacks),
            means="Whether training patients may be asked how well an attack works, with noise.",
        ),
        Rule(
            setting="tell_cap",
            value=_yes(policy.tell_cap),
            means="Whether the coordinator is told the lifetime cap, to see before it asks which studies fit.",
        ),
        Rule(
            setting="peers",
            value=known,
            means="Which other hospitals are accepted, by their keys.",
            care="Compare fingerprints by telephone, then approve with pinning." if policy.peers is None else "",
        ),
        Rule(setting="officers, officers_needed", value=officers, means="Whose signature lets a plan run here."),
    ]
    if policy.rehearsal is not None:
        found.append(
            Rule(
                setting="[rehearsal]",
                value="on",
                means="Noise that anybody with the seed can remove, or none.",
                care="NOT private. Never point this site at records of real patients.",
            )
        )
    return found


def _yes(value: bool) -> str:
    return "allowed" if value else "not allowed"


def source(policy: Policy) -> str:
    """Where the records come from, in words; a database's address holds no password (site.toml refuses one)."""
    return f"database {policy.table}" if policy.database else f"file or folder {policy.table}"
