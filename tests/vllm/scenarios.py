"""Scenarios on the real vLLM: python scenarios.py NAME FOLDER prints its findings as JSON, in the last line.

FOLDER holds the models. A process runs one scenario, with its engines one after another: vLLM leaves too much state.
Without arguments it forks such processes as a socket on its stdin asks for them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import model_runner_v2  # noqa: F401  # an engine's process that is spawned begins here

import msgspec
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import PoolerConfig
from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

import faulty
import routers
import tiny_qwen2_vl
from lmcache_mm.commands.cli import main as lmcache_mm
from lmcache_mm.prompt import owner_of
from lmcache_mm.stores import open_store
from lmcache_mm.vllm.kv import worker

V2 = os.environ.get("TRITON_INTERPRET") == "1"  # Model Runner V2
worker.SAVE_S = 5.0  # a busy machine must not look like a slow store
FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def image(seed: int, size: int = 168) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def video(seed: int) -> np.ndarray:
    return np.stack([np.asarray(image(seed + i, 112)) for i in range(4)])


def prompt(text: str, *images: Image.Image, **more: Any) -> dict[str, Any]:
    """text: every | stands for an image."""
    out: dict[str, Any] = {"prompt": f"<|im_start|>user\n{text.replace('|', IMAGE)}<|im_end|>\n", **more}
    if images:
        out["multi_modal_data"] = {"image": list(images)}
    return out


@contextmanager
def engine(
    store: str | None = None,
    *,
    model: str = "vlm",
    multi: Sequence[str] = (),
    encoder: str | None = None,
    **options: Any,
):
    """store: the connector's store; None: no connector. multi: one connector per store, inside MultiConnector.
    encoder: the encoder connector's store."""
    settings: dict[str, Any] = {
        "model": str(FOLDER / model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "block_size": 32,
        "num_gpu_blocks_override": 256,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if model in ("vlm", "qwen3_5"):
        settings["limit_mm_per_prompt"] = {"image": 3, "video": 1}
    extra = {"chunk_tokens": 64, **options.pop("extra", {})}
    ours = [
        {
            "kv_connector": "LMCacheMMConnector",
            "kv_connector_module_path": "lmcache_mm.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"store": url, **extra},
        }
        for url in ([store] if store else multi)
    ]
    if multi:
        settings["kv_transfer_config"] = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": ours},
        }
    elif store:
        settings["kv_transfer_config"] = ours[0]
    if encoder:
        settings["ec_transfer_config"] = {
            "ec_connector": "LMCacheMMEncoderConnector",
            "ec_connector_module_path": "lmcache_mm.vllm.encoder_connector",
            "ec_role": "ec_both",
            "ec_connector_extra_config": {"store": encoder, **options.pop("encoder_extra", {})},
        }
    llm = LLM(**{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ask(llm: LLM, *prompts: Any, sampling: SamplingParams = GREEDY, adapter: Any = None) -> list[dict[str, Any]]:
    """Asks one after another; returns {answer, prompt_tokens, cached, finish} for each."""
    return [one for p in prompts for one in ask_at_once(llm, [p], sampling, adapter)]


def ask_at_once(
    llm: LLM, prompts: Sequence[Any], sampling: SamplingParams = GREEDY, adapter: Any = None
) -> list[dict[str, Any]]:
    answers = llm.generate(list(prompts), sampling, use_tqdm=False, lora_request=adapter)
    wait_for_saves()
    return [row_of(one) for one in answers]


def wait_for_saves() -> None:
    """Returns when what the engine in this process saves is in the store, unless the store hangs."""
    if not has_kv_transfer_group():
        return
    group = get_kv_transfer_group()
    for one in getattr(group, "_connectors", [group]):
        side = one._worker
        while any(not job.done() for saving in side._saving for job in saving.jobs):
            if any(transfer.stores_stalled_s() > 2 for transfer in side._transfers):
                break
            time.sleep(0.001)


def row_of(one: RequestOutput) -> dict[str, Any]:
    return {
        "answer": list(one.outputs[0].token_ids),
        "prompt_tokens": len(one.prompt_token_ids or ()),
        "cached": one.num_cached_tokens,
        "finish": one.outputs[0].finish_reason,
    }


def counts(llm: LLM) -> dict[str, float]:
    prefix = "vllm:lmcache_mm_"
    counters = [metric for metric in llm.get_metrics() if hasattr(metric, "value")]  # histograms have none
    return {one.name.removeprefix(prefix): one.value for one in counters if one.name.startswith(prefix)}


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@contextmanager
def store(capacity: str = "64MiB"):
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    open_store(f"{url}?capacity={capacity}").close()
    yield f"{url}?capacity={capacity}"
    lmcache_mm(["clear", url])


def about_video(seed: int) -> dict[str, Any]:
    text = f"<|im_start|>user\n{VIDEO} what happens?<|im_end|>\n"
    return {"prompt": text, "multi_modal_data": {"video": [video(seed)]}}


QUESTIONS = {
    "first": prompt("| what is it? ", image(0)),
    "again": prompt("| what is it? ", image(0)),
    "other image": prompt("| what is it? ", image(1)),
    "other question": prompt("| and what is this, in other words? ", image(0)),
    "two images": prompt("| and | ?", image(0), image(1)),
    "swapped": prompt("| and | ?", image(1), image(0)),
    "one image at two places": prompt("| and | ?", image(0), image(0)),
    "the same two places": prompt("| and | ?", image(0), image(0)),
    "an image over chunks": prompt("some words before it, so that it begins late | what?", image(2, 336)),
    "and again": prompt("some words before it, so that it begins late | what?", image(2, 336)),
    "a video": about_video(0),
    "the same video": about_video(0),
    "another video": about_video(1),
    "text": prompt("only words, and enough of them that they fill more than a single page of thirty-two tokens"),
    "the same text": prompt(
        "only words, and enough of them that they fill more than a single page of thirty-two tokens"
    ),
}


def answers() -> dict[str, Any]:
    """Every kind of question, with and without the connector, over several engines and settings."""
    with engine() as llm:
        expected = ask(llm, *QUESTIONS.values())
    seen: dict[str, Any] = {"names": list(QUESTIONS), "expected": expected}
    with store() as url:
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["opaque tails"] = ask(llm, *QUESTIONS.values())
            seen["counts"] = counts(llm)
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["a new engine"] = ask(llm, *QUESTIONS.values())
        with engine(url, extra={"opaque_tails": True}, enable_prefix_caching=True) as llm:
            seen["prefix caching"] = ask(llm, *QUESTIONS.values())
            seen["16 at once"] = ask_at_once(llm, [*QUESTIONS.values(), *list(QUESTIONS.values())[:4]])
    with store() as url:
        with engine(url) as llm:
            seen["whole pages"] = ask(llm, *QUESTIONS.values())
        for load in ("sync", "layers"):
            try:
                with engine(url, extra={"load": load, "opaque_tails": True}) as llm:
                    seen[load] = ask(llm, *QUESTIONS.values())
            except ValueError as error:
                seen[load] = str(error)
    with store() as url, engine(url, max_num_batched_tokens=32, enable_chunked_prefill=True) as llm:
        seen["steps of 32 tokens"] = ask(llm, *QUESTIONS.values())
    with store() as url, engine(url, block_size=128, num_gpu_blocks_override=64, extra={"opaque_tails": True}) as llm:
        seen["pages of 128"] = ask(llm, *QUESTIONS.values())
    return seen


def wishing(wish: Any) -> SamplingParams:
    extra = {"kv_transfer_params": {"lmcache_mm": wish}}
    return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)


def identity() -> dict[str, Any]:
    """Clients that lie about their images; tenants; requests that disable the cache."""
    about = "| what is it? "
    one, two = prompt(about, image(0)), prompt(about, image(1))
    with engine() as llm:
        expected = ask(llm, one, two)
    seen: dict[str, Any] = {"expected": expected}
    with store() as url:
        with engine(url, extra={"opaque_tails": True}, mm_processor_cache_gb=0) as llm:
            # vLLM's identifiers are counters here, the same in every engine.
            seen["counters, first"] = ask(llm, one)
        with engine(url, extra={"opaque_tails": True}, mm_processor_cache_gb=0) as llm:
            seen["counters, other image"] = ask(llm, two)
            seen["counters, same image"] = ask(llm, one)
    with store() as url, engine(url, extra={"opaque_tails": True}, mm_processor_cache_gb=0) as llm:
        claimed = {"multi_modal_uuids": {"image": ["mine"]}}
        seen["claimed"] = ask(llm, {**one, **claimed})
    with store() as url:
        with engine(url, extra={"opaque_tails": True}) as llm:
            ours, theirs = {**one, "cache_salt": "ours"}, {**one, "cache_salt": "theirs"}
            seen["tenants"] = ask(llm, ours, theirs, one, ours, theirs, one)
        with engine(url, extra={"opaque_tails": True}) as llm:
            claimed = {"multi_modal_uuids": {"image": ["the other's"]}}
            seen["another engine's image under the same uuid"] = ask(llm, {**two, **claimed})
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["that uuid's own image"] = ask(llm, {**one, **claimed})
    with store() as url:
        claimed = {"multi_modal_uuids": {"image": ["the same"]}}
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["one uuid for two images"] = ask(llm, {**one, **claimed}, {**two, **claimed})
            seen["honest clients meanwhile"] = ask(llm, one, two)
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["honest clients later"] = ask(llm, one, two)
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:
        seen["no store"] = ask(llm, one, sampling=wishing({"store": False})) + ask(llm, one)
        seen["no load"] = ask(llm, one, sampling=wishing({"load": False})) + ask(llm, one)
        seen["malformed"] = [row for wish in (None, [], "no", 3) for row in ask(llm, one, sampling=wishing(wish))]
    with store() as url:
        claimed = {"multi_modal_uuids": {"image": ["poisoned"]}}
        with engine(url, extra={"opaque_tails": True}, mm_processor_cache_gb=0, enable_prefix_caching=True) as llm:
            # The first request is not cached, but vLLM's encoder cache keeps its image under the uuid.
            ask(llm, {**two, **claimed}, sampling=wishing({"load": False, "store": False}))
            ask(llm, {**one, **claimed})
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["behind a poisoned encoder cache"] = ask(llm, one, two)
    return seen


FAULTS = (
    *("Fails", "FailsToTell", "FailsToStore", "Lies", "Loses", "Corrupts"),
    *("Hangs", "HangsInPlace", "HangsToTell", "HangsToStore"),
)


def trouble(load: str) -> dict[str, Any]:
    """Stores that fail, lie, lose, corrupt and hang. Every fault has its own prompts."""
    with engine() as llm:
        questions = {fault: fault_questions(fault) for fault in FAULTS}
        seen: dict[str, Any] = {"expected": {fault: ask(llm, *q) for fault, q in questions.items()}}
    with store() as url, engine(url, extra={"opaque_tails": True, "load": load}) as llm:
        for fault, (one, two, words) in questions.items():
            ask(llm, one, words)
            blocks, before = free_blocks(llm), counts(llm)
            begun = time.monotonic()
            with faulty.misbehaving(llm, getattr(faulty, fault)):
                got = ask(llm, one, two, words, one, two, words)
                if fault == "HangsToStore":
                    time.sleep(5)  # nothing is stored while the store hangs
                    ask(llm, prompt("only words"))
                seconds = time.monotonic() - begun
            after = counts(llm)
            seen[fault] = {
                "got": got,
                "then": ask(llm, one, two, words),
                "counts": {name: after[name] - before[name] for name in after},
                "blocks": [blocks, free_blocks(llm)],
                "seconds": seconds,
            }
    return seen


def fault_questions(fault: str) -> list[dict[str, Any]]:
    words = f"{fault}: only words, and enough of them that they fill more than a single page of thirty-two tokens"
    return [prompt(f"{fault}: | what is it? ", image(0)), prompt(f"{fault}: | what is it? ", image(1)), prompt(words)]


def pressure() -> dict[str, Any]:
    """A KV cache that is too small; a request aborted during its load; generated tokens."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    long = [prompt(f"{word} " * 12) for word in ("alpha", "beta", "gamma")]
    many = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one, two), "expected long": ask(llm, *long, sampling=many)}
    with store() as url, engine(url, num_gpu_blocks_override=10, max_model_len=256, max_num_seqs=4) as llm:
        blocks = free_blocks(llm)
        seen["preempted"] = ask_at_once(llm, long, many) + ask_at_once(llm, long, many)
        seen["preempted blocks"] = [blocks, free_blocks(llm)]
        seen["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:
        ask(llm, one)
        blocks = free_blocks(llm)
        with faulty.misbehaving(llm, faulty.Hangs):
            llm.llm_engine.add_request("aborted", one, many)
            until = time.monotonic() + 20
            while (held := free_blocks(llm)) == blocks and time.monotonic() < until:
                llm.llm_engine.step()
            llm.llm_engine.abort_request(["aborted"])
            faulty.gate.set()
            seen["after the abort"] = ask(llm, two, one)
        seen["aborted blocks"] = [blocks, held, free_blocks(llm)]
    with store() as url:
        with engine(url, extra={"opaque_tails": True}) as llm:
            llm.apply_model(fail_behind_the_forward_pass)
            try:
                ask(llm, one)
            except RuntimeError as error:
                seen["failed"] = str(error)
            time.sleep(1)
        with engine(url, extra={"opaque_tails": True}) as llm:
            seen["after a step that failed"] = ask(llm, one)
    with store() as url, engine(url, extra={"store_generated": True}) as llm:
        first = ask(llm, long[0], sampling=many)[0]
        token_ids = llm.get_tokenizer().encode(long[0]["prompt"]) + first["answer"]
        seen["generated"] = ask(llm, {"prompt_token_ids": token_ids})
    return seen


def fail_behind_the_forward_pass(model: torch.nn.Module) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("as out of memory")

    model.forward = failing


def weights() -> dict[str, Any]:
    """Weights that change in place, as in training, and resets without a change."""
    one = prompt("| what is it? ", image(0))
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one)}
        llm.apply_model(change_weights)
        seen["expected changed"] = ask(llm, one)
    with store() as url:
        with engine(url, encoder=url, extra={"opaque_tails": True}, enable_prefix_caching=True) as llm:
            seen["first"] = ask(llm, one)
            llm.reset_prefix_cache(reset_connector=True)
            seen["reset"] = ask(llm, one)
            llm.reset_prefix_cache()
            seen["reset of vLLM alone"] = ask(llm, one)
            llm.apply_model(change_weights)
            llm.reset_prefix_cache()
            seen["changed"] = ask(llm, one)
            llm.reset_prefix_cache(reset_connector=True)
            seen["changed, again"] = ask(llm, one)
            llm.apply_model(change_weights)
            llm.reset_prefix_cache(reset_connector=True)
            seen["changed back"] = ask(llm, one)
        with engine(url, extra={"opaque_tails": True}) as llm:
            llm.apply_model(change_weights)
            llm.reset_prefix_cache()
            seen["another engine with that change"] = ask(llm, one)
        with engine(url, extra={"opaque_tails": True}) as llm:
            # As if the worker's model were not found.
            get_kv_transfer_group()._worker._engine = None
            ask(llm, one)
            llm.reset_prefix_cache(reset_connector=True)
            seen["weights that cannot be seen"] = ask(llm, one, one)
    return seen


def change_weights(model: torch.nn.Module) -> None:
    """Two calls cancel each other."""
    (name,) = [name for name, _ in model.named_parameters() if name.endswith("embed_tokens.weight")]
    model.get_parameter(name).data.neg_()


def pooling() -> dict[str, Any]:
    """Models whose pooling needs all tokens of a prompt in one step."""
    seen: dict[str, Any] = {}
    with store() as url:
        for kind in ("LAST", "MEAN", "CLS"):
            config = PoolerConfig(seq_pooling_type=kind, enable_chunked_processing=False)
            try:
                with engine(url, model="swa", runner="pooling", convert="embed", pooler_config=config) as llm:
                    (first,) = llm.embed([prompt("words " * 20)], use_tqdm=False)
                    wait_for_saves()
                    (again,) = llm.embed([prompt("words " * 20)], use_tqdm=False)
                    apart = np.abs(np.subtract(first.outputs.embedding, again.outputs.embedding)).max()
                    seen[kind] = [float(apart), again.num_cached_tokens]
            except Exception as error:
                seen[kind] = str(error)
    return seen


ODD = (
    None,
    "abc",
    5,
    [],
    [1],
    {},
    {"lmcache_mm": "abc"},
    {"lmcache_mm": {"load": "no", "store": [], "wait": 1, "x": {}}},
)


def odd_requests() -> dict[str, Any]:
    """Anything that clients may write into requests and vLLM passes on unchecked."""
    one, tiny = prompt("| what is it? ", image(0)), {"prompt_token_ids": [5]}
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one, tiny)}
    seen["ended"] = []
    with store() as url, engine(url, encoder=url, extra={"opaque_tails": True}) as llm:
        seen["one token"] = ask(llm, tiny, tiny, tiny)
        for odd in ODD:
            for names in (
                ("kv_transfer_params",),
                ("ec_transfer_params",),
                ("kv_transfer_params", "ec_transfer_params"),
            ):
                extra = dict.fromkeys(names, odd)
                sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
                try:
                    ended = ask(llm, one, sampling=sampling)
                except Exception as error:  # from vLLM's own front end
                    ended = [{"error": f"{type(error).__name__}: {error}"}]
                seen["ended"].append([extra, ended])
        seen["salts"] = []
        for salt in ("\ud800", "a" * 100_000, "\0", "ü"):
            try:
                ended = ask(llm, {**one, "cache_salt": salt})
            except Exception as error:
                ended = [{"error": f"{type(error).__name__}: {error}"}]
            seen["salts"].append(ended)
        seen["aborted"] = []
        for i, odd in enumerate(ODD):
            extra = {"kv_transfer_params": odd, "ec_transfer_params": odd}
            try:
                llm.llm_engine.add_request(f"aborted {i}", one, SamplingParams(max_tokens=100, extra_args=extra))
                llm.llm_engine.step()
                llm.llm_engine.abort_request([f"aborted {i}"])
            except Exception as error:
                seen["aborted"].append(f"{odd}: {type(error).__name__}: {error}")
        seen["afterwards"] = ask(llm, one, tiny)
    return seen


def pausing() -> dict[str, Any]:
    """Engines whose caches are reset during requests, as by a pause that keeps requests and clears caches."""
    questions = [prompt("| what is it? ", image(0)), prompt("| and | and what is it? ", image(1), image(2, 336))]
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask_at_once(llm, questions)}
    settings: dict[str, dict[str, Any]] = {
        "whole prompts": {},
        "steps of 64 tokens": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
        "prefix caching": {"enable_prefix_caching": True},
    }
    for name, options in settings.items():
        with store() as url, engine(url, extra={"opaque_tails": True}, **options) as llm:
            ask(llm, *questions)
            seen[name] = ask_and_reset(llm, questions, url, after_tokens=[1, 4, 7])
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:
        ask(llm, *questions)
        with faulty.misbehaving(llm, faulty.Hangs):
            seen["loading"] = ask_and_reset(llm, questions, url, after_tokens=[])
    return seen


def ask_and_reset(llm: LLM, prompts: Sequence[Any], url: str, after_tokens: list[int]) -> dict[str, Any]:
    """Answers of requests during which the caches are reset and the store is emptied, each time when the first answer
    has one of these numbers of tokens and no request is being loaded. Without any: once, first tried while the first
    request's load hangs."""
    running, blocks = llm.llm_engine, free_blocks(llm)
    requests = running.engine_core.engine_core.scheduler.requests
    streaming = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)  # GREEDY reports only the end by now
    for i, one in enumerate(prompts):
        running.add_request(str(i), one, streaming)
    outputs: dict[str, RequestOutput] = {}
    errors: list[str] = []
    left = after_tokens or [0]
    while running.has_unfinished_requests():
        for output in running.step():
            outputs[output.request_id] = output
        tokens = len(outputs["0"].outputs[0].token_ids) if "0" in outputs else 0
        begun = not after_tokens or all(one.status.name in ("RUNNING", "PREEMPTED") for one in requests.values())
        if left and tokens >= left[0] and begun and free_blocks(llm) < blocks:
            lmcache_mm(["clear", url.partition("?")[0]])
            try:
                llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
                left = left[1:]
            except RuntimeError as error:  # try again after the next step
                errors.append(str(error))
            running.reset_encoder_cache()
            faulty.gate.set()
    return {
        "got": [row_of(outputs[str(i)]) for i in range(len(prompts))],
        "errors": errors,
        "resets_left": len(left),
        "blocks": [blocks, free_blocks(llm)],
    }


def sliding_windows() -> dict[str, Any]:
    """A model of full-attention and sliding-window layers, whose groups free their pages differently."""
    words = " ".join(f"word{i}" for i in range(40))
    prompts = [prompt(words), prompt(words), prompt(words + " and a little more"), prompt("other " + words)]
    # Windows of 64 tokens, pages of 32: the last token's window begins at a page's end.
    prompts += [{"prompt_token_ids": np.random.default_rng(n).integers(3, 250, n).tolist()} for n in (254, 255, 287)]
    with engine(model="swa") as llm:
        seen: dict[str, Any] = {"expected": ask(llm, *prompts)}
    with store() as url:
        with engine(url, model="swa", extra={"opaque_tails": True}) as llm:
            seen["first"] = ask(llm, *prompts)
        with engine(url, model="swa", extra={"opaque_tails": True}, max_num_batched_tokens=64) as llm:
            seen["second"] = ask(llm, *prompts)
    return seen


def numbers(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, count).tolist()


def measure(llm: LLM, about: list[int] | dict[str, Any], answer: int = 12) -> dict[str, Any]:
    """Asks one prompt, or its token ids; returns the answer's logprobs too."""
    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, logprobs=3)
    (one,) = llm.generate([about if isinstance(about, dict) else {"prompt_token_ids": about}], sampling, use_tqdm=False)
    wait_for_saves()
    steps = one.outputs[0].logprobs or ()
    return {**row_of(one), "logprobs": [sorted((t, p.logprob) for t, p in step.items()) for step in steps]}


