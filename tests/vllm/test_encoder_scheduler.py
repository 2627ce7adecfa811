"""The encoder connector's claims in the scheduler, and its messages to workers, without an engine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import junk
from lmcache_mm import Namespace
from lmcache_mm.encoder_cache import output_key, pack, write
from lmcache_mm.lane import Lane
from lmcache_mm.prompt import owner_of
from lmcache_mm.stores import open_store
from lmcache_mm.vllm import identity

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)

NAMESPACE = Namespace(model="m")


class Data(dict[str, Any]):
    """An item's processed data, as in vLLM: fields with data."""


def item(content: int, identifier: str, offset: int = 0, embeds: int = 4, **fields: Any) -> Any:
    pixels = SimpleNamespace(data=torch.full((8,), content), field=SimpleNamespace(keep_on_cpu=False))
    data = Data(fields or {"pixel_values": pixels})
    place = SimpleNamespace(offset=offset, length=embeds)
    return SimpleNamespace(data=data, modality="image", identifier=identifier, mm_position=place)


def request(name: str, *items: Any, salt: str | None = None, lora: Any = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        mm_features=list(items),
        cache_salt=salt,
        lora_request=lora,
        ec_transfer_params=None,
        kv_transfer_params=None,
        get_num_encoder_embeds=lambda i: items[i].mm_position.length,
    )


def step(tokens: int = 1, encode: dict[str, list[int]] | None = None, freed: list[str] | None = None) -> Any:
    return SimpleNamespace(
        total_num_scheduled_tokens=tokens, scheduled_encoder_inputs=encode or {}, free_encoder_mm_hashes=freed or []
    )


def config(tower_lora: bool = False, role: str = "ec_both") -> Any:
    transfer = SimpleNamespace(is_ec_producer=role != "ec_consumer", is_ec_consumer=role != "ec_producer")
    lora = SimpleNamespace(enable_tower_connector_lora=tower_lora)
    return SimpleNamespace(lora_config=lora, ec_transfer_config=transfer, instance_id="engine")


@pytest.fixture(scope="module")
def encoder_scheduler() -> Any:
    """Imported here, since an import at the top would load vLLM in every test run."""
    return importlib.import_module("lmcache_mm.vllm.encoder.scheduler")


@pytest.fixture
def store():
    store = open_store("mem://?capacity=1MiB")
    yield store
    store.close()


@pytest.fixture
def new_scheduler(encoder_scheduler, monkeypatch, store):
    monkeypatch.setattr(identity, "encoder_namespace_of", lambda *_: NAMESPACE)
    monkeypatch.setattr(identity, "weights_now", {})
    monkeypatch.setattr(encoder_scheduler, "open_store", lambda *_: store)
    opened = []

    def new(**options: Any) -> Any:
        settings = encoder_scheduler.EncoderOptions("shm:///unused", timeout_s=2)
        opened.append(encoder_scheduler.EncoderScheduler(config(**options), settings))
        return opened[-1]

    yield new
    for one in opened:
        for lane in (one._identifying, one._fetches):
            lane.close()


@pytest.fixture
def scheduler(new_scheduler):
    return new_scheduler()


def keep(store: Any, of: Any, rows: int = 4, **wishes: Any) -> torch.Tensor:
    """Stores an output of an item's content."""
    output = torch.full((rows, 3), float(of.data["pixel_values"].data[0]))
    digest = identity.digest_of_data("image", of.data)
    salt = wishes.get("salt")
    key = output_key(NAMESPACE.root(salt, wishes.get("lora")), digest, "image")
    write(store, key, pack(output), owner_of(salt), store.moment())
    return output


def ensure(scheduler: Any, one: Any, computed: int = 0) -> None:
    until = time.monotonic() + 10
    while not scheduler.ensure(one, computed):
        scheduler._at_once_left_s = 0.001
        assert time.monotonic() < until


