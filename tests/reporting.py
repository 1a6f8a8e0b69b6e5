"""Findings of every kind, made up, for the tests of the report and its pictures. No figure here was measured."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from base64 import a85decode
from html.parser import HTMLParser
from typing import TypeVar

from cohortium.common.evaluation.base import (
    BudgetFacts,
    Direction,
    Figure,
    NamedFigure,
    PlanRow,
    ReportFacts,
    RoundRow,
    Verdict,
    Word,
)
from cohortium.common.evaluation.findings import (
    CountRow,
    Curves,
    DifferenceMap,
    Effect,
    Finding,
    Findings,
    Forest,
    Line,
    PairRow,
    Section,
    Shares,
    Table,
    TableRow,
)

NAMES = ("age", "sex", "systolic blood pressure at admission", "heart rate", "stroke type", "outcome at 6 months")
HOSTILE = '</title></svg><script>alert(1)</script><img src=x onerror="alert(2)">&\u202e\x00{{ 7*7 }}(\\'
VOID = {"meta", "link", "br", "img", "hr", "input"}
MEANING = {"key", "style", "direction", "word", "mode"}
"""Fields whose text is the program's own, not a person's."""
T = TypeVar("T")
SWAMPED = "the noise is larger than the figure: more held-out patients or a larger ε would be needed"


class Reader(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, ...]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.words: dict[int, str] = {}
        self._numbers: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)
            self._numbers.append(len(self.tags) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tuple(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"
        self._numbers.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        for number in self._numbers:
            self.words[number] = self.words.get(number, "") + data


def spoiled(value: T, text: str) -> T:
    """The same dataclass with `text` wherever a person may have written something."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: text
            if isinstance(getattr(value, f.name), str) and f.name not in MEANING
            else spoiled(getattr(value, f.name), text)
            for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(text if isinstance(v, str) else spoiled(v, text) for v in value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {f"{k}{text}": f"{v}{text}" for k, v in value.items()}  # type: ignore[return-value]
    return value


def pdf_pages(data: bytes) -> list[str]:
    """The text of each page of a summary, in drawing order; Symbol's letters as Greek and mathematical ones."""
    objects = dict(re.findall(rb"(\d+) 0 obj\r?\n(.*?)endobj", data, re.S))
    pages = []
    for body in objects.values():
        if not re.search(rb"/Type /Page\b(?!s)", body):
            continue
        fonts = {}
        found = re.search(rb"/Font (\d+) 0 R", body)
        assert found is not None
        for name, number in re.findall(rb"/(F\d+) (\d+) 0 R", objects[found[1]]):
            base = re.search(rb"/BaseFont /(\S+)", objects[number])
            assert base is not None
            fonts[name] = base[1]
        number = re.search(rb"/Contents (\d+) 0 R", body)
        assert number is not None
        stream = objects[number[1]].split(b"stream\n", 1)[1].split(b"endstream")[0].strip()
        pages.append(_shown(zlib.decompress(a85decode(stream.removesuffix(b"~>"))), fonts))
    return pages


def _shown(content: bytes, fonts: dict[bytes, bytes]) -> str:
    symbol = dict(zip(b"edsabgklmnprtcyw\243\263\271\245\273\055\326\256\254DSW", "εδσαβγκλμνπρτχψω≤≥≠∞≈−√→←ΔΣΩ"))
    out, font = [], b""
    for name, text, ends in re.findall(rb"/(F\d+) [\d.]+ Tf|\(((?:\\.|[^\\)])*)\) Tj|(ET)", content, re.S):
        if name:
            font = fonts[name]
        elif ends:
            out.append("\n")
        else:
            plain = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), text)
            plain = re.sub(rb"\\(.)", rb"\1", plain)
            if font == b"Symbol":
                out.append("".join(symbol.get(b, "?") for b in plain))
            elif font == b"ZapfDingbats":
                out.append("■" * len(plain))
            else:
                out.append(plain.decode("cp1252"))
    return "".join(out)


def figure(value: float | None, half: float = 0.02, *, direction: Direction = "higher", unit: str = "") -> Figure:
    if value is None:
        return Figure.unknown(SWAMPED, direction=direction, unit=unit)
    return Figure(
        value=value,
        low=value - half,
        high=value + half,
        reference=value + half / 2,
        reference_low=value - half / 4,
        reference_high=value + half,
        reference_text="a fresh sample of as many patients",
        direction=direction,
        unit=unit,
        how="from noised counts",
    )


