"""Names, requests, chains, files and TLS versions. Planted bugs that turn a test red stand at each group."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from consortium import HOUR, NAME, Leaf, leaf, make_pki
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cohortium.common.errors import UsageError
from cohortium.common.protocol import certificates as c
from cohortium.server.pki import Issuer, create_issuer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pki")


@pytest.fixture(scope="module")
def issuer(folder: Path) -> Issuer:
    return make_pki(folder)


def code(call: object, *args: object, **options: object) -> str:
    with pytest.raises((c.CertificateError, UsageError)) as caught:
        call(*args, **options)  # type: ignore[operator]
    return caught.value.code


# ---- names and requests -------------------------------------------------------------------------------------


def test_a_name_is_one_uri() -> None:
    assert c.spiffe("rare-tumours", "site", "north") == "spiffe://rare-tumours/site/north"


@pytest.mark.parametrize(
    ("consortium", "role", "name"),
    [("x", "root", "a"), ("x", "site", ""), ("x", "site", "a/b"), ("x", "site", "A"), ("", "site", "a"),
     ("x", "site", "a" * 65), ("x", "site", "ä"), ("x", "site", "a\n"), ("x/y", "site", "a"), ("x", "site", "..")],
)  # fmt: skip
def test_other_names_are_refused(consortium: str, role: str, name: str) -> None:
    assert code(c.spiffe, consortium, role, name) == "CERT-NAME"


def test_a_request_names_its_owner_and_is_signed_by_its_key() -> None:
    key = c.new_key()
    pem = c.make_csr(key, consortium=NAME, role="site", name="north")
    owner, public = c.read_csr(pem)
    assert (owner.consortium, owner.role, owner.name) == (NAME, "site", "north")
    assert public == key.public_key()


def _csr(key: object, names: list[x509.GeneralName] | None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(c.subject("north"))
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


def test_requests_that_are_refused() -> None:
    """Red without the signature check, the curve check or the count of URIs."""
    uri = x509.UniformResourceIdentifier(f"spiffe://{NAME}/site/north")
    other = x509.UniformResourceIdentifier(f"spiffe://{NAME}/site/south")
    good = _csr(c.new_key(), [uri])
    assert c.read_csr(good)[0].name == "north"
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    at = der.index(b"/site/north") + 6
    der[at : at + 5] = b"south"  # the name is exchanged, the signature stays
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    assert code(c.read_csr, forged) == "CSR-FORMAT"
    assert code(c.read_csr, _csr(ec.generate_private_key(ec.SECP384R1()), [uri])) == "CSR-FORMAT"
    assert code(c.read_csr, _csr(rsa.generate_private_key(65537, 2048), [uri])) == "CSR-FORMAT"
    assert code(c.read_csr, _csr(c.new_key(), [uri, other])) == "CERT-NAME"
    assert code(c.read_csr, _csr(c.new_key(), [x509.DNSName("north")])) == "CERT-NAME"
    assert code(c.read_csr, _csr(c.new_key(), None)) == "CERT-NAME"
    assert code(c.read_csr, b"hello") == "CSR-FORMAT"
    assert code(c.read_csr, good + b" " * c.MOST_PEM_BYTES) == "CSR-FORMAT"


# ---- chains -------------------------------------------------------------------------------------------------


def _forged(issuer: Issuer, *, usages: list[x509.ObjectIdentifier], uris: int = 1, ca: bool = False) -> bytes:
    """A leaf as only a careless issuer would sign it."""
    key, now = c.new_key(), datetime.now(UTC)
    names = [x509.UniformResourceIdentifier(f"spiffe://{NAME}/site/n{i}") for i in range(uris)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(c.subject("n0"))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - HOUR)
        .not_valid_after(now + HOUR)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names or [x509.DNSName("n0")]), critical=False)
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    made = builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return made + issuer.certificate.public_bytes(serialization.Encoding.PEM)


def test_a_good_chain_names_its_owner(issuer: Issuer) -> None:
    chain = leaf(issuer, "north").chain
    owner = c.check_chain(chain, issuer.root_pem, usage=c.CLIENT)
    assert owner == c.Owner(consortium=NAME, role="site", name="north")
    assert c.name_of(chain) == (NAME, "site", "north")


def test_each_thing_that_can_be_wrong_with_a_chain_has_its_code(issuer: Issuer, tmp_path: Path) -> None:
    """Red when any one of the checks of `check_chain` is taken out."""
    now = datetime.now(UTC)
    foreign = make_pki(tmp_path)
    other_leaf = leaf(foreign, "north").chain
    ours = leaf(issuer, "north")

    def check(chain: bytes, **options: object) -> str:
        return code(c.check_chain, chain, issuer.root_pem, usage=c.CLIENT, **options)

    first = ours.chain.split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    assert check(other_leaf) == "CERT-FOREIGN"
    assert check(first + foreign.certificate.public_bytes(serialization.Encoding.PEM)) == "CERT-FOREIGN"
    pretended = _forged(replace(issuer, key=c.new_key()), usages=[ExtendedKeyUsageOID.CLIENT_AUTH])
    assert check(pretended) == "CERT-FOREIGN"  # beside the true issuer, signed by another
    assert check(first) == "CERT-FORMAT"
    assert check(b"") == "CERT-FORMAT"
    assert check(leaf(issuer, "north", now=now - 48 * HOUR).chain) == "CERT-EXPIRED"
    assert check(leaf(issuer, "north", now=now + HOUR).chain) == "CERT-NOT-YET-VALID"
    assert check(ours.chain, now=now + 25 * HOUR) == "CERT-EXPIRED"
    assert check(ours.chain, now=now - HOUR) == "CERT-NOT-YET-VALID"
    assert check(issuer.server_leaf(["localhost"])[0]) == "CERT-PURPOSE"
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    assert check(_forged(issuer, usages=[client, server])) == "CERT-PURPOSE"
    assert check(_forged(issuer, usages=[])) == "CERT-PURPOSE"
    assert check(_forged(issuer, usages=[client], uris=2)) == "CERT-NAME"
    assert check(_forged(issuer, usages=[client], uris=0)) == "CERT-NAME"
    assert check(_forged(issuer, usages=[client], ca=True)) == "CERT-FOREIGN"


def test_an_issuer_that_has_ended_is_named(folder: Path, issuer: Issuer, tmp_path: Path) -> None:
    then = datetime.now(UTC) - timedelta(days=2)
    from consortium import PASSPHRASE

    create_issuer(folder / "root", tmp_path / "old", passphrase=PASSPHRASE, days=1, now=then)
    chain = leaf(Issuer.load(tmp_path / "old"), "north", now=then).chain
    assert code(c.check_chain, chain, issuer.root_pem, usage=c.CLIENT) == "CERT-EXPIRED"
    live = leaf(issuer, "north").chain
    late = datetime.now(UTC) + timedelta(days=91)
    assert code(c.check_chain, live, issuer.root_pem, usage=c.CLIENT, now=late) == "CERT-EXPIRED"


def test_the_librarys_own_verifier_agrees(issuer: Issuer, tmp_path: Path) -> None:
    """A second, independent answer: what we accept it accepts, and what is foreign or ended it refuses."""
    store = Store(x509.load_pem_x509_certificates(issuer.root_pem))
    verifier = PolicyBuilder().store(store).time(datetime.now(UTC)).build_client_verifier()

    def accepts(chain: bytes) -> bool:
        first, *rest = x509.load_pem_x509_certificates(chain)
        try:
            verifier.verify(first, rest)
        except VerificationError:
            return False
        return True

    assert accepts(leaf(issuer, "north").chain)
    assert not accepts(leaf(make_pki(tmp_path), "north").chain)
    assert not accepts(leaf(issuer, "north", now=datetime.now(UTC) - 48 * HOUR).chain)
    assert not accepts(issuer.server_leaf(["localhost"])[0])


def test_a_leaf_is_renewed_at_two_thirds_of_its_life(issuer: Issuer) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    chain = leaf(issuer, "north", now=now).chain
    assert c.expires(chain) == now + 24 * HOUR
    assert c.renew_at(chain) == now + 16 * HOUR


def test_a_fingerprint_is_that_of_the_der(issuer: Issuer) -> None:
    der = ssl.PEM_cert_to_DER_cert(issuer.root_pem.decode())
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    assert c.fingerprint(issuer.root_pem) == digest.finalize().hex(":").upper()
    csr = c.make_csr(c.new_key(), consortium=NAME, role="site", name="north")
    assert c.fingerprint(csr) != c.fingerprint(c.make_csr(c.new_key(), consortium=NAME, role="site", name="north"))


# ---- files --------------------------------------------------------------------------------------------------


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "leaf.key"
    key = c.new_key()
    c.write_file(path, c.key_pem(key), 0o600)
    assert c.load_key(path).public_key() == key.public_key()
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        assert code(c.load_key, path) == "KEY-MODE"
    assert code(c.load_key, tmp_path / "none") == "KEY-MISSING"


def test_a_passphrase_is_needed_and_is_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    c.write_file(path, c.key_pem(c.new_key(), passphrase="a long passphrase"), 0o600)
    assert b"ENCRYPTED" in path.read_bytes()
    assert c.load_key(path, passphrase="a long passphrase")
    assert code(c.load_key, path, passphrase="another passphrase") == "KEY-PASSPHRASE"
    assert code(c.load_key, path) == "KEY-PASSPHRASE"


def test_a_file_is_written_closed_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        c.write_file(tmp_path / "key", b"x", 0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


# ---- TLS versions -------------------------------------------------------------------------------------------

_SERVER_AND_CLIENTS = """
import sys
if sys.argv[1] == "late":
    import grpc
