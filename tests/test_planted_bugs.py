"""Bugs that others have shipped, planted one by one: for each a NAMED check passes without it and fails with it.

Every entry replaces text in a function's source (tests/planting.py); an entry whose text is gone fails. The same
checks run as ordinary tests beside the code that they guard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checks
import pytest
from planting import planted

from cohortium.client import gate
from cohortium.client.gate import Gate
from cohortium.client.guard import Guard
from cohortium.client.vault import Vault
from cohortium.common.encoding import NumberGrid
from cohortium.common.generators.nade import Nade
from cohortium.common.privacy import entropy, release
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.release import Mechanism
from cohortium.common.protocol.secure_sum import ServerRound, SiteRound
from cohortium.common.queries import Counts, Gradient, Moments, _clipped
from cohortium.server import asking

Change = tuple[Callable[..., Any], tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Bug:
    name: str
    check: Callable[[], None]
    changes: tuple[Change, ...]


def bug(name: str, check: Callable[[], None], *changes: Any) -> Bug:
    """changes: a function followed by its (old, new) pairs, as often as needed."""
    found: list[tuple[Callable[..., Any], list[tuple[str, str]]]] = []
    for item in changes:
        if isinstance(item, tuple):
            found[-1][1].append(item)
        else:
            found.append((item, []))
    return Bug(name=name, check=check, changes=tuple((function, tuple(pairs)) for function, pairs in found))


BUGS = (
    bug(
        "clipping off, exact gradients",
        checks.check_one_patient_moves_an_answer_at_most_by_its_sensitivity,
        _clipped,
        ("min(1.0, clip_norm_l2 / norm)", "1.0"),
    ),
    bug(
        "clipping off, fast gradients",
        checks.check_one_patient_moves_an_answer_at_most_by_its_sensitivity,
        Nade._block,
        ("weight * (clip / norm.clamp(min=clip))", "weight * (norm / norm)"),
    ),
    bug(
        "clipping off, moments",
        checks.check_one_patient_moves_an_answer_at_most_by_its_sensitivity,
        Moments._on_grid,
        ("np.minimum(1.0, radius / np.maximum(norm, 1e-300))", "1.0"),
    ),
    bug(
        "clipping a batch instead of a patient",
        checks.check_a_patient_counts_alike_whoever_else_is_there,
        Gradient.contribution,
        (
            "_clipped(net.row_gradient(self.parameters, row), self.clip_norm_l2)",
            "net.row_gradient(self.parameters, row)",
        ),
        (
            "return Contribution(units=units)\n",
            "return Contribution(units=np.rint(_clipped(units * self.lattice, self.clip_norm_l2) / self.lattice))\n",
        ),
    ),
    bug(
        "blocks of as many rows as are left",
        checks.check_a_row_adds_the_same_wherever_it_stands,
        Nade.gradient_sum,
        (
            "_padded(bins[at : at + each], row_weight[at : at + each], each)",
            "bins[at : at + each], row_weight[at : at + each]",
        ),
    ),
    bug(
        "weights of any size in a query",
        checks.check_no_weight_of_a_network_is_larger_than_its_bound,
        Gradient.__post_init__,
        ("> MAX_PARAMETER:", "> 1e39:"),
    ),
    bug(
        "weights of any size between local steps",
        checks.check_no_weight_of_a_network_is_larger_than_its_bound,
        release._local_steps,
        ("np.clip(theta, -MAX_PARAMETER, MAX_PARAMETER, out=theta)", "pass"),
    ),
    bug(
        "moments bounded as if no column were alone",
        checks.check_one_patient_moves_an_answer_at_most_by_its_sensitivity,
        Moments.clip_norm_l2.fget,
        ("(columns - 1) / (2.0 * columns)", "(columns - 1) / (3.0 * columns)"),
    ),
    bug(
        "every row counts, not every patient",
        checks.check_one_patient_moves_an_answer_at_most_by_its_sensitivity,
        Counts.contribution,
        ("(1.0 / of_patient)", "(of_patient / of_patient)"),
    ),
    bug(
        "noise halved",
        checks.check_the_noise_has_the_planned_sigma,
        release.lattice_noise,
        ("sigma_units * _normals", "0.5 * sigma_units * _normals"),
    ),
    bug(
        "h shares of 1/h of the deviation instead of the variance",
        checks.check_the_noise_has_the_planned_sigma,
        release._noised_sum,
        ("math.sqrt(how.shares)", "how.shares"),
    ),
    bug(
        "noise from numpy's generator",
        checks.check_noise_comes_from_the_keystream_alone,
        release._normals,
        ("words = stream", "return np.random.standard_normal(count); words = stream"),
    ),
    bug(
        "one keystream for every release",
        checks.check_noise_is_drawn_anew_for_every_release,
        entropy.Purpose.info,
        ("str(self.release), str(self.step)", "'', ''"),
    ),
    bug(
        "keys without fresh randomness",
        checks.check_noise_is_drawn_anew_for_every_release,
        entropy.SystemEntropy.key,
        ("os.urandom(KEY_BYTES)", "bytes(KEY_BYTES)"),
    ),
    bug(
        "priced with more noise than was drawn",
        checks.check_what_ran_is_what_is_charged,
        Mechanism.event.fget,
        ("Event.gaussian(self.noise_multiplier)", "Event.gaussian(2 * self.noise_multiplier)"),
    ),
    bug(
        "a shuffled batch of fixed size instead of Poisson sampling",
        checks.check_sampling_is_poisson,
        release._noised_sum,
        (
            "patient_uniforms(key, records.identity) < np.uint64(how.rate)",
            "np.argsort(np.argsort(patient_uniforms(key, records.identity))) < how.rate * records.patients // WHOLE",
        ),
    ),
    bug(
        "the sum divided by the private number of patients",
        checks.check_no_denominator_or_weight_depends_on_the_patients,
        release._noised_sum,
        ("    return units + lattice_noise", "    return units // records.patients + lattice_noise"),
        ("        return units\n", "        return units // records.patients\n"),
    ),
    bug(
        "a local step divided by the private number of patients",
        checks.check_no_denominator_or_weight_depends_on_the_patients,
        release._local_steps,
        ("noised / local.denominator", "noised / records.patients"),
    ),
    bug(
        "hospitals weighted by their rows",
        checks.check_no_denominator_or_weight_depends_on_the_patients,
        Guard._ask,
        ("values = released.values.astype", "values = (released.values * records.rows // 30).astype"),
        (
            "leaving = Message(",
            "object.__setattr__(released, 'values', np.frombuffer(values, '<i8')); leaving = Message(",
        ),
    ),
    bug(
        "the mean over hospitals taken over all that were asked",
        checks.check_no_denominator_or_weight_depends_on_the_patients,
        asking._answer,
        ('data / len(facts["sites"])', "data / 3"),
    ),
    bug(
        "a column's range learned from its values",
        checks.check_codes_depend_on_the_dictionary_alone,
        NumberGrid.encode,
        (
            "x = self.numbers(values)",
            "x = self.numbers(values); x = self.low + (x - np.nanmin(x)) * (self.high - self.low) / np.ptp(x)",
        ),
    ),
    bug(
        "held-out patients trained on",
        checks.check_training_and_holdout_share_nobody,
        Guard._load,
        ("records.subset(~held)", "records"),
    ),
    bug(
        "an update that leaves unmasked",
        checks.check_a_masked_vector_looks_random,
        SiteRound.mask,
        ("add_keystream(total,", "0 and add_keystream(total,"),
        ("if peer.site != self.site:", "if False:"),
        gate._check_release,
        ('if plain != (permit.mode == "local"):', "if False:"),
    ),
    bug(
        "one pair's mask omitted",
        checks.check_a_secure_sum_is_the_plain_sum,
        SiteRound.mask,
        ("if peer.site != self.site:", "if peer.site > self.site:"),
    ),
    bug(
        "the self mask omitted",
        checks.check_a_secure_sum_is_the_plain_sum,
        SiteRound.mask,
        ("add_keystream(total,", "0 and add_keystream(total,"),
    ),
    bug(
        "a round replayed",
        checks.check_a_replayed_vector_is_not_counted,
        ServerRound._admit,
        ("if context != self._context:", "if False:"),
        ServerRound.add_masked,
        ("if masked.roster != self._roster:", "if False:"),
    ),
    bug(
        "a release answered twice",
        checks.check_a_release_is_answered_once,
        Guard._ask,
        ('if state != "NONE":', "if False:"),
        Book._reserve,
        ("if (run, release) in self.entries:", "if False:"),
    ),
    bug(
        "a second noise after a crash",
        checks.check_a_crash_never_gives_a_second_answer,
        Guard._ask,
        ('if state != "NONE":', 'if state not in ("NONE", "RESERVED", "BURNED"):'),
        Book._reserve,
        ("if (run, release) in self.entries:", "if False:"),
    ),
    bug(
        "sent before it is recorded as sealed",
        checks.check_a_crash_never_gives_a_second_answer,
        Guard._again,
        ("if envelope is not None and", "return envelope\n        if envelope is not None and"),
        ('state in ("SEALED", "UNMASKED", "RELEASED")', "True"),
    ),
    bug(
        "computed before it is charged",
        checks.check_a_release_is_charged_on_disk_before_it_is_computed,
        Guard._ask,
        ("permit = self._gate().open(", "later = lambda: self._gate().open("),
        ("mechanism=permit.stage.mechanism", "mechanism=plan.stage_of(index).mechanism"),
        ("head=permit.head,\n    )", 'head="",\n    ); permit = later()'),
    ),
    bug(
        "whether a code occurs decides about an answer",
        checks.check_whether_a_question_is_answered_does_not_depend_on_the_records,
        Gate.check,
        ("query.check_codes(codes)", "pass"),
    ),
    bug(
        "an error's words sent out",
        checks.check_refusals_are_bare_codes,
        Guard._refuse,
        ('fields={"code": code}', 'fields={"code": sentence}'),
    ),
    bug(
        "a finished round's keys left in a file",
        checks.check_removed_secrets_are_in_no_file_any_more,
        Vault.put,
        ('self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")', "pass"),
    ),
    bug(
        "a cap in whatever unit the plan brings",
        checks.check_the_cap_is_always_counted_for_the_policys_number_of_hospitals,
        Gate._check_cap,
        (
            "self._policy.cap.allows(",
            '__import__("dataclasses").replace(self._policy.cap, hospitals=plan.hospitals).allows(',
        ),
    ),
    bug(
        "a vote that the ledger does not know",
        checks.check_a_site_signs_one_survivor_set_even_with_an_older_vault,
        Guard._survivors,
        ("self._gate().voted(", "str("),
        ("ballot=vote.ballot)", "ballot=vote.ballot) if 0 else None"),
    ),
    bug(
        "a second survivor set signed",
        checks.check_a_site_signs_one_survivor_set_even_with_an_older_vault,
        Gate.voted,
        ("if entry.ballot != ballot:", "if False:"),
    ),
    bug(
        "a finished run's keys kept",
        checks.check_a_finished_run_leaves_no_keys,
        Guard._reveal,
        ("if index == proposal.plan.releases - 1:", "if False:"),
    ),
    bug(
        "a cap that forgets what was spent",
        checks.check_the_lifetime_cap_counts_what_was_spent_before,
        Gate._check_cap,
        ("*private(self._ledger.charged_events()), ", ""),
    ),
)


def test_there_is_no_doubt_what_is_planted() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 10
    assert all(bug.changes and all(pairs for _, pairs in bug.changes) for bug in BUGS)


@pytest.mark.parametrize("check", sorted({b.check for b in BUGS}, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_without_a_bug_every_check_passes(check: Callable[[], None]) -> None:
    checks.passes(check)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_the_named_check_catches_the_planted_bug(bug: Bug) -> None:
    with contextlib.ExitStack() as stack:
        for function, pairs in bug.changes:
            stack.enter_context(planted(function, *pairs))
        with pytest.raises(AssertionError):
            bug.check()