def finding(key: str, label: str, value: float | None, half: float = 0.02, **more: str) -> Finding:
    made = figure(value, half, **more)  # type: ignore[arg-type]
    exact = None if value is None else value + half / 3
    return Finding(key=key, named=NamedFigure(label=label, figure=made), exact=exact)


def roc(label: str, style: str, lift: float, band: float = 0.0) -> Line:
    x = tuple(i / 20 for i in range(21))
    y = tuple(v**lift for v in x)
    low, high = (tuple(max(v - band, 0) for v in y), tuple(min(v + band, 1) for v in y)) if band else ((), ())
    return Line(label=label, x=x, y=y, low=low, high=high, style=style)


def survival(label: str, style: str, rate: float, band: float = 0.0) -> Line:
    x = tuple(15.0 * i for i in range(13))
    y = tuple(math.exp(-rate * v) for v in x)
    low, high = (tuple(v - band for v in y), tuple(min(v + band, 1) for v in y)) if band else ((), ())
    return Line(label=label, x=x, y=y, low=low, high=high, style=style, step=True)


def shares(name: str, seed: int, *, cells: int = 8, unit: str = "") -> Shares:
    raw = [1.0 + math.sin(seed + 1.7 * i) ** 2 for i in range(cells)]
    synthetic = tuple(v / sum(raw) for v in raw)
    real = tuple(v + 0.02 * math.sin(seed * 3.1 + i) for i, v in enumerate(synthetic))
    labels = (*(f"{10 * i}–{10 * i + 10}" for i in range(cells - 1)), "missing")
    return Shares(
        name=name,
        unit=unit,
        labels=labels,
        synthetic=synthetic,
        real=real,
        low=tuple(v - 0.03 for v in real),
        high=tuple(v + 0.03 for v in real),
        distance=figure(0.02 + 0.001 * (seed % 50), 0.01, direction="lower", unit="share"),
        exact=tuple(v + 0.01 * math.cos(i) for i, v in enumerate(real)),
    )


def difference_map(names: tuple[str, ...]) -> DifferenceMap:
    n = len(names)
    real = tuple(tuple(1.0 if i == j else math.cos(i * j + i + j) * 0.7 for j in range(n)) for i in range(n))
    synthetic = tuple(tuple(0.8 * v if i != j else v for j, v in enumerate(row)) for i, row in enumerate(real))
    worst = tuple(
        PairRow(
            first=names[0],
            second=names[k],
            real=figure(real[0][k], 0.05, unit="correlation"),
            synthetic=synthetic[0][k],
            difference=synthetic[0][k] - real[0][k],
        )
        for k in range(1, min(n, 11))
    )
    return DifferenceMap(title="Rank correlations", names=names, real=real, synthetic=synthetic, worst=worst)


def effects(n: int) -> tuple[Effect, ...]:
    return tuple(
        Effect(
            label=f"{NAMES[k % len(NAMES)]}, level {k}",
            figure=figure(math.exp(0.3 * math.sin(k)), 0.3, unit="odds ratio", direction="none"),
            beside=figure(math.exp(0.25 * math.sin(k + 0.1)), 0.1, unit="odds ratio", direction="none"),
            exact=math.exp(0.3 * math.sin(k) + 0.02),
        )
        for k in range(n)
    )


