"""Sites that are asked different questions in one round: nothing adds up, and nobody can be made to say it does.

Without this, a coordinator could let all sites but one answer a question whose answer it knows, and read the one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cohortium.common.errors import ProtocolError
from cohortium.common.protocol.messages import content_digest

HONEST = content_digest("counts", {"bins": [2]}, {"map": b"\x00\x01"})
CROOKED = content_digest("counts", {"bins": [2]}, {"map": b"\x01\x01"})


@pytest.fixture
def round_(consortium, labelled):
    world = consortium(5)
    params = world.params(t=4, c=1)
    sites = {s: world.site(params, s) for s in world.names}
    server = world.server(params)
    for s, site in sites.items():
        server.add_prepared(site.prepare(labelled(s)))
    return world, params, sites, server


def test_the_question_is_part_of_the_sum(round_) -> None:
    world, params, sites, server = round_
    vectors = world.vectors(params)
    for s, roster in server.roster(HONEST).items():
        assert roster == type(roster).from_message(roster.to_message())
        server.add_masked(sites[s].mask(roster, vectors[s], question=HONEST))
    chosen = server.survivors()
    for s in world.names:
        server.add_vote(sites[s].sign_survivors(chosen))
    request = server.reveal_request()
    for s in world.names:
        server.add_revealed(sites[s].reveal(request))
    assert np.array_equal(server.sum(), sum(vectors.values()))


def test_a_roster_for_another_question_is_refused_and_changes_nothing(round_) -> None:
    _, params, sites, server = round_
    site, roster = next((sites[s], r) for s, r in server.roster(HONEST).items())
    before = site.to_state()
    with pytest.raises(ProtocolError, match="SUM-QUESTION"):
        site.mask(roster, np.zeros(params.dim, np.uint64), question=CROOKED)
    assert site.to_state() == before


def test_one_site_asked_something_else_cannot_be_counted(round_) -> None:
    world, params, sites, server = round_
    vectors, rosters = world.vectors(params), server.roster(HONEST)
    victim = world.names[0]
    told = replace(rosters[victim], question=CROOKED)
    alone = sites[victim].mask(told, vectors[victim], question=CROOKED)
    with pytest.raises(ProtocolError, match="SUM-ROSTER"):
        server.add_masked(alone)
    # A crooked server counts it all the same; the masks it then removes are not those that were added.
    server.add_masked(replace(alone, roster=rosters[victim].digest()))
    for s in world.names[1:]:
        server.add_masked(sites[s].mask(rosters[s], vectors[s], question=HONEST))
    chosen = server.survivors()
    with pytest.raises(ProtocolError, match="SUM-ROSTER-TWICE"):
        sites[victim].sign_survivors(chosen)
    for s in world.names[1:]:
        server.add_vote(sites[s].sign_survivors(chosen))
    request = server.reveal_request()
    for s in world.names[1:]:
        server.add_revealed(sites[s].reveal(request))
    wrong = server.sum() - sum(vectors.values())
    # Uniform on 2^64: that one of eight entries is right by chance has probability below 1e-18.
    assert (wrong != 0).all()
