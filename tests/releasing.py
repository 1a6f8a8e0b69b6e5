"""A finished run of three hospitals, made by hand in a blink, for tests of releases: files as a run leaves them.

No record is asked and no model fitted: rows, model and answers are made up. Keys, chains, proposal, approvals, charges
and `publish` are the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hospital import key
from small import small_study, small_table

from cohortium.client.approval import approve
from cohortium.client.policy import Policy
from cohortium.client.signing_release import check_release, endorse
from cohortium.common.evaluation.base import Figure, Scores, Verdict
from cohortium.common.evaluation.report import TITLES
from cohortium.common.privacy.chain import REHEARSAL
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import canonical, seal
from cohortium.common.protocol.release_manifest import ENVELOPE, Envelope, Manifest, file_digests, sign_release
from cohortium.common.protocol.signing import save_private, save_public
from cohortium.common.study import Study
from cohortium.server.audit import COORDINATOR, write_manifest
from cohortium.server.finish import publish
from cohortium.server.planning import plan_for
from cohortium.server.runs import RunFolder

RUN = "small-1"
SITES = ("east", "north", "west")
HOLDOUT = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n"
ROWS = 60
EXACT = 0.123457
SECRET_WORDS = "as the real rows of this machine show"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """root: the coordinator's run folder. sites: a directory for each hospital."""

    root: Path
    sites: Path
    plan: Plan

    def site(self, name: str) -> Path:
        return self.sites / name

    def sign(self, folder: Path, *names: str) -> None:
        for name in names:
            endorse(check_release(self.site(name), folder), folder)


def finished(
    folder: Path,
    *,
    mode: Literal["simulation", "deployment"] = "deployment",
    rehearsal: bool = False,
    exact: bool = False,
    title: str = "A small study",
    written: int = ROWS,
    lines: str = "",
    dictionary: dict[str, Any] | None = None,
) -> Finished:
    """Make the run and its hospitals. exact: with a simulation's un-noised scores. written: rows in the files.

    lines: further ones of [release]; the rows are as before. dictionary: another one of the same columns.
    """
    path, _ = small_study(folder / "study", evaluation=HOLDOUT, epsilon=3.0, rows=ROWS, dictionary=dictionary)
    path.write_text(path.read_text().replace("A small study", title) + lines)
    study = Study.load(path)
    plan = plan_for(study, SITES)[0]
    root, sites = folder / "runs" / RUN, folder / "hospitals"
    (root / "run" / "ledgers").mkdir(parents=True)
    study.schema.save(root / "dictionary.json")
    (root / "study.toml").write_text(study.to_toml(dictionary="dictionary.json"), encoding="utf-8")
    (root / "plan.json").write_bytes(canonical(plan.to_json()) + b"\n")
    save_private(key(COORDINATOR), root / "coordinator.key")
    identities = {site: key(site).public_key().public_bytes_raw().hex() for site in SITES}
    envelope = seal(proposal_message(run=RUN, plan=plan, identities=identities, schema=study.schema), key(COORDINATOR))
    (root / "proposal.bin").write_bytes(envelope)
    facts = {"run": RUN, "public_keys": identities, "seed": 1, "noise": True, "rehearsal": rehearsal}
    (root / "run.json").write_text(json.dumps({**facts, "guessed_ranges": False, "table": "/secret/table"}))
    _rows(study).iloc[:written].to_parquet(root / "synthetic.parquet", index=False)
    _rows(study).iloc[:written].to_csv(root / "synthetic.csv", index=False)
    (root / "run" / "model.npz").write_bytes(b"a model")
    for site in SITES:
        hospital(sites / site, site, plan, envelope, rehearsal=rehearsal)
        with Ledger.open(sites / site / "ledger.db") as ledger:
            ledger.export(root / "run" / "ledgers" / f"{site}.jsonl")
    charge(root / "run" / "ledger.db", COORDINATOR, plan)
    places = {COORDINATOR: "run/ledger.jsonl", **{site: f"run/ledgers/{site}.jsonl" for site in SITES}}
    keys = {COORDINATOR: key(COORDINATOR).public_key().public_bytes_raw().hex(), **identities}
    write_manifest(root, run=RUN, plan=plan, public_keys=keys, ledgers=places)
    publish(RunFolder(root=root), mode=mode, about={"Scored on": "77 real rows"}, scores=_scores() if exact else None)
    return Finished(root=root, sites=sites, plan=plan)