def sections(names: tuple[str, ...] = NAMES) -> tuple[Section, ...]:
    return (
        Section(
            key="fidelity",
            title="Fidelity: one column at a time",
            intro="Synthetic rows against held-out patients, whose counts left the hospitals with noise.",
            findings=(
                finding("tvd_complement", "Mean agreement of columns (1 − distance)", 0.962, 0.012),
                finding(
                    "smd", "Mean standardised difference", 0.041, 0.02, direction="lower", unit="standard deviations"
                ),
                finding("missing", "Greatest difference of missing shares", None, direction="lower"),
            ),
            shares=tuple(shares(name, i + 1, unit="mmHg" if i == 2 else "") for i, name in enumerate(names)),
        ),
        Section(
            key="associations",
            title="Associations between columns",
            intro="Rank correlations by the synthetic distribution functions.",
            findings=(finding("correlation_similarity", "Mean similarity of correlations", 0.91, 0.03),),
            maps=(difference_map(names),),
        ),
        Section(
            key="prediction",
            title="Utility: predicting the outcome",
            intro="A model trained on synthetic rows, judged on held-out patients by noised score histograms.",
            findings=(
                finding("tstr_auc", "AUC", 0.782, 0.021, unit="AUC"),
                finding("tstr_pr_auc", "Area under precision and recall", 0.61, 0.03),
                finding("tstr_f1", "F1", 0.58, 0.025, unit="F1"),
                finding("tstr_brier", "Brier score", 0.16, 0.02, direction="lower"),
                finding("tstr_calibration_slope", "Calibration slope", 1.12, 0.3, direction="none", unit="slope"),
            ),
            curves=(
                Curves(
                    title="ROC",
                    x_label="1 − specificity",
                    y_label="sensitivity",
                    x_range=(0.0, 1.0),
                    y_range=(0.0, 1.0),
                    lines=(roc("held-out patients", "real", 0.4, 0.05), roc("synthetic rows", "synthetic", 0.36)),
                    diagonal=True,
                    caption="The diagonal is chance.",
                ),
                Curves(
                    title="Calibration",
                    x_label="predicted chance",
                    y_label="share with the outcome",
                    x_range=(0.0, 1.0),
                    y_range=(0.0, 1.0),
                    lines=(
                        Line(
                            label="held-out patients",
                            x=(0.05, 0.2, 0.4, 0.6, 0.85),
                            y=(0.07, 0.18, 0.45, None, 0.8),
                            low=(0.03, 0.1, 0.35, None, 0.7),
                            high=(0.1, 0.25, 0.55, None, 0.9),
                            marks=True,
                        ),
                    ),
                    diagonal=True,
                ),
            ),
        ),
        Section(
            key="survival",
            title="Survival",
            intro="Kaplan–Meier curves by arm, from noised numbers of events and of censored patients.",
            findings=(
                finding("km_gap", "Greatest gap of the curves", 0.03, 0.015, direction="lower"),
                finding("rmst", "Difference of restricted mean survival", 3.4, 4.2, direction="none", unit="days"),
                finding("log_rank", "Log-rank test", 0.0003, 0.0001, direction="none", unit="p-value"),
            ),
            curves=(
                Curves(
                    title="Survival by arm",
                    x_label="days since randomisation",
                    y_label="alive",
                    x_range=(0.0, 180.0),
                    y_range=(0.0, 1.0),
                    lines=(
                        survival("aspirin, held-out", "real", 0.0030, 0.03),
                        survival("no aspirin, held-out", "real", 0.0042, 0.03),
                        survival("aspirin, synthetic", "synthetic", 0.0028),
                        survival("no aspirin, synthetic", "synthetic", 0.0038),
                    ),
                    count_title="Number at risk",
                    count_places=tuple(15.0 * i for i in range(13)),
                    counts=(
                        CountRow(label="aspirin, held-out", values=(*(2150.0 - 90 * i for i in range(12)), None)),
                        CountRow(label="no aspirin, held-out", values=tuple(2140.0 - 110 * i for i in range(13))),
                    ),
                ),
            ),
        ),
        Section(
            key="replication",
            title="Replication of analyses",
            intro="The same regression on synthetic rows and, one step from there, on held-out patients.",
            findings=(finding("agreement", "Intervals that overlap", 0.9, 0.05),),
            forests=(
                Forest(title="Logistic regression", unit="odds ratio", rows=effects(6), line=1.0),
                Forest(title="Cox regression", unit="hazard ratio", rows=effects(14), line=1.0),
            ),
        ),
        Section(
            key="nearness",
            title="How near synthetic rows lie to patients",
            intro="Similarity, not privacy.",
            findings=(
                finding("nearer", "Held-out patients nearer than training patients", 0.5, 0.04, direction="none"),
            ),
        ),
        Section(
            key="fairness",
            title="Fairness between groups",
            intro="Error rates by group, at a threshold fixed on synthetic rows.",
            findings=(finding("gap", "Greatest gap of sensitivity", None, direction="lower"),),
            forests=(
                Forest(
                    title="Sensitivity by group",
                    unit="share of patients with the outcome",
                    rows=(
                        Effect(label="women", figure=figure(0.71, 0.05), exact=0.7),
                        Effect(label="men", figure=figure(0.74, 0.05), exact=0.75),
                        Effect(label="age 80 and above", figure=figure(None)),
                    ),
                    line=0.73,
                ),
            ),
        ),
        Section(
            key="rare",
            title="Rare categories",
            intro="Categories of held-out patients by how frequent they are.",
            tables=(
                Table(
                    title="Recall by frequency band",
                    head=("Band", "Categories", "Found in the synthetic rows"),
                    rows=(TableRow(cells=("below 1 %", "14", "11")), TableRow(cells=("1 to 5 %", "9", "9"))),
                ),
            ),
        ),
        Section(
            key="rules",
            title="Clinical rules",
            intro="Rules of the dictionary, checked on the synthetic rows.",
            tables=(
                Table(
                    title="Rules",
                    head=("Rule", "Rows that break it"),
                    rows=(TableRow(cells=("discharge is not before admission", "0 of 10 000")),),
                ),
            ),
        ),
        Section(
            key="balance",
            title="Balance and representativeness",
            intro="Groups in the synthetic rows and among held-out patients.",
            findings=(finding("women", "Share of women", 0.47, 0.01, direction="none"),),
            notes=("The sites are not a sample of the country.",),
        ),
        Section(key="unheard", title="A section of tomorrow", intro="Its key is not known yet."),
    )


