"""LMCacheMMEncoderConnector: keeps vLLM's encoder outputs in a store, so that an item seen before is not encoded again.

It runs in the scheduler and in every worker, and only forwards vLLM's calls: to encoder/scheduler.py and
encoder/worker.py.
"""

from __future__ import annotations

from typing import Any

import torch

from lmcache_mm.vllm.api import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorOutput,
    ECConnectorRole,
    Request,
    SchedulerOutput,
    VllmConfig,
)
from lmcache_mm.vllm.encoder.messages import EncoderMetadata, EncoderWorkerMetadata
from lmcache_mm.vllm.encoder.scheduler import EncoderScheduler
from lmcache_mm.vllm.encoder.worker import EncoderWorker
from lmcache_mm.vllm.metrics import EncoderPromMetrics, EncoderStats
from lmcache_mm.vllm.options import ENCODER_NAME, EncoderOptions


class LMCacheMMEncoderConnector(ECConnectorBase):
    """See the module. Options, in ec_connector_extra_config:

    store: a URL that every process of the engine can open, or a list of them (see `open_store`); LMCacheMMConnector may
    use the same one. weights: a name for the weights, if neither files nor a commit identify them. timeout_s: how long
    a store may do nothing (5); then the items that wait for it are encoded.

    A request may set ec_transfer_params or kv_transfer_params={"lmcache_mm": {"load": False, "store": False}}. ec_role:
    an ec_producer only encodes, and answers ec_transfer_params={"lmcache_mm": {"wait": True}}; an ec_consumer stores
    nothing. An engine that loads waits for the items of such a request, for timeout_s at most.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        config = vllm_config.ec_transfer_config
        model = vllm_config.model_config
        if model.is_encoder_decoder:
            raise ValueError(
                f"{ENCODER_NAME}: encoder-decoder models are not supported: vLLM does not keep their outputs"
            )
        if getattr(model.multimodal_config, "mm_encoder_attn_dtype", None) is not None:
            raise ValueError(
                f"{ENCODER_NAME}: mm_encoder_attn_dtype is not supported: its scales depend on earlier items"
            )
        options = EncoderOptions.of(dict(config.ec_connector_extra_config))
        self._side: EncoderScheduler | EncoderWorker
        if role == ECConnectorRole.SCHEDULER:
            self._side = EncoderScheduler(vllm_config, options)
        else:
            self._side = EncoderWorker(vllm_config, options)
            self._device_type: str = vllm_config.device_config.device_type

    @property
    def _scheduler(self) -> EncoderScheduler:
        assert isinstance(self._side, EncoderScheduler)
        return self._side

    @property
    def _worker(self) -> EncoderWorker:
        assert isinstance(self._side, EncoderWorker)
        return self._side

    # --- In the scheduler

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        return self._scheduler.ensure(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.claims(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        self._scheduler.plan(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EncoderMetadata:
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        self._scheduler.take_output(connector_output)

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduler.take_unavailable()

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        promise = self._scheduler.promise(request)
        self._scheduler.drop(request)
        return False, promise

    # --- In a worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        device = torch.device(self._device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self._worker.load(encoder_cache, self._step(), device)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        self._worker.save(encoder_cache, mm_hash, self._step())

    def build_connector_worker_meta(self) -> EncoderWorkerMetadata | None:
        return self._worker.take_news()

    def _step(self) -> EncoderMetadata:
        metadata: ECConnectorMetadata = self._get_connector_metadata()
        assert isinstance(metadata, EncoderMetadata)
        return metadata

    # --- In both

    def get_ec_connector_stats(self) -> EncoderStats | None:
        """Workers send their counts to the scheduler in their metadata, which both of vLLM's model runners forward."""
        return self._side.stats.take() if isinstance(self._side, EncoderScheduler) else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> EncoderStats:
        return EncoderStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> EncoderPromMetrics:
        return EncoderPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        self._side.close()
