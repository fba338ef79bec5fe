"""A certificate authority for tests: certificates of every kind, good and bad, as PEM files."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL = ("127.0.0.1", "localhost")
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """Paths of one certificate and its key."""

    certificate: Path
    private_key: Path


class Authority:
    """Signs. Its own certificate is at `ca`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Tandem test {name}")])
        self._number = 0
        self.ca = folder / f"{name}.pem"
        basic = x509.BasicConstraints(ca=True, path_length=0)
        builder = self._builder(self._name, self._key.public_key(), days_left=30)
        self._write(self.ca, builder.add_extension(basic, critical=True).sign(self._key, hashes.SHA256()))

    def issue(
        self, name: str, hosts: Sequence[str] = LOCAL, *, days_left: int = 10, into: Issued | None = None
    ) -> Issued:
        """Write a certificate for `hosts`; `into` replaces the files of an older one. Expired with `days_left` < 0."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._builder(subject, key.public_key(), days_left).add_extension(
            x509.ExtendedKeyUsage(usages), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        self._number += 1
        file = f"{self.ca.stem}-{name}-{self._number}"
        paths = into or Issued(self._folder / f"{file}.pem", self._folder / f"{file}.key")
        paths.private_key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self._write(paths.certificate, builder.sign(self._key, hashes.SHA256()))
        return paths

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days_left: int) -> x509.CertificateBuilder:
        until = datetime.datetime.now(datetime.UTC) + days_left * _DAY
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(until - 60 * _DAY)
            .not_valid_after(until)
        )

    def _write(self, path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