def states(model: str) -> dict[str, Any]:
    """A model of attention and of layers that keep a state, with vLLM's own cache emptied before each prompt."""
    if model in ("granite", "falcon"):
        # The CPU's kernel for Mamba2 does not return the states that a step passes on its way; vLLM then ends steps
        # where it needs states.
        from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2  # noqa: PLC0415

        del MambaMixer2.get_kv_cache_spec
    settings: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16" if model == "qwen3next" else "float32",
        "block_size": 32 if model == "lfm2" else None,
        "num_gpu_blocks_override": 128,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
    }
    base = numbers(0, 640)
    prompts = {
        "600": base[:600],
        "600 again": base[:600],
        "goes on": base[:600] + numbers(1, 200),
        "640": base,
        "640 again": base,
        "parts at 500": base[:500] + numbers(2, 150),
        "parts there too": base[:500] + numbers(3, 150),
    }

    def ask_afresh(llm: LLM) -> dict[str, dict[str, Any]]:
        rows = {}
        for name, ids in prompts.items():
            llm.reset_prefix_cache()
            rows[name] = measure(llm, ids)
        return rows

    def engine_of(url: str | None = None, **more: Any):
        return engine(url, **{key: value for key, value in (settings | more).items() if value is not None})

    seen: dict[str, Any] = {}
    with engine_of() as llm:
        seen["block"] = llm.llm_engine.vllm_config.cache_config.block_size
        seen["expected"] = ask_afresh(llm)
        llm.reset_prefix_cache()
        seen["by vLLM's own cache"] = [measure(llm, base[:600]), measure(llm, base[:600])]
    with engine_of(max_num_batched_tokens=512) as llm:
        seen["other steps"] = ask_afresh(llm)
    with store("256MiB") as url:
        with engine_of(url) as llm:
            seen["first"] = ask_afresh(llm)
            tables = set(llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler._places.states)
            llm.reset_prefix_cache()
            before = counts(llm)
            with faulty.misbehaving(llm, faulty.loses_groups(tables)):
                seen["states lost"] = measure(llm, base[:600])
            seen["states lost counts"] = {name: value - before[name] for name, value in counts(llm).items()}
        with engine_of(url, max_num_batched_tokens=512) as llm:
            seen["second"] = ask_afresh(llm)
            llm.reset_prefix_cache()
            if model != "lfm2":  # whose answers on the CPU depend on what else is in a batch, without us too
                seen["at once"] = ask_at_once(llm, [{"prompt_token_ids": ids} for ids in prompts.values()])
    many = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with store("256MiB") as url:
        generated = {"state_tokens": 256, "store_generated": True}
        with engine_of(url, extra=generated) as llm:
            (seen["long answer"],) = ask(llm, {"prompt_token_ids": base}, sampling=many)
            llm.reset_prefix_cache()
            turns = base + seen["long answer"]["answer"]
            seen["every 256"] = ask(llm, {"prompt_token_ids": base[:550] + numbers(5, 50)})
            llm.reset_prefix_cache()
            seen["goes on from the answer"] = ask(llm, {"prompt_token_ids": turns})
    if model in ("qwen3next", "falcon"):
        long = [{"prompt_token_ids": numbers(10 + i, 250)} for i in range(5)]
        with engine_of() as llm:
            seen["expected long"] = [measure(llm, one["prompt_token_ids"], 150) for one in long]
        with store("256MiB") as url, engine_of(url, num_gpu_blocks_override=18, max_model_len=448) as llm:
            blocks = free_blocks(llm)
            seen["preempted"] = ask_at_once(llm, long, many) + ask_at_once(llm, long, many)
            seen["preempted blocks"] = [blocks, free_blocks(llm)]
            seen["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
            seen["preempted counts"] = counts(llm)
    return seen


def states_of_pictures() -> dict[str, Any]:
    """A vision model whose layers keep states beside attention, with vLLM's own cache emptied before each prompt."""
    one, two = image(0, 448), image(1, 448)
    prompts = [
        prompt("| what is it? ", one),
        prompt("| how many are there? ", one),
        prompt("| what is it? ", two),
        prompt("| or rather | ", one, two),
        prompt("| or rather | ", two, one),
    ]
    settings = {"model": "qwen3_5", "dtype": "bfloat16", "num_gpu_blocks_override": 64, "enable_prefix_caching": True}

    def ask_afresh(llm: LLM) -> list[dict[str, Any]]:
        rows = []
        for one in prompts:
            llm.reset_prefix_cache()
            rows.append(measure(llm, one))
        return rows

    seen: dict[str, Any] = {}
    with engine(**settings) as llm:
        seen["expected"] = ask_afresh(llm)
        seen["block"] = llm.llm_engine.vllm_config.cache_config.block_size
    with store("64MiB") as url:
        with engine(url, **settings) as llm:
            seen["first"] = ask_afresh(llm)
        with engine(url, **settings) as llm:
            seen["second"] = ask_afresh(llm)
            llm.reset_prefix_cache()
            seen["at once"] = ask_at_once(llm, prompts)
            seen["counts"] = counts(llm)
    return seen


def share() -> dict[str, Any]:
    """Asks this process's engine, on the store that the environment names."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    options = json.loads(os.environ.get("TEST_OPTIONS", "{}"))
    with engine(os.environ["TEST_STORE"], extra={"opaque_tails": True}, **options) as llm:
        return {"got": ask(llm, one, two, one), "counts": counts(llm)}


def first_host() -> dict[str, Any]:
    """This process's engine on all stores that the environment names at once."""
    with engine(multi=json.loads(os.environ["TEST_STORES"]), extra={"opaque_tails": True}) as llm:
        return {"got": ask(llm, *far_questions())}


def second_host() -> dict[str, Any]:
    """This process's engines on the stores that the environment names, one after another."""
    seen: dict[str, Any] = {}
    for name, url in json.loads(os.environ["TEST_STORES"]).items():
        # As long as the stores themselves wait: on a busy machine NIXL's process starts slowly.
        with engine(url, extra={"opaque_tails": True, "timeout_s": 30}) as llm:
            seen[name] = {"got": ask(llm, *far_questions()), "counts": counts(llm)}
    return seen


def far_questions() -> list[dict[str, Any]]:
    return [
        prompt("| what is it? ", image(0)),
        prompt("| what is it? ", image(1)),
        prompt("what is | or | ?", image(1), image(0)),
    ]


def evicting() -> dict[str, Any]:
    """This process's engine, concurrent with another's, on a store too small for their prompts."""
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask_at_once(llm, list(QUESTIONS.values()))}
    with engine(os.environ["TEST_STORE"], extra={"opaque_tails": True}) as llm:
        order = np.random.default_rng(int(os.environ["TEST_SEED"]))
        seen["got"] = []
        for _ in range(6):
            shuffled = order.permutation(len(QUESTIONS))
            got = ask_at_once(llm, [list(QUESTIONS.values())[i] for i in shuffled])
            seen["got"].append([got[i] for i in np.argsort(shuffled)])
        seen["counts"] = counts(llm)
    return seen


