"""mooncake: records in the memory that hosts lend to a Mooncake Store."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from mooncake.store import MooncakeDistributedStore

LOCAL_BYTES = 64 << 20  # for the client's own buffers
MOST_SAID_BYTES = 1 << 30  # per answer of the master's HTTP server: the names of some ten million records
# From mooncake-store/include/types.h: no handle; invalid parameters (the buffer is too small); and three for a miss:
# being written, not found, and read past its lease, when the memory may already belong to another record.
NO_SPACE, BUFFER_TOO_SMALL, NOT_THERE = -200, -600, (-703, -704, -707)

_left: list[MooncakeDistributedStore] = []


def connecting(
    master: tuple[str, int],
    admin: tuple[str, int],
    capacity: int,
    timeout_s: float,
    hostname: str = "127.0.0.1",
    protocol: str = "tcp",
    device: str = "",
    metadata: str = "P2PHANDSHAKE",
) -> Callable[[], MooncakeEngine]:
    """Returns a function that makes a connection, one for all lanes. admin: the master's HTTP server. capacity: bytes
    that this process lends. hostname: the name by which other hosts reach it."""
    engines: list[MooncakeEngine] = []
    lock = threading.Lock()
    # The client holds the GIL during setup and close, so nothing else runs: let it try once, within these limits, which
    # apply to the whole process.
    os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
    for name in ("MC_RPC_TIMEOUT_MS", "MC_RPC_CONNECT_TIMEOUT_MS"):
        os.environ.setdefault(name, str(int(timeout_s * 1000)))

    def connect() -> MooncakeEngine:
        with lock:
            if not engines:
                _ask(admin, "/health", timeout_s)  # so that setup does not block on a dead master
                store = MooncakeDistributedStore()
                address = f"{master[0]}:{master[1]}"
                code = store.setup(hostname, metadata, capacity, LOCAL_BYTES, protocol, device, address)
                if code:
                    raise ConnectionError(f"setup: error {code}")
                engines.append(MooncakeEngine(store, admin, timeout_s))
            return engines[0]

    return connect


def _ask(admin: tuple[str, int], path: str, timeout_s: float) -> str:
    """Returns the master's answer."""
    connection = http.client.HTTPConnection(*admin, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise ConnectionError(f"{path}: status {answer.status}")
        said = answer.read(MOST_SAID_BYTES + 1)
        if len(said) > MOST_SAID_BYTES:
            raise ConnectionError(f"{path}: got more than {MOST_SAID_BYTES} bytes")
        return said.decode()
    finally:
        connection.close()


def _checked(what: str, code: int) -> int:
    if code < 0:
        raise ConnectionError(f"{what}: error {code}")
    return code


class MooncakeEngine:
    """See `Engine`."""

    expires = False

    def __init__(self, store: MooncakeDistributedStore, admin: tuple[str, int], timeout_s: float) -> None:
        self._store, self._admin, self._timeout_s = store, admin, timeout_s
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._registered: dict[int, np.ndarray] = {}  # kept while the client may use it

    def _address(self, memory: memoryview) -> int:
        """The memory's address, registered for the client's transfers."""
        array = np.frombuffer(memory, np.uint8)
        address = array.ctypes.data
        with self._lock:
            known = self._registered.get(address)
            if known is None or known.nbytes < array.nbytes:
                if known is not None:
                    self._store.unregister_buffer(address)
                _checked("register", -abs(self._store.register_buffer(address, array.nbytes)))
                self._registered[address] = array
        return address

    def _head_memory(self, size: int) -> np.ndarray:
        """This thread's own buffer, since the client may still write to it after a timeout."""
        known: np.ndarray | None = getattr(self._of_thread, "memory", None)
        if known is None or len(known) < size:
            known = self._of_thread.memory = np.empty(size, np.uint8)
        return known

    def exists(self, names: Sequence[str], peek: bool) -> list[bool]:
        return [_checked("exists", code) == 1 for code in self._store.batch_is_exist(list(names))]

    def read(self, name: str, into: memoryview) -> int | None:
        size = self._store.get_into(name, self._address(into), len(into))
        if size in NOT_THERE:
            return None
        return len(into) + 1 if size == BUFFER_TOO_SMALL else _checked("get", size)

    def heads(self, names: Sequence[str], size: int) -> list[bytes | None]:
        heads: list[bytes | None] = []
        memory = self._head_memory(size)
        for name in names:
            ((code,),) = self._store.get_into_ranges(
                [self._address(memory.data)], [[name]], [[[0]]], [[[0]]], [[[size]]]
            )[0]
            heads.append(None if code in NOT_THERE else memory[: _checked("get", code)].tobytes())
        return heads

    def write(self, name: str, record: memoryview, ttl_s: float, replace: bool) -> bool:
        if replace:
            self._store.remove(name, True)
        code = self._store.put_from(name, self._address(record), len(record))
        return code != NO_SPACE and _checked("put", code) == 0

    def delete(self, names: Sequence[str]) -> None:
        for code in self._store.batch_remove(list(names), True):
            if code not in NOT_THERE:
                _checked("remove", code)

    def names(self, prefix: str) -> Iterator[list[str]]:
        """The client cannot list names; the master's HTTP server can."""
        names = _ask(self._admin, "/get_all_keys", self._timeout_s).split()
        yield [name for name in names if name.startswith(prefix)]

    def close(self) -> None:
        try:
            _ask(self._admin, "/health", self._timeout_s)
        except (OSError, http.client.HTTPException):
            _left.append(self._store)  # kept until the process ends: closing it would wait for the master
        else:
            self._store.close()
