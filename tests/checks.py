"""The privacy core's guarantees as plain functions: ordinary tests call them, planted bugs must turn them red.

Statistical checks run on fixed seeds, so they never flicker; the false-alarm rate in a docstring is what a fresh
seed would have. Each is strong enough to reject the alternative that it names.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from hospital import (
    RUN,
    Ward,
    counts,
    gradient,
    maps,
    moments,
    people,
    plan,
    schema,
    sizes,
    stage,
    table,
    ward,
)
from scipy import stats

from cohortium.client import guard as guard_module
from cohortium.client import vault as vault_module
from cohortium.client.gate import Gate
from cohortium.client.guard import CODES, INTERNAL
from cohortium.common.encoding import Records, encode, grids
from cohortium.common.errors import ProtocolError
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy import release as release_module
from cohortium.common.privacy.budget import WHOLE
from cohortium.common.privacy.entropy import Entropy, SeededEntropy, SystemEntropy
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.release import Mechanism, Released, release
from cohortium.common.protocol.messages import Message
from cohortium.common.queries import MAX_PARAMETER, AnyQuery, Counts, LocalSteps, Moments
from cohortium.server.asking import _answer
from cohortium.strategies.base import ask_message

SIX = 6.0
"""Standard deviations beyond which a Gaussian statistic fails: false alarm 2e-9."""
TINY = 1e-7
"""Smallest p-value that passes."""
_MEMORY = Path("/dev/shm")
_passed: set[Callable[[], None]] = set()
REFUSALS = frozenset(CODES.values()) | {INTERNAL}


def passes(check: Callable[[], None]) -> None:
    """Run a check, once in a process however many tests name it: seeds are fixed, so it would not change."""
    if check not in _passed:
        check()
        _passed.add(check)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A small folder, in memory where that exists: ledgers sync every line, and disks are slow at that."""
    memory = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(dir=_MEMORY if memory else None)


def released(
    query: AnyQuery,
    records: Records,
    *,
    noise: float = 1.0,
    rate: int = WHOLE,
    shares: int = 1,
    entropy: Entropy | None = None,
    index: int = 0,
    head: str = "",
) -> Released:
    how = Mechanism(noise_multiplier=noise, rate=rate, shares=shares)
    return release(
        query=query,
        records=records,
        mechanism=how,
        entropy=entropy or SeededEntropy(seed=1, site="a"),
        run=RUN,
        index=index,
        head=head,
    )


def wide(dim: int = 20_000) -> Counts:
    """One column counted in far more bins than it has codes: a long vector from few records."""
    return Counts(columns=(0,), maps=(np.arange(3, dtype=np.int32),), bins=(dim,))


def noise_of(query: AnyQuery, records: Records, **options: Any) -> np.ndarray:
    """The noise alone: what was released less the exact contribution."""
    return released(query, records, **options).values - query.contribution(records).units


def even() -> Moments:
    """Columns that all weigh the same: the moments' bound is reached."""
    return Moments(features=tuple(np.full((size, 2), 7.0) for size in sizes()), bound_sq=4.0)


def all_queries() -> list[AnyQuery]:
    return [
        counts(),
        counts(columns=(2,)),
        moments(),
        moments(scale=50.0),
        moments(by=True, scale=0.01),
        even(),
        gradient(clip_norm_l2=0.05),
        gradient(clip_norm_l2=0.05, path="fast"),
        gradient(clip_norm_l2=100.0),
    ]


# ---- queries ------------------------------------------------------------------------------------------------


def check_one_patient_moves_an_answer_at_most_by_its_sensitivity() -> None:
    """Every kind of query, clip far above and far below the data, 1 to 40 rows a patient (6 on the slow path)."""
    for query in all_queries():
        records = people(8, seed=5, most_rows=6 if getattr(query, "path", "") == "exact" else 40)
        whole = query.contribution(records).units
        for patient in range(records.patients):
            rest = records.subset(np.arange(records.patients) != patient)
            moved = np.linalg.norm((whole - query.contribution(rest).units) * query.lattice)
            assert moved <= query.sensitivity_l2, (query.kind, moved, query.sensitivity_l2)


