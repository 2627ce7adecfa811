"""SGLang as this package sees it: the only module that imports names from SGLang."""

from __future__ import annotations

import os

import sglang

from lmcache_mm.engine import SGLANG_VERSIONS, is_tested


def check_version(version: str) -> None:
    """RuntimeError for an SGLang that the backend was not tested with: its hooks may mean something else."""
    if is_tested(version, SGLANG_VERSIONS) or os.environ.get("LMCACHE_MM_ANY_SGLANG") == "1":
        return
    raise RuntimeError(
        f"lmcache_mm supports SGLang {' and '.join(SGLANG_VERSIONS)}, but this is SGLang {version}. Install that one, "
        "or set LMCACHE_MM_ANY_SGLANG=1 to start anyway: SGLang's hooks may have changed, and answers may be wrong"
    )


check_version(sglang.__version__)

from huggingface_hub.constants import HF_HUB_CACHE  # noqa: E402
from sglang.srt.arg_groups.overrides import resolving_view  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.page_interleave import PageInterleaveHostPool  # noqa: E402
from sglang.srt.observability.metrics_collector import StorageMetrics  # noqa: E402
from sglang.srt.runtime_context import get_server_args  # noqa: E402

__all__ = [
    "HF_HUB_CACHE",
    "HiCacheStorage",
    "HiCacheStorageConfig",
    "HiCacheStorageExtraInfo",
    "MHATokenToKVPoolHost",
    "ModelConfig",
    "PageInterleaveHostPool",
    "PoolHitPolicy",
    "PoolName",
    "PoolTransfer",
    "PoolTransferResult",
    "StorageMetrics",
    "get_server_args",
    "resolving_view",
]
