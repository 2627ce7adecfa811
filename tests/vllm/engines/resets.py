"""Weights that change in place, and caches that are reset during requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

import faulty
from lmcache_mm.commands.cli import main as lmcache_mm
from small_engine import ask, ask_at_once, engine, free_blocks, image, prompt, row_of, store


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
