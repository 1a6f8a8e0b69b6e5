"""Docs are tests: commands parse, examples load and run, named files exist, public names are documented."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import cohortium
from cohortium.client.gate import OUTBOUND
from cohortium.client.guard import CODES
from cohortium.common.schema import KINDS, ROLES, Schema
from cohortium.common.study import GENERATORS, SERVER_STEPS, STRATEGIES, Study
from cohortium.simulations.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "simulations" / "data" / "README.md",
        ROOT / "simulations" / "data" / "omop.md",
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for name in NAMES:
        for kind, body in FENCE.findall(text(name)):
            if kind == language:
                yield name, body


def commands() -> list[tuple[str, str]]:
    """(page, line) of every shell line; backslash continuations are joined."""
    out = []
    for name, body in blocks("sh"):
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                out.append((name, line.strip()))
    return out


def inline_commands() -> list[tuple[str, str]]:
    prose = [(name, FENCE.sub("", text(name))) for name in NAMES]
    return [(name, found) for name, body in prose for found in re.findall(r"`(cohortium [^`]+)`", body)]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what follows it."""
    command: click.Command = typer.main.get_command(app)
    rest = words[1:]
    while isinstance(command, click.Group):
        assert rest, f"{' '.join(words)} names no command"
        assert rest[0] in command.commands, f"there is no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def test_there_is_something_to_test() -> None:
    assert {"README.md", "ARCHITECTURE.md", "PRIVACY.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(NAMES)
    assert len(commands()) >= 10 and len(inline_commands()) >= 8


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_shell_line_parses(page: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE)
        assert words[1] in targets, f"{page}: make has no target {words[1]!r}"
        return
    if words[0] in ("sh", "bash"):
        assert (ROOT / words[1]).is_file(), f"{page}: there is no script {words[1]!r}"
        return
    assert words[0] == "cohortium", f"{page}: a reader may not have {words[0]!r}"
    command, rest = resolve(words)
    command.make_context(words[1], rest)


@pytest.mark.parametrize(("page", "line"), inline_commands())
def test_a_command_in_prose_exists_with_its_options(page: str, line: str) -> None:
    command, rest = resolve(shlex.split(line))
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known, page


def test_every_command_is_in_the_readme() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    for name, command in root.commands.items():
        for sub in command.commands if isinstance(command, click.Group) else [""]:
            wanted = f"cohortium {name} {sub}".strip()
            assert wanted in text("README.md") or (name == "demo" and "make demo" in text("README.md")), wanted


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+?)\)", FENCE.sub("", text(name))):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_files_that_are_named_exist() -> None:
    folders = "cohortium|common|strategies|client|server|simulations|tests|docs"
    for name in NAMES:
        named = re.findall(rf"`((?:{folders})/[\w/.-]*\.\w+)`", text(name))
        for path in named:
            assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize(("page", "body"), list(blocks("json")))
def test_a_dictionary_example_loads(page: str, body: str) -> None:
    schema = Schema.from_dict(json.loads(body), where=page)
    assert schema.modelled and Schema.from_dict(schema.to_dict()).digest() == schema.digest()


@pytest.mark.parametrize(("page", "body"), list(blocks("toml")))
def test_a_study_example_loads_and_plans(page: str, body: str, tmp_path: Path) -> None:
    example = next(body for name, body in blocks("json") if name == "docs/dictionary.md")
    (tmp_path / "dictionary.json").write_text(example, encoding="utf-8")
    study = Study.parse(body, where=page, folder=tmp_path)
    made = cohortium.plan(study, sites=study.sites or 2)
    assert made.price() <= study.privacy.epsilon


def test_every_key_of_the_study_is_documented() -> None:
    files = ("study_file", "study_evaluation", "study_release")
    keys = {
        node.value
        for file in files
        for call in ast.walk(ast.parse(text(f"common/{file}.py")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "only"
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    keys |= {"survivors", "colluders", "local_steps", "server_step", "fedprox_mu"}
    page = text("docs/study-file.md")
    assert len(keys) > 20
    for key in keys:
        assert f"`{key}`" in page or f"## [{key}]" in page, key
    for value in (*GENERATORS, *STRATEGIES, *SERVER_STEPS):
        assert f'"{value}"' in page, value


def test_every_kind_and_role_of_the_dictionary_is_documented() -> None:
    page = text("docs/dictionary.md")
    for word in (*KINDS, *ROLES[1:]):
        assert f"`{word}`" in page, word


def test_every_message_and_every_check_is_documented() -> None:
    architecture, privacy = text("ARCHITECTURE.md"), text("PRIVACY.md")
    for kind in OUTBOUND:
        assert f"`{kind}`" in architecture, kind
    checks = re.findall(r'report\.add\(\s*f?"([^"{ ]+)', text("server/audit.py"))
    assert len(checks) >= 10
    for check in checks:
        assert re.search(rf"^\| `{re.escape(check)}", privacy, re.MULTILINE), check
    for code in re.findall(r"`([A-Z]+(?:-[A-Z]+)+)`", privacy):
        assert code in CODES.values(), code


def test_the_diagram_is_well_formed_and_says_itself_in_words() -> None:
    from xml.etree import ElementTree

    root = ElementTree.parse(ROOT / "docs" / "walk.svg").getroot()
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert {"title", "desc", "text"} <= names and not names & {"script", "foreignObject", "image"}


def test_the_public_api_is_in_the_readme() -> None:
    page = text("README.md")
    for name in cohortium.__all__:
        assert f"`{name}`" in page, name


def test_the_version_has_a_changelog_entry() -> None:
    assert f"## {cohortium.__version__}\n" in text("CHANGELOG.md")


def test_the_secure_sum_examples_of_t() -> None:
    """The numbers in docs/secure-sum.md are those that the code accepts."""
    from cohortium.common.errors import StudyError
    from cohortium.common.study import StrategySpec

    assert "3 of 5 with c = 0, 4 of 5 with c = 1 or 2" in text("docs/secure-sum.md")
    for colluders, smallest in ((0, 3), (1, 4), (2, 4)):
        StrategySpec(name="secure-sum", survivors=smallest, colluders=colluders).check_sites(5)
        with pytest.raises(StudyError):
            StrategySpec(name="secure-sum", survivors=smallest - 1, colluders=colluders).check_sites(5)


def test_the_readme_block_of_python_runs_and_its_folder_is_as_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with the mixture instead of DP-SGD, to be quick; the block itself is the README's."""
    ((page, body),) = blocks("python")
    assert page == "README.md"
    (tmp_path / "simulations" / "scenarios").mkdir(parents=True)
    (tmp_path / "simulations" / "data").symlink_to(ROOT / "simulations" / "data")
    demo = text("simulations/scenarios/demo.toml")
    quick = re.sub(r'^name = "joined"', 'name = "mixture"', demo, flags=re.MULTILINE)
    (tmp_path / "simulations" / "scenarios" / "demo.toml").write_text(quick, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(body, page, "exec"), {})

    described = text("ARCHITECTURE.md")
    skip = (".lock", "-wal", "-shm")
    result = tmp_path / "result"
    for folder in (result, result / "run", next((result / "sites").iterdir())):
        for path in folder.iterdir():
            if not path.name.endswith(skip):
                assert path.name in described, f"{path.relative_to(result)} is not in ARCHITECTURE.md"
