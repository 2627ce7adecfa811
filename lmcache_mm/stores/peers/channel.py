"""A connection between hosts that share records: TLS, a handshake that proves the deployment's secret, and frames.

After the TLS handshake, if TLS is used, the client says hello (magic, version, 32 random bytes); the server says hello
and proves that it knows the secret; then the client proves it. The connection's key depends on both hellos and both
certificates, so a proof is useless in another connection. Each direction has its own key.

A frame is a header (kind, length of the body), a tag of 32 bytes, and the body, little-endian throughout. The tag is
keyed_hash(the direction's key, u64 number of frames before ‖ header ‖ body), so a changed, replayed, dropped or
reordered frame, or one from another connection, does not match. Payloads follow frames and have MACs of their own.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import select
import socket
import ssl
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from lmcache_mm.secret import Seal

VERSION = 1
MOST_BODY_BYTES = 128 << 10
MOST_KEYS = 1024  # per request: they fit into a body
SEND_BYTES = 1 << 20  # handed to the socket at once

_HELLO = struct.Struct("<8sH32s")
_MAGIC = b"lmcmm\0p\n"
_TLS_HANDSHAKE = b"\x16\x03"  # how a TLS connection begins
_NOT_TLS = "WRONG_VERSION_NUMBER"  # OpenSSL's name for an other side that speaks no TLS
_HEADER = struct.Struct("<BI")
_NUMBER = struct.Struct("<Q")
_TAG_BYTES = 32

# Kinds of frames.
LOOK, AGES, GET, RECORD, DONE, AGENT, LEASE, LEASED, RETURN = range(1, 10)


class ProtocolError(ConnectionError):
    """The other side violates the protocol, or does not know the secret."""


class Tls:
    """TLS 1.3 with ca.pem, cert.pem and key.pem from a directory made by `lmcache-mm certificates`.

    Both sides accept only certificates of this CA. Raises ValueError if a file is missing or is not a certificate,
    PermissionError if others can read the key."""

    def __init__(self, directory: Path) -> None:
        names = ca, cert, key = [directory / name for name in ("ca.pem", "cert.pem", "key.pem")]
        for path in names:
            if not path.is_file():
                raise ValueError(f"tls: there is no {path}: `lmcache-mm certificates` makes a directory per host")
        if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(f"tls: {key} must be readable only by its owner (chmod 600)")
        try:
            self.certificate = ssl.PEM_cert_to_DER_cert(cert.read_text())
            self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            for context in (self.client, self.server):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.verify_mode = ssl.CERT_REQUIRED
                context.verify_flags |= ssl.VERIFY_X509_STRICT
                context.load_verify_locations(ca)
                context.load_cert_chain(cert, key)
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"tls: {directory}: invalid certificates: {error}") from error
        self.server.num_tickets = 0  # sessions are not resumed, and an idle connection has nothing to read


class Channel:
    """One end of a connection. Calls finish by `deadline` (of time.monotonic()) or raise TimeoutError; violations of
    the protocol raise ProtocolError. Both are OSErrors, after which the connection is unusable."""

    def __init__(self, sock: socket.socket, key: bytes, sends: bytes, receives: bytes, deadline: float) -> None:
        self.deadline = deadline
        self._sock = sock
        self._send_key = blake3(sends + b" frames", key=key).digest()
        self._receive_key = blake3(receives + b" frames", key=key).digest()
        self._sent = 0
        self.received = 0  # frames

    def send(self, kind: int, body: bytes, payload: memoryview | None = None) -> None:
        """Sends a frame, followed by a payload."""
        header = _HEADER.pack(kind, len(body))
        tag = blake3(_NUMBER.pack(self._sent) + header + body, key=self._send_key).digest()
        self._sent += 1
        _send(self._sock, memoryview(header + tag + body), self.deadline)
        if payload is not None:
            _send(self._sock, payload, self.deadline)

    def receive(self) -> tuple[int, bytes]:
        """Receives a frame: its kind and body."""
        head = _receive(self._sock, _HEADER.size + _TAG_BYTES, self.deadline)
        header, tag = head[: _HEADER.size], head[_HEADER.size :]
        kind, body_bytes = _HEADER.unpack(header)
        if body_bytes > MOST_BODY_BYTES:
            raise ProtocolError(f"got a frame of {body_bytes} bytes, expected at most {MOST_BODY_BYTES}")
        body = _receive(self._sock, body_bytes, self.deadline)
        expected = blake3(_NUMBER.pack(self.received) + header + body, key=self._receive_key).digest()
        if not hmac.compare_digest(tag, expected):
            raise ProtocolError("got a frame that is not the next one of this connection")
        self.received += 1
        return kind, body

    def expect(self, *kinds: int) -> tuple[int, bytes]:
        """Receives a frame, which must be one of these kinds."""
        kind, body = self.receive()
        if kind not in kinds:
            raise ProtocolError(f"got a frame of kind {kind}, expected {' or '.join(map(str, kinds))}")
        return kind, body

    def receive_into(self, view: memoryview) -> None:
        """Receives a payload of the view's length."""
        _receive_into(self._sock, view, self.deadline)

    @property
    def own_address(self) -> str:
        return str(self._sock.getsockname()[0])

    @property
    def ended(self) -> bool:
        """Whether the other side has closed this idle connection, or has sent something unasked."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # a child of a fork has it open too
        self._sock.close()


def connect(address: tuple[str, int], host: str, tls: Tls | None, seal: Seal, deadline: float) -> Channel:
    """Connects to a server. `address`: what `host`, the name in its certificate, resolves to.

    Raises OSError if it cannot connect by the deadline, ProtocolError for a server that does not know the secret."""
    sock = socket.create_connection(address, _left(deadline))
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        certificates = b""
        if tls:
            sock.settimeout(_left(deadline))
            sock = _client_side(tls, sock, host)
            certificates = _digests(tls.certificate, sock.getpeercert(binary_form=True))
        hello = _HELLO.pack(_MAGIC, VERSION, os.urandom(32))
        _send(sock, memoryview(hello), deadline)
        try:
            theirs = _receive_hello(sock, deadline)
        except ConnectionResetError:
            if tls:
                raise
            raise ProtocolError("the server hung up: if it expects TLS, the URL needs ?tls=DIR") from None
        key = seal.connection_key(hello + theirs + certificates)
        if not hmac.compare_digest(_receive(sock, 32, deadline), _proof(key, b"server")):
            raise ProtocolError("the server does not prove the deployment's secret")
        _send(sock, memoryview(_proof(key, b"client")), deadline)
    except BaseException:
        sock.close()
        raise
    return Channel(sock, key, b"client", b"server", deadline)


def accept(sock: socket.socket, tls: Tls | None, seal: Seal, deadline: float) -> Channel:
    """The server's side of `connect`. Closes the socket if it raises."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        certificates = b""
        if tls:
            sock.settimeout(_left(deadline))
            sock = _server_side(tls, sock)
            certificates = _digests(sock.getpeercert(binary_form=True), tls.certificate)
        hello = _HELLO.pack(_MAGIC, VERSION, os.urandom(32))
        try:
            theirs = _receive_hello(sock, deadline)
        except ProtocolError:
            _send(sock, memoryview(hello), deadline)  # so that the other side can tell its user
            raise
        key = seal.connection_key(theirs + hello + certificates)
        _send(sock, memoryview(hello + _proof(key, b"server")), deadline)
        if not hmac.compare_digest(_receive(sock, 32, deadline), _proof(key, b"client")):
            raise ProtocolError("the client does not prove the deployment's secret")
    except BaseException:
        sock.close()
        raise
    return Channel(sock, key, b"server", b"client", deadline)


