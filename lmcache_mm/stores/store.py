"""What a store is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lmcache_mm.stores.arguments import Buffer
    from lmcache_mm.stores.local.slab import Slot


class Store(Protocol):
    """What every store does. Keys are bytes of 32 to 64, else ValueError. Methods may be called from any thread.

    A store never returns a wrong payload: what does not have the key's length and checksum is a miss, and counted.
    A put that cannot be done (full, down, slow) is dropped and counted, never an exception.
    """

    @property
    def local(self) -> bool:
        """Whether `contains` and `hold` look at memory of this host only, and so never wait."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether it ignores puts and deletions, and counts puts as dropped."""
        ...

    def contains(self, keys: Sequence[bytes], peek: bool = False) -> list[bool]:
        """Which records could be read now. `peek`: this does not count as being asked for, which eviction looks at."""
        ...

    def get_into(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer], owner: bytes = b"", peek: bool = False
    ) -> list[bool]:
        """Fills each writable buffer with its key's payload. False: not there, or another length than the buffer's, or
        damaged; the buffer then holds garbage. `owner`: as of `put`, for a store that copies what it finds into a
        faster one."""
        ...

    def hold(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """Keeps the records that are there from being evicted, not from being deleted, until the function that it
        returns is called, once. Without transfers; where others decide what is evicted it does nothing."""
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
        """Stores payloads, copied before it returns. A key that is there keeps its record. `owner`: 16 bytes that name
        a tenant, or empty. `checksums`: the payloads' (see `ops.checksum`) where the caller has them.

        `as_of`: what `moment` said when they were computed, or before they were read in another store; whose owner has
        been forgotten since are dropped. `age_s`: for how long they have been stored in another store.

        TypeError or ValueError, before anything is stored, for arguments that are wrong."""
        ...

    def moment(self) -> int:
        """A number for `as_of`: it grows whenever an owner is forgotten."""
        ...

    def ages(self, keys: Sequence[bytes]) -> list[float]:
        """For how many seconds the records have been stored; math.inf for what is not there, or where the store cannot
        say, as when it is down: such a record is not copied into another store, where it would count as new."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None: ...

    def forget(self, owner: bytes) -> int:
        """Removes all records of an owner; returns their number."""
        ...

    def flush(self) -> None:
        """Returns when every put accepted before is visible to all readers."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened, and `capacity_bytes`, `used_bytes`, `records` as they are now."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class SlotStore(Store, Protocol):
    """A store whose slots can be read and written in place; see `ShmStore`."""

    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes = b"", peek: bool = False
    ) -> list[Slot | None]: ...
    def release(self, slots: Sequence[Slot]) -> None: ...
    def discard(self, slot: Slot) -> None: ...
    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes = b"",
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> list[Slot | None]: ...
    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None: ...
    def abandon(self, slots: Sequence[Slot]) -> None: ...
    def view(self, slot: Slot) -> Any: ...
    def register(self, device: int) -> None: ...
