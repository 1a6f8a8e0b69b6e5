"""One table → sites, so that a researcher can see what a federation of hospitals would give.

    by:COLUMN                 one site for each value of a column: real hospitals or countries
    iid:K                     patients dealt to K sites of equal size
    dirichlet:COLUMN:K:ALPHA  each value's patients dealt by Dirichlet(ALPHA) shares: small ALPHA,
                              skewed sites
                              (Hsu, Qi and Brown 2019, arXiv:1909.06335)

A patient's rows stay together, except where by:COLUMN finds them in several sites because they really are.
Rows keep their index: the number an error names, and the identity of a row that is a patient of its own.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cohortium.common.encoding import as_text
from cohortium.common.errors import TableError, UsageError

MOST_SITES = 1000
_GROUPS = 10  # a measured column is cut into so many groups of equal size before the Dirichlet split
_HELP = "by:COLUMN, iid:K or dirichlet:COLUMN:K:ALPHA, e.g. iid:5 or dirichlet:sex:5:0.5"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A way to split a table. sites: for iid and dirichlet; alpha: for dirichlet. Raises UsageError."""

    kind: Literal["by", "iid", "dirichlet"]
    column: str = ""
    sites: int = 0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("by", "iid", "dirichlet"):
            raise _bad(f"there is no split {self.kind!r}")
        if self.kind != "iid" and not self.column:
            raise _bad(f"the split {self.kind} needs a column")
        if self.kind != "by" and not 1 <= self.sites <= MOST_SITES:
            raise _bad(f"a split has 1 to {MOST_SITES} sites")
        if self.kind == "dirichlet" and not (math.isfinite(self.alpha) and 1e-3 <= self.alpha <= 1e6):
            raise _bad("ALPHA is a number from 0.001 to 1000000")

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read by:COLUMN, iid:K or dirichlet:COLUMN:K:ALPHA; a column's name may hold colons."""
        kind, _, rest = text.partition(":")
        if kind == "by":
            return cls(kind="by", column=rest)
        if kind == "iid":
            return cls(kind="iid", sites=_whole(rest))
        if kind == "dirichlet":
            column, sites, alpha = rest.rsplit(":", 2) if rest.count(":") >= 2 else ("", "", "")
            if not column:
                raise _bad("a Dirichlet split needs a column, a number of sites and ALPHA")
            try:
                return cls(kind="dirichlet", column=column, sites=_whole(sites), alpha=float(alpha))
            except ValueError:
                raise _bad("ALPHA is a number from 0.001 to 1000000") from None
        raise _bad(f"there is no split {text!r}")

    def __str__(self) -> str:
        if self.kind == "by":
            return f"by:{self.column}"
        return f"iid:{self.sites}" if self.kind == "iid" else f"dirichlet:{self.column}:{self.sites}:{self.alpha:g}"