from cohortium.common.protocol.certificates import channel_credentials, server_credentials
import grpc, pathlib, socket, ssl, threading
from concurrent import futures
root, pki = (pathlib.Path(a) for a in sys.argv[2:4])
pem = root.read_bytes()
server = grpc.server(futures.ThreadPoolExecutor(2))
port = server.add_secure_port(
    "127.0.0.1:0", server_credentials(pki / "server.pem", pki / "server.key", pem, require_client=sys.argv[4] == "yes"))
server.start()
def client(version):
    context = ssl.create_default_context(cafile=str(root))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(sys.argv[5], sys.argv[6])
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as raw:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
                tls.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + bytes([4]) + bytes(5))
                return tls.version() if tls.recv(1) else "cut"
    except (ssl.SSLError, ConnectionError):
        return "refused"
print("server", client(ssl.TLSVersion.TLSv1_2), client(ssl.TLSVersion.TLSv1_3))
def old_server(version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(pki / "server.pem", pki / "server.key")
    context.set_alpn_protocols(["h2"])
    listener, said = socket.create_server(("127.0.0.1", 0)), []
    def serve():
        raw, _ = listener.accept()
        try:
            with context.wrap_socket(raw, server_side=True) as tls:
                said.append(tls.version())
        except (ssl.SSLError, ConnectionError):
            said.append("refused")
    thread = threading.Thread(target=serve)
    thread.start()
    with grpc.secure_channel(f"127.0.0.1:{listener.getsockname()[1]}", channel_credentials(pem)) as channel:
        channel.subscribe(lambda state: None, try_to_connect=True)
        thread.join(5)
    listener.close()
    return said[0]
print("client", old_server(ssl.TLSVersion.TLSv1_2), old_server(ssl.TLSVersion.TLSv1_3))
server.stop(0)
"""


def _versions(folder: Path, order: str, member: Leaf, *, mutual: bool, tmp_path: Path) -> list[str]:
    c.write_file(tmp_path / "leaf.pem", member.chain, 0o644)
    c.write_file(tmp_path / "leaf.key", member.key, 0o600)
    arguments = [order, str(folder / "root" / "root.pem"), str(folder / "pki"), "yes" if mutual else "no"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", _SERVER_AND_CLIENTS, *arguments, str(tmp_path / "leaf.pem"), str(tmp_path / "leaf.key")],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mutual", [True, False])
def test_tls_1_2_is_refused_by_server_and_client_and_1_3_is_not(
    folder: Path, issuer: Issuer, tmp_path: Path, mutual: bool
) -> None:
    found = _versions(folder, "early", leaf(issuer, "north"), mutual=mutual, tmp_path=tmp_path)
    assert found == ["server refused TLSv1.3", "client refused TLSv1.3"]


def test_the_test_of_tls_versions_has_power(folder: Path, issuer: Issuer, tmp_path: Path) -> None:
    """Where gRPC was loaded first it takes TLS 1.2: what the setting is for, and what a server must find out."""
    found = _versions(folder, "late", leaf(issuer, "north"), mutual=True, tmp_path=tmp_path)
    assert found == ["server TLSv1.2 TLSv1.3", "client TLSv1.2 TLSv1.3"]
