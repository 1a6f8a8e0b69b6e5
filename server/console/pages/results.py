"""Results: a gallery of finished runs, one of them with all its figures, and up to four side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi import Path as InPath
from pydantic import StringConstraints
from starlette.responses import JSONResponse, Response, StreamingResponse

from cohortium.common.errors import CheckFailed, CohortiumError, Refused
from cohortium.common.evaluation.pictures import Identifiers
from cohortium.common.evaluation.report_text import amount, interval
from cohortium.common.web.guarding import REPORT_POLICY
from cohortium.server.backing import CHUNK_BYTES
from cohortium.server.console import compare_view, result_view
from cohortium.server.console.access import READERS, NotAllowed, desk_of, may, see_run
from cohortium.server.console.accounts import COORDINATOR, SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.result_file import Whole
from cohortium.server.console.result_view import results_of
from cohortium.server.register import RunRow

router = APIRouter()

HERE = "/results"
RUN = r"^[a-z0-9][a-z0-9-]{0,62}$"
MOST_ROWS = 1_000_000
"""Rows of another size that a browser may ask for; more come with `cohortium sample`."""
KINDS = {"parquet": "application/vnd.apache.parquet", "csv": "text/csv; charset=utf-8"}
Kind = Literal["parquet", "csv"]
Run = Annotated[str, InPath(pattern=RUN, max_length=63)]
StudyName = Annotated[str, Query(pattern=r"^[a-z0-9-]{0,63}$", max_length=63)]
PageNumber = Annotated[int, Query(ge=1, le=100_000)]
Chosen = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{0,63}$", max_length=63)]
Runs = Annotated[list[Chosen], Query(max_length=16)]
Reader = Annotated[Account, Depends(may(*READERS))]
Taker = Annotated[Account, Depends(may(COORDINATOR, SITE))]


# ---- pages --------------------------------------------------------------------------------------------------


@router.get("/results")
def gallery_page(request: Request, account: Reader, study: StudyName = "", page: PageNumber = 1) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    found = result_view.gallery(results_of(desk), desk.runs(account), study=study, page=page)
    ids = Identifiers()
    cards = [
        {"run": row.run, "since": row.since, "error": one}
        if isinstance(one, CohortiumError)
        else {"run": row.run, "since": row.since, "card": one, "picture": result_view.card_picture(ids, one)}
        for row, one in found.shown
    ]
    return render(
        request,
        "results.html.j2",
        title="Results",
        here=HERE,
        command=f"cohortium watch {desk.consortium.root} --json" if account.role != SITE else None,
        gallery=found,
        cards=cards,
    )


@router.get("/results/compare")
def compare_page(request: Request, account: Reader, run: Runs = []) -> Response:  # noqa: B006 - FastAPI copies it
    from cohortium.server.console.app import render

    desk = desk_of(request)
    facts: dict[str, Any] = {"wholes": []}
    if [name for name in run if name]:
        rows, wholes = _compared(desk, account, run)
        names = [row.run for row in rows]
        compared = compare_view.compare(wholes)
        facts = {
            "wholes": wholes,
            "letters": compare_view.LETTERS,
            "samples": [compare_view.sample(at) for at in range(len(wholes))],
            "shapes": compare_view.SHAPE_NAMES,
            "compared": compared,
            "pictures": compare_view.pictures(Identifiers(), compared, names),
            "settings": compare_view.settings([desk.run_folder(row).root for row in rows]),
            "caveats": compare_view.CAVEATS,
            "number": interval,
            "amount": amount,
        }
    return render(request, "compare.html.j2", title="Compare results", here=HERE, **facts)


@router.get("/results/{run}")
def result_page(request: Request, run: Run, account: Reader) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    row = see_run(desk, account, run)
    results = results_of(desk)
    whole = results.whole(row)
    folder = desk.run_folder(row).root
    return render(
        request,
        "result.html.j2",
        title=f"Results of {run}",
        here=HERE,
        command=_commands(folder) if account.role != SITE else None,
        row=row,
        whole=whole,
        tiles=result_view.tiles(whole.verdicts),
        sections=results.sections(row),
        figures=result_view.figure_rows(whole),
        gaps=result_view.unassessed(whole),
        may_download=result_view.may_download(desk, account, run),
        has={name: (folder / name).is_file() for name in ("report.html", "summary.pdf")},
        rows_planned=_planned(folder),
        most_rows=MOST_ROWS,
    )


# ---- files --------------------------------------------------------------------------------------------------


@router.get("/results/{run}/report")
def report(request: Request, run: Run, account: Reader) -> Response:
    """The full report as it was written: a page of its own, with no script and an origin of its own."""
    desk = desk_of(request)
    data = _file(desk, account, run, "report.html")
    return Response(data, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})


@router.get("/results/{run}/summary.pdf")
def summary(request: Request, run: Run, account: Reader) -> Response:
    desk = desk_of(request)
    data = _file(desk, account, run, "summary.pdf")
    desk.journal.note("download", by=account.name, on=run, file="summary.pdf", bytes=len(data))
    return Response(data, media_type="application/pdf", headers=_attached(_name(desk, account, run, "summary.pdf")))


@router.get("/results/{run}/synthetic.{kind}")
def published_rows(request: Request, run: Run, kind: Kind, account: Taker) -> Response:
    """The synthetic table as it was published, held against the digest that the study's ledger signed."""
    desk = desk_of(request)
    row, whole = _rows_of(desk, account, run)
    name = f"synthetic.{kind}"
    path = desk.run_folder(row).root / name
    size = _checked(path, whole.files.get(name, ""))
    desk.journal.note("download", by=account.name, on=run, file=name, bytes=size)
    headers = {**_attached(_name(desk, account, run, name)), "Content-Length": str(size)}
    return StreamingResponse(_pieces(path), media_type=KINDS[kind], headers=headers)


