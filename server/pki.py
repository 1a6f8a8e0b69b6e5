"""The consortium's own certificate authority: an offline root, an online issuer, leaves of 24 hours.

The root signs nothing but issuers and may lie in a drawer between two of them; its key is encrypted with a
passphrase. Were the root to sign the leaves itself its path length would be 0, as a one-level authority wants it.
But leaves are renewed every 16 hours while nobody is at the keyboard, and a root whose key is at hand all the time
is not offline. So there is one level between: the root has path length 1 and the issuer 0, which can sign leaves
and no further authority. Whoever steals the issuer's key can make leaves until it ends (90 days), and cannot enrol
anybody: the service answers only members of register.db. The remedy is a new root, and the sites enrol again.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cohortium.common.errors import UsageError
from cohortium.common.protocol.certificates import (
    BACKDATE,
    CLIENT,
    MEMBER_ROLES,
    SERVER,
    SERVICE,
    CertificateError,
    Owner,
    fits,
    key_pem,
    load_chain,
    load_key,
    new_key,
    read_csr,
    spiffe,
    subject,
    sync_folder,
    write_file,
)

ROOT_YEARS = 10
ISSUER_DAYS = 90
LEAF_HOURS = 24
MOST_LEAF_HOURS = 24
LEAST_PASSPHRASE = 12


def create_root(folder: Path, *, name: str, passphrase: str, now: datetime | None = None) -> bytes:
    """Make root.pem and root.key (encrypted) in a folder and return the certificate in PEM.

    name: the consortium's. Raises UsageError ROOT-PASSPHRASE (shorter than 12 characters), ROOT-EXISTS.
    """
    if len(passphrase) < LEAST_PASSPHRASE:
        raise UsageError(
            "ROOT-PASSPHRASE",
            f"the root's passphrase has at least {LEAST_PASSPHRASE} characters",
            hint="write it on paper and lock it away with the root",
        )
    spiffe(name, SERVICE, name)
    if (folder / "root.pem").exists() or (folder / "root.key").exists():
        raise UsageError("ROOT-EXISTS", "a consortium's root is never made twice", where=(str(folder),))
    _closed(folder)
    key, begin = new_key(), now or datetime.now(UTC)
    names = subject(f"{name} root")
    certificate = _authority(names, names, key.public_key(), key.public_key(), 1).sign_with(
        key, begin, begin + timedelta(days=366 * ROOT_YEARS)
    )
    write_file(folder / "root.key", key_pem(key, passphrase=passphrase), 0o600)
    write_file(folder / "root.pem", certificate, 0o644)
    return certificate


def create_issuer(
    folder_root: Path, folder_pki: Path, *, passphrase: str, days: int = ISSUER_DAYS, now: datetime | None = None
) -> bytes:
    """Sign a new issuer with the root and put issuer.pem, issuer.key and a copy of root.pem into folder_pki.

    Replaces an older issuer; leaves that the older one signed hold until they end. Returns the issuer in PEM.
    Raises UsageError KEY-PASSPHRASE, KEY-MISSING, ISSUER-DAYS.
    """
    if not 1 <= days <= 366:
        raise UsageError("ISSUER-DAYS", "an issuer lives 1 to 366 days")
    root_key = load_key(folder_root / "root.key", passphrase=passphrase)
    root_pem = _read(folder_root / "root.pem")
    root = load_chain(root_pem)[0]
    if root.public_key() != root_key.public_key():
        raise UsageError("KEY-FORMAT", "root.pem is not the certificate of root.key", where=(str(folder_root),))
    key, begin = new_key(), now or datetime.now(UTC)
    names = subject(f"{consortium_of(root)} issuer")
    end = min(begin + timedelta(days=days), root.not_valid_after_utc)
    made = _authority(names, root.subject, key.public_key(), root_key.public_key(), 0).sign_with(root_key, begin, end)
    _closed(folder_pki)
    write_file(folder_pki / "root.pem", root_pem, 0o644)
    # The key first: a crash between the two leaves a pair that `Issuer.load` refuses, never a leaf of the wrong one.
    write_file(folder_pki / "issuer.key", key_pem(key), 0o600)
    write_file(folder_pki / "issuer.pem", made, 0o644)
    return made


def consortium_of(root: x509.Certificate) -> str:
    """The consortium's name, as the root states it."""
    text = str(root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)
    return text.removesuffix(" root").removesuffix(" issuer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Issuer:
    """The online authority. consortium: the name that every leaf of it carries."""

    consortium: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    root_pem: bytes

    @classmethod
    def load(cls, folder_pki: Path) -> Self:
        """An issuer of its folder. UsageError KEY-MISSING, KEY-MODE, KEY-FORMAT; CertificateError CERT-FOREIGN."""
        root_pem = _read(folder_pki / "root.pem")
        root, certificate = load_chain(root_pem)[0], load_chain(_read(folder_pki / "issuer.pem"))[0]
        key = load_key(folder_pki / "issuer.key")
        try:
            certificate.verify_directly_issued_by(root)
        except Exception:
            raise CertificateError("CERT-FOREIGN", "the issuer is not one of this root") from None
        if certificate.public_key() != key.public_key():
            raise UsageError(
                "KEY-FORMAT",
                "issuer.pem is not the certificate of issuer.key",
                where=(str(folder_pki),),
                hint="cohortium consortium issuer",
            )
        return cls(consortium=consortium_of(root), certificate=certificate, key=key, root_pem=root_pem)

    @property
    def expires(self) -> datetime:
        return self.certificate.not_valid_after_utc

    def sign_csr(
        self, csr: bytes, *, role: str, name: str, hours: float = LEAF_HOURS, now: datetime | None = None
    ) -> bytes:
        """A member's leaf and the issuer in PEM. Role and name are the caller's, who knows whom it talks to; a
        request that asks for another owner is refused, and nothing else of the request but its key is used.

        Raises CertificateError CSR-FORMAT, CSR-NAME, CERT-NAME, ISSUER-EXPIRED.
        """
        owner = Owner(consortium=self.consortium, role=role, name=name)
        asked, key = read_csr(csr)
        if asked != owner or role not in MEMBER_ROLES:
            raise CertificateError("CSR-NAME", "the request asks for another name than the member's")
        if key == self.key.public_key():
            raise CertificateError("CSR-FORMAT", "a leaf has a key of its own")
        return self._leaf(owner, key, CLIENT, [], hours, now)

    def server_leaf(
        self, hosts: Sequence[str], *, name: str = "coordinator", hours: float = LEAF_HOURS, now: datetime | None = None
    ) -> tuple[bytes, bytes]:
        """The service's own certificate: (chain, key), both PEM. hosts: DNS names or IP addresses that sites dial."""
        if not hosts:
            raise UsageError("SERVER-HOSTS", "the service's certificate names at least one host")
        key = new_key()
        owner = Owner(consortium=self.consortium, role=SERVICE, name=name)
        return self._leaf(owner, key.public_key(), SERVER, [_host(h) for h in hosts], hours, now), key_pem(key)

    def _leaf(
        self,
        owner: Owner,
        key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        hosts: list[x509.GeneralName],
        hours: float,
        now: datetime | None,
    ) -> bytes:
        begin = now or datetime.now(UTC)
        end = min(begin + timedelta(hours=hours), self.expires)
        if not 0 < hours <= MOST_LEAF_HOURS:
            raise UsageError("LEAF-HOURS", f"a leaf lives at most {MOST_LEAF_HOURS} hours")
        if end <= begin:
            raise CertificateError(
                "ISSUER-EXPIRED",
                "the issuer has ended",
                hint="fetch the root and run: cohortium consortium issuer",
            )
        uri = x509.UniformResourceIdentifier(spiffe(owner.consortium, owner.role, owner.name))
        builder = _Builder(
            x509.CertificateBuilder()
            .subject_name(subject(owner.name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_data=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([uri, *hosts]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        leaf = builder.sign_with(self.key, begin, end)
        return leaf + self.certificate.public_bytes(serialization.Encoding.PEM)


def save_server_leaf(folder_pki: Path, pair: tuple[bytes, bytes]) -> None:
    """Put server.key and server.pem in place; a running server takes the pair over once both fit together."""
    chain, key = pair
    if not fits(chain, key):
        raise UsageError("KEY-FORMAT", "the server's certificate is not that of its key")
    write_file(folder_pki / "server.key", key, 0o600)
    write_file(folder_pki / "server.pem", chain, 0o644)


# ---- inside -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Builder:
    builder: x509.CertificateBuilder

    def sign_with(self, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime) -> bytes:
        made = (
            self.builder.serial_number(x509.random_serial_number())
            .not_valid_before(begin - BACKDATE)
            .not_valid_after(end)
            .sign(key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)


def _authority(
    names: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    path_length: int,
) -> _Builder:
    return _Builder(
        x509.CertificateBuilder()
        .subject_name(names)
        .issuer_name(issuer)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(sign_data=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, sign_data: bool) -> x509.KeyUsage:
    """A leaf signs handshakes and nothing else, an authority signs certificates and nothing else."""
    return x509.KeyUsage(
        digital_signature=sign_data,
        key_cert_sign=not sign_data,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise UsageError("KEY-MISSING", "a certificate of the consortium is missing", where=(str(path),)) from None


def _closed(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    sync_folder(folder.parent)
