"""The private evaluation on a terminal: the main figures and the verdicts, straight from result.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

SHOWN = (
    *("column_agreement", "distribution_agreement", "mean_smd", "correlation_similarity"),
    *("tstr_auc", "tstr_pr_auc", "tstr_f1", "tstr_g_mean", "tstr_calibration_slope"),
    *("km_gap", "rmst", "nearest_median"),
)
"""One screen; the report has all of them."""


def evaluation_shown(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Nothing where nobody was held out. In a simulation the exact figures stand beside the private ones."""
    evaluation = result.get("evaluation")
    if not evaluation or evaluation["patients"] is None:
        return
    exact = result.get("exact_evaluation") or {}
    title = "Measured privately on held-out patients" + (", as in a real deployment" if exact else "")
    table = Table(title=title, title_justify="left")
    for name in ("figure", "private", "95 % interval", "reference", *(("exact",) if exact else ())):
        table.add_column(name, justify="left" if name == "figure" else "right")
    unknown = 0
    for section in evaluation["sections"]:
        for found in section["findings"]:
            figure = found["named"]["figure"]
            unknown += figure["value"] is None
            if figure["value"] is None or not (found["key"] in SHOWN or found["key"].endswith(".ci_overlap")):
                continue
            cells = [number(figure["value"]), interval(figure), number(figure["reference"])]
            if exact:
                cells.append(number(exact.get(found["key"])))
            table.add_row(escape(found["named"]["label"]), *cells)
    if table.row_count:
        yield table
    if unknown:
        yield f"{unknown} figures, mostly of single columns and groups, are lost in the noise; the report names them."
    verdicts = result.get("verdicts") or ()
    if verdicts:
        tiles = Table(title="Fit for, by private figures", title_justify="left")
        tiles.add_column("use")
        tiles.add_column("verdict")
        for tile in verdicts:
            tiles.add_row(escape(tile["use"]), escape(tile["word"]))
        yield tiles


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def interval(figure: Mapping[str, Any]) -> str:
    return "" if figure["low"] is None else f"{number(figure['low'])} – {number(figure['high'])}"