@router.post("/results/{run}/rows")
def sampled_rows(
    request: Request,
    run: Run,
    account: Taker,
    rows: Annotated[int, Form(ge=1, le=MOST_ROWS)],
    kind: Annotated[Kind, Form()],
) -> Response:
    """As many rows as are wanted, sampled from the published model: that costs no privacy, only time."""
    desk = desk_of(request)
    row, _ = _rows_of(desk, account, run)
    folder = desk.run_folder(row).root
    if rows == _planned(folder):
        return published_rows(request, run, kind, account)
    pieces = results_of(desk).backing.rows(run, rows, kind)
    name = f"synthetic-{rows}.{kind}"
    desk.journal.note("download", by=account.name, on=run, file=name, rows=rows)
    return StreamingResponse(pieces, media_type=KINDS[kind], headers=_attached(_name(desk, account, run, name)))


# ---- for programs -------------------------------------------------------------------------------------------


@router.get("/api/results")
def results_json(request: Request, account: Reader, study: StudyName = "", page: PageNumber = 1) -> JSONResponse:
    desk = desk_of(request)
    found = result_view.gallery(results_of(desk), desk.runs(account), study=study, page=page)
    told = [
        {"run": row.run, "since": row.since, **(one.as_json() if isinstance(one, CohortiumError) else one.to_json())}
        for row, one in found.shown
    ]
    return JSONResponse({"results": told, "page": found.page, "pages": found.pages, "total": found.total})


@router.get("/api/compare")
def compare_json(request: Request, account: Reader, run: Runs = []) -> JSONResponse:  # noqa: B006
    desk = desk_of(request)
    rows, wholes = _compared(desk, account, run)
    names = [row.run for row in rows]
    return JSONResponse(
        {
            "runs": [whole.card.to_json() for whole in wholes],
            "figures": [one.to_json(names) for one in compare_view.compare(wholes)],
            "settings": {
                one.name: dict(zip(names, one.values))
                for one in compare_view.settings([desk.run_folder(row).root for row in rows])
            },
            "caveats": list(compare_view.CAVEATS),
        }
    )


@router.get("/api/results/{run}")
def result_json(request: Request, run: Run, account: Reader) -> JSONResponse:
    desk = desk_of(request)
    row = see_run(desk, account, run)
    told = results_of(desk).whole(row).to_json()
    return JSONResponse({**told, "since": row.since, "may_download": result_view.may_download(desk, account, run)})


# ---- inside -------------------------------------------------------------------------------------------------


def _compared(desk: Desk, account: Account, runs: list[str]) -> tuple[list[RunRow], list[Whole]]:
    results = results_of(desk)
    rows = [see_run(desk, account, run) for run in compare_view.chosen(runs)]
    return rows, [results.whole(row) for row in rows]


def _rows_of(desk: Desk, account: Account, run: str) -> tuple[RunRow, Whole]:
    """What does not exist for an account is not found; what it may only read is refused."""
    row = see_run(desk, account, run)
    if not result_view.may_download(desk, account, run):
        raise NotAllowed
    return row, results_of(desk).whole(row)


def _file(desk: Desk, account: Account, run: str, name: str) -> bytes:
    row = see_run(desk, account, run)
    results_of(desk).whole(row)  # a result that is not shown has no report that is
    path = desk.run_folder(row).root / name
    try:
        if path.is_symlink():
            raise OSError
        return path.read_bytes()
    except OSError:
        raise Refused(
            "RESULT-MISSING", f"this run has no {name}", where=(name,), hint="cohortium report RUN writes it again"
        ) from None


def _checked(path: Path, sha256: str) -> int:
    """The size of a published file; CheckFailed RESULT-FILE where it is not the one whose digest was signed."""
    try:
        if path.is_symlink():
            raise OSError
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            size = file.tell()
    except OSError:
        raise Refused("RESULT-MISSING", f"this run has no {path.name}", where=(path.name,)) from None
    if not same:
        raise CheckFailed(
            "RESULT-FILE",
            f"{path.name} is not the file that was published",
            where=(path.name,),
            hint="cohortium audit RUN says more; restore the file from a backup",
        )
    return size


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _name(desk: Desk, account: Account, run: str, name: str) -> str:
    """A file's name as it is saved: the run's name and a fixed end, and in a rehearsal that it is one."""
    whole = results_of(desk).whole(see_run(desk, account, run))
    loud = "NOT-PRIVATE-" if whole.card.loud else ""
    return f"{loud}{run}-{name}"


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _commands(folder: Path) -> list[str]:
    """Where the coordinator's console and terminal are the same machine; a site's member has another one."""
    return [f"cohortium report {folder}", f"cohortium sample {folder} -n 1000"]


def _planned(folder: Path) -> int | None:
    """How many rows the study publishes; None where its plan cannot be read."""
    from cohortium.common.privacy.plan import Plan

    try:
        return Plan.loads((folder / "plan.json").read_bytes()).rows
    except (OSError, CohortiumError):
        return None
