"""Jobs: giving up when a store hangs, loads layer by layer, and when pages are no longer touched."""

import gc
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm.copies import HostCopies
from lmcache_mm.lane import Abandoned, Lane
from lmcache_mm.stores import open_store
from lmcache_mm.transfer import Chunk, Transfer
from test_stores import new_store

PAGES, PAGE_TOKENS, PATIENCE_S = 12, 4, 0.1
KEY = bytes(range(32))


class Gate:
    """A store whose methods wait while the gate is shut; with `slots`, also in place."""

    def __init__(self, store, shut=()):
        self.store, self.shut = store, set(shut)
        self.open = threading.Event()
        self.reached = threading.Event()

    def __getattr__(self, name):
        method = getattr(self.store, name)
        if name not in self.shut:
            return method

        def gated(*arguments, **more):
            self.reached.set()
            assert self.open.wait(30)
            return method(*arguments, **more)

        return gated


def layers(count=3, row=5, seed=0):
    """One tensor per layer, of odd sizes, so that layers of a payload begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, PAGES, PAGE_TOKENS, row)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


@pytest.fixture(params=[4, 5], ids=["whole lanes", "odd"])
def row(request):
    """Bytes per token in a layer; with 4, a layer's part of a payload begins at a lane of its checksum."""
    return request.param


def layout_of(kv):
    named = {f"layer{i}": layer for i, layer in enumerate(kv)}
    return lmc.KVLayout.from_tensors(named, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=1)


def chunks_of(*page_lists):
    return [
        Chunk(KEY[i:] + KEY[:i], torch.tensor(pages), len(pages) * PAGE_TOKENS) for i, pages in enumerate(page_lists)
    ]


@pytest.fixture(params=["mem", "shm"])
def store(request, tmp_path):
    opened, remove = new_store(request.param, tmp_path, capacity="4MiB")
    yield opened
    opened.close()
    remove()


@pytest.fixture
def make(store):
    """Transfers over the store, some of whose methods hang until the gate opens."""
    made = []

    def transfer(kv, *shut, largest=1 << 16):
        gate = Gate(store, shut)
        made.append((gate, Transfer(layout_of(kv), gate, largest)))
        return gate, made[-1][1]

    yield transfer
    for gate, transfer in made:
        gate.open.set()
        transfer.close()


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


def test_a_layer_is_ready_before_the_next_one_is_begun(make, monkeypatch):
    """Otherwise nothing would overlap."""
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    want = kv.clone()
    kv.zero_()
    scattered, go_on = [], threading.Event()
    scatter = HostCopies._copy

    def slow(*arguments):
        if scattered:
            assert go_on.wait(30)
        scattered.append(arguments[-1])
        return scatter(*arguments)

    monkeypatch.setattr(HostCopies, "_copy", slow)
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
    storing = transfer._storing = Late(transfer.layout)
    want = layers(row=row, seed=1)
    job = transfer.store(chunks, b"", by_layer=True)
    for i, layer in enumerate(kv):
        layer.copy_(want[i])
        assert job.layer_written(f"layer{i}", 10)
    assert storing.ordered == [2]  # with the last layer, whose reads come last
    kv.zero_()
    assert job.result(10) == 20
    loading = transfer._loading = Late(transfer.layout)
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
    for chunk in (first, second):
        assert torch.equal(kv[:, chunk.pages], want[:, chunk.pages])


def test_early_work_that_may_begin_behind_work_that_hangs_is_no_progress():
    """Otherwise an engine that keeps storing would never notice that its store hangs."""
    lane, gate, begun = Lane("test"), threading.Event(), threading.Event()
    lane.submit(lambda _: begun.set() or gate.wait(10))
    behind = lane.submit(lambda work: work.touch_pages(lambda _: True), early=True)
    assert begun.wait(10)
    since = time.monotonic()
    time.sleep(0.1)
    behind.be_late()
    hung_s = time.monotonic() - since
    assert lane.stalled_s() >= hung_s
    gate.set()
    assert lane.close(10)


def test_room_is_given_back_behind_the_copies_into_it(tmp_path):
    store, remove = new_store("shm", tmp_path, capacity="4MiB")
    transfer = Transfer(layout_of(layers()), store, 1 << 16)
    late = transfer._storing = Late(transfer.layout)
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
    late = transfer._loading = Late(transfer.layout, fails_at=2)
    job = transfer.load(chunks, b"", by_layer=True)
    with pytest.raises(ZeroDivisionError):
        job.result(10)
    assert job.pages_free(1)
    before = kv.clone()
    late.run(1)
    assert torch.equal(kv, before)


