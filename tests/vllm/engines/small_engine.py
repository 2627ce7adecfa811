"""A small engine with our connectors, and how it is asked."""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

import models
from lmcache_mm.commands.cli import main as lmcache_mm
from lmcache_mm.stores import open_store
from lmcache_mm.vllm.kv import worker

worker.SAVE_S = 5.0  # a busy machine must not look like a slow store
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


def about_video(seed: int) -> dict[str, Any]:
    text = f"<|im_start|>user\n{VIDEO} what happens?<|im_end|>\n"
    return {"prompt": text, "multi_modal_data": {"video": [video(seed)]}}


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
        "model": str(models.folder() / model),
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


@contextmanager
def store(capacity: str = "64MiB"):
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    open_store(f"{url}?capacity={capacity}").close()
    yield f"{url}?capacity={capacity}"
    lmcache_mm(["clear", url])


def ask(llm: LLM, *prompts: Any, sampling: SamplingParams = GREEDY, adapter: Any = None) -> list[dict[str, Any]]:
    """Asks one after another; returns {answer, prompt_tokens, cached, finish} for each."""
    return [one for p in prompts for one in ask_at_once(llm, [p], sampling, adapter)]


def ask_at_once(
    llm: LLM, prompts: Sequence[Any], sampling: SamplingParams = GREEDY, adapter: Any = None
) -> list[dict[str, Any]]:
    answers = llm.generate(list(prompts), sampling, use_tqdm=False, lora_request=adapter)
    wait_for_saves()
    return [row_of(one) for one in answers]


def wishing(wish: Any) -> SamplingParams:
    extra = {"kv_transfer_params": {"lmcache_mm": wish}}
    return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)


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
