"""LMCacheMMConnector: serves vLLM's requests with KV from a store.

It runs in the scheduler and in every worker, and only forwards vLLM's calls: to kv/scheduler.py and kv/worker.py.
"""

from __future__ import annotations

import logging
from math import lcm
from typing import Any

import torch

from lmcache_mm.vllm.api import (
    BlockPool,
    CacheHitSource,
    KVCacheBlocks,
    KVCacheConfig,
    KVConnectorBase_V1,
    KVConnectorFactory,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorTransferResults,
    Request,
    SchedulerOutput,
    SupportsHMA,
    VllmConfig,
    get_current_vllm_config_or_none,
)
from lmcache_mm.vllm.kv.messages import Handshake, Metadata, WorkerMetadata
from lmcache_mm.vllm.kv.scheduler import Scheduler
from lmcache_mm.vllm.kv.worker import Worker
from lmcache_mm.vllm.metrics import PromMetrics, Stats
from lmcache_mm.vllm.options import ENCODER_NAME, NAME, Options, groups_of

logger = logging.getLogger("vllm.lmcache_mm")


class LMCacheMMConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Options, in kv_connector_extra_config:

    store: a URL that every process of the engine can open, or a list of them (see `open_store`). chunk_tokens: the
    number of tokens per record (256; rounded up to whole pages). load: "async" (default) loads while other requests are
    computed; "sync" loads in the step that computes the rest of the request, and the step waits; "layers" does the
    same, but the step waits for each layer in turn. "sync" and "layers" leave one token to compute. identifiers:
    "verify" (default) names items by their processed data, "trust" by vLLM's identifiers, which clients may choose if a
    gateway lets them. opaque_tails: also store partial pages, whole. store_generated: also store generated tokens.
    state_tokens: also store the states of layers that keep one (Mamba, GDN) every this many tokens, not only where
    later prompts are likely to continue. weights: a name for the weights, if neither files nor a commit identify them.
    codec: "split" stores bf16 KV in 0.78 of its length (default None). timeout_s: how long a store may do nothing (5);
    then the tokens that wait for it are computed, and the records that wait are not stored.

    A request may set kv_transfer_params={"lmcache_mm": {"load": False, "store": False}}. kv_role: a kv_producer loads
    nothing, a kv_consumer stores nothing. An engine that stores answers {"lmcache_mm": {"wait": True}} to requests with
    "do_remote_decode"; an engine that loads waits for the KV of such a request, for timeout_s at most.
    """

    _cache_hit_source = CacheHitSource.HOST
    requires_kv_delivery = False

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.of(dict(self._kv_transfer_config.kv_connector_extra_config))
        groups = groups_of(vllm_config, kv_cache_config)
        unit = lcm(*(group.page_tokens for group in groups))
        chunk_tokens = -(-options.chunk_tokens // unit) * unit
        if options.opaque_tails and any(group.states for group in groups):
            raise ValueError(
                f"{NAME}: opaque_tails is not supported with layers that keep a state, which exists only where a block "
                "ends; leave it out"
            )
        if len({group.table for group in groups}) > 1 and options.load != "async":
            raise ValueError(f"{NAME}: load={options.load} is not supported with several KV cache groups; leave it out")
        if options.load != "async" and vllm_config.use_v2_model_runner:
            raise ValueError(
                f"{NAME}: load={options.load} is not supported with Model Runner V2, which goes on with the pages of a "
                "load that failed; leave it out, or set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if options.load != "async" and vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"{NAME}: load={options.load} is not supported with vLLM's prefix caching, which lends the pages of a "
                "load that failed to other requests; leave it out, or add --no-enable-prefix-caching"
            )
        multi = _inside(vllm_config)
        _see_to_failures(vllm_config, role, multi)
        # MultiConnector ends the engine if two of its connectors use the same key in an answer. Two of these would.
        self._promises = multi is None
        self._side: Scheduler | Worker
        if role == KVConnectorRole.SCHEDULER:
            _warn_of_embeddings(vllm_config)
            self._side = Scheduler(vllm_config, options, groups, chunk_tokens, unit)
        else:
            self._side = Worker(vllm_config, options, groups, chunk_tokens, kv_cache_config, alone=multi is None)

    @property
    def _scheduler(self) -> Scheduler:
        assert isinstance(self._side, Scheduler)
        return self._side

    @property
    def _worker(self) -> Worker:
        assert isinstance(self._side, Worker)
        return self._side

    # --- In the scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): one for rank, one in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        ours = [one.layout for _, one in sorted(metadata.items()) if isinstance(one, Handshake)]
        self._scheduler.learn_layouts(dict(enumerate(ours)))

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._scheduler.watch(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._scheduler.follow(request)
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.follow(request)
        if num_external_tokens:
            self._scheduler.plan_load(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.take_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        promise = self._scheduler.promise(request) if self._promises else None
        self._scheduler.drop(request)
        return False, promise

    def take_events(self) -> list[Any]:
        return self._scheduler.take_events()

    def has_pending_push_work(self) -> bool:
        return self._scheduler.saves_are_under_way()

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        return True

    # --- In a worker

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True for "layers": a CUDA graph of the whole model would not wait for each layer."""
        return extra_config.get("load") == "layers"

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """The engine is about to sleep, which unmaps its pages. Called by vLLM 0.33 and newer."""
        self._worker.fall_asleep()

    def restore_kv_caches(self) -> None:
        """The pages are mapped again, at the same addresses."""
        self._worker.wake_up()

    def get_handshake_metadata(self) -> Handshake:
        return Handshake(self._worker.layout)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        step = self._step()
        if step.look is not None:
            self._worker.look(step.look)
        self._worker.begin_step(step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._step().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing: wait_for_save stores all layers at once."""

    def wait_for_save(self) -> None:
        """Saves may still read pages after this returns: see `Worker.begin_step`."""
        self._worker.save()

    def _step(self) -> Metadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Metadata)
        return metadata

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_pages()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        return self._worker.take_news()

    # --- In both

    def get_kv_connector_stats(self) -> Stats | None:
        return self._side.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        self._side.close()


def _inside(config: VllmConfig) -> Any:
    """The engine's kv_transfer_config if another connector (MultiConnector) contains this one; else None."""
    engine = get_current_vllm_config_or_none()
    engines = None if engine is None else engine.kv_transfer_config
    return None if engines is None or engines.kv_connector == config.kv_transfer_config.kv_connector else engines


def _see_to_failures(config: VllmConfig, role: KVConnectorRole, engines: Any) -> None:
    """Makes vLLM compute requests whose load fails; by default it ends them. engines: what _inside returns."""
    ours = config.kv_transfer_config
    if engines is not None:
        if engines.kv_load_failure_policy != "recompute":
            logger.warning(
                "%s inside %s: requests whose load fails will end with an error; "
                'set "kv_load_failure_policy": "recompute" next to "kv_connector": "%s" to compute them instead',
                *(NAME, engines.kv_connector, engines.kv_connector),
            )
    elif role == KVConnectorRole.SCHEDULER and ours.kv_load_failure_policy != "recompute":
        logger.info("%s: requests whose load fails are computed (kv_load_failure_policy=recompute)", NAME)
        ours.kv_load_failure_policy = "recompute"


def _warn_of_embeddings(config: VllmConfig) -> None:
    """vLLM lets clients describe embeddings that they do not send, in case a connector has them. The encoder connector
    fails such a request. Without it the model gets the request, and the engine ends."""
    model, encoder = config.model_config, config.ec_transfer_config
    multimodal = None if model is None else model.multimodal_config
    accepted = multimodal is not None and multimodal.allow_missing_mm_embeddings
    if accepted and (encoder is None or not encoder.is_ec_consumer):
        logger.warning(
            "%s: with this connector, vLLM accepts requests that describe embeddings and contain none, and such a "
            "request ends the engine: add %s, which fails it alone, or strip *_embeds from untrusted requests",
            *(NAME, ENCODER_NAME),
        )


# MultiConnector's front end looks connectors up by name only.
if NAME not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector(NAME, __name__, NAME)
