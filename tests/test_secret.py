"""The deployment's secret and what is sealed with it."""

import pytest
from blake3 import blake3

from lmcache_mm.secret import Seal, secret

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
    with pytest.raises(PermissionError, match="expected mode 0600"):
        secret()


def test_a_short_secret_is_refused_and_none_is_named(environment):
    with pytest.raises(ValueError, match=r"valkey://host: needs the deployment's secret"):
        Seal.of_deployment("valkey://host")
    environment.setenv("LMCACHE_MM_SECRET", "short")
    with pytest.raises(ValueError, match="at least 16 bytes, got 5"):
        Seal.of_deployment("valkey://host")


@pytest.mark.parametrize("size", [0, 1, 1000, 2 << 20])
def test_names_and_macs_are_what_the_design_says(size):
    key, payload = bytes(range(36)), bytes(i % 251 for i in range(size))
    mac_key = blake3(SECRET, derive_key_context="lmcache_mm v1 mac").digest()
    name_key = blake3(SECRET, derive_key_context="lmcache_mm v1 name").digest()
    seal = Seal(SECRET)
    assert seal.mac(key, payload) == blake3(key + size.to_bytes(8, "little") + payload, key=mac_key).digest()
    assert seal.name(key) == blake3(key, key=name_key).digest()


def test_another_secret_key_length_or_payload_makes_another_mac():
    seal, other = Seal(SECRET), Seal(SECRET + b".")
    macs = [
        seal.mac(b"k" * 36, b"12"),
        seal.mac(b"j" * 36, b"12"),
        seal.mac(b"k" * 36, b"13"),
        seal.mac(b"k" * 36, b"1"),
    ]
    assert len({*macs, other.mac(b"k" * 36, b"12")}) == 5
