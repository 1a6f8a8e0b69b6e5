"""A folder of Parquet files or of CSV files as one table: what exports and data lakes write.

Parts come in the order of their paths. Every part must have the same columns, and of the same kind; a part that does
not is named. Folders called "year=2020" add a column of texts.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cohortium.client.sources.base import check_names, register
from cohortium.client.sources.files import CSV_ENDINGS, csv_table, frame_of, text_frame
from cohortium.common.errors import TableError


def read_folder(location: str) -> pd.DataFrame:
    """All the files of a folder, below it too; names that begin with a dot or "_" (_SUCCESS) are left out."""
    parts = _parts(Path(location))
    if parts[0].name.lower().endswith(".parquet"):
        return _parquet(location, parts)
    return _csv(location, parts)


def _parts(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise TableError(
            "TABLE-FILE", "the folder holds no files", where=(str(folder),), hint="put Parquet or CSV files there"
        )
    kinds = {_kind(path): path for path in found}
    # A file of another kind may be part of the data that somebody forgot to convert: never left out in silence.
    if None in kinds or len(kinds) > 1:
        odd = kinds.get(None) or kinds["csv"]
        raise TableError(
            "TABLE-KIND",
            "the folder holds files of different kinds",
            where=(str(odd),),
            hint="only Parquet or only CSV files in the folder; move or rename (with a leading _) the others",
        )
    return found


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return "parquet" if name.endswith(".parquet") else "csv" if name.endswith(CSV_ENDINGS) else None


def _parquet(location: str, parts: list[Path]) -> pd.DataFrame:
    schemas = [_schema(part) for part in parts]
    for part, schema in zip(parts, schemas):
        _same_columns(parts[0], schemas[0].names, part, schema.names)
    try:
        # Wider numbers, and a column that is empty in one part; a text beside a number is an error.
        common = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise _other_types(parts, schemas) from None
    # What a folder's name says is a text: a parser that guesses makes the code "010" a 10.
    keys = pa.schema([(key, pa.string()) for key in _keys(Path(location), parts) if key not in common.names])
    common = pa.unify_schemas([common, keys])
    try:
        table = ds.dataset(
            [str(part) for part in parts],
            schema=common,
            format="parquet",
            partitioning=ds.partitioning(keys, flavor="hive") if keys.names else None,
            partition_base_dir=location,
        ).to_table()
    except (pa.ArrowException, OSError, NotImplementedError) as error:
        raise TableError(
            "TABLE-FILE",
            f"the folder cannot be read as one table ({type(error).__name__})",
            where=(location,),
            hint="write all parts anew, with the same columns and types",
        ) from None
    return frame_of(table, location)


def _keys(folder: Path, parts: list[Path]) -> list[str]:
    """The names in folders called "name=value", which must be the same for every part."""
    keys = [[p.partition("=")[0] for p in part.relative_to(folder).parts[:-1] if "=" in p] for part in parts]
    for part, names in zip(parts, keys):
        if names != keys[0]:
            raise TableError(
                "TABLE-PARTS",
                "the folder's parts do not lie in folders of the same names",
                where=(str(part), str(parts[0])),
                hint="every part below folders such as year=2020, or none",
            )
    return keys[0]


def _schema(part: Path) -> pa.Schema:
    try:
        schema = pq.read_schema(part).remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise TableError(
            "TABLE-FILE",
            f"not a readable Parquet file ({type(error).__name__})",
            where=(str(part),),
            hint="write it anew",
        ) from None
    check_names(str(part), schema.names)
    # A dictionary-encoded text is a text; writers choose per file.
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    return pa.schema([f.with_nullable(True) for f in plain])


def _csv(location: str, parts: list[Path]) -> pd.DataFrame:
    tables: list[pa.Table] = []
    for part in parts:
        table = csv_table(str(part))
        if tables:
            _same_columns(parts[0], tables[0].column_names, part, table.column_names)
            table = table.select(tables[0].column_names)
        tables.append(table)
    return text_frame(pa.concat_tables(tables))


def _same_columns(first: Path, wanted: list[str], part: Path, names: list[str]) -> None:
    absent, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    if absent or extra:
        what = f"lacks the column {absent[0]!r}" if absent else f"has a column {extra[0]!r} more"
        raise TableError(
            "TABLE-PARTS",
            f"a part of the folder {what}",
            where=(str(part), str(first)),
            hint="the same columns in every part",
        )


def _other_types(parts: list[Path], schemas: list[pa.Schema]) -> TableError:
    """Which column of which part has another kind of values than before."""
    common = schemas[0]
    for part, schema in zip(parts, schemas):
        for field in schema:
            so_far = pa.schema([common.field(field.name)])
            try:
                pa.unify_schemas([so_far, pa.schema([field])], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return TableError(
                    "TABLE-PARTS",
                    f"column {field.name!r} is {field.type} in one part and {so_far.field(0).type} in another",
                    where=(str(part), str(parts[0])),
                    hint="write the parts anew with one type",
                )
        common = pa.unify_schemas([common, schema], promote_options="permissive")
    return TableError("TABLE-PARTS", "the parts' types differ", where=(str(parts[0]),), hint="write them with one type")


register("/", read_folder)
