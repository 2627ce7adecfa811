"""Makes the certificates by which hosts that lend records to each other know each other."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650


def make(directory: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """A directory for each host in `directory`, with ca.pem, cert.pem and key.pem, which is returned.

    The CA is made where there is none: ca.pem and ca.key, which stays where it is and signs for hosts that come later.
    hosts: DNS names or addresses, as they are written in peer: URLs. days: how long their certificates are valid.
    Raises ValueError for a name that is none, FileExistsError for a host that has a directory."""
    for host in hosts:
        if not host or "/" in host or host.startswith("."):
            raise ValueError(f"host: expected a DNS name or an address, got {host!r}")
        if (directory / host).exists():
            raise FileExistsError(f"certificates: there is {directory / host} already; remove it to make a new one")
    directory.mkdir(mode=0o700, exist_ok=True)
    if not (directory / "ca.key").exists():
        _make_ca(directory)
    ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"certificates: {directory / 'ca.key'} is no key that this command has made")
    made = []
    for host in hosts:
        place = directory / host
        place.mkdir(mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(host, ca.subject, key, days)
            .add_extension(x509.SubjectAlternativeName([_name(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_key_usage(signs=True), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        _write(place / "key.pem", _pem(key))
        _write(place / "cert.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(place / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
        made.append(place)
    return made


def _make_ca(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lmcache_mm CA")])
    certificate = (
        _builder("lmcache_mm CA", name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    _write(directory / "ca.key", _pem(key))


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + datetime.timedelta(days)) - hour)
        .not_valid_after(now + datetime.timedelta(days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(signs: bool) -> x509.KeyUsage:
    """Of a host, which signs handshakes, or of the CA, which signs certificates."""
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=not signs,
        crl_sign=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """A file of mode 0600 that was not there."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
