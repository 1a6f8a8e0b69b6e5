"""Studies: what was proposed, version by version; drafts; and the form, with plan and price while it is typed."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, RedirectResponse, Response

from cohortium.common.errors import CohortiumError, Refused, UsageError
from cohortium.common.protocol.certificates import SITE
from cohortium.common.study import Study
from cohortium.server.console import study_form
from cohortium.server.console.access import EVERYTHING, confirmed, desk_of, may
from cohortium.server.console.accounts import COORDINATOR, Account
from cohortium.server.console.desk import Desk
from cohortium.server.console.jobs import jobs_of, nearest
from cohortium.server.console.previews import MOST_DICTIONARY, Facts, close_previews, previews_of
from cohortium.server.console.study_form import FIELDS, GROUPS, NAME, Draft, Drafts, head_of, stated, toml_of, values_of
from cohortium.server.console.study_view import KINDS, Version, changes, column_rows, signed, studies, versions

LOUD = "NOT private"
"""What is typed by whoever proposes a rehearsal."""
MOST_SEED = 2**31 - 1
Name = Annotated[str, Path(pattern=f"^{NAME}$", max_length=64)]


@asynccontextmanager
async def _ending(app: FastAPI) -> AsyncIterator[None]:
    yield
    close_previews(app.state.desk)


router = APIRouter(lifespan=_ending)


def drafts_of(desk: Desk) -> Drafts:
    return Drafts(desk.folder / "studies", clock=desk.clock)


coordinator = may(COORDINATOR)


async def typed(request: Request, account: Annotated[Account, Depends(coordinator)]) -> dict[str, Any]:
    """The fields of a form; a file stays a file."""
    form = await request.form(max_files=2, max_fields=80)
    return {name: form[name] for name in form}


Coordinator = Annotated[Account, Depends(coordinator)]
Reader = Annotated[Account, Depends(may(*EVERYTHING))]
Typed = Annotated[dict[str, Any], Depends(typed)]


# ---- what was proposed --------------------------------------------------------------------------------------


@router.get("/studies")
def overview(request: Request, account: Reader) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    return render(
        request,
        "studies.html.j2",
        title="Studies",
        here="/studies",
        command=f"cohortium run {desk.consortium.root} study.toml",
        studies=studies(desk),
        drafts=drafts_of(desk).all(),
    )


@router.get("/api/studies")
def overview_facts(request: Request, account: Reader) -> Response:
    desk = desk_of(request)
    drafts = [{"name": d.name, "title": d.title, "by": d.by, "at": d.at} for d in drafts_of(desk).all()]
    told = {name: [version.to_json() for version in found] for name, found in studies(desk).items()}
    return JSONResponse({"studies": told, "drafts": drafts})


@router.get("/studies/new")
def new(
    request: Request,
    account: Coordinator,
    draft: Annotated[str | None, Query(pattern=f"^{NAME}$", max_length=64)] = None,
    run: Annotated[str | None, Query(pattern=f"^{NAME}$", max_length=64)] = None,
    epsilon: Annotated[float | None, Query(gt=0, le=100, allow_inf_nan=False)] = None,
    how: Annotated[str, Query(pattern="^(form|file)$")] = "form",
) -> Response:
    """Empty, or filled from a draft or from a proposal; epsilon: chosen on a what-if's curve."""
    from cohortium.server.console.app import render

    desk = desk_of(request)
    study, dictionary, base = "", "", ""
    if draft is not None:
        found = drafts_of(desk).draft(draft)
        study, dictionary, base = found.study, found.dictionary, found.digest
    elif run is not None:
        made = signed(desk, _version(desk, run))
        study, dictionary = made.toml, made.dictionary
    if epsilon is not None:
        study = with_epsilon(study, epsilon)
    values = values_of(study) if study else dict(study_form.EMPTY)
    if not study and epsilon is not None:
        values = {**study_form.EMPTY, "epsilon": f"{epsilon:g}"}
    if values is None:
        how = "file"
    previews_of(desk).warm()
    return render(
        request,
        "study_form.html.j2",
        title="New study" if draft is None else f"Draft {draft}",
        here="/studies",
        command=["cohortium study check study.toml", f"cohortium run {desk.consortium.root} study.toml"],
        how=how,
        fixed=values is None,
        values=values or {},
        study=study or toml_of(study_form.EMPTY),
        dictionary=dictionary,
        base=base,
        draft=draft,
        enrolled=enrolled(desk),
        fields=FIELDS,
        groups=GROUPS,
    )