def hospital(place: Path, name: str, plan: Plan, envelope: bytes, *, rehearsal: bool = False) -> None:
    """A site's directory after the run: key, policy, approval and a ledger that charged every release."""
    place.mkdir(parents=True)
    place.chmod(0o700)
    save_private(key(name), place / "site.key")
    save_public(key("officer of " + name).public_key(), place / "officer.pub")
    Policy(
        name=name,
        coordinator_key=key(COORDINATOR).public_key().public_bytes_raw().hex(),
        table="data.parquet",
        lifetime_epsilon=9.0,
        lifetime_delta=1e-6,
        unit=plan.unit,
        hospitals=plan.hospitals,
        minimum_sites=1,
        minimum_colluders=0,
        minimum_patients=0,
        generators=(plan.generator,),
        strategies=(plan.mode,),
        evaluation=True,
    ).save(place / "site.toml")
    charge(place / "ledger.db", name, plan, rehearsal=rehearsal)
    approve(place, envelope, key("officer of " + name), check_table=False)


def charge(
    path: Path, owner: str, plan: Plan, *, run: str = RUN, rehearsal: bool = False, releases: int | None = None
) -> None:
    """A new ledger that charged the plan's releases and closed them under one survivor set."""
    with Ledger.create(path, owner, key(owner), clock=lambda: 0) as ledger:
        if rehearsal:
            ledger.note(REHEARSAL, run=run)
        for index in range(plan.releases if releases is None else releases):
            reserve(ledger, plan, index, run=run)


def reserve(ledger: Ledger, plan: Plan, index: int, *, run: str = RUN, release_id: str | None = None) -> None:
    stage, name = plan.stage_of(index), str(index) if release_id is None else release_id
    ledger.reserve(
        run=run,
        release_id=name,
        event=stage.event,
        count=stage.steps,
        plan_digest=plan.digest,
        purpose=stage.purpose,
    )
    ledger.advance(run, name, "SEALED", "1" * 64)
    ledger.advance(run, name, "RELEASED", "2" * 64, later=True)


def resigned(
    folder: Path,
    edit: Callable[[dict[str, Any]], object] = lambda predicate: None,
    *,
    by: Mapping[str, Ed25519PrivateKey] | None = None,
) -> None:
    """What a dishonest coordinator can do: another predicate over the files as they are now, signed with its key.

    by: sites that sign it blindly, too.
    """
    manifest = Manifest.read(Envelope.read((folder / ENVELOPE).read_bytes()).payload)
    predicate = json.loads(json.dumps(manifest.predicate))
    edit(predicate)
    made = Manifest.of({name: str(sha) for name, sha in file_digests(folder).items()}, predicate)
    (folder / ENVELOPE).write_bytes(sign_release(made, key(COORDINATOR)).to_bytes())
    for owner, secret in (by or {}).items():
        (folder / "signatures" / f"{owner}.json").write_bytes(sign_release(made, secret).to_bytes())


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def _rows(study: Study) -> pd.DataFrame:
    table = small_table(200).iloc[:ROWS]
    return table[[column.name for column in study.schema.modelled]]


def _scores() -> Scores:
    figure = Figure(value=EXACT)
    return Scores(
        basis="held-out real patients",
        in_sample=False,
        target="smoker",
        real_rows=77,
        real_patients=70,
        train_rows=60,
        synthetic_rows=ROWS,
        seed=1,
        figures=dict.fromkeys(TITLES, figure),
        columns=(),
        associations=None,
        auc=(),
        verdicts=(Verdict(use="Anything", word="good", sentence=SECRET_WORDS, thresholds="", figure=figure),),
        headline=SECRET_WORDS,
        unassessed=(),
    )
