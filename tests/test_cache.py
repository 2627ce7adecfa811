"""KVCache over stores of this host: what hits, what is restored, and that nothing is restored wrongly."""

import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_mm as lmc
from lmcache_mm import ops
from lmcache_mm.stores import open_store
from test_stores import new_store

PAGE, CHUNK = 4, 16
NAMESPACE = lmc.Namespace(model="m", dtype="float32")


@dataclass
class Engine:
    """A cache of pages whose KV encodes the prompt and position that it was computed for."""

    pages: int = 64
    store: object = "mem://?capacity=4MiB"
    opaque: bool = False
    opaque_tails: bool = False
    namespace: lmc.Namespace = NAMESPACE

    def __post_init__(self):
        self.kv = torch.full((2, self.pages, PAGE, 6), float("nan"))
        self.layout = lmc.KVLayout.from_tensors(
            [self.kv[0], self.kv[1]],
            page_tokens=PAGE,
            page_dim=0,
            token_dim=None if self.opaque else 1,
            opaque=self.opaque,
        )
        self.cache = lmc.KVCache(self.layout, self.store, self.namespace, CHUNK, self.opaque_tails)

    def block_ids(self, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.pages, generator=generator)[: -(-n // PAGE)]

    def compute(self, n, block_ids, value):
        for p in range(n):
            self.kv[:, block_ids[p // PAGE], p % PAGE] = value + p / 1024

    def restored(self, n, block_ids, value):
        """How many tokens, from the first on, hold what `compute` wrote."""
        for p in range(n):
            if not (self.kv[:, block_ids[p // PAGE], p % PAGE] == value + p / 1024).all():
                return p
        return n


def prompt(text=50, image="a", length=20, tail=13, question=5, **request):
    ids = [1] * text + [9] * length + [question] * tail
    return lmc.Prompt(ids, [lmc.Item(image, text, length)], **request)


def stored(engine, p, value=1.0):
    ids = engine.block_ids(len(p), seed=1)
    engine.compute(len(p), ids, value)
    count = engine.cache.store(p, ids).result()
    engine.kv.fill_(float("nan"))
    return count


def retrieved(engine, p, value=1.0, hit=None):
    ids = engine.block_ids(len(p), seed=2)
    got = engine.cache.retrieve(p, ids, hit).result()
    assert engine.restored(len(p), ids, value) >= got
    return got


@pytest.fixture(params=["mem", "shm", "file", "shm,file"])
def engine(request, tmp_path):
    store, remove = new_store(request.param, tmp_path, capacity="4MiB")
    engine = Engine(store=store)
    yield engine
    engine.cache.close()
    remove()


def keys_of(engine, p):
    return [record.key for record in engine.cache._records(p)]


def test_the_same_prompt_is_hit_whole_and_restored(engine):
    p = prompt()
    assert engine.cache.match(p) == 0
    assert stored(engine, p) == 83  # chunks to 80, the image's end 70, the tail 83
    assert engine.cache.match(prompt()) == len(p) == 83
    assert retrieved(engine, p) == 83


def test_another_image_is_hit_up_to_the_last_chunk_before_it(engine):
    stored(engine, prompt())
    assert engine.cache.match(prompt(image="b")) == 48


def test_another_question_is_hit_up_to_the_end_of_the_image(engine):
    stored(engine, prompt())
    other = prompt(question=6)
    assert engine.cache.match(other) == 70
    assert retrieved(engine, other) == 70


def test_a_small_image_in_the_first_chunk_is_hit_too(engine):
    stored(engine, prompt(text=2, length=5, tail=3))
    assert engine.cache.match(prompt(text=2, length=5, tail=4, question=8)) == 7


def test_other_text_before_the_image_hits_nothing(engine):
    stored(engine, prompt())
    ids = [2] * 50 + [9] * 20 + [5] * 13
    assert engine.cache.match(lmc.Prompt(ids, [lmc.Item("a", 50, 20)])) == 0


def test_a_prompt_whose_ids_alone_are_equal_hits_nothing(engine):
    stored(engine, prompt(text=0))
    assert engine.cache.match(lmc.Prompt([9] * 20 + [5] * 13)) == 0


def test_storing_again_stores_only_what_is_new(engine):
    p = prompt()
    stored(engine, p)
    assert stored(engine, p) == 0
    longer = lmc.Prompt([*p.token_ids.tolist(), *[7] * 20], p.items)
    assert stored(engine, longer) == 16 + 7  # the chunk [80, 96) and the tail [96, 103)


@pytest.mark.parametrize("a, b", [({"salt": "x"}, {"salt": "y"}), ({"lora": "x"}, {}), ({"prompt_embeds": "x"}, {})])
def test_tenants_loras_and_prompt_embeddings_share_nothing(engine, a, b):
    stored(engine, prompt(**a))
    assert engine.cache.match(prompt(**b)) == 0
    assert engine.cache.match(prompt(**a)) == 83


def test_two_namespaces_share_a_store_but_no_records():
    store = open_store("mem://?capacity=1MiB")
    one, two = Engine(store=store), Engine(store=store, namespace=lmc.Namespace(model="other"))
    stored(one, prompt())
    assert two.cache.match(prompt()) == 0
    one.cache.close()
    assert len(store.contains([bytes(36)])) == 1  # a store that was passed in open stays open


def test_after_close_there_is_one_clear_error(engine):
    p, ids = prompt(), torch.arange(64)
    cache = engine.cache
    cache.close()
    for use in (
        *(lambda: cache.match(p), lambda: cache.store(p, ids), lambda: cache.retrieve(p, ids)),
        *(lambda: cache.forget("a"), cache.stats),
    ):
        with pytest.raises(RuntimeError, match="cache: it is closed"):
            use()
    cache.close()


@pytest.mark.parametrize("hit", [0, 1, 15, 16, 17, 63, 64, 69, 70, 71, 79, 80, 81, 82, 83])
@pytest.mark.parametrize("opaque", [False, True])
def test_any_part_of_the_hit_may_be_retrieved(hit, opaque):
    """With pages for just these tokens."""
    p = prompt()
    engine = Engine(opaque=opaque, opaque_tails=True)
    stored(engine, p)
    ids = engine.block_ids(hit, seed=2)
    others = torch.ones(engine.pages, dtype=torch.bool)
    others[ids] = False
    assert engine.cache.retrieve(p, ids, hit).result() == hit
    assert engine.restored(hit, ids, 1.0) == hit
    assert engine.kv[:, others].isnan().all()
    engine.cache.close()


def test_more_than_was_stored_of_an_opaque_page_restores_what_was():
    engine = Engine(opaque=True)
    p = prompt()
    stored(engine, p)
    assert engine.cache.match(p) == 80
    assert retrieved(engine, p, hit=82) == 80
    engine.cache.close()


@pytest.mark.parametrize("opaque", [False, True])
def test_a_prompt_that_grows_hits_the_ends_of_its_turns(opaque, tmp_path):
    """Even if another process stored them, and if a turn was changed."""
    engine = Engine(opaque=opaque)
    ids: list[int] = []
    turns: list[int] = []
    for tokens in (9, 12, 30, 3):
        p = lmc.Prompt([*ids, *[5] * tokens], turns=turns)
        before = turns[-1] if turns else 0
        assert engine.cache.match(p) == (before // PAGE * PAGE if opaque else before)
        ids, turns = p.token_ids.tolist(), [*turns, len(p)]
        stored(engine, p)
    assert engine.cache.match(lmc.Prompt(ids, turns=[9])) == len(ids) // (PAGE if opaque else 1) * (
        PAGE if opaque else 1
    )
    changed = lmc.Prompt([*[5] * 10, *[6] * 40], turns=[9, 21])
    assert engine.cache.match(changed) == (8 if opaque else 9)
    for wrong, error in (([-1], ValueError), ([51], ValueError), ([1.5], TypeError)):
        with pytest.raises(error, match="turns"):
            lmc.Prompt([1] * 50, turns=wrong)
    engine.cache.close()


def test_what_was_asked_and_found_is_counted(engine):
    p = prompt()
    assert engine.cache.stats()["hit_rate"] == 0
    engine.cache.match(p)
    stored(engine, p)
    engine.cache.match(p)
    job = engine.cache.retrieve(p, engine.block_ids(83), 70)
    assert job.result() == job.result() == 70
    assert engine.cache.stats() == {
        **{"queried_tokens": 166, "hit_tokens": 83, "restored_tokens": 70},
        **{"stored_tokens": 83, "hit_rate": 0.5},
        **{"raw_bytes": 4416, "stored_bytes": 4416, "codec_ratio": 1.0},
    }


def test_a_token_in_several_records_counts_once_as_stored(engine):
    assert stored(engine, prompt()) == 83  # records of [64, 70), [64, 80) and [80, 83) among them
    assert stored(engine, prompt()) == 0
    assert stored(engine, prompt(question=6)) == 13  # up to the item's end, the store has it
    assert engine.cache.stats()["stored_tokens"] == 83 + 13


@pytest.mark.parametrize("kind", ["mem", "shm"])
def test_what_the_store_had_no_room_for_is_not_counted_as_stored(kind, tmp_path):
    store, remove = new_store(kind, tmp_path, capacity="32KiB" if kind == "shm" else "3KiB")
    engine = Engine(store=store)
    count = stored(engine, lmc.Prompt([1] * 160))
    assert 0 < count < 160
    assert count == 16 * sum(engine.cache.backend.contains(keys_of(engine, lmc.Prompt([1] * 160))))
    engine.cache.close()
    remove()


def test_a_job_may_be_awaited(engine):
    async def loop() -> tuple[int, int]:
        p, ids = prompt(), engine.block_ids(83)
        return await engine.cache.store(p, ids), await engine.cache.retrieve(p, ids)

    assert asyncio.run(loop()) == (83, 83)


def test_slots_past_the_tail_are_zero_after_a_retrieve(engine):
    p = prompt()
    stored(engine, p)
    ids = engine.block_ids(len(p), seed=3)
    assert engine.cache.retrieve(p, ids).result() == 83
    assert (engine.kv[:, ids[83 // PAGE], 83 % PAGE :] == 0).all()


def test_pages_beside_the_prompt_are_never_touched(engine):
    p = prompt()
    stored(engine, p)
    ids = engine.block_ids(len(p), seed=3)
    assert retrieved(engine, p) == 83
    engine.kv.fill_(float("nan"))
    engine.cache.retrieve(p, ids).result()
    others = [page for page in range(engine.pages) if page not in ids.tolist()]
    assert engine.kv[:, others].isnan().all()
    engine.cache.close()


def test_skipped_pages_are_left_alone_by_a_retrieve_and_kept_out_of_a_store(engine):
    p = prompt()
    stored(engine, p)
    ids = engine.block_ids(len(p), seed=4)
    ids[:4] = -1
    assert engine.cache.retrieve(p, ids).result() == 83
    fresh = lmc.Prompt([2] * 83)
    assert engine.cache.store(fresh, ids).result() == 83 - 16
    assert engine.cache.match(fresh) == 0


def test_opaque_pages_are_hit_up_to_whole_pages():
    engine = Engine(opaque=True)
    stored(engine, prompt())
    assert engine.cache.match(prompt()) == 80
    assert engine.cache.match(prompt(question=6)) == 68
    assert retrieved(engine, prompt()) == 80


def test_opaque_tails_are_stored_whole_on_request():
    engine = Engine(opaque=True, opaque_tails=True)
    stored(engine, prompt())
    assert engine.cache.match(prompt()) == 83
    assert retrieved(engine, prompt()) == 83


def test_a_damaged_record_ends_the_restored_prefix_before_it(engine):
    p = prompt()
    stored(engine, p)
    engine.cache.backend.flush()
    third = keys_of(engine, p)[2:3]
    payload = bytearray(engine.layout.payload_bytes(CHUNK // PAGE))
    assert engine.cache.backend.get_into(third, [payload]) == [True]
    before = engine.cache.backend.stats()
    engine.cache.backend.delete(third)
    right = ops.checksum(np.frombuffer(payload, np.uint8))
    payload[5] ^= 0x10
    engine.cache.backend.put(third, [payload], checksums=[right])
    engine.cache.backend.flush()
    ids = engine.block_ids(len(p), seed=2)
    got = engine.cache.retrieve(p, ids).result()
    assert got == 32
    assert engine.restored(len(p), ids, 1.0) == 32
    assert engine.cache.match(p) == 32
    after = engine.cache.backend.stats()
    corrupt = [name for name in after if name.endswith("corrupt")]
    assert corrupt
    assert sum(after[name] - before[name] for name in corrupt) >= 1


def test_a_record_gone_between_match_and_retrieve_is_no_exception(engine):
    p = prompt()
    stored(engine, p)
    hit = engine.cache.match(p)
    engine.cache.backend.delete(keys_of(engine, p)[-2:])
    assert retrieved(engine, p, hit=hit) in (64, 70)


def test_what_one_tenant_stored_is_forgotten_everywhere(engine):
    ours, theirs = prompt(salt="ours"), prompt(salt="theirs")
    for p in (ours, theirs):
        stored(engine, p)
        assert retrieved(engine, p) == len(p)
    assert engine.cache.forget("ours") == len(keys_of(engine, ours))
    assert engine.cache.match(ours) == 0
    assert retrieved(engine, theirs) == len(theirs)
    with pytest.raises(ValueError, match="salt: expected a nonempty str"):
        engine.cache.forget("")


@pytest.mark.parametrize("by_layer", [False, True])
def test_what_is_forgotten_while_it_is_stored_does_not_come_back(engine, by_layer):
    ours, theirs = prompt(salt="ours"), prompt(salt="theirs")
    stored(engine, ours)
    forgotten = threading.Event()
    if not by_layer:
        engine.cache._transfer._stores.submit(lambda _: forgotten.wait(10))  # a slow store
    ids = engine.block_ids(len(ours), seed=1)
    engine.compute(len(ours), ids, 1.0)
    jobs = [engine.cache.store(p, ids, by_layer=by_layer) for p in (ours, theirs)]
    engine.cache.forget("ours")
    forgotten.set()
    for job in jobs:
        if by_layer:
            job.layer_written("1", 10)
        job.result(10)
    engine.cache.backend.flush()
    assert engine.cache.match(ours) == 0
    assert engine.cache.match(theirs) == len(theirs)


def test_what_lies_in_a_slower_tier_is_restored_from_it_and_forgotten_in_both(tmp_path):
    store, remove = new_store("shm,file", tmp_path)
    engine = Engine(store=store)
    p = prompt(salt="s")
    stored(engine, p)
    store.flush()
    store._tiers[0].clear()
    assert engine.cache.match(p) == len(p)
    assert retrieved(engine, p) == len(p)
    assert store.stats()["promoted"] == len(keys_of(engine, p)) - 1  # a whole chunk contains the tail at the image
    assert retrieved(engine, p) == len(p)
    assert engine.cache.forget("s") == len(keys_of(engine, p))
    assert [tier.stats()["records"] for tier in store._tiers] == [0, 0]
    engine.cache.close()
    remove()


def test_a_store_smaller_than_a_chunk_is_refused():
    with pytest.raises(ValueError, match="store: expected a capacity of at least a chunk's 768 bytes, got 640"):
        Engine(store="mem://?capacity=640")


def test_prompts_larger_than_the_memory_of_a_step_go_in_steps(monkeypatch, tmp_path):
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)
    for scheme in ("mem", "shm"):
        store, remove = new_store(scheme, tmp_path)
        engine = Engine(store=store)
        p = prompt()
        assert stored(engine, p) > 0
        assert retrieved(engine, p) == 83
        engine.cache.close()
        remove()


@pytest.mark.parametrize("scheme, capacity", [("mem", "20KiB"), ("shm", "320KiB"), ("mem,file", "320KiB")])
def test_what_is_restored_is_always_what_the_same_prompt_computed(scheme, capacity, tmp_path):
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def run(data):
        store, remove = new_store(scheme, tmp_path, capacity)
        check_restored(data, store)
        remove()

    run()


def check_restored(data, store):
    """Random prompts that share prefixes and images, in a store that evicts; each KV value identifies its prefix."""
    engine = Engine(store=store, pages=40)
    values: dict[tuple, float] = {}

    def value_at(p, position):
        items = tuple(sorted((i.offset, i.length, i.identifier) for i in p.items if i.offset <= position))
        return values.setdefault((*p.token_ids[: position + 1].tolist(), items, p.salt), float(len(values) + 1))

    for step in range(data.draw(st.integers(2, 8))):
        n = data.draw(st.integers(0, 60))
        ids = [data.draw(st.sampled_from([0, 1])) if p % 17 == 0 else 3 for p in range(n)]
        item = st.builds(lmc.Item, st.sampled_from("ab"), st.sampled_from([0, 3, 16]), st.sampled_from([0, 8, 20]))
        p = lmc.Prompt(ids, data.draw(st.lists(item, max_size=2)), salt=data.draw(st.sampled_from([None, "s"])))
        block_ids = engine.block_ids(n, seed=step)
        engine.kv.fill_(float("nan"))
        hit = engine.cache.match(p)
        assert engine.cache.retrieve(p, block_ids, hit).result() == hit
        for position in range(n):
            slot = engine.kv[:, block_ids[position // PAGE], position % PAGE]
            if position < hit:
                assert (slot == value_at(p, position)).all()
            slot.fill_(value_at(p, position))
        engine.cache.store(p, block_ids).result()
    engine.cache.close()


def test_many_threads_share_one_cache(engine):
    prompts = [prompt(image=str(i)) for i in range(8)]
    for i, p in enumerate(prompts):
        stored(engine, p, value=float(i))
    wrong = []

    def match_all():
        for _ in range(20):
            wrong.extend(p for p in prompts if engine.cache.match(p) != 83)

    threads = [threading.Thread(target=match_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_jobs_can_be_asked_and_waited_for(engine):
    job = engine.cache.store(prompt(), engine.block_ids(83))
    job.result(timeout_s=30)
    assert job.done()


def test_an_empty_prompt_and_no_blocks_are_valid(engine):
    empty = lmc.Prompt([])
    assert engine.cache.match(empty) == 0
    assert engine.cache.store(empty, []).result() == 0
    assert engine.cache.retrieve(empty, []).result() == 0


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda e: e.cache.match([1, 2]), TypeError, "prompt: expected lmcache_mm.Prompt, got list"),
        (lambda e: e.cache.store(prompt(), [0]), ValueError, "block_ids: expected 21 pages for 83 tokens, got 1"),
        (lambda e: e.cache.store(prompt(), [64] * 21), ValueError, r"block_ids: expected ids in \[0, 64\).* got 64"),
        (lambda e: e.cache.store(prompt(), [-2] * 21), ValueError, "block_ids: .* got -2"),
        (lambda e: e.cache.store(prompt(), [0.5] * 21), TypeError, "block_ids: expected integers, got float64"),
        (lambda e: e.cache.retrieve(prompt(), [0] * 21, 84), ValueError, "hit: expected at most the prompt's 83"),
        (lambda e: e.cache.retrieve(prompt(), [0] * 21, -1), ValueError, "hit: expected an integer in"),
        (lambda e: lmc.KVCache(e.layout, "mem://?capacity=1MiB", NAMESPACE, 18), ValueError, "chunk_tokens: .* got 18"),
        (lambda e: lmc.KVCache(e.layout, "mem://?capacity=1MiB", NAMESPACE, 0), ValueError, "chunk_tokens: .* got 0"),
        (lambda e: lmc.KVCache(e.layout, "mem://", NAMESPACE), ValueError, "store: capacity is missing"),
        (
            lambda e: lmc.KVCache(e.layout, "mem://?capacity=1MiB", NAMESPACE.with_layout(b"")),
            ValueError,
            "layout: the",
        ),
        (lambda e: lmc.KVCache(e.layout, "mem://?capacity=1MiB", {}), TypeError, "namespace: expected"),
        (lambda e: lmc.KVCache(e.layout, None, NAMESPACE), TypeError, "store: expected a URL, .* store, got NoneType"),
        (lambda e: lmc.KVCache(e.layout, [None], NAMESPACE), TypeError, "store: expected a URL or .*, got NoneType"),
        (lambda e: lmc.KVCache(e.layout, b"mem://", NAMESPACE), TypeError, "store: expected a URL or .*, got bytes"),
        (lambda e: lmc.KVCache(e.kv, "mem://?capacity=1MiB", NAMESPACE), TypeError, "layout: expected"),
    ],
)
def test_bad_arguments_are_refused(engine, call, error, text):
    with pytest.raises(error, match=text):
        call(engine)
