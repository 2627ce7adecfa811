"""The interface of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer
    from lmcache_mm.stores.local.slab import Slot


class Store(Protocol):
    """What every store does. Keys are 32 to 64 bytes, else ValueError. Methods may be called from any thread.

    A store never returns a wrong payload: one with another length or checksum is a miss, and counted.
    A put that fails (the store is full, down or slow) is dropped and counted; it raises nothing.
    """

    @property
    def local(self) -> bool:
        """Whether `contains` and `hold` access only this host's memory, and so never wait."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether the store ignores puts and deletions, and counts puts as dropped."""
        ...

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        """Which records could be read now. `peek`: do not count this as a use, which would delay eviction."""
        ...

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        """Fills each writable buffer with its key's payload. False: the record is missing, damaged, or of another
        length than the buffer, which then holds garbage. `owner`: as in `put`, for a store that copies hits into a
        faster one."""
        ...

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """Protects existing records from eviction, but not from deletion, until the caller calls the returned function,
        once. Transfers nothing. Does nothing where a server decides what to evict."""
        ...

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        owner: bytes = b"",
        checksums: Sequence[int] | None = None,
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> None:
        """Stores copies of payloads, made before it returns. An existing key keeps its record. `owner`: 16 bytes that
        name a tenant, or empty. `checksums`: the payloads' (see `ops.checksum`) if the caller has them.

        `as_of`: the value of `moment` when the payloads were computed, or before they were read from another store; if
        the owner has been forgotten since, they are dropped. `age_s`: how long another store has held them.

        TypeError or ValueError for wrong arguments, before anything is stored."""
        ...

    def moment(self) -> int:
        """A number for `as_of`: it grows whenever an owner is forgotten."""
        ...

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        """How many seconds each record has been stored; math.inf if it is missing or the store cannot tell, as when it
        is down: such a record is not copied into another store, where it would count as new."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None:
        """Removes the records of these keys, if they exist."""
        ...

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner; returns their number."""
        ...

    def flush(self) -> None:
        """Returns when every put accepted before is visible to all readers."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counters since the store was opened, and the current `capacity_bytes`, `used_bytes` and `records`."""
        ...

    def close(self) -> None:
        """Gives back memory, threads and connections. No other method may be called after that."""
        ...


@runtime_checkable
class SlotStore(Store, Protocol):
    """A store whose slots can be read and written in place; see `ShmStore`."""

    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes = b"", peek: bool = False
    ) -> list[Slot | None]:
        """Pins the records of `keys` that have these sizes until `release`; None for the others. They are not verified:
        compare the checksum, and call `discard` if it differs."""
        ...

    def release(self, slots: Sequence[Slot]) -> None:
        """Gives lent slots back. Nothing may read them after that."""
        ...

    def discard(self, slot: Slot) -> None:
        """Removes the record of a lent slot whose checksum is wrong. The slot stays lent."""
        ...

    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes = b"",
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> list[Slot | None]:
        """Slots to write payloads to; None for keys that exist, and where there is no room. Pass each slot to `publish`
        or `abandon`. `owner`, `as_of`, `age_s`: as in `put`."""
        ...

    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None:
        """Makes reserved slots visible to all readers, once they are filled with payloads of these checksums."""
        ...

    def abandon(self, slots: Sequence[Slot]) -> None:
        """Gives reserved slots back. Nothing may write to them after that."""
        ...

    def view(self, slot: Slot) -> Any:
        """A slot's bytes in place, uint8; valid only while the slot is lent or reserved."""
        ...

    def register(self, device: int) -> None:
        """Pins the slots' memory for transfers to and from a GPU until the store is closed."""
        ...