def inside_multi() -> dict[str, Any]:
    """Inside MultiConnector, twice."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one, two)}
    with store() as first, store() as second:
        with engine(multi=[first, second], extra={"opaque_tails": True}) as llm:
            seen["both"] = ask(llm, one, one, two)
            seen["counts"] = counts(llm)
        for name, url in (("first", first), ("second", second)):
            with engine(url, extra={"opaque_tails": True}) as llm:
                seen[name] = ask(llm, one, two)
    return seen


@contextmanager
def questions(llm: LLM):
    """Yields a list that collects a router's knowledge of each request."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    add, asked = scheduler.add_request, []

    def adding(request: Any) -> None:
        places = [(f.identifier, f.mm_position.offset, f.mm_position.length) for f in request.mm_features]
        pictures = [routers.Picture(*place) for place in places]
        asked.append(routers.Question(list(request.all_token_ids), pictures, request.cache_salt))
        add(request)

    scheduler.add_request = adding
    try:
        yield asked
    finally:
        scheduler.add_request = add


def elsewhere(program: str, *arguments: str) -> None:
    """Another process does something to a store."""
    begin = "import sys; from lmcache_mm.stores import open_store; store = open_store(sys.argv[1]); "
    subprocess.run([sys.executable, "-c", begin + program + "; store.close()", *arguments], check=True)


