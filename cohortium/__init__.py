"""Cohortium: one private synthetic dataset from many hospitals. The public Python API, and nothing else.

    study = cohortium.load_study("study.toml")
    print(cohortium.plan(study, sites=5).statement().sentence())      # what it would cost; reads no data
    run = cohortium.simulate("study.toml", "table.parquet", out="result")
    women = run.sample(10_000, where="sex=Female")

Each function does what the command of the same name does; errors are a `CohortiumError` with a code, a
place and a fix. Importing this module is cheap: pandas, torch and Flower are imported by the functions that
need them. In a notebook studies, plans, runs, scores and audits show themselves as small tables and pictures.
"""

from __future__ import annotations

import os

# gRPC reads this once, when it is first loaded, and has no other setting for it: with a suite that no certificate
# of ours can serve, TLS 1.2 is impossible and 1.3 is all that is left (common/protocol/certificates.py).
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305")

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from cohortium.common.errors import CohortiumError
    from cohortium.common.evaluation.base import Scores
    from cohortium.common.privacy.plan import Plan
    from cohortium.common.schema import Schema
    from cohortium.common.study import Study
    from cohortium.server.analysis import Analyses
    from cohortium.server.audit import AuditReport

    __version__: str

__all__ = [
    "Analyses",
    "AuditReport",
    "CohortiumError",
    "Plan",
    "Run",
    "Schema",
    "Scores",
    "Study",
    "__version__",
    "analyze",
    "audit",
    "evaluate",
    "load_study",
    "plan",
    "report",
    "resume",
    "sample",
    "simulate",
    "tune",
]

_TYPES = {
    "Analyses": "cohortium.server.analysis",
    "AuditReport": "cohortium.server.audit",
    "CohortiumError": "cohortium.common.errors",
    "Plan": "cohortium.common.privacy.plan",
    "Schema": "cohortium.common.schema",
    "Scores": "cohortium.common.evaluation.base",
    "Study": "cohortium.common.study",
}
Where = str | Mapping[str, object]


