"""The picture of a what-if: expected quality against ε, with intervals, both references and the ε that is planned."""

from __future__ import annotations

from typing import Any

from cohortium.common.evaluation.pictures import Identifiers, escape, frame, short
from cohortium.common.evaluation.pictures_axes import scale_over
from cohortium.common.web.pages import report_style

LEFT, RIGHT, TOP, BOTTOM = 44.0, 350.0, 34.0, 214.0
TITLES = {
    "tvd2": ("Distance of pairs of columns", "lower is better"),
    "auc": ("AUC of a model of the target", "higher is better"),
}


def pictures(result: dict[str, Any], *, marked: float | None = None) -> list[tuple[str, str, str]]:
    """(score, its title, SVG) for each score that the result has; none before the first fit.

    result: as in what-if.json. marked: the ε that a study plans with. All text in the SVG is escaped here.
    """
    ids = Identifiers()
    names = [n for n in result["references"] if any(p["scores"].get(n) for p in result["points"])]
    return [(name, TITLES[name][0], _picture(ids, result, name, marked)) for name in names if name in TITLES]


def _picture(ids: Identifiers, result: dict[str, Any], name: str, marked: float | None) -> str:
    title, better = TITLES[name]
    points = [(p["epsilon"], p["scores"][name]) for p in result["points"] if p["scores"].get(name)]
    references = [
        (label, style, result["references"][name][key]["mean"], key)
        for key, label, style in (("real", "stand-in's own rows", "real"), ("shuffled", "shuffled rows", "other"))
        if result["references"][name].get(key)
    ]
    x = scale_over([e for e, _ in points] + ([marked] if marked else []), start=LEFT + 8, end=RIGHT - 8, log=True)
    ends = [(s["low"], s["high"]) for _, s in points if s["low"] is not None]
    y = scale_over([s["mean"] for _, s in points] + [m for _, _, m, _ in references], ends, start=BOTTOM, end=TOP)
    body, words = [f'<text class="small" x="0" y="12">{escape(better)}</text>'], []
    for at, text in y.ticks(5):
        body.append(
            f'<path class="grid" d="M{short(LEFT)} {short(y.at(at))}H{short(RIGHT)}"/>'
            f'<text class="small" x="{short(LEFT - 4)}" y="{short(y.at(at) + 3.5)}" text-anchor="end">{text}</text>'
        )
    for at, text in x.ticks(6):
        body.append(
            f'<path class="grid" d="M{short(x.at(at))} {short(BOTTOM)}v4"/><text class="small" '
            f'x="{short(x.at(at))}" y="{short(BOTTOM + 16)}" text-anchor="middle">{text}</text>'
        )
    body.append(
        f'<text class="small" x="{short(RIGHT)}" y="{short(BOTTOM + 31)}" text-anchor="end">ε of the study</text>'
    )
    for label, style, mean, key in references:
        line = "real thin" if style == "real" else "real other"
        body.append(f'<path class="{line}" d="M{short(LEFT)} {short(y.at(mean))}H{short(RIGHT)}"/>')
        # Where the curve is not: of a distance it starts high, of an AUC it starts at the shuffled rows.
        right = name == "auc" and key == "shuffled"
        above = mean == max(m for _, _, m, _ in references)
        words.append(
            f'<text class="small halo" x="{short(RIGHT if right else LEFT + 4)}" '
            f'y="{short(y.at(mean) + (-5 if above else 13))}" text-anchor="{"end" if right else "start"}">'
            f"{label} {mean:.3f}</text>"
        )
    if marked is not None:
        body.append(
            f'<path class="limit" d="M{short(x.at(marked))} {short(TOP - 8)}V{short(BOTTOM)}"/>'
            f'<text class="small halo" x="{short(x.at(marked))}" y="{short(TOP - 11)}" text-anchor="middle">'
            f"this study: {marked:g}</text>"
        )
    path = " ".join(f"{short(x.at(e))} {short(y.at(s['mean']))}" for e, s in points)
    body.append(f'<path class="curve hue-0 thin" d="M{path}"/>')
    for epsilon, score in points:
        place = short(x.at(epsilon))
        told = f"ε = {epsilon:g}: {_told(score)}"
        if score["low"] is not None:
            body.append(
                f'<path class="whisker" d="M{place} {short(y.at(score["low"]))}V{short(y.at(score["high"]))}"/>'
            )
        body.append(
            f'<circle class="dot" cx="{place}" cy="{short(y.at(score["mean"]))}" r="5">'
            f"<title>{escape(told)}</title></circle>"
        )
    said = "; ".join(f"ε {e:g}: {_told(s)}" for e, s in points)
    said += "".join(f"; {label} {mean:.3f}" for label, _, mean, _ in references)
    said += "" if marked is None else f"; the study plans ε {marked:g}"
    return frame(ids, BOTTOM + 36, f"{title} against ε ({better})", said + ".", [*body, *words])


def _told(score: dict[str, Any]) -> str:
    interval = "" if score["low"] is None else f" ({score['low']:.3f} to {score['high']:.3f})"
    return f"{score['mean']:.3f}{interval}"


def page(result: dict[str, Any], *, marked: float | None) -> str:
    """One HTML file that loads nothing."""
    shown = pictures(result, marked=marked)
    stand_in, names = result["stand_in"], [name for name, _, _ in shown]
    head = "".join(f'<th scope="col">{escape(title)} ({TITLES[name][1]})</th>' for name, title, _ in shown)
    rows = "".join(
        f'<tr><th scope="row">{p["epsilon"]:g}</th><td>{escape(p["generator"])}</td>'
        + "".join(f"<td>{_told(p['scores'][n]) if p['scores'].get(n) else ''}</td>" for n in names)
        + "</tr>"
        for p in result["points"]
    )
    refused = "".join(
        f"<p>ε = {r['epsilon']:g} makes no plan: {escape(r['error'])}: {escape(r['sentence'])}</p>"
        for r in result["refused"]
    )
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for _, title, svg in shown)
    gap = f"<p>No AUC: {escape(result['no_auc'])}.</p>" if result["no_auc"] else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>What if: {escape(result["study"])}</title>'
        f"<style>{report_style()}</style><main><h1>What if: {escape(result['study'])}</h1>"
        f"<p><strong>Stand-in data.</strong> {escape(result['says'])}</p>"
        f"<p>Stand-in: {escape(stand_in['file'])}, {stand_in['rows']:,} rows, {escape(stand_in['sha256'])}. "
        f"{result['columns']} columns, {result['patients'] or 0:,} patients to learn from, "
        f"{result['sites']} hospitals, {escape(result['mode'])}; mean and 95 % interval over "
        f"{result['seeds']} repetitions.</p>"
        f'<div class="two">{figures}</div>{refused}{gap}<div class="scroll"><table><caption>The same in figures'
        f'</caption><thead><tr><th scope="col">ε</th><th scope="col">generator</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></main></html>\n"
    )
