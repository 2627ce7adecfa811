"""The KV connector's side in the scheduler, without an engine: its hooks' answers, and its messages to steps."""

# ruff: noqa: F811  # fixtures from another file
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import junk
from lmcache_mm.vllm import identity
from test_sessions import CHUNK, ENGINE, PAGE, Request, Vllm, feature, gate, new_vllm, pytestmark, vllm  # noqa: F401


def step_of(vllm: Vllm, blocks: dict[str, tuple[list[int], ...]], **scheduled: int) -> Any:
    """The metadata of a step that computes `scheduled` tokens of each request."""
    metadata = vllm.scheduler.plan_step(
        SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={},
            scheduled_new_reqs=[],
            kv_connector_block_state=SimpleNamespace(get_block_ids=blocks.get),
        )
    )
    return metadata


def told(vllm: Vllm, **news: Any) -> None:
    """Delivers the workers' news at the end of a step."""
    messages = pytest.importorskip("lmcache_mm.vllm.kv.messages")
    vllm.scheduler.take_output(
        SimpleNamespace(
            finished_recving=None,
            failed_recving=None,
            invalid_block_ids=None,
            kv_connector_worker_meta=messages.WorkerMetadata(**news),
        )
    )


def test_a_prompt_of_one_token_is_never_a_hit(vllm):
    """vLLM would treat a hit of it as none, and ask again forever."""
    one = Request("one", 1)
    vllm.begin(one)
    record = vllm.scheduler._requests["one"].tracker.records([0], 1)
    assert [(found.begin, found.end) for found in record] in ([], [(0, 1)])
    vllm.scheduler._look_up = lambda *_: [SimpleNamespace(begin=0, end=1, key=b"k" * 32)]
    assert vllm.scheduler.match(one, 0) == (0, False)


@pytest.mark.parametrize(
    ("found", "local", "answer"), [(64, 0, 64), (64, 32, 32), (64, 63, 0), (64, 64, 0), (33, 32, 1)]
)
def test_a_hit_that_saves_no_token_is_none(vllm, found, local, answer):
    """The last token is always computed."""
    one = Request("one", 64)
    vllm.begin(one)
    vllm.scheduler._look_up = lambda *_: [SimpleNamespace(begin=0, end=found, key=b"k" * 32)]
    assert vllm.scheduler.match(one, local) == (answer, answer > 0)


def test_steps_are_told_which_pages_they_write_while_saves_are_under_way(vllm):
    """The pages from the first computed token on, all pages in tables that are not transferred, and those of loads."""
    one, two = Request("one", 2 * CHUNK), Request("two", 3 * PAGE)
    for request in (one, two):
        vllm.begin(request)
    blocks = {"one": ([1, 2, 3, 4, 5], [20, 21]), "two": ([6, 7, 8, 9], [22])}
    first = step_of(vllm, blocks, one=2 * CHUNK)
    assert [page for save in first.saves for record in save.records for page in record.pages] == [1, 2, 3, 4]
    assert first.written == set()  # no save was in progress before
    one.num_computed_tokens = 2 * CHUNK
    one.all_token_ids.append(7)
    two.num_computed_tokens = PAGE
    second = step_of(vllm, blocks, one=1, two=2 * PAGE)
    assert second.written == {5, 20, 21, 7, 8, 9, 22}
    vllm.scheduler.plan_load(Request("three", 5), ([10, 11],), 5)
    vllm.scheduler.add(three := Request("three", 5))
    vllm.scheduler.plan_load(three, ([10, 11],), 5)
    assert {10, 11} <= step_of(vllm, blocks).written
    told(vllm, saves=len(first.saves) + len(second.saves))
    assert step_of(vllm, blocks, one=1).written == set()


def test_drafts_that_are_rejected_hide_no_page(vllm):
    """vLLM counts them as computed until they are rejected."""
    one = Request("one", CHUNK)
    vllm.begin(one)
    blocks = {"one": ([1, 2, 3, 4],)}
    assert step_of(vllm, blocks, one=CHUNK).saves
    one.all_token_ids += [7]
    one.num_computed_tokens = CHUNK + PAGE + 1
    assert step_of(vllm, blocks, one=1).written == {3, 4}


