"""Scenarios on the real vLLM: python scenarios.py NAME FOLDER prints what was seen, as JSON, in its last line.

FOLDER holds the models. A process runs engines one after the other; vLLM changes too much in a process for more.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from vllm import LLM, SamplingParams

import faulty
from lmcache_mm import tiny_qwen2_vl
from lmcache_mm.cli import main as lmcache_mm
from lmcache_mm.stores import open_store

FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def image(seed: int, size: int = 168) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def prompt(text: str, *images: Image.Image, **more: Any) -> dict[str, Any]:
    """text: every | stands for an image."""
    out: dict[str, Any] = {"prompt": f"<|im_start|>user\n{text.replace('|', IMAGE)}<|im_end|>\n", **more}
    if images:
        out["multi_modal_data"] = {"image": list(images)}
    return out


@contextmanager
def engine(store: str | None = None, *, model: str = "vlm", connector: str = "", **options: Any):
    """store: with the connector on it; None: without any."""
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
    if model == "vlm":
        settings["limit_mm_per_prompt"] = {"image": 3, "video": 1}
    if store:
        extra = {"store": store, "chunk_tokens": 64, **options.pop("extra", {})}
        settings["kv_transfer_config"] = {
            "kv_connector": connector or "LMCacheMMConnector",
            "kv_connector_module_path": "faulty" if connector else "lmcache_mm.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    llm = LLM(**{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ask(llm: LLM, *prompts: dict[str, Any], sampling: SamplingParams = GREEDY) -> list[dict[str, Any]]:
    """One after the other, each as {answer, prompt_tokens, cached, finish}."""
    return [one for p in prompts for one in ask_at_once(llm, [p], sampling)]


def ask_at_once(llm: LLM, prompts: Sequence[Any], sampling: SamplingParams = GREEDY) -> list[dict[str, Any]]:
    return [
        {
            "answer": list(one.outputs[0].token_ids),
            "prompt_tokens": len(one.prompt_token_ids),
            "cached": one.num_cached_tokens,
            "finish": one.outputs[0].finish_reason,
        }
        for one in llm.generate(list(prompts), sampling, use_tqdm=False)
    ]


def counts(llm: LLM) -> dict[str, float]:
    prefix = "vllm:lmcache_mm_"
    return {m.name.removeprefix(prefix): m.value for m in llm.get_metrics() if m.name.startswith(prefix)}


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@contextmanager
def store(capacity: str = "64MiB"):
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    open_store(f"{url}?capacity={capacity}").close()
    yield f"{url}?capacity={capacity}"
    lmcache_mm(["clear", url])


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
        with engine(url, extra={"load": "sync"}) as llm:
            seen["synchronous"] = ask(llm, *QUESTIONS.values())
    with store() as url, engine(url, max_num_batched_tokens=64, enable_chunked_prefill=True) as llm:
        seen["chunked prefill"] = ask(llm, *QUESTIONS.values())
    with store() as url, engine(url, block_size=128, num_gpu_blocks_override=64, extra={"opaque_tails": True}) as llm:
        seen["pages of 128"] = ask(llm, *QUESTIONS.values())
    return seen


def identity() -> dict[str, Any]:
    """Clients that lie about their images, tenants, requests that want no cache."""
    about = "| what is it? "
    one, two = prompt(about, image(0)), prompt(about, image(1))
    with engine() as llm:
        expected = ask(llm, one, two)
    seen: dict[str, Any] = {"expected": expected}
    with store() as url:
        with engine(url, extra={"opaque_tails": True}, mm_processor_cache_gb=0) as llm:
            # Identifiers of vLLM are counters here, the same in every engine.
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
    with store() as url, engine(url, extra={"opaque_tails": True}) as llm:

        def wishes(**wish: bool) -> SamplingParams:
            extra = {"kv_transfer_params": {"lmcache_mm": wish}}
            return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)

        seen["no store"] = ask(llm, one, sampling=wishes(store=False)) + ask(llm, one)
        seen["no load"] = ask(llm, one, sampling=wishes(load=False)) + ask(llm, one)
    return seen


def trouble() -> dict[str, Any]:
    """Stores that fail, lie, lose and corrupt; a KV cache that is too small; aborted requests."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    words = prompt("only words, and enough of them that they fill more than a single page of thirty-two tokens")
    long = [prompt(f"{word} " * 12) for word in ("alpha", "beta", "gamma")]
    many = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one, two, words), "expected long": ask(llm, *long, sampling=many)}
    for fault in ("Fails", "Lies", "Corrupts", "Loses", "FailsToStore"):
        for load in ("async", "sync"):
            with store() as url:
                with engine(url, extra={"opaque_tails": True}) as llm:
                    ask(llm, one, words)
                with engine(url, connector=fault, extra={"opaque_tails": True, "load": load}) as llm:
                    blocks = free_blocks(llm)
                    got = ask(llm, one, two, words, one, two, words)
                    seen[f"{fault} {load}"] = {"got": got, "counts": counts(llm), "blocks": [blocks, free_blocks(llm)]}
                with engine(url, extra={"opaque_tails": True}) as llm:
                    seen[f"{fault} {load}, then"] = ask(llm, one, two, words)
    with store() as url, engine(url, num_gpu_blocks_override=10, max_model_len=256, max_num_seqs=4) as llm:
        blocks = free_blocks(llm)
        seen["preempted"] = ask_at_once(llm, long, many) + ask_at_once(llm, long, many)
        seen["preempted blocks"] = [blocks, free_blocks(llm)]
        seen["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    with store() as url, engine(url, connector="Blocks", extra={"opaque_tails": True}) as llm:
        ask(llm, one)
        blocks = free_blocks(llm)
        faulty.gate.clear()
        llm.llm_engine.add_request("aborted", one, many)
        until = time.monotonic() + 20
        while (held := free_blocks(llm)) == blocks and time.monotonic() < until:
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["aborted"])
        faulty.gate.set()
        seen["after the abort"] = ask(llm, two, one)
        seen["aborted blocks"] = [blocks, held, free_blocks(llm)]
    return seen


