"""Signing in at a hospital's identity provider: OpenID Connect, authorization code flow with PKCE.

    begin    state, nonce and a PKCE verifier are drawn; the browser is sent to the provider, and keeps them sealed
    finish   state and issuer of the answer are compared, the code is exchanged, the ID token verified: signature by
             a key of the provider, issuer, audience, times, nonce; then who the person is here, by the claim's values

Sources: OpenID Connect Core 1.0 sections 3.1.2 and 3.1.3.7, Discovery 1.0, RFC 7636 (PKCE), RFC 9207 (issuer in the
answer). Algorithms are a fixed list of public-key signatures: neither "none" nor a shared secret.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import get_well_known_url
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from cohortium.common.errors import CohortiumError, PeerUnreachable, Refused
from cohortium.server.console.accounts import COORDINATOR, SITE
from cohortium.server.console.settings import LOOPBACK, Oidc

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA")
LEEWAY_S = 60
FRESH_S = 3600
"""So long discovery and keys are kept; a key that is not among them is looked for again, at most once a minute."""
AGAIN_S = 60
QUIET_S = 10
"""So long a provider that was away is not asked again: whoever waits for it holds one of few threads."""
BACK_WITHIN_S = 600
MOST_BYTES = 1_000_000
TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the browser is sent away with, and what must fit when it comes back."""

    address: str
    state: str
    nonce: str
    verifier: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """Whom the provider vouches for, and what that makes them here; role "" where nothing does."""

    subject: str
    wish: str
    role: str
    site: str


