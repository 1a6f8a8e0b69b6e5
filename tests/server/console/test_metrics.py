"""GET /metrics: a text that parsers take, figures that are true, and nothing of a hospital's data."""

from __future__ import annotations

import ast
import json
import math
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from console_worlds import BASE, HOLDOUT, bare, desk_over, signed_in, visitor, with_runs
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from starlette.testclient import TestClient

from cohortium.common.errors import Refused
from cohortium.server.console import metrics as ours
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk
from cohortium.server.console.metrics import Meter
from cohortium.server.console.metrics_requests import Requests
from cohortium.server.console.metrics_token import may_scrape, token
from cohortium.server.console.pages import metrics as page
from cohortium.server.runs import RunFolder
from cohortium.server.seen import Seen

ROOT = Path(__file__).resolve().parents[3]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PER_SITE = {"cohortium_site_last_seen_timestamp_seconds", "cohortium_site_certificate_end_timestamp_seconds"}
HOSTILE = 'a"b\\c\n# HELP x {le="1"} 7'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Desk, str, str]]:
    """A finished run and one that waits, of three sites."""
    field, done, waiting = with_runs(tmp_path_factory.mktemp("metrics"), evaluation=HOLDOUT)
    seen = Seen(field.made.root / "seen.json")
    seen.saw("site-1", certificate_until=1_800_000_000)
    seen.saw("nobody-enrolled")
    seen.flush()
    with desk_over(field.made) as desk:
        yield desk, done, waiting


def scraper(desk: Desk) -> TestClient:
    app = create(desk)
    if not any(getattr(route, "path", "") == "/metrics" for route in app.router.routes):
        app.include_router(page.router)
    return TestClient(app, base_url=BASE, raise_server_exceptions=False, follow_redirects=False)


def scrape(desk: Desk) -> dict[str, Any]:
    """Sample name -> {sorted label items: value}, as a parser reads it."""
    text = Meter(desk).text(OPENMETRICS)[0].decode()
    return samples(openmetrics(text))


