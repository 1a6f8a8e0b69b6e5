"""Can the coordinator be reached? A plain look at its ports for `site check`: nothing is sent but a TLS greeting.

Only people's commands import this; neither guard nor courier does.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a port said. problem: "" when a TLS 1.3 server with a certificate of the consortium answered.

    off_s: by how many seconds this clock lies outside the server certificate's time: below 0 before it begins (this
    clock is behind, or the server's ahead), above 0 after its end; 0 where it is valid by this clock.
    """

    address: str
    problem: str = ""
    off_s: int = 0


def look(address: str, root: Path, *, timeout_s: float = TIMEOUT_S, alpn: tuple[str, ...] = ("h2",)) -> Answer:
    """Connect, greet, and look at the certificate. address: host:port."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        raw = socket.create_connection((host, int(port)), timeout=timeout_s)
    except (OSError, ValueError) as error:
        return Answer(address=address, problem=_why(error))
    try:
        with raw, _greet(raw, host, root, alpn=alpn, check=True) as tls:
            assert tls.version() == "TLSv1.3"
            return Answer(address=address)
    except ssl.SSLCertVerificationError:
        return Answer(address=address, problem="the certificate is not accepted", off_s=_off(address, root))
    except ssl.SSLError:
        return Answer(address=address, problem="something answers that does not speak TLS 1.3")
    except OSError as error:
        return Answer(address=address, problem=_why(error))


def _greet(raw: socket.socket, host: str, root: Path, *, alpn: tuple[str, ...], check: bool) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(root)) if check else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(list(alpn))
    if not check:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(raw, server_hostname=host)


def _off(address: str, root: Path) -> int:
    """Seconds by which this clock lies outside the server certificate's time, whoever it is."""
    host, _, port = address.rpartition(":")
    try:
        raw = socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S)
        with raw, _greet(raw, host.strip("[]"), root, alpn=("h2",), check=False) as tls:
            der = tls.getpeercert(binary_form=True) or b""
        leaf = x509.load_der_x509_certificate(der)
    except (OSError, ValueError):
        return 0
    now = datetime.now(UTC)
    if now < leaf.not_valid_before_utc:
        return -int((leaf.not_valid_before_utc - now).total_seconds())
    if now > leaf.not_valid_after_utc:
        return int((now - leaf.not_valid_after_utc).total_seconds())
    return 0


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time: a firewall drops it, or the address is wrong"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "the name cannot be resolved"
    return f"cannot be reached ({type(error).__name__})"
