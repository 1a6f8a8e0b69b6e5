"""A site's policy from options, a file and, on a terminal, questions. Nothing has a default: a missing one is told."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cohortium.client.policy import KNOWN, Policy, Rehearsal
from cohortium.common.errors import UsageError

Ask = Callable[[str, str], str]

NEEDED: dict[str, tuple[str, str, str]] = {
    # setting: option, line to add, question
    "table": ("--table /data/patients.parquet", 'table = "/data/patients.parquet"', "File, folder or database"),
    "lifetime_epsilon": ("--lifetime-epsilon 8", "lifetime_epsilon = 8.0", "Lifetime cap on epsilon, over all runs"),
    "lifetime_delta": ("--lifetime-delta 1e-6", "lifetime_delta = 1e-6", "Lifetime delta"),
    "unit": ("--unit patient_id", 'unit = "patient_id"', "Column that names the patient"),
    "hospitals": ("--hospitals 1", "hospitals = 1", "In how many hospitals may one patient have records"),
    "minimum_sites": ("--minimum-sites 3", "minimum_sites = 3", "Fewest hospitals in a plan"),
    "minimum_colluders": ("--minimum-colluders 1", "minimum_colluders = 1", "How many of the others not to trust"),
    "minimum_patients": ("--minimum-patients 100", "minimum_patients = 100", "Fewest patients here"),
    "generators": ("--generator mixture", 'generators = ["mixture"]', "Allowed generators, with commas"),
    "strategies": ("--strategy secure-sum", 'strategies = ["secure-sum"]', "Allowed trust modes, with commas"),
    "evaluation": (
        "--evaluation (or --no-evaluation)",
        "evaluation = true",
        "May held-out patients be asked: yes or no",
    ),
}


def draft_policy(given: Mapping[str, Any], file: Path | None, *, name: str, ask: Ask | None = None) -> Policy:
    """The policy, whole but for the coordinator's key (zeros here).

    given: options, None where not given; they win over the file. ask: question and example -> answer, on a terminal.
    Raises UsageError SITE-POLICY-MISSING with the option and the line to add, and what Policy raises for bad values.
    """
    found = _of_file(file) if file is not None else {}
    found |= {key: value for key, value in given.items() if value is not None}
    missing = [key for key in NEEDED if key not in found]
    if missing and ask is None:
        options = " ".join(NEEDED[key][0] for key in missing)
        lines = "; ".join(NEEDED[key][1] for key in missing)
        raise UsageError(
            "SITE-POLICY-MISSING",
            f"the policy has no default for {', '.join(missing)}",
            where=(str(file),) if file is not None else (),
            hint=f"add {options}; or with --policy FILE the lines ({lines})",
        )
    for key in missing:
        assert ask is not None
        found[key] = _answer(key, ask(NEEDED[key][2], NEEDED[key][1].partition(" = ")[2].strip('"[]')))
    seed = found.pop("rehearsal_seed", None)
    several = not found.pop("one_row", True)
    table = str(found.pop("table"))
    if "query_file" in found:
        found["query_file"] = str(Path(found["query_file"]).resolve())
    if "://" not in table:
        table = str(Path(table).resolve())  # site.toml lies elsewhere than where the command was run
    for key in ("generators", "strategies", "officers"):
        if key in found:
            found[key] = tuple(found[key])
    if "peers" in found:
        found["peers"] = tuple(sorted(dict(found["peers"]).items()))
    for key in ("lifetime_epsilon", "lifetime_delta"):
        found[key] = _number(key, found[key])
    return Policy(
        name=name,
        coordinator_key="0" * 64,
        table=table,
        several_rows=several,
        rehearsal=None if seed is None else Rehearsal(seed=int(seed)),
        **found,
    )


def _of_file(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        data, policy = dict(document.get("data", {})), dict(document.get("policy", {}))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValueError, TypeError):
        raise UsageError("SITE-TOML", "the policy's file cannot be read", where=(str(path),)) from None
    extra = [*sorted(set(data) - KNOWN["data"]), *sorted(set(policy) - KNOWN["policy"])]
    extra += sorted(set(document) - {"data", "policy"})
    if extra:
        raise UsageError(
            "SITE-UNKNOWN",
            f"the policy's file has an unknown setting {extra[0]!r}",
            where=(str(path),),
            hint="[data] and [policy] as in docs/hospital.md",
        )
    if "query_file" in data:
        data["query_file"] = str(path.parent / str(data["query_file"]))
    if "table" in data and "://" not in str(data["table"]):
        data["table"] = str(path.parent / str(data["table"]))
    _check_types(data | policy, path)
    return data | policy


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("table", "query", "query_file", "password", "unit"), (str,)),
    **dict.fromkeys(("lifetime_epsilon", "lifetime_delta"), (int, float)),
    **dict.fromkeys(("hospitals", "minimum_sites", "minimum_colluders", "minimum_patients", "officers_needed"), (int,)),
    **dict.fromkeys(("generators", "strategies", "officers"), (list,)),
    **dict.fromkeys(("evaluation", "one_row", "attacks", "tell_cap"), (bool,)),
    "peers": (dict,),
}


def _check_types(found: Mapping[str, Any], path: Path) -> None:
    for key, value in found.items():
        wrong = not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key])
        if isinstance(value, list):
            wrong = wrong or not all(isinstance(item, str) for item in value)
        if wrong:
            raise UsageError("SITE-TOML", f"{key} has a value of another type", where=(f"{path}:{key}",))


def _answer(key: str, text: str) -> Any:
    """A typed answer as its setting's value; UsageError SITE-ANSWER."""
    kinds, plain = _TYPES[key], text.strip()
    try:
        if kinds == (bool,):
            return {"yes": True, "y": True, "true": True, "no": False, "n": False, "false": False}[plain.lower()]
        if kinds == (list,):
            return [word.strip().strip('"') for word in plain.split(",") if word.strip()]
        if kinds == (int,):
            return int(plain)
        return float(plain) if float in kinds else plain
    except (ValueError, KeyError):
        raise UsageError("SITE-ANSWER", f"{key}: that is no such value", hint=NEEDED[key][1]) from None


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError("SITE-ANSWER", f"{key}: that is no number", hint=NEEDED[key][1]) from None