def split(table: pd.DataFrame, how: Split | str, *, unit: str, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Site name → its rows, in the table's order; every row is in exactly one site. Same seed, same sites.

    A Dirichlet split may leave a site without rows: such a site runs and answers with noise only.
    Raises TableError for a column that is not there, a row without a site or a patient, no rows.
    """
    how = Split.parse(how) if isinstance(how, str) else how
    if not len(table):
        raise TableError("TABLE-EMPTY", "the table has no rows", hint="at least one patient is needed")
    if how.kind == "by":
        return _by(table, _column(table, how.column))
    patient = np.arange(len(table)) if unit == "row" else _patients(_column(table, unit))
    patients = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    if how.kind == "iid":
        if how.sites > patients:
            raise UsageError(
                "SPLIT-SITES",
                f"{how.sites} sites and only {patients} patients",
                hint=f"--split iid:{patients} or fewer",
            )
        site = np.empty(patients, dtype=np.int64)
        site[rng.permutation(patients)] = np.arange(patients) % how.sites
    else:
        first = np.full(patients, -1, dtype=np.int64)
        first[patient[::-1]] = np.arange(len(table))[::-1]  # a patient's group is that of the first row
        site = _dirichlet(_groups(_column(table, how.column).iloc[first]), how.sites, how.alpha, rng)
    width = len(str(how.sites))
    return {f"site-{k + 1:0{width}d}": table[site[patient] == k] for k in range(how.sites)}


def _by(table: pd.DataFrame, values: pd.Series) -> dict[str, pd.DataFrame]:
    empty = np.flatnonzero(values.isna().to_numpy(dtype=bool))
    if len(empty):
        raise TableError(
            "SPLIT-EMPTY",
            f"{len(empty)} rows name no site in column {values.name!r}",
            where=(f"table:{values.name}, row {int(empty[0]) + 1}",),
            hint="complete or leave out these rows, or split by another column",
        )
    text = values.map(as_text)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in sorted(set(text)):
        base = name = site_name(value)
        number = 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        names[value] = name
    if len(names) > MOST_SITES:
        raise UsageError(
            "SPLIT-SITES",
            f"column {values.name!r} would make {len(names)} sites",
            hint=f"split by a column with at most {MOST_SITES} values",
        )
    rows = text.to_numpy(dtype=object)
    return {name: table[rows == value] for value, name in names.items()}


def site_name(value: str) -> str:
    """A name of small letters, digits and dashes: "Zurich/Basel" → "zurich-basel"."""
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].strip("-") or "site"


def _dirichlet(group: NDArray[np.int64], sites: int, alpha: float, rng: np.random.Generator) -> NDArray[np.int64]:
    site = np.zeros(len(group), dtype=np.int64)
    for value in range(int(group.max()) + 1):
        members = rng.permutation(np.flatnonzero(group == value))
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for k, part in enumerate(np.split(members, cuts)):
            site[part] = k
    return site


def _groups(values: pd.Series) -> NDArray[np.int64]:
    """A group number for each row: levels as they are, measured values in ten groups; missing is a group."""
    numeric = pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)
    if (numeric or pd.api.types.is_datetime64_any_dtype(values.dtype)) and values.nunique() > _GROUPS:
        # Ranks, not quantile edges: tied values stay together
        rank = values.rank(pct=True, method="average").to_numpy(dtype=np.float64, na_value=np.nan)
        cut = np.where(np.isnan(rank), _GROUPS, np.ceil(np.nan_to_num(rank) * _GROUPS) - 1)
        return np.unique(cut, return_inverse=True)[1].astype(np.int64)
    text = np.array(["missing" if gone else "value " + as_text(v) for v, gone in zip(values, values.isna())])
    return np.unique(text, return_inverse=True)[1].astype(np.int64)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    count = int((table.columns == name).sum())
    if count != 1:
        raise TableError(
            "TABLE-COLUMN",
            f"the table has {'no column' if not count else 'two columns called'} {name!r}",
            where=(f"table:{name}",),
            hint=f"columns: {', '.join(str(c) for c in list(table.columns)[:12])}",
        )
    return table[name]


def _patients(values: pd.Series) -> NDArray[np.int64]:
    if not pd.api.types.is_integer_dtype(values.dtype):  # 7.0 and "7" are the patient 7
        values = values.map(as_text, na_action="ignore").astype(object)
    codes, _ = pd.factorize(values)
    empty = np.flatnonzero(codes < 0)
    if len(empty):
        raise TableError(
            "TABLE-PATIENT",
            f"{len(empty)} rows name no patient in column {values.name!r}",
            where=(f"table:{values.name}, row {int(empty[0]) + 1}",),
            hint='every row needs the patient it belongs to; [privacy] unit = "row" if each row is a patient',
        )
    return codes.astype(np.int64)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise _bad(f"a number of sites is from 1 to {MOST_SITES}")
    return int(text)


def _bad(sentence: str) -> UsageError:
    return UsageError("SPLIT", sentence, where=("--split",), hint=_HELP)