def pack_keys(keys: Sequence[bytes], sizes: Sequence[int] | None = None, peek: bool = False) -> bytes:
    """The body of a request: whether it is a peek, then each key, and in reads its payload's length."""
    parts = [bytes([peek])]
    for i, key in enumerate(keys):
        parts += [bytes([len(key)]), key]
        if sizes is not None:
            parts.append(_NUMBER.pack(sizes[i]))
    return b"".join(parts)


def unpack_keys(body: bytes, sized: bool) -> tuple[list[bytes], list[int], bool]:
    """What `pack_keys` packed; ProtocolError for anything else."""
    keys: list[bytes] = []
    sizes: list[int] = []
    at = 1
    while at < len(body):
        key = body[at + 1 : at + 1 + body[at]]
        at += 1 + body[at]
        if not 32 <= len(key) <= 64 or at + 8 * sized > len(body):
            raise ProtocolError("got a request with an invalid key")
        keys.append(key)
        if sized:
            sizes.append(_NUMBER.unpack_from(body, at)[0])
            at += 8
    if at != len(body) or len(keys) > MOST_KEYS or body[0] > 1:
        raise ProtocolError(f"got an invalid request, or one of more than {MOST_KEYS} keys")
    return keys, sizes, bool(body[0])


def host_and_port(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPV6]:PORT; ValueError for anything else."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535 or "/" in host:
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)


