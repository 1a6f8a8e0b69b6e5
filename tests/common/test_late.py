"""Modules that wait for their first use, and who must not use them: each in a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "sklearn", "ray", "dp_accounting", "pandas", "pyarrow", "scipy", "reportlab", "flwr")


def fresh(script: str) -> object:
    """What a new interpreter prints as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def loaded(modules: str, *of: str) -> list[str]:
    script = f"import json, sys, {modules}; print(json.dumps(sorted({set(of)!r} & set(sys.modules))))"
    found = fresh(script)
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "modules",
    [
        "cohortium.simulations.cli",  # `cohortium --help`
        "cohortium.client.cli, cohortium.client.inspection, cohortium.client.deciding",
        "cohortium.server.consortium, cohortium.server.backing",
        "cohortium.server.serve",
        "cohortium.server.audit",
    ],
)
def test_commands_and_services_that_compute_nothing_load_nothing_heavy(modules: str) -> None:
    assert loaded(modules, *HEAVY) == []


def test_the_console_and_the_guard_load_nothing_that_fits_models() -> None:
    modules = "cohortium.server.console.app, cohortium.client.guard_service"
    assert loaded(modules, "torch", "sklearn", "ray", "dp_accounting") == []


def test_a_plan_of_the_network_loads_no_torch() -> None:
    script = """
import json, sys
from cohortium.common.generators.nade import Nade
size = Nade({"kind": "nade", "bins": [3, 4], "hidden": 2}).size
print(json.dumps([size, "torch" in sys.modules]))"""
    assert fresh(script) == [2 + 3 * 2 + 2 * 3 + 3 + 2 * 4 + 4, False]


@pytest.mark.parametrize("first", ["", "import torch; torch.set_num_threads(3)"])
def test_one_thread_holds_torch_whether_it_comes_before_or_inside(first: str) -> None:
    script = f"""
import json, sys
{first}
from cohortium.common.generators.threads import one_thread, torch
seen = ["torch" in sys.modules]
with one_thread():
    seen.append(torch.get_num_threads())
    with one_thread():
        seen.append(torch.get_num_threads())
    seen.append(torch.get_num_threads())
print(json.dumps([*seen, torch.get_num_threads()]))"""
    own = 3 if first else fresh("import json, torch; print(json.dumps(torch.get_num_threads()))")
    assert fresh(script) == [bool(first), 1, 1, 1, own]


def test_a_late_module_is_that_module() -> None:
    import fractions

    from cohortium.common.late import Late

    late = Late("fractions")
    assert late.Fraction is fractions.Fraction
    with pytest.raises(AttributeError, match="nothing_of_this"):
        assert late.nothing_of_this
    with pytest.raises(ModuleNotFoundError):
        assert Late("no_such_module").anything