def check_a_patient_counts_alike_whoever_else_is_there() -> None:
    """The pooled sum is bit for bit the sum over single patients (fast gradients: within half a unit each)."""
    records = people(12, seed=6, most_rows=4)
    for query in all_queries():
        whole = query.contribution(records).units
        single = [
            query.contribution(records.subset(np.arange(records.patients) == p)).units for p in range(records.patients)
        ]
        apart = np.abs(whole - np.sum(single, axis=0)).max()
        slack = (records.patients + 1) / 2 if getattr(query, "path", "") == "fast" else 0
        assert apart <= slack, (query.kind, apart)


def check_codes_depend_on_the_dictionary_alone() -> None:
    """A row has the same codes alone, among others, and beside extreme or unknown values; grids never change."""
    rows = table(40, seed=8).set_index("pid", drop=False)
    extreme = rows.iloc[[0, 0]].assign(age=[0, 99], pid=["x1", "x2"], stage=["III", "I"])
    before = [grid.size for grid in grids(schema())]
    among = encode(schema(), pd.concat([rows, extreme]), "pid")
    alone = encode(schema(), rows[rows.age.between(40, 60)], "pid")
    known = {bytes(among.identity[p]): among.codes[among.patient == p] for p in range(among.patients)}
    for p in range(alone.patients):
        mine = alone.codes[alone.patient == p]
        assert all((mine[i] == known[bytes(alone.identity[p])]).all(axis=1).any() for i in range(len(mine)))
    strange = encode(schema(), extreme.assign(stage=["IX", "II"], age=[-5, 150], sex=["?", "F"]), "pid")
    missing = [grid.missing for grid in grids(schema())]
    order = np.argsort(strange.codes[:, 1] != missing[1])
    assert list(strange.codes[order[0], :3]) == missing[:3] and strange.codes[order[1], 2] == missing[2]
    assert [grid.size for grid in grids(schema())] == before


