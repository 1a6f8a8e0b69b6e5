"""Audits of the guarantee itself: `python -m cohortium.simulations.benchmarks.audit [--json] [--quick] [NAME...]`.

    noise      variance, law and independence of what `release` adds: false alarm 1e-6 a figure
    primitive  releases of neighbouring tables told apart: lower bound on mu (sampled: on delta) over what the event
               charges; above 1 is a proven break (false alarm 1e-4), below 0.9 an audit too weak to be believed
    rehearsal  one run with 1,000 canaries over real guards, ledgers and secure sums: lower bound on epsilon of
               counts, moments and gradients (false alarm 5 %, and far less where the promise holds with room)

Exit code 1 where a limit does not hold. --no-noise switches the noise off and keeps the promises: then it must fail.
--seed makes everything reproducible; without it coins and noise come from the operating system, as in the field.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cohortium.common.derived import Joint
from cohortium.common.encoding import Records
from cohortium.common.estimates import Estimates, Logistic, Sums
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy import accountant
from cohortium.common.privacy.auditing import NoiseTally, distinguish, same_noise_p_value
from cohortium.common.privacy.budget import WHOLE
from cohortium.common.privacy.entropy import Entropy, SeededEntropy, SystemEntropy
from cohortium.common.privacy.release import Mechanism, Released, release
from cohortium.common.queries import SUM_SLACK, AnyQuery, Counts, Gradient, LocalSteps, Moments, Tallies
from cohortium.simulations.benchmarks.audit_run import Rehearsal, rehearse
from cohortium.simulations.benchmarks.timing import Figure

FALSE_ALARM = 1e-6
BREAK = 1.0 - 1e-4
"""Confidence of a lower bound on mu."""
MU = 3.0
"""Of the neighbours: about where a number of releases shows the largest part of it."""
SAMPLED_EPSILON = 1.0
DELTA = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """draws of noise a figure; releases of each neighbour, and how many more to learn the test from; steps of the
    rehearsal; power: the least share of mu that the audit of the primitive must prove."""

    draws: int
    releases: int
    training: int
    steps: int
    power: float


FULL = Effort(draws=10_000_000, releases=8_000, training=1_000, steps=20, power=0.9)
QUICK = Effort(draws=400_000, releases=1_500, training=300, steps=4, power=0.75)


@dataclass(frozen=True, kw_only=True, slots=True)
class Auditor:
    """seed None: entropy of the operating system. noise False: nothing is noised, and everything is promised."""

    effort: Effort = FULL
    seed: int | None = None
    noise: bool = True

    def entropy(self, site: str = "a") -> Entropy:
        return SystemEntropy() if self.seed is None else SeededEntropy(seed=self.seed, site=site)

    def released(
        self, name: str, query: AnyQuery, records: Records, how: Mechanism, index: int, *, site: str = "a"
    ) -> Released:
        """name: of the audit, so that two of them never see the same noise of one seed."""
        if not self.noise:
            how = Mechanism(noise_multiplier=0.0, rate=how.rate, shares=how.shares)
        return release(
            query=query,
            records=records,
            mechanism=how,
            entropy=self.entropy(site),
            run=f"audit-{name}",
            index=index,
            head="",
        )


# ---- noise --------------------------------------------------------------------------------------------------


def noise(auditor: Auditor) -> Iterator[Figure]:
    """Of a site without patients: all that it releases is noise, and how large is public."""
    for name, query, bound, how in _noisy():
        lattice = query.lattice
        promised = how.noise_multiplier
        tally: NoiseTally | None = None
        for index in range(math.ceil(auditor.effort.draws / query.dim)):
            released = auditor.released(name, query, _people(), how, index)
            if tally is None:
                # What is charged is what was promised; with a dearer event the same noise would do.
                promised = released.event.noise_multiplier or promised
                tally = NoiseTally(sigma=promised * bound / lattice / math.sqrt(how.shares))
            tally.add(released.values)
        assert tally is not None
        low, high = tally.ratio_interval()
        yield Figure(
            name=f"noise-{name}",
            what=f"smallest of {len(tally.p_values())} p-values of the noise's law, times their number",
            value=tally.p_value(),
            unit="p",
            limit=FALSE_ALARM,
            better="higher",
            details={
                "draws": tally.draws,
                "sigma over promised": tally.ratio,
                "at least": low,
                "at most": high,
                **{f"p {test}": p for test, p in tally.p_values().items()},
            },
        )
    yield _fresh(auditor)


def _noisy() -> Iterator[tuple[str, AnyQuery, float, Mechanism]]:
    """(name, query, its sensitivity by the auditor's own reckoning, mechanism)."""
    counts = Counts(columns=(0,), maps=(np.arange(4, dtype=np.int32),), bins=(200_000,))
    yield "counts", counts, 1.0, Mechanism(noise_multiplier=1.0)
    yield "sampled", counts, 1.0, Mechanism(noise_multiplier=5.0, rate=WHOLE // 4)
    yield "shares", counts, 1.0, Mechanism(noise_multiplier=0.7, shares=4)
    moments = Moments(features=(np.ones((4, 300)), np.ones((3, 300))), bound_sq=4.0)
    yield "moments", moments, 4.0 * math.sqrt(1 / 4), Mechanism(noise_multiplier=2.0)
    gradient = _gradient(bins=(4, 6_000), clip_norm_l2=0.5)
    step = 2.0 ** (math.floor(math.log2(0.5)) - 20)
    bound = 0.5 + math.sqrt(gradient.dim) * step + 0.5 * SUM_SLACK
    yield "gradient", gradient, bound, Mechanism(noise_multiplier=1.5)


def _fresh(auditor: Auditor) -> Figure:
    """No noise comes twice: other releases, other sites, the same release again with every generator set back."""
    query = Counts(columns=(0,), maps=(np.arange(4, dtype=np.int32),), bins=(20_000,))
    how = Mechanism(noise_multiplier=1.0)
    given = Auditor(effort=auditor.effort, seed=auditor.seed or 0, noise=auditor.noise)
    field = Auditor(effort=auditor.effort, noise=auditor.noise)
    drawn = [
        *(given.released("fresh", query, _people(), how, index).values for index in (0, 1)),
        given.released("fresh", query, _people(), how, 0, site="b").values,
    ]
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for _ in range(2):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            drawn.append(field.released("fresh", query, _people(), how, 0).values)
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
    pairs = [same_noise_p_value(one, other) for i, one in enumerate(drawn) for other in drawn[:i]]
    return Figure(
        name="noise-fresh",
        what=f"smallest p-value of {len(pairs)} correlations between releases, times their number",
        value=min(1.0, len(pairs) * min(pairs)),
        unit="p",
        limit=FALSE_ALARM,
        better="higher",
    )


# ---- the primitive on neighbours ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Tables that differ in one patient, and a query that this patient moves as far as it may."""

    name: str
    query: AnyQuery
    absent: Records
    present: Records
    how: Mechanism


def neighbours() -> Iterator[Neighbours]:
    """Every query kind and path. Rows are longer than their clip and patients have several, so both must hold."""
    plain = Mechanism(noise_multiplier=1.0 / MU)
    one, two = (0, 0), (1, 0)
    some: dict[str, Any] = {"absent": _people(one), "present": _people(one, two)}
    columns = (np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32))
    counts = Counts(columns=(0, 1), maps=columns, bins=(4, 3))
    yield Neighbours(name="counts", query=counts, how=plain, **some)
    yield Neighbours(name="counts-shares", query=counts, how=Mechanism(noise_multiplier=1.0 / MU, shares=4), **some)
    half = Mechanism(noise_multiplier=1.0 / MU, rate=WHOLE // 2)
    # Nobody else: whether others are drawn would be noise of its own.
    yield Neighbours(name="counts-sampled", query=counts, how=half, absent=_people(), present=_people(two))
    moments = Moments(features=(np.full((4, 2), 7.0), np.full((3, 2), 7.0)), bound_sq=4.0)
    yield Neighbours(name="moments", query=moments, how=plain, **some)
    for path in ("exact", "fast"):
        # Level 0 pulls one way, level 1 harder the other way: clipping their sum would move it twice as far.
        gradient = _gradient(bins=(2, 2), clip_norm_l2=0.05, path=path)
        yield Neighbours(name=f"gradient-{path}", query=gradient, how=plain, **some)
    bands = tuple(Joint(columns=(c,), maps=(table,), sizes=(len(table),)) for c, table in enumerate(columns))
    yield Neighbours(name="tallies", query=Tallies(derived=bands, part="train"), how=plain, **some)
    longer = (np.array([[9.0], [9.0], [0.0], [0.0]]), np.array([[9.0], [9.0], [0.0]]))
    yield Neighbours(name="sums", query=Sums(features=longer, clip_norm_l2=2.0, part="train"), how=plain, **some)
    # Both of the patient's rows have the outcome, and a score far beyond the clip, in one direction.
    model = Logistic(
        outcome=(1, np.array([1, 0, -1], dtype=np.int32)),
        design=(np.array([[9.0], [9.0], [0.0], [0.0]]), np.zeros((3, 0))),
        beta=np.zeros(2),
    )
    estimates = Estimates(model=model, clip_norm_l2=0.5, part="train")
    yield Neighbours(name="estimates", query=estimates, how=plain, **some)
    local = LocalSteps(steps=1, learning_rate=0.5, denominator=10.0)
    step = _gradient(bins=(2, 2), clip_norm_l2=0.05, local=local)
    yield Neighbours(name="gradient-local", query=step, how=plain, **some)


def primitive(auditor: Auditor) -> Iterator[Figure]:
    for case in neighbours():
        yield from told_apart(auditor, case)


def told_apart(auditor: Auditor, case: Neighbours) -> Iterator[Figure]:
    """The proven share of what the event charges, and whether the audit was able to prove enough."""
    effort, index = auditor.effort, 0
    drawn: list[np.ndarray] = []
    event, sampled = case.how.event, case.how.rate < WHOLE
    times = 4 if sampled else 1  # delta is harder to bound than mu
    for records in (case.absent, case.present):
        rows = np.empty((times * (effort.training + effort.releases), case.query.dim))
        for row in rows:
            parts = _one(auditor, case, records, index)
            row[:] = np.sum([part.values for part in parts], axis=0) * parts[0].lattice
            event, index = parts[0].event, index + 1
        drawn.append(rows)
    if event.kind == "non-private":
        event = case.how.event  # the promise
    training, at = times * effort.training, SAMPLED_EPSILON if sampled else None
    found = distinguish(*drawn, training=training, confidence=BREAK, epsilon=at)
    details: dict[str, float | str] = {
        "releases": found.absent + found.present,
        "proven epsilon, patient added": found.epsilon_low(delta=DELTA, direction="add"),
        "proven epsilon, patient removed": found.epsilon_low(delta=DELTA, direction="remove"),
        "charged epsilon": accountant.epsilon([(event, 1)], delta=DELTA),
    }
    if sampled:
        # A mixture of Gaussians has no mu: what is compared is delta at one epsilon.
        charged = accountant.delta_for([(event, 1)], epsilon=SAMPLED_EPSILON)
        proven, symbol = found.delta_low(epsilon=SAMPLED_EPSILON), "delta"
        details |= {"charged delta": charged, "proven delta": proven, "at epsilon": SAMPLED_EPSILON}
    else:
        charged, proven, symbol = 1.0 / event.noise_multiplier, found.mu_low, "mu"
        details |= {
            "charged mu": charged,
            "proven mu": proven,
            "measured mu": found.mu if math.isfinite(found.mu) else "inf",
            "measured mu at most": found.mu_high if math.isfinite(found.mu_high) else "inf",
        }
    what = f"proven lower bound on {symbol} over the {symbol} that the event charges"
    share = proven / charged
    yield Figure(name=f"primitive-{case.name}", what=what, value=share, unit="×", limit=1.0, details=details)
    yield Figure(
        name=f"primitive-{case.name}-power",
        what="the same: an audit that proves less says little",
        value=share,
        unit="×",
        limit=effort.power,
        better="higher",
    )


def _one(auditor: Auditor, case: Neighbours, records: Records, index: int) -> list[Released]:
    """One sum: the patients are at the first site, the others only add their shares of the noise."""
    sites = [records] + [_people()] * (case.how.shares - 1)
    return [
        auditor.released(case.name, case.query, mine, case.how, index, site=f"s{at}") for at, mine in enumerate(sites)
    ]


def _people(*levels: tuple[int, int]) -> Records:
    """Patients of two equal rows each, over two columns of 4 and 3 codes."""
    each = 2
    codes = np.repeat(np.array(levels, dtype=np.int32).reshape(-1, 2), each, axis=0)
    identity = np.arange(len(levels) * 16, dtype=np.uint8).reshape(-1, 16)
    return Records(
        codes=codes,
        patient=np.repeat(np.arange(len(levels)), each),
        identity=identity,
        rows_per_patient=np.full(len(levels), each, dtype=np.int64),
    )


def _gradient(
    *, bins: tuple[int, int], clip_norm_l2: float, path: str = "fast", local: LocalSteps | None = None
) -> Gradient:
    """A network whose only gradient is its first column's output bias: levels 0 and 1 pull in opposite ways."""
    net = Nade({"kind": "nade", "bins": list(bins), "hidden": 1})
    theta = np.zeros(net.size, dtype=np.float32)
    theta[0] = -1.0  # the hidden unit is off
    first = 1 + 2 * bins[0]  # after b, E and V of the first column
    theta[first : first + bins[0]] = [0.85, *[0.0] * (bins[0] - 1)]
    theta[len(theta) - bins[1]] = 40.0  # the second column is known
    maps = tuple(np.minimum(np.arange(size), most - 1).astype(np.int32) for size, most in zip((4, 3), bins))
    return Gradient(
        network=net.spec,
        maps=maps,
        parameters=theta,
        clip_norm_l2=clip_norm_l2,
        path="exact" if path == "exact" else "fast",
        local=local,
    )


# ---- the rehearsal ------------------------------------------------------------------------------------------


def rehearsal(auditor: Auditor) -> Iterator[Figure]:
    yield from judged(rehearse(noise=auditor.noise, seed=auditor.seed, steps=auditor.effort.steps))


def judged(run: Rehearsal) -> Iterator[Figure]:
    """The figures of a rehearsal; the report shows those named one-run-..."""
    for found in run.found:
        yield Figure(
            name=f"one-run-{found.path}",
            what=f"audited lower bound on epsilon of the {found.path}, at most what the ledgers charged for them",
            value=found.bound,
            unit="ε",
            limit=min(found.promised, found.charged),
            details={
                "canaries": found.canaries,
                "guesses": found.guesses,
                "right": found.correct,
                "confidence": found.confidence,
                "delta": found.delta,
            },
        )
    for path, (values, sigma) in run.residuals.items():
        tally = NoiseTally(sigma=sigma)
        tally.add(values)
        yield Figure(
            name=f"run-noise-{path}",
            what=f"smallest p-value of the law of the noise in the sum over sites, times their number; {path}",
            value=tally.p_value(),
            unit="p",
            limit=FALSE_ALARM,
            better="higher",
            details={"draws": tally.draws, "sigma over promised": tally.ratio},
        )
    yield Figure(
        name="run-masked",
        what="smallest p-value of the bytes that left a site, times their number: masked vectors are uniform",
        value=run.masked,
        unit="p",
        limit=FALSE_ALARM,
        better="higher",
    )
    charged = run.charged if math.isfinite(run.charged) else 1e9  # JSON has no infinity
    yield Figure(
        name="run-ledger",
        what="epsilon that the sites' ledgers charged, at most the plan's",
        value=charged,
        unit="ε",
        limit=run.promised,
    )


# ---- the command --------------------------------------------------------------------------------------------

AUDITS: dict[str, Callable[[Auditor], Iterator[Figure]]] = {
    "noise": noise,
    "primitive": primitive,
    "rehearsal": rehearsal,
}


def main(arguments: list[str] | None = None) -> int:
    """Audit and print; exit code 1 where a limit does not hold."""
    parser = argparse.ArgumentParser(prog="audit", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(AUDITS)}; all without one")
    parser.add_argument("--json", action="store_true", help="figures as JSON lines")
    parser.add_argument("--quick", action="store_true", help="fewer draws and releases: some seconds, less power")
    parser.add_argument("--no-noise", action="store_true", help="switch the noise off: every audit must fail")
    parser.add_argument("--seed", type=int, help="reproducible coins and noise")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in AUDITS:
            parser.error(f"there is no audit {name!r}; one of {', '.join(AUDITS)}")
    auditor = Auditor(effort=QUICK if options.quick else FULL, seed=options.seed, noise=not options.no_noise)
    held = True
    for name in options.names or AUDITS:
        for figure in AUDITS[name](auditor):
            held &= figure.holds
            print(json.dumps(figure.to_json()) if options.json else _said(figure), flush=True)
    return 0 if held else 1


def _said(figure: Figure) -> str:
    sign = "≤" if figure.better == "lower" else "≥"
    ending = "holds" if figure.holds else "DOES NOT HOLD"
    lines = [f"{figure.name}: {figure.value:.4g} {figure.unit} (limit {sign} {figure.limit:.4g}) {ending}"]
    lines.append(f"    {figure.what}")
    for name, value in figure.details.items():
        lines.append(f"    {name:32} {f'{value:.4g}' if isinstance(value, float) else value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
