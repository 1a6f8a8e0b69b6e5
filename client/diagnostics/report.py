"""`cohortium site report`: what the released rows say about this hospital's own patients. Never sent.

Reads the records, the synthetic rows and the approved proposal; writes one page and its figures, readable by the owner
only, into the site's own folder. Built from records without noise: the page is as secret as the table. Neither guard
nor courier imports this folder, and nothing here talks to anybody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cohortium.client.diagnostics import anonymity, attacks, linking, nearest
from cohortium.client.diagnostics.attacks import Attack
from cohortium.client.diagnostics.cohort import Cohort
from cohortium.client.diagnostics.facts import Diagnosis, Item, Section, unknown
from cohortium.client.diagnostics.membership import membership
from cohortium.client.diagnostics.page import page
from cohortium.client.diagnostics.prediction import prediction
from cohortium.client.diagnostics.singling_out import singling_out
from cohortium.client.policy import Policy
from cohortium.client.site import Site
from cohortium.common.encoding import Codes, Records, grids
from cohortium.common.errors import CohortiumError, TableError, UsageError
from cohortium.common.evaluation.base import to_json
from cohortium.common.modes import make_like_parent, refuse_open, write_private
from cohortium.common.privacy.chain import REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.proposals import Proposal, read_proposal
from cohortium.common.protocol.signing import public_from_raw

SEED = 0
FOLDER = "reports"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The diagnosis and where it lies."""

    diagnosis: Diagnosis
    page: Path
    figures: Path

    def to_json(self) -> dict[str, Any]:
        return {"page": str(self.page), "figures": str(self.figures), **to_json(self.diagnosis)}


def report(directory: Path, rows: Path, *, run: str | None = None, target: str | None = None) -> Written:
    """Diagnose and write SITE/guard/reports/RUN.html and RUN.json (mode 0600).

    directory: of the site, or of a simulated one. rows: the synthetic rows, Parquet or CSV. run: which approved run
    made them; it may be left out where only one was approved here. Raises UsageError REPORT-RUN, REPORT-TARGET;
    TableError where table or rows do not fit the run's dictionary.
    """
    from cohortium.client.guard import held_out
    from cohortium.client.loading import load_records

    guard = guard_folder(directory)
    refuse_open(guard)
    policy = Policy.load(guard / "site.toml")
    proposal = approved(guard, run, coordinator=policy.coordinator_key)
    plan, schema = proposal.plan, proposal.schema
    aim = _target(proposal, target)
    synthetic, digest = synthetic_rows(rows, proposal)
    records = load_records(guard, policy, schema=schema, unit=plan.unit, exclude=proposal.exclude)
    found = diagnose(
        records,
        held_out(records, study=plan.study, share=plan.holdout),
        synthetic,
        proposal,
        site=policy.name,
        target=aim,
        rows_file=rows.name,
        rows_sha256=digest,
        rehearsal=policy.rehearsal is not None or _rehearsed(guard, proposal.run),
    )
    folder = make_like_parent(guard / FOLDER)
    refuse_open(folder)  # a link here would lead whoever runs this, perhaps root, to write elsewhere
    written = Written(diagnosis=found, page=folder / f"{proposal.run}.html", figures=folder / f"{proposal.run}.json")
    write_private(written.figures, json.dumps(to_json(found), indent=1, allow_nan=False).encode() + b"\n")
    write_private(written.page, page(found).encode("utf-8", "replace"))
    return written


def diagnose(
    records: Records,
    held: np.ndarray,
    synthetic: Codes,
    proposal: Proposal,
    *,
    site: str,
    target: str | None,
    rows_file: str = "",
    rows_sha256: str = "",
    seed: int = SEED,
    rehearsal: bool = False,
) -> Diagnosis:
    """All sections, from records in fine codes. held: bool [patients]. The same input gives the same figures.

    rehearsal: the noise was off or came from a seed, so the page promises nothing.
    """
    plan, made = proposal.plan, grids(proposal.schema)
    columns = tuple(proposal.schema.modelled)
    cohort = Cohort.of(columns, made, records, held, synthetic, seed=seed)
    missing = np.array([grid.missing for grid in made], dtype=np.int64)
    epsilon = plan.price() if plan.private and not rehearsal else None
    sections = (
        nearest.similarity(cohort),
        _attacks(cohort, missing, seed),
        Section(
            key="membership",
            title="Membership attack",
            intro="The attacker has a patient's whole record and other patients of this hospital, and asks: in or out?",
            warning=attacks.WARNING,
            items=membership(cohort, epsilon=epsilon, delta=plan.delta, seed=seed),
        ),
        Section(
            key="anonymity",
            title="k-anonymity, l-diversity, homogeneity",
            intro="The synthetic table read as if its rows were patients, the hospital's own training rows beside it.",
            warning=anonymity.WARNING,
            items=(
                *anonymity.anonymity(cohort, seed=seed),
                *_items(cohort, anonymity.homogeneity(cohort, missing=missing, seed=seed)),
            ),
        ),
        Section(
            key="prediction",
            title="Prediction: trained on real, trained on synthetic",
            intro="Both models are judged on the same held-out patients of this hospital.",
            warning="These scores are made from records without noise: they may not leave the hospital.",
            items=prediction(cohort, made, target=target, seed=seed),
        ),
    )
    return Diagnosis(
        site=site,
        run=proposal.run,
        study=plan.study,
        synthetic_file=rows_file,
        synthetic_sha256=rows_sha256,
        train_patients=cohort.train_patients,
        control_patients=cohort.control_patients,
        synthetic_rows=cohort.synthetic_rows,
        columns=len(columns),
        seed=seed,
        statement=_statement(proposal, rehearsal=rehearsal),
        sampled=cohort.sampled,
        sections=sections,
        unassessed=tuple(
            dict.fromkeys(f"{i.label}: {i.figure.reason}" for s in sections for i in s.items if i.figure.value is None)
        ),
    )