def test_what_the_store_has_is_claimed_for_its_request_and_sent_with_the_step(scheduler, store):
    known, new = item(1, "a"), item(2, "b", offset=10)
    output = keep(store, known)
    one = request("1", known, new)
    ensure(scheduler, one)
    assert [scheduler.claims(name) for name in ("a", "b")] == [True, False]
    scheduler.plan(one, 0)
    scheduler.plan(one, 1)
    metadata = scheduler.plan_step(step(encode={"1": [1]}))
    assert list(metadata.loads) == ["a"]
    assert torch.equal(metadata.loads["a"].unpack(torch.device("cpu")), output)
    assert list(metadata.saves) == ["b"]
    assert metadata.saves["b"].key == output_key(NAMESPACE.root(), identity.digest_of_item(new), "image")
    assert not scheduler.claims("a")
    assert not scheduler.plan_step(step()).loads


def test_a_claim_is_one_requests_and_another_may_have_other_data_under_that_identifier(scheduler, store):
    keep(store, item(1, "a"))
    ensure(scheduler, request("1", item(1, "a")))
    assert scheduler.claims("a")
    ensure(scheduler, request("2", item(2, "a")))
    assert not scheduler.claims("a")


ODD = [None, True, 0, 1.5, "abc", ["lmcache_mm"], {}]
ODD += [{"lmcache_mm": odd} for odd in (*ODD, {"load": "no", "store": 0, "wait": []})]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_request_whose_params_are_odd_is_served_as_one_without(scheduler, store, odd):
    keep(store, item(1, "a"))
    one = request("1", item(1, "a"), item(2, "b", offset=10))
    one.ec_transfer_params = one.kv_transfer_params = odd
    ensure(scheduler, one)
    assert scheduler.claims("a")
    assert list(scheduler.plan_step(step(encode={"1": [1]})).saves) == ["b"]


def test_wishes_are_those_of_the_connectors_own_params_else_of_the_others_which_cannot_make_it_wait():
    options = importlib.import_module("lmcache_mm.vllm.options")

    def said(**wishes: Any) -> Any:
        return {"lmcache_mm": wishes}

    for params, wishes in (
        ([], {}),
        ([said(load=False)], {"load": False}),
        ([said(wait=True)], {"wait": True}),
        ([said(load=True), said(load=False, store=False)], {"store": False}),
        ([None, said(load=False, wait=True)], {"load": False}),
        ([said(load=0, store="", wait=1), said(store=False)], {"store": False}),
    ):
        assert options.wishes_of(*(params or [None])) == options.Wishes(**wishes)


WAIT = {"lmcache_mm": {"wait": True}}


def waits_s(scheduler: Any, one: Any) -> float:
    begun = time.monotonic()
    ensure(scheduler, one)
    return time.monotonic() - begun


def test_a_promised_output_is_waited_for_until_it_comes(scheduler, store):
    one = request("1", item(1, "a"))
    one.ec_transfer_params = WAIT
    timer, begun = threading.Timer(0.5, keep, (store, one.mm_features[0])), time.monotonic()
    timer.start()
    ensure(scheduler, one)
    assert time.monotonic() - begun >= 0.5
    timer.join()
    assert scheduler.claims("a")
    assert scheduler.stats.data["encoder_queried_items"] == 1
    assert "encoder_broken_promises" not in scheduler.stats.data


@pytest.mark.parametrize("read_s", [0, 0.7])
def test_what_does_not_come_in_time_is_encoded_and_what_did_is_claimed_and_nobody_else_waits(
    scheduler, store, encoder_scheduler, monkeypatch, read_s
):
    """Also if the time ends during a read of the store."""
    read = encoder_scheduler.read_description
    monkeypatch.setattr(encoder_scheduler, "read_description", lambda *of: time.sleep(read_s) or read(*of))
    keep(store, item(2, "b"))
    one = request("1", item(1, "a"), item(2, "b", offset=10))
    one.ec_transfer_params = WAIT
    assert waits_s(scheduler, one) > 1.9
    assert [scheduler.claims(name) for name in "ab"] == [False, True]
    assert scheduler.stats.data["encoder_broken_promises"] == 1
    assert waits_s(scheduler, one) < 1.9  # once
    other = request("2", item(1, "a"))
    other.kv_transfer_params = WAIT  # another connector's
    assert waits_s(scheduler, other) < 1.9


