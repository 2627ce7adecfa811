"""LMCacheMMConnector: vLLM's requests served with KV from a store.

It runs in two places. In the scheduler: which tokens of a request the store has, and which records each step loads and
stores. In every worker: the copies. Both open the store by its URL; workers tell the scheduler their layouts once.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from blake3 import blake3
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import (
    KVCacheSpecKind,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
    group_kernel_blocks,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_mm.cache import Record, chain, record_key
from lmcache_mm.layout import KVLayout, fingerprint_of_groups
from lmcache_mm.prompt import Item, Namespace, owner_of
from lmcache_mm.stores import Store, open_store
from lmcache_mm.transfer import Chunk, Job, Transfer
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.metrics import PromMetrics, Stats
from lmcache_mm.vllm.request_tracker import RequestTracker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

NAME = "LMCacheMMConnector"
OPTIONS = ("store", "chunk_tokens", "load", "identifiers", "opaque_tails", "store_generated", "weights")
KINDS = {
    KVCacheSpecKind.FULL_ATTENTION,
    KVCacheSpecKind.MLA_ATTENTION,
    KVCacheSpecKind.SLIDING_WINDOW,
    KVCacheSpecKind.SLIDING_WINDOW_MLA,
}
NULL_BLOCK = 0

logger = logging.getLogger("vllm.lmcache_mm")


class Options(NamedTuple):
    """kv_connector_extra_config, checked."""

    store: str | list[str]
    chunk_tokens: int = 256
    load: str = "async"
    identifiers: str = "verify"
    opaque_tails: bool = False
    store_generated: bool = False
    weights: str | None = None

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Options:
        unknown = sorted(set(extra) - set(OPTIONS))
        if unknown:
            raise ValueError(f"{NAME}: unknown option {unknown[0]!r}; expected some of {', '.join(OPTIONS)}")
        if "store" not in extra:
            raise ValueError(f'{NAME}: "store" is missing, such as "shm:///vllm?capacity=32GiB"')
        for name, allowed in (("load", ("async", "sync")), ("identifiers", ("verify", "trust"))):
            if extra.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{NAME}: {name}: expected {' or '.join(allowed)}, got {extra[name]!r}")
        options = cls(**extra)
        urls = options.store if isinstance(options.store, list) else [options.store]
        if any(url.startswith(("mem:", "tiered:mem:")) for url in urls):
            raise ValueError(f"{NAME}: store: mem: is one process's alone, and vLLM has several")
        return options


@dataclass
class Group:
    """One KV cache group: layers that share a block table."""

    layers: list[str]
    page_tokens: int
    window: int | None  # of sliding-window attention
    kv_dtypes: list[str]


@dataclass
class RecordPages:
    """A record of one group, in pages: those of NULL_BLOCK are left out of a load."""

    group: int
    key: bytes
    pages: list[int]
    tokens: int


@dataclass
class Load:
    """What one request loads in one go."""

    request_id: str
    owner: bytes
    asynchronous: bool
    records: list[RecordPages]


@dataclass
class Save:
    """What one request stores in one step."""

    request_id: str
    owner: bytes
    records: list[RecordPages]


@dataclass
class Metadata(KVConnectorMetadata):
    """One step's work for the workers."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler."""

    fingerprint: bytes


def groups_of(config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[Group]:
    """The engine's groups; ValueError for what cannot be cached."""
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"{NAME}: {name} > 1 is not supported: ranks would hold parts of pages")
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        kind = get_kv_cache_spec_kind(spec)
        if kind not in KINDS:
            raise ValueError(f"{NAME}: layers of kind {kind.value!r} are not supported ({group.layer_names[0]}, …)")
        specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
        dtypes = [str(one.dtype).removeprefix("torch.") for one in specs]
        groups.append(Group(list(group.layer_names), spec.block_size, get_kv_cache_spec_sliding_window(spec), dtypes))
    return groups


class LMCacheMMConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Options, in kv_connector_extra_config:

    store: a URL that every process of the engine can open, or a list of them (see `open_store`). chunk_tokens: the unit
    that is stored (256; rounded up to whole pages). load: "async" (default), or "sync", whose hits end before the end
    of the first item. identifiers: "verify" (default) names items by their processed data, "trust" by vLLM's
    identifiers, which clients may choose where a gateway lets them. opaque_tails: partial pages are stored too, whole.
    store_generated: so are generated tokens. weights: what the weights are, where neither files nor a commit tell.

    A request may say kv_transfer_params={"lmcache_mm": {"load": False, "store": False}}.
    """

    _cache_hit_source = CacheHitSource.HOST
    requires_kv_delivery = False

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.of(dict(self._kv_transfer_config.kv_connector_extra_config))
        groups = groups_of(vllm_config, kv_cache_config)
        unit = lcm(*(group.page_tokens for group in groups))
        chunk_tokens = -(-options.chunk_tokens // unit) * unit
        if len(groups) > 1 and options.load == "sync":
            raise ValueError(f"{NAME}: load=sync is not supported with several KV cache groups; leave it out")
        self._side: Scheduler | Worker
        if role == KVConnectorRole.SCHEDULER:
            if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
                logger.info("%s: requests whose load fails are computed (kv_load_failure_policy=recompute)", NAME)
                vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
            self._side = Scheduler(vllm_config, options, groups, chunk_tokens, 1 if options.opaque_tails else unit)
        else:
            self._side = Worker(vllm_config, options, groups, chunk_tokens, kv_cache_config.num_blocks)

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
        self._scheduler.set_layouts(
            [one.fingerprint for _, one in sorted(metadata.items()) if isinstance(one, Handshake)]
        )

    def on_new_request(self, request: Request) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._scheduler.plan_load(request, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.take_failures(
            connector_output.failed_recving or set(), connector_output.invalid_block_ids or set()
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.drop(request)
        return False, None

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        return True

    # --- In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> Handshake:
        return Handshake(self._worker.fingerprint)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._step().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Synchronous loads are complete when start_load_kv returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers are stored at once, in wait_for_save."""

    def wait_for_save(self) -> None:
        self._worker.save(self._step().saves)

    def _step(self) -> Metadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Metadata)
        return metadata

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks()

    # --- In both

    def get_kv_connector_stats(self) -> Stats | None:
        return self._side.stats.take()

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


@dataclass
class _Request:
    """What the scheduler's side knows of one request."""

    request: Request
    loads: bool
    saves: bool
    tracker: RequestTracker | None = None  # None: not cached
    digests: Future[RequestTracker | None] | None = None  # under way
    local_tokens: int = 0  # of the last match
    hit: list[Record] = field(default_factory=list)


