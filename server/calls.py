"""A call's way into the coordinator's services: certificate, member, role, deadline, size; and its way out: a code.

Handlers are made from the service's own descriptor and a table with one rule a method, so a method without a rule
cannot be served. A handler gets a parsed request and a `Caller`. Whatever it raises, what leaves is one
`ServiceCode`; what was raised is logged here by its type and place only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, cast

import grpc
from cryptography import x509

from cohortium.common.errors import CohortiumError
from cohortium.common.protocol import consortium_pb2 as pb
from cohortium.common.protocol.certificates import CLIENT, CertificateError, Owner, check_usage, issued, owner_of
from cohortium.common.protocol.service import STATUS, ServiceCode, version_of
from cohortium.server.register import Member, Register

_LOG = logging.getLogger("cohortium.server.calls")
_NO_DEADLINE_S = 10 * 365 * 86_400.0
_SLACK_S = 2.0
WATCH_S = 0.25
"""How often open streams are held against the register."""
FAREWELL_S = 1.0
"""How long a stream of a member who was revoked has to end with a word before it is cut."""


class Refusal(Exception):
    """A handler's refusal, by a fixed code."""

    def __init__(self, code: ServiceCode) -> None:
        super().__init__(code.value)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one method asks of a call.

    roles: who may call; empty means that no certificate is asked for (enrolment). deadline_s: the longest deadline,
    and that there is one; None for a stream that lasts. most_bytes: the longest request message. at_once: calls
    that one member may have open.
    """

    roles: frozenset[str]
    deadline_s: float | None
    most_bytes: int
    at_once: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls, as its certificate and the register agree. signed, ends: of the certificate, seconds since 1970."""

    member: Member
    signed: float
    ends: float

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def role(self) -> str:
        return self.member.role


@dataclass(frozen=True, kw_only=True, slots=True)
class _Certificate:
    owner: Owner
    begins: float
    ends: float
    issued: float


@dataclass(kw_only=True, slots=True, eq=False)
class _Open:
    caller: Caller
    context: grpc.ServicerContext
    cut_at: float | None = None


class _Bad:
    """Stands for a request that could not be taken."""

    def __init__(self, code: ServiceCode) -> None:
        self.code = code


