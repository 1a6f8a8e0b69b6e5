"""Sampling: conditions that rows keep, classes that balance, files of one content, the dictionary's types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from small import make_quick, small_study
from typer.testing import CliRunner

from cohortium.common.errors import UsageError
from cohortium.common.rule_checks import breaking_rows
from cohortium.common.schema import Schema
from cohortium.server import sampling
from cohortium.server.finish import sample as finish_sample
from cohortium.server.runs import RunFolder
from cohortium.server.sampling import as_judged, parse_columns, parse_where, write_rows
from cohortium.simulations.cli import app
from cohortium.simulations.run import Request, prepare, run

NAMES = ["sex", "age", "dose", "seen", "smoker", "grade"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One fitted model for all tests of this file."""
    home = tmp_path_factory.mktemp("sampling")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        study, table = small_study(home / "study")
        prepare(Request(study=study, table=table, split="iid:3", out=home / "out", seed=1))
        run(home / "out")
    return RunFolder(root=home / "out")


def sample(
    folder: RunFolder,
    tmp_path: Path,
    rows: int = 300,
    *,
    seed: int = 0,
    where: str | None = None,
    balance: str | None = None,
    name: str = "rows.parquet",
) -> pd.DataFrame:
    path = tmp_path / name
    write_rows(folder, rows, [path], seed=seed, where=parse_where(where, folder), balance=balance)
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


CONDITIONS: list[tuple[str, Callable[[pd.DataFrame], pd.Series[bool]]]] = [
    ("sex=F", lambda t: t.sex == "F"),
    ("sex!=F", lambda t: t.sex == "M"),
    ('sex="F"', lambda t: t.sex == "F"),
    ("age<40", lambda t: t.age < 40),
    ("age<=40", lambda t: t.age <= 40),
    ("age>61", lambda t: t.age > 61),
    ("age>=61", lambda t: t.age >= 61),
    ("age=50", lambda t: t.age == 50),
    ("age>=41 and age<44", lambda t: t.age.between(41, 43)),
    ("dose>=2.5 and dose<4", lambda t: t.dose.between(2.5, 3.5)),
    ("dose>7", lambda t: t.dose > 7),
    ("seen>=2020-07-01", lambda t: pd.to_datetime(t.seen) >= pd.Timestamp("2020-07-01")),
    ("seen<2020-02-01", lambda t: pd.to_datetime(t.seen) < pd.Timestamp("2020-02-01")),
    ("seen=2020-02-29", lambda t: pd.to_datetime(t.seen) == pd.Timestamp("2020-02-29")),
    ("smoker=true", lambda t: t.smoker == True),  # noqa: E712
    ("smoker=0", lambda t: t.smoker == False),  # noqa: E712
    ("grade=2", lambda t: t.grade == 2),
    ("grade!=2", lambda t: t.grade.isin([1, 3])),
    ("sex=M AND age>=30 and smoker=true", lambda t: (t.sex == "M") & (t.age >= 30) & (t.smoker == True)),  # noqa: E712
]