def _attacks(cohort: Cohort, missing: np.ndarray, seed: int) -> Section:
    made: list[Attack] = list(singling_out(cohort, missing=missing, seed=seed))
    link = linking.linkability(cohort, seed=seed)
    made += [] if link is None else [link]
    made += linking.inference(cohort, missing=missing, seed=seed)
    shown = _items(cohort, made)
    if link is None:
        reason = unknown("There is only one column: there is nothing to link or infer.", unit="share")
        limits = "Nothing was tried, so nothing is shown."
        shown.append(Item(key="linkability", label="Linkability", figure=reason, means="Not assessed.", limits=limits))
    return Section(
        key="attacks",
        title="Singling out, linkability, inference",
        intro=(
            "Each attack runs on training patients, on held-out patients of this hospital (the control) and without "
            "the synthetic rows (the baseline). The residual risk is what it gains because a patient was in training."
        ),
        warning=attacks.WARNING,
        items=tuple(shown),
    )


def _rehearsed(guard: Path, run: str) -> bool:
    with Ledger.open(guard / "ledger.db") as ledger:
        return bool(ledger.book.noted(REHEARSAL, run))


def _statement(proposal: Proposal, *, rehearsal: bool) -> str:
    plan = proposal.plan
    if not plan.private:
        return "This run had no noise: it is a rehearsal, and nothing protects the patients in these synthetic rows."
    if rehearsal:
        return (
            "NOT PRIVATE: this run was a rehearsal, whose noise anybody can take away who knows its seed. With fresh "
            f"noise it would be: {plan.statement().sentence()}"
        )
    return plan.statement().sentence() + " This holds whatever the figures below say."


def _items(cohort: Cohort, made: Iterable[Attack]) -> list[Item]:
    return [item for attack in made for item in attacks.items(cohort, attack)]


# ---- what is read -------------------------------------------------------------------------------------------


def guard_folder(directory: Path) -> Path:
    """Where site.toml lies: SITE/guard, or the folder itself of a simulated site. UsageError SITE-MISSING."""
    root = directory.resolve()
    return root if (root / "site.toml").exists() else Site.open(directory).guard


def approved(guard: Path, run: str | None, *, coordinator: str) -> Proposal:
    """The proposal of a run that was approved here, whether or not the approval still holds: the run may be long over.

    coordinator: hex of its key. UsageError REPORT-RUN with the runs there are.
    """
    known = sorted(path.parent.name for path in (guard / "approved").glob("*/proposal.bin"))
    wanted = known[0] if run is None and len(known) == 1 else run
    if wanted not in known:
        raise UsageError(
            "REPORT-RUN",
            "no run was approved here" if not known else "which run made these rows?",
            where=(str(guard / "approved"),),
            hint="--run " + " or ".join(known) if known else "a report needs the dictionary of an approved proposal",
        )
    envelope = (guard / "approved" / wanted / "proposal.bin").read_bytes()
    return read_proposal(envelope, public_from_raw(bytes.fromhex(coordinator)))


def _target(proposal: Proposal, target: str | None) -> str | None:
    names = [column.name for column in proposal.schema.modelled]
    if target is not None and target not in names:
        raise UsageError("REPORT-TARGET", f"there is no column {target!r}", hint="columns: " + ", ".join(names[:20]))
    declared = [column.name for column in proposal.schema.modelled if column.role == "target"]
    return target or next(iter(declared), None)


def synthetic_rows(path: Path, proposal: Proposal) -> tuple[Codes, str]:
    """(the released rows in fine codes, SHA-256 of the file). TableError where they do not fit the dictionary."""
    from cohortium.client.records import records
    from cohortium.client.sources.base import read

    if not path.is_file():
        raise UsageError("REPORT-FILE", "there is no such file of synthetic rows", where=(str(path),))
    try:
        table = read(path)
        found = records(proposal.schema, table, unit="row", where=path.name, exclude=proposal.exclude)
    except CohortiumError:
        raise
    except Exception as error:
        raise TableError(
            "TABLE-UNREADABLE", f"the synthetic rows cannot be read ({type(error).__name__})", where=(path.name,)
        ) from None
    with path.open("rb") as file:
        return found.codes, hashlib.file_digest(file, "sha256").hexdigest()
