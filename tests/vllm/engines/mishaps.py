"""Stores that misbehave, caches that are too small, steps that fail, and requests of any content."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import PoolerConfig

import faulty
from small_engine import (
    ask,
    ask_at_once,
    counts,
    engine,
    free_blocks,
    image,
    prompt,
    store,
    wait_for_saves,
)

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
