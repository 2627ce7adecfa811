"""The deployment's secret, and how it authenticates records that leave this machine."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from lmcache_mm.extras import how_to_install

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer

NAME_CONTEXT = "lmcache_mm v1 name"
MAC_CONTEXT = "lmcache_mm v1 mac"
CONNECTION_CONTEXT = "lmcache_mm v1 connection"
NONCE_BYTES = TAG_BYTES = 16
MAC_BYTES = NONCE_BYTES + TAG_BYTES
LEAST_BYTES = 16
MOST_AT_ONCE = 1 << 30  # bytes that the cipher takes per call


def secret() -> bytes | None:
    """The content of the file LMCACHE_MM_SECRET_FILE (mode 0600), stripped of white space, or else the value of
    LMCACHE_MM_SECRET; None if neither is set.

    Raises ValueError for fewer than 16 bytes, PermissionError for a file that others can read, OSError if there is
    no such file."""
    value = os.environb.get(b"LMCACHE_MM_SECRET")
    if name := os.environ.get("LMCACHE_MM_SECRET_FILE"):
        value = read_private("LMCACHE_MM_SECRET_FILE", Path(name))
    if value is not None and len(value) < LEAST_BYTES:
        raise ValueError(f"LMCACHE_MM_SECRET: expected at least {LEAST_BYTES} bytes, got {len(value)}")
    return value


def read_private(variable: str, path: Path) -> bytes:
    """A file's content, stripped of white space. OSError, naming the variable that gave the path, if it cannot be read;
    PermissionError if others can read it."""
    try:
        others = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        content = b"" if others else path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"{variable}: {error.strerror}", str(path)) from None
    if others:
        raise PermissionError(f"{variable}: {path} must be readable only by its owner (chmod 600)")
    return content.strip()


class Seal:
    """Digests and MACs that only holders of the secret can make and check. Raises ValueError for a short secret,
    RuntimeError if the package cryptography, which `extra` installs, is missing."""

    def __init__(self, secret: bytes, extra: str = "peer") -> None:
        try:
            from cryptography.hazmat.primitives import ciphers  # noqa: PLC0415
        except ImportError as error:
            raise RuntimeError(f"store: {error}: {how_to_install(extra)}") from error
        self._ciphers = ciphers
        if len(secret) < LEAST_BYTES:
            raise ValueError(f"secret: expected at least {LEAST_BYTES} bytes, got {len(secret)}")
        self._name_key = blake3(secret, derive_key_context=NAME_CONTEXT).digest()
        self._mac_key = blake3(secret, derive_key_context=MAC_CONTEXT).digest()
        self._connection_key = blake3(secret, derive_key_context=CONNECTION_CONTEXT).digest()

    @classmethod
    def of_deployment(cls, what: str, extra: str = "peer") -> Seal:
        """A seal with the environment's secret. ValueError, naming `what`, which needs it, if there is none."""
        value = secret()
        if value is None:
            raise ValueError(
                f"{what}: needs the deployment's secret, also on loopback, since other users and hosts could read or "
                f"forge records without it: put at least {LEAST_BYTES} bytes into a file (umask 077; head -c 32 "
                "/dev/urandom | base64 > secret), and set LMCACHE_MM_SECRET_FILE to its path"
            )
        return cls(value, extra)

    def digest(self, text: bytes) -> bytes:
        """32 bytes that stand for a record key or an owner outside this machine, or authenticate a short text:
        keyed_hash(derive_key("lmcache_mm v1 name", secret), text)."""
        return blake3(text, key=self._name_key).digest()

    def mac(self, key: bytes, payload: Buffer) -> bytes:
        """32 bytes, different each time: a random 16-byte nonce, and the AES-256-GMAC (NIST SP 800-38D; the IV is zero)
        of the payload under a key that is used once,
        keyed_hash(derive_key("lmcache_mm v1 mac", secret), nonce ‖ u64 length ‖ key).

        A forged MAC passes with a probability of at most 2^-100 for payloads of up to 4 GiB."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._tag(nonce, key, payload)

    def verify(self, key: bytes, payload: Buffer, mac: bytes) -> bool:
        """Whether a holder of the secret made `mac` for this key and payload."""
        nonce, tag = mac[:NONCE_BYTES], mac[NONCE_BYTES:]
        return hmac.compare_digest(self._tag(nonce, key, payload), tag)

    def _tag(self, nonce: bytes, key: bytes, payload: Buffer) -> bytes:
        view = memoryview(payload).cast("B")
        once = blake3(nonce + len(view).to_bytes(8, "little") + key, key=self._mac_key).digest()
        cipher = self._ciphers.Cipher(self._ciphers.algorithms.AES256(once), self._ciphers.modes.GCM(bytes(12)))
        encryptor = cipher.encryptor()
        for begin in range(0, len(view), MOST_AT_ONCE):
            encryptor.authenticate_additional_data(view[begin : begin + MOST_AT_ONCE])
        encryptor.finalize()
        tag: bytes = encryptor.tag
        return tag

    def connection_key(self, transcript: bytes) -> bytes:
        """32 bytes for one connection, derived from what both sides said when it began:
        keyed_hash(derive_key("lmcache_mm v1 connection", secret), transcript)."""
        return blake3(transcript, key=self._connection_key).digest()
