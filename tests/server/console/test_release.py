"""Releases in the console: the gate as it stands, who signs, what is handed out, and no way round the gate."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from console_worlds import act, bare, desk_over
from hospital import key
from releasable import HOSTILE, another, journal_of, signed_in, visitor, world
from releasing import RUN, SITES, Finished, edit_json
from starlette.testclient import TestClient

from cohortium.client.signing_release import check_release, endorse
from cohortium.common.protocol.release_manifest import ENVELOPE, Envelope, Manifest, sign_release
from cohortium.server import release as release_module
from cohortium.server.console import release_folder, release_view
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.desk import Desk
from cohortium.server.console.release_checklist import FAILED, LOOKING, MISSES, OK, ORDER, WORD, Item, gate_then
from cohortium.server.console.release_folder import packed, read_written, take_signature
from cohortium.server.console.release_view import look, releases_of
from cohortium.server.console.result_file import REHEARSAL
from cohortium.server.consortium import Consortium
from cohortium.server.release_documents import DOCUMENTS
from cohortium.server.release_gate import Finding
from cohortium.server.release_verify import verify

THRESHOLD = '\n[release.minimum]\nprediction = "good"\n'
PATIENCE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A consortium with one finished run, its desk, its hospitals."""

    desk: Desk
    root: Path
    sites: Path

    @property
    def run(self) -> Path:
        return self.root / "runs" / RUN

    @property
    def folder(self) -> Path:
        return self.run / "release"

    def coordinator(self) -> TestClient:
        return signed_in(self.desk)

    def items(self, *, verified: bool = False) -> dict[str, dict[str, str]]:
        """The checklist by name, when everything has been looked at."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            told = self.coordinator().get(f"/api/release/{RUN}").json()
            items = {item["name"]: item for item in told["checklist"]}
            if LOOKING not in (item["state"] for item in items.values()):
                return items
            time.sleep(0.02)
        raise AssertionError("it never ends looking")

    def verify(self) -> dict[str, Any]:
        self.coordinator().get(f"/api/release/{RUN}?verify=now")
        self.items()
        found: dict[str, Any] = self.coordinator().get(f"/api/release/{RUN}").json()["verification"]
        return found

    def release(self, **ticks: str) -> Any:
        return act(self.coordinator(), f"/release/{RUN}/release", **ticks)

    def signature(self, site: str) -> bytes:
        """What the hospital sends back, after it has looked itself."""
        out = self.root.parent / f"{site}.json"
        endorse(check_release(self.sites / site, self.folder), self.folder, out)
        return out.read_bytes()

    def take(self, raw: bytes, client: TestClient | None = None, **fields: str) -> Any:
        client = client or self.coordinator()
        data = {"csrf": client.csrf, "reason": "it came by post", "confirm": "yes", **fields}  # type: ignore[attr-defined]
        return client.post(f"/release/{RUN}/signatures", data=data, files={"signature": ("x.json", raw)})


def template(folder: Path, **options: Any) -> Finished:
    return world(folder / "consortium", **options)[1]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("private")).root.parents[1]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("rehearsed"), rehearsal=True).root.parents[1]


@pytest.fixture(scope="module")
def wanting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that wants a verdict which the run does not have, with a title as bad as it comes."""
    title = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    return template(tmp_path_factory.mktemp("wanting"), lines=THRESHOLD, title=title).root.parents[1]


