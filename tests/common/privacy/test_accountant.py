"""Prices by two independent ways each: PLD against closed forms, RDP, PRV, dp_accounting's own mixtures."""

from __future__ import annotations

import ast
import math
import time
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution as library
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

import cohortium.common.privacy.accountant as module
from cohortium.common.errors import Refused, UsageError
from cohortium.common.privacy import pld
from cohortium.common.privacy.accountant import Part, RdpFilter, calibrate, delta_for, epsilon, prices
from cohortium.common.privacy.budget import RELATIONS, Event, rate_of

QUARTER = rate_of(0.25)
GRADIENTS = (Event.poisson_gaussian(QUARTER, 2.0), 100)
MIXED = [(Event.gaussian(4.0), 1), (Event.gaussian(3.0), 2), (Event.poisson_gaussian(QUARTER, 5.0), 100)]


def rdp_epsilon(events: list[tuple[Event, int]], delta: float) -> float:
    accountant = RdpAccountant()
    for event, count in events:
        one: Any = GaussianDpEvent(event.noise_multiplier)
        if event.kind == "poisson-gaussian":
            one = PoissonSampledDpEvent(event.probability, one)
        accountant.compose(one, count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("mu", [1e-3, 0.05, 0.3, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1e-3])
def test_gaussians_cost_what_the_closed_form_says(mu: float, delta: float) -> None:
    """Balle & Wang; both relations, 1 to 3 hospitals; pessimistic by at most 1e-5 (0.2 % above 100)."""
    events = [(Event.gaussian(2 / mu), 3), (Event.gaussian(4 / mu), 4)]  # 3/4 + 1/4 of mu squared
    for hospitals in (1, 2, 3):
        for relation, factor in (("add-remove", 1), ("replace-one", 2)):
            exact = pld.gaussian_epsilon(mu * hospitals * factor, delta)
            found = epsilon(events, delta=delta, relation=relation, hospitals=hospitals)  # type: ignore[arg-type]
            assert exact * (1 - 1e-9) <= found <= exact * (1 + (1e-5 if exact < 100 else 2e-3)) + 1e-9


def test_closed_form_known_answers() -> None:
    """sigma 1, epsilon 1: delta 0.12693674 (Balle & Wang 2018, theorem 8: Phi(-1/2) - e Phi(-3/2))."""
    assert pld.gaussian_delta(1.0, 1.0) == pytest.approx(ndtr(-0.5) - math.e * math.exp(log_ndtr(-1.5)), rel=1e-12)
    assert pld.gaussian_delta(1.0, 1.0) == pytest.approx(0.1269367370, abs=1e-9)
    assert pld.gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3771780957, abs=1e-8)
    assert pld.gaussian_epsilon(1.0, 0.5) == 0.0
    for mu in (1e-4, 0.1, 1.0, 30.0):
        assert pld.gaussian_mu(pld.gaussian_epsilon(mu, 1e-6), 1e-6) == pytest.approx(mu, rel=1e-6)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.25, 2.0, 100), (0.01, 1.0, 1000), (0.05, 0.8, 200)])
def test_sampled_steps_agree_with_prv_and_lie_below_rdp(rate: float, noise: float, count: int) -> None:
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(noise, rate, count)]
    event = Event.poisson_gaussian(rate_of(rate), noise)
    ours = epsilon([(event, count)], delta=1e-5)
    assert ours == pytest.approx(prv.get_epsilon(delta=1e-5, eps_error=0.01), abs=0.05)
    assert ours <= rdp_epsilon([(event, count)], 1e-5)


def test_mixed_events_lie_below_rdp_and_above_each_part() -> None:
    whole = epsilon(MIXED, delta=1e-6)
    assert max(epsilon([part], delta=1e-6) for part in MIXED) < whole <= rdp_epsilon(MIXED, 1e-6)


def test_the_central_limit_accountant_would_have_under_counted() -> None:
    """The measured trap: GDP says 10.447 where the truth is above 10.98 (q = .05, sigma = 1, 1,000 steps)."""
    assert epsilon([(Event.poisson_gaussian(rate_of(0.05), 1.0), 1000)], delta=1e-5) > 10.98