@router.post("/studies/preview")
def preview(request: Request, account: Coordinator, form: Typed) -> Response:
    """The plan and its price as a part of the page; errors as `study check` has them."""
    desk = desk_of(request)
    study, dictionary = _texts(form)
    hospitals = _whole(form.get("hospitals"), least=1, most=100)
    facts = previews_of(desk).of(account.name, study, dictionary, sites=enrolled(desk), hospitals=hospitals)
    if facts is None:
        return Response(status_code=204)  # a newer text is on its way: the page keeps what it shows
    return _part(request, "study_preview.html.j2", **told(desk, facts), text=study)


@router.post("/studies/new/dictionary")
def dictionary_field(request: Request, account: Coordinator, form: Typed) -> Response:
    """The text of a chosen file, as the field of the form that holds the dictionary."""
    given = form.get("dictionary_file")
    raw = given.file.read(4 * MOST_DICTIONARY + 1) if isinstance(given, UploadFile) else b""
    try:
        text, problem = raw.decode("utf-8-sig").replace("\0", ""), ""
    except UnicodeDecodeError:
        text, problem = "", "This file is not a text in UTF-8."
    if len(text) > MOST_DICTIONARY:
        text, problem = "", "This file is too long: a dictionary has at most 900 kB."
    answer = _part(request, "study_dictionary_field.html.j2", dictionary=text, problem=problem)
    answer.headers["HX-Trigger-After-Swap"] = "preview"
    return answer


@router.post("/studies/new")
def save(request: Request, account: Coordinator, form: Typed) -> Response:
    desk = desk_of(request)
    study, dictionary = _texts(form)
    drafts, base = drafts_of(desk), _text(form.get("base"))
    name = head_of(study)[0] if re.fullmatch(NAME, head_of(study)[0]) else "?"
    made: Draft = desk.journal.act(
        account.name,
        "save draft",
        name,
        "saved in the form",
        lambda: drafts.save(study, dictionary, by=account.name, base=base),
    )
    return RedirectResponse(f"/drafts/{made.name}?did=saved", status_code=303)


@router.get("/studies/{study}")
def latest(request: Request, account: Reader, study: Name) -> Response:
    return _version_page(request, versions(desk_of(request), study), 0)


@router.get("/api/studies/{study}")
def study_facts(request: Request, account: Reader, study: Name) -> Response:
    desk = desk_of(request)
    found = versions(desk, study)
    differ = [change.to_json() for change in _changes(desk, found, 0)]
    return JSONResponse({"study": study, "versions": [v.to_json() for v in found], "changes": differ})


@router.get("/studies/{study}/{run}")
def one(request: Request, account: Reader, study: Name, run: Name) -> Response:
    found, at = _place(desk_of(request), study, run)
    return _version_page(request, found, at)


@router.get("/studies/{study}/{run}/plan")
def plan_part(request: Request, account: Reader, study: Name, run: Name) -> Response:
    """Releases, price and cost: worked out beside the page, because a price takes its time."""
    desk = desk_of(request)
    found, at = _place(desk, study, run)
    made = signed(desk, found[at])
    facts = previews_of(desk).of(
        f"{account.name} reads {run}",
        made.toml,
        made.dictionary,
        plan=made.plan_json,
        accept_guessed=True,
    )
    if facts is None:
        return Response(status_code=204)
    return _part(request, "study_plan.html.j2", **told(desk, facts), sites=made.plan.sites)


@router.get("/studies/{study}/{run}/study.toml")
def study_file(request: Request, account: Reader, study: Name, run: Name) -> Response:
    desk = desk_of(request)
    found, at = _place(desk, study, run)
    return _download(signed(desk, found[at]).toml, f"{run}.study.toml", "application/toml")


@router.get("/studies/{study}/{run}/dictionary.json")
def dictionary_file(request: Request, account: Reader, study: Name, run: Name) -> Response:
    desk = desk_of(request)
    found, at = _place(desk, study, run)
    return _download(signed(desk, found[at]).dictionary, f"{run}.dictionary.json", "application/json")


# ---- drafts -------------------------------------------------------------------------------------------------


@router.get("/drafts/{name}")
def draft_page(request: Request, account: Reader, name: Name) -> Response:
    from cohortium.server.console.app import render

    desk = desk_of(request)
    draft = drafts_of(desk).draft(name)
    previews_of(desk).warm()
    return render(
        request,
        "study_draft.html.j2",
        title=f"Draft {name}",
        here="/studies",
        command=[f"cohortium study check {name}.study.toml", f"cohortium run {desk.consortium.root} {name}.study.toml"],
        draft=draft,
        acts=account.role == COORDINATOR,
    )