@pytest.fixture(scope="module")
def released_once(private: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The private run, released, signed by two of three sites."""
    root = Path(shutil.copytree(private, tmp_path_factory.mktemp("released") / "consortium"))
    release_module.release(root / "runs" / RUN, clock=lambda: 1_780_000_000)
    for site in SITES[:2]:
        endorse(
            check_release(root / "hospitals" / site, root / "runs" / RUN / "release"), root / "runs" / RUN / "release"
        )
    return root


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Path], Place]]:
    """A copy of a world, to be spoiled."""
    with_desks: list[Any] = []

    def open_(source: Path) -> Place:
        root = Path(shutil.copytree(source, tmp_path / "consortium", symlinks=True))
        held = desk_over(Consortium(root))
        with_desks.append(held)
        return Place(desk=held.__enter__(), root=root, sites=root / "hospitals")

    yield open_
    for held in with_desks:
        held.__exit__(None, None, None)


# ---- the whole way ------------------------------------------------------------------------------------------


def test_from_the_gate_to_a_readers_check(opened: Callable[[Path], Place], private: Path, tmp_path: Path) -> None:
    place = opened(private)
    items = place.items()
    assert {name for name, item in items.items() if item["state"] == OK} == {"result", "audit", "privacy", "dictionary"}
    assert items["folder"]["state"] == MISSES and items["folder"]["turn"] == "coordinator"
    assert "Write and sign the release" in place.coordinator().get(f"/release/{RUN}").text

    answer = place.release()
    assert (answer.status_code, answer.headers["location"]) == (303, f"/release/{RUN}?did=released")
    items = place.items()
    assert items["folder"]["state"] == OK and items["sites' signatures"]["state"] == MISSES
    assert items["sites' signatures"]["turn"] == "sites" and "east, north, west" in items["sites' signatures"]["todo"]
    assert items["reader's check"]["state"] == MISSES

    for site in ("west", "north"):
        assert place.take(place.signature(site)).status_code == 303
    told = signed_in(place.desk, AUDITOR).get(f"/api/release/{RUN}").json()["release"]
    assert told["complete"] and [(s["site"], s["state"]) for s in told["signatures"]] == [
        ("east", "missing"),
        ("north", "valid"),
        ("west", "valid"),
    ]
    assert place.verify()["ok"] and place.items()["reader's check"]["state"] == OK
    page = signed_in(place.desk, AUDITOR).get(f"/release/{RUN}").text
    assert "It may be handed out." in page and 'id="act"' not in page and told["coordinator"] in page

    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(
        io.BytesIO(signed_in(place.desk, AUDITOR).get(f"/release/{RUN}/folder.zip").content)
    ) as zipped:
        assert zipped.testzip() is None
        zipped.extractall(unpacked)
    assert [path.name for path in unpacked.iterdir()] == [f"{RUN}-release"]
    assert verify(unpacked / f"{RUN}-release", roots=[f"coordinator={told['coordinator']}"]).ok
    notes = journal_of(place.desk)
    assert [about for about, _ in notes] == [
        *("asked", "done", "released"),
        *("asked", "done", "signature") * 2,
        "download",
    ]
    assert notes[0][1]["action"] == "release" and notes[0][1]["reason"] == "because a test wants it"
    assert notes[2][1]["release"] == notes[-1][1]["release"] == told["release"] and notes[-1][1]["by"] == "auditor"


def test_what_needs_somebody_comes_first(opened: Callable[[Path], Place], wanting: Path) -> None:
    place = opened(wanting)
    place.items()
    told = place.coordinator().get(f"/api/release/{RUN}").json()["checklist"]
    states = [item["state"] for item in told]
    assert states == sorted(states, key=ORDER.index) and states[0] == FAILED
    for item in told:
        assert (item["state"] in (FAILED, MISSES)) == bool(item["turn"]) == bool(item["todo"]), item


def test_the_overview_puts_what_waits_first(opened: Callable[[Path], Place], private: Path) -> None:
    place = opened(private)
    another(place.desk.consortium, "later-1")
    another(place.desk.consortium, "hidden-1", sites=("east", "north"))
    assert place.release().status_code == 303
    told = place.coordinator().get("/api/release").json()
    assert [one["run"] for one in told["written"]] == [RUN] and told["open"] == ["hidden-1", "later-1"]
    page = place.coordinator().get("/release").text
    assert "waits for signatures" in page and page.index(RUN) < page.index("later-1")
    assert "hidden-1" not in signed_in(place.desk, SITE, site="west").get("/release").text


def test_without_runs_the_next_step_is_told(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        assert "nothing to release" in signed_in(desk).get("/release").text


# ---- the gate -----------------------------------------------------------------------------------------------


def tampered(run: Path) -> None:
    (run / "synthetic.csv").write_text((run / "synthetic.csv").read_text() + "1,2,3\n")


def guessed(run: Path) -> None:
    edit_json(run / "result.json", lambda r: r["warnings"].append("ranges were guessed from a table"))


def without_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()


def damaged_study(run: Path) -> None:
    (run / "study.toml").write_text("[study\n")


def damaged_plan(run: Path) -> None:
    (run / "plan.json").write_text("{}")


def dearer(run: Path) -> None:
    edit_json(run / "result.json", lambda r: r["privacy"]["prices"][0].update(epsilon=0.001))


STOPS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "rows changed": ("private", tampered, "audit", "RELEASE-AUDIT"),
    "another epsilon": ("private", dearer, "audit", "RELEASE-AUDIT"),
    "guessed ranges": ("private", guessed, "dictionary", "RELEASE-GUESSED"),
    "a rehearsal": ("rehearsed", lambda run: None, "privacy", "RELEASE-REHEARSAL"),
    "no verdict": ("wanting", lambda run: None, "minimum for training-a-prediction-model", "RELEASE-THRESHOLD"),
    "no manifest": ("private", without_manifest, "gate", "AUDIT-MANIFEST"),
    "no study": ("private", damaged_study, "gate", ""),
    "no plan": ("private", damaged_plan, "audit", "RELEASE-AUDIT"),
}


@pytest.mark.parametrize("how", STOPS)
def test_what_the_gate_stops_is_shown_failed_and_never_goes(
    how: str, opened: Callable[[Path], Place], request: pytest.FixtureRequest
) -> None:
    source, spoil, name, code = STOPS[how]
    place = opened(request.getfixturevalue(source))
    spoil(place.run)
    items = place.items()
    assert items[name]["state"] == FAILED and items[name]["turn"] == "coordinator", items
    assert (items[name]["code"] == code) if code else items[name]["code"]
    assert items[name]["todo"] and items["folder"]["state"] == MISSES
    page = place.coordinator().get(f"/release/{RUN}").text
    assert "✗</span> failed" in page and code in page
    answer = place.release()
    assert answer.status_code in (404, 409, 422), answer.text
    failed = {item["code"] for item in items.values() if item["state"] == FAILED}
    assert any(one in answer.text for one in failed) and not place.folder.exists()
    assert not list(place.run.glob(".release*"))  # no half of it is left
    assert [about for about, _ in journal_of(place.desk)] == ["asked", "refused"]


def test_a_word_opens_only_what_it_is_for(opened: Callable[[Path], Place], rehearsed: Path) -> None:
    """The other tick does not help, and a threshold, an audit or a tick of another value are not opened at all."""
    place = opened(rehearsed)
    for ticks in ({"guessed": "yes"}, {"rehearsal": "no"}, {"rehearsal": "1"}):
        assert place.release(**ticks).status_code == 409 and not place.folder.exists()
    tampered(place.run)
    assert "RELEASE-AUDIT" in place.release(rehearsal="yes", guessed="yes").text and not place.folder.exists()


def test_no_word_opens_a_threshold(opened: Callable[[Path], Place], wanting: Path) -> None:
    place = opened(wanting)
    place.items()
    page = place.coordinator().get(f"/release/{RUN}").text
    assert "Nobody’s word opens it" in page and "Write and sign" not in page
    assert "RELEASE-THRESHOLD" in place.release(rehearsal="yes", guessed="yes").text and not place.folder.exists()


def test_a_released_rehearsal_stays_loud(opened: Callable[[Path], Place], rehearsed: Path) -> None:
    place = opened(rehearsed)
    assert place.items()["privacy"]["state"] == FAILED
    assert "--rehearsal" in place.coordinator().get(f"/release/{RUN}").text
    assert place.release(rehearsal="yes").status_code == 303
    items = place.items()
    assert items["privacy"]["state"] == WORD and items["privacy"]["code"] == "RELEASE-REHEARSAL"
    assert journal_of(place.desk)[0][1]["rehearsal"] == 1
    # Even when the run's own result is gone, the released folder says what it is.
    (place.run / "result.json").unlink()
    client = place.coordinator()
    for path in (f"/release/{RUN}", "/release", f"/release/{RUN}/documents/README.md"):
        assert REHEARSAL in client.get(path).text, path
    assert "It may be handed out" not in client.get(f"/release/{RUN}").text
    assert "NOT-PRIVATE-small-1-release.zip" in client.get(f"/release/{RUN}/folder.zip").headers["content-disposition"]
    assert client.get(f"/api/release/{RUN}").json()["not_private"] == REHEARSAL


def test_the_gate_looks_again_when_a_file_changes(opened: Callable[[Path], Place], private: Path) -> None:
    place = opened(private)
    assert place.items()["audit"]["state"] == OK
    tampered(place.run)
    assert place.items()["audit"]["state"] == FAILED


def test_not_looked_at_is_not_ok(
    opened: Callable[[Path], Place], private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, go = opened(private), threading.Event()

    def slow(root: Path, clock: Callable[[], float]) -> Any:
        assert go.wait(PATIENCE_S)
        return look(root, clock)

    monkeypatch.setattr(release_view, "look", slow)
    try:
        told = place.coordinator().get(f"/api/release/{RUN}").json()
        assert told["looking"] and "audit" not in {item["name"] for item in told["checklist"]}
        page = place.coordinator().get(f"/release/{RUN}").text
        assert "The gate is looking" in page and "Write and sign" not in page and 'hx-trigger="load delay:1s"' in page
        document = place.coordinator().get(f"/release/{RUN}/documents/README.md").text
        assert "The draft is being written" in document
    finally:
        go.set()
    assert place.items()["audit"]["state"] == OK
    assert 'hx-trigger="load delay:1s"' not in place.coordinator().get(f"/release/{RUN}").text


def test_a_run_without_result_is_not_looked_at(opened: Callable[[Path], Place], private: Path) -> None:
    place = opened(private)
    another(place.desk.consortium, "going-1", ended=False)
    told = place.coordinator().get("/api/release/going-1").json()
    assert [(i["name"], i["state"], i["code"]) for i in told["checklist"]] == [
        ("result", MISSES, "RUN-UNFINISHED"),
        ("folder", MISSES, "RELEASE-MISSING"),
    ]
    answer = act(place.coordinator(), "/release/going-1/release")
    assert answer.status_code == 409 and "RUN-UNFINISHED" in answer.text


def test_a_release_is_never_written_over(opened: Callable[[Path], Place], released_once: Path) -> None:
    place = opened(released_once)
    before = (place.folder / ENVELOPE).read_bytes()
    answer = place.release()
    assert answer.status_code == 422 and "RELEASE-EXISTS" in answer.text
    assert (place.folder / ENVELOPE).read_bytes() == before


def test_two_releases_at_once_are_one(
    opened: Callable[[Path], Place], private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = opened(private)
    row = place.desk.register.run_row(RUN)

    def meanwhile(*_: Any, **__: Any) -> Any:
        answer = place.release()
        assert answer.status_code == 409 and "RELEASE-BUSY" in answer.text
        raise OSError("the disk is full")

    monkeypatch.setattr(release_view, "release", meanwhile)
    with pytest.raises(Exception, match="RELEASE-WRITE"):
        releases_of(place.desk).release(row, rehearsal=False, accept_guessed=False)
    assert not place.folder.exists()


# ---- who may ------------------------------------------------------------------------------------------------


def test_only_a_coordinator_acts(opened: Callable[[Path], Place], released_once: Path, private: Path) -> None:
    place = opened(released_once)
    raw = place.signature("west")
    for role, site in ((AUDITOR, ""), (SITE, "west")):
        client = signed_in(place.desk, role, site=site)
        assert act(client, f"/release/{RUN}/release").status_code == 403
        assert place.take(raw, client).status_code == 403
        page = client.get(f"/release/{RUN}").text
        assert "<form" not in page, "no form that would be refused"
        assert str(place.root) not in page or role != SITE  # a member's machine is another one
    assert not (place.folder / "signatures" / "west.json").exists() and journal_of(place.desk) == []
    assert visitor(place.desk).post(f"/release/{RUN}/release").status_code in (303, 401)


def test_an_action_wants_token_confirmation_and_reason(opened: Callable[[Path], Place], private: Path) -> None:
    place = opened(private)
    client = place.coordinator()
    whole = {"csrf": client.csrf, "reason": "the board agreed", "confirm": "yes"}  # type: ignore[attr-defined]
    for name, code in (("csrf", "WEB-TOKEN"), ("confirm", "ACTION-CONFIRM"), ("reason", "ACTION-REASON")):
        part = {key_: value for key_, value in whole.items() if key_ != name}
        answer = client.post(f"/release/{RUN}/release", data=part)
        assert 400 <= answer.status_code < 500 and code in answer.text
        files = {"signature": ("x.json", b"{}")}
        answer = client.post(f"/release/{RUN}/signatures", data=part, files=files)
        assert 400 <= answer.status_code < 500 and code in answer.text
    assert not place.folder.exists()


def test_a_site_of_another_run_finds_nothing(opened: Callable[[Path], Place], released_once: Path) -> None:
    place = opened(released_once)
    another(place.desk.consortium, "hidden-1", sites=("east", "north"))
    west = signed_in(place.desk, SITE, site="west")
    for path in ("/release/{}", "/release/{}/folder.zip", "/release/{}/documents/README.md", "/api/release/{}"):
        assert [west.get(path.format(run)).status_code for run in ("hidden-1", "nobody-1")] == [404, 404], path
        assert west.get(path.format(RUN)).status_code == 200, path
    assert "hidden-1" not in json.dumps(west.get("/api/release").json())


# ---- signatures ---------------------------------------------------------------------------------------------


def test_only_a_sites_signature_under_this_release_is_taken_in(
    opened: Callable[[Path], Place], released_once: Path
) -> None:
    place = opened(released_once)
    manifest = Manifest.read(Envelope.read((place.folder / ENVELOPE).read_bytes()).payload)
    predicate = {**manifest.predicate, "at": 1}
    other = Manifest.of(manifest.subjects, predicate)
    before = sorted(place.folder.rglob("*"))
    for raw, code in (
        (b"", "RELEASE-FORM"),
        (b"{}", "RELEASE-FORM"),
        (b"\xff" * 100, "RELEASE-FORM"),
        (b"[" * 100_000, "RELEASE-FORM"),
        (b"x" * (release_folder.MOST_SIGNATURE + 1), "SIGNATURE-SIZE"),
        (sign_release(other, key("west")).to_bytes(), "SIGNATURE-OTHER"),
        (sign_release(manifest, key("stranger")).to_bytes(), "SIGNATURE-KEY"),
        ((place.folder / ENVELOPE).read_bytes(), "SIGNATURE-KEY"),  # the coordinator is no site
    ):
        answer = place.take(raw)
        assert 400 <= answer.status_code < 500 and code in answer.text, (code, answer.text)
    assert sorted(place.folder.rglob("*")) == before
    assert {about for about, _ in journal_of(place.desk)} == {"asked", "refused"}


def test_a_signature_lands_at_its_keys_owner(opened: Callable[[Path], Place], released_once: Path) -> None:
    """Whatever the file is called, and over a wrong one that lies there."""
    place = opened(released_once)
    wrong = place.folder / "signatures" / "west.json"
    wrong.write_text("no signature")
    assert place.items()["signature of west"]["code"] == "VERIFY-SIGNATURE"
    wrong.unlink()
    raw = place.signature("west")
    wrong.write_text("no signature")
    assert place.take(raw).status_code == 303
    written = read_written(place.folder, key(COORDINATOR).public_key())
    assert [one.state for one in written.signatures] == ["valid"] * 3
    assert take_signature(written, raw) == "west"  # once more changes nothing


def test_a_wrong_signature_is_neither_counted_nor_handed_out(
    opened: Callable[[Path], Place], released_once: Path
) -> None:
    place = opened(released_once)
    signatures = place.folder / "signatures"
    shutil.copy(signatures / "north.json", signatures / "west.json")
    (signatures / "north.json").unlink()
    (signatures / "north.json").symlink_to(signatures / "east.json")
    (signatures / "stranger.json").write_text("{}")
    items = place.items()
    assert items["sites' signatures"]["state"] == MISSES and "1 of 3" in items["sites' signatures"]["detail"]
    bad = {name for name, item in items.items() if item["code"] == "VERIFY-SIGNATURE" and item["state"] == FAILED}
    assert bad == {"signature of north", "signature of west", "signature of stranger.json"}
    with zipfile.ZipFile(io.BytesIO(place.coordinator().get(f"/release/{RUN}/folder.zip").content)) as zipped:
        assert [n for n in zipped.namelist() if "/signatures/" in n] == [f"{RUN}-release/signatures/east.json"]


# ---- a folder that was changed ------------------------------------------------------------------------------


def test_a_changed_file_fails_the_readers_check_and_stays_here(
    opened: Callable[[Path], Place], released_once: Path
) -> None:
    place = opened(released_once)
    assert place.verify()["ok"]
    tampered(place.folder)
    # What was verified before says nothing about what lies there now.
    assert place.items()["reader's check"]["state"] == MISSES
    assert place.verify()["codes"] == ["VERIFY-ROWS"]
    assert place.items()["reader's check"]["state"] == FAILED
    page = place.coordinator().get(f"/release/{RUN}").text
    assert "VERIFY-ROWS" in page and "It may be handed out" not in page
    answer = place.coordinator().get(f"/release/{RUN}/folder.zip")
    assert answer.status_code == 409 and "RELEASE-FILE" in answer.text
    assert not [about for about, _ in journal_of(place.desk) if about == "download"]


@pytest.mark.parametrize("how", ["missing", "link", "linked folder"])
def test_no_file_from_elsewhere_is_handed_out(how: str, opened: Callable[[Path], Place], released_once: Path) -> None:
    place = opened(released_once)
    if how == "linked folder":
        (place.folder / "run").rename(place.root / "elsewhere")
        (place.folder / "run").symlink_to(place.root / "elsewhere")
    else:
        (place.folder / "README.md").rename(place.root / "README.md")
        if how == "link":
            (place.folder / "README.md").symlink_to(place.root / "README.md")
    answer = place.coordinator().get(f"/release/{RUN}/folder.zip")
    assert answer.status_code == 409 and "RELEASE-FILE" in answer.text
    if how != "linked folder":
        assert place.coordinator().get(f"/release/{RUN}/documents/README.md").status_code == 404


def test_what_nobody_signed_is_not_in_the_zip(opened: Callable[[Path], Place], released_once: Path) -> None:
    place = opened(released_once)
    (place.folder / "notes.txt").write_text("for us only")
    with zipfile.ZipFile(io.BytesIO(place.coordinator().get(f"/release/{RUN}/folder.zip").content)) as zipped:
        assert all(name.startswith(f"{RUN}-release/") and ".." not in name for name in zipped.namelist())
        assert not [name for name in zipped.namelist() if "notes" in name]


def test_a_name_that_could_lead_out_is_not_packed(released_once: Path) -> None:
    written = read_written(released_once / "runs" / RUN / "release", key(COORDINATOR).public_key())
    for name in ("C:evil", "a\u202eb", "x;y"):
        written.manifest.subjects[name] = "0" * 64
        with pytest.raises(Exception, match="RELEASE-FILE"):
            packed(written, "top")
        del written.manifest.subjects[name]


@pytest.mark.parametrize("how", ["another coordinator", "cut", "no signatures", "empty", "garbled", "a file"])
def test_what_the_coordinator_did_not_sign_is_no_release(
    how: str, opened: Callable[[Path], Place], released_once: Path
) -> None:
    place = opened(released_once)
    path = place.folder / ENVELOPE
    manifest = Manifest.read(Envelope.read(path.read_bytes()).payload)
    if how == "another coordinator":
        path.write_bytes(sign_release(manifest, key("another")).to_bytes())
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "no signatures":
        shutil.rmtree(place.folder / "signatures")
    elif how == "garbled":
        wrong = Manifest.of(manifest.subjects, {"keys": 7})
        path.write_bytes(sign_release(wrong, key(COORDINATOR)).to_bytes())
    elif how == "empty":
        path.write_bytes(b"")
    else:
        shutil.rmtree(place.folder)
        place.folder.write_text("no folder")
    items = place.items()
    if how != "a file":
        assert items["folder"]["state"] == FAILED and items["folder"]["code"] == "RELEASE-FOLDER"
        assert "RELEASE-FOLDER" in place.coordinator().get("/release").text
    assert place.coordinator().get("/release").status_code == 200
    assert place.coordinator().get(f"/release/{RUN}").status_code == 200
    assert place.coordinator().get(f"/release/{RUN}/folder.zip").status_code in (404, 409)
    assert place.take(b"{}").status_code in (404, 409)
    assert place.release().status_code in (409, 422)


# ---- documents ----------------------------------------------------------------------------------------------


def test_documents_are_drafted_before_and_read_after(
    opened: Callable[[Path], Place], private: Path, released_once: Path
) -> None:
    place = opened(private)
    place.items()
    client = place.coordinator()
    told = client.get(f"/api/release/{RUN}").json()["documents"]
    assert set(told) == set(DOCUMENTS) and told["dpia-annex.md"] > 3
    for name in DOCUMENTS:
        assert "Draft for" in client.get(f"/release/{RUN}/documents/{name}").text
    assert client.get(f"/release/{RUN}/documents/study.toml").status_code == 422
    assert not place.folder.exists() and not list(place.run.glob("*.md"))  # a draft leaves nothing behind
    assert place.release().status_code == 303
    (place.folder / "README.md").write_text(HOSTILE, errors="replace")
    page = client.get(f"/release/{RUN}/documents/README.md").text
    assert "Of the release of" in page and "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_run_whose_audit_fails_has_no_drafts(opened: Callable[[Path], Place], private: Path) -> None:
    place = opened(private)
    tampered(place.run)
    place.items()
    assert "There is no draft" in place.coordinator().get(f"/release/{RUN}/documents/README.md").text


def test_other_peoples_words_are_text(opened: Callable[[Path], Place], wanting: Path) -> None:
    place = opened(wanting)
    place.items()
    client = place.coordinator()
    for path in (
        f"/release/{RUN}",
        f"/release/{RUN}/documents/data-card.md",
        f"/results/{RUN}",
        "/results",
        "/release",
    ):
        text = client.get(path).text
        assert "<img" not in text and "<script>" not in text, path
    assert "&lt;img src=x" in client.get(f"/release/{RUN}").text


# ---- small parts --------------------------------------------------------------------------------------------


def test_a_check_that_breaks_down_fails(tmp_path: Path) -> None:
    """Whatever happens inside, nothing that was not checked is ok."""
    found = release_view.verified_folder(tmp_path)
    assert not found.ok and found.codes == ("VERIFY-FOLDER",)
    assert look(tmp_path, lambda: 0.0).error is not None


def test_a_failed_finding_in_a_manifest_is_shown_failed(released_once: Path) -> None:
    """The gate lets none go; a manifest that says otherwise is not made prettier."""
    written = read_written(released_once / "runs" / RUN / "release", key(COORDINATOR).public_key())
    finding = Finding(code="RELEASE-AUDIT", name="audit", ok=False, detail="it fails")
    item: Item = gate_then(finding, written)
    assert item.state == FAILED and item.code == "RELEASE-AUDIT" and item.todo
