"""The connector's side in a worker: copies KV between pages and the store."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from lmcache_mm import codec
from lmcache_mm.cache import record_key
from lmcache_mm.job import Job
from lmcache_mm.lane import Abandoned
from lmcache_mm.layout import KVLayout, fingerprint_of_groups
from lmcache_mm.payloads import Chunk
from lmcache_mm.stores import kind_of, open_store
from lmcache_mm.stores.store import Store
from lmcache_mm.transfer import Transfer
from lmcache_mm.vllm.api import (
    KVCacheConfig,
    KVConnectorBase_V1,
    KVConnectorTransferResults,
    VllmConfig,
    group_kernel_blocks,
)
from lmcache_mm.vllm.kv.messages import NULL_BLOCK, Layout, Load, Metadata, RecordPages, Save, WorkerMetadata
from lmcache_mm.vllm.kv.weights import digest_of, worker_of
from lmcache_mm.vllm.metrics import Stats
from lmcache_mm.vllm.options import NAME, Group, Options

SAVE_S = 0.1  # total time that a step waits for saves that still have to read pages that it writes
STEP_SAVE_S = 1.0  # the same, if all saves have to read their pages within their step

logger = logging.getLogger("vllm.lmcache_mm")


class Part(NamedTuple):
    """The part of a load for one group."""

    layers: Collection[str]
    chunks: int
    job: Job[int]


class Saving(NamedTuple):
    """A save in progress."""

    save: Save
    jobs: list[Job[int]]
    pages: frozenset[int]


Loading = tuple[Load, list[Part]]


class Worker:
    """See the module."""

    def __init__(
        self,
        config: VllmConfig,
        options: Options,
        groups: list[Group],
        chunk_tokens: int,
        caches: KVCacheConfig,
        alone: bool = True,
    ) -> None:
        self.stats = Stats()
        self.layout = Layout(b"", (), b"")
        self._engine = worker_of(config)
        self._options, self._groups = options, groups
        self._chunk_tokens, self._num_blocks = chunk_tokens, caches.num_blocks
        parallel = config.parallel_config
        self._rank = parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        self._store: Store | None = None
        self._transfers: list[Transfer] = []
        self._loading: dict[str, Loading] = {}  # in the background
        self._in_step: list[Loading] = []  # that this step waits for
        self._bad_pages: set[int] = set()
        self._asleep = False  # the pages are not mapped
        self._warned = False  # that the store is too slow
        # Whether saves may continue after their step. They may not if vLLM writes pages before the connector learns of
        # the step (to zero or copy them), if other connectors load into pages, or if pages are unmapped without notice.
        sleeps = config.model_config is not None and config.model_config.enable_sleep_mode
        self._saves_behind_steps = (
            alone
            and not caches.needs_kv_cache_zeroing
            and {caches.hash_block_size} in ({None}, {group.page_tokens for group in groups})
            and (hasattr(KVConnectorBase_V1, "unregister_kv_caches") or not sleeps)
        )
        self._prepared: list[Saving] = []  # of this step
        self._saving: list[Saving] = []
        self._handled: BaseException | None = None  # the exception that a caller was handling when the step began
        self._news = WorkerMetadata()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layouts = []
        for group in self._groups:
            views = {name: group_kernel_blocks(kv_caches[name], self._num_blocks) for name in group.layers}
            layout = KVLayout.from_tensors(views, page_tokens=group.page_tokens, page_dim=0, opaque=True)
            # vLLM passes states as plain bytes, so the tensor does not show their dtypes.
            layouts.append(replace(layout, spec=f"{layout.spec}; {group.kv_dtype}") if group.states else layout)
        codecs = [codec.of_layout(self._options.codec, layout) for layout in layouts]
        fingerprint = fingerprint_of_groups(layouts, self._chunk_tokens, codecs=codecs)
        self.layout = Layout(fingerprint, tuple(group.number for group in self._groups), digest_of(self._engine))
        self._news.layouts[self._rank] = self.layout
        self._store = open_store(self._options.store, self.stats.observe)
        moved = partial(self.stats.observe, kind_of(self._options.store))
        self._transfers = [
            Transfer(
                layout,
                self._store,
                layout.payload_bytes(1 if group.states else self._chunk_tokens // layout.page_tokens),
                moved,
                coding,
            )
            for layout, group, coding in zip(layouts, self._groups, codecs, strict=True)
        ]

    def fall_asleep(self) -> None:
        """Returns when no load or save touches pages anymore. New ones fail until `wake_up`."""
        self._asleep = True
        deadline = time.monotonic() + min(STEP_SAVE_S, self._options.timeout_s)
        for _, parts in self._loading.values():
            for part in parts:
                part.job._leave_pages(deadline)
        self._leave(None, STEP_SAVE_S)

    def wake_up(self) -> None:
        self._asleep = False

    def close(self) -> None:
        self._drop_prepared()
        if all([transfer.close(self._options.timeout_s) for transfer in self._transfers]) and self._store is not None:
            self._store.close()

    def _chunks(self, records: Sequence[RecordPages]) -> Iterator[tuple[Transfer, list[Chunk]]]:
        """The chunks of each group that has some of the records, and the group's transfer."""
        for group, transfer in zip(self._groups, self._transfers, strict=True):
            of_group = [one for one in records if one.table == group.table]
            if not of_group:
                continue
            pages = torch.tensor([-1 if page == NULL_BLOCK else page for one in of_group for page in one.pages])
            parts = pages.split([len(one.pages) for one in of_group])
            yield (
                transfer,
                [
                    Chunk(record_key(one.key, group.number, self._rank), part, one.tokens)
                    for one, part in zip(of_group, parts, strict=True)
                ],
            )

    # --- Loads

    def load(self, loads: list[Load]) -> None:
        by_layer = self._options.load == "layers"
        for load in loads:
            parts = [
                Part(transfer.layout.planes_until, len(chunks), transfer.load(chunks, load.owner, by_layer))
                for transfer, chunks in self._chunks(load.records)
                if not self._asleep
            ]
            if self._options.load == "async":
                self._loading[load.request_id] = (load, parts)
            else:
                self._in_step.append((load, parts))
        if not by_layer:
            self._end_loads_of_step()

    def wait_for_layer(self, layer: str) -> None:
        for _, parts in self._in_step:
            for part in parts:
                if layer in part.layers:
                    part.job.layer_ready(layer, self._options.timeout_s)

    def _end_loads_of_step(self) -> None:
        """Waits for the step's loads. Failed ones are reported when the step has ended."""
        for load, parts in self._in_step:
            for part in parts:
                part.job.pages_free(self._options.timeout_s)
            self._news.loaded.add(load.serial)
            if not self._succeeded(load, parts):
                self._bad_pages |= {page for one in load.records for page in one.pages if page != NULL_BLOCK}
        self._in_step = []

    def _succeeded(self, load: Load, parts: list[Part]) -> bool:
        """Whether a load has filled all its pages. It must not touch them anymore."""
        if not parts:
            return False
        if not all(part.job.done() for part in parts):
            logger.warning(
                "%s: a load was given up, because the store did nothing for %g s", NAME, self._options.timeout_s
            )
            return False
        try:
            good = all([part.job.result() == part.chunks for part in parts])
        except Exception:
            logger.exception("%s: a load failed", NAME)
            return False
        if good and self._rank == 0:
            tokens: Counter[int] = Counter()
            for one in load.records:
                tokens[one.table] += one.tokens
            self.stats.add(loaded_tokens=max(tokens.values(), default=0))
        return good

    def results(self) -> KVConnectorTransferResults:
        """Background loads that have ended or were given up, each reported once."""
        self._end_loads_of_step()  # with speculative decoding, vLLM calls this before wait_for_save
        results = KVConnectorTransferResults()
        for request_id, (load, parts) in list(self._loading.items()):
            if all([part.job.done() or part.job.give_up(self._options.timeout_s) for part in parts]):
                del self._loading[request_id]
                results.finished_recving.add(request_id)
                if not self._succeeded(load, parts):
                    results.failed_recving.add(request_id)
        return results

    def take_bad_pages(self) -> set[int]:
        bad, self._bad_pages = self._bad_pages, set()
        return bad

    # --- Saves

    def begin_step(self, step: Metadata) -> None:
        """Runs before the step computes anything. Saves may read pages after the step that computed them, until the
        pages are written again. So this waits for saves that still have to read pages that the step will write."""
        self._drop_prepared()
        self._leave(step.written, SAVE_S)
        self._handled = sys.exc_info()[1]
        for save in step.saves:
            if self._asleep or any(t.stores_stalled_s() >= self._options.timeout_s for t in self._transfers):
                self._saved(save, stored=False)
                continue
            # The store allocates room while the step is computed.
            jobs = [transfer.store(chunks, save.owner, early=True) for transfer, chunks in self._chunks(save.records)]
            pages = frozenset(page for record in save.records for page in record.pages)
            self._prepared.append(Saving(save, jobs, pages))

    def save(self) -> None:
        """Starts reading what the step has computed."""
        self._end_loads_of_step()
        if sys.exc_info()[1] is not self._handled:
            self._drop_prepared()  # vLLM also calls this after a forward pass that failed
        prepared, self._prepared = self._prepared, []
        for saving in prepared:
            for job in saving.jobs:
                job.written()
        self._saving += prepared
        if not self._saves_behind_steps:
            self._leave(None, STEP_SAVE_S)
        self._see_saves()

    def _leave(self, pages: set[int] | None, patience_s: float) -> None:
        """Returns when no save reads any of `pages` anymore (None: any page). Saves that take longer than `patience_s`
        in all are given up, at once if the store has already done nothing for that long."""
        stalled_s = max((transfer.stores_stalled_s() for transfer in self._transfers), default=0.0)
        deadline = time.monotonic() + max(0.0, min(patience_s, self._options.timeout_s) - stalled_s)
        for saving in self._saving:
            if pages is not None and saving.pages.isdisjoint(pages):
                continue
            if not all([job._leave_pages(deadline) for job in saving.jobs]) and not self._warned:
                self._warned = True
                logger.warning("%s: the store is too slow for the engine: saves are given up (failed_stores)", NAME)

    def _drop_prepared(self) -> None:
        """Abandons the step's saves, because their pages were not computed."""
        prepared, self._prepared = self._prepared, []
        for saving in prepared:
            for job in saving.jobs:
                job.abandon()
            self._saved(saving.save, stored=False)

    def _see_saves(self) -> None:
        """Counts the saves that have ended."""
        going_on = []
        for saving in self._saving:
            if all(job.done() for job in saving.jobs):
                self._saved(saving.save, self._stored(saving.jobs))
            else:
                going_on.append(saving)
        self._saving = going_on

    def _stored(self, jobs: list[Job[int]]) -> bool:
        try:
            tokens = max((job.result() for job in jobs), default=0)  # no jobs: only other ranks have these layers
        except Abandoned:
            return False
        except Exception:
            logger.exception("%s: a save failed", NAME)
            return False
        if self._rank == 0:
            self.stats.add(stored_tokens=tokens)
        return True

    def _saved(self, save: Save, stored: bool) -> None:
        self._news.saves += 1
        if not stored:
            self.stats.add(failed_stores=1)

    # --- Both

    def look(self, number: int) -> None:
        """Digests the weights: see Metadata.look."""
        self._news.weights[number, self._rank] = digest_of(self._engine)

    def take_stats(self) -> Stats | None:
        self._see_saves()
        for transfer in self._transfers:
            raw, stored = transfer.take_bytes()
            self.stats.add(raw_bytes=raw, stored_bytes=stored)
        return self.stats.take()

    def take_news(self) -> WorkerMetadata | None:
        news = self._news
        if not (news.layouts or news.loaded or news.saves or news.weights):
            return None
        self._news = WorkerMetadata()
        return news
