"""The root is offline and encrypted, the issuer signs leaves only, a leaf is what its docstring says."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from consortium import HOUR, NAME, PASSPHRASE, leaf, make_pki
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from cohortium.common.errors import CohortiumError, UsageError
from cohortium.common.protocol.certificates import (
    CLIENT,
    SERVER,
    check_chain,
    fits,
    key_pem,
    load_key,
    make_csr,
    new_key,
)
from cohortium.server.pki import Issuer, create_issuer, create_root, save_server_leaf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("pki")
    make_pki(made)
    return made


@pytest.fixture(scope="module")
def issuer(folder: Path) -> Issuer:
    return Issuer.load(folder / "pki")


def constraints(certificate: x509.Certificate) -> tuple[bool, int | None, bool]:
    found = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    return found.value.ca, found.value.path_length, found.critical


def test_path_lengths(folder: Path, issuer: Issuer) -> None:
    root = x509.load_pem_x509_certificate((folder / "root" / "root.pem").read_bytes())
    assert constraints(root) == (True, 1, True)
    assert constraints(issuer.certificate) == (True, 0, True)
    assert constraints(x509.load_pem_x509_certificate(leaf(issuer, "north").chain)) == (False, None, True)
    assert issuer.certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=90)


def test_the_roots_key_is_encrypted_and_closed(folder: Path) -> None:
    path = folder / "root" / "root.key"
    assert b"ENCRYPTED" in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="KEY-PASSPHRASE"):
        load_key(path)
    with pytest.raises(UsageError, match="KEY-PASSPHRASE"):
        create_issuer(folder / "root", folder / "other", passphrase="not the passphrase")


def test_the_root_is_not_needed_to_issue(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pki", tmp_path / "pki")
    assert leaf(Issuer.load(tmp_path / "pki"), "north").chain
    assert not list((tmp_path / "pki").glob("root.key"))


def test_roots_that_are_not_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ROOT-PASSPHRASE"):
        create_root(tmp_path / "a", name=NAME, passphrase="short")
    with pytest.raises(UsageError, match="ROOT-EXISTS"):
        create_root(folder / "root", name=NAME, passphrase=PASSPHRASE)
    with pytest.raises(CohortiumError, match="CERT-NAME"):
        create_root(tmp_path / "b", name="Not A Name", passphrase=PASSPHRASE)
    assert not list(tmp_path.rglob("root.*"))


def test_a_leaf_has_one_name_one_purpose_one_day(issuer: Issuer) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    found = x509.load_pem_x509_certificate(leaf(issuer, "north", now=now).chain)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"spiffe://{NAME}/site/north")]
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign
    assert found.not_valid_after_utc - now == timedelta(hours=24)
    assert timedelta(0) < now - found.not_valid_before_utc < timedelta(minutes=10)


def test_the_servers_leaf_names_its_hosts(issuer: Issuer) -> None:
    chain, key = issuer.server_leaf(["coordinator.example.org", "10.0.0.1", "::1"])
    assert check_chain(chain, issuer.root_pem, usage=SERVER).role == "service"
    names = x509.load_pem_x509_certificate(chain).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    assert len(names.get_values_for_type(x509.UniformResourceIdentifier)) == 1
    assert fits(chain, key)
    with pytest.raises(UsageError, match="SERVER-HOSTS"):
        issuer.server_leaf([])


def test_a_request_gets_the_callers_name_or_none(issuer: Issuer) -> None:
    """Red when `sign_csr` takes the name from the request, or does not compare."""
    key = new_key()
    csr = make_csr(key, consortium=NAME, role="site", name="north")
    for role, name in (("site", "south"), ("researcher", "north"), ("coordinator", "north")):
        with pytest.raises(CohortiumError, match="CSR-NAME"):
            issuer.sign_csr(csr, role=role, name=name)
    foreign = make_csr(key, consortium="another", role="site", name="north")
    with pytest.raises(CohortiumError, match="CSR-NAME"):
        issuer.sign_csr(foreign, role="site", name="north")
    service = make_csr(key, consortium=NAME, role="service", name="north")
    with pytest.raises(CohortiumError, match="CSR-NAME"):
        issuer.sign_csr(service, role="service", name="north")


def test_leaves_that_are_not_made(issuer: Issuer) -> None:
    for hours in (0, -1, 25, 1000):
        with pytest.raises(UsageError, match="LEAF-HOURS"):
            leaf(issuer, "north", hours=hours)
    with pytest.raises(CohortiumError, match="ISSUER-EXPIRED"):
        leaf(issuer, "north", now=datetime.now(UTC) + timedelta(days=91))


def test_a_leaf_never_outlives_its_issuer(issuer: Issuer) -> None:
    late = issuer.expires - HOUR
    assert x509.load_pem_x509_certificate(leaf(issuer, "n", now=late).chain).not_valid_after_utc == issuer.expires


def test_leaves_of_a_replaced_issuer_hold(folder: Path, tmp_path: Path) -> None:
    old = Issuer.load(folder / "pki")
    before = leaf(old, "north").chain
    create_issuer(folder / "root", tmp_path / "pki", passphrase=PASSPHRASE)
    new = Issuer.load(tmp_path / "pki")
    assert new.key.public_key() != old.key.public_key()
    for chain in (before, leaf(new, "north").chain):
        assert check_chain(chain, new.root_pem, usage=CLIENT).name == "north"


def test_halves_of_two_issuers_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pki", tmp_path / "pki")
    (tmp_path / "pki" / "issuer.key").write_bytes(key_pem(new_key()))
    with pytest.raises(UsageError, match="KEY-FORMAT"):
        Issuer.load(tmp_path / "pki")
    make_pki(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pki" / "root.pem", tmp_path / "pki" / "root.pem")
    with pytest.raises(CohortiumError, match="CERT-FOREIGN"):
        Issuer.load(tmp_path / "pki")


def test_a_servers_pair_must_fit(issuer: Issuer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="KEY-FORMAT"):
        save_server_leaf(tmp_path, (issuer.server_leaf(["localhost"])[0], key_pem(new_key())))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_agrees_strictly(folder: Path, issuer: Issuer, tmp_path: Path) -> None:
    """Another library's answer to the same chains, with RFC 5280 taken to the letter."""
    (tmp_path / "leaf.pem").write_bytes(leaf(issuer, "north").chain)

    def verify(path: Path, purpose: str) -> bool:
        known = ["-CAfile", str(folder / "root" / "root.pem"), "-untrusted", str(folder / "pki" / "issuer.pem")]
        command = ["openssl", "verify", "-x509_strict", *known, "-purpose", purpose, str(path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert verify(tmp_path / "leaf.pem", "sslclient") and not verify(tmp_path / "leaf.pem", "sslserver")
    server = folder / "pki" / "server.pem"
    assert verify(server, "sslserver") and not verify(server, "sslclient")