def check_a_row_adds_the_same_wherever_it_stands() -> None:
    """Fast gradients: bit for bit alone, at a block's edge, beside a thousand others; two sums differ by one term."""
    rng = np.random.default_rng(12)
    network = Nade({"kind": "nade", "bins": [5, 84, 3, 20], "hidden": 16})
    theta = rng.normal(0, 1, network.size).astype(np.float32)
    rows = np.stack([rng.integers(0, size, network.block_rows + 50) for size in network.bins], axis=1)
    mine = rows[0].copy()
    alone = network.gradient_sum(theta, mine[None], np.ones(1), 1.0)
    for many in (2, 7, 95, 999, network.block_rows, network.block_rows + 1, len(rows)):
        for at in {0, many // 2, many - 1}:
            some, weight = rows[:many].copy(), np.zeros(many)
            some[at], weight[at] = mine, 1.0
            assert np.array_equal(network.gradient_sum(theta, some, weight, 1.0), alone), (many, at)
            sums = [network.gradient_sum(theta, x, np.ones(len(x)), 1.0) for x in (some, np.delete(some, at, 0))]
            assert np.abs(sums[0] - sums[1] - alone).max() <= 1e-12, (many, at)


def check_no_weight_of_a_network_is_larger_than_its_bound() -> None:
    """Refused in a query, to the last float32 above it; clipped between a site's local steps."""
    fitting = gradient().parameters
    for value in (MAX_PARAMETER, -MAX_PARAMETER):
        gradient(parameters=np.full_like(fitting, value))
    for value in (np.nextafter(np.float32(MAX_PARAMETER), np.float32(100)), -51.0, 1e30, np.inf, np.nan):
        parameters = fitting.copy()
        parameters[-1] = value
        try:
            gradient(parameters=parameters)
        except ProtocolError as refused:
            assert refused.code == "QUERY-VALUE"
        else:
            raise AssertionError(f"a weight of {value} was taken")
    local = LocalSteps(steps=3, learning_rate=1e6, denominator=1.0)
    try:
        moved = released(gradient(local=local), people(15), noise=0.0)
    except ProtocolError as refused:
        raise AssertionError("a local step went beyond the bound") from refused
    assert 10 < np.abs(moved.values * moved.lattice).max() <= 2 * MAX_PARAMETER


# ---- noise --------------------------------------------------------------------------------------------------


def check_the_noise_has_the_planned_sigma() -> None:
    """20,000 coordinates; accepts a variance within 6 standard errors (6 %), so 2/3 and 3/2 of sigma fail."""
    records = people(5)
    query = wide()
    for noise, shares in ((1.0, 1), (0.7, 3), (5.0, 1), (1.0, 10)):
        found = noise_of(query, records, noise=noise, shares=shares)
        assert_sigma(found, noise * query.sensitivity_l2 / query.lattice / math.sqrt(shares))


def assert_sigma(sample: np.ndarray, sigma: float) -> None:
    """Gaussian sample of mean 0 and this sigma, each within 6 standard errors. False alarm 4e-9."""
    n = len(sample)
    assert abs(np.mean(sample)) <= SIX * sigma / math.sqrt(n), "mean"
    assert abs(np.mean(sample.astype(float) ** 2) / sigma**2 - 1) <= SIX * math.sqrt(2 / n), "sigma"


def assert_gaussian(sample: np.ndarray, sigma: float) -> None:
    """Kolmogorov–Smirnov, fourth moment and the share beyond 3 sigma. False alarm below 2e-7."""
    z = sample / sigma
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > TINY, "law"
    assert abs(np.mean(z**4) - 3) <= SIX * math.sqrt(96 / n), "fourth moment"
    far = 2 * stats.norm.sf(3)
    assert abs(np.mean(np.abs(z) > 3) - far) <= SIX * math.sqrt(far / n), "tails"


def check_noise_is_drawn_anew_for_every_release() -> None:
    """Releases, steps, sites and repetitions are uncorrelated: |r| below 6/√d. False alarm 2e-9 a pair."""
    query, records = wide(5000), people(3)
    seeded = {site: SeededEntropy(seed=3, site=site) for site in ("a", "b")}
    drawn = [
        noise_of(query, records, entropy=seeded["a"]),
        noise_of(query, records, entropy=seeded["a"], index=1),
        noise_of(query, records, entropy=seeded["b"]),
        noise_of(query, records, entropy=SystemEntropy()),
        noise_of(query, records, entropy=SystemEntropy()),
        noise_of(query, records, entropy=SystemEntropy(), head="x"),
    ]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) <= SIX / math.sqrt(len(one)), "the same noise twice"


def check_noise_comes_from_the_keystream_alone() -> None:
    """The key fixes the noise, and the state of numpy's generator does not touch it."""
    query, records, key = wide(100), people(3), SeededEntropy(seed=4, site="a")
    found = []
    for seed in (0, 1):
        np.random.seed(seed)
        found.append((noise_of(query, records, entropy=key), noise_of(query, records, entropy=SystemEntropy())))
    assert np.array_equal(found[0][0], found[1][0]), "noise depends on something besides its key"
    np.random.seed(1)
    again = noise_of(query, records, entropy=SystemEntropy())
    assert not np.array_equal(found[1][1], again), "noise can be had again from a seed"


def check_answers_are_whole_multiples_of_the_lattice() -> None:
    """Integers in lattice units, in data units exact multiples of a power of two: no holes for a float's bits."""
    records = people(5)
    for query in (counts(), moments(), gradient(), gradient(path="fast")):
        answer = released(query, records, noise=2.0)
        assert answer.values.dtype == np.int64 and math.frexp(query.lattice)[0] == 0.5
        data = answer.values * answer.lattice
        assert np.array_equal(np.rint(data / answer.lattice).astype(np.int64), answer.values)
        # All residues occur: the noise is finer than nothing but the lattice itself.
        residues = noise_of(wide(), records, noise=2.0) % 16
        assert stats.chisquare(np.bincount(residues, minlength=16)).pvalue > TINY


