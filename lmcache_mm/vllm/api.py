"""vLLM as this package sees it: the only module that imports names from vLLM or knows how its versions differ."""

from __future__ import annotations

import os

import vllm

from lmcache_mm.engine import VLLM_VERSIONS, is_tested


def check_version(version: str) -> None:
    """RuntimeError for a vLLM that the connector was not tested with: its hooks may mean something else."""
    if is_tested(version, VLLM_VERSIONS) or os.environ.get("LMCACHE_MM_ANY_VLLM") == "1":
        return
    raise RuntimeError(
        f"lmcache_mm supports vLLM {' and '.join(VLLM_VERSIONS)}, but this is vLLM {version}. Install one of these, "
        "or set LMCACHE_MM_ANY_VLLM=1 to start anyway: vLLM's hooks may have changed, and answers may be wrong"
    )


check_version(vllm.__version__)

MINOR_VERSION = ".".join(vllm.__version__.split(".")[:2])

# In a session, vLLM 0.32 also counts tokens as computed that speculative decoding computed past the last one it keeps.
SESSIONS_OUTRUN_TOKENS = vllm.__version__.startswith("0.32.")

from vllm.config import VllmConfig, get_current_vllm_config_or_none  # noqa: E402
from vllm.distributed.ec_transfer.ec_connector.base import (  # noqa: E402
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats  # noqa: E402
from vllm.distributed.kv_events import (  # noqa: E402
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats  # noqa: E402
from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheBlocks  # noqa: E402
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    ExternalBlockHash,
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    resolve_block_hashes,
    to_event_extra_keys,
)
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    KVCacheConfig,
    KVCacheSpec,
    KVCacheSpecKind,
    MambaSpec,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
    group_kernel_blocks,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402
from vllm.v1.outputs import ECConnectorOutput, KVConnectorOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.worker.worker_base import WorkerBase  # noqa: E402

__all__ = [
    "MEDIUM_CPU",
    "MEDIUM_STORAGE",
    "MINOR_VERSION",
    "SESSIONS_OUTRUN_TOKENS",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "CacheHitSource",
    "ECConnectorBase",
    "ECConnectorMetadata",
    "ECConnectorOutput",
    "ECConnectorPromMetrics",
    "ECConnectorRole",
    "ECConnectorStats",
    "ECConnectorWorkerMetadata",
    "ExternalBlockHash",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVCacheEvent",
    "KVCacheSpec",
    "KVCacheSpecKind",
    "KVConnectorBase_V1",
    "KVConnectorFactory",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "MambaSpec",
    "Request",
    "SchedulerOutput",
    "SupportsHMA",
    "VllmConfig",
    "WorkerBase",
    "generate_block_hash_extra_keys",
    "get_conv_state_layout",
    "get_current_vllm_config_or_none",
    "get_kv_cache_spec_kind",
    "get_kv_cache_spec_sliding_window",
    "group_kernel_blocks",
    "maybe_convert_block_hash",
    "resolve_block_hashes",
    "to_event_extra_keys",
]
