"""Transport certificates: P-256 keys, one name a certificate, one purpose, 24 hours; TLS 1.3 and nothing older.

    root (offline, path length 1) -> issuer (online, path length 0, 90 days) -> leaf (24 h, renewed at 2/3 of its life)
A leaf names its owner in exactly one URI, spiffe://CONSORTIUM/ROLE/NAME, and serves one purpose: clientAuth for a
member, serverAuth for the coordinator's service. These keys open connections only; what is said over them is signed
by the Ed25519 identities of `signing`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

# gRPC for Python has no setting for the lowest TLS version, but it reads this variable once, while it is loaded: the
# cipher suites of TLS 1.2 (those of 1.3 are fixed). The one suite named here needs a pre-shared key, which nobody
# ever gives to gRPC, so no handshake of TLS 1.2 can end, whoever the other side is. Where gRPC was loaded before this
# module the variable comes too late; a server therefore tries TLS 1.2 on its own port before it serves
# (server/listening), and each call is looked at as well (server/calls).
_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
_NO_TLS12 = "ECDHE-PSK-CHACHA20-POLY1305"
os.environ[_VARIABLE] = _NO_TLS12
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or each refused handshake prints a line

import grpc  # noqa: E402
from cryptography import x509  # noqa: E402
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: E402

from cohortium.common.errors import Refused, UsageError  # noqa: E402
from cohortium.common.protocol.messages import digest  # noqa: E402

SITE, RESEARCHER, COORDINATOR, SERVICE = "site", "researcher", "coordinator", "service"
ROLES = (SITE, RESEARCHER, COORDINATOR, SERVICE)
MEMBER_ROLES = (SITE, RESEARCHER, COORDINATOR)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
BACKDATE = timedelta(minutes=5)
"""A leaf holds from a little before its issue: two honest clocks differ by minutes."""
MOST_PEM_BYTES = 1 << 16
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_URI = re.compile(r"spiffe://([^/]+)/([^/]+)/([^/]+)")


class CertificateError(Refused):
    """A certificate, request or transport key that is not accepted, each cause with a code of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Whom a certificate names."""

    consortium: str
    role: str
    name: str

    def __post_init__(self) -> None:
        if self.role not in ROLES or not (_NAME.fullmatch(self.consortium) and _NAME.fullmatch(self.name)):
            raise CertificateError(
                "CERT-NAME", "consortium and member have names of small letters, digits and dashes, and a known role"
            )


def spiffe(consortium: str, role: str, name: str) -> str:
    """The one URI that names an owner; CertificateError CERT-NAME for a name that does not fit."""
    owner = Owner(consortium=consortium, role=role, name=name)
    return f"spiffe://{owner.consortium}/{owner.role}/{owner.name}"


# ---- keys and requests --------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 transport key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, *, passphrase: str | None = None) -> bytes:
    """PKCS #8 in PEM, encrypted where a passphrase is given."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def load_key(path: Path, *, passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
    """A P-256 key of its file. UsageError KEY-MISSING, KEY-MODE (others may read it), KEY-FORMAT, KEY-PASSPHRASE."""
    return parse_key(read_private(path), where=str(path), passphrase=passphrase)


def parse_key(pem: bytes, *, where: str = "", passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
    places = (where,) if where else ()
    try:
        key = serialization.load_pem_private_key(pem, None if passphrase is None else passphrase.encode())
    except TypeError:
        raise UsageError("KEY-PASSPHRASE", "the key and the passphrase do not go together", where=places) from None
    except (ValueError, UnsupportedAlgorithm):
        code = "KEY-PASSPHRASE" if passphrase is not None and b"ENCRYPTED" in pem else "KEY-FORMAT"
        raise UsageError(code, "the transport key cannot be read", where=places) from None
    if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
        raise UsageError("KEY-FORMAT", "a transport key is a P-256 key", where=places)
    return key


def make_csr(key: ec.EllipticCurvePrivateKey, *, consortium: str, role: str, name: str) -> bytes:
    """A certificate request in PEM: the site keeps the key, the coordinator never sees it."""
    uri = spiffe(consortium, role, name)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject(name))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def read_csr(pem: bytes) -> tuple[Owner, ec.EllipticCurvePublicKey]:
    """Whom a request asks for and its key, which has signed it. CertificateError CSR-FORMAT for anything else."""
    try:
        request = x509.load_pem_x509_csr(pem) if len(pem) <= MOST_PEM_BYTES else None
        key = request.public_key() if request is not None else None
        if request is None or not request.is_signature_valid:
            raise CertificateError("CSR-FORMAT", "the request is too long or not signed by its own key")
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise CertificateError("CSR-FORMAT", "a transport key is a P-256 key")
        return _owner(request.extensions), key
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError("CSR-FORMAT", "not a certificate request") from None


def subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


# ---- certificates -------------------------------------------------------------------------------------------


def load_chain(pem: bytes) -> list[x509.Certificate]:
    """Every certificate of a PEM text, leaf first; CertificateError CERT-FORMAT."""
    try:
        if len(pem) > MOST_PEM_BYTES:
            raise ValueError
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError("CERT-FORMAT", "not a certificate in PEM") from None


def owner_of(certificate: x509.Certificate | bytes) -> Owner:
    """Whom a certificate (of PEM: its first) names in its single URI. CertificateError CERT-NAME, CERT-FORMAT."""
    leaf = load_chain(certificate)[0] if isinstance(certificate, bytes) else certificate
    try:
        return _owner(leaf.extensions)
    except ValueError:
        raise CertificateError("CERT-FORMAT", "the certificate's extensions cannot be read") from None


def name_of(certificate: x509.Certificate | bytes) -> tuple[str, str, str]:
    """(consortium, role, name) of a certificate; errors as `owner_of`."""
    owner = owner_of(certificate)
    return owner.consortium, owner.role, owner.name


def _owner(extensions: x509.Extensions) -> Owner:
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise CertificateError("CERT-NAME", "the certificate names nobody") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None:
        raise CertificateError("CERT-NAME", "a certificate holds exactly one URI, spiffe://CONSORTIUM/ROLE/NAME")
    return Owner(consortium=match[1], role=match[2], name=match[3])


def fingerprint(pem: bytes) -> str:
    """SHA-256 of the DER of a certificate or request, "AB:CD:…", to be compared by telephone."""
    if b"CERTIFICATE REQUEST" in pem[:100]:
        try:
            der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
        except (ValueError, UnsupportedAlgorithm):
            raise CertificateError("CSR-FORMAT", "not a certificate request") from None
    else:
        der = load_chain(pem)[0].public_bytes(serialization.Encoding.DER)
    text = digest(der).upper()
    return ":".join(text[i : i + 2] for i in range(0, len(text), 2))


def issued(certificate: x509.Certificate) -> datetime:
    """When a leaf was signed."""
    return certificate.not_valid_before_utc + BACKDATE


def expires(chain: bytes) -> datetime:
    """When the first certificate of a chain ends."""
    return load_chain(chain)[0].not_valid_after_utc


def renew_at(chain: bytes) -> datetime:
    """When to ask for the next one: at 2/3 of its life."""
    leaf = load_chain(chain)[0]
    return issued(leaf) + (leaf.not_valid_after_utc - issued(leaf)) * 2 / 3


