"""A tagged A4 page to draw on, from the top down, with text that always finds a glyph.

Fonts are those every PDF reader has: Helvetica, with Symbol for ε, δ, σ, ≤ and the minus (reportlab finds it by
itself). A letter that none of them has loses its accent, or becomes ■; nothing makes it fail. Marked content and
structure tree (ISO 32000-1, 14.7 and 14.8) give screen readers the order of reading and each picture's description.
Equal drawing gives equal bytes.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from reportlab.lib.colors import HexColor  # type: ignore[import-untyped]
from reportlab.pdfbase import pdfdoc  # type: ignore[import-untyped]
from reportlab.pdfbase.pdfmetrics import stringWidth  # type: ignore[import-untyped]
from reportlab.pdfgen.canvas import Canvas  # type: ignore[import-untyped]

from cohortium.common.text import clean

WIDTH, HEIGHT = 595.28, 841.89
"""A4 in points."""
PLAIN, BOLD, CODE = "Helvetica", "Helvetica-Bold", "Courier"
INK, SOFT, LINE, PAPER = "#1b1f24", "#57606a", "#d5d9de", "#ffffff"
BLUE, ORANGE, GREEN, AMBER, RED, PURPLE, BAND = (
    "#0072b2",
    "#d55e00",
    "#00704f",
    "#8a5a00",
    "#b03a00",
    "#a8447f",
    "#c9ced3",
)
SPACES = dict.fromkeys("\u2009\u202f\u2007\u2002\u2003", "\u00a0")
LIKE = SPACES | {"ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "‑": "-", "−": "−"}
SYMBOLS = frozenset("εδσαβγκλμνπρτφχψωθΔΣΩ≤≥≠≈∞−∑√→←×±·")


@lru_cache(maxsize=4096)
def glyph(character: str) -> str:
    """The character, its likeness that the fonts have, or ■."""
    character = LIKE.get(character, character)
    if character in SYMBOLS or _latin(character):
        return character
    return "".join(c for c in unicodedata.normalize("NFKD", character) if _latin(c)) or "■"


def _latin(character: str) -> bool:
    try:
        character.encode("cp1252")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: object) -> str:
    """Text of which every character has a glyph; control and direction-changing characters become ■."""
    return "".join(map(glyph, clean(text)))


def wide(text: str, size: float, font: str = PLAIN) -> float:
    """Width of printable text [points]."""
    return float(stringWidth(text, font, size))


def cut(text: str, room: float, size: float, font: str = PLAIN) -> str:
    """The text if there is room for it, else its beginning and an ellipsis."""
    if wide(text, size, font) <= room:
        return text
    kept = text[: int(4 * room / size) + 1]
    while kept and wide(kept + "…", size, font) > room:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def wrap(text: str, room: float, size: float, font: str = PLAIN, *, lines: int) -> list[str]:
    """At most so many lines; words longer than a line are broken, what is left over becomes an ellipsis."""
    text = text[: int(8 * lines * room / size) + 80]  # no letter is narrower than an eighth of its size
    out: list[str] = [""]
    for word in text.split(" "):
        joined = f"{out[-1]} {word}" if out[-1] else word
        if wide(joined, size, font) <= room:
            out[-1] = joined
            continue
        rest = word
        if out[-1]:
            out.append("")
        while rest and len(out) <= lines:
            n = len(rest)
            while n > 1 and wide(rest[:n], size, font) > room:
                n = min(n - 1, max(1, int(n * room / wide(rest[:n], size, font)) + 1))
            out[-1], rest = rest[:n], rest[n:]
            if rest:
                out.append("")
        if len(out) > lines:
            break
    if len(out) > lines:
        out = [*out[: lines - 1], cut(out[lines - 1] + "…" * 2, room, size, font).replace("…" * 2, "…")]
    return out


class Sheet:
    """Pages of a document. Places are points from the left and from the top."""

    def __init__(self, *, title: str, subject: str) -> None:
        self._bytes = BytesIO()
        self._canvas = Canvas(self._bytes, pagesize=(WIDTH, HEIGHT), invariant=1, pageCompression=1, lang="en")
        self._canvas.setTitle(printable(title))
        self._canvas.setSubject(printable(subject))
        self._canvas.setCreator("cohortium")
        self._canvas.setAuthor("cohortium")
        self._canvas.setViewerPreference("DisplayDocTitle", "true")
        self._tree = _Tree(self._canvas._doc)
        self._open = False

    def page(self) -> None:
        """End this page."""
        self._canvas.showPage()
        self._tree.next_page()

    def save(self, out: Path) -> Path:
        """Write the file (replaced atomically); call after the last `page`."""
        self._tree.close()
        self._canvas.save()
        part = out.with_name(out.name + ".part")
        part.write_bytes(self._bytes.getvalue())
        os.replace(part, out)
        return out

    @contextmanager
    def group(self, kind: str) -> Iterator[None]:
        """A structure element that holds others: Table, TR, L."""
        self._tree.enter(kind)
        yield
        self._tree.leave()

    @contextmanager
    def tagged(self, kind: str, alt: str = "") -> Iterator[None]:
        """What is drawn inside is one element: H1, P, TD, Figure with its description in `alt`."""
        number = self._tree.mark(kind, printable(alt))
        self._canvas._code.append(f"/{kind} <</MCID {number}>> BDC")
        self._open = True
        yield
        self._open = False
        self._canvas._code.append("EMC")

    @contextmanager
    def _artifact(self) -> Iterator[None]:
        """Whatever is drawn outside an element is decoration."""
        if self._open:
            yield
            return
        self._canvas._code.append("/Artifact BMC")
        yield
        self._canvas._code.append("EMC")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 8.5,
        font: str = PLAIN,
        colour: str = INK,
        anchor: str = "start",
        room: float = WIDTH,
    ) -> None:
        """One line; y: its baseline. room: cut to this width [points]."""
        shown = cut(printable(text), room, size, font)
        move = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * wide(shown, size, font)
        with self._artifact():
            self._canvas.setFillColor(HexColor(colour))
            self._canvas.setFont(font, size)
            self._canvas.drawString(x - move, HEIGHT - y, shown)

    def paragraph(
        self,
        x: float,
        y: float,
        text: str,
        *,
        room: float,
        lines: int,
        size: float = 8.5,
        font: str = PLAIN,
        colour: str = INK,
        tag: str = "P",
    ) -> float:
        """Lines below y; returns where the next one may begin."""
        if not text or lines < 1:
            return y
        with self.tagged(tag):
            for line in wrap(printable(text), room, size, font, lines=lines):
                y += size * 1.25
                self.text(x, y - size * 0.25, line, size=size, font=font, colour=colour)
        return y

    def rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str = "", stroke: str = "", alpha: float = 1.0
    ) -> None:
        """y: its upper edge."""
        with self._artifact():
            self._canvas.saveState()
            if fill:
                self._canvas.setFillColor(HexColor(fill), alpha=alpha)
            if stroke:
                self._canvas.setStrokeColor(HexColor(stroke))
                self._canvas.setLineWidth(0.7)
            self._canvas.rect(x, HEIGHT - y - height, width, height, stroke=int(bool(stroke)), fill=int(bool(fill)))
            self._canvas.restoreState()

    def path(
        self,
        points: Sequence[tuple[float, float]],
        *,
        stroke: str = "",
        fill: str = "",
        weight: float = 1.0,
        dash: Sequence[float] = (),
        alpha: float = 1.0,
    ) -> None:
        """A line through all points, closed where filled."""
        if not points:
            return
        with self._artifact():
            self._canvas.saveState()
            made = self._canvas.beginPath()
            made.moveTo(points[0][0], HEIGHT - points[0][1])
            for x, y in points[1:]:
                made.lineTo(x, HEIGHT - y)
            if fill:
                made.close()
                self._canvas.setFillColor(HexColor(fill), alpha=alpha)
            if stroke:
                self._canvas.setStrokeColor(HexColor(stroke))
                self._canvas.setLineWidth(weight)
                self._canvas.setDash(*((list(dash), 0) if dash else ([], 0)))
            self._canvas.drawPath(made, stroke=int(bool(stroke)), fill=int(bool(fill)))
            self._canvas.restoreState()

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        with self._artifact():
            self._canvas.setFillColor(HexColor(colour))
            self._canvas.circle(x, HEIGHT - y, radius, stroke=0, fill=1)


class _Tree:
    """The structure tree of a document, built while it is drawn."""

    def __init__(self, document: pdfdoc.PDFDocument) -> None:
        self._document = document
        self._root = pdfdoc.PDFDictionary({"Type": pdfdoc.PDFName("StructTreeRoot")})
        self._root_reference = document.Reference(self._root, "structure")
        self._serial = 0
        self._stack = [self._element("Document", self._root_reference)]
        self._root["K"] = self._stack[0][1]
        self._marked: list[list[pdfdoc.PDFObjectReference]] = [[]]

    def _element(
        self, kind: str, parent: pdfdoc.PDFObjectReference
    ) -> tuple[pdfdoc.PDFDictionary, pdfdoc.PDFObjectReference, list[pdfdoc.PDFObjectReference]]:
        self._serial += 1
        made = pdfdoc.PDFDictionary({"Type": pdfdoc.PDFName("StructElem"), "S": pdfdoc.PDFName(kind), "P": parent})
        return made, self._document.Reference(made, f"element{self._serial}"), []

    def enter(self, kind: str) -> None:
        element = self._element(kind, self._stack[-1][1])
        self._stack[-1][2].append(element[1])
        self._stack.append(element)

    def leave(self) -> None:
        made, _, children = self._stack.pop()
        made["K"] = pdfdoc.PDFArray(children)

    def mark(self, kind: str, alt: str) -> int:
        """A leaf on this page; its number there."""
        number = len(self._marked[-1])
        made, reference, _ = self._element(kind, self._stack[-1][1])
        made["Pg"] = self._document.thisPageRef()
        made["K"] = number
        if alt:
            made["Alt"] = pdfdoc.PDFString(alt)
        self._stack[-1][2].append(reference)
        self._marked[-1].append(reference)
        return number

    def next_page(self) -> None:
        self._marked.append([])

    def close(self) -> None:
        """Hang the tree into the catalog, and each page into the tree."""
        while self._stack:
            self.leave()
        numbers: list[object] = []
        for n, page in enumerate(self._document.Pages.pages):
            page.__NoDefault__ = [*page.__NoDefault__, "StructParents", "Tabs"]
            page.StructParents, page.Tabs = n, pdfdoc.PDFName("S")
            numbers += [n, self._document.Reference(pdfdoc.PDFArray(self._marked[n]), f"marked{n}")]
        self._root["ParentTree"] = pdfdoc.PDFDictionary({"Nums": pdfdoc.PDFArray(numbers)})
        self._root["ParentTreeNextKey"] = len(self._marked)
        self._document.Catalog.StructTreeRoot = self._root_reference
        self._document.Catalog.MarkInfo = pdfdoc.PDFDictionary({"Marked": "true"})
