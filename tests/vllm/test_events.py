"""Events for routers, without an engine: a shared-memory store's events against those of vLLM's own requests and block
pool."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
import uuid
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lmcache_mm.cache import Record, record_key
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)

PAGE, CHUNK = 16, 32
PLACES = [(0, 0), (1, 0), (0, 1), (1, 1)]  # in one table: two groups, two ranks


@pytest.fixture(scope="module")
def events() -> Any:
    """Imported here, since an import at the top would load vLLM in every test run."""
    return importlib.import_module("lmcache_mm.vllm.kv.events")


@pytest.fixture(scope="module")
def routers(events) -> Any:
    return importlib.import_module("routers")


@pytest.fixture
def store():
    url = f"shm:///test-{uuid.uuid4().hex}"
    opened = open_store(f"{url}?capacity=16MiB")
    yield opened
    opened.close()
    assert slab.remove(slab_directory(url)[1])


class Told:
    """A store's events, and those of vLLM's own pool for the same request."""

    def __init__(self, events: Any, store: Any, groups: Any = None, hash_tokens: int = PAGE, **options: Any) -> None:
        pools, ours = (
            importlib.import_module("vllm.v1.core.block_pool"),
            importlib.import_module("lmcache_mm.vllm.options"),
        )
        self.store = store
        self.pool = pools.BlockPool(100, True, hash_tokens, enable_kv_cache_events=True)
        one = ours.Group(0, 0, ["layer"], PAGE, None, "float32", "full_attention")
        self.events = events.Events(store, groups or [one], timeout_s=options.get("timeout_s", 5))
        self.events.bind(self.pool)
        self.events.learn_places(options.get("places", PLACES))

    def taken(self) -> list[dict[str, Any]]:
        """The events after the next look at the store."""
        told = list(self.events.take())
        until = time.monotonic() + 10
        while self.events._looking is not None and time.monotonic() < until:
            self.events._looking.future.result()
            told += self.events.take()
        return msgspec.msgpack.decode(msgspec.msgpack.encode(told))

    def looked(self) -> list[dict[str, Any]]:
        self.events._next_round = 0.0
        return self.taken()

    def by_pool(self, request: Any, group: int = 0, size: int = PAGE) -> list[dict[str, Any]]:
        count = request.num_tokens // size
        blocks = self.pool.get_new_blocks(count)
        self.pool.cache_full_blocks(request, blocks, 0, count, size, group)
        told = self.pool.take_events()
        for event in told:
            event.kv_cache_spec_kind = "full_attention"  # as its manager does
        return msgspec.msgpack.decode(msgspec.msgpack.encode(told))


@pytest.fixture
def told(events, store):
    one = Told(events, store)
    yield one
    one.events.close()


def request(tokens: int = 4 * CHUNK, hash_tokens: int = PAGE, first: int = 100, **more: Any) -> Any:
    """A request of vLLM's."""
    requests, utils = (importlib.import_module(f"vllm.v1.{name}") for name in ("request", "core.kv_cache_utils"))
    hasher = importlib.import_module("vllm.utils.hashing").sha256
    utils.init_none_hash(hasher)
    return requests.Request(
        uuid.uuid4().hex,
        list(range(first, first + tokens)),
        importlib.import_module("vllm").SamplingParams(max_tokens=4),
        None,
        block_hasher=utils.get_request_block_hasher(hash_tokens, hasher),
        **more,
    )


def picture(identifier: str, offset: int, length: int) -> Any:
    inputs = importlib.import_module("vllm.multimodal.inputs")
    return inputs.MultiModalFeatureSpec(None, "image", identifier, inputs.PlaceholderRange(offset, length))