def test_a_wait_that_ends_gives_nothing_up(make, store):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, hangs(store, "store"))
    job = transfer.store(chunks, b"", early=True)
    with pytest.raises(TimeoutError):
        job.result(PATIENCE_S)
    gate.open.set()
    assert job.result(10) == 12
    kv.zero_()
    assert transfer.load(chunks, b"").result() == 1


def test_an_early_store_is_read_once_whoever_waits(make, monkeypatch):
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    kv = layers()
    want = kv.clone()
    chunks = chunks_of(*([page] for page in range(PAGES)))
    _, transfer = make(kv, largest=1)
    gather = HostCopies._copy

    def slow(*arguments):
        time.sleep(0.002)
        return gather(*arguments)

    monkeypatch.setattr(HostCopies, "_copy", slow)
    job = transfer.store(chunks, b"", early=True)
    threads = [threading.Thread(target=job.pages_free, args=(10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.result(10) == PAGES * PAGE_TOKENS
    kv.zero_()
    assert transfer.load(chunks, b"").result() == PAGES
    assert torch.equal(kv, want)


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


def hangs(store, direction):
    """The store's method that hangs before pages are touched."""
    in_place = hasattr(store, "lend")
    return {"load": "lend" if in_place else "get_into", "store": "reserve" if in_place else "contains"}[direction]


@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_job_whose_store_hangs_is_abandoned_and_never_touches_its_pages(make, store, direction, monkeypatch):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    if direction == "load":
        make(kv)[1].store(chunks, b"").result()
    gate, transfer = make(kv, hangs(store, direction))
    job = getattr(transfer, direction)(chunks, b"")
    assert gate.reached.wait(10)
    assert not job.pages_free(PATIENCE_S)
    touched = []
    monkeypatch.setattr(HostCopies, "_copy", lambda *_: touched.append(1))
    gate.open.set()
    with pytest.raises(Abandoned):
        job.result(10)
    assert not touched
    assert store.stats()["records"] == (direction == "load")


def test_what_comes_behind_a_job_that_hangs_is_given_up_at_once(make, store):
    kv = layers()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, hangs(store, "load"))
    first = transfer.load(chunks, b"")
    assert gate.reached.wait(10)
    assert not first.pages_free(PATIENCE_S)
    transfer._loads.progress -= 1000
    begun = time.monotonic()
    second = transfer.load(chunks, b"")
    assert not second.pages_free(60)
    assert time.monotonic() - begun < 30
    gate.open.set()
    for job in (first, second):
        with pytest.raises(Abandoned):
            job.result(10)
    third = transfer.load(chunks, b"")  # the store is back
    assert third.pages_free(10)
    assert third.result() == 0


def test_a_store_that_hangs_after_the_pages_were_read_holds_nobody_up(make, store):
    kv = layers()
    want = kv.clone()
    chunks = chunks_of([3, 1, 7])
    gate, transfer = make(kv, "publish" if hasattr(store, "lend") else "put")
    job = transfer.store(chunks, b"")
    assert job.pages_free(10)
    assert not job.done()
    kv.zero_()  # the pages have a new owner by now
    gate.open.set()
    assert job.result(10) == 12
    assert transfer.load(chunks, b"").result() == 1
    assert torch.equal(kv[:, [3, 1, 7]], want[:, [3, 1, 7]])


def test_the_pages_of_an_early_store_are_read_when_somebody_waits(make, store, monkeypatch):
    """The waiting thread reads them, in several steps, one after another."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    readers = []
    gather = HostCopies._copy

    def seen(*arguments):
        readers.append(threading.current_thread())
        return gather(*arguments)

    monkeypatch.setattr(HostCopies, "_copy", seen)
    kv = layers()
    kv.zero_()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of([3, 1, 7], [0], [11, 2])
    job = transfer.store(chunks, b"", early=True)
    time.sleep(0.05)
    assert not readers
    kv.copy_(layers(seed=1))  # computed meanwhile
    want = kv.clone()
    assert job.pages_free(10)
    assert readers == [threading.current_thread()] * 3
    kv.zero_()
    assert job.result(10) == 24
    assert transfer.load(chunks, b"").result() == 3
    for chunk in chunks:
        assert torch.equal(kv[:, chunk.pages], want[:, chunk.pages])


def test_the_pages_of_an_early_store_are_read_by_its_own_thread_once_they_are_written(make, monkeypatch):
    """In several steps; the caller continues at once, and waits only before it writes the pages again."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    readers = []
    gather = HostCopies._copy

    def slow(*arguments):
        readers.append(threading.current_thread())
        time.sleep(0.02)
        return gather(*arguments)

    monkeypatch.setattr(HostCopies, "_copy", slow)
    kv = layers()
    kv.zero_()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of([3, 1, 7], [0], [11, 2])
    job = transfer.store(chunks, b"", early=True)
    assert not job.leave_pages(time.monotonic() + 0.05)  # given up before they were written
    job = transfer.store(chunks, b"", early=True)
    time.sleep(0.05)
    assert not readers
    kv.copy_(layers(seed=1))  # computed meanwhile
    want = kv.clone()
    job.written()
    assert job.leave_pages(time.monotonic() + 10)
    kv.zero_()
    assert len(readers) == 3
    assert threading.current_thread() not in readers
    assert job.result(10) == 24
    assert transfer.load(chunks, b"").result() == 3
    for chunk in chunks:
        assert torch.equal(kv[:, chunk.pages], want[:, chunk.pages])


def test_a_store_that_is_late_is_given_up_between_its_steps(make, monkeypatch):
    """It stores the pages that it has read, and touches no others."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    gather = HostCopies._copy
    reads = []

    def slow(*arguments):
        time.sleep(0.1)
        reads.append(kv.clone())
        return gather(*arguments)

    monkeypatch.setattr(HostCopies, "_copy", slow)
    kv = layers()
    want = kv.clone()
    _, transfer = make(kv, largest=1)
    chunks = chunks_of(*([page] for page in range(12)))
    job = transfer.store(chunks, b"", early=True)
    job.written()
    assert not job.leave_pages(time.monotonic() + 0.05)
    kv.zero_()  # by the pages' new owner
    with pytest.raises(Abandoned):
        job.result(10)
    assert all(torch.equal(read, want) for read in reads)
    assert len(reads) < 12


@pytest.fixture
def in_steps(monkeypatch):
    """A transfer in steps of one chunk through staging memory, its store, and what happened in both, in order."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    gate, happened, changed = Gate(open_store("mem://?capacity=1MiB")), [], threading.Condition()
    kv = layers(row=4)
    transfer = Transfer(layout_of(kv), gate, 1)

    def tell(what):
        with changed:
            happened.append(what)
            changed.notify_all()

    def wait_for(what, count):
        with changed:
            return changed.wait_for(lambda: happened.count(what) >= count, 10)

    yield kv, transfer, gate, happened, tell, wait_for
    gate.open.set()
    transfer.close()


def test_a_step_is_read_while_the_one_before_is_scattered(in_steps, monkeypatch):
    kv, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    want = kv.clone()
    assert transfer.store(chunks, b"").result() == 4 * 2 * PAGE_TOKENS
    kv.zero_()
    scatter = HostCopies._copy

    def read(*arguments):
        tell("read")
        return gate.store.get_into(*arguments)

    def scatter_late(*arguments):
        tell("scatter")
        assert wait_for("read", min(len(chunks), happened.count("scatter") + 1))
        return scatter(*arguments)

    gate.get_into = read
    monkeypatch.setattr(HostCopies, "_copy", scatter_late)
    assert transfer.load(chunks, b"").result() == len(chunks)
    for chunk in chunks:
        assert torch.equal(kv[:, chunk.pages], want[:, chunk.pages])
    gate.store.delete([chunks[1].key])
    del happened[:]
    monkeypatch.setattr(HostCopies, "_copy", scatter)
    assert transfer.load(chunks, b"").result() == 1
    assert happened == ["read", "read"]  # nothing is read behind what is missing


def test_a_step_is_put_while_the_next_one_is_gathered(in_steps, monkeypatch):
    kv, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    want = kv.clone()
    gather = HostCopies._copy

    def put_late(*arguments):
        tell("put")
        assert wait_for("gather", min(len(chunks), happened.count("put") + 1))
        gate.store.put(*arguments)

    def gather_and_tell(*arguments):
        tell("gather")
        return gather(*arguments)

    gate.put = put_late
    monkeypatch.setattr(HostCopies, "_copy", gather_and_tell)
    assert transfer.store(chunks, b"").result() == 4 * 2 * PAGE_TOKENS
    kv.zero_()
    assert transfer.load(chunks, b"").result() == len(chunks)
    for chunk in chunks:
        assert torch.equal(kv[:, chunk.pages], want[:, chunk.pages])


@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_job_that_fails_keeps_its_memory_while_the_store_uses_it(in_steps, direction, monkeypatch):
    """The next job would fill or read the same memory."""
    _, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2])
    transfer.store(chunks, b"").result()
    if direction == "store":
        gate.store.delete([chunk.key for chunk in chunks])
    name = "get_into" if direction == "load" else "put"
    method, copied, copy = getattr(gate.store, name), [], HostCopies._copy
    hangs_at = 2 if direction == "load" else 1

    def hang(*arguments):
        tell(name)
        assert happened.count(name) < hangs_at or gate.open.wait(30)
        return method(*arguments)

    def fail(*arguments):
        copied.append(1)
        if len(copied) == 3 - hangs_at:
            assert wait_for(name, hangs_at)
            raise OSError("it fails here")
        return copy(*arguments)

    setattr(gate, name, hang)
    monkeypatch.setattr(HostCopies, "_copy", fail)
    job = getattr(transfer, direction)(chunks, b"")
    assert wait_for(name, hangs_at)
    time.sleep(0.05)
    assert not job.done()
    gate.open.set()
    with pytest.raises(OSError, match="it fails here"):
        job.result(10)


