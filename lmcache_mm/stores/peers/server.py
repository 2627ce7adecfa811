"""Lends this host's shm: store to other hosts: the server of peer: and nixl: stores."""

from __future__ import annotations

import functools
import logging
import math
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from lmcache_mm import _C
from lmcache_mm.secret import Seal
from lmcache_mm.stores.local.shm import ShmStore
from lmcache_mm.stores.local.slab import Slot
from lmcache_mm.stores.peers.channel import (
    AGENT,
    AGES,
    DONE,
    GET,
    LEASE,
    LEASED,
    LOOK,
    RECORD,
    RETURN,
    Channel,
    ProtocolError,
    Tls,
    accept,
    check_loopback,
    unpack_keys,
)
from lmcache_mm.stores.peers.nixl import LEASED_SLOT
from lmcache_mm.stores.peers.nixl_agent import SlabAgent
from lmcache_mm.stores.peers.peer import RECORD_HEAD

HANDSHAKE_S = 5.0
# The most at once. One more replaces the oldest: real clients take milliseconds, while a stranger may stay silent.
HANDSHAKES = 64
IDLE_S = 300.0  # a connection idle for so long is closed, before a firewall drops it
MOST_CONNECTIONS = 4096
LEASE_S = 30.0  # how long slots stay pinned while they are sent
LENT_AT_ONCE = 16  # slots
MACS_KEPT = 1 << 14

logger = logging.getLogger("lmcache_mm")


