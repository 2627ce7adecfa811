"""nixl: another host's shm: store, its slab read one-sided through NIXL; its server is `serve --nixl`."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from lmcache_mm.nixl_agent import check_package, described_agent, interface_of, new_agent
from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores.channel import (
    AGENT,
    LEASE,
    LEASED,
    RETURN,
    Channel,
    ProtocolError,
    Tls,
    pack_keys,
)
from lmcache_mm.stores.peer import PeerStore

STAGING_BYTES = 64 << 20  # at least; two halves, one of which is read into while the other is looked at
LEASED_SLOT = struct.Struct(f"<IQ{MAC_BYTES}s")  # place in the request, offset in the slab, MAC


class NixlStore(PeerStore):
    """See `PeerStore`; payloads come through NIXL, not encrypted, and the server holds their slots meanwhile.

    They are read into memory of this store's own and copied from there: a transfer that takes too long cannot be called
    back, and must not write to a caller's buffer. The store then does without the peer until that transfer has ended.
    """

    scheme = "nixl"

    def __init__(self, host: str, port: int, seal: Seal, tls: Tls | None, timeout_s: float) -> None:
        check_package()
        super().__init__(host, port, seal, tls, 1, timeout_s)
        # All below is touched by the pool's one thread, and by `close` when that has ended.
        self._agent: Any = None
        self._remote: tuple[str, int, int] | None = None  # the agent's name, where its slab lies, the slab's bytes
        self._of: Channel | None = None  # that `_remote` was told over
        self._staging = np.empty(0, np.uint8)
        self._registered: Any = None
        self._under_way: Any = None  # a transfer that took too long

    def close(self) -> None:
        super().close()
        if os.getpid() == self._pid:
            if self._registered is not None and self._under_way is None:
                self._agent.deregister_memory(self._registered)
            self._agent = self._registered = self._of = None

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
        channel.send(LEASE, pack_keys([keys[i] for i in places], [arrays[i].nbytes for i in places], peek))
        leased = list(self._leased(channel.expect(LEASED)[1], [arrays[i].nbytes for i in places]))
        self._read(channel, [(places[place], offset, mac) for place, offset, mac in leased], keys, arrays, found)
        channel.send(RETURN, b"")

    def _meet(self, channel: Channel) -> None:
        """Makes this side's agent, and adds the one that the connection's server has."""
        if self._under_way is not None:
            if self._is_under_way(self._under_way):
                raise TimeoutError("a transfer that took too long is still under way")
            self._let_go()
        if self._agent is None:
            self._agent = new_agent(interface_of(channel.own_address))
        if self._of is channel:
            return
        channel.send(AGENT, b"")
        try:
            base, slab_bytes, metadata = described_agent(channel.expect(AGENT)[1])
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:  # NIXL's own classes
            raise ProtocolError(f"the other side's agent cannot be added: {error}") from None
        self._remote, self._of = (name.decode() if isinstance(name, bytes) else name, base, slab_bytes), channel

    def _is_under_way(self, transfer: Any) -> bool:
        try:
            return bool(self._agent.check_xfer_state(transfer) == "PROC")
        except Exception:  # NIXL's own classes: the other side is gone, say
            return False

    def _let_go(self) -> None:
        """Of a transfer that has ended, however."""
        transfer, self._under_way = self._under_way, None
        with suppress(Exception):
            self._agent.release_xfer_handle(transfer)

    def _leased(self, body: bytes, sizes: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """(place, offset in the slab, MAC) of what the server holds for us."""
        assert self._remote is not None
        slab_bytes = self._remote[2]
        if len(body) % LEASED_SLOT.size:
            raise ProtocolError("no list of slots")
        last = -1
        for place, offset, mac in LEASED_SLOT.iter_unpack(body):
            if not last < place < len(sizes) or offset + sizes[place] > slab_bytes:
                raise ProtocolError("a slot that was not asked for, or outside the slab")
            last = place
            yield place, offset, mac

    def _read(
        self,
        channel: Channel,
        slots: Sequence[tuple[int, int, bytes]],
        keys: Sequence[bytes],
        arrays: Sequence[np.ndarray],
        found: list[bool],
    ) -> None:
        """Reads batches into the halves of the staging memory in turn; looks at one while the next is under way."""
        if not slots:
            return
        self._make_room(max(arrays[i].nbytes for i, _, _ in slots))
        half = len(self._staging) // 2
        wrong: list[bool] = []

        def look(batch: Sequence[tuple[int, int, bytes, int]]) -> None:
            for i, _, mac, begin in batch:
                staged = self._staging[begin : begin + arrays[i].nbytes]
                if self._seal.verify(keys[i], staged.data, mac):
                    arrays[i][:] = staged
                    found[i] = True
                else:
                    wrong.append(True)

        looking: threading.Thread | None = None
        try:
            for number, batch in enumerate(_batches(slots, arrays, half)):
                placed = [(i, offset, mac, begin + number % 2 * half) for i, offset, mac, begin in batch]
                self._transfer(channel, [(begin, offset, arrays[i].nbytes) for i, offset, _, begin in placed])
                if looking:
                    looking.join()
                looking = threading.Thread(target=look, args=(placed,))
                looking.start()
        finally:
            if looking:
                looking.join()
            if wrong:
                self._count("corrupt", len(wrong))
        if wrong:
            raise ProtocolError("a payload that does not have its MAC")

    def _make_room(self, largest: int) -> None:
        if 2 * largest <= len(self._staging):
            return
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        size = -(-max(STAGING_BYTES, 2 * largest) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._staging = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        region = self._agent.get_reg_descs([(self._staging.ctypes.data, size, 0, "staging")], "DRAM")
        self._registered = self._agent.register_memory(region)

    def _transfer(self, channel: Channel, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Reads (place in the staging memory, offset in the slab, bytes) by the channel's deadline."""
        assert self._remote is not None
        name, base, _ = self._remote
        pieces = [piece for piece in pieces if piece[2]]
        if not pieces:
            return
        agent, here = self._agent, self._staging.ctypes.data
        try:
            to = agent.get_xfer_descs([(here + begin, size, 0) for begin, _, size in pieces], "DRAM")
            source = agent.get_xfer_descs([(base + offset, size, 0) for _, offset, size in pieces], "DRAM")
            transfer = agent.initialize_xfer("READ", to, source, name)
            self._under_way = transfer
            state = agent.transfer(transfer)
            while state == "PROC":
                if time.monotonic() > channel.deadline:
                    raise TimeoutError("a transfer takes too long")
                time.sleep(0)  # other threads may want to run
                state = agent.check_xfer_state(transfer)
            self._let_go()
        except OSError:
            raise
        except Exception as error:  # NIXL's own classes
            if self._under_way is not None:
                self._let_go()
            raise ConnectionError(f"NIXL: {error}") from None
        if state != "DONE":
            raise ConnectionError(f"NIXL: a transfer ended as {state}")


def _batches(
    slots: Sequence[tuple[int, int, bytes]], arrays: Sequence[np.ndarray], half: int
) -> Iterator[list[tuple[int, int, bytes, int]]]:
    """Slots that fit into half of the staging memory together, each with its place there."""
    batch: list[tuple[int, int, bytes, int]] = []
    end = 0
    for i, offset, mac in slots:
        if end + arrays[i].nbytes > half:
            yield batch
            batch, end = [], 0
        batch.append((i, offset, mac, end))
        end += arrays[i].nbytes
    yield batch