def test_nothing_is_read_ahead_for_a_load_that_was_given_up(in_steps):
    _, transfer, gate, happened, tell, wait_for = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2])
    transfer.store(chunks, b"").result()

    def hang(*arguments):
        tell("read")
        assert gate.open.wait(30)
        return gate.store.get_into(*arguments)

    gate.get_into = hang
    job = transfer.load(chunks, b"")
    assert wait_for("read", 1)
    assert job.abandon()
    gate.open.set()
    with pytest.raises(Abandoned):
        job.result(10)
    assert happened == ["read"]


@pytest.mark.parametrize("direction", ["load", "store"])
def test_an_error_of_the_store_in_any_step_is_the_jobs(in_steps, direction):
    _, transfer, gate, happened, tell, _ = in_steps
    chunks = chunks_of([3, 1], [0, 4], [11, 2], [5, 6])
    if direction == "load":
        transfer.store(chunks, b"").result()
    name = "get_into" if direction == "load" else "put"
    method = getattr(gate.store, name)

    def fail(*arguments):
        tell(name)
        if happened.count(name) == 2:
            raise OSError("it fails here")
        return method(*arguments)

    setattr(gate, name, fail)
    with pytest.raises(OSError, match="it fails here"):
        getattr(transfer, direction)(chunks, b"").result(10)
    assert happened.count(name) == 2