def test_no_code_imports_the_central_limit_accountant() -> None:
    root = Path(module.__file__).parents[2]
    for path in [
        p
        for folder in ("common", "client", "server", "strategies", "simulations", "cohortium")
        for p in (root / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.id] if isinstance(node, ast.Name) else []
            names += [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            names += [getattr(node, "module", None) or "", getattr(node, "attr", None) or ""]
            assert not any("gdp" in name.lower() for name in names), path


@pytest.mark.parametrize("hospitals", [2, 3])
def test_fast_mixtures_are_dp_accountings_mixtures(hospitals: int) -> None:
    probability, noise, count = 0.25, 5.0, 50
    ours = pld.composed(0.0, ((probability, noise, count),), hospitals, "add-remove")
    weights = binom.pmf(range(hospitals + 1), hospitals, probability)
    theirs = library.from_mixture_gaussian_mechanism(
        noise, range(hospitals + 1), weights, value_discretization_interval=2.0**-8
    ).self_compose(count)
    assert ours.get_epsilon_for_delta(1e-6) == pytest.approx(theirs.get_epsilon_for_delta(1e-6), rel=2e-4)


@pytest.mark.parametrize(("probability", "noise", "count"), [(0.25, 2.0, 100), (0.01, 1.0, 500)])
@pytest.mark.parametrize("relation", RELATIONS)
def test_our_mixture_code_with_one_hospital_is_the_librarys(
    probability: float, noise: float, count: int, relation: Any
) -> None:
    directions = ("replace",) if relation == "replace-one" else ("remove", "add")
    ours = library.PrivacyLossDistribution(*(pld._mixture(probability, noise, 1, d, 2.0**-10) for d in directions))
    theirs = pld._sampled(probability, noise, 1, relation, 2.0**-10)
    for delta in (1e-9, 1e-5):
        found = ours.self_compose(count).get_epsilon_for_delta(delta)
        assert found == pytest.approx(theirs.self_compose(count).get_epsilon_for_delta(delta), rel=1e-5)


@pytest.mark.parametrize("relation", RELATIONS)
def test_several_hospitals_lie_between_sampling_once_and_never(relation: Any) -> None:
    """Binomial copies cost at least one copy and at most k steps with a k-th of the noise's variance each."""
    rate, noise, count = 0.1, 1.5, 60
    event = Event.poisson_gaussian(rate_of(rate), noise)
    costs = [epsilon([(event, count)], delta=1e-6, relation=relation, hospitals=k) for k in (1, 2, 3, 4)]
    assert costs == sorted(costs)
    assert costs[0] < costs[1]
    for k in (2, 3, 4):
        apart = Event.poisson_gaussian(rate_of(rate), noise / math.sqrt(k))
        assert costs[k - 1] <= epsilon([(apart, count * k)], delta=1e-6, relation=relation)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    noise=st.floats(0.6, 20),
    rate=st.floats(0.01, 0.9),
    count=st.integers(1, 100),
    other=st.floats(0.8, 50),
    log_delta=st.floats(-12, -2),
)
def test_prices_are_ordered(noise: float, rate: float, count: int, other: float, log_delta: float) -> None:
    """replace-one >= add-remove, more hospitals cost more, RDP lies above, delta_for inverts epsilon."""
    events = [(Event.poisson_gaussian(rate_of(rate), noise), count), (Event.gaussian(other), 1)]
    delta = 10**log_delta
    one = epsilon(events, delta=delta)
    assert one <= epsilon(events, delta=delta, relation="replace-one") * (1 + 1e-9)
    assert one <= epsilon(events, delta=delta, hospitals=2) * (1 + 1e-9)
    assert one <= rdp_epsilon(events, delta) * (1 + 1e-6)
    assert delta_for(events, epsilon=one) <= delta * (1 + 1e-6) + 1e-15
    assert epsilon(events[:1], delta=delta) <= one * (1 + 1e-6)


def test_edges() -> None:
    for relation in RELATIONS:
        assert epsilon([], delta=1e-6, relation=relation) == 0.0
        assert epsilon([(Event.gaussian(1.0), 0)], delta=1e-6, relation=relation) == 0.0
        assert epsilon([(Event.non_private(), 1)], delta=1e-6, relation=relation) == math.inf
        assert epsilon([(Event.gaussian(1e-200), 1)], delta=1e-6, relation=relation) == math.inf
    assert epsilon([(Event.non_private(), 0)], delta=1e-6) == 0.0
    assert delta_for([], epsilon=1.0) == 0.0
    assert delta_for([(Event.non_private(), 1)], epsilon=100.0) == 1.0
    huge = epsilon([(Event.poisson_gaussian(QUARTER, 1e-4), 5)], delta=1e-6)
    assert 1e8 < huge < math.inf  # little noise: the unsampled closed form, not a traceback
    for bad in (0.0, 1.0, -1.0, math.nan, 1e-13):
        with pytest.raises(UsageError, match="ACCOUNT-DELTA"):
            epsilon([], delta=bad)
    for fields in ({"hospitals": 0}, {"hospitals": 1.5}, {"relation": "zero-out"}):
        with pytest.raises(UsageError):
            epsilon(MIXED, delta=1e-6, **fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ACCOUNT-COUNT"):
        epsilon([(Event.gaussian(1.0), -1)], delta=1e-6)


def test_tiny_and_large_epsilons_keep_their_accuracy() -> None:
    """The grid scales with the events: 300 steps of sigma 300, and 50 of sigma 0.4, against RDP's bracket."""
    for noise, rate, count in ((300.0, 0.25, 300), (0.4, 0.1, 50)):
        events = [(Event.poisson_gaussian(rate_of(rate), noise), count)]
        ours, above = epsilon(events, delta=1e-6), rdp_epsilon(events, 1e-6)
        assert 0.5 * above < ours <= above


def parts(rate: int = QUARTER, repeats: int = 100) -> list[Part]:
    return [Part(share=0.1), Part(share=0.25), Part(share=0.3), Part(rate=rate, repeats=repeats, share=0.35)]


@pytest.mark.parametrize(
    ("target", "delta", "hospitals", "relation"),
    [
        (1.0, 1e-5, 1, "add-remove"),
        (3.0, 1e-5, 1, "add-remove"),
        (10.0, 1e-6, 1, "add-remove"),
        (0.001, 1e-6, 1, "add-remove"),
        (50.0, 1e-12, 1, "add-remove"),
        (3.0, 1e-6, 2, "add-remove"),
        (3.0, 1e-6, 3, "add-remove"),
        (3.0, 1e-6, 1, "replace-one"),
    ],
)
def test_calibration_spends_the_budget_and_not_more(target: float, delta: float, hospitals: int, relation: Any) -> None:
    chosen = parts()
    noises = calibrate(chosen, epsilon=target, delta=delta, hospitals=hospitals, relation=relation)
    events = [(part.event(noise), part.repeats) for part, noise in zip(chosen, noises, strict=True)]
    cost = epsilon(events, delta=delta, hospitals=hospitals, relation=relation)
    assert 0.995 * target <= cost <= target
    # Gaussian parts share mu squared as asked, whatever the common factor did.
    assert (noises[0] / noises[2]) ** 2 == pytest.approx(3.0, rel=1e-9)
    # The sampled part alone costs what a Gaussian of its share costs (same delta, 3 %).
    alone = epsilon([events[3]], delta=delta, hospitals=hospitals, relation=relation)
    like = Event.gaussian(noises[0] * math.sqrt(0.1 / 0.35))
    assert alone == pytest.approx(epsilon([(like, 1)], delta=delta, hospitals=hospitals, relation=relation), rel=0.06)


def test_calibration_is_fast_and_cached() -> None:
    started = time.monotonic()
    first = calibrate(parts(rate_of(0.2), 100), epsilon=2.5, delta=1e-6)
    assert time.monotonic() - started < 10  # about 0.5 s on an idle core
    started = time.monotonic()
    assert calibrate(parts(rate_of(0.2), 100), epsilon=2.5, delta=1e-6) == first
    assert time.monotonic() - started < 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.0},
        {"share": math.nan},
        {"share": 1.0, "repeats": 0},
        {"share": 1.0, "rate": 0},
        {"share": 1.0, "rate": 0.5},
        {"share": 1.0, "repeats": 1.5},
    ],
)
def test_a_bad_part_is_not_born(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="CALIBRATE-PART"):
        Part(**wrong)