def sliding_windows() -> dict[str, Any]:
    """A model of full-attention and sliding-window layers, whose groups free their pages differently."""
    words = " ".join(f"word{i}" for i in range(40))
    prompts = [prompt(words), prompt(words), prompt(words + " and a little more"), prompt("other " + words)]
    with engine(model="swa") as llm:
        seen: dict[str, Any] = {"expected": ask(llm, *prompts)}
    with store() as url:
        with engine(url, model="swa", extra={"opaque_tails": True}) as llm:
            seen["first"] = ask(llm, *prompts)
        with engine(url, model="swa", extra={"opaque_tails": True}, max_num_batched_tokens=64) as llm:
            seen["second"] = ask(llm, *prompts)
    return seen


def share() -> dict[str, Any]:
    """Whatever engine this process has, on the store that the environment names."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    options = json.loads(os.environ.get("TEST_OPTIONS", "{}"))
    with engine(os.environ["TEST_STORE"], extra={"opaque_tails": True}, **options) as llm:
        return {"got": ask(llm, one, two, one), "counts": counts(llm)}


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
    with torch.no_grad():  # so that what is attended to decides the answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 3.0 if "o_proj" in name or "v_proj" in name else 1.0
                weight.normal_(0, 0.05 if "embed" in name else gain * weight.shape[1] ** -0.5)
            elif "post_attention_layernorm" in name:
                weight.fill_(2.0)
    model.save_pretrained(FOLDER / "swa")
    processor.tokenizer.save_pretrained(FOLDER / "swa")
    return {}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (make_models, answers, identity, trouble, sliding_windows, share)
}

if __name__ == "__main__":
    result = SCENARIOS[sys.argv[1]]()
    print(json.dumps(result), flush=True)