@router.get("/drafts/{name}/plan")
def draft_plan(request: Request, account: Reader, name: Name) -> Response:
    """The draft's plan, and the form that proposes it where it can be proposed."""
    desk = desk_of(request)
    draft = drafts_of(desk).draft(name)
    of, who = previews_of(desk).of, f"{account.name} reads {name}"
    facts = of(who, draft.study, draft.dictionary, sites=enrolled(desk))
    guessed = facts is not None and facts.get("error", {}).get("error") == "STUDY-GUESSED"
    warning = facts["error"] if guessed and facts is not None else None
    if guessed:
        facts = of(who, draft.study, draft.dictionary, sites=enrolled(desk), accept_guessed=True)
    if facts is None:
        return Response(status_code=204)
    return _part(
        request,
        "study_draft_plan.html.j2",
        **told(desk, facts),
        sites=facts.get("sites", ()),
        draft=draft,
        warning=warning,
        csrf=request.state.session.csrf,
        acts=account.role == COORDINATOR,
        loud=LOUD,
    )


@router.get("/drafts/{name}/study.toml")
def draft_study(request: Request, account: Reader, name: Name) -> Response:
    return _download(drafts_of(desk_of(request)).draft(name).study, f"{name}.study.toml", "application/toml")


@router.get("/drafts/{name}/dictionary.json")
def draft_dictionary(request: Request, account: Reader, name: Name) -> Response:
    found = drafts_of(desk_of(request)).draft(name).dictionary
    return _download(found, f"{name}.dictionary.json", "application/json")


@router.post("/drafts/{name}/propose")
def propose(request: Request, account: Coordinator, form: Typed, name: Name) -> Response:
    """Sign the draft and put it before its sites' officers, exactly as it was shown."""
    desk, reason = desk_of(request), confirmed(form)
    draft = drafts_of(desk).draft(name)
    if _text(form.get("digest")) != draft.digest:
        raise Refused("DRAFT-CHANGED", "the draft was changed after this page was loaded", hint="look at it again")
    seed = _seed(form)
    accept = form.get("accept_guessed") == "yes"
    facts: dict[str, str | int] = {"digest": draft.digest, "guessed": "accepted" if accept else "refused"}
    if seed is not None:
        facts["rehearsal_seed"] = seed

    def do() -> str:
        # What cannot be compiled in the child's time is not compiled in this process at all.
        checked = previews_of(desk).of(
            f"{account.name} proposes", draft.study, draft.dictionary, sites=enrolled(desk), accept_guessed=accept
        )
        if checked is None or "error" in checked:
            raise _error({} if checked is None else checked["error"])
        drafts = drafts_of(desk)
        study = Study.parse(draft.study, folder=drafts.root / name)
        if drafts.draft(name).digest != draft.digest:
            raise Refused("DRAFT-CHANGED", "the draft was changed meanwhile", hint="look at it again")
        return desk.consortium.propose(study, seed=seed, accept_guessed_ranges=accept)

    run = desk.journal.act(account.name, "propose", name, reason, do, **facts)
    drafts_of(desk).remove(name)  # the proposal has all of it
    return RedirectResponse(f"/runs/{run}?did=proposed", status_code=303)


@router.post("/drafts/{name}/remove")
def remove(request: Request, account: Coordinator, form: Typed, name: Name) -> Response:
    desk, reason = desk_of(request), confirmed(form)
    desk.journal.act(account.name, "remove draft", name, reason, lambda: drafts_of(desk).remove(name))
    return RedirectResponse("/studies?did=removed", status_code=303)


# ---- beside the routes --------------------------------------------------------------------------------------


def enrolled(desk: Desk) -> list[str]:
    """Names of the sites that take part now."""
    return [m.name for m in desk.register.members() if m.role == SITE and m.active]


def told(desk: Desk, facts: Facts) -> dict[str, Any]:
    """What the parts with a plan are told: facts, the error of the compiler, and what past what-ifs say."""
    error = facts.get("error")
    if error is not None:
        return {"facts": None, "error": error, "known": None, "kinds": KINDS}
    study = facts["study"]
    known = nearest(
        jobs_of(desk).all(),
        columns=study["columns"],
        patients=study["patients"],
        epsilon=study["epsilon"],
        mode=facts["plan"]["mode"],
    )
    return {"facts": facts, "error": None, "known": known, "kinds": KINDS}