def check_chain(chain: bytes, root: bytes, *, usage: x509.ObjectIdentifier, now: datetime | None = None) -> Owner:
    """Whom a chain (leaf, issuer) names, if it holds under this root, now, for this purpose (CLIENT or SERVER).

    Raises CertificateError, first cause first: CERT-FORMAT, CERT-FOREIGN (another root), CERT-NOT-YET-VALID,
    CERT-EXPIRED, CERT-ISSUER-EXPIRED, CERT-PURPOSE, CERT-NAME. The caller adds the fix.
    """
    certificates, anchors = load_chain(chain), load_chain(root)
    if len(certificates) != 2 or len(anchors) != 1:
        raise CertificateError("CERT-FORMAT", "a chain is a leaf and its issuer, under one root")
    (leaf, issuer), anchor = certificates, anchors[0]
    try:
        issuer.verify_directly_issued_by(anchor)
        leaf.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise CertificateError("CERT-FOREIGN", "the certificate is not one of this consortium") from None
    if not (_may_issue(anchor) and _may_issue(issuer)) or _may_issue(leaf):
        raise CertificateError("CERT-FOREIGN", "the certificate was not issued by an authority of this consortium")
    moment = now or datetime.now(UTC)
    if moment < leaf.not_valid_before_utc:
        raise CertificateError("CERT-NOT-YET-VALID", "the certificate begins in the future")
    if moment > leaf.not_valid_after_utc:
        raise CertificateError("CERT-EXPIRED", "the certificate has ended")
    for authority in (issuer, anchor):
        if not authority.not_valid_before_utc <= moment <= authority.not_valid_after_utc:
            raise CertificateError("CERT-ISSUER-EXPIRED", "the authority that issued the certificate is not valid now")
    check_usage(leaf, usage)
    return owner_of(leaf)


def check_usage(leaf: x509.Certificate, usage: x509.ObjectIdentifier) -> None:
    """A leaf has one purpose and it is this one; CertificateError CERT-PURPOSE."""
    try:
        purposes = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        purposes = []
    if purposes != [usage]:
        raise CertificateError("CERT-PURPOSE", "the certificate is made for another purpose")


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def fits(chain: bytes, key: bytes) -> bool:
    """Whether a chain's leaf is the certificate of this key (both PEM)."""
    try:
        return load_chain(chain)[0].public_key() == parse_key(key).public_key()
    except (Refused, UsageError):
        return False


# ---- files --------------------------------------------------------------------------------------------------


def read_private(path: Path) -> bytes:
    """The bytes of a file that only its owner may read; UsageError KEY-MISSING, KEY-MODE."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise UsageError(
                    "KEY-MODE",
                    f"group or others may use this private key (mode {mode:04o})",
                    where=(str(path),),
                    hint=f"chmod 600 {path}",
                )
            return file.read(MOST_PEM_BYTES)
    except OSError:
        raise UsageError("KEY-MISSING", "the key file cannot be read", where=(str(path),)) from None


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Replace a file as a whole: after a power cut there is the old one or the new one, with this mode."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder stays renamed after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- gRPC ---------------------------------------------------------------------------------------------------


def channel_credentials(root: bytes, chain: bytes | None = None, key: bytes | None = None) -> grpc.ChannelCredentials:
    """A client's credentials: this root only; with chain and key (both PEM) mutual TLS."""
    return grpc.ssl_channel_credentials(root_certificates=root, private_key=key, certificate_chain=chain)


def server_credentials(
    chain: Path | bytes, key: Path | bytes, root: bytes, *, require_client: bool
) -> grpc.ServerCredentials:
    """A server's credentials; require_client: mutual TLS under this root.

    Given as paths, chain and key are looked at before every handshake, so a renewed pair is served without a
    restart; a pair that does not fit together (half of it written) or cannot be read leaves the old one in place.
    """
    first = _pair(chain, key)
    if not fits(*first):
        raise CertificateError("CERT-KEY", "the server's certificate is not that of its key")
    anchors = root if require_client else None
    # None, "no change", is what gRPC's documentation allows and its type stubs forget.
    refresh = cast("Callable[[], grpc.ServerCertificateConfiguration]", _refresh(chain, key, first, anchors))
    return grpc.dynamic_ssl_server_credentials(_configuration(first, anchors), refresh, require_client)


def _refresh(
    chain: Path | bytes, key: Path | bytes, first: tuple[bytes, bytes], anchors: bytes | None
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    served = [first]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            pair = _pair(chain, key)
        except (OSError, UsageError):
            return None
        if pair == served[0] or not fits(*pair):
            return None
        served[0] = pair
        return _configuration(pair, anchors)

    return fetch


def _pair(chain: Path | bytes, key: Path | bytes) -> tuple[bytes, bytes]:
    return (
        chain if isinstance(chain, bytes) else chain.read_bytes(),
        key if isinstance(key, bytes) else read_private(key),
    )


def _configuration(pair: Sequence[bytes], anchors: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair[1], pair[0])], root_certificates=anchors)
