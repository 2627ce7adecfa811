"""Sessions of several parts, without an engine: their tokens' keys, and when which of them are stored."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_mm import Item, Namespace
from lmcache_mm.stores import open_store
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.kv.request_tracker import RequestTracker

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)

BASE = Namespace(model="m")
FINGERPRINT = b"layout"
NAMESPACE = BASE.with_layout(FINGERPRINT)
CHUNK, PAGE = 64, 32
ENGINE = "engine"


class Data(dict[str, Any]):
    """An item's processed data, as in vLLM: fields with data."""


def feature(content: int, identifier: str, offset: int, length: int = 20) -> Any:
    pixels = SimpleNamespace(data=torch.full((8,), content), field=SimpleNamespace(keep_on_cpu=False))
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(
        data=Data(pixel_values=pixels), modality="image", identifier=identifier, mm_position=place, content=content
    )


class Request(SimpleNamespace):
    """A request of vLLM's, which changes from part to part as vLLM changes it."""

    def __init__(self, name: str, tokens: int, *items: Any, wishes: Any = None) -> None:
        super().__init__(
            request_id=name,
            all_token_ids=list(range(tokens)),
            num_prompt_tokens=tokens,
            num_computed_tokens=0,
            num_preemptions=0,
            mm_features=list(items),
            cache_salt=None,
            lora_request=None,
            prompt_embeds=None,
            kv_transfer_params={"lmcache_mm": wishes},
            ec_transfer_params=None,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def go_on(self, tokens: int, *items: Any) -> None:
        """Drops the last sampled token and adds `tokens` more."""
        del self.all_token_ids[self.num_computed_tokens :]
        self.all_token_ids += range(1000, 1000 + tokens)
        self.num_prompt_tokens = self.num_tokens
        self.mm_features += items


def tracker_of(request: Request, whole: int = PAGE) -> RequestTracker:
    """The tracker of a request that came in one piece."""
    items = [
        Item(identity.digest_of_item(f), f.mm_position.offset, f.mm_position.length, "image")
        for f in request.mm_features
    ]
    return RequestTracker(items, NAMESPACE.root(), b"", request.num_prompt_tokens, CHUNK, whole)


def names(tracker: RequestTracker, request: Request) -> dict[int, bytes]:
    return {record.end: record.key for record in tracker.records(request.all_token_ids, request.num_prompt_tokens)}


class Vllm:
    """The connector's scheduler side, called as vLLM calls it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def begin(self, request: Request) -> None:
        self.scheduler.add(request)
        while self.scheduler.match(request, 0)[0] is None:
            self.scheduler._at_once_left_s = 0.001

    def step(self, *requests: Request) -> set[bytes]:
        """Computes all tokens of the requests and samples one. Returns the stored keys."""
        for request in requests:
            self.scheduler.follow(request)
        scheduled = {one.request_id: one.num_tokens - one.num_computed_tokens for one in requests}
        metadata = self.scheduler.plan_step(
            SimpleNamespace(
                num_scheduled_tokens=scheduled,
                total_num_scheduled_tokens=sum(scheduled.values()),
                scheduled_new_reqs=[],
                scheduled_spec_decode_tokens={},
                kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (list(range(1, 100)),)),
            )
        )
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.all_token_ids.append(7)
        return {one.key for save in metadata.saves for one in save.records}

    def identified(self) -> None:
        """Waits until all items are identified."""
        self.scheduler._identifying.submit(lambda _: None).future.result(10)


@pytest.fixture
def new_vllm(monkeypatch):
    module = importlib.import_module("lmcache_mm.vllm.kv.scheduler")
    options = importlib.import_module("lmcache_mm.vllm.options")
    messages = importlib.import_module("lmcache_mm.vllm.kv.messages")
    store = open_store("mem://?capacity=1MiB")
    monkeypatch.setattr(identity, "namespace_of", lambda *_: BASE)
    monkeypatch.setattr(identity, "weights_now", {})
    monkeypatch.setattr(module, "open_store", lambda _: store)
    opened = []

    def new(speculative: Any = None) -> Vllm:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
            kv_events_config=None,
            kv_transfer_config=SimpleNamespace(is_kv_consumer=True, is_kv_producer=True),
            use_v2_model_runner=False,
            instance_id=ENGINE,
            speculative_config=speculative,
        )
        groups = [options.Group(0, 0, ["layer"], PAGE, None, "float32", "full_attention")]
        scheduler = module.Scheduler(config, options.Options("shm:///unused", timeout_s=10), groups, CHUNK, PAGE)
        scheduler.learn_layouts({0: messages.Layout(FINGERPRINT, (0,), b"w")})
        opened.append(scheduler)
        return Vllm(scheduler)

    yield new
    for one in opened:
        one.close()


@pytest.fixture
def vllm(new_vllm):
    return new_vllm()


@pytest.fixture
def gate(monkeypatch):
    """While it is shut, items with a content from 100 on are not identified."""
    gate = threading.Event()
    digest_of_item = identity.digest_of_item

    def waiting(one: Any) -> str:
        if one.content >= 100:
            assert gate.wait(10)
        return digest_of_item(one)

    monkeypatch.setattr(identity, "digest_of_item", waiting)
    yield gate
    gate.set()


@pytest.mark.parametrize("whole", [1, PAGE])
@pytest.mark.parametrize("offset", [70, 79, 128])
def test_a_tracker_that_has_grown_has_the_names_of_a_prompt_in_one_piece(whole, offset):
    """The item may begin in the chunk in which the part before it ends."""
    request = Request("1", 70, feature(1, "a", 5))
    tracker = tracker_of(request, whole)
    before = names(tracker, request)
    request.num_computed_tokens = 70
    request.go_on(140, feature(2, "b", offset))
    grown = tracker.grown([Item(identity.digest_of_item(request.mm_features[1]), offset, 20)], request.all_token_ids)
    now, in_one_piece = names(grown, request), names(tracker_of(request, whole), request)
    assert in_one_piece.items() <= now.items()
    assert now.keys() == in_one_piece.keys() | before.keys()
    assert before.items() <= now.items()
    assert set(names(tracker, request).values()) & set(now.values()) == {
        key for end, key in now.items() if end <= offset and (end in before or end % CHUNK == 0)
    }


def test_what_is_stored_of_each_part_is_called_as_if_all_had_come_at_once(vllm):
    request = Request("1", 70, feature(1, "a", 5))
    vllm.begin(request)
    stored = vllm.step(request)
    for parts in range(3):
        for _ in range(5):
            stored |= vllm.step(request)
        offset = request.num_computed_tokens + 10
        request.go_on(90, feature(parts, f"item {parts}", offset))
        stored |= vllm.step(request)
        vllm.identified()
        stored |= vllm.step(request)
    last = tracker_of(request)
    last.records(request.all_token_ids, request.num_prompt_tokens)
    assert set(names(last, request).values()) <= stored


def test_nothing_behind_an_item_is_stored_before_it_is_known_and_all_of_it_is_then(vllm, gate):
    request = Request("1", 70, feature(1, "a", 5))
    vllm.begin(request)
    vllm.step(request)
    request.go_on(130, feature(100, "b", 130))
    stored = vllm.step(request)
    assert len(stored) == 1  # the chunk that ends at 128, before it
    assert not vllm.step(request)
    gate.set()
    vllm.identified()
    behind = vllm.step(request)
    expected = names(tracker_of(request), request)
    assert stored == {expected[128]}
    assert behind == {expected[end] for end in (192, 198 // PAGE * PAGE)}


def test_a_part_that_was_over_before_its_item_was_known_is_stored_in_the_next(vllm, gate):
    request = Request("1", 70)
    vllm.begin(request)
    vllm.step(request)
    request.go_on(60, feature(100, "b", 80))
    assert not vllm.step(request)
    first = Request("2", 0, *request.mm_features)
    first.all_token_ids, first.num_prompt_tokens = request.all_token_ids[:130], 130
    gate.set()
    vllm.identified()
    gate.clear()
    request.go_on(60, feature(101, "c", 150))
    stored = vllm.step(request)
    gate.set()
    expected = names(tracker_of(first), first)
    assert stored == {expected[96], expected[128]}  # after the item, and at the part's end


def test_parts_may_come_faster_than_their_items_are_known(vllm, gate):
    request = Request("1", 70)
    vllm.begin(request)
    stored = vllm.step(request)
    for content, offset in ((100, 80), (101, 150), (102, 220)):
        request.go_on(70, feature(content, f"item {content}", offset))
        stored |= vllm.step(request)
    gate.set()
    vllm.identified()
    stored |= vllm.step(request)
    expected = names(tracker_of(request), request)
    assert set(expected.values()) <= stored
    assert vllm.scheduler._requests["1"].tracker.items == tracker_of(request).items


def test_the_end_of_a_part_without_items_is_stored_once_it_is_known_to_be_one(vllm):
    request, busy = Request("1", 70), threading.Event()
    vllm.begin(request)
    vllm.step(request)
    vllm.scheduler._identifying.submit(lambda _: busy.wait(10))
    request.go_on(90)
    expected = names(tracker_of(request), request)
    assert vllm.step(request) == {expected[128]}
    busy.set()
    vllm.identified()
    assert vllm.step(request) == {expected[160]}


@pytest.mark.parametrize(("content", "kept"), [(100, False), (0, True)])
def test_what_another_request_computes_meanwhile_is_stored_once_the_item_is_known_to_be_the_same(
    vllm, gate, content, kept
):
    """vLLM's encoder may have computed the other's picture from the session's data, which came under the same name."""
    session, other = Request("1", 70), Request("2", 70, feature(content if kept else 0, "a", 5))
    for one in (session, other):
        vllm.begin(one)
    vllm.step(session)
    late = feature(content, "a", 80)
    late.content = 100
    session.go_on(60, late)
    assert not vllm.step(session, other)
    gate.set()
    vllm.identified()
    stored = vllm.step(other)
    assert stored == (set(names(tracker_of(other), other).values()) if kept else set())


def test_items_of_a_session_that_is_not_cached_are_looked_at_too(vllm):
    session = Request("1", 70, wishes={"load": False, "store": False})
    vllm.begin(session)
    vllm.step(session)
    session.go_on(60, feature(1, "a", 80))
    assert not vllm.step(session)
    other = Request("2", 70, feature(2, "a", 5))
    vllm.begin(other)
    assert not vllm.step(other)


def test_an_item_without_a_digest_ends_the_caching_of_its_session_only(vllm):
    session, other = Request("1", 70), Request("2", 70, feature(2, "a", 5))
    for one in (session, other):
        vllm.begin(one)
    assert vllm.step(session)
    nothing = feature(1, "b", 80)
    nothing.data = None
    session.go_on(60, nothing)
    vllm.step(session)
    vllm.identified()
    assert not vllm.step(session)
    session.go_on(100)
    vllm.step(session)
    vllm.identified()
    assert not vllm.step(session)
    assert vllm.step(other)


@pytest.mark.parametrize("lost", [True, False])
def test_a_session_whose_past_may_be_another_is_cached_no_more(vllm, lost):
    """It was preempted, and the step in progress then ended its part. vLLM 0.32 then forgets all of its tokens, but
    still counts them as part of the prompt."""
    request = Request("1", 70)
    vllm.begin(request)
    assert vllm.step(request)
    request.num_computed_tokens = 0
    if lost:
        request.go_on(150)
        request.num_prompt_tokens += 70
    else:
        request.all_token_ids += range(80)
        request.num_prompt_tokens = request.num_tokens
    vllm.scheduler.follow(request)
    vllm.identified()
    assert vllm.scheduler.match(request, 0) == (0, False)
    assert not vllm.step(request)
    vllm.identified()
    assert not vllm.step(request)


@pytest.mark.parametrize("outruns", [True, False])
def test_with_speculative_decoding_the_first_part_alone_is_cached_where_vllm_counts_too_many_tokens(
    new_vllm, monkeypatch, outruns
):
    monkeypatch.setattr(importlib.import_module("lmcache_mm.vllm.kv.scheduler"), "SESSIONS_OUTRUN_TOKENS", outruns)
    vllm = new_vllm(speculative=SimpleNamespace(method="ngram"))
    request = Request("1", 70)
    vllm.begin(request)
    assert vllm.step(request)
    request.go_on(150)
    stored = vllm.step(request)
    vllm.identified()
    stored |= vllm.step(request)
    assert bool(stored) != outruns


def test_a_session_that_is_preempted_in_a_later_part_is_matched_with_all_its_items(vllm, gate):
    request = Request("1", 70)
    vllm.begin(request)
    vllm.step(request)
    request.go_on(130, feature(100, "b", 80))
    vllm.step(request)
    request.num_computed_tokens = 0
    assert vllm.scheduler.match(request, 0) == (None, False)
    gate.set()
    until = time.monotonic() + 10
    while vllm.scheduler.match(request, 0)[0] is None and time.monotonic() < until:
        vllm.scheduler._at_once_left_s = 0.001
    named = vllm.scheduler._requests["1"].tracker.records(request.all_token_ids, request.num_prompt_tokens)
    assert {record.end: record.key for record in named}.items() >= names(tracker_of(request), request).items()