@contextmanager
def routed(url: str, **options: Any):
    """An engine, its questions, a function that returns how many tokens of some questions a router finds there, the
    engine's events, and the router's index."""
    address = f"ipc://{tempfile.mkdtemp()}/events"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": address}
    index, told = routers.Index(32), []
    with (
        routers.subscriber(address) as (joined, published),
        engine(url, **{"kv_events_config": events, "enable_prefix_caching": True, **options}) as llm,
        questions(llm) as asked,
    ):

        def where(about: Sequence[routers.Question]) -> list[int]:
            time.sleep(1.1)  # a round of looks
            ask(llm, prompt("hm? "), prompt("hm? "), sampling=wishing({"store": False, "load": False}))
            new = published()
            index.take(new)
            told.extend(new)
            return [index.tokens_at(question) for question in about]

        joined()
        yield llm, asked, where, told, index


def routing() -> dict[str, Any]:
    """Where a router would send requests about pictures, as the store's contents come and go."""
    about = "words before it, so that it begins late | what?"
    one, other = prompt(about, image(0, 336)), prompt(about, image(1, 336))
    ours, theirs = {**one, "cache_salt": "ours"}, {**one, "cache_salt": "theirs"}
    not_stored = wishing({"store": False})
    seen: dict[str, Any] = {}
    with store("1MiB") as url:
        with routed(url) as (llm, asked, where, told, index):
            ask(llm, one, ours)
            ask(llm, other, theirs, sampling=wishing({"store": False, "load": False}))
            known = list(asked)
            seen["stored"] = where(known)
            elsewhere("store.forget(bytes.fromhex(sys.argv[2]))", url, owner_of("ours").hex())
            seen["forgotten"] = where(known)
            gpu, cpu = (routers.by_block(told, medium) for medium in ("GPU", "CPU"))
            seen["blocks"] = [len(cpu), sum(block == gpu.get(name) for name, block in cpu.items())]
            seen["wrong"] = index.wrong()
        with routed(url) as (llm, _, where, _, index):
            ask(llm, one, ours, sampling=not_stored)
            seen["found"] = where(known)
            llm.reset_prefix_cache()
            seen["vLLM's cache reset"] = where(known)
            ask(llm, one, sampling=not_stored)
            seen["found again"] = where(known)
            elsewhere("store.put([bytes([i]) * 32 for i in range(64)], [bytes(1 << 16)] * 64)", url)
            seen["evicted"] = where(known)
            ask(llm, one, ours)
            seen["stored anew"] = where(known)
            llm.reset_prefix_cache(reset_connector=True)
            seen["reset"] = where(known)
            seen["wrong"] += index.wrong()
    return seen


