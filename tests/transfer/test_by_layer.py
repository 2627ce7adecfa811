"""Jobs layer by layer."""

import gc
import threading
from functools import partial

import pytest
import torch

import lmcache_mm as lmc
from jobs import PAGE_TOKENS, PAGES, PATIENCE_S, Gate, are_equal, chunks_of, layers, layout_of
from lmcache_mm.copies import HostCopies
from lmcache_mm.lane import Abandoned
from lmcache_mm.stores import open_store
from lmcache_mm.transfer import Transfer
from test_stores import new_store


def test_a_load_by_layers_fills_them_in_order_and_is_verified(make, row):
    kv = layers(row=row)
    chunks = chunks_of([3, 1, 7], [0, 11])
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    want = kv.clone()
    for pages in ([3, 1, 7], [0, 11]):
        kv[:, pages] = 0
    job = transfer.load(chunks, b"", by_layer=True)
    for i in range(len(kv)):
        assert job.layer_ready(f"layer{i}", 10)
        assert torch.equal(kv[i], want[i])
    assert job.result() == 2
    with pytest.raises(ValueError, match="layer: expected one of layer0, layer1, layer2, got 'other'"):
        job.layer_ready("other", 1)


def test_a_layer_is_ready_before_the_next_one_is_begun(make, at_each_copy):
    """Otherwise nothing would overlap."""
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    want = kv.clone()
    kv.zero_()
    scattered, go_on = [], threading.Event()
    at_each_copy(lambda: scattered and go_on.wait(30), lambda: scattered.append(1))
    job = transfer.load(chunks, b"", by_layer=True)
    assert job.layer_ready("layer0", 10)
    assert len(scattered) == 1
    assert torch.equal(kv[0, [3, 1, 7]], want[0, [3, 1, 7]])
    assert not kv[1:].any()
    go_on.set()
    assert job.result() == 1
    assert len(scattered) == 3


@pytest.mark.parametrize("layer", range(3))
def test_a_load_by_layers_of_a_damaged_record_loads_nothing(tmp_path, layer, row):
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    kv = layers(row=row)
    transfer = Transfer(layout_of(kv), store, 1 << 16)
    chunks = chunks_of([3, 1, 7])
    transfer.store(chunks, b"").result()
    layer_bytes = 3 * PAGE_TOKENS * row
    (slot,) = store.lend([chunks[0].key], [3 * layer_bytes])
    store.view(slot)[layer * layer_bytes + 7] ^= 1
    store.release([slot])
    assert transfer.load(chunks, b"", by_layer=True).result() == 0
    assert store.contains([chunks[0].key]) == [False]
    transfer.close()
    store.close()
    remove()


