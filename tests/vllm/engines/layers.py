"""Models with layers that keep windows or states beside those of full attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

import faulty
from small_engine import (
    ask,
    ask_at_once,
    counts,
    engine,
    free_blocks,
    image,
    prompt,
    row_of,
    store,
    wait_for_saves,
)


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
