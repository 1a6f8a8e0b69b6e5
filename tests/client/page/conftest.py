"""One hospital a module, its page open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from consortium import Party, start_party
from hospital import stage
from page_worlds import World, enter, make
from starlette.testclient import TestClient

from cohortium.client.page.room import Room


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    made = start_party(tmp_path_factory.mktemp("party"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def world(party: Party, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make(tmp_path_factory.mktemp("hospital"), party)
    made.propose("run-2", stages=[stage("one", "counts", 0, noise_multiplier=9.0), stage("three", "counts", 1)])
    dear = [stage("one", "counts", 0, noise_multiplier=0.6)]
    made.propose("run-dear", stages=dear, epsilon=20.0, study="=cmd|'<script>alert(1)</script>")
    return made


@pytest.fixture(scope="module")
def room(world: World) -> Iterator[Room]:
    made = world.room()
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(world: World, room: Room) -> TestClient:
    return enter(world, room)