@pytest.mark.parametrize(("where", "true"), CONDITIONS, ids=[where for where, _ in CONDITIONS])
def test_rows_keep_the_condition(
    folder: RunFolder, tmp_path: Path, where: str, true: Callable[[pd.DataFrame], pd.Series[bool]]
) -> None:
    rows = sample(folder, tmp_path, where=where)
    assert len(rows) == 300
    assert true(rows).fillna(False).all(), rows[~true(rows).fillna(False)].head()


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("height>3", "WHERE-COLUMN"),
        ("sex", "WHERE-FORM"),
        ("sex=X", "WHERE-VALUE"),
        ("sex<F", "WHERE-SIGN"),
        ("age=old", "WHERE-VALUE"),
        ("age!=3", "WHERE-VALUE"),
        ("sex=F and sex=M", "WHERE-EMPTY"),
        ("age>50 and age<40", "WHERE-EMPTY"),
        ("age>99", "WHERE-EMPTY"),
        ("id=p0001", "WHERE-COLUMN"),
        ("age>=1e400", "WHERE"),
        ("seen>2021-13-45", "WHERE-VALUE"),
        ("=", "WHERE-FORM"),
        ("age>", "WHERE-FORM"),
    ],
)
def test_a_condition_that_cannot_be_kept_is_refused(folder: RunFolder, tmp_path: Path, where: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        sample(folder, tmp_path, where=where)
    assert caught.value.code.startswith(code)
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


@pytest.mark.parametrize(("column", "levels"), [("sex", 2), ("smoker", 2), ("grade", 3)])
def test_balanced_classes(folder: RunFolder, tmp_path: Path, column: str, levels: int) -> None:
    rows = sample(folder, tmp_path, 302, balance=column)
    counts = rows[column].value_counts()
    assert len(counts) == levels and counts.sum() == 302 and counts.max() - counts.min() <= 1
    assert not rows[column].isna().any()
    narrowed = sample(folder, tmp_path, 100, balance=column, where="age>=50")
    assert (narrowed.age >= 50).all() and narrowed[column].value_counts().max() <= 100 // levels + 1


def test_balanced_classes_come_in_random_order(folder: RunFolder, tmp_path: Path) -> None:
    """Whoever takes the first rows of a file takes a fair sample of it."""
    rows = sample(folder, tmp_path, 600, balance="grade")
    for level in (1, 2, 3):
        assert 70 <= int((rows.grade[:300] == level).sum()) <= 130


def test_columns_and_shares_on_the_command_line(folder: RunFolder, tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "rows.csv"
    words = ["sample", str(folder.root), "-n", "240", "-o", str(out)]
    done = runner.invoke(app, [*words, "--balance", "sex,smoker", "--minimum-share", "grade=0.3"])
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(out)
    assert rows.groupby(["sex", "smoker"]).size().tolist() == [60] * 4
    assert rows.grade.value_counts().min() >= 72
    assert "Rows were balanced: all combinations of sex and smoker" in " ".join(done.output.split())
    assert "at least 30 % of the rows" in " ".join(done.output.split())
    plain = runner.invoke(app, [*words, "--json"])
    assert json.loads(plain.stdout)["sampled"] == []
    for wrong, code in (
        (["--balance", "sex,nose"], "BALANCE-COLUMN"),
        (["--balance", "age"], "BALANCE-COLUMN"),
        (["--minimum-share", "grade"], "SHARE-FORM"),
        (["--minimum-share", "grade=half"], "SHARE-FORM"),
        (["--minimum-share", "=0.1"], "SHARE-FORM"),
        (["--minimum-share", "grade=0.5"], "BALANCE-SHARE"),
        (["--balance", "sex,smoker,grade", "-n", "11"], "BALANCE-ROWS"),
    ):
        failed = runner.invoke(app, [*words, *wrong])
        assert failed.exit_code == 2 and code in failed.output, (wrong, failed.output)


def test_a_column_whose_name_holds_a_comma_is_one_column(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [{"name": name, "type": "boolean"} for name in ("a,b", "a", "b")]
    study = SimpleNamespace(schema=Schema.from_dict({"name": "x", "fields": fields}))
    monkeypatch.setattr(RunFolder, "study", lambda _: study)
    assert parse_columns("a,b", folder) == ("a,b",) and parse_columns("b, a", folder) == ("b", "a")
    assert parse_columns(None, folder) == ()


def settled(folder: RunFolder, tmp_path: Path, lines: str, **roles: str) -> RunFolder:
    """A copy of the run whose study has more lines in [release] and whose dictionary names roles and a rule."""
    root = Path(shutil.copytree(folder.root, tmp_path / "run"))
    document = json.loads((root / "dictionary.json").read_text())
    for field in document["fields"]:
        if field["name"] in roles:
            field["role"] = roles[field["name"]]
    document["rules"] = [{"name": "women", "if": {"sex": "F"}, "then": {"smoker": False}}]
    (root / "dictionary.json").write_text(json.dumps(document))
    study = (root / "study.toml").read_text().replace("[release]\n", f"[release]\n{lines}\n")
    (root / "study.toml").write_text(study)
    return RunFolder(root=root)


def test_the_released_table_is_as_the_study_says(folder: RunFolder, tmp_path: Path) -> None:
    changed = settled(
        folder,
        tmp_path,
        'balance = "grade"\nenforce_rules = true\nk_anonymity = 5\nl_diversity = 2',
        sex="quasi-identifier",
        age="quasi-identifier",
        seen="quasi-identifier",
        dose="sensitive",
    )
    finish_sample(changed)
    rows, schema = pd.read_parquet(changed.root / "synthetic.parquet"), changed.study().schema
    assert rows.grade.value_counts().tolist() == [20, 20, 20] and len(rows) == 60
    groups = rows.groupby(["sex", "age", "seen"], dropna=False, observed=True)
    assert groups.size().min() >= 5 and groups["dose"].nunique().min() >= 2
    plain = sample(folder, tmp_path, 60)
    assert plain.groupby(["sex", "age", "seen"], dropna=False).size().min() == 1
    assert list(rows.dtypes) == list(plain.dtypes)
    text = pd.read_csv(changed.root / "synthetic.csv")
    assert (text.age == rows.age).all() and (text.seen.isna() == rows.seen.isna()).all()
    assert rows.age.between(0, 99).all() and schema.column("age").required
    first = (changed.root / "synthetic.parquet").read_bytes()
    finish_sample(changed)
    assert (changed.root / "synthetic.parquet").read_bytes() == first


def test_an_evaluation_looks_at_rows_as_coarse_as_the_published_ones(folder: RunFolder, tmp_path: Path) -> None:
    """Rare combinations are rarer among more rows: a sample of another size would be coarser or finer."""
    changed = settled(folder, tmp_path, "k_anonymity = 5", age="quasi-identifier", sex="quasi-identifier")
    finish_sample(changed)
    rows = pd.read_parquet(changed.root / "synthetic.parquet")
    for wanted in (20, 60, 1000):
        drawn = as_judged(changed.model(), changed.study(), changed.grids(), wanted, seed=int(changed.facts()["seed"]))
        published = rows.iloc[: min(wanted, 60)]
        pd.testing.assert_frame_equal(drawn.astype(object), published.astype(object), check_dtype=False)


def test_a_release_that_is_balanced_on_purpose_is_judged_unbalanced(folder: RunFolder, tmp_path: Path) -> None:
    changed = settled(folder, tmp_path, 'balance = "grade"')
    drawn = as_judged(changed.model(), changed.study(), changed.grids(), 60, seed=3)
    plain = as_judged(folder.model(), folder.study(), folder.grids(), 60, seed=3)
    pd.testing.assert_frame_equal(drawn, plain)


def test_released_rows_keep_the_rules_where_the_study_says_so(folder: RunFolder, tmp_path: Path) -> None:
    changed = settled(folder, tmp_path, "enforce_rules = true\nminimum_share = {grade = 0.2}")
    finish_sample(changed)
    rows = pd.read_parquet(changed.root / "synthetic.parquet")
    assert not breaking_rows(changed.study().schema, rows).any() and rows.grade.value_counts().min() >= 12
    assert breaking_rows(changed.study().schema, sample(folder, tmp_path, 60)).any()


def test_a_column_that_cannot_balance_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="BALANCE-COLUMN"):
        sample(folder, tmp_path, balance="height")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_the_seed_decides(folder: RunFolder, tmp_path: Path, name: str) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        sample(folder, tmp_path, seed=seed, name=f"{number}-{name}")
        files.append((tmp_path / f"{number}-{name}").read_bytes())
    assert files[0] == files[1] != files[2]


def test_both_files_hold_the_same_rows_in_the_dictionarys_types(folder: RunFolder, tmp_path: Path) -> None:
    outs = [tmp_path / "a.parquet", tmp_path / "deep" / "b.csv"]
    assert write_rows(folder, 500, outs, seed=4) == 500
    parquet, csv = pd.read_parquet(outs[0]), pd.read_csv(outs[1], keep_default_na=False, dtype=str)
    assert list(parquet.columns) == list(csv.columns) == NAMES
    assert pd.api.types.is_integer_dtype(parquet.age.dtype) and pd.api.types.is_integer_dtype(parquet.grade.dtype)
    assert pd.api.types.is_float_dtype(parquet.dose.dtype) and pd.api.types.is_bool_dtype(parquet.smoker.dtype)
    assert parquet.sex.dropna().isin(["F", "M"]).all() and parquet.grade.dropna().isin([1, 2, 3]).all()
    assert parquet.age.between(0, 99).all() and not parquet.age.isna().any()  # required
    assert parquet.dose.dropna().between(0, 10).all() and (parquet.dose.dropna() * 2 % 1 == 0).all()
    days = pd.to_datetime(parquet.seen.dropna())
    assert days.between("2020-01-01", "2020-12-31").all()
    assert parquet.dose.isna().any(), "a fifth of the doses is missing"
    for name in NAMES:
        for there, text in zip(parquet[name], csv[name], strict=True):
            if pd.isna(there):
                assert text == ""
            elif isinstance(there, bool | np.bool_):
                assert text == ("true" if there else "false")
            elif name in ("age", "grade"):
                assert text == str(int(there))
            elif name == "dose":
                assert float(text) == there
            else:
                assert text[:10] == str(there)[:10]


def test_blocks_of_any_size_give_whole_files(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go to disk block by block: a file of several blocks has all of them, one header and one schema."""
    monkeypatch.setattr(sampling, "BLOCK_ROWS", 64)
    seen: list[int] = []
    write_rows(folder, 200, [tmp_path / "a.parquet", tmp_path / "a.csv"], seed=4, progress=seen.append)
    assert seen == [64, 128, 192, 200]
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 4
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == len(pd.read_csv(tmp_path / "a.csv")) == 200
    assert not list(tmp_path.glob("*.part"))


def test_a_single_row_and_a_file_of_another_kind(folder: RunFolder, tmp_path: Path) -> None:
    assert len(sample(folder, tmp_path, 1)) == 1
    with pytest.raises(UsageError, match="SAMPLE-FILE"):
        write_rows(folder, 5, [tmp_path / "rows.xlsx"], seed=0)
    with pytest.raises(UsageError, match="SAMPLE-ROWS"):
        write_rows(folder, 0, [tmp_path / "rows.csv"], seed=0)


def test_a_cell_at_the_conditions_edge_is_cut(tmp_path: Path, quick: None) -> None:
    """Wide ranges have cells of several values: a condition inside a cell holds for every row all the same."""
    dictionary = {
        "name": "wide",
        "missingValues": [""],
        "fields": [
            {
                "name": "x",
                "type": "number",
                "constraints": {"minimum": 0, "maximum": 1000},
                "resolution": 0.001,
            },
            {"name": "k", "type": "integer", "constraints": {"minimum": 0, "maximum": 100000}},
        ],
    }
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": (rng.random(80) * 1000).round(3), "k": rng.integers(0, 100_000, 80)})
    study, path = small_study(tmp_path / "s", table=table, dictionary=dictionary, unit="row", target="")
    prepare(Request(study=study, table=path, split="iid:3", out=tmp_path / "o", seed=1))
    run(tmp_path / "o")
    folder = RunFolder(root=tmp_path / "o")
    assert (sample(folder, tmp_path, 500, where="x<100.01").x < 100.01).all()
    assert (sample(folder, tmp_path, 500, where="k>50001").k > 50001).all()
    assert (sample(folder, tmp_path, 500, where="k=777").k == 777).all()
