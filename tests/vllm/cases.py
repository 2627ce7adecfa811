"""KV cache groups of kinds that the CPU engine lacks, in vLLM's own specs; names that the tests need."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from vllm.config import ECTransferConfig, KVTransferConfig, MultiModalConfig, VllmConfig
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

from lmcache_mm.vllm.kv.worker import Worker
from lmcache_mm.vllm.options import Group, Options, groups_of

__all__ = ["ECTransferConfig", "MultiModalConfig", "generate_scheduler_kv_cache_config"]

DEVICE = torch.device("cuda", 0) if "LMCACHE_MM_REHEARSAL" in os.environ else torch.device("cpu")
BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS = 12, 32, 64


def names(count: int, first: int = 0) -> list[str]:
    return [f"model.layers.{i}.attn" for i in range(first, first + count)]


GQA = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=3, head_size=40, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK_TOKENS, num_kv_heads=3, head_size=40, dtype=torch.bfloat16, sliding_window=96
)
FP8 = replace(GQA, dtype=torch.float8_e4m3fn, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
FP8_SCALES = replace(GQA, dtype=torch.uint8, state_content_bytes=88, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD)
MLA = MLAAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
MLA_FP8 = replace(MLA, dtype=torch.uint8, cache_dtype_str="fp8_ds_mla", state_content_bytes=656)
MLA_WINDOW = SlidingWindowMLASpec(
    block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, sliding_window=96
)
INDEXER = MLAAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=132, dtype=torch.uint8)
STATE = MambaSpec(  # of a rank's heads: a convolution's, and a recurrent one of 4 bytes an element
    block_size=BLOCK_TOKENS,
    shapes=((3, 56), (6, 16, 16)),
    dtypes=(torch.bfloat16, torch.float32),
    page_size_padded=GQA.page_size_bytes,
    mamba_cache_mode="align",
)
SMALL = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=4, dtype=torch.float32)
SMALL_WINDOW = SlidingWindowSpec(
    block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=4, dtype=torch.float32, sliding_window=96
)
SMALL_STATE = replace(STATE, shapes=((3, 16), (4, 8)), page_size_padded=SMALL.page_size_bytes)
STATE_ON_THE_WAY = replace(SMALL_STATE, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
MIXED = dict.fromkeys(names(3), MLA) | {f"{name}.indexer": INDEXER for name in names(3)}

KINDS = {
    "GQA": [KVCacheGroupSpec(names(4), GQA)],
    "GQA, other size of V": [KVCacheGroupSpec(names(4), replace(GQA, head_size_v=24))],
    "fp8": [KVCacheGroupSpec(names(4), FP8)],
    "fp8, scales in the page": [KVCacheGroupSpec(names(4), FP8_SCALES)],
    "MLA": [KVCacheGroupSpec(names(4), MLA)],
    "MLA, fp8": [KVCacheGroupSpec(names(4), MLA_FP8)],
    "MLA with an indexer": [
        KVCacheGroupSpec(list(MIXED), UniformTypeKVCacheSpecs(block_size=BLOCK_TOKENS, kv_cache_specs=MIXED))
    ],
    "windows and full attention": [KVCacheGroupSpec(names(2), GQA), KVCacheGroupSpec(names(2, 2), WINDOW)],
    "windows of MLA": [KVCacheGroupSpec(names(2), MLA), KVCacheGroupSpec(names(2, 2), MLA_WINDOW)],
    "states": [
        KVCacheGroupSpec(names(2), GQA),
        KVCacheGroupSpec(names(2, 2), STATE),
        KVCacheGroupSpec(names(2, 4), STATE),
    ],
    "small states": [KVCacheGroupSpec(names(1), SMALL), KVCacheGroupSpec(names(1, 1), SMALL_STATE)],
    "small states and windows": [
        KVCacheGroupSpec(names(1), SMALL),
        KVCacheGroupSpec(names(1, 1), SMALL_WINDOW),
        KVCacheGroupSpec(names(1, 2), SMALL_STATE),
    ],
    "small states on the way": [KVCacheGroupSpec(names(1), SMALL), KVCacheGroupSpec(names(1, 1), STATE_ON_THE_WAY)],
}


def config_of(layout: str, blocks: int = BLOCKS) -> VllmConfig:
    config = VllmConfig()
    config.kv_transfer_config = KVTransferConfig(kv_connector="LMCacheMMConnector", kv_role="kv_both")
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = blocks
    return config


def kv_cache_config_of(kind: str, layout: str, blocks: int = BLOCKS) -> KVCacheConfig:
    return get_kv_cache_config_from_groups(config_of(layout, blocks), KINDS[kind], 1 << 30)


def caches_of(kind: str, layout: str, kernel_blocks: int = 1, blocks: int = BLOCKS) -> dict[str, torch.Tensor]:
    """Caches as a worker gets them; ValueError for combinations that vLLM does not build."""
    sizes = [
        BLOCK_TOKENS // (1 if isinstance(group.kv_cache_spec, MambaSpec) else kernel_blocks) for group in KINDS[kind]
    ]
    config = kv_cache_config_of(kind, layout, blocks)
    return allocate_kv_cache(config, DEVICE, KVCacheLayout[layout], sizes)


def groups(kind: str, layout: str) -> list[Group]:
    return groups_of(config_of(layout), kv_cache_config_of(kind, layout))


def worker_of(kind: str, layout: str, caches: dict[str, Any], url: str) -> Worker:
    config, caches_config = config_of(layout), kv_cache_config_of(kind, layout)
    worker = Worker(config, Options(store=url), groups(kind, layout), CHUNK_TOKENS, caches_config)
    worker.register(caches)
    return worker