class Calls:
    """All calls of one service. on_revoked is told once of every member that was revoked while a stream was open;
    on_call of each call that was let in, with the version that the caller says it runs."""

    def __init__(
        self,
        *,
        rules: Mapping[str, Rule],
        consortium: str = "",
        register: Register | None = None,
        on_revoked: Callable[[str], None] | None = None,
        on_call: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules, self._consortium, self._register, self._clock = rules, consortium, register, clock
        self._on_revoked = on_revoked or (lambda name: None)
        self._on_call = on_call or (lambda name, version: None)
        self._lock = threading.Lock()
        self._open: set[_Open] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._stop = threading.Event()
        if register is not None:
            threading.Thread(target=self._watch, name="deny-list", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def handlers(self, service: str, servicer: object) -> grpc.GenericRpcHandler:
        """gRPC's handlers of a service of consortium.proto. KeyError where a method has no rule."""
        descriptor = pb.DESCRIPTOR.services_by_name[service]
        made = {m.name: self._handler(m, self._rules[m.name], getattr(servicer, m.name)) for m in descriptor.methods}
        return grpc.method_handlers_generic_handler(descriptor.full_name, made)

    # ---- making handlers ------------------------------------------------------------------------------------

    def _handler(self, method: Any, rule: Rule, serve: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
        parse, write = _parser(getattr(pb, method.input_type.name), rule.most_bytes), _write
        if method.client_streaming and method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(method.name, rule, serve, True), parse, write)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method.name, rule, serve, False), parse, write)
        if method.client_streaming:
            raise KeyError(f"{method.name}: this shape of call is not served")
        return grpc.unary_unary_rpc_method_handler(self._unary(method.name, rule, serve), parse, write)

    def _unary(self, method: str, rule: Rule, serve: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                with self._admitted(method, rule, context) as caller:
                    return serve(_good(request), caller, context)
            except Exception as error:
                _refuse(context, method, error)

        return call

    def _stream(self, method: str, rule: Rule, serve: Callable[..., Any], both: bool) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with self._admitted(method, rule, context) as caller:
                    given = self._frames(request, _someone(caller), context) if both else _good(request)
                    yield from serve(given, caller, context)
            except Exception as error:
                _refuse(context, method, error)

        return call

    def _frames(self, frames: Iterator[Any], caller: Caller, context: grpc.ServicerContext) -> Iterator[Any]:
        """Each frame of a stream is a request of its own: the register is asked again."""
        for frame in frames:
            try:
                self._check_member(caller.name, caller.role, caller.signed)
                if caller.ends <= self._clock():
                    raise Refusal(ServiceCode.CERT_EXPIRED)
                if isinstance(frame, _Bad):
                    raise Refusal(frame.code)
            except Refusal:
                # Another thread reads here than the one that answers: the call as a whole is ended.
                context.cancel()
                return
            yield frame

    # ---- admission ------------------------------------------------------------------------------------------

    @contextmanager
    def _admitted(self, method: str, rule: Rule, context: grpc.ServicerContext) -> Iterator[Caller | None]:
        check_tls(context)
        caller = self._caller(context) if rule.roles else None
        if caller is not None and caller.role not in rule.roles:
            raise Refusal(ServiceCode.ROLE_DENIED)
        if rule.deadline_s is not None:
            left = context.time_remaining()
            if left is None or left > _NO_DEADLINE_S:
                raise Refusal(ServiceCode.DEADLINE_MISSING)
            if left > rule.deadline_s + _SLACK_S:
                raise Refusal(ServiceCode.DEADLINE_TOO_LONG)
        if caller is None:
            yield None
            return
        call, key = _Open(caller=caller, context=context), (caller.name, method)
        with self._lock:
            if self._counts[key] >= rule.at_once:
                raise Refusal(ServiceCode.BUSY)
            self._counts[key] += 1
            self._open.add(call)
        try:
            self._on_call(caller.name, said_version(context))
            yield caller
        finally:
            with self._lock:
                self._open.discard(call)
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    def _caller(self, context: grpc.ServicerContext) -> Caller:
        """Who calls. TLS has verified the chain when the connection was made; whatever can have changed since then,
        and whatever a resumed or downgraded connection could slip past it, is looked at on every request."""
        pem = next(iter(_said(context, "x509_pem_cert")), b"")
        if not pem:
            raise Refusal(ServiceCode.CERT_MISSING)
        read = _certificate(pem)
        if isinstance(read, ServiceCode):
            raise Refusal(read)
        now = self._clock()
        if read.owner.consortium != self._consortium:
            raise Refusal(ServiceCode.CERT_FOREIGN)
        if now < read.begins:
            raise Refusal(ServiceCode.CERT_NOT_YET_VALID)
        if now >= read.ends:
            raise Refusal(ServiceCode.CERT_EXPIRED)
        member = self._check_member(read.owner.name, read.owner.role, read.issued)
        return Caller(member=member, signed=read.issued, ends=read.ends)

    def _check_member(self, name: str, role: str, signed: float) -> Member:
        """The member of that name and role, now. signed: when its certificate was made; one that is not younger than
        the member's last revocation stays refused after a new enrolment."""
        member = None if self._register is None else self._register.member(name)
        if member is None or member.role != role:
            raise Refusal(ServiceCode.MEMBER_UNKNOWN)
        if not member.active or (member.revoked_at is not None and signed <= member.revoked_at):
            raise Refusal(ServiceCode.MEMBER_REVOKED)
        return member

    # ---- the deny list, for what is open already ------------------------------------------------------------

    def _watch(self) -> None:
        told: set[str] = set()
        while not self._stop.wait(WATCH_S):
            with self._lock:
                calls = list(self._open)
            try:
                revoked = self._register.revoked() if calls and self._register is not None else frozenset()
            except Exception:
                # A register that cannot be read lets nobody stay.
                _LOG.exception("the register cannot be read")
                revoked = frozenset(call.caller.name for call in calls)
            told &= revoked
            for name in {call.caller.name for call in calls} & revoked - told:
                told.add(name)
                with suppress(Exception):
                    self._on_revoked(name)
            now = self._clock()
            for call in calls:
                if call.caller.name in revoked and call.cut_at is None:
                    call.cut_at = now + FAREWELL_S
                if call.caller.ends <= now or (call.cut_at is not None and call.cut_at <= now):
                    call.context.cancel()


# ---- inside -------------------------------------------------------------------------------------------------


def check_tls(context: grpc.ServicerContext) -> None:
    """Refusal TLS-VERSION for a call over anything but TLS 1.3."""
    if next(iter(_said(context, "ssl_tls_version")), b"") != b"TLSv1.3":
        raise Refusal(ServiceCode.TLS_VERSION)


def _said(context: grpc.ServicerContext, name: str) -> Iterable[bytes]:
    """What TLS says of a connection; the type stubs forget that these are lists of bytes."""
    found = cast("Mapping[str, Iterable[bytes]]", context.auth_context())
    return found.get(name, ())


def said_version(context: grpc.ServicerContext) -> str:
    """Which version a caller says it runs, "" where it says none."""
    given = {key: value for key, value in context.invocation_metadata() or () if key == "user-agent"}
    return version_of(str(given.get("user-agent", "")))


@lru_cache(maxsize=512)
def _certificate(pem: bytes) -> _Certificate | ServiceCode:
    """What a certificate says that TLS has accepted; reading one costs more than asking the register."""
    try:
        leaf = x509.load_pem_x509_certificate(pem)
        check_usage(leaf, CLIENT)
        return _Certificate(
            owner=owner_of(leaf),
            begins=leaf.not_valid_before_utc.timestamp(),
            ends=leaf.not_valid_after_utc.timestamp(),
            issued=issued(leaf).timestamp(),
        )
    except CertificateError as error:
        return ServiceCode.CERT_PURPOSE if error.code == "CERT-PURPOSE" else ServiceCode.CERT_NAME
    except ValueError:
        return ServiceCode.CERT_NAME


def _parser(message: Any, most_bytes: int) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        if len(data) > most_bytes:
            return _Bad(ServiceCode.TOO_LARGE)
        try:
            return message.FromString(data)
        except Exception:
            return _Bad(ServiceCode.MALFORMED)

    return parse


def _write(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _someone(caller: Caller | None) -> Caller:
    if caller is None:
        raise Refusal(ServiceCode.CERT_MISSING)  # a stream without a certificate is no method of ours
    return caller


def _good(request: Any) -> Any:
    if isinstance(request, _Bad):
        raise Refusal(request.code)
    return request


def _refuse(context: grpc.ServicerContext, method: str, error: Exception) -> NoReturn:
    """End a call with a fixed code: the refusal's own, that of an error whose code is one of ours, or INTERNAL."""
    code = ServiceCode.INTERNAL
    if isinstance(error, Refusal):
        code = error.code
    elif isinstance(error, CohortiumError) and error.code in set(ServiceCode):
        code = ServiceCode(error.code)
    if code is ServiceCode.INTERNAL:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        place = "" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        _LOG.error("%s ended with %s at %s", method, type(error).__name__, place)
    context.abort(STATUS[code], code.value)