def test_no_layer_is_ready_before_all_chunks_are_there(monkeypatch):
    """Where memory suffices for one chunk at a time."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    gate = Gate(open_store("mem://?capacity=1MiB"))
    kv = layers()
    transfer = Transfer(layout_of(kv), gate, 1)
    chunks = chunks_of([3], [4])
    transfer.store(chunks, b"").result()
    kv.zero_()
    calls = []

    def second_hangs(*arguments, **more):
        calls.append(1)
        assert len(calls) == 1 or gate.open.wait(30)
        return gate.store.get_into(*arguments, **more)

    gate.get_into = second_hangs
    job = transfer.load(chunks, b"", by_layer=True)
    assert not job.layer_ready("layer0", PATIENCE_S)
    assert len(calls) == 2
    gate.open.set()
    transfer.close()


def test_a_load_by_layers_takes_all_chunks_or_none(make):
    kv = layers()
    _, transfer = make(kv)
    there, missing = chunks_of([3], [4])
    transfer.store([there], b"").result()
    kv.zero_()
    job = transfer.load([there, missing], b"", by_layer=True)
    assert job.result() == 0
    assert not kv.any()
    assert job.layer_ready("layer2", 1)  # it ended


def test_a_store_by_layers_reads_each_when_it_is_said_to_be_written(make, store, row):
    kv = layers(row=row)
    want = layers(row=row, seed=1)
    chunks = chunks_of([3, 1, 7], [0, 11])
    _, transfer = make(kv)
    job = transfer.store(chunks, b"", by_layer=True)
    for i, layer in enumerate(kv):
        layer.copy_(want[i])
        assert job.layer_written(f"layer{i}", 10)
        if hasattr(store, "lend") or i == 2:  # otherwise all are read with the last
            layer.zero_()
    assert job.pages_free(10)
    kv.zero_()
    assert job.result(10) == 20
    assert transfer.load(chunks, b"").result() == 2
    for chunk in chunks:
        for i, layer in enumerate(kv):
            assert torch.equal(layer[chunk.pages], want[i][chunk.pages])


def test_who_waits_for_a_store_by_layers_has_written_them_all(make, row):
    kv = layers(row=row)
    want = kv.clone()
    chunks = chunks_of([3, 1, 7])
    _, transfer = make(kv)
    job = transfer.store(chunks, b"", by_layer=True)
    assert job.layer_written("layer0", 10)
    assert job.result(10) == 12
    kv.zero_()
    assert transfer.load(chunks, b"").result() == 1
    assert torch.equal(kv[:, [3, 1, 7]], want[:, [3, 1, 7]])
    with pytest.raises(ValueError, match="layer: expected one of layer0, layer1, layer2, got 'other'"):
        job.layer_written("other", 1)


def test_a_store_by_layers_that_is_given_up_in_between_leaves_nothing_behind(make, store):
    kv = layers()
    _, transfer = make(kv)
    job = transfer.store(chunks_of([3, 1, 7]), b"", by_layer=True)
    assert job.layer_written("layer0", 10)
    assert job.abandon()
    assert not job.layer_written("layer1", 10)
    with pytest.raises(Abandoned):
        job.result(10)
    assert store.stats()["records"] == 0
    assert store.stats().get("pending", 0) == 0


def test_closing_gives_up_a_store_by_layers_that_nobody_finishes(make, store):
    _, transfer = make(layers())
    assert transfer.store(chunks_of([3, 1, 7]), b"", by_layer=True).layer_written("layer0", 10)
    gc.collect()  # nobody references the job any more
    assert transfer.close(10)
    assert store.stats()["records"] == 0
    assert store.stats().get("pending", 0) == 0


class Late(HostCopies):
    """Copies that finish some time after they begin, in order, as on a GPU."""

    def __init__(self, layout, fails_at=None):
        super().__init__(layout)
        self.queue, self.ordered, self.made = [], [], []
        self.fails_at = fails_at
        self.changed = threading.Condition()

    def store(self, parts, ends, *more):
        return LateCopies(self, super().store(parts, ends, *more), ends)

    def load(self, parts, ends, *more):
        return LateCopies(self, super().load(parts, ends, *more), ends)

    def run(self, number):
        with self.changed:
            for i in range(number + 1):
                copy, self.queue[i] = self.queue[i], lambda: None
                copy()


class LateCopies:
    def __init__(self, late, copies, ends):
        self.late, self.copies, self.ends = late, copies, ends
        self.numbers = {}  # in the queue, of the planes so far

    def go_on(self, planes, behind=None):
        for end in self.ends:
            if end > planes or end in self.numbers:
                continue
            with self.late.changed:
                number = self.numbers[end] = len(self.late.queue)
                if number == self.late.fails_at:
                    raise ZeroDivisionError
                self.late.queue.append(partial(self.copy, end, number))
                self.late.changed.notify_all()

    def copy(self, end, number):
        self.copies.go_on(end)
        self.late.made.append(number)

    def order(self, stream, planes):
        with self.late.changed:
            assert self.late.changed.wait_for(lambda: max(self.numbers, default=0) >= planes, 10)
            number = self.numbers[planes]
            self.late.ordered.append(number)
        self.late.run(number)

    def wait(self):
        if self.numbers:
            self.late.run(min(max(self.numbers.values()), len(self.late.queue) - 1))
        return self.copies.wait()


def test_layers_are_waited_for_by_the_stream_where_copies_run_late(make, store, row):
    kv = layers(row=row)
    chunks = chunks_of([3, 1, 7], [0, 11])
    _, transfer = make(kv)
    storing = transfer._payloads._storing = Late(transfer.layout)
    want = layers(row=row, seed=1)
    job = transfer.store(chunks, b"", by_layer=True)
    for i, layer in enumerate(kv):
        layer.copy_(want[i])
        assert job.layer_written(f"layer{i}", 10)
    assert storing.ordered == [2]  # with the last layer, whose reads come last
    kv.zero_()
    assert job.result(10) == 20
    loading = transfer._payloads._loading = Late(transfer.layout)
    job = transfer.load(chunks, b"", by_layer=True)
    for i in range(3):
        assert job.layer_ready(f"layer{i}", 10)
        assert i in loading.ordered
        for chunk in chunks:
            assert torch.equal(kv[i][chunk.pages], want[i][chunk.pages])
    assert job.result(10) == 2


def test_stores_by_layers_of_one_forward_pass_are_written_in_turn(make, row):
    """A store that is not by layers waits for none of them."""
    kv = layers(row=row)
    want = layers(row=row, seed=1)
    first, second, third = chunks_of([3, 1, 7], [0, 11], [5])
    _, transfer = make(kv)
    jobs = [transfer.store([chunk], b"", by_layer=True) for chunk in (first, second)]
    assert transfer.store([third], b"").result(10) == 4
    assert transfer.stores_stalled_s() == 0
    for i, layer in enumerate(kv):
        layer.copy_(want[i])
        for job in jobs[:: 1 if i % 2 else -1]:
            assert job.layer_written(f"layer{i}", PATIENCE_S * 50)
    assert [job.result(10) for job in jobs] == [12, 8]
    kv.zero_()
    assert transfer.load([first, second], b"").result() == 2
    assert are_equal(kv, want, (first, second))


def test_room_is_given_back_behind_the_copies_into_it(tmp_path):
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    transfer = Transfer(layout_of(layers()), store, 1 << 16)
    late = transfer._payloads._storing = Late(transfer.layout)
    job = transfer.store(chunks_of([3, 1, 7]), b"", by_layer=True)
    assert job.layer_written("layer0", 10)
    made_before = []
    abandon = store.abandon
    store.abandon = lambda slots: made_before.append(list(late.made)) or abandon(slots)
    assert not late.made
    assert job.abandon()
    with pytest.raises(Abandoned):
        job.result(10)
    assert made_before == [[0]]
    transfer.close()
    store.close()
    remove()


def test_a_load_by_layers_that_fails_in_between_leaves_its_pages_first(make, row):
    kv = layers(row=row)
    chunks = chunks_of([3, 1, 7])
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    kv.zero_()
    late = transfer._payloads._loading = Late(transfer.layout, fails_at=2)
    job = transfer.load(chunks, b"", by_layer=True)
    with pytest.raises(ZeroDivisionError):
        job.result(10)
    assert job.pages_free(1)
    before = kv.clone()
    late.run(1)
    assert torch.equal(kv, before)


def test_layers_that_share_pages_or_bytes_are_ready_with_them():
    pages = torch.zeros(PAGES, 2, PAGE_TOKENS, 5)
    joined = lmc.KVLayout.from_tensors(
        {"a": pages[:, 0], "b": pages[:, 1], "again": pages[:, 0]}, page_tokens=4, page_dim=0, token_dim=1
    )
    assert (len(joined.planes), joined.planes_until) == (1, {"a": 1, "b": 1, "again": 1})
    kv = torch.zeros(3, 2, PAGES, PAGE_TOKENS, 5)  # K and V apart
    apart = lmc.KVLayout.from_tensors(
        {f"layer{i}": x for i, x in enumerate(kv)}, page_tokens=4, page_dim=1, token_dim=2
    )
    assert (len(apart.planes), apart.planes_until) == (6, {"layer0": 2, "layer1": 4, "layer2": 6})


def test_a_cache_retrieves_layer_by_layer():
    kv = torch.rand(3, PAGES, PAGE_TOKENS, 6)
    prompt = lmc.Prompt(list(range(21)))
    pages = list(range(6))
    with lmc.KVCache(layout_of(kv), "mem://?capacity=1MiB", lmc.Namespace(model="m"), 8) as cache:
        cache.store(prompt, pages).result()
        want = kv.clone()
        kv.zero_()
        job = cache.retrieve(prompt, pages, by_layer=True)
        assert job.layer_ready("layer1", 10)
        assert torch.equal(kv[:2, :5], want[:2, :5])
        assert job.result() == 21
        assert cache.retrieve(prompt, pages, 16, by_layer=True).result() == 16


def test_a_cache_stores_layer_by_layer():
    kv = torch.zeros(3, PAGES, PAGE_TOKENS, 6)
    prompt, pages = lmc.Prompt(list(range(21))), list(range(6))
    with lmc.KVCache(layout_of(kv), "mem://?capacity=1MiB", lmc.Namespace(model="m"), 8) as cache:
        job = cache.store(prompt, pages, by_layer=True)
        for i, layer in enumerate(kv):
            layer.fill_(i + 1)
            assert job.layer_written(f"layer{i}", 10)
        assert job.result() == 21
        kv.zero_()
        assert cache.retrieve(prompt, pages).result() == 21
        assert [layer[:5].unique().tolist() for layer in kv] == [[1], [2], [3]]
