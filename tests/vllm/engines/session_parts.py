"""Sessions, whose prompts come in parts."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

import models
from encoder import encoded
from small_engine import ask, counts, engine, free_blocks, image, prompt, store, wait_for_saves

V2 = os.environ.get("TRITON_INTERPRET") == "1"  # Model Runner V2


def put(llm: LLM, name: str, part: Any, tokens: int, more: bool = True) -> None:
    """Gives a session its next part; without `more` it is the last."""
    frontend = llm.llm_engine
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA, skip_clone=True
    )
    tasks = frontend.get_supported_tasks()
    one = frontend.input_processor.process_inputs(name, part, sampling, supported_tasks=tasks, resumable=more)
    one.external_req_id = name
    frontend.output_processor.add_request(one, None, None, 0)
    # In one process, the front end would keep writing to the engine's list.
    frontend.engine_core.add_request(msgspec.structs.replace(one, prompt_token_ids=list(one.prompt_token_ids)))


def steps(llm: LLM, got: dict[str, list[int]], until: Callable[[], bool]) -> None:
    """Runs steps and adds the sessions' answers."""
    end = time.monotonic() + 120
    while not until():
        assert time.monotonic() < end, f"no more answers than {got}"
        for one in llm.llm_engine.step():
            got.setdefault(one.request_id, []).extend(one.outputs[0].token_ids)


def converse(llm: LLM, *sessions: Sequence[Any], tokens: int = 12, queued: bool = False) -> list[list[list[int]]]:
    """The answers to each part of the sessions, which run concurrently. queued: no part waits for the answer before."""
    names = [uuid.uuid4().hex for _ in sessions]
    got: dict[str, list[int]] = {name: [] for name in names}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    end = {"prompt_token_ids": [0]}
    for i in range(max(len(parts) for parts in sessions)):
        for name, parts in zip(names, sessions, strict=True):
            if i < len(parts):
                put(llm, name, parts[i], tokens)
        wanted = [tokens * min(i + 1, len(parts)) for parts in sessions]
        if not queued:
            steps(llm, got, lambda wanted=wanted: all(len(got[n]) >= w for n, w in zip(names, wanted, strict=True)))
    for name in names:
        put(llm, name, end, tokens, more=False)
    steps(llm, got, lambda: not scheduler.requests)
    wait_for_saves()
    return [[got[name][i : i + tokens] for i in range(0, len(got[name]), tokens)] for name in names]