def routing_groups() -> dict[str, Any]:
    """Groups of layers, of full attention and of windows; also without vLLM's own cache."""
    words = prompt(" ".join(f"word{i}" for i in range(40)))
    with store() as url:
        with routed(url, model="swa") as (llm, asked, where, told, index):
            ask(llm, words)
            where([])
            wrong = index.wrong()
        with routed(url, model="swa", enable_prefix_caching=False) as (llm, asked, where, _, index):
            ask(llm, words)
            where([])
            found = [index.tokens_at(asked[0], group=group) for group in range(4)]
            wrong += index.wrong()
    gpu, cpu = (routers.by_block(told, medium) for medium in ("GPU", "CPU"))
    seen: dict[str, Any] = {"wrong": wrong, "without vLLM's cache": found}
    for group in sorted({group for group, _ in cpu}):
        ours = {name: block for name, block in cpu.items() if name[0] == group}
        one, *_ = ours.values()
        of_group = {
            "window": one["kv_cache_spec_sliding_window"],
            "blocks": len(ours),
            "of vLLM": len(ours.keys() & gpu.keys()),
            "same": sum(gpu.get(name) == block for name, block in ours.items()),
        }
        seen.setdefault(one["kv_cache_spec_kind"], []).append(of_group)
    return seen


def write_adapter(seed: int) -> LoRARequest:
    """Writes an adapter, always under the same name, id and path."""
    folder = FOLDER / "adapter"
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        for module, size in (("q_proj", 64), ("v_proj", 32)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(8, 64, generator=random) / 8
            weights[f"{name}.lora_B.weight"] = torch.randn(size, 8, generator=random) / 2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))
    return LoRARequest("adapter", 1, str(folder))


