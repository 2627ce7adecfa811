"""valkey: records in a Valkey or Redis server or cluster, through the GLIDE client."""

from __future__ import annotations

import os
import socket
import ssl
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import glide_sync as glide

from lmcache_mm.secret import read_private

PASSWORD, PASSWORD_FILE, USERNAME = (f"LMCACHE_MM_VALKEY_{name}" for name in ("PASSWORD", "PASSWORD_FILE", "USERNAME"))
NAMES_AT_ONCE = 1000
REFUSED = ("wrongpass", "noauth", "noperm", "authentication")

_open: weakref.WeakSet[Any] = weakref.WeakSet()  # clients of this process


def _after_fork_in_child() -> None:
    for client in _open:
        client._is_closed = True  # else its own fork hook, which runs after this one, reconnects


os.register_at_fork(after_in_child=_after_fork_in_child)


def connecting(
    host: str, port: int, timeout_s: float, tls: bool, ca: str | None, cluster: bool
) -> Callable[[], ValkeyEngine]:
    """Returns a function that makes a connection, with the environment's current credentials. Raises PermissionError or
    OSError for an unreadable password file or CA file; the function raises ValueError if ?tls= and server disagree."""
    file = os.environ.get(PASSWORD_FILE)
    password = read_private(PASSWORD_FILE, Path(file)).decode() if file else os.environ.get(PASSWORD)
    credentials = glide.ServerCredentials(password, os.environ.get(USERNAME)) if password else None
    try:
        certificates = Path(ca).read_bytes() if ca else None
    except OSError as error:
        raise OSError(error.errno, f"store: ca: {error.strerror}", ca) from None
    milliseconds = max(1, int(timeout_s * 1000))
    names = "Cluster" if cluster else ""
    advanced: dict[str, Any] = {"connection_timeout": milliseconds}
    if tls:
        advanced["tls_config"] = glide.TlsAdvancedConfiguration(root_pem_cacerts=certificates)
    configuration = getattr(glide, f"Glide{names}ClientConfiguration")(
        [glide.NodeAddress(host, port)],
        use_tls=tls,
        credentials=credentials,
        request_timeout=milliseconds,
        advanced_config=getattr(glide, f"AdvancedGlide{names}ClientConfiguration")(**advanced),
    )
    glide.Logger.set_logger_config(glide.LogLevel.OFF)  # it writes to the console; its errors are also raised

    def connect() -> Any:
        _check_tls(host, port, timeout_s / 4, tls)
        try:
            client = getattr(glide, f"Glide{names}Client").create(configuration)
        except glide.GlideError as error:
            if any(word in str(error).lower() for word in REFUSED):
                raise PermissionError(
                    f"store: valkey://{host}:{port} refuses what {PASSWORD_FILE} or {PASSWORD}, and {USERNAME} say"
                ) from None
            raise
        _open.add(client)
        return client

    return lambda: ValkeyEngine(connect, cluster)


def _check_tls(host: str, port: int, timeout_s: float, tls: bool) -> None:
    """OSError if nothing listens there. ValueError if only one of server and URL is for TLS:
    the client would try again until its time is up, and then say only that."""
    place = f"valkey://{host}:{port}"
    if _speaks(host, port, timeout_s, tls) or not _speaks(host, port, timeout_s, not tls):
        return
    if tls:
        raise ValueError(f"store: {place} does not speak TLS: leave out ?tls=1, or turn it on at the server")
    raise ValueError(f"store: {place} speaks TLS: add ?tls=1, and ca=FILE for certificates of a CA of your own")


def _speaks(host: str, port: int, timeout_s: float, tls: bool) -> bool:
    """Whether a server answers with TLS, whatever its certificate, or without."""
    with socket.create_connection((host, port), timeout_s) as sock:
        try:
            if not tls:
                sock.sendall(b"PING\r\n")
                return sock.recv(1) in (b"+", b"-")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(sock):
                return True
        except OSError:
            return False


class ValkeyEngine:
    """See `Engine`."""

    expires = True

    def __init__(self, connect: Callable[[], Any], cluster: bool) -> None:
        self._connect, self._cluster = connect, cluster
        self._client = connect()

    def _ask(self, command: str, *arguments: Any, **named: Any) -> Any:
        """Returns what the client's method returns. A client that times out is closed: it would keep buffering what
        arrives, without limit if the server announced a huge answer."""
        client = self._client = self._client or self._connect()
        try:
            return getattr(client, command)(*arguments, **named)
        except glide.TimeoutError:
            self.close()
            raise

    def _batch(self) -> Any:
        return glide.ClusterBatch(is_atomic=False) if self._cluster else glide.Batch(is_atomic=False)

    def exists(self, names: Sequence[str], peek: bool) -> list[bool]:
        batch = self._batch()
        for name in names:
            batch.exists([name]) if peek else batch.touch([name])  # only `touch` counts for eviction
        return [count == 1 for count in self._ask("exec", batch, raise_on_error=True)]

    def read(self, name: str, into: memoryview) -> int | None:
        # The client buffers a whole answer before it checks the length: do not ask for what does not fit.
        size = self._ask("strlen", name)
        if size > len(into):
            return int(size)
        got = self._ask("get", name, buffer=into) if size else None
        return None if got is None else int(got)

    def heads(self, names: Sequence[str], size: int) -> list[bytes | None]:
        batch = self._batch()
        for name in names:
            batch.getrange(name, 0, size - 1)
        heads = self._ask("exec", batch, raise_on_error=True)
        if any(len(head) > size for head in heads):
            raise ConnectionError(f"got more than the {size} bytes that were asked for")
        return [head or None for head in heads]

    def write(self, name: str, record: memoryview, ttl_s: float, replace: bool) -> bool:
        condition = None if replace else glide.ConditionalChange.ONLY_IF_DOES_NOT_EXIST
        expiry = glide.ExpirySet(glide.ExpiryType.MILLSEC, int(ttl_s * 1000)) if ttl_s else None
        try:
            self._ask("set", name, record, condition, expiry)
        except glide.RequestError as error:
            if str(error).startswith("OOM") or "OutOfMemory" in str(error):
                return False
            raise
        return True

    def delete(self, names: Sequence[str]) -> None:
        self._ask("unlink", list(names))

    def names(self, prefix: str) -> Iterator[list[str]]:
        # Our names contain no special characters of patterns.
        if self._cluster:
            cluster_cursor = glide.ClusterScanCursor()
            while not cluster_cursor.is_finished():
                cluster_cursor, found = self._ask("scan", cluster_cursor, match=f"{prefix}*", count=NAMES_AT_ONCE)
                yield [name.decode() for name in found]
            return
        cursor: Any = b"0"
        while True:
            cursor, found = self._ask("scan", cursor, match=f"{prefix}*", count=NAMES_AT_ONCE)
            yield [name.decode() for name in found]
            if int(cursor) == 0:
                return

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
