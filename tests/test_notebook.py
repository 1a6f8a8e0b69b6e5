"""The quickstart notebook: stored without outputs, it runs from its first cell to its last and shows what it tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"


def stored() -> Any:
    return nbformat.read(PATH, as_version=4)


def client(notebook: Any, folder: Path) -> NotebookClient:
    """A kernel of this very interpreter, whatever kernels this machine's user has installed."""
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    return NotebookClient(notebook, km=manager, timeout=240, resources={"metadata": {"path": str(folder)}})


def texts(cell: Any) -> str:
    """All that a cell shows: printed, as text and as HTML."""
    found = []
    for output in cell.outputs:
        found.append(output.get("text", ""))
        found += [str(value) for value in output.get("data", {}).values()]
    return "\n".join(found)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = stored()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "TMPDIR"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        patch.setenv("OMP_NUM_THREADS", "1")
        client(notebook, folder).execute()
    return notebook


def test_it_is_stored_without_outputs_and_with_the_licence_of_its_data() -> None:
    notebook = stored()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "outputs would be figures of nobody's last run"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "CC BY 4.0" in prose and "without noise" in prose
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_cells_run_and_show_what_they_tell_of(executed: Any) -> None:
    cells = {cell.source.split("\n")[0]: cell for cell in executed.cells if cell.cell_type == "code"}
    assert len(cells) == sum(cell.cell_type == "code" for cell in executed.cells) >= 11
    for cell in cells.values():
        assert cell.execution_count and not [o for o in cell.outputs if o.output_type == "error"]
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], texts(cell)

    def said(start: str) -> str:
        return next(texts(cell) for line, cell in cells.items() if line.startswith(start))

    price = float(re.search(r"ε = ([\d.]+) at δ = 1e-06", said("plan ="))[1])  # type: ignore[index]
    assert 2.9 < price <= 3.0
    assert "Study heart-demo" in said("study =") and "<svg" in said("plan =")
    run = said("run =")
    assert "(3.000, 1e-06)-differential privacy" in run and 'class="warning"' not in run, "the noise is real"
    assert re.search(r"\d+ of \d+ releases", run) and "releases answered" in run
    assert "920 synthetic rows, 15 columns" in said("synthetic =")
    assert "Compared with held-out real patients" in said("scores =") and said("scores =").count("<svg") >= 6
    women = said("women =")
    assert "500 women with the disease" in women and re.search(r"balanced: .*200.*200", women)
    assert "combined 95 %" in said("cohortium.analyze")
    assert "everything holds: True" in said("report =")
    what_if = said("rows =")
    assert "ε = 0.5" in what_if and "ε = 3" in what_if and "two columns" in what_if
    assert "report.html" in said("sorted(")


@pytest.mark.slow
def test_a_cell_that_breaks_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own power, and the kernel is this interpreter."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    import sys

    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys; print(sys.executable)")])
    client(notebook, tmp_path).execute()
    assert texts(notebook.cells[0]).strip() == sys.executable
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import cohortium; cohortium.nothing")])
    with pytest.raises(CellExecutionError, match="no attribute 'nothing'"):
        client(broken, tmp_path).execute()