def adapters() -> dict[str, Any]:
    """LoRA adapters, and prompts given as embeddings."""
    one = prompt("| what is it? ", image(0))
    embeddings = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(0)) / 2
    embedded = [{"prompt_embeds": e} for e in embeddings]
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
    seen: dict[str, Any] = {}
    for name, seed in (("one", 1), ("other", 2)):
        adapter = write_adapter(seed)
        with engine(**options) as llm:
            seen[f"expected {name}"] = ask(llm, one) + ask(llm, one, adapter=adapter)
    with store() as url:
        for name, seed in (("one", 1), ("other", 2)):
            adapter = write_adapter(seed)
            with engine(url, extra={"opaque_tails": True}, **options) as llm:
                asked = [ask(llm, one), ask(llm, one, adapter=adapter), ask(llm, one), ask(llm, one, adapter=adapter)]
                seen[name] = [row for rows in asked for row in rows]
    other = prompt("| and what is this? ", image(1))
    with store() as url:
        adapter = write_adapter(1)
        with engine(url, extra={"opaque_tails": True}, **options) as llm:
            ask(llm, one, adapter=adapter)
            write_adapter(2)  # while vLLM keeps the loaded one
            ask(llm, other, adapter=adapter)
        with engine(url, extra={"opaque_tails": True}, **options) as llm:
            seen["changed meanwhile"] = ask(llm, other, adapter=adapter)
        with engine(**options) as llm:
            seen["expected changed"] = ask(llm, other, adapter=adapter)
    with engine(enable_prompt_embeds=True) as llm:
        seen["expected embedded"] = ask(llm, *embedded)
    with store() as url, engine(url, extra={"opaque_tails": True}, enable_prompt_embeds=True) as llm:
        seen["embedded"] = ask(llm, *embedded, *embedded)
    return seen


@contextmanager
def encoded(llm: LLM):
    """Yields a list that collects the numbers of patches of the images and videos that the vision encoder gets."""
    seen: list[int] = []

    def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        grids = named.get("grid_thw", arguments[1] if len(arguments) > 1 else None)
        seen.extend(int(np.prod(grid)) for grid in np.asarray(grids))

    hooks = llm.apply_model(lambda model: model.visual.register_forward_pre_hook(note, with_kwargs=True))
    yield seen
    hooks[0].remove()


