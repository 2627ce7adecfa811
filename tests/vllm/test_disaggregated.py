"""Encode, prefill and decode in separate engines: pictures pass through shared memory, KV through a server."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import servers
import tiny_qwen2_vl
from combinations import CHOSEN, environment, pytestmark, python  # noqa: F401
from disaggregated import TIMEOUT_S, Engine, ec_config, encode, kv_config, prefill, question, started, text
from lmcache_mm.commands.cli import main as lmcache_mm

WAIT = {"lmcache_mm": {"wait": True}}
ODD: list[Any] = [None, True, False, 0, -1.5, "abc", [], ["lmcache_mm"], {}]
ODD += [{"lmcache_mm": one} for one in (*ODD, {"wait": "yes", "load": 0, "store": []}, {"lmcache_mm": {"wait": True}})]


class Engines(dict[str, Engine]):
    """alone: without a connector. The KV passes through `valkey`."""

    valkey: servers.Server

    def answer(self, request: dict[str, Any]) -> str:
        return text(self["decode"].chat(prefill(self["prefill"], encode(self["encode"], request))))


@pytest.fixture(scope="module", params=CHOSEN or ("0.33-V1",))
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if request.param.endswith("V2"):
        pytest.skip("vLLM's worker for CPUs has no V2 runner for an engine that only encodes")
    folder = tmp_path_factory.mktemp("disaggregated")
    tiny_qwen2_vl.write_checkpoint(folder / "vlm")
    shm = f"shm:///test{uuid.uuid4().hex}"
    valkey = servers.valkey(folder)
    here, there = f"{shm}?capacity=64MiB", valkey.url
    configs: dict[str, dict[str, Any]] = {
        "alone": {},
        "encode": {"ec": ec_config("ec_producer", here)},
        "prefill": {"ec": ec_config("ec_consumer", here), "kv": kv_config("kv_producer", there)},
        "decode": {"kv": kv_config("kv_consumer", there)},
    }
    engines = Engines((name, Engine(folder / "vlm", folder / f"{name}.log", one)) for name, one in configs.items())
    engines.valkey = valkey
    try:
        with started(python(request.param), environment(request.param, LMCACHE_MM_SECRET=uuid.uuid4().hex), engines):
            yield engines
    finally:
        valkey.stop()
        lmcache_mm(["clear", shm])


def grown(engine: Engine, before: dict[str, float], name: str) -> float:
    return engine.counts().get(name, 0.0) - before.get(name, 0.0)


def test_every_picture_is_encoded_once_and_every_prompt_computed_once_and_answers_are_those_of_one_engine(engines):
    asked = [question("what is it?", 1), question("which of the two?", 2, 3), question("no picture at all " * 8)]
    before = {name: engine.counts() for name, engine in engines.items()}
    tokens = 0
    for one in asked:
        alone = engines["alone"].chat(one)
        tokens += alone["usage"]["prompt_tokens"]
        assert engines.answer(one) == text(alone)
    engines["prefill"].counted("encoder_loaded_items", before["prefill"].get("encoder_loaded_items", 0) + 3)
    engines["decode"].counted("loaded_tokens", before["decode"].get("loaded_tokens", 0) + tokens)
    assert grown(engines["prefill"], before["prefill"], "encoder_loaded_items") == 3
    assert grown(engines["decode"], before["decode"], "loaded_tokens") == tokens  # the last of them is computed again
    for name, nothing in (
        ("prefill", ("queried_tokens", "loaded_tokens", "encoder_stored_items")),
        ("decode", ("stored_tokens",)),
        ("encode", ("encoder_loaded_items",)),
    ):
        for count in nothing:
            assert grown(engines[name], before[name], count) == 0, (name, count)


def test_a_picture_that_the_store_has_is_not_encoded_again_and_is_promised_all_the_same(engines):
    once = encode(engines["encode"], question("what is it?", 10))
    prefill(engines["prefill"], once)  # which waits until the store has it
    before = engines["encode"].counts()
    again = encode(engines["encode"], question("and this?", 10))  # under another uuid
    assert again["ec_transfer_params"] == once["ec_transfer_params"]
    engines["encode"].counted("encoder_loaded_items", before.get("encoder_loaded_items", 0) + 1)
    assert grown(engines["encode"], before, "encoder_loaded_items") == 1


def test_an_engine_waits_for_what_comes_later_than_the_request(engines):
    one = question("late?", 20)
    expected = text(engines["alone"].chat(one))
    before = engines["decode"].counts()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engines["decode"].chat, {**one, "kv_transfer_params": WAIT})
        time.sleep(1)
        assert not answer.done()
        prefill(engines["prefill"], one)
        got = answer.result()
    assert text(got) == expected
    tokens = got["usage"]["prompt_tokens"]
    assert engines["decode"].counted("loaded_tokens", before.get("loaded_tokens", 0) + tokens) == (
        before.get("loaded_tokens", 0) + tokens
    )
    assert grown(engines["decode"], before, "broken_promises") == 0


@pytest.mark.parametrize(
    "name, params, count",
    [("decode", "kv", "broken_promises"), ("prefill", "ec", "encoder_broken_promises")],
)
def test_what_was_promised_and_never_comes_is_waited_for_as_long_as_timeout_s_and_computed(
    engines, name, params, count
):
    engine, one = engines[name], question("never?", 30)
    expected, before = text(engines["alone"].chat(one)), engine.counts().get(count, 0.0)
    begun = time.monotonic()
    assert text(engine.chat({**one, f"{params}_transfer_params": WAIT})) == expected
    waited = time.monotonic() - begun
    assert TIMEOUT_S - 0.1 < waited < TIMEOUT_S + 5
    assert engine.counted(count, before + 1) == before + 1
    begun = time.monotonic()
    assert text(engine.chat(question("never?", 31))) == text(engines["alone"].chat(question("never?", 31)))
    assert time.monotonic() - begun < TIMEOUT_S - 0.5  # nothing was promised


@pytest.mark.parametrize("name", ["encode", "prefill", "decode"])
def test_params_of_any_type_end_no_engine_and_make_none_wait(engines, name):
    engine = engines[name]
    before = engine.counts()
    for odd in ODD:
        for params in ("kv_transfer_params", "ec_transfer_params"):
            engine.refuses({**question("odd?", 40, max_tokens=1), params: odd})
            engine.refuses({**question("odd?", 40, max_tokens=1), "vllm_xargs": {params: odd}})
    for odd in ("abc", 7, -1.5, ["abc", 7]):  # vLLM passes them on unchecked; with kv_transfer_params it fails itself
        assert not engine.refuses({**question("odd?", 41, max_tokens=1), "vllm_xargs": {"ec_transfer_params": odd}})
    if name == "encode":
        assert "ec_transfer_params" in encode(engine, question("odd?", 42))
    else:
        assert text(engine.chat(question("odd?", 42))) == text(engines["alone"].chat(question("odd?", 42)))
    for count in ("broken_promises", "encoder_broken_promises"):
        assert grown(engine, before, count) == 0, count


def test_a_store_that_fails_while_a_request_waits_for_it_has_the_request_computed(engines):
    """Must be the last test of these engines."""
    one = question("and now?", 50)
    expected = text(engines["alone"].chat(one))
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engines["decode"].chat, {**one, "kv_transfer_params": WAIT})
        time.sleep(1)
        assert not answer.done()
        engines.valkey.stop()
        assert text(answer.result()) == expected
    assert time.monotonic() - begun < TIMEOUT_S + 5
    assert engines.answer(question("after?", 51)) == text(engines["alone"].chat(question("after?", 51)))