class Server:
    """Serves `store` at an address until `close`, with one thread per connection. The caller keeps and closes `store`.

    `address`: the address to bind, port 0 for any free one. `connections`: the most at once from clients that have
    proved the secret; one more replaces the one idle longest, or waits if all are busy. `agent`: serves nixl: stores
    too. `answered`: called with the seconds and bytes of each answered request for payloads. Raises ValueError for an
    address beyond loopback without certificates and for more connections than the process can have, OSError if the
    address cannot be bound."""

    def __init__(
        self,
        store: ShmStore,
        address: tuple[str, int],
        seal: Seal,
        tls: Tls | None,
        connections: int = 64,
        agent: SlabAgent | None = None,
        answered: Callable[[float, int], None] | None = None,
    ) -> None:
        _check_connections(connections)
        self._store, self._seal, self._tls, self._most, self._agent = store, seal, tls, connections, agent
        self._answered = answered
        family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        check_loopback(str(where[0]), tls)
        self._mac = functools.lru_cache(MACS_KEPT)(self._make_mac)
        self._changed = threading.Condition()  # guards the fields below
        self._open: dict[socket.socket, threading.Thread] = {}
        self._handshakes: dict[socket.socket, None] = {}  # the oldest first
        self._readers: set[socket.socket] = set()
        self._idle: dict[socket.socket, None] = {}  # readers, the one idle longest first
        self._closing = False
        self._listener = socket.socket(family, kind, protocol)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(where)
            self._listener.listen(HANDSHAKES)
        except BaseException:
            self._listener.close()
            raise
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._acceptor = threading.Thread(target=self._accept, name="lmcache_mm accept", daemon=True)
        self._acceptor.start()

    def connections(self) -> int:
        """The number of clients now that have proved the secret."""
        with self._changed:
            return len(self._readers)

    def accepts(self) -> bool:
        """Whether new connections are accepted."""
        return self._acceptor.is_alive() and not self._closing

    def close(self) -> None:
        """Ends all connections and unpins their slots."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            threads = list(self._open.values())
            for sock in self._open:
                self._end(sock)
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, where = self._listener.accept()
            except (OSError, MemoryError) as error:
                if not self._closing:
                    logger.warning("a connection could not be accepted: %s", error)
                    time.sleep(0.1)  # out of descriptors, say
                continue
            with self._changed:
                try:
                    if len(self._handshakes) >= HANDSHAKES:
                        self._end(next(iter(self._handshakes)))
                    thread = threading.Thread(target=self._serve, args=(sock, where), daemon=True)
                    self._open[sock], self._handshakes[sock] = thread, None
                    thread.start()
                except (RuntimeError, MemoryError) as error:  # out of threads
                    logger.warning("refused %s: %s", where[0], error)
                    self._end(sock)
                    self._open.pop(sock, None)
                    sock.close()

    def _end(self, sock: socket.socket) -> None:
        """Ends a connection and frees its place; its thread will notice."""
        self._handshakes.pop(sock, None)
        self._readers.discard(sock)
        self._idle.pop(sock, None)
        self._changed.notify_all()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _admit(self, sock: socket.socket) -> None:
        """Makes a connection that has proved the secret one of the readers; ProtocolError if all of them stay busy."""
        with self._changed:
            self._handshakes.pop(sock, None)
            self._changed.wait_for(lambda: self._closing or self._idle or len(self._readers) < self._most, HANDSHAKE_S)
            if len(self._readers) >= self._most:
                if not self._idle:
                    raise ProtocolError(f"all {self._most} connections are busy")
                self._end(next(iter(self._idle)))
            self._readers.add(sock)

    def _serve(self, sock: socket.socket, where: tuple[str, int]) -> None:
        """Serves one connection to its end; nothing that its client does affects others."""
        name = f"{where[0]}:{where[1]}"
        try:
            # A second handle: TLS takes over the first, and `close` must be able to end the connection at any time.
            channel = accept(sock.dup(), self._tls, self._seal, time.monotonic() + HANDSHAKE_S)
            try:
                self._admit(sock)
                logger.info("%s is connected", name)
                channel.deadline = time.monotonic() + HANDSHAKE_S
                while True:
                    kind, body = channel.receive()
                    with self._changed:
                        self._idle.pop(sock, None)
                    channel.deadline = time.monotonic() + LEASE_S
                    begun = time.perf_counter()
                    sent = self._answers(kind)(channel, body)
                    if sent and self._answered:
                        self._answered(time.perf_counter() - begun, sent)
                    channel.deadline = time.monotonic() + IDLE_S
                    with self._changed:
                        self._idle[sock] = None
                        self._changed.notify_all()
            finally:
                channel.close()
        except ProtocolError as error:
            logger.warning("%s is disconnected: %s", name, error)
        except OSError as error:
            logger.info("%s is gone: %s", name, error)
        except Exception:
            logger.exception("%s is disconnected", name)
        finally:
            with self._changed:
                self._end(sock)
                del self._open[sock]
            sock.close()

    def _answers(self, kind: int) -> Callable[[Channel, bytes], int]:
        """The method that answers this kind of request and returns the bytes of its payloads."""
        if kind == LOOK:
            return self._look
        if kind == GET:
            return self._get
        if kind == AGENT and self._agent:
            return self._describe_agent
        if kind == LEASE and self._agent:
            return self._lease
        raise ProtocolError(f"got a request of kind {kind}")

    def _look(self, channel: Channel, body: bytes) -> int:
        keys, _, peek = unpack_keys(body, sized=False)
        there = self._store.contains(keys, peek)
        ages = self._store.ages(keys)
        told = zip(there, ages, strict=True)
        answer = [max(0.0, age) if is_there and age < math.inf else -1.0 for is_there, age in told]
        channel.send(AGES, struct.pack(f"<{len(answer)}d", *answer))
        return 0

    def _get(self, channel: Channel, body: bytes) -> int:
        keys, sizes, peek = unpack_keys(body, sized=True)
        sent = 0
        for begin in range(0, len(keys), LENT_AT_ONCE):
            end = begin + LENT_AT_ONCE
            channel.deadline = time.monotonic() + LEASE_S
            lent = self._store.lend(keys[begin:end], sizes[begin:end], peek=peek)
            try:
                for place, slot in enumerate(lent, begin):
                    if slot and (mac := self._verified(slot)):
                        payload = self._store.view(slot).data
                        channel.send(RECORD, RECORD_HEAD.pack(place, slot.payload_bytes, mac), payload)
                        sent += slot.payload_bytes
            finally:
                self._store.release([slot for slot in lent if slot])
        channel.send(DONE, b"")
        return sent

    def _describe_agent(self, channel: Channel, body: bytes) -> int:
        assert self._agent is not None
        channel.send(AGENT, self._agent.describe())
        return 0

    def _lease(self, channel: Channel, body: bytes) -> int:
        """Lends slots to read through NIXL until the client returns them, which it must do within LEASE_S."""
        assert self._agent is not None
        keys, sizes, peek = unpack_keys(body, sized=True)
        channel.deadline = time.monotonic() + LEASE_S
        lent = self._store.lend(keys, sizes, peek=peek)
        try:
            with self._agent.busy():
                slots, sent = [], 0
                for place, slot in enumerate(lent):
                    if slot and (mac := self._verified(slot)):
                        slots.append(LEASED_SLOT.pack(place, self._store.offset(slot), mac))
                        sent += slot.payload_bytes
                channel.send(LEASED, b"".join(slots))
                channel.expect(RETURN)
                return sent
        finally:
            self._store.release([slot for slot in lent if slot])

    def _verified(self, slot: Slot) -> bytes | None:
        """A lent slot's MAC; None if the slot is damaged, even if that happened after the MAC was made. Then the record
        is removed."""
        view = self._store.view(slot)
        if _C.checksum(view.ctypes.data, view.nbytes) != slot.checksum:
            self._store.discard(slot)
            return None
        return self._mac(slot)

    def _make_mac(self, slot: Slot) -> bytes:
        return self._seal.mac(slot.key, self._store.view(slot).data)


def _check_connections(connections: int) -> None:
    """ValueError for more connections than the process can have; each takes a thread and two descriptors."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = MOST_CONNECTIONS
    if descriptors != resource.RLIM_INFINITY:
        most = min(most, (descriptors - 64) // 2 - HANDSHAKES)
    if not 1 <= connections <= most:
        raise ValueError(
            f"connections: expected 1 to {most}, got {connections}; each takes two descriptors, see `ulimit -n`"
        )
