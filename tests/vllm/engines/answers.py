"""Every kind of question, and what tells requests apart: images whatever clients name them, tenants, adapters."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

import models
from small_engine import about_video, ask, ask_at_once, counts, engine, image, prompt, store, wishing

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


def write_adapter(seed: int) -> LoRARequest:
    """Writes an adapter, always under the same name, id and path."""
    folder = models.folder() / "adapter"
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