def asking(llm: LLM, *prompts: Any, **options: Any) -> dict[str, Any]:
    """The prompts' answers, and what was encoded for them. Each prompt finds what was encoded for those before it in
    the store, unless the store hangs."""
    rows = []
    with encoded(llm) as seen:
        for one in prompts:
            rows += ask(llm, one, **options)
            if has_ec_transfer():
                with suppress(TimeoutError):
                    get_ec_transfer()._worker._puts.submit(lambda _: None).future.result(2)
        return {"rows": rows, "encoded": list(seen)}


def forgetful(llm: LLM) -> None:
    """Shrinks vLLM's own encoder cache to one image of 36 embeddings, so that a new image evicts any unneeded one."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager
    assert manager.num_freeable_slots == manager.cache_size
    manager.cached.clear()
    manager.num_embeds_by_hash.clear()
    manager.freeable.clear()
    manager.cache_size = manager.num_free_slots = manager.num_freeable_slots = 40


ABOUT = [
    prompt(f"{text} | ?", image(0)) for text in ("what is", "one more time, what is", "and again, in other words,")
]
BOTH = prompt("first | and then | ?", image(0), image(1))


def encoder() -> dict[str, Any]:
    """Images and a video seen before, at other places and in other engines, without and with LMCacheMMConnector."""
    with engine() as llm:
        questions = [*ABOUT, BOTH, about_video(0), about_video(1)]
        seen: dict[str, Any] = {"expected": asking(llm, *questions)}
        llm.apply_model(change_weights)
        seen["expected changed"] = ask(llm, ABOUT[0])
    with store() as url:
        with engine(encoder=url) as llm:
            seen["first"] = asking(llm, ABOUT[0], about_video(0))
        with (
            engine(encoder=url, max_num_batched_tokens=64, enable_chunked_prefill=True) as llm,
            encoded(llm) as patches,
        ):
            seen["at once"] = {"rows": ask_at_once(llm, ABOUT), "encoded": list(patches)}
            patches.clear()
            seen["one of two known"] = {"rows": ask(llm, BOTH), "encoded": list(patches)}
            seen["videos"] = asking(llm, about_video(0), about_video(1))
            seen["counts"] = counts(llm)
            llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
            seen["after vLLM forgot"] = asking(llm, BOTH)
        options = {"extra": {"opaque_tails": True}, "enable_prefix_caching": True}
        with engine(url, encoder=url, **options) as llm:
            seen["with KV"] = asking(llm, *ABOUT, BOTH)
            seen["with KV, again"] = asking(llm, *ABOUT, BOTH)
            llm.apply_model(change_weights)
            llm.reset_prefix_cache(reset_connector=True)
            llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
            seen["changed weights"] = asking(llm, ABOUT[0])
    return seen


def encoder_identity() -> dict[str, Any]:
    """Identifiers that clients choose; tenants; requests that disable the cache; missing items."""
    one, two, three = (prompt("| what is it? ", image(i)) for i in range(3))
    with engine() as llm:
        seen: dict[str, Any] = {"expected": asking(llm, one, two, three)}

    def named(about: dict[str, Any], *uuids: str) -> dict[str, Any]:
        return {**about, "multi_modal_uuids": {"image": list(uuids)}}

    with store() as url, engine(encoder=url, mm_processor_cache_gb=0) as llm:
        # vLLM's identifiers are counters here, unless clients choose them.
        forgetful(llm)
        seen["counters"] = asking(llm, one, two, one, two)
        seen["one uuid"] = asking(llm, named(one, "x"), three, named(two, "x"), three, named(one, "x"))
        seen["honest"] = asking(llm, one, two, three)
        seen["tenants"] = asking(llm, *({**one, "cache_salt": salt} for salt in ("a", "b", "a", "b")))
        four = prompt("| what is it? ", image(3))
        seen["no store"] = asking(llm, four, sampling=wishing({"store": False}))
        seen["not stored"] = asking(llm, four)
        seen["no load"] = asking(llm, four, sampling=wishing({"load": False}))
        seen["stored"] = asking(llm, four)
        grid = {"image_grid_thw": torch.tensor([[1, 12, 12]])}
        seen["no image"] = asking(llm, {"prompt": one["prompt"], "multi_modal_data": {"image": grid}})
        seen["afterwards"] = asking(llm, one)
    with store() as url, engine(encoder=url, mm_processor_cache_gb=0) as llm:
        seen["one uuid twice"] = asking(llm, named(prompt("| and | ?", image(0), image(1)), "y", "y"), one, two)
    return seen


ENCODER_FAULTS = (
    *("Fails", "FailsToTell", "Lies", "Loses", "Hangs", "HangsToTell", "Emptied"),
    *("FailsToStore", "HangsToStore", "Corrupts"),
)


def encoder_trouble() -> dict[str, Any]:
    """Stores that fail, lie, lose, corrupt and hang, and one that is emptied after it was read."""
    about = {fault: prompt(f"{fault}: | ?", image(i)) for i, fault in enumerate(ENCODER_FAULTS)}
    other = prompt("| what is it? ", image(100))
    with engine() as llm:
        seen: dict[str, Any] = {fault: {"expected": ask(llm, one)} for fault, one in about.items()}
    with store() as url, engine(encoder=url, encoder_extra={"timeout_s": 1}) as llm:
        forgetful(llm)
        for fault, one in about.items():
            if not fault.endswith("ToStore"):
                asking(llm, one, other)
            before, begun = counts(llm), time.monotonic()
            with faulty.encoder_misbehaving(llm, getattr(faulty, fault)):
                seen[fault] |= asking(llm, one)
                seen[fault]["loaded"] = counts(llm)["encoder_loaded_items"] - before["encoder_loaded_items"]
                ask(llm, other)
                seen[fault]["seconds"] = time.monotonic() - begun
                until = time.monotonic() + 1
                while fault == "HangsToStore" and time.monotonic() < until:
                    time.sleep(0.1)  # nothing is stored while the store hangs
                seen[fault]["then"] = asking(llm, {**one, "prompt": one["prompt"] + "again"}, prompt("words"))
            after = counts(llm)
            seen[fault]["counts"] = {name: after[name] - before[name] for name in after}
    return seen


def encoder_ranks() -> dict[str, Any]:
    """Two workers in separate processes."""
    with store() as url, engine(encoder=url, tensor_parallel_size=2) as llm:
        forgetful(llm)
        other = prompt("| what is it? ", image(1))
        return {"got": ask(llm, ABOUT[0], other, ABOUT[1], other, ABOUT[2]), "counts": counts(llm)}


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
                model=str(FOLDER / "vlm"),
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


def make_models() -> dict[str, Any]:
    tiny_qwen2_vl.write_checkpoint(FOLDER / "vlm")
    processor = tiny_qwen2_vl.build_processor(tiny_qwen2_vl.shape("tiny"))
    torch.manual_seed(0)
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    end = processor.tokenizer.eos_token_id
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3TextConfig(
        **shape,
        vocab_size=320,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=layers,
        sliding_window=64,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,
    )
    model = Gemma3ForCausalLM(config).float().eval()
    with torch.no_grad():  # so that attention decides the answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 3.0 if "o_proj" in name or "v_proj" in name else 1.0
                weight.normal_(0, 0.05 if "embed" in name else gain * weight.shape[1] ** -0.5)
            elif "post_attention_layernorm" in name:
                weight.fill_(2.0)
    model.save_pretrained(FOLDER / "swa")
    processor.tokenizer.save_pretrained(FOLDER / "swa")
    common = {"vocab_size": 320, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)}
    common |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "tie_word_embeddings": False}
    for name, hybrid in hybrids(common).items():
        hybrid.float().eval()
        with torch.no_grad():
            for key, weight in hybrid.named_parameters():
                if weight.ndim == 2:
                    weight.normal_(0, 0.05 if "embed" in key else 2.0 * weight.shape[1] ** -0.5)
        hybrid.save_pretrained(FOLDER / name)
        processor.tokenizer.save_pretrained(FOLDER / name)
    make_vision_model_with_states(processor.tokenizer)
    return {}


def make_vision_model_with_states(tokenizer: Any) -> None:
    """A small Qwen3.5: a vision tower, full attention, and Gated DeltaNet."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    patches = {"patch_size": 14, "temporal_patch_size": 2}
    config = Qwen3_5Config(
        **{field: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for field, token in names.items()},
        text_config={
            **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256},
            **{"linear_num_value_heads": 1, "linear_num_key_heads": 1},
            **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
                **{"mrope_section": [11, 11, 10], "mrope_interleaved": True},
            },
        },
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
            **{"num_position_embeddings": 256, "spatial_merge_size": 2, **patches},
        },
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # so that the picture decides the answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.0 if "embed_tokens" in name else 2.0 * weight[0].numel() ** -0.5)
    model.save_pretrained(FOLDER / "qwen3_5")
    limits = {"shortest_edge": tiny_qwen2_vl.MIN_PIXELS, "longest_edge": tiny_qwen2_vl.MAX_PIXELS}
    settings = {**patches, "merge_size": 2, "size": limits}
    images, videos = Qwen2VLImageProcessor(**settings), Qwen3VLVideoProcessor(**settings)
    template = tiny_qwen2_vl.CHAT_TEMPLATE
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=template).save_pretrained(FOLDER / "qwen3_5")