def verdicts() -> tuple[Verdict, ...]:
    words: tuple[tuple[str, Word, float | None], ...] = (
        ("Describing one column at a time", "good", 0.038),
        ("Counting combinations of two columns", "usable with care", 0.09),
        ("Training a prediction model", "good", 0.782),
        ("Replicating an analysis", "not fit", 0.4),
        ("Comparing groups", "cannot be assessed", None),
    )
    return tuple(
        Verdict(
            use=use,
            word=word,
            sentence="On held-out patients the figure is near that of a fresh real sample." if value else SWAMPED,
            thresholds="good: at most 0.02 from a fresh sample; with care: at most 0.06.",
            figure=figure(value),
        )
        for use, word, value in words
    )


def findings(found: tuple[Section, ...] | None = None) -> Findings:
    return Findings(
        sections=sections() if found is None else found,
        verdicts=verdicts(),
        headline="Good for describing one column at a time and training a prediction model. Not fit for the rest.",
        patients=4303.4,
        epsilon=0.5,
        exact_shown=True,
    )


def facts(**more: object) -> ReportFacts:
    stages = ("public ranges", "histograms", "marginals", "training", "evaluation: columns", "evaluation: scores")
    spent = (0.2, 0.9, 1.7, 2.9999, 0.3, 0.5)
    given = {
        "study_id": "stroke-8",
        "title": "Stroke trial in eight countries",
        "statement": "ε = 3 at δ = 1e-06 for one patient, add-or-remove, secure-sum; held-out patients: ε = 0.5.",
        "mode": "simulation",
        "plan": tuple(
            PlanRow(
                id=f"{i:02d}-{name.split()[0]}",
                purpose=name,
                kind="counts",
                repeats=1 if name != "training" else 400,
                sampling_rate=1.0 if name != "training" else 0.05,
                noise_multiplier=4.2,
                epsilon_cumulated=e,
            )
            for i, (name, e) in enumerate(zip(stages, spent))
        ),
        "budget": BudgetFacts(
            epsilon_total=3.0, epsilon_spent=2.9999, delta=1e-6, replace_one=5.7, hospitals2=6.1, hospitals3=9.4
        ),
        "rounds": tuple(
            RoundRow(
                round=r,
                purpose="training",
                answered=("north", "south", "west"),
                dropped=("east",) if r % 7 == 0 else (),
                seconds=1.2,
            )
            for r in range(1, 41)
        ),
        "provenance": {
            "Study": "stroke-8 (3f9ab27712cd5e01…)",
            "Run": "20260101-0001",
            "Plan digest (SHA-256)": "ab" * 32,
            "Dictionary digest (SHA-256)": "cd" * 32,
            **{f"Ledger head of {s}": "line 41, " + "0f" * 32 for s in ("coordinator", "north", "south", "west")},
            "SHA-256 of synthetic.parquet": "12" * 32,
            "Versions": "cohortium 0.2.0",
            "licence": "CC BY 4.0",
        },
        "warnings": (),
        "not_protected": ("What the records of all patients together say about everybody.",),
    }
    return ReportFacts(**(given | more))  # type: ignore[arg-type]