def samples(families: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in families:
        for one in family.samples:
            found.setdefault(one.name, {})[tuple(sorted(one.labels.items()))] = one.value
    return found


def of(found: dict[str, Any], name: str, **labels: str) -> float:
    return float(found[name][tuple(sorted(labels.items()))])


# ---- the figures ------------------------------------------------------------------------------------------------


def test_both_formats_are_taken_by_their_parsers_and_say_the_same(world: tuple[Desk, str, str]) -> None:
    desk, _, _ = world
    meter = Meter(desk)
    body, kind = meter.text(OPENMETRICS)
    assert kind.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
    old, other = meter.text("text/plain")
    assert other.startswith("text/plain") and b"# EOF" not in old
    mine = {n: v for n, v in samples(openmetrics(body.decode())).items() if n.startswith("cohortium_")}
    theirs = samples(plain(old.decode()))
    moving = {"cohortium_disk_free_bytes"}
    assert len(mine) > 25
    for name in set(mine) - moving:
        assert theirs[name] == mine[name], name


def test_runs_and_releases_are_counted(world: tuple[Desk, str, str]) -> None:
    desk, done, waiting = world
    found = scrape(desk)
    folder = RunFolder(root=desk.consortium.root / "runs" / done)
    plan, answered = folder.plan(), folder.releases_done()
    assert 0 < answered <= plan.releases
    assert of(found, "cohortium_runs", state="finished") == 1 == of(found, "cohortium_runs", state="proposed")
    assert sum(found["cohortium_runs"].values()) == 2
    assert of(found, "cohortium_releases_done", state="finished") == answered
    assert of(found, "cohortium_releases_planned", state="proposed") == plan.releases
    assert of(found, "cohortium_releases_done", state="proposed") == 0
    assert of(found, "cohortium_releases_total") == answered == of(found, "cohortium_release_seconds_count")
    assert of(found, "cohortium_void_releases_total") == 0 == of(found, "cohortium_dropouts_total")
    assert of(found, "cohortium_run_attempts_total") == 1
    assert of(found, "cohortium_run_releases_done", run=done) == answered
    assert of(found, "cohortium_run_epsilon_planned", run=done, rehearsal="yes") == plan.epsilon
    assert of(found, "cohortium_queue_runs", **{"for": "officers"}) == 1
    assert of(found, "cohortium_queue_runs", **{"for": "turn"}) == 0
    assert of(found, "cohortium_approvals_open") == 2, "one of three officers has approved"
    assert (("run", waiting),) in found["cohortium_run_releases_planned"]


def test_dropouts_and_voids_come_from_the_events_and_a_grown_file_is_read_on(
    world: tuple[Desk, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, _, waiting = world
    meter = Meter(desk)
    path = desk.consortium.root / "runs" / waiting / "run" / "events.jsonl"
    before = samples(openmetrics(meter.text(OPENMETRICS)[0].decode()))
    line = {"at": 5.0, "event": "release", "index": 0, "sites": ["site-1"], "dropped": ["site-2", "site-3"]}
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_text(json.dumps({**line, "void": "SUM-FEW", "seconds": 41.26, "purpose": "bins"}) + "\n")
        after = samples(openmetrics(meter.text(OPENMETRICS)[0].decode()))
    finally:
        path.unlink()
        path.parent.rmdir()
    assert of(after, "cohortium_dropouts_total") == of(before, "cohortium_dropouts_total") + 2
    assert of(after, "cohortium_void_releases_total") == 1
    longer = after["cohortium_release_seconds_bucket"][(("le", "60.0"),)]
    assert (
        longer
        == after["cohortium_release_seconds_count"][()]
        > after["cohortium_release_seconds_bucket"][(("le", "30.0"),)]
    )
    took = of(after, "cohortium_release_seconds_sum") - of(before, "cohortium_release_seconds_sum")
    assert took == pytest.approx(41.3), "a duration finer than a tenth of a second would measure a hospital's rows"


def test_the_ledger_index_gives_what_was_spent_and_nothing_without_it(world: tuple[Desk, str, str]) -> None:
    desk, done, _ = world
    assert "cohortium_run_epsilon_spent" not in scrape(desk) or hasattr(desk, "books")

    def site(name: str) -> Any:
        runs = (SimpleNamespace(run=done, epsilon={"site-1": 1.5, "site-2": 2.5, "site-3": None}[name]),)
        return SimpleNamespace(size=7, problem="LEDGER-HASH line 3" if name == "site-3" else None, runs=runs)

    had = getattr(desk, "books", None)
    desk.books = SimpleNamespace(site=site, as_of=desk.clock() - 12, trouble="")  # type: ignore[attr-defined]
    try:
        found = scrape(desk)
    finally:
        if had is None:
            del desk.books  # type: ignore[attr-defined]
        else:
            desk.books = had  # type: ignore[attr-defined]
    assert of(found, "cohortium_run_epsilon_spent", run=done, rehearsal="yes") == 2.5, "the dearest site counts"
    assert of(found, "cohortium_ledger_lines") == 21 and of(found, "cohortium_ledgers_unverified") == 1
    assert 12 <= of(found, "cohortium_ledger_index_lag_seconds") < 60


def test_the_console_counts_its_journal_its_answers_and_wrong_sign_ins(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        requests = Requests()
        meter = Meter(desk, requests=requests)
        desk.journal.act("ann", "stop", "run", "a reason", lambda: None)
        with pytest.raises(Refused):
            desk.journal.act("ann", "stop", "run", "a reason", lambda: _refuse())
        requests.observe("GET", "/runs", 200, 0.02)
        requests.observe("GET", "/runs", 404, 30.0)
        found = samples(openmetrics(meter.text(OPENMETRICS)[0].decode()))
        counts = {key[0][1]: value for key, value in found["cohortium_journal_lines_total"].items()}
        assert {key: count for key, count in counts.items() if count} == {"asked": 2, "done": 1, "refused": 1}
        desk.journal.act("ann", "stop", "run", "a reason", lambda: None)
        found = samples(openmetrics(meter.text(OPENMETRICS)[0].decode()))
        assert of(found, "cohortium_journal_lines_total", about="asked") == 3, "only new lines are read, and once"
        assert of(found, "cohortium_console_requests_total", method="GET", status="4xx") == 1
        assert found["cohortium_console_answer_seconds_bucket"][(("le", "0.05"),)] == 1
        assert of(found, "cohortium_console_answer_seconds_count") == 2
        desk.journal.note("sign-in-failed", by="", step="password", address="10.0.0.1")
        desk.journal.note("something-new", by="ann")
        found = samples(openmetrics(meter.text(OPENMETRICS)[0].decode()))
        assert of(found, "cohortium_sign_in_failures_total") == 1
        assert of(found, "cohortium_journal_lines_total", about="other") == 1, "a new word makes no new label"
        assert of(found, "cohortium_serve_up") == 0
        assert of(found, "cohortium_certificate_end_timestamp_seconds", certificate="issuer") > time.time()
        assert of(found, "process_resident_memory_bytes") > 1e6


def _refuse() -> None:
    raise Refused("RUN-ENDED", "the run has ended")


def test_a_run_whose_files_are_gone_is_counted_and_hurts_nothing(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        desk.register.propose("gone", folder="runs/gone", envelope=b"x", sites=["site-1"])
        found = scrape(desk)
        assert of(found, "cohortium_runs_unreadable") == 1 and of(found, "cohortium_runs", state="proposed") == 1


# ---- what is not there ----------------------------------------------------------------------------------------


def test_a_site_is_named_in_two_facts_of_the_network_and_nowhere_else(world: tuple[Desk, str, str]) -> None:
    """The privacy of this page: were a drop-out or an ε told per site, this test would be red."""
    desk, _, _ = world
    found = scrape(desk)
    sites = {member.name for member in desk.register.members()}
    naming = {
        name
        for name, values in found.items()
        for labels in values
        if any(key == "site" or value in sites for key, value in labels)
    }
    assert naming == PER_SITE
    assert "nobody-enrolled" not in str(found), "only members are told"
    labels = {key for values in found.values() for items in values for key, _ in items}
    assert labels <= {
        "state",
        "run",
        "rehearsal",
        "for",
        "role",
        "site",
        "certificate",
        "about",
        "method",
        "status",
    } | {
        "le",
        "version",
        "consortium",
        "major",
        "minor",
        "patchlevel",
        "implementation",
    }


def test_hostile_names_of_runs_are_escaped(tmp_path: Path) -> None:
    with desk_over(bare(tmp_path)) as desk:
        desk.register.propose(HOSTILE, folder="runs/hostile", envelope=b"x", sites=["site-1"])
        meter = Meter(desk)
        meter._watched[HOSTILE] = ours._Watched(
            log=ours.RunLog(path=tmp_path / "none"), planned=ours.Planned(releases=3, epsilon=1.0, rehearsal=False)
        )
        body = meter.text(OPENMETRICS)[0].decode()
        found = samples(openmetrics(body))
        assert of(found, "cohortium_run_releases_planned", run=HOSTILE) == 3
        assert "\n# HELP x" not in body
        assert samples(plain(meter.text("")[0].decode()))["cohortium_run_releases_planned"] == {
            (("run", HOSTILE),): 3.0
        }


# ---- who may ----------------------------------------------------------------------------------------------------


def test_only_the_token_opens_it_not_a_session_and_not_the_loopback(world: tuple[Desk, str, str]) -> None:
    desk, _, _ = world
    client = scraper(desk)
    right = token(desk.folder)
    assert len(right) >= 32
    for header in (None, "", "Bearer", "Bearer ", f"Basic {right}", f"Bearer {right[:-1]}", f"Bearer {right}x", right):
        answer = client.get("/metrics", headers={} if header is None else {"authorization": header})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", header
        assert "cohortium_runs" not in answer.text
    cookies = dict(signed_in(desk).cookies)
    assert client.get("/metrics", cookies=cookies).status_code == 401, "a session is no token"
    good = {"authorization": f"Bearer {right}"}
    answer = client.get("/metrics", headers={**good, "accept": OPENMETRICS})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.headers["cache-control"] == "no-store"
    assert samples(openmetrics(answer.text))["cohortium_runs"]
    for accept in ("application/openmetrics-text; version=nonsense", "text/plain;version=9;escaping=x", b"\xff", "*/*"):
        assert client.get("/metrics", headers={**good, "accept": accept}).status_code == 200, accept
    assert client.get("/metrics", headers={"accept": "text/html"}).status_code == 401, "a person is told so on a page"
    assert client.post("/metrics", headers=good).status_code == 405
    assert visitor(desk).get("/healthz").status_code == 200


def test_the_token_is_made_closed_kept_and_exchanged(tmp_path: Path) -> None:
    folder = tmp_path / "console"
    first = token(folder)
    assert stat.S_IMODE((folder / "metrics.token").stat().st_mode) == 0o600 and token(folder) == first
    assert may_scrape(folder, f"Bearer {first}") and may_scrape(folder, f"bearer {first}")
    second = token(folder, new=True)
    assert second != first and not may_scrape(folder, f"Bearer {first}") and may_scrape(folder, f"Bearer {second}")
    (folder / "metrics.token").chmod(0o644)
    with pytest.raises(Refused, match="MODE-OPEN"):
        token(folder)
    assert not may_scrape(folder, f"Bearer {second}"), "a token that others may read opens nothing"
    (folder / "metrics.token").unlink()
    (folder / "metrics.token").touch(mode=0o600)
    assert not may_scrape(folder, "Bearer "), "an emptied file is no empty token"


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_scrape_of_200_runs_takes_less_than_a_tenth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from large_world import large_world

    made = large_world(tmp_path / "c", sites=50, runs=200, lines=2_000)
    with desk_over(made) as desk:
        meter = Meter(desk)
        meter.text(OPENMETRICS)
        best = math.inf
        for _ in range(5):
            started = time.thread_time()  # this thread's: what else the machine does is no fault of a scrape
            body, _ = meter.text(OPENMETRICS)
            best = min(best, time.thread_time() - started)
        assert body.count(b"cohortium_run_releases_planned{") == 200
        assert best < 0.1


# ---- what else names these figures ----------------------------------------------------------------------------

FUNCTIONS = {
    *(
        "sum",
        "max",
        "min",
        "avg",
        "count",
        "by",
        "without",
        "rate",
        "increase",
        "time",
        "histogram_quantile",
        "clamp_min",
    ),
    *("topk", "and", "or", "unless", "on", "ignoring", "bool", "changes", "delta", "absent", "group_left", "up"),
}
LABELS = {"le", "state", "run", "rehearsal", "for", "role", "site", "certificate", "about", "method", "status", "job"}


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression asks for."""
    bare_text = re.sub(r'"[^"]*"|\[[^]]*\]|\{[^}]*\}', " ", expression)
    words = set(re.findall(r"(?<![\w.])[a-zA-Z_:][a-zA-Z0-9_:]*", bare_text))
    return words - FUNCTIONS - LABELS


@pytest.fixture(scope="module")
def known(world: tuple[Desk, str, str]) -> set[str]:
    """Every sample name that the endpoint can give: with an index of ledgers and with live pages."""
    desk, done, _ = world
    runs = (SimpleNamespace(run=done, epsilon=1.0),)
    full = SimpleNamespace(
        consortium=desk.consortium,
        register=desk.register,
        journal=desk.journal,
        clock=desk.clock,
        seen=desk.seen,
        books=SimpleNamespace(
            site=lambda name: SimpleNamespace(size=1, problem=None, runs=runs), as_of=0.0, trouble=""
        ),
    )
    requests = Requests()
    requests.observe("GET", "/", 200, 0.1)
    text = Meter(full, requests=requests, viewers=lambda: 2).text(OPENMETRICS)[0].decode()  # type: ignore[arg-type]
    return set(samples(openmetrics(text)))


def test_the_dashboard_asks_only_for_figures_that_exist(known: set[str]) -> None:
    board = json.loads((ROOT / "docs" / "grafana" / "cohortium.json").read_text(encoding="utf-8"))
    expressions = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    asked = {name for text in expressions for name in names_in(text)}
    assert len(expressions) >= 15 and asked <= known, asked - known
    variables = {v["name"] for v in board["templating"]["list"]}
    assert {name for text in expressions for name in re.findall(r"\$(\w+)", text)} <= variables | {"__rate_interval"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"] and (panel["type"] == "row" or panel["description"])
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
    assert "http" not in json.dumps(board), "it fetches nothing from anywhere"


def yaml_blocks() -> list[Any]:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    return [yaml.safe_load(body) for body in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def test_the_example_of_a_scrape_and_its_alerts_name_what_exists(known: set[str]) -> None:
    scrapes = [block for block in yaml_blocks() if "scrape_configs" in block]
    rules = [rule for block in yaml_blocks() for group in block.get("groups", ()) for rule in group["rules"]]
    (job,) = scrapes[0]["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["authorization"]["type"] == "Bearer"
    assert (
        job["authorization"]["credentials_file"].endswith("metrics.token") and "credentials" not in job["authorization"]
    )
    assert len(rules) >= 8
    for rule in rules:
        assert names_in(rule["expr"]) <= known, rule["alert"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


def test_every_figure_is_documented_and_every_documented_figure_exists(known: set[str]) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(cohortium_\w+)`", text, re.MULTILINE))
    own = {name for name in known if name.startswith("cohortium_")}
    plain_names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in own}
    assert told == plain_names


def test_the_metrics_import_nothing_that_prices(world: tuple[Desk, str, str]) -> None:
    """No ε is worked out in a scrape: the module cannot even reach an accountant."""
    source = (ROOT / "server" / "console" / "metrics.py").read_text(encoding="utf-8")
    assert "epsilon(" not in source.replace("run_epsilon(", "")
    imported = {
        alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in imported if re.search("accountant|pld|progress|mirror|ledger", name)]
