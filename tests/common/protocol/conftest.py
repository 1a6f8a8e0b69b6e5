"""A consortium for the tests of the secure sum: identities, channels and both roles, all from seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from cohortium.common.protocol import signing
from cohortium.common.protocol.channels import Directory, open_channel
from cohortium.common.protocol.round_messages import RoundParams, minimum_survivors
from cohortium.common.protocol.secure_sum import ServerRound, SiteRound


class Labelled:
    """Reproducible labelled bytes: SHAKE-256 of seed and label."""

    def __init__(self, seed: object) -> None:
        self._seed = repr(seed)

    def bytes_for(self, label: str, length: int) -> bytes:
        return hashlib.shake_256(f"{self._seed}/{label}".encode()).digest(length)


class Consortium:
    """n sites of one run; `mute` sites never published a channel key."""

    def __init__(self, n: int, *, run_id: str = "run-1", mute: Iterable[str] = ()) -> None:
        self.run_id = run_id
        self.names = tuple(f"site-{i:03d}" for i in range(n))
        self.identities = {s: signing.from_seed(hashlib.sha256(s.encode()).digest()) for s in self.names}
        self.publics = {s: key.public_key() for s, key in self.identities.items()}
        opened = {
            s: open_channel(run_id=run_id, site=s, identity=self.identities[s], entropy=Labelled((run_id, s)))
            for s in self.names
        }
        self.channels = {s: private for s, (private, _) in opened.items()}
        self.channel_keys = tuple(key for s, (_, key) in opened.items() if s not in set(mute))
        self.directory = Directory.verified(run_id=run_id, identities=self.publics, keys=self.channel_keys)

    def params(self, *, round: int = 1, t: int | None = None, c: int = 0, dim: int = 8) -> RoundParams:
        n = len(self.names)
        return RoundParams(
            run_id=self.run_id,
            round=round,
            sites=self.names,
            survivors=minimum_survivors(n, c) if t is None else t,
            colluders=c,
            dim=dim,
        )

    def site(self, params: RoundParams, name: str) -> SiteRound:
        return SiteRound(
            params=params,
            site=name,
            identity=self.identities[name],
            channel=self.channels[name],
            directory=self.directory,
        )

    def server(self, params: RoundParams) -> ServerRound:
        return ServerRound(params=params, directory=self.directory)

    def again(self, site: SiteRound) -> SiteRound:
        """The site as another process would find it on disk."""
        return self.restore(site.to_state(), site.site)

    def restore(self, state: bytes, name: str) -> SiteRound:
        return SiteRound.from_state(
            state,
            identity=self.identities[name],
            channel=self.channels[name],
            directory=self.directory,
        )

    def vectors(self, params: RoundParams, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, params.round])
        return {s: rng.integers(0, 2**64, params.dim, dtype=np.uint64) for s in self.names}


class Midway:
    """A round carried to a phase ("prepared", "masked", "voted", "revealed") with every site present."""

    def __init__(self, consortium: Consortium, params: RoundParams, phase: str, seed: object = 0) -> None:
        self.consortium, self.params = consortium, params
        self.server = consortium.server(params)
        self.sites = {s: consortium.site(params, s) for s in consortium.names}
        self.vectors = consortium.vectors(params)
        self.prepared = {s: site.prepare(Labelled((seed, s))) for s, site in self.sites.items()}
        for message in self.prepared.values():
            self.server.add_prepared(message)
        self.rosters = self.server.roster()
        if phase == "prepared":
            return
        self.masked = {s: site.mask(self.rosters[s], self.vectors[s]) for s, site in self.sites.items()}
        for masked in self.masked.values():
            self.server.add_masked(masked)
        self.chosen = self.server.survivors()
        if phase == "masked":
            return
        self.votes = {s: site.sign_survivors(self.chosen) for s, site in self.sites.items()}
        for vote in self.votes.values():
            self.server.add_vote(vote)
        self.request = self.server.reveal_request()
        if phase == "voted":
            return
        self.revealed = {s: site.reveal(self.request) for s, site in self.sites.items()}


@pytest.fixture(scope="session")
def consortium() -> Callable[..., Consortium]:
    known: dict[object, Consortium] = {}

    def make(n: int, **options: object) -> Consortium:
        key = (n, repr(sorted(options.items())))
        if key not in known:
            known[key] = Consortium(n, **options)  # type: ignore[arg-type]
        return known[key]

    return make


@pytest.fixture(scope="session")
def labelled() -> type[Labelled]:
    return Labelled


@pytest.fixture(scope="session")
def midway() -> type[Midway]:
    return Midway
