"""What if: expected quality against ε on a stand-in table, so that ε is chosen and not guessed. Asks no hospital."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from markupsafe import Markup
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, RedirectResponse, Response

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.server.console import curve
from cohortium.server.console.access import EVERYTHING, confirmed, desk_of, may
from cohortium.server.console.accounts import COORDINATOR, Account
from cohortium.server.console.jobs import IDENTITY, MOST_SEEDS, MOST_TABLE, Job, close_jobs, jobs_of
from cohortium.server.console.pages.studies import Coordinator, Typed, drafts_of, enrolled
from cohortium.server.console.previews import FILE
from cohortium.server.console.study_form import NAME, stated

DECLARED = "no private record: public, or drawn from a release"
MOST_SITES = 1000
Reader = Annotated[Account, Depends(may(*EVERYTHING))]
JobName = Annotated[str, Path(pattern=f"^{IDENTITY}$", max_length=20)]


@asynccontextmanager
async def _ending(app: FastAPI) -> AsyncIterator[None]:
    yield
    close_jobs(app.state.desk)


router = APIRouter(lifespan=_ending)


@router.get("/whatif")
def overview(
    request: Request,
    account: Reader,
    draft: Annotated[str | None, Query(pattern=f"^{NAME}$", max_length=64)] = None,
) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    jobs = jobs_of(desk).all()
    return render(
        request,
        "whatif.html.j2",
        title="What if",
        here="/studies",
        command="cohortium what-if study.toml --table STAND-IN --not-private --split iid:5 --epsilons 0.5,1,3,10",
        jobs=jobs,
        drafts=drafts_of(desk).all(),
        chosen=draft,
        busy=any(job.active for job in jobs),
        enrolled=len(enrolled(desk)),
        most_mb=MOST_TABLE // 10**6,
    )


@router.get("/api/whatif")
def overview_facts(request: Request, account: Reader) -> Response:
    return JSONResponse([told(job) for job in jobs_of(desk_of(request)).all()])


@router.get("/api/whatif/{job}")
def job_facts(request: Request, account: Reader, job: JobName) -> Response:
    return JSONResponse(told(jobs_of(desk_of(request)).job(job)))


@router.post("/whatif")
def begin(request: Request, account: Coordinator, form: Typed) -> Response:
    """Store the stand-in, start the child. The declaration, and the table's digest, are in the journal."""
    desk, reason = desk_of(request), confirmed(form)
    if form.get("declared") != "yes":
        raise Refused(
            "WHAT-IF-DECLARE",
            "nobody has said that the table holds no private record",
            hint="choosing ε by looking at private records is a look at them, which nobody would have paid for",
        )
    draft = drafts_of(desk).draft(_text(form, "draft"))
    if stated(draft.study, "study", "dictionary") != FILE:
        # The child would read whatever file of this machine the draft names.
        raise UsageError("STUDY-VALUE", "a draft keeps its dictionary beside it", hint=f'[study] dictionary = "{FILE}"')
    given = form.get("table")
    table = given.file.read(MOST_TABLE + 1) if isinstance(given, UploadFile) else b""
    file = (given.filename or "table") if isinstance(given, UploadFile) else "table"
    epsilons, seeds = numbers(_text(form, "epsilons")), _whole(form, "seeds", most=MOST_SEEDS)
    epsilon = stated(draft.study, "privacy", "epsilon")
    split = split_of(draft.study, _text(form, "hospitals").strip(), len(enrolled(desk)))
    jobs = jobs_of(desk)
    if any(job.active for job in jobs.all()):
        raise Refused("WHAT-IF-BUSY", "a what-if is running: one at a time", hint="wait for it, or cancel it")

    def do() -> str:
        name = jobs.make(
            by=account.name,
            draft=draft.name,
            study=draft.study,
            dictionary=draft.dictionary,
            table=table,
            file=_plain(file),
            epsilon=float(epsilon) if isinstance(epsilon, int | float) and 0 < epsilon <= 100 else None,
            epsilons=epsilons,
            seeds=seeds,
            split=split,
        )
        jobs.start(name)
        return name

    name = desk.journal.act(
        account.name,
        "what-if",
        draft.name,
        reason,
        do,
        declared=DECLARED,
        stand_in="sha256:" + hashlib.sha256(table).hexdigest(),
    )
    return RedirectResponse(f"/whatif/{name}?did=started", status_code=303)


