"""Choosing without cheating: whatever is chosen before the first answer follows from public facts alone.

Read off the source: code that chooses takes no records, opens nothing and remembers nothing. By behaviour: two
worlds with the same public facts and different records compile to the same plan, byte for byte. Each with bugs planted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import make_quick, small_study, small_table

from cohortium.common import registry
from cohortium.common.errors import StudyError
from cohortium.common.generators.base import Facts, Phase
from cohortium.common.study import GeneratorSpec, Study
from cohortium.server.planning import facts_of, plan_for

ROOT = Path(__file__).resolve().parents[2]
CHOOSERS = ("common.registry", "server.planning", "common.evaluation.phases", "common.privacy.plan")
ROOTS = (
    ("common.registry", "choose"),
    ("common.registry", "generator"),
    ("server.planning", "plan_for"),
    ("server.planning", "facts_of"),
    ("server.runs", "settings_of"),
)
PUBLIC = frozenset(
    {
        *("Facts", "Study", "Schema", "Column", "Grid", "Shares", "Phase", "PhaseLike", "EvaluationPhase", "Generator"),
        *("EvaluationSpec", "Evaluation", "AnalysisSpec", "Part", "Kind", "P", "SurvivalSpec"),
        *("str", "int", "float", "bool", "None", "Mapping", "Sequence", "Iterable", "tuple", "dict", "list", "Any"),
    }
)
"""What an argument of code that chooses may be: the agreement, the dictionary, numbers and names."""
READS = re.compile(
    r"open|read\w*|load\w*|fetch\w*|records|checked|connect|execute|query|urlopen|getenv|environ|ask|Path|glob|iterdir"
    r"|random|default_rng|monotonic|now|today|globals|getattr|__import__|import_module|exec|eval"
)
Sources = Mapping[str, str]


def sources() -> Sources:
    files = [*(ROOT / "common").rglob("*.py"), *(ROOT / "server").glob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f.read_text(encoding="utf-8") for f in files}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def defined(source: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module, methods as Class.method; the last definition of a name counts."""
    out: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for node in parsed(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out[node.name] = node
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{item.name}": item for item in node.body if isinstance(item, ast.FunctionDef)}
    return out


def imported(source: str) -> dict[str, tuple[str, str]]:
    """Name here -> (module, name there) of what comes from the package, also inside functions."""
    return {
        (alias.asname or alias.name): ((node.module or "").removeprefix("cohortium."), alias.name)
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cohortium.")
        for alias in node.names
    }


def choosing(modules: Sources) -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Every function that a choice before the first answer can reach: (module, name, function)."""
    generators = [m for m in modules if m.startswith("common.generators.")]
    todo = list(ROOTS)
    for module in generators:
        names = defined(modules[module])
        todo += [(module, n) for n in names if n.endswith(".phases") and not n.startswith("Generator.")]
        todo += [(module, n) for n in names if n.endswith(".__init__") and f"{n.split('.')[0]}.phases" in names]
    seen = set()
    while todo:
        module, name = todo.pop()
        if (module, name) in seen or module not in modules:
            continue
        seen.add((module, name))
        node = defined(modules[module]).get(name)
        if not isinstance(node, ast.FunctionDef):
            continue
        yield module, name, node
        here, known = imported(modules[module]), defined(modules[module])
        for call in ast.walk(node):
            if not isinstance(call, ast.Call):
                continue
            called = call.func
            if isinstance(called, ast.Name) and called.id in known:
                todo.append((module, called.id))
            elif isinstance(called, ast.Name) and called.id in here:
                where, there = here[called.id]
                if where in (*CHOOSERS, "server.runs") or where in generators:
                    todo.append((where, there))
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
                todo.append((module, f"{name.split('.')[0]}.{called.attr}"))


def cheats(modules: Sources) -> list[str]:
    """What in the code that chooses could look at records, in words."""
    found = []
    for module, name, node in choosing(modules):
        place = f"{module}.{name}"
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if argument.arg == "self":
                continue
            kinds = set(re.findall(r"[A-Za-z_]\w*", ast.unparse(argument.annotation) if argument.annotation else "?"))
            if not argument.annotation or kinds - PUBLIC:
                found.append(f"{place} takes {argument.arg}: {' '.join(sorted(kinds - PUBLIC)) or 'anything'}")
        top = parsed(modules[module]).body
        # What a module may remember: its constants never change. Anything else at its top could carry a count.
        state = {
            target.id
            for line in top
            if isinstance(line, ast.Assign | ast.AnnAssign)
            for target in (line.targets if isinstance(line, ast.Assign) else [line.target])
            if isinstance(target, ast.Name) and not target.id.isupper() and target.id not in PUBLIC
        }
        changed = {n for g in ast.walk(parsed(modules[module])) if isinstance(g, ast.Global) for n in g.names}
        for inner in ast.walk(node):
            word = inner.id if isinstance(inner, ast.Name) else inner.attr if isinstance(inner, ast.Attribute) else ""
            if READS.fullmatch(word):
                found.append(f"{place} uses {word}")
            if isinstance(inner, ast.Name) and inner.id in state | changed:
                found.append(f"{place} remembers {inner.id}")
            if isinstance(inner, ast.Import | ast.ImportFrom) and not _harmless(inner):
                found.append(f"{place} imports {ast.unparse(inner)}")
    return sorted(set(found))


def _harmless(line: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(line, ast.ImportFrom) and (line.module or "").startswith("cohortium.common.")


def test_what_is_chosen_takes_public_facts_and_reads_nothing() -> None:
    assert cheats(sources()) == []


def test_the_search_reaches_every_choice() -> None:
    reached = {f"{module}.{name}" for module, name, _ in choosing(sources())}
    wanted = {
        *("common.registry.choose", "common.registry.generator", "server.planning.facts_of"),
        *("common.generators.mixture.Mixture.phases", "common.generators.joined.Joined.phases"),
        *("common.generators.autoregressive.dp_steps", "common.generators.autoregressive.hidden_for"),
        *("common.generators.measure.measuring_phases", "common.generators.measure.bins_per_column"),
        *("common.generators.measure.target_classes", "common.generators.three_way.classes"),
        *("common.generators.agreed.with_shares", "common.privacy.plan.compile_plan"),
        "common.evaluation.phases.evaluation_phases",
    }
    assert wanted <= reached


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("common.registry", "def choose(facts, records):\n    return 'joined'"),
        ("common.registry", "def choose(facts: Facts, table: pd.DataFrame) -> str:\n    return 'joined'"),
        ("common.registry", "def choose(facts: Facts) -> str:\n    return 'a' if len(read('t.csv')) > 9 else 'b'"),
        ("common.registry", "def choose(facts: Facts) -> str:\n    import pandas\n    return 'mixture'"),
        ("common.registry", "seen = [0]\ndef choose(facts: Facts) -> str:\n    return 'a' if seen[0] > 9 else 'b'"),
        ("server.planning", "def facts_of(study: Study, sites: int, rows: Records) -> Facts:\n    return Facts()"),
        ("server.planning", "def facts_of(study: Study, sites: int) -> Facts:\n    return Path('n').open()"),
        ("common.generators.mixture", "def shares_for(facts: Facts, measured: Measured) -> Shares:\n    return 1"),
        ("common.generators.autoregressive", "def dp_steps(facts: Facts, ask: Ask) -> int:\n    return 1"),
        ("common.generators.autoregressive", "def hidden_for(facts: Facts) -> int:\n    return ask('rows')"),
        (
            "common.generators.measure",
            "N = 0\ndef f():\n    global N\ndef most_bins(facts: Facts) -> int:\n    return N",
        ),
    ],
)
def test_a_choice_that_looks_is_found(module: str, code: str) -> None:
    """The test's own power: one more definition in a module, which replaces the one before, and it is red."""
    modules = dict(sources())
    modules[module] += "\n" + code + "\n"
    assert cheats(modules)


def test_a_generator_is_handed_questions_and_no_records() -> None:
    wanted = ["self", "ask", "schema", "grids", "facts", "settings", "progress"]
    for module, source in sources().items():
        if not module.startswith("common.generators."):
            continue
        for name, node in defined(source).items():
            if name.endswith(".fit") and isinstance(node, ast.FunctionDef):
                assert [a.arg for a in [*node.args.args, *node.args.kwonlyargs]] == wanted, f"{module}.{name}"


# ---- by behaviour -------------------------------------------------------------------------------------------


def other_records(table: pd.DataFrame) -> pd.DataFrame:
    """Another world of the same dictionary: half as many patients, all old, one grade."""
    out = table.iloc[: len(table) // 2].copy()
    out["age"], out["grade"], out["smoker"] = 90, 2, pd.array(np.ones(len(out), dtype=bool), dtype="boolean")
    return out


def compiled(folder: Path, table: pd.DataFrame, **study: Any) -> bytes:
    """plan.json of a whole simulation prepared on this table."""
    from cohortium.simulations.run import Request, prepare

    path, data = small_study(folder, table=table, **study)
    prepare(Request(study=path, table=data, split="iid:3", out=folder / "out", seed=1))
    return (folder / "out" / "plan.json").read_bytes()


@pytest.mark.parametrize("name", ["auto", "mixture", "joined", "autoregressive"])
def test_two_worlds_with_the_same_public_facts_have_the_same_plan(name: str, tmp_path: Path) -> None:
    first = compiled(tmp_path / "a", small_table(80), generator=name)
    assert first == compiled(tmp_path / "b", other_records(small_table(80, seed=9)), generator=name)


@pytest.mark.parametrize("planted", ["rows counted", "levels seen", "remembered"])
def test_a_choice_by_private_data_gives_the_two_worlds_away(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cohortium.simulations import run as simulation

    seen: list[pd.DataFrame] = []
    read = simulation.read

    def reads(place: Path) -> pd.DataFrame:
        seen.append(read(place))
        return seen[-1]

    def cheating(facts: Facts) -> str:
        looked = {"rows counted": len(seen[-1]) > 60, "levels seen": seen[-1]["grade"].nunique() > 1}
        return "joined" if looked.get(planted, len(seen) > 1) else "mixture"

    monkeypatch.setattr(simulation, "read", reads)
    monkeypatch.setattr(registry, "choose", cheating)
    first = compiled(tmp_path / "a", small_table(80), generator="auto")
    assert first != compiled(tmp_path / "b", other_records(small_table(80, seed=9)), generator="auto")


def test_a_fit_leaves_nothing_behind_that_the_next_plan_could_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cohortium.simulations.pooled import fit_pooled

    make_quick(monkeypatch.setattr)
    study = Study.load(small_study(tmp_path)[0])
    plan = plan_for(study, ["a", "b", "c"])[0]
    fit_pooled(study, plan, small_table(300), seed=1)
    assert plan_for(study, ["a", "b", "c"])[0].to_json() == plan.to_json()


def test_settings_of_a_fit_come_from_the_study(tmp_path: Path) -> None:
    from cohortium.server.runs import settings_of

    one, _ = small_study(tmp_path / "a", table=small_table(80))
    two, _ = small_study(tmp_path / "b", table=other_records(small_table(80)))
    assert settings_of(Study.load(one), seed=3) == settings_of(Study.load(two), seed=3)
    assert facts_of(Study.load(one), 3)[0] == facts_of(Study.load(two), 3)[0]


# ---- what a study may set instead ---------------------------------------------------------------------------


def study_with(folder: Path, line: str, **settings: Any) -> Study:
    path, _ = small_study(folder, **settings)
    text = path.read_text().replace('name = "joined"', f'name = "joined"\n{line}')
    path.write_text(text)
    return Study.load(path)


def test_shares_are_part_of_the_signed_plan(tmp_path: Path) -> None:
    sites = ["a", "b", "c"]
    rule = plan_for(study_with(tmp_path / "a", "", generator="joined", rounds=4), sites)[0]
    study = study_with(tmp_path / "b", "shares = {pairs = 0.6, train = 0.2}", generator="joined", rounds=4)
    set_ = plan_for(study, sites)[0]
    assert set_.digest != rule.digest and set_.study_digest != rule.study_digest
    noise = {s.name: s.noise_multiplier for s in set_.stages}
    public = {s.name: s.noise_multiplier for s in rule.stages}
    assert noise["pairs"] < public["pairs"] and noise["train"] > public["train"]
    assert noise["ranges"] > public["ranges"] and set_.price() <= study.privacy.epsilon
    assert Study.parse(study.to_toml(dictionary=str(tmp_path / "b" / "dictionary.json"))).digest() == study.digest()


def test_an_older_study_keeps_its_digest() -> None:
    assert GeneratorSpec(name="auto").facts() == {"name": "auto"}


def test_the_phases_that_are_not_named_keep_their_proportions(tmp_path: Path) -> None:
    facts, _ = facts_of(Study.load(small_study(tmp_path)[0]), 3)
    rule = registry.generator("joined", facts).phases(facts)
    phases = registry.generator("joined", facts, shares={"train": 0.5}).phases(facts)
    scale = {p.share / r.share for p, r in zip(phases, rule) if p.name != "train"}
    assert max(scale) - min(scale) < 1e-12 and sum(p.share for p in phases) == pytest.approx(1.0)
    assert next(p.share for p in phases if p.name == "train") == 0.5


def test_a_generator_fits_with_the_shares_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `fit` a generator asks itself for its phases: it must see the agreed ones."""
    from cohortium.common.generators import mixture

    seen: list[tuple[Phase, ...]] = []

    class Enough(Exception):
        pass

    def spy(ask: Any, **said: Any) -> Any:
        seen.append(said["phases"])
        raise Enough

    monkeypatch.setattr(mixture, "measure", spy)
    facts, made = facts_of(Study.load(small_study(tmp_path)[0]), 3)
    chosen = registry.generator("mixture", facts, shares={"pairs": 0.7})
    with pytest.raises(Enough):
        chosen.fit(None, schema=None, grids=made, facts=facts, settings=None)  # type: ignore[arg-type]
    assert next(p.share for p in seen[0] if p.name == "pairs") == 0.7


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("shares = {weather = 0.5}", "STUDY-SHARES"),
        ("shares = {ranges = 0.2, grain = 0.2, bins = 0.2, pairs = 0.2, train = 0.1}", "STUDY-SHARES"),
        ("shares = {pairs = 0.6, train = 0.6}", "STUDY-VALUE"),
        ("shares = {pairs = 0.0}", "STUDY-VALUE"),
        ("shares = {pairs = 1.0}", "STUDY-SHARES"),
        ("shares = 0.3", "STUDY-TYPE"),
        ('tuned_on = "a table"', "STUDY-VALUE"),
        ("hidden = 3", "STUDY-UNKNOWN"),
    ],
)
def test_a_bad_setting_is_an_error_with_its_fix(line: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as error:
        plan_for(study_with(tmp_path, line, generator="joined"), ["a", "b", "c"])
    assert error.value.code == code and error.value.hint