def check_what_ran_is_what_is_charged() -> None:
    """Noise and price come from one call: the event's multiplier is the noise measured over the sensitivity."""
    query, records = wide(), people(3)
    for noise, rate in ((1.0, WHOLE), (3.0, WHOLE), (2.0, WHOLE // 4)):
        answer = released(query, records, noise=noise, rate=rate)
        spread = float(np.std(answer.values[3:])) * answer.lattice / query.sensitivity_l2
        assert abs(spread / answer.event.noise_multiplier - 1) <= SIX / math.sqrt(2 * query.dim)
        assert answer.event.rate == rate and answer.count == 1
    assert released(query, records, noise=0.0).event.kind == "non-private"


# ---- sampling and denominators ------------------------------------------------------------------------------


def batch_sizes(draws: int, patients: int, rate: float) -> np.ndarray:
    records, query = people(patients, most_rows=1), counts(columns=(0,))
    one = round(1 / query.lattice)
    some = int(rate * WHOLE)
    return np.array([released(query, records, noise=0.0, rate=some, index=i).values.sum() // one for i in range(draws)])


def check_sampling_is_poisson() -> None:
    """Binomial batch sizes (500 draws of 200 patients), and a patient's draw never depends on the others.

    Mean and variance within 6 standard errors (false alarm 4e-9); a fixed batch has variance 0 and fails.
    """
    n, q, draws = 200, 0.3, 500
    sizes = batch_sizes(draws, n, q)
    assert abs(sizes.mean() - n * q) <= SIX * math.sqrt(n * q * (1 - q) / draws), "rate"
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) <= SIX * math.sqrt(2 / draws), "batch size is not binomial"
    query, some = counts(), int(q * WHOLE)
    left, right = people(40, prefix="l"), people(30, prefix="r", seed=1)
    both = encode(schema(), pd.concat([table(40, prefix="l"), table(30, prefix="r", seed=1)], ignore_index=True), "pid")
    for index in range(20):
        apart, together = (
            [released(query, r, noise=0.0, rate=some, index=index).values for r in some_records]
            for some_records in ((left, right), (both,))
        )
        assert np.array_equal(sum(apart), together[0]), "somebody's draw depends on who else is there"


def local_update(records: Records, *, steps: int = 1, noise: float = 0.0, **options: Any) -> Released:
    local = LocalSteps(steps=steps, learning_rate=0.5, denominator=100.0, **options)
    return released(gradient(local=local), records, noise=noise)


def check_no_denominator_or_weight_depends_on_the_patients() -> None:
    """Twice the patients give twice the sum and twice the local update; hospitals weigh alike, however large."""
    once = table(15, prefix="a")
    twice = pd.concat([once, once.assign(pid="b" + once.pid)], ignore_index=True)
    one, two = encode(schema(), once, "pid"), encode(schema(), twice, "pid")
    for query in (counts(), moments(), gradient()):
        assert np.array_equal(2 * released(query, one, noise=0.0).values, released(query, two, noise=0.0).values), (
            query.kind
        )
    small, large = local_update(one).values, local_update(two).values
    assert np.abs(2 * small - large).max() <= 2, "a local step is divided by the number of patients"
    assert np.abs(small).max() > 1000
    agreed = plan(("a", "b"), stages=[stage("steps", "gradient", 0, noise_multiplier=0.0)])
    tables = {"a": once, "b": pd.concat([twice, twice.assign(pid="c" + twice.pid)], ignore_index=True)}
    with scratch() as folder:
        consortium = ward(Path(folder), agreed, tables=tables, noise=False)
        query = gradient(local=LocalSteps(steps=1, learning_rate=0.5, denominator=100.0))
        total = consortium.answer(0, query)
        consortium.close()
    facts = {"lattice": total.lattice.hex(), "variance_factor": (1.0).hex(), "sites": list(total.sites)}
    mean = _answer(total.values, facts, agreed.stages[0], query).values
    expected = np.mean([local_update(encode(schema(), t, "pid")).values for t in tables.values()], axis=0)
    assert np.abs(mean / total.lattice - expected).max() <= 1, "hospitals are weighted"


def check_training_and_holdout_share_nobody() -> None:
    """With noise off the two parts' counts add up to everybody's, and neither is empty."""
    both = [stage("train", "counts", 0, noise_multiplier=0.0)]
    both += [stage("score", "counts", 1, noise_multiplier=0.0, part="holdout")]
    rows = table(200, seed=3, prefix="a")
    with scratch() as folder:
        consortium = ward(Path(folder), plan(stages=both, holdout=0.3), tables={"a": rows}, noise=False)
        train = consortium.answer(0, counts()).values
        held = consortium.answer(1, counts(part="holdout")).values
        consortium.close()
    everybody = counts().contribution(encode(schema(), rows, "pid")).units
    assert np.array_equal(train + held, everybody), "somebody is in both parts, or in none"
    assert 0.1 < held.sum() / everybody.sum() < 0.5


# ---- the secure sum -----------------------------------------------------------------------------------------


def quiet_ward(folder: str, sites: int = 3, releases: int = 2) -> Ward:
    names = [chr(97 + i) for i in range(sites)]
    some = [stage(f"s{i}", "counts", i, noise_multiplier=0.0) for i in range(releases)]
    return ward(Path(folder), plan(names, mode="secure-sum", stages=some), noise=False)


def plain_sum(consortium: Ward, query: AnyQuery, sites: tuple[str, ...]) -> np.ndarray:
    tables = [pd.read_parquet(consortium.directory(site) / "data.parquet") for site in sites]
    return np.sum([query.contribution(encode(schema(), t, "pid")).units for t in tables], axis=0)


def check_a_secure_sum_is_the_plain_sum() -> None:
    """Over guards, gate and strategy, with all sites and with one that drops out after its vector was asked for."""
    query = counts()
    with scratch() as folder:
        consortium = quiet_ward(folder)
        total = consortium.answer(0, query)
        assert np.array_equal(total.values, plain_sum(consortium, query, ("a", "b", "c")))

        def without_b(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
            replies = consortium.exchange(messages, label)
            return {s: r for s, r in replies.items() if s != "b" or not label.endswith("/mask")}

        strategy = consortium.strategy(exchange=without_b)
        partial = strategy.answer(1, consortium.plan.stage_of(1), query)
        assert partial.sites == ("a", "c") and partial.dropped == ("b",)
        assert np.array_equal(partial.values, plain_sum(consortium, query, ("a", "c")))
        consortium.close()


def check_a_masked_vector_looks_random() -> None:
    """Bytes of a site's vector are uniform (chi-square over 256 values, false alarm 1e-7); plain counts are not."""
    query = wide(2000)
    with scratch() as folder:
        consortium = quiet_ward(folder)
        seen: dict[str, Message] = {}

        def watched(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
            replies = consortium.exchange(messages, label)
            seen.update(replies if label.endswith("/mask") else {})
            return replies

        consortium.strategy(exchange=watched).answer(0, consortium.plan.stage_of(0), query)
        consortium.close()
    assert len(seen) == 3
    for reply in seen.values():
        assert reply.kind == "sum.masked" and _uniformity(reply.blobs["values"]) > TINY, "a vector left unmasked"
    plain = plain_noised(query)
    assert _uniformity(plain) < TINY


def plain_noised(query: AnyQuery) -> bytes:
    return released(query, people(30), noise=20.0).values.astype("<i8").tobytes()


def _uniformity(data: bytes) -> float:
    return float(stats.chisquare(np.bincount(np.frombuffer(data, np.uint8), minlength=256)).pvalue)


def check_a_replayed_vector_is_not_counted() -> None:
    """A site's signed vector of an earlier round, sent again in a later one, counts as that site's absence."""
    query = counts()
    with scratch() as folder:
        consortium = quiet_ward(folder)
        old: dict[str, Message] = {}

        def replaying(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
            replies = consortium.exchange(messages, label)
            if label == "0/mask":
                old.update(replies)
            return {**replies, "b": old["b"]} if label == "1/mask" else replies

        strategy = consortium.strategy(exchange=replaying)
        strategy.answer(0, consortium.plan.stage_of(0), query)
        total = strategy.answer(1, consortium.plan.stage_of(1), query)
        assert total.sites == ("a", "c")
        assert np.array_equal(total.values, plain_sum(consortium, query, ("a", "c")))
        consortium.close()


# ---- guard and gate -----------------------------------------------------------------------------------------


def check_a_release_is_charged_on_disk_before_it_is_computed() -> None:
    """When the records are first used, a reader of the file finds the charge."""
    seen: list[str] = []
    with scratch() as folder:
        consortium = ward(Path(folder), plan())

        def spy(**given: Any) -> Released:
            seen.append(consortium.state("a", given["index"]))
            return release(**given)

        with mock.patch.object(guard_module, "release", spy):
            assert consortium.ask("a", 0, counts()).kind == "site.noised"
        consortium.close()
    assert seen == ["RESERVED"]


def check_a_release_is_answered_once() -> None:
    """The same question again gets the same bytes, any other none; also after the process died."""
    with scratch() as folder:
        consortium = ward(Path(folder), plan(), seed=None)
        first = consortium.ask("a", 0, counts())
        assert first.kind == "site.noised"
        for _ in range(2):
            again, other = consortium.ask("a", 0, counts()), consortium.ask("a", 0, counts(columns=(1,)))
            assert again == first, "a release was answered twice, differently"
            assert other.kind == "site.refused", "two questions were answered for one price"
            consortium.kill("a")
        with Ledger.open(consortium.directory("a") / "ledger.db") as ledger:
            assert len(ledger.charged_events()) == 1


class Killed(BaseException):
    """The process ends here."""


CRASHES: tuple[tuple[str, Any, str, str], ...] = tuple(
    (f"{when} {name}", owner, name, when)
    for owner, name in (
        (Gate, "open"),
        (guard_module, "release"),
        (Gate, "send"),
        (vault_module.Vault, "put"),
        (Gate, "sealed"),
        (Gate, "released"),
        (Ledger, "reserve"),
        (Ledger, "advance"),
    )
    for when in ("before", "after")
)

SECURE_CRASHES = ("after open", "after release", "after send", "before put", "after put", "after sealed")
"""Where a secure sum differs from local mode: there is a round to be remembered with the release."""


def killing(function: Callable[..., Any], when: str) -> Callable[..., Any]:
    def wrapped(*given: Any, **named: Any) -> Any:
        if when == "after":
            function(*given, **named)
        raise Killed

    return wrapped


def check_a_crash_never_gives_a_second_answer(*, mode: str = "local") -> None:
    """Killed before and after each step, then opened again and asked the same and another question: at most one
    noise was drawn for the release, at most one answer exists, and whatever was drawn was charged."""
    sites = ("a",) if mode == "local" else ("a", "b", "c")
    drawing = release_module._noised_sum
    for label, owner, name, when in CRASHES:
        if mode == "secure-sum" and label not in SECURE_CRASHES:
            continue
        draws: list[tuple[int, str]] = []

        def spy(*given: Any, draws: list[tuple[int, str]] = draws, **named: Any) -> Any:
            draws.append((given[5], given[7]))
            return drawing(*given, **named)

        with scratch() as folder, mock.patch.object(release_module, "_noised_sum", spy):
            consortium = ward(Path(folder), plan(sites, mode=mode), seed=None)
            question = _question(consortium, mode)
            with mock.patch.object(owner, name, killing(getattr(owner, name), when)):
                try:
                    answers = [consortium.say("a", question)]
                except Killed:
                    answers = []
            consortium.kill("a")
            answers += [consortium.say("a", question) for _ in range(2)]
            consortium.kill("a")
            other = Message(
                kind="run.ask",
                sender=question.sender,
                blobs=question.blobs,
                fields={**question.fields, "query": {**question.fields["query"], "part": "holdout"}},
            )
            refused = [consortium.say("a", other)]
            answers.append(consortium.say("a", question))
            state = consortium.state("a", 0)
            consortium.close()
        given_out = {m.blobs["values"] for m in answers if m.kind != "site.refused"}
        assert len(draws) <= 1, f"killed {label}: noise was drawn {len(draws)} times"
        assert len(given_out) <= 1, f"killed {label}: two different answers"
        assert all(m.kind == "site.refused" for m in refused), f"killed {label}: another question was answered"
        assert not draws or state in ("BURNED", "SEALED", "RELEASED"), f"killed {label}: {state}"
        assert not given_out or state in ("SEALED", "RELEASED"), f"killed {label}: left and not recorded"


def _question(consortium: Ward, mode: str) -> Message:
    """Release 0 as site `a` is asked it, in secure-sum with the rosters of a real prepare."""
    if mode == "local":
        return ask_message(RUN, 0, counts(), mirrored=0)
    asked: dict[str, Message] = {}

    class Enough(Exception):
        pass

    def stop(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        if label.endswith("/mask"):
            asked.update(messages)
            raise Enough
        return consortium.exchange(messages, label)

    with contextlib.suppress(Enough):
        consortium.strategy(exchange=stop).answer(0, consortium.plan.stage_of(0), counts())
    return asked["a"]


def check_refusals_are_bare_codes() -> None:
    """A refused message is answered by one field, one of a fixed list of words."""
    with scratch() as folder:
        consortium = ward(Path(folder), plan())
        short = Counts(columns=(2,), maps=(np.zeros(5, np.int32),), bins=(1,))
        bad = [
            ask_message(RUN, 7, counts(), mirrored=0),
            ask_message(RUN, 0, short, mirrored=0),
            ask_message(RUN, 0, moments(), mirrored=0),
            ask_message("other-run", 0, counts(), mirrored=0),
            ask_message(RUN, 0, counts(), mirrored=-1),
            ask_message(RUN, 0, counts(), mirrored=2**70),
            Message(kind="run.tell-me", sender="coordinator", fields={"run": RUN}),
            Message(kind="run.hello", sender="coordinator", fields={}),
        ]
        replies = [consortium.say("a", message) for message in bad]
        consortium.close()
    for reply in replies:
        assert reply.kind == "site.refused" and set(reply.fields) == {"code"} and not reply.blobs
        assert reply.fields["code"] in REFUSALS, "words of an error left the hospital"


def check_whether_a_question_is_answered_does_not_depend_on_the_records() -> None:
    """Maps that do not cover the dictionary are refused at every hospital, before anything is charged.

    Otherwise a map that ends at code k tells, without noise, whether anybody has a code from k on.
    """
    young, old = table(20, prefix="a"), table(20, prefix="b")
    young["age"], old["age"] = 10, 90
    short = Counts(columns=(2,), maps=(np.zeros(50, np.int32),), bins=(1,))
    cut = moments()
    features = tuple(f[:50] if i == 2 else f for i, f in enumerate(cut.features))
    wrong = [short, type(cut)(features=features, bound_sq=4.0)]
    wrong += [gradient(maps=tuple(m[:50] if i == 2 else m for i, m in enumerate(maps())))]
    wrong += [gradient(maps=tuple(m + 1 if i == 2 else m for i, m in enumerate(maps())))]
    for query in wrong:
        some = [stage("one", query.kind, 0)]
        with scratch() as folder:
            consortium = ward(Path(folder), plan(("a", "b"), stages=some), tables={"a": young, "b": old})
            kinds = {consortium.ask(site, 0, query).kind for site in ("a", "b")}
            states = {consortium.state(site, 0) for site in ("a", "b")}
            consortium.close()
        assert kinds == {"site.refused"} and states == {"NONE"}, (query.kind, kinds, states)


def check_the_lifetime_cap_counts_what_was_spent_before() -> None:
    """Of two releases that each fit alone, the second is refused and costs nothing."""
    some = [stage("one", "counts", 0, noise_multiplier=2.0), stage("two", "counts", 1, noise_multiplier=2.0)]
    with scratch() as folder:
        consortium = ward(Path(folder), plan(stages=some, epsilon=30.0), lifetime_epsilon=2.6, seed=None)
        kinds = [consortium.ask("a", index, counts()).kind for index in (0, 1)]
        states = [consortium.state("a", index) for index in (0, 1)]
        consortium.close()
    assert kinds == ["site.noised", "site.refused"] and states[1] == "NONE"


def check_the_cap_is_always_counted_for_the_policys_number_of_hospitals() -> None:
    """A patient in two hospitals by the policy: a plan priced for five is not counted for five, nor another for one."""
    loud = [stage("one", "counts", 0, noise_multiplier=2.0)]
    for agreed in (2, 5):
        made = plan(stages=loud, epsilon=60.0, hospitals=agreed)
        mine = made.price(hospitals=2)
        for cap, expected in ((2.0 * mine, "site.noised"), (0.9 * mine, "site.refused")):
            with scratch() as folder:
                consortium = ward(Path(folder), made, lifetime_epsilon=cap, hospitals=2, seed=None)
                kind = consortium.ask("a", 0, counts()).kind
                consortium.close()
            assert kind == expected, (agreed, cap, kind)


def two_ballots(consortium: Ward, *, restore: bool) -> list[Message]:
    """Site a is asked to sign {a, b, c}, then {a, b}; in between its vault may be put back to before the first."""
    given: list[Message] = []
    vault = consortium.directory("a") / "vault.db"

    def asked(messages: Mapping[str, Message], label: str) -> dict[str, Message]:
        if not label.endswith("/agree"):
            return consortium.exchange(messages, label)
        if restore:
            consortium.kill("a")
            before = vault.read_bytes()
        given.append(consortium.say("a", messages["a"]))
        if restore:
            consortium.kill("a")
            vault.write_bytes(before)
        fields = messages["a"].fields
        chosen = {**fields["survivors"], "survivors": ["a", "b"]}
        second = Message(kind="run.survivors", sender="coordinator", fields={**fields, "survivors": chosen})
        given.append(consortium.say("a", second))
        given.append(consortium.say("a", messages["a"]))
        raise _Enough

    with contextlib.suppress(_Enough):
        consortium.strategy(exchange=asked).answer(0, consortium.plan.stage_of(0), counts())
    return given


class _Enough(Exception):
    pass


def check_a_site_signs_one_survivor_set_even_with_an_older_vault() -> None:
    """The ledger knows the set before the vote leaves; the same set again gets the same signature."""
    for restore in (False, True):
        with scratch() as folder:
            consortium = quiet_ward(folder)
            first, second, again = two_ballots(consortium, restore=restore)
            with Ledger.open(consortium.directory("a") / "ledger.db") as ledger:
                entry = ledger.book.entries[RUN, "0"]
            consortium.close()
        assert first.kind == "sum.vote" and entry.state == "UNMASKED", "a vote left and the ledger does not know"
        assert entry.ballot == first.fields["ballot"], "the ledger does not name the set that was signed"
        assert second.kind == "site.refused", "two survivor sets were signed"
        assert again == first


def check_a_finished_run_leaves_no_keys() -> None:
    """After the last release nothing in the vault's files holds a channel key or a round's secret."""
    with scratch() as folder:
        consortium = quiet_ward(folder)
        strategy = consortium.strategy()
        private = consortium.guard("a")._vault_().get(f"channel/{RUN}")
        assert private is not None
        for index in range(consortium.plan.releases):
            assert consortium.guard("a")._vault_().get(f"channel/{RUN}") == private
            strategy.answer(index, consortium.plan.stage_of(index), counts(), next_dim=counts().dim)
        vault = consortium.guard("a")._vault_()
        names = [n for n in ("round/", "channel/", "channels/") if vault.names(n)]
        left = b"".join(file.read_bytes() for file in consortium.directory("a").glob("vault.db*"))
        consortium.close()
    assert not names, "keys of a finished run are kept"
    assert private not in left, "a removed key is still in a file"


def check_removed_secrets_are_in_no_file_any_more() -> None:
    """Replaced and removed values alike, and those that are larger than a page."""
    secrets = [b"ROUND-KEY-" + bytes([65 + i]) * 40 for i in range(3)] + [b"LONG-SECRET" * 2000]
    with scratch() as folder:
        vault = vault_module.Vault(Path(folder) / "vault.db")
        vault.put({"round/1": secrets[0], "other": b"kept"})
        vault.put({"round/1": secrets[1], "round/2": secrets[2], "round/3": secrets[3]})
        written = b"".join(file.read_bytes() for file in Path(folder).iterdir())
        assert all(secret[:60] in written for secret in secrets), "the test does not look in the right place"
        vault.put({"round/1": None, "round/2": None, "round/3": None})
        left = b"".join(file.read_bytes() for file in Path(folder).iterdir())
        assert vault.get("other") == b"kept"
        vault.close()
    assert not any(secret[:60] in left for secret in secrets) and b"LONG-SECRET" not in left