class Provider:
    """The one provider of the settings. Threads may share it; nothing is asked of it before somebody wants in."""

    def __init__(self, settings: Oidc, *, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._client = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)
        self._found: dict[str, Any] = {}
        self._found_at = float("-inf")
        self._failed_at = float("-inf")
        self._keys: KeySet | None = None
        self._keys_at = float("-inf")
        self._used: dict[str, float] = {}

    def begin(self, back: str) -> Asked:
        """back: this console's address to come back to, as registered at the provider."""
        state, nonce, verifier = (secrets.token_urlsafe(48) for _ in range(3))
        more = {"acr_values": " ".join(self._settings.acr)} if self._settings.acr else {}
        address = prepare_grant_uri(
            self._discovered()["authorization_endpoint"],
            self._settings.client_id,
            "code",
            redirect_uri=back,
            scope=list(self._settings.scopes),
            state=state,
            nonce=nonce,
            code_challenge=_challenge(verifier),
            code_challenge_method="S256",
            **more,
        )
        return Asked(address=str(address), state=state, nonce=nonce, verifier=verifier)

    def finish(self, asked: Asked, answer: Mapping[str, str], back: str) -> Person:
        """Who came back. answer: the query of the browser's request; asked: what this browser was sent away with.

        Refused OIDC-STATE, OIDC-ISSUER, OIDC-DENIED, OIDC-CODE, OIDC-TOKEN, OIDC-FACTOR; PeerUnreachable
        OIDC-PROVIDER. Nothing that the provider or the browser wrote is repeated in them.
        """
        if not secrets.compare_digest(answer.get("state", "").encode(), asked.state.encode()):
            raise _refused("OIDC-STATE", "this answer does not belong to a sign-in that was begun in this browser")
        self._once(asked.state)
        found = self._discovered()
        said = answer.get("iss")
        promised = found.get("authorization_response_iss_parameter_supported") is True
        if (said is None and promised) or (said is not None and said != self._settings.issuer):
            raise _refused("OIDC-ISSUER", "the answer is not from the provider that was asked")
        if "error" in answer or not answer.get("code"):
            raise _refused("OIDC-DENIED", "the provider did not let you in")
        tokens = self._exchange(answer["code"], asked.verifier, back)
        claims = self._verified(tokens, asked.nonce)
        self._check_factor(claims)
        role, site = self._role(claims)
        return Person(subject=claims["sub"], wish=_wish(claims), role=role, site=site)

    def _once(self, state: str) -> None:
        """A state comes back once, whatever a browser or a proxy sends again."""
        now = self._clock()
        with self._lock:
            self._used = {known: at for known, at in self._used.items() if now - at <= BACK_WITHIN_S}
            if state in self._used:
                raise _refused("OIDC-STATE", "this answer was used before")
            self._used[state] = now

    # ---- the provider's own papers --------------------------------------------------------------------------

    def _discovered(self) -> dict[str, Any]:
        with self._lock:
            if self._clock() - self._found_at < FRESH_S:
                return self._found
            if self._clock() - self._failed_at < QUIET_S:
                raise _away()
            try:
                found = self._json("GET", get_well_known_url(self._settings.issuer, external=True))
            except PeerUnreachable:
                self._failed_at = self._clock()
                raise
            if found.get("issuer") != self._settings.issuer:
                raise _refused("OIDC-ISSUER", "the provider's own description names another issuer")
            for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                if not self._usable(found.get(name)):
                    raise _refused("OIDC-ISSUER", f"the provider's description has no usable {name}")
            self._found, self._found_at = found, self._clock()
            return found

    def _usable(self, address: Any) -> bool:
        """https; in the clear only where the issuer itself is on this machine."""
        if not isinstance(address, str):
            return False
        parts, issuer = urlsplit(address), urlsplit(self._settings.issuer)
        clear = parts.scheme == issuer.scheme == "http" and parts.hostname in LOOPBACK
        return bool(parts.hostname) and (parts.scheme == "https" or clear)

    def _key_set(self, *, again: bool = False) -> KeySet:
        address = self._discovered()["jwks_uri"]
        with self._lock:
            if self._keys is None or self._clock() - self._keys_at >= (AGAIN_S if again else FRESH_S):
                papers = self._json("GET", address)
                try:
                    # Shared secrets are no provider's public keys; an unknown kind of key is none of ours.
                    self._keys = KeySet.import_key_set({"keys": [key for key in papers["keys"] if _signs(key)]})
                except (JoseError, ValueError, KeyError, TypeError, AttributeError):
                    raise _refused("OIDC-TOKEN", "the provider's keys cannot be read") from None
                self._keys_at = self._clock()
            return self._keys

    # ---- code and token -------------------------------------------------------------------------------------

    def _exchange(self, code: str, verifier: str, back: str) -> dict[str, Any]:
        settings, found = self._settings, self._discovered()
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": back, "code_verifier": verifier}
        basic = None
        methods = found.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if settings.client_secret is None:
            form["client_id"] = settings.client_id
        elif isinstance(methods, list) and "client_secret_basic" not in methods and "client_secret_post" in methods:
            form |= {"client_id": settings.client_id, "client_secret": settings.client_secret}
        else:  # RFC 6749 section 2.3.1: both are form-encoded first
            basic = httpx.BasicAuth(quote(settings.client_id, safe=""), quote(settings.client_secret, safe=""))
        tokens = self._json("POST", found["token_endpoint"], data=form, auth=basic)
        if not isinstance(tokens.get("id_token"), str):
            raise _refused("OIDC-TOKEN", "the provider sent no ID token")
        return tokens

    def _verified(self, tokens: dict[str, Any], nonce: str) -> dict[str, Any]:
        """The claims of an ID token that holds (Core 3.1.3.7)."""
        settings, access = self._settings, tokens.get("access_token")
        try:
            try:
                token = jwt.decode(tokens["id_token"], self._key_set(), algorithms=ALGORITHMS)
            except (JoseError, ValueError):  # perhaps by a key that is new
                token = jwt.decode(tokens["id_token"], self._key_set(again=True), algorithms=ALGORITHMS)
            claims = CodeIDToken(
                token.claims,
                token.header,
                {
                    "iss": {"essential": True, "value": settings.issuer},
                    "aud": {"essential": True, "value": settings.client_id},
                    "sub": {"essential": True},
                    "nonce": {"essential": True, "value": nonce},
                },
                {"nonce": nonce, "client_id": settings.client_id, "access_token": access},
            )
            claims.validate(now=int(self._clock()), leeway=LEEWAY_S)
        except CohortiumError:
            raise
        except Exception:  # whatever is odd about a token, it is not one that lets somebody in
            raise _refused("OIDC-TOKEN", "the provider's ID token does not hold") from None
        if not isinstance(claims["sub"], str) or not 0 < len(claims["sub"]) <= 255:
            raise _refused("OIDC-TOKEN", "the provider's ID token does not hold")
        return dict(claims)

    def _check_factor(self, claims: dict[str, Any]) -> None:
        settings, methods = self._settings, claims.get("amr")
        known = set(methods) if isinstance(methods, list) and all(isinstance(m, str) for m in methods) else set()
        if (settings.acr and claims.get("acr") not in settings.acr) or not set(settings.amr) <= known:
            raise _refused("OIDC-FACTOR", "the provider does not say that it asked for a second factor")

    def _role(self, claims: dict[str, Any]) -> tuple[str, str]:
        """What the claim's values make of somebody: a coordinator before an auditor before one site's member."""
        values = _values(claims, self._settings.claim)
        roles = {self._settings.roles[value] for value in values if value in self._settings.roles}
        sites = {self._settings.sites[value] for value in values if value in self._settings.sites}
        if roles:
            return (COORDINATOR if COORDINATOR in roles else roles.pop()), ""
        return (SITE, sites.pop()) if len(sites) == 1 else ("", "")

    # ---- the wire -------------------------------------------------------------------------------------------

    def _json(self, method: str, address: str, **more: Any) -> dict[str, Any]:
        """One exchange with the provider, without redirects. Refused OIDC-CODE for a 4xx; PeerUnreachable else."""
        try:
            with self._client.stream(method, address, headers={"accept": "application/json"}, **more) as answer:
                body = b""
                for part in answer.iter_bytes():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise ValueError
                if method == "POST" and 400 <= answer.status_code < 500:
                    raise _refused("OIDC-CODE", "the provider does not know this sign-in, or no longer")
                if answer.status_code != 200:
                    raise ValueError
                found = httpx.Response(200, content=body).json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _away()
        return found


def _wish(claims: dict[str, Any]) -> str:
    """What somebody would like to be called here; it has no meaning beside that."""
    for name in ("preferred_username", "email"):
        if isinstance(claims.get(name), str) and claims[name]:
            return str(claims[name])
    return str(claims["sub"])


def _challenge(verifier: str) -> str:
    make: Callable[[str], Any] = create_s256_code_challenge
    return str(make(verifier))


def _signs(key: dict[str, Any]) -> bool:
    return key.get("kty") in ("RSA", "EC", "OKP") and key.get("use") != "enc"


def _values(claims: dict[str, Any], path: str) -> list[str]:
    """The texts of a claim, by its name or, for a claim inside others, by its path with dots."""
    found: Any = claims.get(path)
    if found is None:
        found = claims
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    listed = found if isinstance(found, list) else [found]
    return [value for value in listed if isinstance(value, str)]


def _away() -> PeerUnreachable:
    return PeerUnreachable(
        "OIDC-PROVIDER",
        "the identity provider did not answer as it should",
        hint="try again in a minute; a local account works meanwhile",
    )


def _refused(code: str, sentence: str) -> Refused:
    return Refused(code, sentence, hint="begin again at the sign-in page")
