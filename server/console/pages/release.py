"""Release: which runs may be handed out, what still stands in the way, who signed, and the folder itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from fastapi import Path as InPath
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.server.console import release_folder, release_view
from cohortium.server.console.access import READERS, Why, desk_of, may, see_run
from cohortium.server.console.accounts import COORDINATOR, SITE, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.release_folder import FOLDER, Written
from cohortium.server.console.release_view import Releases, Standing, releases_of
from cohortium.server.register import RunRow
from cohortium.server.release_documents import DOCUMENTS

router = APIRouter()

HERE = "/release"
WRITTEN, OPEN = 10, 24
"""Lines of a page. Each release has a manifest and up to a hundred signatures to be verified: fewer of them."""
RUN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Run = Annotated[str, InPath(pattern=RUN, max_length=63)]
PageNumber = Annotated[int, Query(ge=1, le=100_000)]
Document = Literal["README.md", "data-card.md", "model-card.md", "dpia-annex.md", "hipaa-annex.md"]
Reader = Annotated[Account, Depends(may(*READERS))]
Coordinator = Annotated[Account, Depends(may(COORDINATOR))]
Tick = Annotated[str, Form(max_length=10)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A line of the overview. written: None before a release; problem: a folder that cannot be read."""

    run: str
    since: int
    written: Written | None
    problem: CohortiumError | None

    def to_json(self) -> dict[str, Any]:
        release = None if self.written is None else self.written.to_json()
        if release is not None:
            release.pop("files")
        return {
            "run": self.run,
            "since": self.since,
            "release": release,
            "problem": None if self.problem is None else self.problem.as_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """written: releases, those that wait for somebody first; open: finished runs without one. Both newest first."""

    written: tuple[Listed, ...]
    open: tuple[Listed, ...]
    page: int
    pages: int


def overview(releases: Releases, rows: list[RunRow], page: int) -> Overview:
    """rows: what the account sees, newest first. At most WRITTEN releases are read for one request."""
    ended = [row for row in rows if row.state == "finished"]
    there = [row for row in ended if (releases.root(row) / FOLDER).exists()]
    there_too = {row.run for row in there}
    without = [row for row in ended if row.run not in there_too]
    pages = max(1, -(-len(there) // WRITTEN), -(-len(without) // OPEN))
    page = min(page, pages)
    written = [_listed(releases, row) for row in there[(page - 1) * WRITTEN : page * WRITTEN]]
    written.sort(key=lambda one: one.written is not None and one.written.complete)
    unwritten = (
        Listed(run=row.run, since=row.since, written=None, problem=None)
        for row in without[(page - 1) * OPEN : page * OPEN]
    )
    return Overview(written=tuple(written), open=tuple(unwritten), page=page, pages=pages)


def _listed(releases: Releases, row: RunRow) -> Listed:
    try:
        return Listed(run=row.run, since=row.since, written=releases.written(row), problem=None)
    except CohortiumError as error:
        return Listed(run=row.run, since=row.since, written=None, problem=error)


# ---- pages --------------------------------------------------------------------------------------------------


@router.get("/release")
def overview_page(request: Request, account: Reader, page: PageNumber = 1) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    return render(
        request,
        "releases.html.j2",
        title="Release",
        here=HERE,
        overview=overview(releases_of(desk), desk.runs(account), page),
    )


@router.get("/release/{run}")
def release_page(request: Request, run: Run, account: Reader, verify: Literal["now"] | None = None) -> Response:
    """verify=now: begin a reader's check of the folder in the background; the page shows it when it is there."""
    from cohortium.server.console.app import render

    desk = desk_of(request)
    row = see_run(desk, account, run)
    standing = releases_of(desk).standing(row, verify_now=verify == "now")
    folder = releases_of(desk).root(row)
    return render(
        request,
        "release.html.j2",
        title=f"Release of {run}",
        here=HERE,
        command=commands(standing, str(folder)) if account.role != SITE else None,
        row=row,
        standing=standing,
        documents=DOCUMENTS,
        lines_to_complete=to_complete(standing),
        registered=registered(desk, standing.written),
        acts=account.role == COORDINATOR,
        folder_name=folder_name(standing),
    )


@router.get("/release/{run}/documents/{name}")
def document_page(request: Request, run: Run, name: Document, account: Reader) -> Response:
    """A document as text, whatever is in it: of the release, or a draft before there is one."""
    from cohortium.server.console.app import render

    desk = desk_of(request)
    standing = releases_of(desk).standing(see_run(desk, account, run))
    return render(
        request,
        "release_document.html.j2",
        title=f"{name} of {run}",
        here=HERE,
        run=run,
        name=name,
        standing=standing,
        text=document(standing, name),
    )


@router.get("/release/{run}/folder.zip")
def download(request: Request, run: Run, account: Reader) -> Response:
    """The released folder: what passed the gate and was signed, for everybody who sees the run."""
    desk = desk_of(request)
    row = see_run(desk, account, run)
    written = releases_of(desk).written(row)
    name = folder_name(releases_of(desk).standing(row))
    pieces = release_folder.packed(written, name)
    desk.journal.note("download", by=account.name, on=run, file=f"{name}.zip", release=written.manifest.digest)
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return StreamingResponse(pieces, media_type="application/zip", headers=headers)


# ---- actions ------------------------------------------------------------------------------------------------


@router.post("/release/{run}/release")
def release_action(
    request: Request,
    run: Run,
    account: Coordinator,
    why: Why,
    rehearsal: Tick = "",
    guessed: Tick = "",
) -> Response:
    """Write and sign the folder. The gate decides on what lies on disk; the ticks are a person's word for two of its
    questions, as --rehearsal and --accept-guessed-ranges are."""
    desk = desk_of(request)
    row = see_run(desk, account, run)
    words = {"rehearsal": rehearsal == "yes", "accept_guessed": guessed == "yes"}
    given = {name: 1 for name, said in words.items() if said}
    made = desk.journal.act(account.name, "release", run, why, lambda: releases_of(desk).release(row, **words), **given)
    desk.journal.note("released", by=account.name, on=run, release=made.manifest.digest)
    return RedirectResponse(f"/release/{run}?did=released", status_code=303)


@router.post("/release/{run}/signatures")
def signature_action(
    request: Request,
    run: Run,
    account: Coordinator,
    why: Why,
    signature: Annotated[UploadFile, File()],
) -> Response:
    """Take a site's signature in: the file that `cohortium site sign` wrote at the hospital."""
    desk = desk_of(request)
    row = see_run(desk, account, run)
    raw = signature.file.read(release_folder.MOST_SIGNATURE + 1)
    if len(raw) > release_folder.MOST_SIGNATURE:
        raise UsageError("SIGNATURE-SIZE", "a signature's file is much smaller than this")
    releases = releases_of(desk)
    site = desk.journal.act(
        account.name, "take-signature", run, why, lambda: release_folder.take_signature(releases.written(row), raw)
    )
    desk.journal.note("signature", by=account.name, on=run, site=site)
    return RedirectResponse(f"/release/{run}?did=signature#signatures", status_code=303)


# ---- for programs -------------------------------------------------------------------------------------------


@router.get("/api/release")
def overview_json(request: Request, account: Reader, page: PageNumber = 1) -> JSONResponse:
    desk = desk_of(request)
    found = overview(releases_of(desk), desk.runs(account), page)
    return JSONResponse(
        {
            "written": [one.to_json() for one in found.written],
            "open": [one.run for one in found.open],
            "page": found.page,
            "pages": found.pages,
        }
    )


@router.get("/api/release/{run}")
def release_json(request: Request, run: Run, account: Reader, verify: Literal["now"] | None = None) -> JSONResponse:
    desk = desk_of(request)
    standing = releases_of(desk).standing(see_run(desk, account, run), verify_now=verify == "now")
    return JSONResponse({**standing.to_json(), "documents": to_complete(standing)})


# ---- what is shown ------------------------------------------------------------------------------------------


def commands(standing: Standing, folder: str) -> list[str]:
    if standing.written is None:
        return [f"cohortium release {folder}"]
    return [f"cohortium site sign /srv/cohortium {folder}/{FOLDER}", f"cohortium verify {folder}/{FOLDER}"]


def folder_name(standing: Standing) -> str:
    """How the folder is called where it is handed out; a rehearsal says what it is."""
    return f"{'NOT-PRIVATE-' if standing.loud else ''}{standing.run}-release"


def document(standing: Standing, name: str) -> str | None:
    """None: it is not there (yet). Refused DOCUMENT-MISSING where a release lacks it."""
    if standing.written is not None:
        path = standing.written.folder / name
        try:
            if path.is_symlink():
                raise OSError
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise Refused("DOCUMENT-MISSING", f"the release lacks {name}", hint="verify the folder") from None
    return None if standing.looked is None else standing.looked.drafts.get(name)


def to_complete(standing: Standing) -> dict[str, int]:
    """Document -> lines that only people can write; empty while nothing is known."""
    found: dict[str, int] = {}
    for name in DOCUMENTS:
        try:
            text = document(standing, name)
        except Refused:
            continue
        if text is not None:
            found[name] = text.count(release_view.TO_COMPLETE + ":")
    return found


def registered(desk: Desk, written: Written | None) -> dict[str, bool]:
    """Site -> whether the key in the release is one that this consortium's register knows for it."""
    if written is None:
        return {}
    raw = {site: key.public_bytes_raw() for site, key in written.keys.items()}
    return {site: key in {known for known, _ in desk.register.identities(site)} for site, key in raw.items()}
