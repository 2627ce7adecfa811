"""Makes the certificates that hosts use to authenticate each other when they lend records."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
CA_CERTIFICATE = "ca.pem"
CA_KEY = "ca.key"


def make(directory: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """Makes and returns a directory for each host in `directory`, with ca.pem, cert.pem and key.pem.

    Makes the CA if there is none: ca.pem and ca.key, which stays in `directory` and signs for later hosts. hosts: DNS
    names in lower case or addresses, as in peer: URLs. days: how long their certificates are valid, at most as long as
    the CA. Raises ValueError for an invalid name, number of days or CA, FileExistsError for a host that has a
    directory, and FileNotFoundError or NotADirectoryError if `directory` cannot be made; then nothing is written. After
    an interruption, run it again."""
    for i, host in enumerate(hosts):
        _check_host(host)
        if host in hosts[:i]:
            raise ValueError(f"host: {host} is named twice")
        if os.path.lexists(directory / host):
            raise FileExistsError(f"certificates: there is {directory / host} already; remove it to make a new one")
    if not directory.parent.is_dir():  # not made: a misspelled path would get a second CA, which no host trusts
        raise FileNotFoundError(f"certificates: there is no {directory.parent} to make {directory.name} in")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"certificates: expected a directory, got {directory}")
    there = _read_ca(directory)
    most = (there[0].not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days if there else CA_DAYS
    if not 1 <= days <= most:
        raise ValueError(f"days: expected 1 to {most}, for as long as the CA is valid, got {days}")
    directory.mkdir(mode=0o700, exist_ok=True)
    ca, ca_key = there or _make_ca(directory)
    for host in hosts:
        _make_host(directory, host, ca, ca_key, days)
    return [directory / host for host in hosts]


def _check_host(host: str) -> None:
    """ValueError for an invalid or ambiguous name or address."""
    with suppress(ValueError):
        if str(ipaddress.ip_address(host)) == host and "%" not in host:
            return
    labels = host.split(".")
    named = all(re.fullmatch(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", label) for label in labels)
    if not named or labels[-1].isdigit() or len(host) > 253 or host in (CA_CERTIFICATE, CA_KEY):
        raise ValueError(
            f"host: expected a DNS name in lower case or an address, shortened, without brackets, got {host!r}"
        )


def _read_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
    """The CA's certificate and key; None if the certificate has not been made yet."""
    place, key_place = directory / CA_CERTIFICATE, directory / CA_KEY
    if not place.exists():
        return None
    if not key_place.exists():
        raise ValueError(f"certificates: {place} has no {CA_KEY} beside it: run this where that key is")
    try:
        ca = x509.load_pem_x509_certificate(place.read_bytes())
    except ValueError as error:
        raise ValueError(f"certificates: {place} is not a certificate ({error}); remove it and run again") from None
    key = _read_key(key_place)
    if ca.public_key() != key.public_key():
        raise ValueError(f"certificates: {key_place} is not the key of {place}")
    return ca, key


def _read_key(place: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(place.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"certificates: {place} is not a key made by this command ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"certificates: {place} is not a key made by this command")
    return key


def _make_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Writes the key first: if this is interrupted, the certificate can still be made from the key."""
    if (directory / CA_KEY).exists():
        key = _read_key(directory / CA_KEY)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        _write(directory / CA_KEY, _pem(key))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lmcache_mm CA")])
    ca = (
        _builder("lmcache_mm CA", name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(directory / CA_CERTIFICATE, ca.public_bytes(serialization.Encoding.PEM))
    return ca, key


def _make_host(directory: Path, host: str, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, days: int) -> None:
    """Makes the host's directory, completely or not at all."""
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
    place = Path(tempfile.mkdtemp(prefix=".", dir=directory))
    try:
        _write(place / "key.pem", _pem(key))
        _write(place / "cert.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(place / CA_CERTIFICATE, ca.public_bytes(serialization.Encoding.PEM))
        place.rename(directory / host)
    except BaseException:
        shutil.rmtree(place)
        raise


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)  # since clocks differ
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
    """The key usage of the CA (`signs` certificates) or of a host, which signs handshakes."""
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
    """Makes a new file of mode 0600, completely or not at all, unless the process is killed."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise
