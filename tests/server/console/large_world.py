"""A consortium as it looks after years: 50 sites, 200 runs, 100,000 ledger lines, made in seconds for tests of speed.

    made = large_world(tmp / "consortium")                        # the whole
    made = large_world(tmp / "c", sites=4, runs=6, lines=400)     # small, for anything else

Every line is chained and signed as a site's ledger would, so whoever verifies finds nothing wrong; only no hospital
ever computed anything. All is fixed but the coordinator's own keys. The eight studies have different noise, so
that no ε is that of another study. `grow` adds lines to one site, as a run would.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consortium import PASSPHRASE, public, signer, supernode
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small import small_study

from cohortium.common.privacy import chain
from cohortium.common.privacy.plan import Plan
from cohortium.common.proposals import proposal_message
from cohortium.common.protocol.messages import digest, seal
from cohortium.common.study import Study
from cohortium.server.consortium import Addresses, Consortium
from cohortium.server.mirror import Mirror
from cohortium.server.planning import plan_for

NOW = 1_780_000_000
"""The world's present, seconds since 1970; its first line is two years older."""
DAY_S = 86_400
STUDIES = ("stroke", "sepsis", "rare-tumours", "heart-failure", "diabetes", "cystic-fibrosis", "asthma", "epilepsy")
PROPOSED, RUNNING, VOID, FAILED = 10, 3, 5, 12
"""So many of 200 runs, from the newest on; all others are finished."""
BURNT_EVERY = 97
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def large_world(
    folder: Path, *, sites: int = 50, runs: int = 200, lines: int = 100_000, seats: int = 10, rounds: int = 7
) -> Consortium:
    """seats: sites of a run. rounds: gradient releases of a plan; with the others they are rounds + 9 releases."""
    addresses = Addresses(host="127.0.0.1", listen="127.0.0.1", service_port=7441, enrol_port=7442, fleet_port=7443)
    made = Consortium.create(folder, name="rare-tumours", addresses=addresses, passphrase=PASSPHRASE)
    names = [f"site-{at + 1:02d}" for at in range(sites)]
    _enrol(made, names)
    plans = _runs(made, names, runs, min(seats, sites), rounds)
    _ledgers(made, names, plans, lines)
    return made


def key_of(site: str) -> Ed25519PrivateKey:
    return signer(site)