@router.get("/whatif/{job}")
def one(request: Request, account: Reader, job: JobName) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    found = jobs_of(desk).job(job)
    return render(
        request,
        "whatif_job.html.j2",
        title=f"What if: {found.draft}",
        here="/studies",
        command=command(found),
        **_shown(request, found, account),
    )


@router.get("/whatif/{job}/part")
def part(request: Request, account: Reader, job: JobName) -> Response:
    """Progress and curve, asked for every two seconds while the job runs."""
    found = jobs_of(desk_of(request)).job(job)
    answer: Response = request.app.state.pages.page(
        "whatif_part.html.j2", csrf=request.state.session.csrf, **_shown(request, found, account)
    )
    return answer


@router.post("/whatif/{job}/cancel")
def cancel(request: Request, account: Coordinator, form: Typed, job: JobName) -> Response:
    desk, reason = desk_of(request), confirmed(form)
    desk.journal.act(account.name, "cancel what-if", job, reason, lambda: jobs_of(desk).cancel(job))
    return RedirectResponse(f"/whatif/{job}", status_code=303)


@router.post("/whatif/{job}/resume")
def resume(request: Request, account: Coordinator, form: Typed, job: JobName) -> Response:
    desk, reason = desk_of(request), confirmed(form)
    desk.journal.act(account.name, "resume what-if", job, reason, lambda: jobs_of(desk).start(job))
    return RedirectResponse(f"/whatif/{job}?did=started", status_code=303)


@router.post("/whatif/{job}/remove")
def remove(request: Request, account: Coordinator, form: Typed, job: JobName) -> Response:
    desk, reason = desk_of(request), confirmed(form)
    desk.journal.act(account.name, "remove what-if", job, reason, lambda: jobs_of(desk).remove(job))
    return RedirectResponse("/whatif?did=removed", status_code=303)


# ---- beside the routes --------------------------------------------------------------------------------------


def told(job: Job) -> dict[str, Any]:
    return asdict(job)


def command(job: Job) -> str:
    split = f" --split {job.split}" if job.split else ""
    tried = ",".join(f"{e:g}" for e in job.epsilons)
    return (
        f"cohortium what-if study.toml --table STAND-IN --not-private{split} --epsilons {tried} --seeds {job.seeds} "
        f"--out what-if"
    )


def split_of(study: str, hospitals: str, enrolled: int) -> str | None:
    """How many hospitals share the noise: as typed, else the study's own (None), else all that are enrolled."""
    if hospitals:
        fine = hospitals.isascii() and hospitals.isdigit() and len(hospitals) < 6 and 1 <= int(hospitals) <= MOST_SITES
        if not fine:
            raise UsageError("WHAT-IF-SITES", "the number of hospitals is a whole number from 1 on", hint="5")
        return f"iid:{int(hospitals)}"
    if stated(study, "sites", "names"):
        return None
    if not enrolled:
        raise UsageError("WHAT-IF-SITES", "no site is enrolled yet", hint="say for how many hospitals")
    return f"iid:{enrolled}"


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5, 1 3" as numbers; UsageError WHAT-IF-EPSILONS."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError("WHAT-IF-EPSILONS", "the ε are not a list of numbers", hint="0.5 1 3 10") from None


def _shown(request: Request, job: Job, account: Account) -> dict[str, Any]:
    result = job.result
    try:
        # The picture is made of escaped parts (curve.py): the only markup of this page that is no template.
        drawn = [(n, t, Markup(svg)) for n, t, svg in curve.pictures(result, marked=job.epsilon)] if result else []
    except (AttributeError, KeyError, TypeError, ValueError):
        drawn = []  # a file that is not as ours: the page says how the job stands, and draws nothing
    drafts = drafts_of(desk_of(request))
    try:
        editable = drafts.draft(job.draft) is not None
    except CohortiumError:
        editable = False
    return {
        "job": job,
        "result": result if drawn else None,
        "pictures": drawn,
        "acts": account.role == COORDINATOR,
        "editable": editable,
    }


def _text(form: dict[str, Any], name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _whole(form: dict[str, Any], name: str, *, most: int) -> int:
    text = _text(form, name).strip()
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= most):
        raise UsageError("WHAT-IF-SEEDS", f"the repetitions are a whole number from 1 to {most}", hint="3")
    return int(text)


def _plain(name: str) -> str:
    """A file's name as it is shown: no folders, nothing that cannot be printed."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(ch if ch.isprintable() else "\ufffd" for ch in last)[:120] or "table"