@pytest.mark.parametrize("how", ["fails", "lies", "reset", "encodes only"])
def test_what_cannot_come_is_not_waited_for(new_scheduler, store, monkeypatch, how):
    scheduler = new_scheduler(role="ec_producer" if how == "encodes only" else "ec_consumer")
    one = request("1", item(1, "a"))
    one.ec_transfer_params = WAIT
    module = importlib.import_module("lmcache_mm.vllm.encoder.scheduler")
    if how == "fails":
        monkeypatch.setattr(module, "read_description", lambda *_: 1 / 0)
    if how == "lies":
        keep(store, one.mm_features[0])
        monkeypatch.setattr(module, "read_payload", lambda *_: None)
    if how == "reset":
        identity.weights_now["engine"] = "after a reset"
    assert waits_s(scheduler, one) < 1.9
    assert not scheduler.claims("a")


def test_an_engine_that_only_encodes_promises_what_it_stores_or_the_store_has_and_nothing_else(new_scheduler, store):
    scheduler = new_scheduler(role="ec_producer")
    keep(store, item(1, "a"))
    both = request("both", item(1, "a"), item(2, "b", offset=10))
    ensure(scheduler, both)
    assert scheduler.claims("a")
    scheduler.plan(both, 0)
    assert scheduler.promise(both) is None  # b is not encoded yet
    assert not scheduler.plan_step(step(encode={"both": [1]})).loads  # vLLM does not let such an engine load
    assert scheduler.promise(both) == {"lmcache_mm": {"wait": True, "item_indices": [0, 1]}}
    again = request("again", item(2, "b"))  # in the engine, but not in the store
    ensure(scheduler, again)
    assert scheduler.promise(again) is None
    keep(store, item(2, "b"))
    later = request("later", item(2, "c"))
    ensure(scheduler, later)
    assert scheduler.promise(later) == {"lmcache_mm": {"wait": True, "item_indices": [0]}}
    loads = new_scheduler()
    ensure(loads, later)
    assert loads.promise(later) is None


def test_an_engine_that_only_loads_stores_nothing(new_scheduler):
    scheduler = new_scheduler(role="ec_consumer")
    ensure(scheduler, request("1", item(1, "a")))
    assert not scheduler.plan_step(step(encode={"1": [0]})).saves


def test_all_fields_are_known_that_vllm_declares_as_metadata():
    """For all its models: otherwise an item without a picture could pass for one."""
    assert VLLM is not None
    assert VLLM.origin is not None
    overlay = Path(__file__).parent.parent.parent / ".venv" / "vllm-0.33" / "vllm"
    for vllm in {Path(VLLM.origin).parent, *overlay.parent.glob("vllm")}:
        sources = [path.read_text() for path in (vllm / "model_executor" / "models").glob("*.py")]
        declared = [source for source in sources if "embedding_fields = {" in source]
        fields = {name for source in declared for name in re.findall(r'"(\w+)": *"metadata"', source)}
        assert "image_grid_thw" in fields
        assert fields <= identity.METADATA_FIELDS


def test_an_identifier_of_two_contents_in_one_request_is_not_claimed_and_saved_as_what_is_encoded(scheduler, store):
    one = request("1", item(1, "a"), item(2, "a", offset=10))
    keep(store, one.mm_features[1])
    ensure(scheduler, one)
    assert not scheduler.claims("a")
    saved = scheduler.plan_step(step(encode={"1": [0]})).saves["a"]
    assert saved.key == output_key(NAMESPACE.root(), identity.digest_of_item(one.mm_features[0]), "image")


def test_an_output_of_another_form_is_not_claimed(scheduler, store):
    keep(store, item(1, "a"), rows=5)
    ensure(scheduler, request("1", item(1, "a")))
    assert not scheduler.claims("a")


def test_other_tenants_claim_nothing(scheduler, store):
    keep(store, item(1, "a"), salt="s")
    for salt, claimed in (("t", False), (None, False), ("s", True)):
        ensure(scheduler, request(str(salt), item(1, "a"), salt=salt))
        assert scheduler.claims("a") == claimed


