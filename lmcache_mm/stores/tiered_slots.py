"""tiered: for a first tier whose slots are used in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmcache_mm import _C
from lmcache_mm.stores.local.slab import Slot
from lmcache_mm.stores.tiered import Promotion, TieredStore
from lmcache_mm.stores.write_behind import Waiting

if TYPE_CHECKING:
    from lmcache_mm.stores.store import SlotStore, Store


class TieredSlotStore(TieredStore):
    """A TieredStore whose first tier is a `SlotStore`. `lend` reads records of slower tiers into slots of the first."""

    def __init__(self, tiers: Sequence[Store], observe: Callable[[int, str, float, int], None] | None = None) -> None:
        super().__init__(tiers, observe)
        self._first: SlotStore = tiers[0]  # type: ignore[assignment]
        self._reserved: dict[tuple[int, int], tuple[int, ...]] = {}  # the tiers' moments, by start and generation

    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes = b"", peek: bool = False
    ) -> list[Slot | None]:
        self._check()
        slots = self._first.lend(keys, sizes, owner, peek)
        missing = [i for i, slot in enumerate(slots) if slot is None]
        if missing:
            wanted, wanted_sizes = [keys[i] for i in missing], [sizes[i] for i in missing]
            try:
                with self._promoting(wanted) as promotion:
                    self._promote(promotion, wanted, wanted_sizes, owner, peek)
                promoted = self._first.lend(wanted, wanted_sizes, owner, peek)
            except BaseException:
                self._first.release([slot for slot in slots if slot])
                raise
            for i, slot in zip(missing, promoted, strict=True):
                slots[i] = slot
        self._count("misses", slots.count(None))
        self._count("hits", len(slots) - slots.count(None))
        return slots

    def _promote(
        self, promotion: Promotion, keys: Sequence[bytes], sizes: Sequence[int], owner: bytes, peek: bool
    ) -> None:
        moment = self._first.moment()  # before reading anything
        for tier in range(1, len(self._tiers)):
            there = self._contains(keys, [tier], peek)
            wanted = self._ages(tier, keys, [i for i, is_there in enumerate(there) if is_there])
            if not wanted:
                continue
            age_s = max(wanted.values())
            reserved = self._first.reserve([keys[i] for i in wanted], [sizes[i] for i in wanted], owner, moment, age_s)
            slots = [slot for slot in reserved if slot]
            views = [self.view(slot) for slot in slots]
            slot_keys = [slot.key for slot in slots]
            found = self._ask(tier, [False] * len(slots), "get_into", slot_keys, views, owner, peek)
            good = [slot for slot, is_there in zip(slots, found, strict=True) if is_there]
            sums = {slot.key: _C.checksum(self.view(slot).ctypes.data, slot.payload_bytes) for slot in good}
            with promotion.lock:
                good = [slot for slot in good if slot.key not in promotion.deleted]
                self._first.publish(good, [sums[slot.key] for slot in good])
            self._first.abandon([slot for slot in slots if slot not in good])
            self._count("promoted", len(good))

    def release(self, slots: Sequence[Slot]) -> None:
        self._first.release(slots)

    def discard(self, slot: Slot) -> None:
        self._first.discard(slot)

    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes = b"",
        as_of: int | None = None,
        age_s: float = 0.0,
    ) -> list[Slot | None]:
        self._check()
        moments = self._moments_of(as_of)
        slots = self._first.reserve(keys, sizes, owner, moments[0], age_s)
        self._reserved.update({(slot.start, slot.generation): moments for slot in slots if slot})
        return slots

    def publish(self, slots: Sequence[Slot], checksums: Sequence[int]) -> None:
        never = (0,) * len(self._tiers)
        moments = [self._reserved.pop((slot.start, slot.generation), never) for slot in slots]
        self._first.publish(slots, checksums)
        if self._written:
            self._behind.add(
                Waiting(slot.key, slot.payload_bytes, slot.owner, None, as_of)
                for slot, as_of in zip(slots, moments, strict=True)
            )

    def abandon(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._reserved.pop((slot.start, slot.generation), None)
        self._first.abandon(slots)

    def register(self, device: int) -> None:
        self._first.register(device)

    def view(self, slot: Slot) -> np.ndarray:
        view: np.ndarray = self._first.view(slot)
        return view