def check_loopback(address: str, tls: Tls | None) -> None:
    """ValueError if there are no certificates and `address` is not a loopback address."""
    try:
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        loopback = False
    if tls is None and not loopback:
        raise ValueError(
            f"{address} is not a loopback address: both sides need certificates, see `lmcache-mm certificates --help`"
        )


def _client_side(tls: Tls, sock: socket.socket, host: str) -> ssl.SSLSocket:
    with _tls_expected("the server does not speak TLS: start `serve` with --tls, or leave out ?tls="):
        return tls.client.wrap_socket(sock, server_hostname=host)


def _server_side(tls: Tls, sock: socket.socket) -> ssl.SSLSocket:
    with _tls_expected("the client does not speak TLS: its URL needs ?tls=DIR"):
        return tls.server.wrap_socket(sock, server_side=True)


@contextmanager
def _tls_expected(otherwise: str) -> Iterator[None]:
    """ProtocolError with the text `otherwise` if the other side answers a handshake with something else than TLS."""
    try:
        yield
    except ssl.SSLError as error:
        if error.reason != _NOT_TLS:
            raise
        raise ProtocolError(otherwise) from None


def _digests(client: bytes | None, server: bytes | None) -> bytes:
    if client is None or server is None:
        raise ProtocolError("the other side sent no certificate")
    return blake3(client).digest() + blake3(server).digest()


def _proof(key: bytes, side: bytes) -> bytes:
    return blake3(side + b" proof", key=key).digest()


def _receive_hello(sock: socket.socket, deadline: float) -> bytes:
    hello = _receive(sock, _HELLO.size, deadline)
    magic, version, _ = _HELLO.unpack(hello)
    if magic.startswith(_TLS_HANDSHAKE):
        raise ProtocolError("the client speaks TLS, and this server was started without --tls")
    if magic != _MAGIC:
        raise ProtocolError("the other side does not speak this protocol")
    if version != VERSION:
        raise ProtocolError(f"the other side speaks version {version} of this protocol, this side {VERSION}")
    return hello


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the connection was too slow")
    return left


def _send(sock: socket.socket, view: memoryview, deadline: float) -> None:
    for begin in range(0, len(view), SEND_BYTES):
        sock.settimeout(_left(deadline))
        sock.sendall(view[begin : begin + SEND_BYTES])


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    buffer = bytearray(size)
    _receive_into(sock, memoryview(buffer), deadline)
    return bytes(buffer)


def _receive_into(sock: socket.socket, view: memoryview, deadline: float) -> None:
    while len(view):
        sock.settimeout(_left(deadline))
        got = sock.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the other side closed the connection")
        view = view[got:]