def test_adapters_count_where_they_change_the_encoder_and_only_there(new_scheduler, store, monkeypatch):
    monkeypatch.setattr(identity.Adapters, "digest", lambda _, adapter: adapter)
    keep(store, item(1, "a"), lora="l")
    keep(store, item(2, "b"))
    for tower, lora, claimed in ((True, "l", "a"), (True, "k", ""), (True, None, "b"), (False, "l", "b")):
        scheduler = new_scheduler(tower_lora=tower)
        ensure(scheduler, request("1", item(1, "a"), item(2, "b", offset=10), lora=lora))
        assert [name for name in "ab" if scheduler.claims(name)] == list(claimed)


def test_items_that_are_computed_or_in_vllms_own_cache_are_not_asked_for(scheduler, store):
    keep(store, item(1, "a"))
    assert scheduler.ensure(request("1", item(1, "a")), 4)
    one = request("2", item(1, "a"))
    ensure(scheduler, one)
    scheduler.plan(one, 0)
    scheduler.plan_step(step())
    assert scheduler.ensure(request("3", item(1, "a")), 0)
    assert not scheduler.claims("a")
    assert scheduler.stats.data["encoder_queried_items"] == 1
    scheduler.plan_step(step(freed=["a"]))
    ensure(scheduler, request("4", item(1, "a")))
    assert scheduler.claims("a")


def test_a_load_waits_for_a_step_that_workers_look_at_or_until_vllm_forgets_the_item(scheduler, store):
    """A request may be preempted in the step that should have loaded for it."""
    for i, name in ((1, "a"), (2, "b")):
        keep(store, item(i, name))
        one = request(name, item(i, name))
        ensure(scheduler, one)
        scheduler.plan(one, 0)
    assert not scheduler.plan_step(step(tokens=0)).loads
    assert list(scheduler.plan_step(step(freed=["b"])).loads) == ["a"]


def test_an_output_that_is_claimed_stays_whatever_becomes_of_the_record(scheduler, store):
    output = keep(store, item(1, "a"))
    one = request("1", item(1, "a"))
    ensure(scheduler, one)
    store.close()
    scheduler.plan(one, 0)
    assert torch.equal(scheduler.plan_step(step()).loads["a"].unpack(torch.device("cpu")), output)


def test_a_request_without_what_is_to_be_encoded_is_reported_and_never_scheduled(scheduler):
    on_cpu = SimpleNamespace(data=torch.tensor([1, 2, 2]), field=SimpleNamespace(keep_on_cpu=True))
    sizes = SimpleNamespace(data=torch.tensor([28, 28]), field=SimpleNamespace(keep_on_cpu=False))
    for name, fields in (("1", {"grid": on_cpu}), ("2", {"image_sizes": sizes})):
        one = request(name, item(1, "a", **fields))
        until = time.monotonic() + 10
        while not (unavailable := scheduler.take_unavailable()):
            assert not scheduler.ensure(one, 0)
            assert time.monotonic() < until
        assert unavailable == {name}


@pytest.mark.parametrize(
    "how", ["in the engine", "resumable", "identification hangs", "adapter unknown", "behind a hit"]
)
def test_a_request_without_what_is_to_be_encoded_is_refused_whatever_else_is_known(new_scheduler, how):
    """vLLM may have its output now but lose it before it is needed; then nobody could compute it."""
    scheduler = new_scheduler(tower_lora=how == "adapter unknown")
    lora = SimpleNamespace(lora_name="a", lora_path="none/such") if how == "adapter unknown" else None
    grid = {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 4, 4]))}
    asked = request("asks", item(1, "x", **grid), lora=lora)
    asked.resumable = how == "resumable"
    if how == "in the engine":
        shown = request("shows", item(1, "x"))
        ensure(scheduler, shown)
        scheduler.plan_step(step(encode={"shows": [0]}))
    if how == "identification hangs":
        scheduler._identifying.submit(lambda _: time.sleep(0.5))
    assert not scheduler.ensure(asked, 100 if how == "behind a hit" else 0)
    assert scheduler.take_unavailable() == {"asks"}


def test_after_a_reset_nothing_from_before_is_claimed(scheduler, store):
    keep(store, item(1, "a"))
    one = request("1", item(1, "a"))
    ensure(scheduler, one)
    identity.weights_now["another engine"] = "after a reset"
    ensure(scheduler, one)
    assert scheduler.claims("a")
    identity.weights_now["engine"] = "after a reset"
    ensure(scheduler, one)
    assert not scheduler.claims("a")


