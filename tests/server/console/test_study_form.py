"""The form and the file say the same; no field writes another line; drafts are kept as they were typed."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path

import pytest
from small import DICTIONARY, small_study

from cohortium.common.errors import Refused, StudyError, UsageError
from cohortium.common.study import Study
from cohortium.server.console.pages.studies import with_epsilon
from cohortium.server.console.previews import FILE
from cohortium.server.console.study_form import EMPTY, FIELDS, Drafts, stated, toml_of, values_of

FULL = {
    **EMPTY,
    "id": "small",
    "title": 'What "it" is for: ε \\ 1',
    "target": "smoker",
    "patients": "100",
    "rows_per_patient": "2",
    "exclude": "dose, seen",
    "epsilon": "3.0",
    "delta": "1e-6",
    "unit": "id",
    "adjacency": "add-remove",
    "hospitals_per_patient": "1",
    "strategy": "secure-sum",
    "survivors": "2",
    "colluders": "0",
    "evaluation_epsilon": "1",
    "holdout": "0.2",
    "rows": "60",
    "sites": "a, b, c",
}


def loaded(folder: Path, values: dict[str, str]) -> Study:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(DICTIONARY))
    return Study.parse(toml_of(values), folder=folder)


def test_what_is_typed_is_the_study(tmp_path: Path) -> None:
    study = loaded(tmp_path, FULL)
    assert (study.id, study.title, study.target, study.patients) == ("small", FULL["title"], "smoker", 100)
    assert (study.privacy.epsilon, study.privacy.delta, study.privacy.unit) == (3.0, 1e-6, "id")
    assert (study.strategy.survivors, study.strategy.colluders, study.sites) == (2, 0, ("a", "b", "c"))
    assert study.evaluation is not None and (study.evaluation.epsilon, study.evaluation.holdout) == (1.0, 0.2)
    assert study.exclude == ("dose", "seen") and study.rows_per_patient == 2 and study.release.rows == 60


@pytest.mark.parametrize(
    "name",
    [f.name for f in FIELDS if f.section in ("privacy", "strategy") and FULL.get(f.name)] + ["holdout", "rows"],
)
def test_no_setting_of_privacy_has_a_default(tmp_path: Path, name: str) -> None:
    assert EMPTY[name] == ""
    with pytest.raises(StudyError) as error:
        loaded(tmp_path, {**FULL, name: ""})
    assert error.value.code == "STUDY-MISSING" and error.value.where[0].startswith("study.toml")


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
@pytest.mark.parametrize(
    "text",
    [
        "1\n[release]\nrows = 1",
        '1"\nepsilon = 99',
        "1 # ",
        "'''",
        '"""',
        "\\",
        "{a = 1}",
        "[1]",
        "0x10",
        "true",
        "1_000",
        "1979-05-27",
        "\x00\x1b[2J\u202e",
        "9" * 40,
        "nan",
        "-0.0e-400",
    ],
)
def test_no_field_writes_another_line(field: object, text: str) -> None:
    """Whatever is typed into one field, the others say what they said, and this one says it as a text or a number."""
    name = field.name  # type: ignore[attr-defined]
    section, key = field.section, field.key  # type: ignore[attr-defined]
    plain, data = tomllib.loads(toml_of(FULL)), tomllib.loads(toml_of({**FULL, name: text}))
    said = data.get(section, {}).pop(key, None)
    plain.get(section, {}).pop(key, None)
    if name == "strategy":  # settings of another trust mode are left out
        for part in (plain, data):
            part["strategy"].pop("survivors", None)
            part["strategy"].pop("colluders", None)
    assert {k: v for k, v in data.items() if v} == {k: v for k, v in plain.items() if v}
    assert said is None or isinstance(said, str | list) or (isinstance(said, int | float) and text[0] in "-0123456789")
    assert not isinstance(said, bool)


def test_a_file_that_the_form_can_say_comes_back(tmp_path: Path) -> None:
    text = toml_of(FULL)
    values = values_of(text)
    assert values is not None and tomllib.loads(toml_of(values)) == tomllib.loads(text)
    path, _ = small_study(tmp_path / "s", epsilon=3.0)
    assert values_of(path.read_text()) is not None
    local, _ = small_study(tmp_path / "l", strategy="local", more="local_steps = 2", generator="autoregressive")
    found = values_of(local.read_text())
    assert found is not None and found["local_steps"] == "2" and found["survivors"] == ""