class Scheduler:
    """The connector's side in the scheduler."""

    def __init__(
        self, config: VllmConfig, options: Options, groups: list[Group], chunk_tokens: int, whole: int
    ) -> None:
        self.stats = Stats()
        self._config, self._options, self._groups = config, options, groups
        self._chunk_tokens, self._whole = chunk_tokens, whole
        self._store: Store = open_store(options.store)
        self._ranks = config.parallel_config.tensor_parallel_size * config.parallel_config.pipeline_parallel_size
        self._namespace: Namespace | None = None
        self._layouts: list[bytes] = []
        self._identifiers = identity.Identifiers()
        self._digesting = ThreadPoolExecutor(1, "lmcache_mm digest")
        self._requests: dict[str, _Request] = {}
        self._loads: list[Load] = []
        self._failed: set[str] = set()
        self._synchronous: list[Load] = []  # of the last step

    def set_layouts(self, fingerprints: list[bytes]) -> None:
        if len(fingerprints) != self._ranks:
            raise ValueError(f"{NAME}: expected a layout from each of {self._ranks} workers, got {len(fingerprints)}")
        self._layouts = fingerprints
        self._make_namespace(self._options.weights)

    def _make_namespace(self, weights: str | None) -> None:
        dtypes = [dtype for group in self._groups for dtype in group.kv_dtypes]
        namespace = identity.namespace_of(self._config, dtypes, weights)
        layout = self._layouts[0] if len(self._layouts) == 1 else blake3(b"".join(self._layouts)).digest()
        self._namespace = namespace.with_layout(layout)

    def reset(self) -> None:
        """What was stored before is never matched again by this engine: its weights may be others now."""
        if self._layouts:
            self._make_namespace(f"after a reset {uuid.uuid4().hex}")
        for request in self._requests.values():
            request.tracker = request.digests = None

    def close(self) -> None:
        self._digesting.shutdown(cancel_futures=True)
        self._store.close()

    # --- Requests

    def add(self, request: Request) -> None:
        wishes = (request.kv_transfer_params or {}).get("lmcache_mm", {})
        ours = _Request(request, bool(wishes.get("load", True)), bool(wishes.get("store", True)))
        self._requests[request.request_id] = ours
        if ours.loads or ours.saves:
            ours.digests = self._digesting.submit(self._identify, request)

    def _identify(self, request: Request) -> RequestTracker | None:
        """The request's tracker, None if what decides its KV is not known. Runs beside the scheduler."""
        try:
            items = []
            for feature in request.mm_features:
                name = feature.identifier
                if self._options.identifiers == "verify":
                    name = identity.digest_of_data(feature.modality, feature.data)
                    if not self._identifiers.agree(feature.identifier, name):
                        raise identity.Unknown(f"the identifier {feature.identifier!r} stood for other data before")
                position = feature.mm_position
                items.append(Item(name, position.offset, position.length, feature.modality))
            lora = identity.digest_of_lora(request.lora_request)
            embeds = identity.digest_of_embeds(request.prompt_embeds, getattr(request, "prompt_is_token_ids", None))
        except (identity.Unknown, OSError) as error:
            logger.warning("%s: request %s is not cached: %s", NAME, request.request_id, error)
            return None
        assert self._namespace is not None
        salt = request.cache_salt or None
        root = self._namespace.root(salt, lora, embeds)
        return RequestTracker(items, root, owner_of(salt), request.num_prompt_tokens, self._chunk_tokens, self._whole)

    def _tracked(self, request_id: str) -> _Request | None:
        """The request, with its tracker; None if it is not cached or not known yet."""
        ours = self._requests.get(request_id)
        if ours is None:
            return None
        if ours.digests is not None:
            if not ours.digests.done():
                return None
            ours.tracker, ours.digests = ours.digests.result(), None
        return ours if ours.tracker else None

    def drop(self, request: Request) -> None:
        """A load that is planned stays: until a worker reports it vLLM keeps the pages."""
        ours = self._requests.pop(request.request_id, None)
        if ours and ours.digests:
            ours.digests.cancel()
        self._failed.discard(request.request_id)

    # --- Matching

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the first `local_tokens` could be loaded, and whether in the background."""
        ours = self._requests.get(request.request_id)
        if ours is None or not ours.loads or request.request_id in self._failed:
            return 0, False
        if ours.digests is not None and not ours.digests.done():
            return None, False
        if self._tracked(request.request_id) is None:
            return 0, False
        tracker = ours.tracker
        assert tracker is not None
        asynchronous = self._options.load == "async"
        limit = request.num_tokens
        if not asynchronous:
            # A token is left to be computed in the same step. And vLLM sends no data of items that lie wholly within
            # what is loaded to its workers, which then could not compute them if the load failed.
            ends = [f.mm_position.offset + f.mm_position.length for f in request.mm_features]
            limit = min([request.num_tokens, *ends]) - 1
        ours.hit = self._longest(tracker.records(request.all_token_ids, limit))
        ours.local_tokens = local_tokens
        hit = ours.hit[-1].end if ours.hit else 0
        self.stats.add(queried_tokens=request.num_tokens, hit_tokens=max(0, hit - local_tokens))
        return max(0, hit - local_tokens), asynchronous and hit > local_tokens

    def _longest(self, records: list[Record]) -> list[Record]:
        """Those of `records` that cover the longest prefix whose KV is there, as far as each group needs it."""
        places = [(g, rank) for g in range(len(self._groups)) for rank in range(self._ranks)]
        present = iter(self._store.contains([record_key(r.key, g, rank) for r in records for g, rank in places]))
        there = {r.end: {g for g, _ in places} - {g for g, _ in places if not next(present)} for r in records}
        full = {g for g, group in enumerate(self._groups) if group.window is None}
        whole = full or set(range(len(self._groups)))  # without full attention, every record of every group
        found = chain((r for r in records if whole <= there[r.end]), self._chunk_tokens)
        while found:
            hit = found[-1].end
            if all(
                g in there[r.end]
                for g, group in enumerate(self._groups)
                for r in found
                if g in full or group.window is None or r.end > hit - group.window
            ):
                return found
            found = chain(found[:-1], self._chunk_tokens)
        return []

    def plan_load(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        ours = self._requests[request.request_id]
        assert ours.tracker is not None
        records = [r for r in ours.hit if r.end > ours.local_tokens]
        pages = self._pages(records, block_ids, ours.local_tokens)
        asynchronous = self._options.load == "async"
        self._loads.append(Load(request.request_id, ours.tracker.owner, asynchronous, pages))
        ours.tracker.stored_tokens = max(ours.tracker.stored_tokens, ours.hit[-1].end)

    def _pages(self, records: list[Record], block_ids: tuple[list[int], ...], first: int = 0) -> list[RecordPages]:
        """The records of every group, less pages that are null or wholly before token `first`, and records without a
        page."""
        out = []
        for g, group in enumerate(self._groups):
            size = group.page_tokens
            for record in records:
                numbers = range(record.begin // size, -(-record.end // size))
                pages = [block_ids[g][i] if i >= first // size else NULL_BLOCK for i in numbers]
                if any(page != NULL_BLOCK for page in pages):
                    out.append(RecordPages(g, record.key, pages, record.end - record.begin))
        return out

    # --- Steps

    def plan_step(self, step: SchedulerOutput) -> Metadata:
        metadata = Metadata(loads=self._loads)
        self._loads = []
        self._synchronous = [load for load in metadata.loads if not load.asynchronous]
        blocks = step.kv_connector_block_state
        for request_id, scheduled in step.num_scheduled_tokens.items():
            ours = self._tracked(request_id)
            if ours is None or not ours.saves:
                continue
            request, tracker = ours.request, ours.tracker
            assert tracker is not None
            drafts = len(step.scheduled_spec_decode_tokens.get(request_id, ()))
            until = min(request.num_computed_tokens + scheduled - drafts, request.num_tokens)
            if not self._options.store_generated:
                until = min(until, request.num_prompt_tokens)
            records = tracker.records(request.all_token_ids, until, tracker.stored_tokens)
            block_ids = blocks.get_block_ids(request_id)
            if not records or block_ids is None:
                continue
            tracker.stored_tokens = records[-1].end
            whole = [one for one in self._pages(records, block_ids) if NULL_BLOCK not in one.pages]
            if whole:
                metadata.saves.append(Save(request_id, tracker.owner, whole))
        return metadata

    def take_failures(self, failed: set[str], bad_blocks: set[int]) -> None:
        """Requests whose load failed are computed, and never matched again: a store that claims and does not deliver
        would be asked for ever. What the step of a failed load stored is garbage, which the workers left out."""
        failed = set(failed)
        for load in self._synchronous:
            if any(page in bad_blocks for one in load.records for page in one.pages):
                failed.add(load.request_id)
        for request_id in failed:
            ours = self._requests.get(request_id)
            if ours is None:
                continue
            self._failed.add(request_id)
            self.stats.add(failed_loads=1)
            if ours.tracker:
                ours.tracker.stored_tokens = 0


class Worker:
    """The connector's side in a worker."""

    def __init__(
        self, config: VllmConfig, options: Options, groups: list[Group], chunk_tokens: int, num_blocks: int
    ) -> None:
        self.stats = Stats()
        self.fingerprint = b""
        self._options, self._groups = options, groups
        self._chunk_tokens, self._num_blocks = chunk_tokens, num_blocks
        parallel = config.parallel_config
        self._rank = parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        self._store: Store | None = None
        self._transfers: list[Transfer] = []
        self._loading: dict[str, tuple[Load, list[tuple[int, Job[int]]]]] = {}
        self._failed_now: set[str] = set()  # requests whose synchronous load of this step failed
        self._bad_blocks: set[int] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layouts = []
        for group in self._groups:
            views = {name: group_kernel_blocks(kv_caches[name], self._num_blocks) for name in group.layers}
            layouts.append(KVLayout.from_tensors(views, page_tokens=group.page_tokens, page_dim=0, opaque=True))
        self.fingerprint = fingerprint_of_groups(layouts, self._chunk_tokens)
        self._store = open_store(self._options.store)
        self._transfers = [
            Transfer(layout, self._store, layout.payload_bytes(self._chunk_tokens // layout.page_tokens))
            for layout in layouts
        ]

    def close(self) -> None:
        for transfer in self._transfers:
            transfer.close()
        if self._store is not None:
            self._store.close()

    def _chunks(self, records: Sequence[RecordPages]) -> Iterator[tuple[Transfer, list[Chunk]]]:
        """Of every group that has some of the records, in its layout."""
        for g, transfer in enumerate(self._transfers):
            chunks = []
            for one in records:
                if one.group == g:
                    pages = torch.tensor(one.pages, dtype=torch.int64)
                    pages[pages == NULL_BLOCK] = -1
                    chunks.append(Chunk(record_key(one.key, g, self._rank), pages, one.tokens))
            if chunks:
                yield transfer, chunks

    def load(self, loads: list[Load]) -> None:
        self._failed_now = set()
        for load in loads:
            jobs = [(len(chunks), transfer.load(chunks, load.owner)) for transfer, chunks in self._chunks(load.records)]
            if load.asynchronous:
                self._loading[load.request_id] = (load, jobs)
            elif not self._succeeded(load, jobs):
                self._failed_now.add(load.request_id)
                self._bad_blocks |= {page for one in load.records for page in one.pages if page != NULL_BLOCK}

    def _succeeded(self, load: Load, jobs: list[tuple[int, Job[int]]]) -> bool:
        try:
            good = all([job.wait() == expected for expected, job in jobs])
        except Exception:
            logger.exception("%s: a load failed", NAME)
            good = False
        if good:
            of_groups = [sum(one.tokens for one in load.records if one.group == g) for g in range(len(self._groups))]
            self.stats.add(loaded_tokens=max(of_groups))
        return good

    def save(self, saves: list[Save]) -> None:
        """Returns when the pages are read: they may be overwritten in the next step."""
        for save in saves:
            if save.request_id in self._failed_now:
                continue
            jobs = [transfer.store(chunks, save.owner) for transfer, chunks in self._chunks(save.records)]
            try:
                self.stats.add(stored_tokens=max(job.wait() for job in jobs))
            except Exception:
                logger.exception("%s: a store failed", NAME)
                self.stats.add(failed_stores=1)

    def results(self) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for request_id, (load, jobs) in list(self._loading.items()):
            if all(job.done() for _, job in jobs):
                del self._loading[request_id]
                results.finished_recving.add(request_id)
                if not self._succeeded(load, jobs):
                    results.failed_recving.add(request_id)
        return results

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad


# MultiConnector's front end finds connectors by name only.
if NAME not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector(NAME, __name__, NAME)
