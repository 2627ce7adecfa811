"""States of recurrent layers, alone and beside the KV of attention layers."""

from __future__ import annotations

import pytest
import torch

from lmcache_mm import Item, KVCache, KVLayout, Namespace, Prompt, StateCache
from lmcache_mm.stores import open_store

NAMESPACE = Namespace(model="m")
PAGES, STEP = 8, 64
PROMPT = Prompt(range(200), [Item("picture", 20, 130)])


def states_of(pages: int = PAGES, heads: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(pages, heads, 16, 16, generator=generator)


def layout_of(states: torch.Tensor) -> KVLayout:
    return KVLayout.from_tensors([states], page_tokens=1, page_dim=0, opaque=True)


@pytest.fixture
def states():
    return states_of()


@pytest.fixture
def cache(states):
    with StateCache(layout_of(states), "mem://?capacity=16MiB", NAMESPACE, every_tokens=STEP) as opened:
        yield opened


def test_a_state_is_found_at_the_last_cut_that_leaves_a_token(cache, states):
    want = states[3].clone()
    for tokens in (64, 150, 200):
        assert cache.store(PROMPT, tokens, 3).result()
    assert not cache.store(PROMPT, 150, 3).result()
    assert cache.match(PROMPT) == 150  # the picture's end
    assert cache.match(PROMPT, limit=200) == 200
    assert cache.match(PROMPT, limit=149) == 64
    assert cache.match(PROMPT, limit=63) == 0
    assert cache.match(Prompt([*range(200), 7], PROMPT.items)) == 150
    assert cache.match(Prompt([*range(200), 7], PROMPT.items, turns=[200])) == 200
    states.fill_(-1)
    assert cache.retrieve(PROMPT, 150, 5).result()
    assert torch.equal(states[5], want)
    assert (states[[0, 1, 2, 3, 4, 6, 7]] == -1).all()


def test_states_of_other_content_or_tenants_are_never_found(cache):
    cache.store(PROMPT, 150, 3).result()
    for other in (
        Prompt(range(200), [Item("another", 20, 130)]),
        Prompt(range(1, 201), PROMPT.items),
        Prompt(range(200), PROMPT.items, salt="theirs"),
        Prompt(range(200), PROMPT.items, lora="adapter"),
    ):
        assert cache.match(other) == 0
        assert not cache.retrieve(other, 150, 4).result()


def test_states_of_another_shape_are_never_found(cache):
    cache.store(PROMPT, 64, 3).result()
    other = states_of(heads=3).reshape(PAGES, 3, 8, 32).repeat_interleave(2, 1)  # as many bytes
    with StateCache(layout_of(other), cache.backend, NAMESPACE, every_tokens=STEP) as opened:
        assert opened.match(PROMPT) == 0


def test_kv_of_equal_pages_is_never_taken_for_a_state(cache, states):
    pages = torch.zeros_like(states)
    with KVCache(layout_of(pages), cache.backend, NAMESPACE, chunk_tokens=1) as kv:
        assert kv.layout.fingerprint(1) == cache.layout.fingerprint(1)
        short = Prompt(range(PAGES))
        assert kv.store(short, range(PAGES)).result()
        assert cache.match(short, PAGES) == 0
        assert not cache.retrieve(short, PAGES, 5).result()
        other = Prompt(range(50, 50 + STEP + 1))
        assert cache.store(other, STEP, 3).result()
        assert kv.match(other) == 0


def test_a_lost_and_a_damaged_state_are_told(cache, states):
    cache.store(PROMPT, 64, 3).result()
    assert cache.match(PROMPT) == 64
    keys = cache._keys(PROMPT, [64])
    buffer = bytearray(cache.layout.payload_bytes(1))
    cache.backend.get_into(keys, [memoryview(buffer)])
    cache.backend.delete(keys)
    assert not cache.retrieve(PROMPT, 64, 5).result()
    cache.backend.put(keys, [memoryview(buffer)], checksums=[12345])
    assert not cache.retrieve(PROMPT, 64, 5).result()


def test_what_was_asked_is_counted(cache):
    names = ("queried_states", "hit_states", "restored_states", "stored_states", "hit_rate")
    assert cache.stats() == dict.fromkeys(names, 0)
    assert cache.match(PROMPT) == 0
    assert cache.store(PROMPT, 64, 3).result()
    assert not cache.store(PROMPT, 64, 3).result()  # it exists
    assert cache.match(PROMPT) == 64
    assert cache.match(PROMPT, limit=63) == 0
    assert cache.match(PROMPT) == 64
    assert cache.retrieve(PROMPT, 64, 5).result()
    assert not cache.retrieve(PROMPT, 128, 5).result()
    assert cache.stats() == dict(zip(names, (4, 2, 1, 1, 0.5), strict=True))


def test_what_a_tenant_stored_is_forgotten(cache):
    theirs = Prompt(range(200), salt="theirs")
    assert cache.store(theirs, 64, 3).result()
    assert cache.forget("theirs") == 1
    assert cache.match(theirs) == 0


def test_a_hit_of_both_ends_where_there_are_kv_and_a_state(states):
    """In one store, whose records of the two never meet."""
    kv = torch.randn(2, 16, 16, 8)
    layout = KVLayout.from_tensors([kv[0], kv[1]], page_tokens=16, page_dim=0, token_dim=1)
    store = open_store("mem://?capacity=16MiB")
    with (
        KVCache(layout, store, NAMESPACE, chunk_tokens=STEP) as attention,
        StateCache(layout_of(states), store, NAMESPACE, every_tokens=STEP) as recurrent,
    ):
        block_ids = list(range(13))
        attention.store(PROMPT, block_ids).result()
        recurrent.store(PROMPT, 128, 2).result()
        longer = Prompt([*range(200), *range(300, 400)], PROMPT.items)
        hit = recurrent.match(longer, limit=attention.match(longer))
        assert (attention.match(longer), hit) == (192, 128)
        assert recurrent.retrieve(longer, hit, 6).result()
        assert attention.retrieve(longer, block_ids[::-1], hit).result() == hit
    store.close()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c, _: c.store(PROMPT, 0, 1), ValueError, "tokens: expected 1 to 200"),
        (lambda c, _: c.retrieve(PROMPT, 201, 1), ValueError, "tokens: expected 1 to 200"),
        (lambda c, _: c.store(PROMPT, 64, PAGES), ValueError, "page: expected less than 8, got 8"),
        (lambda c, _: c.match([1, 2]), TypeError, "prompt: expected lmcache_mm.Prompt, got list"),
        (lambda c, _: c.store(None, 64, 1), TypeError, "prompt: expected lmcache_mm.Prompt, got NoneType"),
        (lambda _, s: StateCache(layout_of(s), None, NAMESPACE), TypeError, "store: expected a URL, .*, got NoneType"),
        (lambda c, _: c.match(PROMPT, limit=-1), ValueError, "limit: expected an integer"),
        (
            lambda _, s: StateCache(layout_of(s), "mem:", NAMESPACE, every_tokens=0),
            ValueError,
            "every_tokens: expected",
        ),
        (lambda _, s: StateCache(s, "mem:", NAMESPACE), TypeError, "layout: expected lmcache_mm.KVLayout, got Tensor"),
        (
            lambda _, s: StateCache(
                KVLayout.from_tensors([s], page_tokens=6, page_dim=0, token_dim=1), "mem:", NAMESPACE
            ),
            ValueError,
            r"layout: expected opaque pages \(KVLayout with opaque=True\)",
        ),
    ],
)
def test_bad_arguments_are_refused(cache, states, call, error, text):
    with pytest.raises(error, match=text):
        call(cache, states)


def test_a_store_smaller_than_a_state_is_refused(states):
    layout = layout_of(states)
    size = layout.payload_bytes(1)
    with pytest.raises(ValueError, match=f"store: expected a capacity of at least a state's {size} bytes, got 64"):
        StateCache(layout, "mem://?capacity=64", NAMESPACE)


def test_after_close_there_is_one_clear_error(states):
    cache = StateCache(layout_of(states), "mem://?capacity=1MiB", NAMESPACE)
    cache.close()
    for call in (
        *(lambda: cache.match(PROMPT, 256), lambda: cache.store(PROMPT, 64, 1), lambda: cache.retrieve(PROMPT, 64, 1)),
        *(lambda: cache.forget("a"), cache.stats),
    ):
        with pytest.raises(RuntimeError, match="cache: it is closed"):
            call()
