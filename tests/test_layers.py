"""Who may import whom, who may draw noise, and who may sign for a hospital: read off the source itself.

    common ← strategies ← client | server ← simulations ← cohortium
Inside common, an arrow points to what is used:
    errors ← vocabulary (dictionary, its rules and their checks, study files, encoding, drafting) ← queries
    errors ← messages ← protocol;  errors ← budget
    privacy → vocabulary, queries, budget, messages (canonical JSON and digests), never the rest of protocol
    generators, evaluation → vocabulary, queries, budget; never ledger, release or protocol
    queries: query_base ← derived ← tallies, estimates ← queries
    queries ⇢ registry ⇢ generators only inside functions: that is how a plug-in's network is found by name
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("common", "strategies", "client", "server", "simulations", "cohortium")

QUERIES = frozenset({"queries", "query_base", "derived", "tallies", "estimates"})
VOCABULARY = frozenset(
    {
        *("schema", "table_schema", "rules", "rule_checks", "encoding", "drafting"),
        *("toml_reader", "study", "study_evaluation", "study_release", "study_file"),
    }
)
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "modes": frozenset({"errors"}),  # who may read a key file
    "processes": frozenset(),  # what child processes have in common
    "late": frozenset(),  # modules that wait for their first use
    "text": frozenset(),  # hostile text made fit to be shown
    "terminal": frozenset({"errors"}),  # how a command prints
    "logs": frozenset(),  # how a process tells what happened
    "vocabulary": frozenset({"errors", "late"}),
    "messages": frozenset({"errors"}),
    "budget": frozenset({"errors"}),
    "protocol": frozenset({"errors", "messages"}),
    "proposals": frozenset({"errors", "vocabulary", "messages", "protocol", "privacy"}),  # plan, keys, dictionary
    "queries": frozenset({"errors", "vocabulary", "registry"}),
    "registry": frozenset({"errors", "generators"}),
    "privacy": frozenset({"errors", "late", "vocabulary", "queries", "budget", "messages"}),
    "generators": frozenset({"errors", "late", "vocabulary", "queries", "budget"}),
    "evaluation": frozenset({"errors", "late", "text", "vocabulary", "queries", "budget", "generators"}),
    "web": frozenset({"errors", "text", "budget"}),  # pages of the console and of the hospital
    "strategies": frozenset({"common"}),
    "client": frozenset({"common", "strategies"}),
    "server": frozenset({"common", "strategies"}),
    "simulations": frozenset({"common", "strategies", "client", "server"}),
    "cohortium": frozenset({"common", "strategies", "client", "server", "simulations"}),
}
INSIDE_FUNCTIONS_ONLY = {("queries", "registry"), ("registry", "generators")}
EXCEPTIONS = {
    # `cohortium study new --table` reads a table on the coordinator's own laptop, to draft a dictionary from it.
    ("server.cli", "client"),
}
NO_RANDOMNESS = (
    "common.privacy",
    "common.protocol",
    "client",
    "strategies",
    "server.asking",
    "server.session",
)
NO_RANDOMNESS_FILES = (
    *(f"common.{name}" for name in sorted(QUERIES)),
    *("common.encoding", "common.schema", "common.study"),
)

Sources = Mapping[str, str]


@lru_cache
def sources() -> Sources:
    """Every module of the package: dotted name without "cohortium." -> source."""
    found = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    assert len(found) > 60
    return found


@cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def imports(source: str) -> tuple[tuple[str, bool], ...]:
    """(dotted name, at the module's top level) of every import; for "from a import b" both a and a.b."""
    nodes = list(ast.walk(tree(source)))
    inside = {
        id(inner)
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found: list[tuple[str, bool]] = []
    for node in nodes:
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            found += [
                (node.module or "", top),
                *((f"{node.module}.{alias.name}", top) for alias in node.names),
            ]
    return tuple(found)


def layer(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "common" or len(parts) == 1:
        return parts[0]
    if parts[1] in QUERIES:
        return "queries"
    if parts[1] in VOCABULARY:
        return "vocabulary"
    if parts[1:] == ["protocol", "messages"] or parts[1:] == ["privacy", "budget"]:
        return parts[2]
    return parts[1]


def wrong_arrows(modules: Sources) -> list[str]:
    found = []
    for module, source in modules.items():
        here = layer(module)
        if here == "common":
            continue
        for name, top in imports(source):
            target = name.removeprefix("cohortium.")
            if target == name:
                continue
            if here == "cohortium" and ("." not in target or f"cohortium.{target.split('.')[0]}" in modules):
                continue  # the public API and what lies beside it
            # "from a.b import c": c may be a module or a name in one; the longest known module counts.
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            there = layer(target)
            if there in ("common", here) and target.count(".") == 0:
                continue
            allowed = ALLOWED[here] | {here}
            general = "common" if target.startswith("common") else there
            fine = there in allowed or (general in allowed and here not in _INNER)
            if (module, there) in EXCEPTIONS and not top:
                continue
            if not fine or ((here, there) in INSIDE_FUNCTIONS_ONLY and top):
                found.append(f"{module} imports {target}")
    return sorted(set(found))


_INNER = frozenset(ALLOWED) - {"strategies", "client", "server", "simulations", "cohortium"}


@cache
def calls_of(source: str) -> frozenset[str]:
    """The last name of everything that is called."""
    functions = [node.func for node in ast.walk(tree(source)) if isinstance(node, ast.Call)]
    attributes = {f.attr for f in functions if isinstance(f, ast.Attribute)}
    return frozenset(attributes | {f.id for f in functions if isinstance(f, ast.Name)})


def randomness(source: str) -> list[str]:
    """Sources of random numbers that a module could reach: imports and attributes."""
    banned = ("random", "secrets", "torch", "numpy.random", "uuid", "opacus", "torchcsprng")
    found = [n for n, _ in imports(source) if any(n == b or n.startswith(b + ".") for b in banned)]
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Attribute) and node.attr in (
            "random",
            "urandom",
            "getrandom",
            "default_rng",
            "rvs",
        ):
            found.append(ast.unparse(node))
    return found


# ---- the arrows ---------------------------------------------------------------------------------------------


def test_the_arrows_of_the_house_hold() -> None:
    assert wrong_arrows(sources()) == []


def test_every_module_has_its_place() -> None:
    homeless = [m for m in sources() if layer(m) not in ALLOWED and m != "common"]
    assert homeless == [], "name the module's layer in this test, and what it may use"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("client.x", "import cohortium.server.runs"),
        ("server.x", "from cohortium.client import guard"),
        ("server.x", "def f():\n    from cohortium.client.guard import Guard"),
        ("common.schema", "from cohortium.common.privacy.plan import Plan"),
        ("common.privacy.x", "from cohortium.common.protocol.secure_sum import SiteRound"),
        ("common.privacy.x", "from cohortium.common.generators import base"),
        ("common.protocol.x", "from cohortium.common.privacy.ledger import Ledger"),
        ("common.protocol.x", "from cohortium.common.queries import Counts"),
        ("common.generators.x", "from cohortium.common.privacy.release import release"),
        ("common.generators.x", "from cohortium.common.privacy.ledger import Ledger"),
        ("common.evaluation.x", "def f():\n    from cohortium.common.protocol import messages"),
        ("common.queries", "from cohortium.common.registry import network"),
        ("common.errors", "from cohortium.common import schema"),
        ("strategies.x", "from cohortium.server.asking import FederatedAsk"),
        ("strategies.x", "from cohortium.client.gate import Gate"),
        ("common.study", "from cohortium.strategies.base import Strategy"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, line: str) -> None:
    """The test's own power: one line more in a module, and it is red."""
    planted = {**sources(), module: sources().get(module, "") + "\n" + line + "\n"}
    assert [found for found in wrong_arrows(planted) if found.startswith(module + " imports")]


# ---- the one noise ------------------------------------------------------------------------------------------


def guarded() -> list[str]:
    return [
        m for m in sources() if m in NO_RANDOMNESS_FILES or any(m == p or m.startswith(p + ".") for p in NO_RANDOMNESS)
    ]


@pytest.mark.parametrize("module", guarded())
def test_nothing_that_touches_a_release_reaches_another_source_of_randomness(module: str) -> None:
    found = [
        what for what in randomness(sources()[module]) if (module, what) != ("common.privacy.entropy", "os.urandom")
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import numpy as np\nnp.random.normal()",
        "from numpy.random import default_rng",
        "import random",
        "import torch\ntorch.normal(0, 1)",
        "import secrets",
        "import os\nos.urandom(3)",
        "from scipy.stats import norm\nnorm.rvs(3)",
        "def f():\n    import random",
        "import numpy\nnumpy.random.default_rng(3)",
    ],
)
def test_another_source_of_randomness_is_found(line: str) -> None:
    assert randomness(line)


@pytest.mark.parametrize("name", ["lattice_noise", "_normals", "_noised_sum", "contribution"])
def test_noise_is_drawn_and_records_are_summed_in_one_file_only(name: str) -> None:
    callers = {m for m, source in sources().items() if name in calls_of(source)}
    callers -= {m for m in callers if m.startswith("simulations.benchmarks")}
    assert callers == {"common.privacy.release"}


def test_noise_keys_are_expanded_nowhere_else() -> None:
    users = {m for m, s in sources().items() if any(n.endswith(".Keystream") for n, _ in imports(s))}
    users -= {m for m in users if m.startswith("simulations.benchmarks")}
    assert users == {"common.privacy.release"}


def test_no_accountant_but_ours_prices_anything() -> None:
    """The central-limit accountant under-counts; Opacus derives rates from private numbers of records."""
    banned = ("opacus", "gdp", "clt", "prv", "autodp")
    for module, source in sources().items():
        if module.startswith("simulations.benchmarks"):
            continue
        names = [n for n, _ in imports(source)]
        assert not [n for n in names if any(b in n.lower().split(".") for b in banned)], module
        if any(n.startswith("dp_accounting") for n in names):
            assert module in ("common.privacy.accountant", "common.privacy.pld"), module


# ---- the one door -------------------------------------------------------------------------------------------


def test_only_the_gate_seals_at_a_hospital() -> None:
    sealers = {
        m
        for m, s in sources().items()
        if m.startswith("client") and any(n.endswith("messages.seal") for n, _ in imports(s))
    }
    assert sealers == {"client.gate"}
    for module, source in sources().items():
        if module.startswith("client"):
            assert not {"sign", "seal_shares"} & calls_of(source), module
            assert ("seal" in calls_of(source)) == (module == "client.gate"), module


COURIER = frozenset(
    f"client.{name}"
    for name in (
        *("app", "calls", "connect", "courier", "enrolment", "guard_port", "member", "reach", "stream", "supernode"),
    )
)
"""The courier's side: it may open connections, and touches neither records nor the keys that sign for the hospital."""
GUARD = frozenset(
    f"client.{name}"
    for name in (
        *("approval", "gate", "guard", "guard_service", "loading", "policy", "records", "references", "vault"),
        *("witness", "sources"),
    )
)
"""The guard's side: records, keys, ledger; no way to the outside. What is in neither list are people's commands."""
NETWORK = ("socket", "http", "urllib", "requests", "httpx", "grpc", "ssl", "smtplib", "ftplib", "asyncio", "uvicorn")
DATA = ("numpy", "pandas", "torch", "pyarrow", "sqlalchemy", "duckdb", "psycopg")


def side(module: str) -> str:
    short = ".".join(module.split(".")[:2])
    return "courier" if short in COURIER else "guard" if short in GUARD else "command"


def wrong_at_a_hospital(modules: Sources) -> list[str]:
    found = []
    for module, source in modules.items():
        if not module.startswith("client."):
            continue
        here = side(module)
        for name, top in imports(source):
            library = name.split(".")[0]
            target = name.removeprefix("cohortium.")
            there = side(target) if target.startswith("client.") else ""
            # The guard's service listens on a Unix socket; a reference to a secret is taken apart with urllib.parse.
            listed = (module, library) == ("client.guard_service", "grpc") or name.startswith("urllib.parse")
            # The hospital's page is a command of people: it listens on 127.0.0.1 and connects to nothing.
            listed = listed or (module == "client.page.serving" and library in ("asyncio", "uvicorn"))
            if library in NETWORK and here != "courier" and not listed:
                found.append(f"{module} imports {name}")
            if library == "flwr" and module not in ("client.app", "client.courier", "client.supernode"):
                found.append(f"{module} imports {name}")
            if here == "courier" and library in DATA:
                found.append(f"{module} imports {name}")
            # Only a simulation opens a guard in the courier's process, by name and inside a function.
            simulated = module == "client.app" and not top and target.startswith("client.guard")
            if {here, there} == {"courier", "guard"} and not simulated:
                found.append(f"{module} imports {name}")
    return found


def test_courier_and_guard_share_nothing_but_bytes() -> None:
    assert wrong_at_a_hospital(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("client.guard", "import socket"),
        ("client.records", "def f():\n    import urllib.request"),
        ("client.sources.files", "import httpx"),
        ("client.gate", "import flwr"),
        ("client.guard", "from cohortium.client.connect import open_channel"),
        ("client.stream", "from cohortium.client.guard import Guard"),
        ("client.stream", "def f():\n    from cohortium.client.vault import Vault"),
        ("client.courier", "import numpy"),
        ("client.app", "from cohortium.client.guard import open_guard"),
        ("client.cli", "import grpc"),
    ],
)
def test_a_line_that_joins_the_two_is_found(module: str, line: str) -> None:
    planted = {**sources(), module: sources()[module] + "\n" + line + "\n"}
    assert [found for found in wrong_at_a_hospital(planted) if found.startswith(module + " imports")]


def test_the_courier_never_imports_what_holds_data() -> None:
    tops = [n for n, top in imports(sources()["client.app"]) if top]
    assert not [n for n in tops if n.startswith(("cohortium.client.guard", "pandas", "torch", "numpy", "pyarrow"))]


def test_only_the_guard_and_the_gate_move_the_ledger_on_at_a_hospital() -> None:
    writers = {
        m for m, s in sources().items() if m.startswith("client") and {"reserve", "advance", "note"} & calls_of(s)
    }
    # An officer's rotation of the site's key is the one line that no question of the coordinator brings about.
    # The page's journal is another chain, under a key of its own; it cannot open the site's ledger to write.
    assert writers == {"client.gate", "client.rotation", "client.page.journal"}