@pytest.mark.parametrize(
    "more",
    [
        "[evaluation.thresholds]\ncolumns = [0.1, 0.2]\n",
        "[generator.shares]\nbins = 0.5\n",
        "[strange]\na = 1\n",
        "[a.a.a.a]\n",
        "not toml",
        "x = " + "[" * 5000,
        "[a]\n" + "a." * 40_000 + "b = 1",
    ],
)
def test_a_file_that_says_more_stays_a_file(more: str) -> None:
    began = time.monotonic()
    assert values_of(toml_of(FULL) + more) is None
    assert time.monotonic() - began < 1.0


def test_a_site_with_a_comma_is_not_two() -> None:
    assert values_of(toml_of(FULL).replace('"b"', '"b,c"')) is None


def test_another_epsilon_and_nothing_else() -> None:
    text = toml_of(FULL) + "\n[evaluation.thresholds]\nepsilon = 4\n"
    changed = with_epsilon(text, 0.5)
    assert stated(changed, "privacy", "epsilon") == 0.5 and stated(changed, "evaluation", "epsilon") == 1
    assert changed.replace("epsilon = 0.5", "epsilon = 3.0") == text
    trap = 'a = """\n[privacy]\nepsilon = 1\n"""\n' + toml_of(FULL)
    assert with_epsilon(trap, 7.0) == trap, "never another line than the setting"
    assert with_epsilon("not toml", 7.0) == "not toml"
    assert with_epsilon('x = """\n[' + " " * 90_000 + '\n"""', 7.0)


# ---- drafts -------------------------------------------------------------------------------------------------


@pytest.fixture
def drafts(tmp_path: Path) -> Drafts:
    return Drafts(tmp_path / "studies", clock=lambda: 1000.0)


def test_a_draft_is_kept_as_it_was_typed(drafts: Drafts) -> None:
    text = "[study]\nid = 'stroke'\n# not done yet\r\n"
    made = drafts.save(text, "{ not even json", by="ada")
    assert drafts.draft("stroke") == made and (made.study, made.dictionary) == (text, "{ not even json")
    assert (made.by, made.at, made.title) == ("ada", 1000.0, "")
    assert (drafts.root / "stroke").stat().st_mode & 0o077 == 0
    assert [draft.name for draft in drafts.all()] == ["stroke"]
    drafts.remove("stroke")
    assert drafts.all() == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "x" * 65, ".", "a\nb", "ä"])
def test_a_draft_without_a_usable_name(drafts: Drafts, name: str) -> None:
    with pytest.raises(UsageError) as error:
        drafts.save(f"[study]\nid = {json.dumps(name)}\n", "", by="ada")
    assert error.value.code == "DRAFT-NAME" and not drafts.root.exists()
    with pytest.raises(Refused):
        drafts.draft(name)


def test_nobody_writes_over_somebodys_draft(drafts: Drafts) -> None:
    text = "[study]\nid = 'stroke'\ntitle = '{}'\n"
    first = drafts.save(text.format("a"), "", by="ada")
    with pytest.raises(Refused) as error:
        drafts.save(text.format("b"), "", by="kim")
    assert error.value.code == "DRAFT-CHANGED"
    second = drafts.save(text.format("b"), "", by="kim", base=first.digest)
    with pytest.raises(Refused):
        drafts.save(text.format("c"), "", by="ada", base=first.digest)
    assert drafts.draft("stroke").digest == second.digest != first.digest


def test_digest_tells_the_two_files_apart(drafts: Drafts) -> None:
    first = drafts.save("[study]\nid = 'x'\n", "#b", by="ada")
    second = drafts.save("[study]\nid = 'x'\n#", "b", by="ada", base=first.digest)
    assert first.study + first.dictionary == second.study + second.dictionary and first.digest != second.digest


def test_hostile_text_is_refused_quickly(drafts: Drafts) -> None:
    began = time.monotonic()
    for text, code in (
        ("[a]\n" + "a." * 40_000 + "b = 1", "STUDY-TOML"),
        ("x" * 200_000, "PREVIEW-SIZE"),
        ("a = " + "[" * 50_000, "DRAFT-NAME"),
    ):
        with pytest.raises(UsageError) as error:
            drafts.save(text, "", by="ada")
        assert error.value.code == code
    assert time.monotonic() - began < 1.0