def records(*ends: int, key: int = 0) -> list[Record]:
    return [Record((end - 1) // CHUNK * CHUNK, end, bytes([key]) * 30 + end.to_bytes(2, "little")) for end in ends]


def keys(record: Record, places: Any = PLACES) -> list[bytes]:
    return [record_key(record.key, number, rank) for number, rank in places]


def put(store: Any, *of: Record, places: Any = PLACES) -> None:
    for record in of:
        store.put(keys(record, places), [b"payload"] * len(places))


def test_blocks_are_told_as_vllms_own_pool_tells_them(told, routers):
    """With images, a salt, an adapter, a session, a tail that ends within a block: the same hashes and extra keys."""
    lora = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 3, "/adapter")
    asked = request(
        135,
        mm_features=[picture("one", 20, 40), picture("two", 61, 30)],
        cache_salt="salt",
        lora_request=lora,
        session_id="session",
    )
    of = records(32, 64, 96, 128, 135)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    (of_pool,) = told.by_pool(asked)
    ours = told.taken()
    assert routers.by_block(ours, "CPU") == routers.by_block([of_pool], "GPU")
    assert len(routers.by_block(ours, "CPU")) == 8
    assert {(event["locality"], event["session_id"]) for event in ours} == {("LOCAL", "session")}
    extra_keys = [key for event in ours for key in event["extra_keys"]]
    assert extra_keys[:2] == [["adapter", "salt"], ["adapter", ["one", 4]]]


def test_of_states_the_block_that_ends_there_is_told_and_only_where_there_is_one(events, store):
    options = importlib.import_module("lmcache_mm.vllm.options")
    groups = [
        options.Group(0, 0, ["state"], PAGE, None, "state", "mamba", states=True),
        options.Group(1, 256, ["attention"], PAGE, None, "float32", "full_attention"),
    ]
    places = [(0, 0), (256, 0)]
    told = Told(events, store, groups, places=places)
    asked, of = request(), records(32, 64)
    put(store, *of, places=places)
    told.events.expect(asked, of, found=True, states={64})
    told_of = told.taken()
    attention, state = ([e for e in told_of if e["group_idx"] == table] for table in (1, 0))
    blocks = [block for event in attention for block in event["block_hashes"]]
    assert len(blocks) == 4
    assert [(e["block_hashes"], e["parent_block_hash"], e["kv_cache_spec_kind"]) for e in state] == [
        (blocks[3:], blocks[2], "mamba")
    ]
    store.delete(keys(of[1], places[:1]))
    (removed,) = told.looked()
    told.events.close()
    assert (removed["block_hashes"], removed["group_idx"]) == (blocks[3:], 0)


def test_hashes_of_finer_blocks_make_those_of_a_groups_pages(events, store, routers):
    told = Told(events, store, hash_tokens=8)
    asked, of = request(hash_tokens=8), records(32, 64)
    put(store, *of)
    told.events.expect(asked, of, found=True)
    of_pool = routers.by_block(told.by_pool(asked), "GPU")
    ours = routers.by_block(told.taken(), "CPU")
    told.events.close()
    assert len(ours) == 4
    assert ours == {block: of_pool[block] for block in ours}


def test_a_record_is_told_once_it_is_there_whole_and_after_its_parent(told):
    asked, (one, two) = request(), records(32, 64)
    told.events.expect(asked, [one, two], found=False)
    put(told.store, two)
    put(told.store, one, places=PLACES[:-1])
    told.events.look()
    assert told.taken() == []
    put(told.store, one)
    told.events.look()
    first, second = told.taken()
    assert (first["parent_block_hash"], second["parent_block_hash"]) == (None, first["block_hashes"][-1])
    assert told.looked() == []
    told.events.expect(asked, [one, two], found=True)
    assert told.taken() == []  # once


def test_a_record_that_lost_any_part_is_gone_and_so_is_what_follows_it(told):
    asked, of = request(), records(32, 64, 96)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    stored = [block for event in told.taken() for block in event["block_hashes"]]
    told.store.delete(keys(of[1])[2:3])
    (removed,) = told.looked()
    assert not told.events._children
    assert removed == {
        "type": "BlockRemoved",
        "block_hashes": stored[:1:-1],
        "medium": "CPU",
        "group_idx": 0,
        "locality": "LOCAL",
    }
    put(told.store, of[1])
    assert told.looked() == []  # nobody knows its content any more
    told.events.expect(asked, of, found=True)
    assert [block for event in told.taken() for block in event["block_hashes"]] == stored[2:]


def test_a_block_of_two_records_is_told_once_and_is_there_until_both_are_gone(told):
    """A tail, and a chunk that begins with it."""
    asked, (tail, chunk) = request(), records(16, 32)
    put(told.store, tail)
    told.events.expect(asked, [tail], found=True)
    (first,) = told.taken()
    put(told.store, chunk)
    told.events.expect(asked, [tail, chunk], found=True)
    (second,) = told.taken()
    assert (second["parent_block_hash"], second["token_ids"]) == (first["block_hashes"][0], list(range(116, 132)))
    told.store.delete(keys(tail))
    assert told.looked() == []
    told.store.delete(keys(chunk))
    assert [event["block_hashes"] for event in told.looked()] == [second["block_hashes"] + first["block_hashes"]]


def test_nothing_is_told_before_it_is_known_what_a_record_consists_of(told):
    told.events.learn_places([])
    told.events.expect(request(), records(32), found=True)
    assert told.taken() == []
    told.events.learn_places(PLACES)
    put(told.store, *records(32))
    assert len(told.looked()) == 1


def test_a_long_round_of_looks_keeps_nothing_that_waits_from_being_told(told, events, monkeypatch):
    monkeypatch.setattr(events, "MOST_AT_ONCE", 1)
    asked, of = request(), records(32, 64, 96)
    put(told.store, *of[:2])
    told.events.expect(asked, of[:2], found=True)
    assert len(told.taken()) == 2
    told.events.expect(asked, of[2:], found=False)
    for _ in range(2):
        told.events._next_round = 0.0
        told.events.take()  # the round begins
        told.events._looking.future.result()
    put(told.store, of[2])
    told.events._next_round = 0.0
    told.events.take()
    told.events._looking.future.result()
    assert [event["type"] for event in msgspec.to_builtins(told.events.take())] == ["BlockStored"]


def test_a_round_that_takes_longer_than_a_second_reaches_all_that_is_told(told, events, monkeypatch):
    asked, of = request(), records(32, 64, 96)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    assert len(told.taken()) == 3
    monkeypatch.setattr(events, "MOST_AT_ONCE", 1)
    told.store.delete(keys(of[0]))
    removed = []
    for _ in range(6):
        told.events._next_round = 0.0
        removed += told.events.take()
        if told.events._looking:
            told.events._looking.future.result()
    assert sum(len(event.block_hashes) for event in removed) == 6


def test_a_tail_without_a_whole_block_is_not_told(told):
    asked, of = request(), records(15)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    assert told.taken() == []
    assert not told.events.are_under_way()


def test_what_never_comes_is_waited_for_no_longer_than_it_may_take(events, store):
    told = Told(events, store, timeout_s=0.05)
    told.events.expect(request(), records(32), found=False)
    time.sleep(0.2)
    assert told.looked() == []
    put(store, *records(32))
    assert told.looked() == []
    told.events.close()


def test_the_engine_steps_on_while_something_may_be_told_and_no_longer(told):
    asked, of = request(), records(32)
    told.events.expect(asked, of, found=False)
    assert not told.events.are_under_way()  # its save is, and reports its own end
    told.events.look()
    assert told.events.are_under_way()
    assert told.taken() == []
    assert not told.events.are_under_way()


def test_what_is_told_is_bounded_and_what_is_told_no_more_is_said_to_be_gone(told, events, routers, monkeypatch):
    """The blocks asked for longest ago go first, and with them those that follow."""
    monkeypatch.setattr(events, "MOST_BLOCKS", 8)
    index, of_two = routers.Index(PAGE), records(32, 64, key=2)
    asked = [request(first=1000 * i) for i in range(3)]
    for i, one in enumerate(asked):
        of = records(32, 64, key=i)
        put(told.store, *of)
        told.events.expect(one, of, found=True)
        index.take(told.taken())
        told.events.expect(asked[0], records(32, 64, key=0), found=True)
    found = [index.tokens_at(routers.Question(list(one.all_token_ids))) for one in asked]
    assert found == [64, 0, 64]
    assert told.events._blocks_told == sum(len(told) for told in told.events._blocks.values()) == 8
    told.store.delete([key for record in of_two for key in keys(record)])
    index.take(told.looked())
    assert index.tokens_at(routers.Question(list(asked[2].all_token_ids))) == 0
    assert not index.wrong()


def test_after_a_reset_of_vllms_cache_what_is_found_is_told_anew(told, routers):
    index, asked, of = routers.Index(PAGE), request(), records(32, 64)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    index.take(told.taken())
    assert told.pool.reset_prefix_cache()
    index.take(msgspec.msgpack.decode(msgspec.msgpack.encode(told.pool.take_events())))
    assert told.taken() == []
    told.events.expect(asked, of, found=True)
    index.take(told.taken())
    assert index.tokens_at(routers.Question(list(asked.all_token_ids))) == 64


def test_what_the_engine_will_not_use_any_more_is_gone(told):
    of = records(32, 64)
    put(told.store, *of)
    told.events.expect(request(), of, found=True)
    stored = [block for event in told.taken() for block in event["block_hashes"]]
    told.events.expect(request(first=500), records(32, key=1), found=False)
    told.events.forget()
    assert [event["block_hashes"] for event in told.taken()] == [stored[::-1]]
    assert [len(told.events._told), len(told.events._children), told.events._blocks_told] == [0, 0, 0]
    assert not any(told.events._blocks.values())
    put(told.store, *records(32, key=1))
    assert told.looked() == []


def test_groups_are_told_each_by_its_own_pages(events, store, routers):
    """Full attention in pages of 16, windows in pages of 32, whose first record is missing."""
    group = importlib.import_module("lmcache_mm.vllm.options").Group
    whole = group(1, 256, ["a"], PAGE, None, "float32", "full_attention")
    window = group(0, 0, ["b"], 2 * PAGE, 64, "float32", "sliding_window")
    told = Told(events, store, [window, whole], places=[(0, 0), (256, 0)])
    asked, of = request(), records(32, 64)
    put(store, *of, places=[(256, 0)])
    put(store, of[1], places=[(0, 0)])
    told.events.expect(asked, of, found=True)
    stored = told.taken()
    assert [(e["group_idx"], e["block_size"], len(e["block_hashes"])) for e in stored] == [(1, 16, 2)] * 2 + [
        (0, 32, 1)
    ]
    assert (stored[2]["kv_cache_spec_kind"], stored[2]["kv_cache_spec_sliding_window"]) == ("sliding_window", 64)
    assert stored[2]["block_hashes"][0] == stored[1]["block_hashes"][-1]
    store.delete([record_key(of[0].key, 256, 0)])
    gone = told.looked()
    assert {(e["group_idx"], tuple(e["block_hashes"])) for e in gone} == {
        (1, tuple(block for e in stored[1::-1] for block in e["block_hashes"][::-1])),
        (0, tuple(stored[2]["block_hashes"])),
    }
    put(store, of[0], places=[(0, 0)])
    told.events.expect(asked, of, found=True)  # of the first one only the windows are stored
    assert [(e["group_idx"], e["parent_block_hash"]) for e in told.taken()] == [(0, None)]
    told.events.close()


def test_tiers_are_told_each_by_its_medium(events, tmp_path, routers):
    url = f"shm:///test-{uuid.uuid4().hex}"
    # As the connector opens its store.
    tiered = open_store([f"{url}?capacity=16MiB", f"file://{tmp_path}/store?capacity=16MiB"], lambda *_: None)
    told, index = Told(events, tiered), routers.Index(PAGE)
    asked, of = request(), records(32, 64)
    put(tiered, *of)
    tiered.flush()
    told.events.expect(asked, of, found=True)
    index.take(told.taken())
    question = routers.Question(list(asked.all_token_ids))
    assert [index.tokens_at(question, medium) for medium in ("CPU", "STORAGE")] == [64, 64]
    tiered.tiers[0].delete(keys(of[0]))
    index.take(told.looked())
    assert [index.tokens_at(question, medium) for medium in ("CPU", "STORAGE")] == [0, 64]
    assert not index.wrong()
    told.events.close()
    tiered.close()
    assert slab.remove(slab_directory(url)[1])


def test_a_store_that_cannot_tell_changes_nothing(told, monkeypatch):
    asked, of = request(), records(32)
    put(told.store, *of)
    told.events.expect(asked, of, found=True)
    assert len(told.taken()) == 1

    def fails(*_: Any, **__: Any) -> list[bool]:
        raise OSError("down")

    with monkeypatch.context() as patch:
        patch.setattr(told.store, "contains", fails)
        assert told.looked() == []
    assert told.looked() == []
    told.store.delete(keys(of[0]))
    assert len(told.looked()) == 1


@pytest.mark.parametrize(
    ("enabled", "url", "told"),
    [(True, "mem://?capacity=1MiB", False), (False, "shm", False), (True, "shm", True)],
)
def test_nothing_is_watched_where_nobody_is_to_be_told_or_of_nothing(events, store, enabled, url, told):
    """Other stores than this host's own say nothing about this host."""
    config = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=enabled) if enabled else None)
    made = events.Events.of(config, store if url == "shm" else open_store(url), [], 5)
    assert (made is not None) == told
    if made:
        made.close()