def test_an_early_store_given_up_leaves_nothing_behind(make, store):
    kv = layers()
    _, transfer = make(kv)
    job = transfer.store(chunks_of([3, 1, 7]), b"", early=True)
    time.sleep(0.05)
    assert job.abandon()
    assert not job.pages_free(10)
    with pytest.raises(Abandoned):
        job.result(10)
    assert store.stats()["records"] == 0
    assert store.stats().get("pending", 0) == 0
    assert transfer.store(chunks_of([3, 1, 7]), b"").result(10) == 12


def test_an_error_at_the_pages_is_the_jobs_too(make, store, monkeypatch):
    kv = layers()
    _, transfer = make(kv)

    def fails(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(HostCopies, "_copy", fails)
    for early in (False, True):
        job = transfer.store(chunks_of([3, 1, 7]), b"", early=early)
        assert job.pages_free(10)
        with pytest.raises(ValueError, match="no room"):
            job.result(10)
    assert store.stats()["records"] == 0


def test_slow_steps_are_no_reason_to_give_up(make, store, monkeypatch):
    """Only a store without progress uses up the patience, however long the whole takes."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    kv, patience_s = layers(), 2.0
    chunks = chunks_of(*([page] for page in range(10)))
    _, transfer = make(kv)
    transfer.store(chunks, b"").result()
    slow = Gate(store)
    read = getattr(store, hangs(store, "load"))

    def slowly(*arguments, **more):
        time.sleep(patience_s / 8)
        return read(*arguments, **more)

    setattr(slow, hangs(store, "load"), slowly)
    other = Transfer(replace(layout_of(kv)), slow, 1)
    job = other.load(chunks, b"")
    assert job.pages_free(patience_s)
    assert job.result() == 10
    other.close()


def test_an_error_of_the_store_is_the_jobs(make, store, monkeypatch):
    kv = layers()
    gate, transfer = make(kv)

    def fails(*_, **__):
        raise ConnectionError("down")

    setattr(gate, hangs(store, "load"), fails)
    job = transfer.load(chunks_of([1]), b"")
    with pytest.raises(ConnectionError, match="down"):
        job.result(10)
    assert job.pages_free(1)


def test_a_transfer_closes_in_time_over_a_store_that_hangs(make, store):
    gate, transfer = make(layers(), hangs(store, "load"))
    transfer.load(chunks_of([1]), b"")
    assert gate.reached.wait(10)
    begun = time.monotonic()
    transfer.close(PATIENCE_S)
    assert time.monotonic() - begun < 5


def test_a_lane_that_is_gone_or_closed_leaves_no_thread():
    gone, closed = Lane("gone"), Lane("closed")
    assert gone.submit(lambda _: 1).future.result(10) == 1
    assert closed.submit(lambda _: 2).future.result(10) == 2
    closed.close()
    threads = [gone._thread, closed._thread]
    del gone
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed: it is closed"):
        closed.submit(lambda _: 3)


def test_a_cache_retrieves_layer_by_layer(tmp_path):
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