def as_one(llm: LLM | AsyncLLM, parts: Sequence[Any], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The whole prompt of a session after its last part."""
    encode = llm.get_tokenizer().encode
    token_ids = list(encode(parts[0]["prompt"]))
    for part, answer in zip(parts[1:], answers, strict=False):
        token_ids += [*answer[:-1], *encode(part["prompt"])]
    images = [one for part in parts for one in part.get("multi_modal_data", {}).get("image", ())]
    return {"prompt_token_ids": token_ids, "multi_modal_data": {"image": images}}


PARTS = [
    prompt("| what is it? ", image(0)),
    prompt("these are only words, and enough of them for a page"),
    prompt("and now | what? ", image(1)),
]
OTHER_PARTS = [*PARTS[:2], prompt("and now | what? ", image(2))]


def sessions() -> dict[str, Any]:
    """Sessions of several parts, with images in the first and third."""
    with engine() as llm:
        (parts,), (others,) = converse(llm, PARTS), converse(llm, OTHER_PARTS)
        whole, other = as_one(llm, PARTS, parts), as_one(llm, OTHER_PARTS, others)
        seen: dict[str, Any] = {"expected": [parts, others], "expected as one": ask(llm, whole, other)}
        (ones,) = converse(llm, PARTS, tokens=1)
        seen |= {"expected of one token": ones, "expected short": ask(llm, as_one(llm, PARTS, ones))}
        begun = as_one(llm, PARTS[:2], parts)
        seen["expected two parts"] = ask(llm, begun)
    with store() as url:
        with engine(url, extra={"opaque_tails": True}) as llm:
            blocks = free_blocks(llm)
            seen["first"] = converse(llm, PARTS)
            seen["two parts"] = ask(llm, begun)
            seen["as one, other image"] = ask(llm, other)
            seen["as one"] = ask(llm, whole)
            seen["again"] = [*converse(llm, PARTS), *converse(llm, OTHER_PARTS)]
            seen["as one, other image, again"] = ask(llm, other)
            seen["counts"] = counts(llm)
            seen["blocks"] = [blocks, free_blocks(llm)]
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["a new engine, as one"] = ask(llm, whole, other)
            seen["a new engine"] = [*converse(llm, PARTS), *converse(llm, OTHER_PARTS)]
    for name, options in {
        "both at once": {},
        "prefix caching": {"enable_prefix_caching": True},
        "steps of 32 tokens": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        **({} if V2 else {"sync": {"extra": {"load": "sync"}}}),
        "generated": {"extra": {"store_generated": True}},
    }.items():
        with store() as url, engine(url, **options) as llm:
            seen[name] = converse(llm, PARTS, OTHER_PARTS, queued=name == "both at once")
            seen[name] += converse(llm, PARTS, OTHER_PARTS)
            seen[f"{name}, as one"] = ask(llm, whole, other)
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:
        seen["of one token"] = converse(llm, PARTS, tokens=1)
        seen["short"] = ask(llm, as_one(llm, PARTS, ones))
    return seen


def sessions_in_trouble() -> dict[str, Any]:
    """Sessions that are preempted, aborted or lie about their images; encoder outputs."""
    many = [prompt(f"{word} " * 6) for word in ("alpha", "beta", "gamma")]
    long = [[one, prompt(f"{i} more words"), prompt(f"and | {i}?", image(i))] for i, one in enumerate(many)]
    with engine() as llm:
        seen: dict[str, Any] = {"expected": converse(llm, PARTS, *long, tokens=30)}
        (parts,) = converse(llm, PARTS)
        whole = as_one(llm, PARTS, parts)
        seen["expected as one"] = ask(llm, whole, prompt("| what is it? ", image(1)))
    with store() as url, engine(url, num_gpu_blocks_override=18, max_model_len=320, max_num_seqs=4) as llm:
        blocks = free_blocks(llm)
        seen["preempted"] = converse(llm, PARTS, *long, tokens=30, queued=True)
        seen["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        seen["loaded"] = counts(llm)["loaded_tokens"]
        seen["blocks"] = [blocks, free_blocks(llm)]
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:
        blocks, got = free_blocks(llm), {}
        for name, wanted in (("waiting", 12), ("running", 14)):
            put(llm, name, PARTS[0], 12)
            if name == "running":
                put(llm, name, PARTS[2], 12)
            steps(llm, got, lambda name=name, wanted=wanted: len(got.get(name, ())) >= wanted)
            llm.llm_engine.abort_request([name])
        seen["after the aborts"] = converse(llm, PARTS)
        seen["after the aborts, as one"] = ask(llm, whole)
        seen["aborted blocks"] = [blocks, free_blocks(llm)]
    lie = [PARTS[0], {**PARTS[2], "multi_modal_uuids": {"image": ["the other's"]}}]
    honest = {**prompt("| what is it? ", image(1)), "multi_modal_uuids": {"image": ["the other's"]}}
    lied = [PARTS[0], {**prompt("and now | what? ", image(2)), "multi_modal_uuids": {"image": ["the other's"]}}]
    with store() as url:
        options = {"extra": {"opaque_tails": True}, "mm_processor_cache_gb": 0}
        with engine(url, **options) as llm:
            converse(llm, lied)
            ask(llm, honest)
            seen["a lie"] = converse(llm, lie)
        with engine(url, **options) as llm:
            seen["after a lie"] = ask(llm, honest) + ask(llm, whole)
    with engine() as llm:
        seen["expected encoded"] = asking_sessions(llm, PARTS, OTHER_PARTS)
    with store() as url:
        with engine(encoder=url) as llm:
            seen["encoded"] = asking_sessions(llm, PARTS)
        with engine(url, encoder=url, extra={"opaque_tails": True}) as llm:
            seen["encoded before"] = asking_sessions(llm, PARTS, OTHER_PARTS)
            seen["encoded before, as one"] = ask(llm, whole)
            grid = {"image_grid_thw": torch.tensor([[1, 12, 12]])}
            nothing = {"prompt": PARTS[2]["prompt"], "multi_modal_data": {"image": grid}}
            put(llm, "nothing", PARTS[0], 12)
            put(llm, "nothing", nothing, 12)
            scheduler, got = llm.llm_engine.engine_core.engine_core.scheduler, {}
            steps(llm, got, lambda: not scheduler.requests)
            seen["nothing"] = got["nothing"]
            seen["afterwards"] = converse(llm, PARTS)
    return seen


def asking_sessions(llm: LLM, *sessions: Sequence[Any]) -> dict[str, Any]:
    """The sessions' answers, one after another, and what was encoded for them."""
    with encoded(llm) as seen:
        return {"rows": [row for one in sessions for row in converse(llm, one)], "encoded": list(seen)}


def sessions_served() -> dict[str, Any]:
    """Through vLLM's own interface, with the engine in a separate process."""
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def parts():
        for part in PARTS:
            yield StreamingInput(prompt=part)

    async def answers(url: str) -> list[Any]:
        connector = {
            "kv_connector": "LMCacheMMConnector",
            "kv_connector_module_path": "lmcache_mm.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"store": url, "chunk_tokens": 64, "opaque_tails": True},
        }
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(models.folder() / "vlm"),
                dtype="float32",
                enforce_eager=True,
                max_model_len=1024,
                max_num_seqs=16,
                block_size=32,
                num_gpu_blocks_override=256,
                enable_prefix_caching=False,
                limit_mm_per_prompt={"image": 3, "video": 1},
                kv_transfer_config=connector,
            )
        )
        got: list[Any] = []
        try:
            for about in (parts(), None, parts()):
                prompts = about or as_one(llm, PARTS, [got[0][i : i + 12] for i in (0, 12, 24)])
                token_ids: list[int] = []
                async for one in llm.generate(prompts, sampling, uuid.uuid4().hex):
                    token_ids += one.outputs[0].token_ids
                    cached = one.num_cached_tokens
                got.append(token_ids)
                if about is None:
                    got.append(cached)
        finally:
            llm.shutdown()
        return got

    with store() as url:
        return {"got": asyncio.run(answers(url))}
