"""nixl: another host's shm: store, read through NIXL with one-sided reads of its slab; its server is `serve --nixl`."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores.peers.channel import (
    AGENT,
    LEASE,
    LEASED,
    RETURN,
    Channel,
    ProtocolError,
    Tls,
    pack_keys,
)
from lmcache_mm.stores.peers.nixl_agent import Reader, check_package, described_agent, interface_of
from lmcache_mm.stores.peers.peer import PeerStore

LEASED_SLOT = struct.Struct(f"<IQ{MAC_BYTES}s")  # place in the request, offset in the slab, MAC


class NixlStore(PeerStore):
    """See `PeerStore`; payloads come through NIXL, unencrypted, and the server holds their slots meanwhile.

    A separate process reads them into shared memory, from which this process copies them. If it takes too long, it is
    abandoned with that memory and a new one starts; calls that cannot wait for the new one miss.
    """

    scheme = "nixl"

    def __init__(self, host: str, port: int, seal: Seal, tls: Tls | None, timeout_s: float) -> None:
        check_package()
        super().__init__(host, port, seal, tls, 1, timeout_s)
        # Only the pool's one thread uses the fields below, and `close` after that thread has ended.
        self._readers: list[Reader] = []  # the last is used; the others are finishing transfers that took too long
        self._interface = ""
        self._remote = (0, 0, b"")  # the slab's address in the lending process, its bytes, that agent's metadata
        self._of: Channel | None = None  # the connection that `_remote` came over

    def close(self) -> None:
        super().close()
        if os.getpid() == self._pid:
            for reader in self._readers:
                reader.close()

    def _get(
        self,
        channel: Channel,
        places: Sequence[int],
        keys: Sequence[bytes],
        arrays: Sequence[np.ndarray],
        peek: bool,
        found: list[bool],
    ) -> None:
        self._meet(channel)
        reader = self._reader()
        try:
            if not reader.wait_until_ready(channel.deadline):
                return
            channel.send(LEASE, pack_keys([keys[i] for i in places], [arrays[i].nbytes for i in places], peek))
            leased = list(self._leased(channel.expect(LEASED)[1], [arrays[i].nbytes for i in places]))
            slots = [(places[place], offset, mac) for place, offset, mac in leased]
            self._read(reader, channel.deadline, slots, keys, arrays, found)
            channel.send(RETURN, b"")
        finally:
            if reader.ended:
                with suppress(RuntimeError):  # the store is being closed
                    self._pool.submit(self._reader)

    def _reader(self) -> Reader:
        """The process that reads, possibly still starting; replaces one that no longer can."""
        for reader in list(self._readers):
            if not reader.leaving and (reader.ended or reader.interface != self._interface):
                reader.close()
                self._readers.remove(reader)
        if not self._readers or self._readers[-1].ended:
            self._readers.append(Reader(self._interface))
        return self._readers[-1]

    def _meet(self, channel: Channel) -> None:
        """Asks the connection's server what it lends, and finds the local interface to it."""
        if self._of is channel:
            return
        channel.send(AGENT, b"")
        try:
            self._remote = described_agent(channel.expect(AGENT)[1])
            self._interface = interface_of(channel.own_address)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        self._of = channel

    def _leased(self, body: bytes, sizes: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """(place in the request, offset in the slab, MAC) of each slot that the server holds for us."""
        slab_bytes = self._remote[1]
        if len(body) % LEASED_SLOT.size:
            raise ProtocolError("got an invalid list of slots")
        last = -1
        for place, offset, mac in LEASED_SLOT.iter_unpack(body):
            if not last < place < len(sizes) or offset + sizes[place] > slab_bytes:
                raise ProtocolError("got a slot that was not asked for, or one outside the slab")
            last = place
            yield place, offset, mac

    def _read(
        self,
        reader: Reader,
        deadline: float,
        slots: Sequence[tuple[int, int, bytes]],
        keys: Sequence[bytes],
        arrays: Sequence[np.ndarray],
        found: list[bool],
    ) -> None:
        """Reads batches into the two halves of the staging memory in turn; verifies one while the next is read."""
        if not slots:
            return
        base, _, metadata = self._remote
        reader.make_room(2 * max(arrays[i].nbytes for i, _, _ in slots))
        half = len(reader.staging) // 2
        wrong: list[bool] = []

        def look(batch: Sequence[tuple[int, int, bytes, int]]) -> None:
            for i, _, mac, begin in batch:
                # Another process may change the staging memory at any time: read it once, and verify the copy.
                arrays[i][:] = reader.staging[begin : begin + arrays[i].nbytes]
                if self._seal.verify(keys[i], arrays[i].data, mac):
                    found[i] = True
                else:
                    wrong.append(True)

        looking: threading.Thread | None = None
        try:
            for number, batch in enumerate(_batches(slots, arrays, half)):
                placed = [(i, offset, mac, begin + number % 2 * half) for i, offset, mac, begin in batch]
                pieces = [
                    (begin, base + offset, arrays[i].nbytes) for i, offset, _, begin in placed if arrays[i].nbytes
                ]
                if pieces:
                    reader.read(metadata, pieces, deadline)
                if looking:
                    looking.join()
                looking = threading.Thread(target=look, args=(placed,))
                try:
                    looking.start()
                except RuntimeError:  # out of threads
                    looking = None
                    look(placed)
        finally:
            if looking:
                looking.join()
            if wrong:
                self._count("corrupt", len(wrong))
        if wrong:
            raise ProtocolError("got a payload that does not match its MAC")


def _batches(
    slots: Sequence[tuple[int, int, bytes]], arrays: Sequence[np.ndarray], half: int
) -> Iterator[list[tuple[int, int, bytes, int]]]:
    """Groups of slots that fit into half of the staging memory, each with its place there."""
    batch: list[tuple[int, int, bytes, int]] = []
    end = 0
    for i, offset, mac in slots:
        if end + arrays[i].nbytes > half:
            yield batch
            batch, end = [], 0
        batch.append((i, offset, mac, end))
        end += arrays[i].nbytes
    yield batch
