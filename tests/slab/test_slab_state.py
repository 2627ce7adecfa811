"""shm: and file: stores against a dict: any calls in any order, room and contents checked after each."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache_mm import ops
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.shm import ShmStore
from test_stores import key, payload

GRANULES = 12
CAPACITY = GRANULES << 14
IDS = st.integers(0, 7)
SIZES = st.integers(0, 5 << 14)
OWNERS = st.sampled_from([b"", b"a" * 16, b"b" * 16])


class SlabMachine(RuleBasedStateMachine):
    """`stored`: for each key, the payload and owner that a hit must give; the store may have evicted it."""

    kind = ShmStore

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.kind.open(self.folder / "store", CAPACITY)
        self.stored: dict[int, tuple[bytes, bytes]] = {}
        self.lent: list = []
        self.reserved: list = []
        self.version = 0
        self.forgotten: dict[int, object] = {}  # reserved slots whose publishing must be refused

    def there(self, i: int) -> bool:
        return self.store.contains([key(i)])[0]

    def new_payload(self, size: int) -> bytes:
        self.version += 1
        return payload(self.version, size)

    def check_hit(self, i: int, content: bytes) -> None:
        assert content == self.stored[i][0]

    @rule(i=IDS, size=SIZES, owner=OWNERS)
    def put(self, i: int, size: int, owner: bytes) -> None:
        content = self.new_payload(size)
        if not self.there(i):
            self.stored[i] = (content, owner)
        self.store.put([key(i)], [content], owner)

    @rule(i=IDS)
    def get(self, i: int) -> None:
        if i in self.stored:
            buffer = bytearray(len(self.stored[i][0]))
            if self.store.get_into([key(i)], [buffer])[0]:
                self.check_hit(i, bytes(buffer))
        else:
            assert not self.there(i)

    @rule(i=IDS)
    def delete(self, i: int) -> None:
        self.store.delete([key(i)])
        self.stored.pop(i, None)
        assert not self.there(i)

    @rule(owner=st.sampled_from([b"a" * 16, b"b" * 16]))
    def forget(self, owner: bytes) -> None:
        gone = [i for i, (_, theirs) in self.stored.items() if theirs == owner]
        there = sum(self.store.contains([key(i) for i in gone]))
        assert self.store.forget(owner) == there
        for i in gone:
            del self.stored[i]
        self.forgotten |= {id(slot): slot for _, slot, _, theirs in self.reserved if theirs == owner}

    @rule(i=IDS)
    def lend(self, i: int) -> None:
        if i in self.stored:
            (slot,) = self.store.lend([key(i)], [len(self.stored[i][0])])
            if slot:
                self.lent.append((slot, self.stored[i][0]))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot, _ = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        self.store.release([slot])

    @rule(i=IDS, size=SIZES, owner=OWNERS)
    def reserve(self, i: int, size: int, owner: bytes) -> None:
        there = self.there(i)
        (slot,) = self.store.reserve([key(i)], [size], owner)
        if slot:
            assert not there
            self.reserved.append((i, slot, self.new_payload(size), owner))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), publish=st.booleans())
    def publish_or_abandon(self, data: st.DataObject, publish: bool) -> None:
        i, slot, content, owner = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        if not publish:
            self.store.abandon([slot])
            return
        array = np.frombuffer(content, np.uint8)
        self.store._write([slot], [array], None)
        there = self.there(i)
        self.store.publish([slot], [ops.checksum(array.copy())])
        if id(slot) in self.forgotten:
            assert self.there(i) == there
            return
        if not there:
            self.stored[i] = (content, owner)
        assert self.there(i)

    @rule()
    def open_again(self) -> None:
        """The last close gives back everything that the process holds."""
        self.store.close()
        self.lent, self.reserved = [], []
        self.store = self.kind.open(self.folder / "store", None)

    @invariant()
    def what_is_lent_stays(self) -> None:
        if self.kind is ShmStore:
            for slot, content in self.lent:
                assert bytes(self.store.view(slot)) == content

    @invariant()
    def every_granule_is_in_one_record_or_pending_or_free(self) -> None:
        """Lists, hash tables and sums are complete too."""
        assert self.store._index.check(self.store._terms(1)) == ""

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


class FileMachine(SlabMachine):
    kind = FileStore


@pytest.mark.parametrize("machine", [SlabMachine, FileMachine], ids=["shm", "file"])
def test_a_slab_is_a_dict_that_forgets_now_and_then(machine):
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    case().runTest()
