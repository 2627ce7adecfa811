"""peer: another host's shm: store, read over the network; its server is `lmcache-mm serve`."""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from lmcache_mm.lane import Call
from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores.arguments import (
    check_forgotten,
    check_keys,
    check_process,
    checked_owner,
    checked_records,
    is_lack,
    writable,
)
from lmcache_mm.stores.breaker import PAUSE_S, Breaker
from lmcache_mm.stores.peers.channel import (
    AGES,
    DONE,
    GET,
    LOOK,
    MOST_KEYS,
    RECORD,
    Channel,
    ProtocolError,
    Tls,
    check_loopback,
    connect,
    pack_keys,
)

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer

LEAST_SHARE_BYTES = 8 << 20  # the least that is worth another connection

RECORD_HEAD = struct.Struct(f"<IQ{MAC_BYTES}s")  # place in the request, length, MAC

logger = logging.getLogger("lmcache_mm")


class PeerStore:
    """See `Store`: a read-only view of another host's store.

    A call takes `timeout_s` at most; what has not arrived by then is a miss. A peer that failed, was too slow or sent
    wrong data counts as empty for 10 s; then one call probes it. Puts are ignored and counted as dropped, deletions are
    ignored, and `forget` raises RuntimeError: the other host must forget by itself. `hold` does nothing. `stats` counts
    this process's calls; capacity and records belong to the other host and are 0.
    """

    local = False
    read_only = True
    scheme = "peer"

    def __init__(self, host: str, port: int, seal: Seal, tls: Tls | None, connections: int, timeout_s: float) -> None:
        """`connections`: how many carry one call's payloads at once. Raises ValueError for another host if there are no
        certificates."""
        if tls is None and host != "localhost":
            try:
                check_loopback(host, None)
            except ValueError as error:
                raise ValueError(f"store: {error}") from None
        self._host, self._port, self._seal, self._tls = host, port, seal, tls
        self._connections, self._timeout_s = connections, timeout_s
        self._pid = os.getpid()
        self._closed = False
        names = ("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions", "errors")
        self._counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._breaker = Breaker()
        self._pool = ThreadPoolExecutor(connections, f"lmcache_mm {self.scheme}")

    # --- Records

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        return [age >= 0 for age in self._look(keys, peek)]

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        return [age if age >= 0 else math.inf for age in self._look(keys, True)]

    def _look(self, keys: Sequence[bytes], peek: bool) -> list[float]:
        """How long each record has been stored; -1 for missing ones."""
        self._check()
        check_keys(keys)
        ages = [-1.0] * len(keys)

        def look(channel: Channel) -> None:
            for begin in range(0, len(keys), MOST_KEYS):
                asked = keys[begin : begin + MOST_KEYS]
                channel.send(LOOK, pack_keys(asked, peek=peek))
                _, body = channel.expect(AGES)
                if len(body) != 8 * len(asked):
                    raise ProtocolError(f"got {len(body)} bytes about {len(asked)} keys")
                answer = struct.unpack(f"<{len(asked)}d", body)
                if not all(0 <= age < math.inf or age == -1 for age in answer):
                    raise ProtocolError("got an invalid age")
                ages[begin : begin + MOST_KEYS] = answer

        if keys:
            self._exchange([look])
        return ages

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        self._check()
        check_keys(keys)
        checked_owner(owner)
        arrays = writable(buffers, len(keys))
        found = [False] * len(keys)

        def read(places: Sequence[int]) -> Callable[[Channel], None]:
            def work(channel: Channel) -> None:
                for begin in range(0, len(places), MOST_KEYS):
                    self._get(channel, places[begin : begin + MOST_KEYS], keys, arrays, peek, found)

            return work

        sizes = [array.nbytes for array in arrays]
        if len(sizes) != len(keys):
            raise ValueError(f"buffers: expected {len(keys)}, as many as keys, got {len(sizes)}")
        if keys:
            self._exchange([read(places) for places in _shares(sizes, self._connections)])
        self._count("hits", found.count(True))
        self._count("misses", found.count(False))
        return found

    def _get(
        self,
        channel: Channel,
        places: Sequence[int],
        keys: Sequence[bytes],
        arrays: Sequence[np.ndarray],
        peek: bool,
        found: list[bool],
    ) -> None:
        """Makes one request: fills arrays at `places`, and marks them in `found`."""
        channel.send(GET, pack_keys([keys[i] for i in places], [arrays[i].nbytes for i in places], peek))
        last = -1
        while True:
            kind, body = channel.expect(RECORD, DONE)
            if kind == DONE:
                return
            if len(body) != RECORD_HEAD.size:
                raise ProtocolError("got a record without length and MAC")
            place, payload_bytes, mac = RECORD_HEAD.unpack(body)
            if not last < place < len(places) or payload_bytes != arrays[places[place]].nbytes:
                raise ProtocolError("got a record that was not asked for, or one of another length")
            last = place
            i = places[place]
            channel.receive_into(memoryview(arrays[i]))
            if not self._seal.verify(keys[i], arrays[i].data, mac):
                self._count("corrupt")
                raise ProtocolError("got a payload that does not match its MAC")
            found[i] = True

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        self._check()
        check_keys(keys)
        return lambda: None

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> None:
        self._check()
        checked_records(keys, buffers, owner, checksums)
        self._count("dropped_puts", len(keys))

    def moment(self) -> int:
        return 0

    def delete(self, keys: Sequence[bytes]) -> None:
        self._check()
        check_keys(keys)

    def forget(self, owner: bytes) -> int:
        self._check()
        check_forgotten(owner)
        raise RuntimeError(f"forget: {self._name} is read only: call it on its own host's store")

    def flush(self) -> None:
        self._check()

    def stats(self) -> Mapping[str, int]:
        self._check()
        with self._lock:
            return {**self._counts, "capacity_bytes": 0, "used_bytes": 0, "records": 0}

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
        self._pool.shutdown()
        self._drop_idle()

    # --- Connections

    @property
    def _name(self) -> str:
        return f"{self.scheme}://{self._host}:{self._port}"

    def _check(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise RuntimeError("store: it is closed")

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def _exchange(self, works: Sequence[Callable[[Channel], None]]) -> None:
        """Runs each work on its own connection. Returns when all have ended, by their deadline: after that nothing
        touches the caller's buffers."""
        if not self._breaker.admit():
            return
        said: list[Exception | bool] = []
        good = False
        call = Call()
        try:
            deadline = time.monotonic() + self._timeout_s
            jobs = []
            for work in works:
                with suppress(RuntimeError, MemoryError):  # no thread can be started: these records are misses
                    jobs.append(self._pool.submit(call.run, self._do, work, deadline))
            wait(jobs, max(0.0, deadline - time.monotonic()))
            call.end()
            said = [one for job in jobs if (one := not job.cancel() and job.result())]
            errors = [one for one in said if one is not True]
            if errors:
                logger.warning("%s failed and is left alone for %g s: %s", self._name, PAUSE_S, errors[0])
                self._count("errors")
                self._drop_idle()
            good = bool(said) and not errors
        finally:
            call.end()
            if said or self._breaker.open:  # a probe must always report, or there would be no other probe
                self._breaker.tell(good)

    def _do(self, work: Callable[[Channel], None], deadline: float) -> Exception | bool:
        """True if the work was done, or the peer's error. False if neither: then the fault may be this host's, as when
        the work waited here for half of its time or more."""
        late = deadline - time.monotonic() < self._timeout_s / 2
        try:
            channel = self._take_idle(deadline)
            if channel is None or not self._done_again(channel, work):
                self._over(self._connect(deadline), work)
        except TimeoutError as error:
            return False if late else error
        except OSError as error:
            return not is_lack(error) and error
        except Exception as error:  # the engine must not see exceptions
            if is_lack(error):
                return False
            logger.warning("%s: unexpected", self._name, exc_info=True)
            return error
        return True

    def _over(self, channel: Channel, work: Callable[[Channel], None]) -> None:
        """Runs the work on a connection, which is afterwards idle, or closed if it failed."""
        try:
            work(channel)
        except BaseException:
            channel.close()
            raise
        with self._lock:
            self._idle.append(channel)

    def _done_again(self, channel: Channel, work: Callable[[Channel], None]) -> bool:
        """As `_over`, on a connection that was idle; False: the other side had closed it before this request."""
        before = channel.received
        try:
            self._over(channel, work)
        except TimeoutError:
            raise
        except OSError:
            if channel.received > before:
                raise
            return False
        return True

    def _take_idle(self, deadline: float) -> Channel | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                channel = self._idle.pop()
            if not channel.ended:
                channel.deadline = deadline
                return channel
            channel.close()

    def _connect(self, deadline: float) -> Channel:
        """Connects to the first of the host's addresses that answers; each gets its share of the time."""
        addresses = self._resolve(deadline)
        for address in addresses:
            try:
                check_loopback(address, self._tls)
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        failed: OSError = ProtocolError(f"{self._host} has no address")
        for i, address in enumerate(addresses):
            now = time.monotonic()
            until = now + (deadline - now) / (len(addresses) - i)
            try:
                channel = connect((address, self._port), self._host, self._tls, self._seal, until)
            except OSError as error:
                failed = error
            else:
                channel.deadline = deadline
                return channel
        raise failed

    def _resolve(self, deadline: float) -> list[str]:
        """Resolves the host on a separate thread, since that has no timeout: calls and exit do not wait for it."""
        found: Future[list[str]] = Future()

        def resolve() -> None:
            try:
                infos = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                found.set_result([str(info[4][0]) for info in infos])
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=resolve, name=f"lmcache_mm {self.scheme} names", daemon=True).start()
        try:
            return found.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(f"{self._host} was not resolved in time") from None

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()


def _shares(sizes: Sequence[int], connections: int) -> list[range]:
    """Splits the records into runs of about equal bytes, one per connection, but none much smaller than 8 MiB."""
    total = sum(sizes)
    count = max(1, min(connections, len(sizes), total // LEAST_SHARE_BYTES))
    shares: list[range] = []
    begin = done = 0
    for i, size in enumerate(sizes):
        done += size
        if done * count >= total * (len(shares) + 1) and len(shares) < count - 1:
            shares.append(range(begin, i + 1))
            begin = i + 1
    if begin < len(sizes):
        shares.append(range(begin, len(sizes)))
    return shares