def test_outputs_that_wait_are_bounded_and_shared(encoder_scheduler, scheduler, store, monkeypatch):
    keep(store, item(1, "a"))
    keep(store, item(2, "b"))
    monkeypatch.setattr(encoder_scheduler, "MOST_HELD_BYTES", 60)  # each takes 48
    for name in ("1", "2"):
        ensure(scheduler, request(name, item(1, "a")))
        assert scheduler.claims("a")
    ensure(scheduler, request("3", item(2, "b")))
    assert not scheduler.claims("b")


def test_an_items_digest_is_computed_once_as_long_as_vllm_hands_on_the_same_data(monkeypatch):
    one = item(1, "a")
    digest = identity.digest_of_item(one)
    assert digest == identity.digest_of_data("image", one.data)
    monkeypatch.setattr(identity, "digest_of_data", lambda *_: "another")
    assert identity.digest_of_item(one) == digest
    assert identity.digest_of_item(item(1, "a")) == "another"
    one.modality = "video"
    assert identity.digest_of_item(one) == "another"


def test_a_lane_that_hangs_is_waited_for_once(scheduler, store):
    keep(store, item(1, "a"))
    lane = Lane("test")
    scheduler._fetches, before = lane, scheduler._fetches
    try:
        lane.submit(lambda _: time.sleep(5))
        begun = time.monotonic()
        for name in ("1", "2"):
            ensure(scheduler, request(name, item(1, "a")))
            assert not scheduler.claims("a")
        assert 2 <= time.monotonic() - begun < 4.5
        assert scheduler.stats.data["encoder_failed_lookups"] == 2
    finally:
        lane.close()
        scheduler._fetches = before


def test_items_of_a_sessions_later_parts_are_identified_claimed_and_stored(scheduler, store):
    later, new = item(2, "b", offset=10), item(3, "c", offset=20)
    keep(store, later)
    session = request("1", item(1, "a"))
    ensure(scheduler, session)
    scheduler.plan_step(step(encode={"1": [0]}))
    session.mm_features += [later, new]
    session.get_num_encoder_embeds = lambda i: session.mm_features[i].mm_position.length
    assert not scheduler.claims("b")
    ensure(scheduler, session, computed=8)
    assert [scheduler.claims(name) for name in ("a", "b", "c")] == [False, True, False]
    scheduler.plan(session, 1)
    metadata = scheduler.plan_step(step(encode={"1": [2]}))
    assert list(metadata.loads) == ["b"]
    assert metadata.saves["c"].key == output_key(NAMESPACE.root(), identity.digest_of_item(new), "image")


def test_an_item_of_a_later_part_that_vllm_had_and_encodes_all_the_same_is_not_stored(scheduler):
    session = request("1", item(1, "a"))
    ensure(scheduler, session)
    scheduler.plan_step(step(encode={"1": [0]}))
    session.mm_features.append(item(1, "a", offset=10))
    assert scheduler.ensure(session, 8)
    assert not scheduler.plan_step(step(encode={"1": [1]})).saves


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(junk.FIELDS))
def test_no_exception_leaves_a_hook_whatever_a_request_holds(scheduler, fields):
    """Runs through a request's life in the encoder connector's scheduler."""
    one = request("junk", *fields["mm_features"])
    vars(one).update(fields)
    one.get_num_encoder_embeds = lambda i: fields["mm_features"][i].mm_position.length
    until = time.monotonic() + 10
    while not scheduler.ensure(one, 0):
        if scheduler.take_unavailable():
            break
        scheduler._at_once_left_s = 0.001
        assert time.monotonic() < until
    for i, feature in enumerate(one.mm_features):
        scheduler.claims(feature.identifier)
        scheduler.plan(one, i)
    metadata = scheduler.plan_step(step(encode={"junk": list(range(len(one.mm_features)))}))
    assert not metadata.loads
    scheduler.promise(one)
    scheduler.drop(one)
    scheduler.plan_step(step(freed=[feature.identifier for feature in one.mm_features]))