def with_epsilon(study: str, epsilon: float) -> str:
    """The same text with another ε in [privacy], where it has one on a line of its own."""
    lines, inside = study.split("\n"), False
    for at, line in enumerate(lines):
        if line.lstrip().startswith("["):
            inside = line.strip() == "[privacy]"
        elif inside and line.partition("=")[0].strip() == "epsilon":
            lines[at] = f"epsilon = {epsilon:g}"
            changed = "\n".join(lines)
            return changed if stated(changed, "privacy", "epsilon") == epsilon else study
    return study


def _version(desk: Desk, run: str) -> Version:
    found = next((v for some in studies(desk).values() for v in some if v.run == run), None)
    if found is None:
        raise Refused("RUN-UNKNOWN", "there is no such run")
    return found


def _place(desk: Desk, study: str, run: str) -> tuple[list[Version], int]:
    found = versions(desk, study)
    at = next((i for i, version in enumerate(found) if version.run == run), None)
    if at is None:
        raise Refused("RUN-UNKNOWN", "there is no such run of this study")
    return found, at


def _changes(desk: Desk, found: list[Version], at: int) -> list[Any]:
    if at + 1 >= len(found):
        return []
    new, old = (signed(desk, version) for version in found[at : at + 2])
    return changes((old.toml, old.dictionary), (new.toml, new.dictionary))


def _version_page(request: Request, found: list[Version], at: int) -> Response:
    from cohortium.server.console.app import render

    desk, version = desk_of(request), found[at]
    made = signed(desk, version)
    previews_of(desk).warm()
    folder = desk.consortium.root / "runs" / version.run
    return render(
        request,
        "study.html.j2",
        title=version.title,
        here="/studies",
        command=[f"cohortium study check {folder}/study.toml", f"cohortium watch {desk.consortium.root} {version.run}"],
        version=version,
        versions=found,
        number=len(found) - at,
        plan=made.plan,
        study=made.study,
        signed=made,
        columns=column_rows(made.study.schema),
        all_columns=len(made.study.schema.columns),
        changes=_changes(desk, found, at),
        earlier=found[at + 1] if at + 1 < len(found) else None,
    )


def _part(request: Request, template: str, **facts: Any) -> Response:
    pages = request.app.state.pages
    found: Response = pages.page(template, **facts)
    return found


def _texts(form: Mapping[str, Any]) -> tuple[str, str]:
    """(study.toml, dictionary) as a form says them."""
    dictionary = _text(form.get("dictionary"))
    if form.get("how") == "file":
        return _text(form.get("study")), dictionary
    return toml_of({field.name: _text(form.get(field.name)) for field in FIELDS}), dictionary


def _text(value: Any) -> str:
    """A field's text with plain line ends; "" for a file or nothing, and without what UTF-8 cannot hold."""
    if not isinstance(value, str):
        return ""
    return value.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")


def _whole(value: Any, *, least: int, most: int) -> int | None:
    text = _text(value).strip()
    fine = text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most
    return int(text) if fine else None


def _seed(form: Mapping[str, Any]) -> int | None:
    """The seed of a rehearsal. Refused REHEARSAL-WORD without the loud words; UsageError REHEARSAL-SEED."""
    text = _text(form.get("seed")).strip()
    if not text:
        return None
    seed = _whole(text, least=0, most=MOST_SEED)
    if seed is None:
        raise UsageError("REHEARSAL-SEED", "a seed is a whole number from 0 on", hint="leave it empty for a real study")
    if _text(form.get("loud")).strip() != LOUD:
        raise Refused(
            "REHEARSAL-WORD",
            "a seeded run's noise can be computed again: it protects nobody",
            hint=f'type "{LOUD}" beside the seed, or leave the seed empty for a real study',
        )
    return seed


def _error(facts: Mapping[str, Any]) -> CohortiumError:
    """An error that the child told, as an error again."""
    if not facts:
        return Refused("PREVIEW-BUSY", "the study is being compiled elsewhere", hint="try again in a moment")
    where = tuple(map(str, facts["where"]))
    return UsageError(str(facts["error"]), str(facts["sentence"]), where=where, hint=str(facts["fix"]))


def _download(text: str, name: str, kind: str) -> Response:
    """name: made of checked identifiers only."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type=kind, headers=headers)