def hybrids(common: dict[str, Any]) -> dict[str, Any]:
    """Models whose layers keep a state beside attention: of short convolutions, of Gated DeltaNet, of Mamba2."""
    conv = {"block_auto_adjust_ff_dim": False, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0}
    conv |= {"conv_dim": 64, "block_dim": 64}  # as vLLM names them
    linear = {"linear_num_value_heads": 1, "linear_num_key_heads": 1}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    mamba = {"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_head": 32}
    return {
        "lfm2": Lfm2ForCausalLM(
            Lfm2Config(
                **common,
                **conv,
                num_hidden_layers=4,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"] * 2,
            )
        ),
        "qwen3next": Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **common,
                **linear,
                **experts,
                num_hidden_layers=4,
                num_key_value_heads=2,
                head_dim=256,
                shared_expert_intermediate_size=64,
                layer_types=["linear_attention", "full_attention"] * 2,
            )
        ),
        "granite": GraniteMoeHybridForCausalLM(
            GraniteMoeHybridConfig(
                **common,
                **mamba,
                num_hidden_layers=4,
                num_key_value_heads=1,
                mamba_n_heads=4,
                mamba_expand=2,
                num_local_experts=2,
                num_experts_per_tok=1,
                shared_intermediate_size=64,
                layer_types=["mamba", "attention"] * 2,
            )
        ),
        "falcon": FalconH1ForCausalLM(
            FalconH1Config(
                **common,
                **mamba,
                num_hidden_layers=2,
                num_key_value_heads=1,
                head_dim=32,
                mamba_d_ssm=64,
                mamba_n_heads=2,
            )
        ),
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        make_models,
        answers,
        identity,
        adapters,
        trouble,
        pressure,
        pausing,
        weights,
        odd_requests,
        pooling,
        sliding_windows,
        states,
        states_of_pictures,
        share,
        evicting,
        first_host,
        second_host,
        inside_multi,
        routing,
        routing_groups,
        encoder,
        encoder_identity,
        encoder_trouble,
        encoder_ranks,
        sessions,
        sessions_in_trouble,
        sessions_served,
    )
}


def wait_to_be_forked() -> None:
    """Imports what engines need, then forks whenever the socket on stdin asks for a scenario, until it is closed.

    Returns in each fork, which is as a process started with these arguments and this environment. Beside a request come
    two descriptors: one for the fork's output, and a socket that is told the process id and then the exit status.
    """
    global FOLDER  # noqa: PLW0603
    for module in ("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2_vl", "lmcache_mm.vllm.connector"):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1  # a fork would lack the others, and never get the locks they hold
    # Half of a scenario's time would be vLLM's collections around each engine, which go through all that is imported.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    asked = socket.socket(fileno=os.dup(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 2)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    output, answer = descriptors
    if child := os.fork():
        os.write(answer, b"%d\n" % child)
        os.write(answer, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for descriptor in (output, answer, asked.detach()):
        os.close(descriptor)
    request = json.loads(message)
    os.environ.update(request["environment"])
    sys.argv += request["arguments"]
    FOLDER = Path(sys.argv[2])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        wait_to_be_forked()
    name, *arguments = sys.argv[1].split(":")
    result = SCENARIOS[name](*arguments)
    print(json.dumps(result), flush=True)
