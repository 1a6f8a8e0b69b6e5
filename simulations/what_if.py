"""`cohortium what-if`: what a study would be worth at several ε, learned from a stand-in table, free of budget.

For each ε the study's plan is compiled, fitted to the stand-in with the noise that all hospitals together would add,
sampled and scored on patients that nothing was learned from (tune_trial.py). Each repetition cuts the stand-in anew
and draws fresh noise; all ε of a repetition share its cut, and so do the two references: the stand-in's own rows,
and the same with each column shuffled by itself.

    OUT/request.json fits.jsonl     what was asked; every fit, a line each: the same command goes on from there
    OUT/what-if.json what-if.html   the curve, for programs and for people
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cohortium.common.errors import Refused, StudyError, UsageError
from cohortium.common.study import LARGEST_EPSILON, Study
from cohortium.server.console import curve
from cohortium.server.planning import plan_for
from cohortium.simulations import tune
from cohortium.simulations.tune_trial import Cut, evaluate, fold
from cohortium.simulations.worlds import Split, split

FORMAT = 1
EPSILONS = (0.5, 1.0, 3.0, 10.0)
MOST_EPSILONS, MOST_SEEDS = 12, 50
SCORES = ("tvd2", "auc")
FILES = ("what-if.json", "what-if.html")
SAYS = (
    "Learned from a stand-in table, not from your hospitals' patients: how good the study will be depends on how like "
    "them the stand-in is. No hospital was asked and no budget was spent."
)
SHUFFLED = "shuffled"

Progress = Callable[[str, int, int], None]
"""(what is next or was done, fits done, fits in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to try. table: the stand-in. split: as of `simulate`; only the number of its sites counts, None takes the
    study's own. seeds: repetitions of each ε."""

    study: Path
    table: Path
    out: Path
    split: str | None = None
    epsilons: tuple[float, ...] = EPSILONS
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        fine = all(math.isfinite(e) and 0 < e <= LARGEST_EPSILON for e in self.epsilons)
        if not fine or not 1 <= len(self.epsilons) <= MOST_EPSILONS or len(set(self.epsilons)) < len(self.epsilons):
            raise UsageError(
                "WHAT-IF-EPSILONS",
                f"1 to {MOST_EPSILONS} different ε above 0 and at most {LARGEST_EPSILON:g} are needed",
                hint="--epsilons 0.5 1 3 10",
            )
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UsageError("WHAT-IF-SEEDS", f"1 to {MOST_SEEDS} repetitions", hint="--seeds 3")


def refuse_private(table: Path) -> None:
    """Refused WHAT-IF-PRIVATE for a table in a hospital's folder or among the sites of a run. Opens no table."""
    try:
        tune.refuse_private(table)
    except Refused as error:
        raise Refused(
            "WHAT-IF-PRIVATE",
            "that table lies in a hospital's folder: it is no stand-in. Choosing ε by looking at private records is a "
            "look at them, which nobody would have paid for",
            where=error.where,
            hint=error.hint,
        ) from None


def what_if(
    request: Request, *, progress: Progress = lambda what, done, of: None, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Fit, score, write OUT; the result as in what-if.json.

    Raises tune.Interrupted where `stop` says so between two fits; the same request goes on where it stood.
    Raises CohortiumError with the fix; an ε that makes no plan is named in the result, unless none does.
    """
    refuse_private(request.table)
    study = Study.load(request.study)
    if study.strategy.local_steps > 1:
        raise StudyError(
            "WHAT-IF-LOCAL",
            "several local steps a round cannot be tried on one table: each hospital would make its own",
            where=(str(request.study),),
            hint="[strategy] local_steps = 1, or compare whole runs: cohortium simulate",
        )
    table, digest = tune._stand_in(study, request.table)
    sites = _sites(study, request, table)
    work = _Work(request, study, sites, table, digest)
    work.run(progress, stop)
    return work.write()


def at_epsilon(study: Study, epsilon: float) -> Study:
    """The same study with another budget. The held-out patients' part is cut to it where it would be more."""
    evaluation = study.evaluation
    if evaluation is not None and evaluation.epsilon > epsilon:
        evaluation = dataclasses.replace(evaluation, epsilon=epsilon)
    return dataclasses.replace(
        study, privacy=dataclasses.replace(study.privacy, epsilon=epsilon), evaluation=evaluation
    )


def shuffled(table: pd.DataFrame, *, unit: str, seed: int) -> pd.DataFrame:
    """Each column in an order of its own: right shares, no relations. What a table without any relation scores."""
    rng = np.random.default_rng([seed, 0x7368])
    out = {
        name: table[name].array if name == unit else table[name].array[rng.permutation(len(table))] for name in table
    }
    return pd.DataFrame(out, index=table.index)


def _sites(study: Study, request: Request, table: pd.DataFrame) -> tuple[str, ...]:
    if request.split is None:
        if not study.sites:
            raise StudyError(
                "STUDY-SITES", "the study does not name its sites", where=(str(request.study),), hint="--split iid:5"
            )
        return study.sites
    how = Split.parse(request.split)
    if how.kind == "by":
        return tuple(sorted(split(table, how, unit=study.privacy.unit)))
    return tuple(f"site-{i + 1:03d}" for i in range(how.sites))


class _Work:
    """A curve under way: fits.jsonl is the truth, all else is computed from it."""

    def __init__(
        self, request: Request, study: Study, sites: tuple[str, ...], table: pd.DataFrame, digest: str
    ) -> None:
        self.request, self.study, self.sites, self.table, self.digest = request, study, sites, table, digest
        self.auc = study.target is not None
        self.auc_reason = "" if self.auc else "the study names no target"
        self._begin()
        self.lines = _read_lines(request.out / "fits.jsonl")
        for line in self.lines:
            if "no_auc" in line:
                self.auc, self.auc_reason = False, str(line["no_auc"])

    def _begin(self) -> None:
        out, request = self.request.out, self.request
        facts = {
            "format": FORMAT,
            "study": self.study.digest(),
            "stand_in": self.digest,
            "sites": len(self.sites),
            "epsilons": sorted(request.epsilons),
            "seeds": request.seeds,
            "seed": request.seed,
        }
        place = out / "request.json"
        if place.exists():
            if json.loads(place.read_text(encoding="utf-8")) != facts:
                raise UsageError(
                    "WHAT-IF-OUT",
                    "that folder holds the curve of another study, stand-in, ε, split or seeds",
                    where=(str(out),),
                    hint="another --out, or the same request again to go on",
                )
            return
        if out.exists() and any(out.iterdir()):
            raise UsageError("WHAT-IF-OUT", "the folder is not empty", where=(str(out),), hint="choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def run(self, progress: Progress, stop: Callable[[], bool]) -> None:
        """Repetition after repetition, so that a first curve is there early."""
        epsilons = sorted(self.request.epsilons)
        done = {(line["turn"], line["epsilon"]) for line in self.lines if "epsilon" in line}
        refused = {line["epsilon"] for line in self.lines if "refused" in line}
        total, count = self.request.seeds * (len(epsilons) + 1), 0
        for turn in range(self.request.seeds):
            cut: Cut | None = None
            for epsilon in (SHUFFLED, *epsilons):
                count += 1
                if (turn, epsilon) in done or epsilon in refused:
                    continue
                if stop():
                    raise tune.Interrupted(count - 1)
                name = "the references" if epsilon == SHUFFLED else f"ε = {epsilon:g}"
                progress(f"repetition {turn + 1}, {name}", count - 1, total)
                if cut is None:
                    cut = Cut.make(self.study, self.table, seed=fold(self.request.seed, "cut", turn))
                line = self._fit(cut, turn, epsilon)
                if "refused" in line:
                    refused.add(epsilon)
                self._keep(line)
        if not any("scores" in line and line["epsilon"] != SHUFFLED for line in self.lines):
            first = next(line["refused"] for line in self.lines if "refused" in line)
            raise Refused(first["error"], first["sentence"], where=tuple(first["where"]), hint=first["fix"])
        progress("done", total, total)

    def _fit(self, cut: Cut, turn: int, epsilon: Any) -> dict[str, Any]:
        """One line of fits.jsonl."""
        line: dict[str, Any] = {"turn": turn, "epsilon": epsilon}
        seed = fold(self.request.seed, "fit", turn, epsilon)
        if epsilon == SHUFFLED:
            line["patients"] = int(cut.learned.patients)
            mixed = shuffled(cut.real, unit=self.study.privacy.unit, seed=seed)
            return {**line, "scores": self._scored(lambda auc: cut.score(self.study, mixed, auc=auc, seed=seed))}
        study = at_epsilon(self.study, epsilon)
        try:
            plan, _, _ = plan_for(study, self.sites)
        except (Refused, StudyError) as why:
            return {**line, "refused": why.as_json()}
        line["generator"] = plan.generator
        return {**line, "scores": self._scored(lambda auc: evaluate(study, self.sites, cut, auc=auc, seed=seed))}

    def _scored(self, score: Callable[[bool], dict[str, float]]) -> dict[str, float]:
        try:
            return score(self.auc)
        except UsageError as why:
            if why.code != "TUNE-OBJECTIVE" or not self.auc:
                raise
            # The target cannot be predicted on this stand-in: the curve is of tvd2 alone, and says so.
            self.auc, self.auc_reason = False, why.sentence
            self._keep({"turn": 0, "no_auc": why.sentence})
            return score(False)

    def _keep(self, line: dict[str, Any]) -> None:
        """On disk before the next fit starts."""
        with (self.request.out / "fits.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        replace_file(self.request.out / "what-if.json", json.dumps(self.result(), indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        """The curve as far as it is known; `finished` once every fit was made."""
        scored = [line for line in self.lines if "scores" in line]
        names = [name for name in SCORES if name != "auc" or self.auc]
        whole = {SHUFFLED, *self.request.epsilons}
        refused = {line["epsilon"]: line["refused"] for line in self.lines if "refused" in line}
        made = {(line["turn"], line["epsilon"]) for line in scored}
        wanted = {(turn, e) for turn in range(self.request.seeds) for e in whole if e not in refused}
        points = []
        for epsilon in sorted(self.request.epsilons):
            fits = [line for line in scored if line["epsilon"] == epsilon]
            if fits:
                points.append(
                    {
                        "epsilon": epsilon,
                        "generator": fits[-1]["generator"],
                        "fits": len(fits),
                        "scores": {name: _mean(fit["scores"].get(name) for fit in fits) for name in names},
                    }
                )
        references = [line for line in scored if line["epsilon"] == SHUFFLED]
        return {
            "format": FORMAT,
            "finished": made >= wanted,
            "study": self.study.id,
            "study_digest": self.study.digest(),
            "stand_in": {"file": self.request.table.name, "sha256": self.digest, "rows": len(self.table)},
            "columns": len(self.study.schema.modelled),
            "patients": references[0]["patients"] if references else None,
            "sites": len(self.sites),
            "mode": self.study.strategy.name,
            "seeds": self.request.seeds,
            "points": points,
            "references": {
                name: {
                    "real": _mean(line["scores"].get(f"real_{name}") for line in references),
                    SHUFFLED: _mean(line["scores"].get(name) for line in references),
                }
                for name in names
            },
            "refused": [{"epsilon": epsilon, **why} for epsilon, why in sorted(refused.items())],
            "no_auc": self.auc_reason,
            "says": SAYS,
        }

    def write(self) -> dict[str, Any]:
        result, out = self.result(), self.request.out
        replace_file(out / "what-if.json", json.dumps(result, indent=1) + "\n")
        replace_file(out / "what-if.html", curve.page(result, marked=self.study.privacy.epsilon))
        return {**result, "files": {name: str(out / name) for name in FILES}}


def replace_file(path: Path, text: str) -> None:
    """Whoever reads at the same time sees the old text or the new, never half of one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """What is whole of a file of lines; a last line that a crash tore off is taken away, and its fit made again."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _mean(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """Mean with its 95 % t interval over repetitions; no interval of a single one, None of none."""
    known: Sequence[float] = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) < 2:
        return {"mean": round(mean, 5), "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    # Both scores lie from 0 to 1, and so does what they can mean.
    return {"mean": round(mean, 5), "low": round(max(mean - half, 0.0), 5), "high": round(min(mean + half, 1.0), 5)}


__all__ = ["EPSILONS", "Request", "at_epsilon", "refuse_private", "shuffled", "what_if"]