def __getattr__(name: str) -> Any:
    """The types and the version, when they are first asked for (PEP 562)."""
    import importlib
    import importlib.metadata

    if name == "__version__":
        value: Any = importlib.metadata.version("cohortium")
    elif name in _TYPES:
        from cohortium.showing import dress

        value = dress(getattr(importlib.import_module(_TYPES[name]), name))
    else:
        raise AttributeError(f"module 'cohortium' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Run:
    """A finished simulation. directory: all its files; result: what result.json says."""

    directory: Path
    result: dict[str, Any]

    def __repr__(self) -> str:
        from cohortium.showing import run_line

        return run_line(self)

    def _repr_html_(self) -> str:
        from cohortium.showing import run_page

        return run_page(self)

    @property
    def statement(self) -> str:
        """The guarantee in a sentence, recomputed from the ledgers."""
        return str(self.result["privacy"]["sentence"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What stands against publishing: a seeded rehearsal, noise switched off."""
        return tuple(self.result["warnings"])

    def synthetic(self) -> pd.DataFrame:
        """The published table, [release] rows of it."""
        import pandas as pd

        return pd.read_parquet(self.directory / "synthetic.parquet")

    def sample(
        self,
        rows: int,
        *,
        where: Where | None = None,
        balance: str | Sequence[str] | None = None,
        minimum_share: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """More rows, see `sample`."""
        return sample(self.directory, rows, where=where, balance=balance, minimum_share=minimum_share, seed=seed)


def load_study(path: str | Path) -> Study:
    """Read study.toml and the dictionary that it names, and check both. StudyError, DictionaryError."""
    return _dressed("Study").load(path)


def plan(
    study: Study | str | Path,
    *,
    sites: int | Sequence[str] | None = None,
    accept_guessed_ranges: bool = False,
) -> Plan:
    """Compile a study to its finite list of releases, with their noise and price. Reads no data.

    sites: how many hospitals, or their names; None where the study names them. Raises StudyError for a study
    that cannot be planned (also: a dictionary with ranges guessed from data, unless accepted), Refused where
    epsilon is too small.
    """
    from cohortium.common.errors import StudyError
    from cohortium.server.planning import plan_for

    loaded = load_study(study) if isinstance(study, str | Path) else study
    if not accept_guessed_ranges:
        loaded.refuse_guesses()
    if sites is None:
        names: Sequence[str] = loaded.sites
    else:
        names = [f"site-{i + 1:03d}" for i in range(sites)] if isinstance(sites, int) else sites
    if not names:
        raise StudyError("STUDY-SITES", "the study does not name its sites", hint="plan(study, sites=5)")
    _dressed("Plan")
    return plan_for(loaded, names)[0]


def simulate(
    study: Study | str | Path,
    table: str | Path | pd.DataFrame,
    *,
    out: str | Path,
    split: str = "iid:5",
    seed: int | None = None,
    noise: bool = True,
    engine: str = "in-process",
    accept_guessed_ranges: bool = False,
    progress: bool | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Turn one table into hospitals on this machine, run the study over them, score and sign the result.

    study: a study, or the path of study.toml. table: a Parquet or CSV file, or a DataFrame. out: a new or empty folder.
    split: by:COLUMN, iid:K or dirichlet:COLUMN:K:ALPHA. engine: "in-process" or "ray".
    seed: None draws real noise; a number makes a rehearsal that anyone who knows it can undo, never private.
    noise: False switches the noise off (epsilon is infinite). progress: None shows a bar in a notebook and on a
    terminal; True and False decide. on_event: is called with what happens.
    """
    import tempfile

    from cohortium.simulations.run import Request, prepare

    chosen = _engine(engine)
    with tempfile.TemporaryDirectory(prefix="cohortium-") as folder:
        if isinstance(table, str | Path):
            source = Path(table)
        else:
            # Copied into the sites' folders by `prepare`; this copy goes at once.
            source = Path(folder) / "table.parquet"
            table.to_parquet(source, index=False)
        prepare(
            Request(
                study=_on_disk(study, Path(folder)),
                table=source,
                split=split,
                out=Path(out),
                seed=seed,
                noise=noise,
                accept_guessed_ranges=accept_guessed_ranges,
            )
        )
    return _run(Path(out), chosen, progress, on_event)


def resume(
    directory: str | Path,
    *,
    engine: str = "in-process",
    progress: bool | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Go on with an interrupted simulation; what was answered is not asked, and not paid for, again."""
    return _run(Path(directory), _engine(engine), progress, on_event)


def sample(
    directory: str | Path,
    rows: int,
    *,
    where: Where | None = None,
    balance: str | Sequence[str] | None = None,
    minimum_share: Mapping[str, float] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Draw rows from a fitted model: post-processing, free of budget. The same seed gives the same rows.

    where: "sex=Female and cp=asymptomatic", or {column: value, set of values, or (low, high)}.
    balance: columns whose combinations of levels shall occur equally often. minimum_share: {column: share of all rows
    that each of its levels has at least}; the rest keeps its proportions.
    """
    from cohortium.common.errors import UsageError
    from cohortium.common.generators.sampling import table
    from cohortium.server.runs import RunFolder
    from cohortium.server.sampling import parse_where

    if rows < 1:
        raise UsageError("SAMPLE-ROWS", "at least one row", hint="sample(directory, 1000)")
    folder = RunFolder(root=Path(directory))
    conditions = parse_where(where, folder) if isinstance(where, str) else where
    schema, grids = folder.study().schema, folder.grids()
    return table(
        folder.model(), schema, grids, rows, seed=seed, where=conditions, balance=balance, minimum_share=minimum_share
    )


def evaluate(
    synthetic: str | Path | pd.DataFrame,
    *,
    train: pd.DataFrame | None = None,
    test: pd.DataFrame | None = None,
    dictionary: Schema | str | Path | None = None,
    target: str | None = None,
    unit: str = "row",
    seed: int = 0,
) -> Scores:
    """Score a synthetic table against real rows on this machine. NOT private: the scores see real rows.

    synthetic: the folder of a simulation (its own real side is gathered again), or a table; then train and
    dictionary are needed. test: rows of other patients; without it the training rows judge (in-sample).
    unit: the column that names the patient in train and test, or "row".
    """
    from cohortium.common.errors import UsageError
    from cohortium.common.evaluation.exact import exact_scores

    _dressed("Scores")
    if isinstance(synthetic, str | Path):
        import pandas as pd

        from cohortium.server.runs import RunFolder
        from cohortium.simulations.run import real_side

        if train is not None or test is not None or dictionary is not None:
            raise UsageError("EVALUATE-ARGUMENTS", "a folder brings its own tables", hint="drop the others")
        folder = RunFolder(root=Path(synthetic))
        study, real = folder.study(), real_side(Path(synthetic))
        return exact_scores(
            schema=study.schema,
            train=real.train,
            test=real.test,
            target=study.target,
            synthetic=pd.read_parquet(Path(synthetic) / "synthetic.parquet"),
            unit=folder.plan().unit,
            seed=seed,
        )
    if train is None or dictionary is None:
        raise UsageError(
            "EVALUATE-ARGUMENTS",
            "a table needs real rows to compare with",
            hint="evaluate(synthetic, train=..., dictionary=...)",
        )
    from cohortium.client.records import checked
    from cohortium.common.schema import Schema

    schema = Schema.load(dictionary) if isinstance(dictionary, str | Path) else dictionary
    return exact_scores(
        schema=schema,
        train=checked(schema, train, unit=unit, where="train"),
        test=None if test is None else checked(schema, test, unit=unit, where="test"),
        synthetic=synthetic,
        target=target,
        unit=unit,
        seed=seed,
    )


def report(directory: str | Path) -> Path:
    """Write report.html again from result.json; its path."""
    from cohortium.common.errors import UsageError
    from cohortium.simulations.finish import rewrite_report

    if not (Path(directory) / "result.json").exists():
        raise UsageError("REPORT-RESULT", "there is no result.json here", where=(str(directory),))
    return rewrite_report(Path(directory))


def audit(directory: str | Path) -> AuditReport:
    """Recompute every epsilon, check every signature, chain and file digest, offline; `.ok`: all hold."""
    from cohortium.server.audit import audit as run_audit

    _dressed("AuditReport")
    return run_audit(Path(directory))


def analyze(
    directory: str | Path,
    *,
    mean: str | Sequence[str] = (),
    logistic: str | Sequence[str] = (),
    cox: str | Sequence[str] = (),
    replicates: int = 30,
    level: float = 0.95,
    seed: int = 0,
) -> Analyses:
    """Means, odds ratios and hazard ratios of a finished run, with intervals that count the privacy noise.

    mean: "age" or "stage=III". logistic: "death ~ age + sex + arm[control]". cox: "time, event ~ age + arm". One text
    or several of each. replicates: how often the release is replayed; level: of the intervals. Free of budget: it reads
    the run's folder and no record. Raises UsageError for a formula that the dictionary does not know.
    """
    from cohortium.server.analysis import analyze as run_analyze
    from cohortium.server.analysis import read_formulas
    from cohortium.server.runs import RunFolder

    _dressed("Analyses")
    folder = RunFolder(root=Path(directory))
    wanted = read_formulas(folder, means=_texts(mean), logistic=_texts(logistic), cox=_texts(cox))
    return run_analyze(folder, wanted, replicates=replicates, seed=seed, level=level)


def tune(
    study: Study | str | Path,
    stand_in: str | Path,
    *,
    out: str | Path,
    not_private: bool,
    objectives: str = "tvd2,auc,cpu",
    trials: int = 40,
    confirm: int = 3,
    sites: int | None = None,
    seed: int = 0,
    on_fit: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Choose generator, shares of the budget and rounds on a stand-in table, free of budget; what tune.json says.

    stand_in: a table without private records. not_private: say so; anything but True raises UsageError TUNE-DECLARE.
    out: a folder for trials, page and tuned study; the same call goes on from there. objectives: two or more of tvd1,
    tvd2, auc, cpu, exchanges, with weights as in "tvd2=2,auc". trials: of the search; confirm: fits of each finalist.
    sites: how many hospitals, None where the study names them. on_fit: is called with (what, fits done).
    Needs the extra "tune" (Optuna).
    """
    import tempfile

    from cohortium.common.errors import UsageError
    from cohortium.simulations import tune as work
    from cohortium.simulations.tune_refine import objectives as parsed

    work.refuse_private(Path(stand_in))
    if not_private is not True:
        raise UsageError(
            "TUNE-DECLARE",
            f"nobody has said that the stand-in table holds no private record. {work.PRIVATE_SELECTION}",
            where=(str(stand_in),),
            hint="not_private=True, where the table is public or was drawn from an earlier release",
        )
    with tempfile.TemporaryDirectory(prefix="cohortium-") as folder:
        request = work.Request(
            study=_on_disk(study, Path(folder)),
            stand_in=Path(stand_in),
            out=Path(out),
            objectives=parsed(objectives),
            trials=trials,
            confirm=confirm,
            sites=sites,
            seed=seed,
        )
        return work.tune(request, progress=on_fit or (lambda what, done: None))


def _dressed(name: str) -> Any:
    """A type of ours, which from now on shows itself in notebooks."""
    return globals()[name] if name in globals() else __getattr__(name)


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _on_disk(study: Study | str | Path, folder: Path) -> Path:
    """The path of a study, written into `folder` where it is one in memory."""
    if isinstance(study, str | Path):
        return Path(study)
    study.schema.save(folder / "dictionary.json")
    path = folder / "study.toml"
    path.write_text(study.to_toml(dictionary="dictionary.json"), encoding="utf-8")
    return path


def _engine(name: str) -> Any:
    import os

    # Before Flower is imported for the first time: nothing calls home.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    from cohortium.common.errors import UsageError
    from cohortium.simulations import engines

    if name not in ("in-process", "ray"):
        raise UsageError("ENGINE", f"there is no engine {name!r}", hint='engine="in-process" or engine="ray"')
    return engines.Ray() if name == "ray" else engines.InProcess()


def _run(out: Path, engine: Any, progress: bool | None, on_event: Callable[[dict[str, Any]], None] | None) -> Run:
    from cohortium.server.runs import RunFolder
    from cohortium.simulations.finish import finish
    from cohortium.simulations.run import run
    from cohortium.watching import bar

    with bar(RunFolder(root=out).plan().releases, shown=progress) as tell:

        def told(event: dict[str, Any]) -> None:
            tell(event)
            if on_event is not None:
                on_event(event)

        run(out, engine=engine, on_event=told)
        result = finish(out, progress=lambda what: tell({"event": "finish", "what": what}))
    return Run(directory=out, result=result)