def test_weights_are_looked_at_once_the_engine_has_something_to_do(vllm):
    """A paused engine's step does not count: its weights may be about to change. Requests that have not begun get new
    keys; those that have are left out."""
    scheduler = vllm.scheduler
    begun, waiting = Request("begun", CHUNK), Request("waiting", CHUNK)
    for request in (begun, waiting):
        vllm.begin(request)
    begun.num_computed_tokens = PAGE
    scheduler.reset()
    assert step_of(vllm, {}).look is None
    assert scheduler.match(waiting, 0) == (None, False)
    number = step_of(vllm, {}).look
    assert number is not None
    told(vllm, weights={(number - 1, 0): b"w"})  # from a look before that reset
    assert scheduler.match(waiting, 0) == (None, False)
    told(vllm, weights={(number, 0): b"w"})
    assert scheduler._namespace.weights is identity.weights_now[ENGINE] is None
    while scheduler.match(waiting, 0)[0] is None:
        scheduler._at_once_left_s = 0.001
    assert scheduler._requests["waiting"].tracker is not None
    assert not scheduler._requests["begun"].saves
    roots = {scheduler._namespace.now.root()}
    for digest in (b"v", b"", b"v"):
        scheduler.reset()
        told(vllm, weights={(step_of(vllm, {}, waiting=1).look, 0): digest})
        roots.add(scheduler._namespace.now.root())
    assert len(roots) == 3  # those of startup, of v, and of weights that cannot be read


def saved(metadata: Any) -> list[bytes]:
    return [record.key for save in metadata.saves for record in save.records]


def test_a_request_that_vllm_computes_before_its_items_are_known_hides_whose_they_are(vllm, gate):
    """vLLM treats "ask again" as "no hit" if a request reads no cache, as with prompt_logprobs. Its encoder cache then
    has that request's picture under an identifier that stood for another picture."""
    one = Request("one", 2 * CHUNK, feature(1, "a", CHUNK + 4))
    two = Request("two", PAGE, feature(100, "a", 4))
    blocks = {"one": ([1, 2, 3, 4],), "two": ([5],)}
    vllm.begin(one)
    assert saved(step_of(vllm, blocks, one=CHUNK))
    one.num_computed_tokens = CHUNK
    vllm.scheduler.add(two)
    assert vllm.scheduler.match(two, 0)[0] is None
    assert not saved(step_of(vllm, blocks, two=PAGE))
    assert not saved(step_of(vllm, blocks, one=CHUNK))
    gate.set()
    vllm.identified()
    assert not saved(step_of(vllm, blocks, one=CHUNK))


def test_an_item_without_a_digest_takes_the_trust_from_its_identifier(vllm):
    odd = feature(1, "a", 4)
    odd.data["more"] = SimpleNamespace(data={"any": "thing"}, field=SimpleNamespace(keep_on_cpu=False))
    vllm.begin(Request("odd", PAGE, odd))
    one = Request("one", CHUNK, feature(2, "a", 4))
    vllm.begin(one)
    assert not saved(step_of(vllm, {"one": ([1, 2],)}, one=CHUNK))


def adapter(folder: Path, content: bytes, number: int = 1) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return SimpleNamespace(lora_name="adapter", lora_int_id=number, lora_path=str(folder))


def test_an_adapters_number_that_is_used_for_another_one_names_nothing(vllm, tmp_path):
    """vLLM keeps using the adapter that it has loaded."""
    blocks = {"one": ([1, 2],), "two": ([3, 4],), "three": ([5, 6],)}
    one, two, three = (Request(name, CHUNK) for name in blocks)
    one.lora_request = adapter(tmp_path / "a", b"a")
    two.lora_request = adapter(tmp_path / "b", b"b")
    three.lora_request = adapter(tmp_path / "b", b"b", 2)
    for request in (one, two, three):
        vllm.begin(request)
    assert not saved(step_of(vllm, blocks, one=CHUNK, two=CHUNK))
    assert len(saved(step_of(vllm, blocks, three=CHUNK))) == 1


def test_an_adapter_that_changes_while_its_requests_wait_is_not_saved_as_what_it_was(vllm, tmp_path):
    one = Request("one", 2 * CHUNK)
    one.lora_request = adapter(tmp_path / "a", b"a")
    vllm.begin(one)
    blocks = {"one": ([1, 2, 3, 4],)}
    assert saved(step_of(vllm, blocks, one=CHUNK))
    one.num_computed_tokens = CHUNK
    adapter(tmp_path / "a", b"another")
    assert not saved(step_of(vllm, blocks, one=CHUNK))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries({**junk.FIELDS, "all_token_ids": st.lists(st.integers(0, 1 << 33), min_size=1, max_size=99)})
)
def test_no_exception_leaves_a_hook_whatever_a_request_holds(vllm, fields):
    """Its life in the KV connector's scheduler: matched, computed, stored, and finished or loaded in vain."""
    tokens = len(fields["all_token_ids"])
    request = Request("junk", tokens)
    vars(request).update(fields)
    vllm.begin(request)
    vllm.identified()
    vllm.step(request)
    vllm.scheduler.plan_load(request, (list(range(1, 100)),), 1)
    (load, _) = vllm.scheduler._loading._under_way.popitem()[1]
    assert load.request_id == "junk"
    assert load.records
    vllm.scheduler._loading.take_planned()
    request.go_on(3)
    vllm.step(request)
    assert vllm.scheduler.promise(request) in (None, {"lmcache_mm": {"wait": True}})
    vllm.scheduler.drop(request)