def _enrol(made: Consortium, names: Sequence[str]) -> None:
    since = NOW - 740 * DAY_S
    made.register().close()
    db = sqlite3.connect(made.root / "register.db", isolation_level=None)
    db.execute("BEGIN")
    for name in names:
        row = (name, "site", "enrolled", public(name), public("officer of " + name), supernode(name), "", since, None)
        db.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO identities VALUES (?, ?, ?)", (name, public(name), since))
    db.execute("COMMIT")
    db.close()


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run of this world. done: how many of its releases are answered."""

    run: str
    plan: Plan
    state: str
    at: int
    done: int


def _runs(made: Consortium, names: Sequence[str], runs: int, seats: int, rounds: int) -> list[Made]:
    part = made.root / "drafts"
    evaluation = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n"
    survivors, colluders = seats - seats // 4, seats // 10
    study_file, _ = small_study(
        part,
        generator="autoregressive",
        rounds=rounds,
        epsilon=2.0,
        survivors=survivors,
        colluders=colluders,
        evaluation=evaluation,
    )
    base = Study.load(study_file)
    first = plan_for(base, names[:seats])[0]
    key, found = made.key(), []
    db = sqlite3.connect(made.root / "register.db", isolation_level=None)
    db.execute("BEGIN")
    for number in range(runs):
        mine = sorted({names[(number * seats + at) % len(names)] for at in range(seats)})
        study = replace(base, id=STUDIES[number % len(STUDIES)], title=f"{STUDIES[number % len(STUDIES)]}, {number}")
        stages = tuple(
            replace(stage, noise_multiplier=stage.noise_multiplier * (1 + number % len(STUDIES) / 40))
            for stage in first.stages
        )
        plan = replace(first, study=study.id, study_digest=study.digest(), sites=tuple(mine), stages=stages)
        run = f"{study.id}-{number:08x}"
        identities = {site: public(site).hex() for site in mine}
        envelope = seal(
            proposal_message(run=run, plan=plan, identities=identities, schema=study.schema, exclude=study.exclude),
            key,
        )
        facts = {
            "run": run,
            "consortium": made.name,
            "public_keys": identities,
            "earlier_keys": {site: [] for site in mine},
            "seed": number,
            "rehearsal": False,
            "noise": True,
            "exact": False,
            "guessed_ranges": False,
            "transport": None,
            "mirror": "../../mirror.db",
        }
        made._write_run(made.runs / run, study, plan, envelope, facts)
        state = _state(runs - 1 - number, runs)
        at = NOW - 730 * DAY_S + number * (729 * DAY_S // runs)
        done = {"proposed": 0, "running": plan.releases // 2, "failed": plan.releases // 3, "void": 2}.get(
            state, plan.releases
        )
        _events(made.runs / run, plan, state, at, done)
        message = {"finished": "published.", "failed": "RUN-TOO-FEW: too few sites answered"}.get(state, "")
        row = (run, f"runs/{run}", state, None if state == "proposed" else str(number), 1, message, at + 3600, envelope)
        db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        said = "open" if state == "proposed" else "approved"
        db.executemany(
            "INSERT INTO approvals VALUES (?, ?, ?, ?, ?)",
            [(run, site, said, b"x" * 64 if said == "approved" else b"", at - DAY_S) for site in mine],
        )
        found.append(Made(run=run, plan=plan, state=state, at=at, done=done))
    db.execute("COMMIT")
    db.close()
    return found


def _state(back: int, runs: int) -> str:
    """The state of the run that has so many newer ones."""
    share = [max(1, number * runs // 200) for number in (PROPOSED, RUNNING, VOID, FAILED)]
    for state, many in zip(("proposed", "running", "void", "failed"), share, strict=True):
        if back < many:
            return state
        back -= many
    return "finished"


def _events(root: Path, plan: Plan, state: str, at: int, done: int) -> None:
    if state == "proposed":
        return
    inner = root / "run"
    (inner / "answers").mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"at": at, "event": "try", "number": 1},
        {"at": at + 1, "event": "start", "run": root.name, "releases": plan.releases, "plan": plan.digest},
        {"at": at + 5, "event": "hello", "sites": list(plan.sites), "refused": {}},
    ]
    for index in range(done):
        dropped = [plan.sites[index % len(plan.sites)]] if index % 7 == 5 else []
        events.append(
            {
                "at": at + 10 + 20 * index,
                "event": "release",
                "index": index,
                "purpose": plan.stage_of(index).name,
                "attempt": 0,
                "survivors": [site for site in plan.sites if site not in dropped],
                "dropped": dropped,
                "void": "",
                "codes": dict.fromkeys(dropped, "SITE-GONE"),
                "seconds": 19.5,
            }
        )
        (inner / "answers" / f"{index:05d}.npz").write_bytes(b"")
    if state == "finished":
        events.append({"at": at + 20 * done + 60, "event": "fitted", "run": root.name})
    elif state == "failed":
        events.append({"at": at + 20 * done + 60, "event": "failed", "code": "RUN-TOO-FEW", "sentence": "too few"})
    (inner / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


# ---- ledger lines -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Pen:
    """Writes one owner's signed lines as text, as Mirror keeps them."""

    owner: str
    key: Ed25519PrivateKey
    n: int = 0
    at: int = NOW - 735 * DAY_S
    head: bytes = bytes.fromhex(chain.EMPTY)
    rows: list[tuple[str, str, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._public = self.key.public_key().public_bytes_raw().hex()

    def open(self) -> None:
        self.write({"kind": "open", "format": chain.FORMAT, "public_key": self._public})

    def write(self, body: dict[str, Any]) -> None:
        text = _ENCODE(body | {"n": self.n, "owner": self.owner, "at": self.at})
        self.head = hashlib.sha256(chain._LINK + self.head + hashlib.sha256(text.encode()).digest()).digest()
        signature = self.key.sign(chain._SIGN + self.head).hex()
        line = f'{{"body":{text},"hash":"{self.head.hex()}","signature":"{signature}"}}'
        self.rows.append((self.owner, self._public, self.n, line))
        self.n += 1

    def start(self, run: str, plan: str) -> None:
        nonce = digest(f"{self.owner} {self.n}".encode())[:32]
        fields = {"run": run, "plan": plan, "nonce": nonce}
        self.write({"kind": "note", "about": chain.START, "fields": fields})

    def release(self, made: Made, plan: str, index: int, *, burnt: bool = False) -> None:
        stage = made.plan.stage_of(index)
        head = {"run": made.run, "release": str(index)}
        charge = {"attempt": 0, "event": stage.event.to_json(), "count": stage.steps, "plan": plan}
        self.write({"kind": "reserve", **head, **charge, "purpose": stage.name})
        if burnt:
            self.write({"kind": "advance", **head, "state": "BURNED", "digest": ""})
            return
        sealed = digest(f"{self.owner} {made.run} {index}".encode())
        self.write({"kind": "advance", **head, "state": "SEALED", "digest": sealed})
        self.write({"kind": "advance", **head, "state": "RELEASED", "digest": digest(f"{made.run} {index}".encode())})


def _ledgers(made: Consortium, names: Sequence[str], runs: Sequence[Made], lines: int) -> None:
    mirror = Mirror(made.mirror, {})
    mirror.close()
    digests = {each.run: each.plan.digest for each in runs}
    db = sqlite3.connect(made.mirror, isolation_level=None)
    db.execute("BEGIN")
    for at, name in enumerate(names):
        pen = Pen(owner=name, key=key_of(name))
        most = lines // len(names) + (at < lines % len(names))
        for _ in _written(pen, [each for each in runs if name in each.plan.sites and each.done], digests, most):
            pass
        db.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", pen.rows)
    db.execute("COMMIT")
    db.close()


def _written(pen: Pen, runs: Sequence[Made], digests: dict[str, str], most: int) -> Iterator[None]:
    """Runs in order until there are `most` lines; what is missing at the end are further starts of the last run."""
    pen.open()
    charged = 0
    for each in runs:
        pen.at = max(pen.at, each.at + 5)
        pen.start(each.run, digests[each.run])
        for index in range(each.done):
            if pen.n + 3 > most:
                break
            charged += 1
            pen.at = max(pen.at, each.at + 10 + 20 * index)
            pen.release(each, digests[each.run], index, burnt=charged % BURNT_EVERY == 0)
            yield
    while runs and pen.n < most:
        pen.start(runs[-1].run, digests[runs[-1].run])
        yield


def grow(made: Consortium, site: str, releases: int = 1) -> int:
    """Further lines of one site, as if the newest run that it takes part in went on; how many lines."""
    db = sqlite3.connect(made.mirror, isolation_level=None)
    size, text = db.execute("SELECT n + 1, line FROM lines WHERE owner = ? ORDER BY n DESC LIMIT 1", (site,)).fetchone()
    last = json.loads(text)
    pen = Pen(owner=site, key=key_of(site), n=size, at=last["body"]["at"] + 1, head=bytes.fromhex(last["hash"]))
    register = made.register()
    run = [row for row in register.runs() if site in register.approvals(row.run) and row.state != "proposed"][-1].run
    plan = made.folder(run).plan()
    known = {
        int(json.loads(line)["body"]["release"])
        for (line,) in db.execute(
            'SELECT line FROM lines WHERE owner = ? AND line LIKE \'%"kind":"reserve"%\' AND line LIKE ?',
            (site, f'%"run":"{run}"%'),
        )
    }
    each = Made(run=run, plan=plan, state="running", at=pen.at, done=plan.releases)
    for index in [at for at in range(plan.releases) if at not in known][:releases]:
        pen.release(each, plan.digest, index)
    pen.start(run, plan.digest)
    db.execute("BEGIN")
    db.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", pen.rows)
    db.execute("COMMIT")
    db.close()
    register.close()
    return len(pen.rows)