@pytest.mark.parametrize(("target", "delta"), [(0.0, 1e-6), (-1.0, 1e-6), (math.inf, 1e-6), (1.0, 0.0), (1.0, 1.0)])
def test_a_bad_budget_is_refused(target: float, delta: float) -> None:
    with pytest.raises(UsageError, match="CALIBRATE-BUDGET"):
        calibrate(parts(), epsilon=target, delta=delta)


def test_prices_take_the_dearest_part() -> None:
    table = prices([MIXED, [(Event.gaussian(50.0), 1)]], delta=1e-6)
    assert [(row["relation"], row["hospitals"]) for row in table] == [(r, k) for r in RELATIONS for k in (1, 2, 3)]
    assert table[0]["epsilon"] == epsilon(MIXED, delta=1e-6)
    assert prices([[(Event.non_private(), 1)]], delta=1e-6)[0]["epsilon"] == "inf"
    assert prices([], delta=1e-6)[0]["epsilon"] == 0.0


def test_the_cap_holds_whatever_is_chosen() -> None:
    """Spend until refused, choosing by what is left: the PLD of all that passed is within the cap."""
    cap = RdpFilter(epsilon=8.0, delta=1e-6)
    spent: list[tuple[Event, int]] = []
    refused = 0
    for turn in range(60):
        noise = 3.0 + (cap.spent * 7) % 4  # adaptive
        event = Event.poisson_gaussian(QUARTER, noise) if turn % 2 else Event.gaussian(noise)
        if not cap.allows([(event, 5)]):
            refused += 1
            before = cap.spent
            with pytest.raises(Refused, match="CAP-SPENT"):
                cap.spend([(event, 5)])
            assert cap.spent == before
            continue
        cap.spend([(event, 5)])
        spent.append((event, 5))
    assert refused > 5
    assert 0.5 * 8.0 < epsilon(spent, delta=1e-6) <= 8.0


def test_the_cap_counts_hospitals_and_refuses_non_private() -> None:
    for hospitals in (1, 2, 3):
        cap = RdpFilter(epsilon=4.0, delta=1e-6, hospitals=hospitals)
        assert not cap.allows([(Event.non_private(), 1)])
        events: list[tuple[Event, int]] = []
        for event in (Event.gaussian(9.0), Event.poisson_gaussian(rate_of(0.1), 2.0)):
            while cap.allows([(event, 1)]) and len(events) < 400:
                cap.spend([(event, 1)])
                events.append((event, 1))
        assert epsilon(events, delta=1e-6, hospitals=hospitals) <= 4.0
    assert RdpFilter(epsilon=4.0, delta=1e-6).price(Event.gaussian(1.0), 0) == 0.0
    with pytest.raises(UsageError, match="CAP-VALUE"):
        RdpFilter(epsilon=0.0, delta=1e-6)
