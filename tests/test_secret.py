"""The deployment's secret and its seal."""

import sys

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lmcache_mm.secret import Seal, secret
from lmcache_mm.stores import open_store

SECRET = b"a secret of more than sixteen bytes"


@pytest.fixture
def environment(monkeypatch):
    for name in ("LMCACHE_MM_SECRET", "LMCACHE_MM_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_secret_comes_from_a_private_file_or_the_environment(environment, tmp_path):
    assert secret() is None
    environment.setenv("LMCACHE_MM_SECRET", SECRET.decode())
    assert secret() == SECRET
    file = tmp_path / "secret"
    file.write_bytes(b"another one, in a file\n")
    file.chmod(0o600)
    environment.setenv("LMCACHE_MM_SECRET_FILE", str(file))
    assert secret() == b"another one, in a file"
    file.chmod(0o640)
    with pytest.raises(PermissionError, match=r"secret must be readable only by its owner \(chmod 600\)"):
        secret()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"LMCACHE_MM_SECRET_FILE: No such file or directory: '.*/secret'"):
        secret()


def test_a_short_secret_is_refused_and_none_is_named(environment):
    with pytest.raises(ValueError, match=r"valkey://host: needs the deployment's secret"):
        Seal.of_deployment("valkey://host")
    environment.setenv("LMCACHE_MM_SECRET", "short")
    with pytest.raises(ValueError, match="at least 16 bytes, got 5"):
        Seal.of_deployment("valkey://host")


@pytest.mark.parametrize("size", [0, 1, 1000, 2 << 20])
@pytest.mark.parametrize("at_once", [1 << 30, 700])
def test_names_and_macs_are_what_the_design_says(size, at_once, monkeypatch):
    monkeypatch.setattr("lmcache_mm.secret.MOST_AT_ONCE", at_once)
    key, payload = bytes(range(36)), bytes(i % 251 for i in range(size))
    mac_key = blake3(SECRET, derive_key_context="lmcache_mm v1 mac").digest()
    name_key = blake3(SECRET, derive_key_context="lmcache_mm v1 name").digest()
    seal = Seal(SECRET)
    mac = seal.mac(key, payload)
    once = blake3(mac[:16] + size.to_bytes(8, "little") + key, key=mac_key).digest()
    assert mac[16:] == AESGCM(once).encrypt(bytes(12), b"", payload)
    assert seal.verify(key, payload, mac)
    assert seal.digest(key) == blake3(key, key=name_key).digest()


def test_a_mac_is_of_one_secret_key_length_and_payload_and_never_twice_the_same():
    seal, key, payload = Seal(SECRET), b"k" * 36, bytes(1000)
    mac = seal.mac(key, payload)
    assert seal.verify(key, payload, mac)
    assert not Seal(SECRET + b".").verify(key, payload, mac)
    assert not seal.verify(b"j" * 36, payload, mac)
    assert not seal.verify(key + b"k", payload, mac)
    for other in (payload[1:], payload + b"\0", payload[:999] + b"\1", b"\1" + payload[1:], b""):
        assert not seal.verify(key, other, mac)
    for i in range(32):
        assert not seal.verify(key, payload, mac[:i] + bytes([mac[i] ^ 1]) + mac[i + 1 :])
    for i in range(0, 36):
        assert not seal.verify(key, payload, mac[:i] + mac[i + 1 :] if i < 32 else mac + bytes(i - 31))
    assert len({seal.mac(key, payload)[:16] for _ in range(10)}) == 10


def test_without_its_package_a_seal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    monkeypatch.setenv("LMCACHE_MM_SECRET", SECRET.decode())
    for url, extra in (
        *(("valkey://host:1", "valkey"), ("s3://bucket", "s3"), ("mooncake://host:1", "mooncake")),
        *(("peer://127.0.0.1:1", "peer"), ("nixl://127.0.0.1:1?trusted_network=1", "nixl")),
    ):
        with pytest.raises(RuntimeError, match=rf"pip install -e '\.\[{extra}\]' in the clone"):
            open_store(url)
