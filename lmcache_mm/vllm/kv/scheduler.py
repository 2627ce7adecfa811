"""The connector's side in the scheduler: looks up requests in the store, and tells workers what each step is to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

from lmcache_mm.cache import Record
from lmcache_mm.lane import Lane, Work
from lmcache_mm.stores import open_store
from lmcache_mm.stores.store import Store
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.api import (
    SESSIONS_OUTRUN_TOKENS,
    BlockPool,
    KVConnectorOutput,
    Request,
    SchedulerOutput,
    VllmConfig,
)
from lmcache_mm.vllm.kv.events import Events
from lmcache_mm.vllm.kv.live_namespace import LiveNamespace
from lmcache_mm.vllm.kv.loads import Loads
from lmcache_mm.vllm.kv.messages import Layout, Metadata, RecordPages, WorkerMetadata
from lmcache_mm.vllm.kv.naming import Naming
from lmcache_mm.vllm.kv.our_request import OurRequest
from lmcache_mm.vllm.kv.places import Places
from lmcache_mm.vllm.kv.request_tracker import RequestTracker
from lmcache_mm.vllm.kv.saves import Saves
from lmcache_mm.vllm.metrics import Stats
from lmcache_mm.vllm.options import (
    ASK_AGAIN_S,
    GROUPS_OF_TABLE,
    NAME,
    Group,
    Options,
    drop_malformed_params,
    wishes_of,
)

NO_RECORD = bytes(32)  # a prefix key that no store holds
AT_ONCE_S = 0.001  # how long the scheduler itself waits for a store; after that, it asks again in its next step

logger = logging.getLogger("vllm.lmcache_mm")


class Scheduler:
    """See the module. unit: a number of tokens that is a whole number of pages in every group."""

    def __init__(self, config: VllmConfig, options: Options, groups: list[Group], chunk_tokens: int, unit: int) -> None:
        self.stats = Stats()
        self._options, self._chunk_tokens, self._unit = options, chunk_tokens, unit
        self._loads, self._saves = config.kv_transfer_config.is_kv_consumer, config.kv_transfer_config.is_kv_producer
        self._places = Places(groups, chunk_tokens)
        self._namespace = LiveNamespace(config, options, groups)
        self._naming = Naming(options, chunk_tokens, unit, bool(self._places.states))
        self._store: Store = open_store(options.store)
        self._sends_all_items = not config.use_v2_model_runner
        self._look = False  # whether workers should digest the weights in this step
        self._pool: BlockPool | None = None
        self._cached_blocks: object = None
        self._identifying, self._lookups = Lane("lmcache_mm identify"), Lane("lmcache_mm lookup")
        self._requests: dict[str, OurRequest] = {}
        # If a stop token is noticed one step late, the running state has already consumed it and cannot be rolled back.
        late = bool(self._places.states) and bool(config.scheduler_config.async_scheduling)
        self._session_ends_caching = late or (SESSIONS_OUTRUN_TOKENS and config.speculative_config is not None)
        self._at_once_left_s = AT_ONCE_S  # left in this step
        self.events = Events.of(config, self._store, groups, options.timeout_s)
        self._loading = Loads()
        ranks = self._namespace.ranks
        self._saving = Saves(options, chunk_tokens, unit, ranks, self._places, self._naming, self.events)

    def learn_layouts(self, layouts: dict[int, Layout]) -> None:
        """Takes the layouts that ranks report. In MultiConnector, the handshake may belong to another connector, so
        workers report again in their first step; requests that arrive earlier are not cached."""
        known = self._places.tables.keys() | self._places.states.keys()
        for layout in layouts.values():
            unknown = {number // GROUPS_OF_TABLE for number in layout.groups} - known
            if unknown:
                raise ValueError(f"{NAME}: a worker has layers of KV cache group {min(unknown)}; the scheduler has not")
        if not self._namespace.learn_layouts(layouts):
            return
        self._places.learn(self._namespace.parts)
        if self.events:
            self.events.learn_places(self._namespace.parts)
        self._name_again()

    def _name_again(self) -> None:
        """Names the requests that have no tracker, once there is a namespace."""
        if self._namespace.now is None:
            return
        for ours in self._requests.values():
            if ours.tracker is None and (ours.loads or ours.saves):
                self._begin_identifying(ours)

    # --- Weights, which may change while the engine runs

    def watch(self, pool: BlockPool) -> None:
        """Takes vLLM's block pool, which is the only place that shows a reset of vLLM's own cache alone."""
        self._pool, self._cached_blocks = pool, _cached_blocks(pool)
        if self.events:
            self.events.bind(pool)

    def reset(self) -> None:
        """Handles a reset, after which weights may differ. Nothing is matched or stored until workers have digested
        them; requests that are already partly computed continue without the store."""
        if self._pool is not None:
            self._cached_blocks = _cached_blocks(self._pool)
        self._namespace.reset()
        if self.events:
            self.events.forget()
        loading = self._loading.request_ids()
        for ours in self._requests.values():
            ours.tracker = ours.lookup = ours.identifying = None
            begun = ours.request.num_computed_tokens > 0 or ours.request.num_preemptions > 0
            if begun or ours.request.request_id in loading:
                ours.loads = ours.saves = False

    def take_stats(self) -> Stats | None:
        return self.stats.take()

    def close(self) -> None:
        self._loading.close()
        if self.events:
            self.events.close()
        for lane in (self._identifying, self._lookups):
            lane.close(self._options.timeout_s)
        self._store.close()

    # --- Requests

    def add(self, request: Request) -> None:
        drop_malformed_params(request)
        wishes = wishes_of(request.kv_transfer_params)
        cached = self._namespace.complete
        loads, saves = cached and self._loads and wishes.load, cached and self._saves and wishes.store
        # After a change of weights, another engine's keys may differ from this one's.
        waits = wishes.wait and self._namespace.weights is None
        ours = OurRequest(request, loads, saves, waits, request.num_prompt_tokens, len(request.mm_features))
        self._requests[request.request_id] = ours
        if ours.loads or ours.saves or request.mm_features:
            self._begin_identifying(ours)

    def _begin_identifying(self, ours: OurRequest) -> None:
        namespace = self._namespace.now if ours.loads or ours.saves else None
        ours.identifying = self._identifying.submit(lambda _: self._naming.tracker_of(ours.request, namespace))

    def follow(self, request: Request) -> None:
        """Checks whether the request is a session (`resumable`) that continues: its last token is gone, the tokens
        before it are part of the prompt, and more tokens and items have come. vLLM does not tell connectors. Called
        whenever the request is scheduled again, before any new token is computed or hashed."""
        ours = self._requests.get(request.request_id)
        if ours is None or (ours.prompt_tokens, ours.items) == (request.num_prompt_tokens, len(request.mm_features)):
            return
        try:
            self._follow(ours)
        except Exception:
            self._leave_out(ours)

    def _follow(self, ours: OurRequest) -> None:
        request = ours.request
        tracker, before = ours.identified(), ours.identifying
        named = tracker.tokens if tracker else 0
        # Computed tokens stay. Tokens that are hashed but not computed may be gone, after a preemption within a step.
        if self._session_ends_caching or named > request.num_computed_tokens:
            ours.loads = ours.saves = False
        features, token_ids = request.mm_features[ours.items :], list(request.all_token_ids)
        ours.prompt_tokens, ours.items = request.num_prompt_tokens, len(request.mm_features)
        if not (ours.loads or ours.saves or features):
            return
        ours.identifying = self._identifying.submit(
            lambda _: self._naming.tracker_with_part(request.request_id, features, token_ids, tracker, before)
        )
        if features:
            self._saving.wait_for(ours.identifying, features)
        self._is_done(ours.identifying)

    def promise(self, request: Request) -> dict[str, Any] | None:
        """The answer to a request that another engine will decode: that engine may wait for its KV. It names no keys,
        because an engine that loads computes them from its own request."""
        ours = self._requests.get(request.request_id)
        if ours is None or not ours.saves or self._namespace.weights is not None:
            return None
        if (request.kv_transfer_params or {}).get("do_remote_decode") is not True:
            return None
        try:
            tracker = ours.identified()
            records = tracker.records(request.all_token_ids, request.num_prompt_tokens) if tracker else []
        except Exception:
            self._leave_out(ours)
            return None
        if tracker is None or not records or tracker.stored_tokens < records[-1].end:
            return None
        if self._places.states and (request.num_prompt_tokens - 1) // self._unit * self._unit not in ours.states_at:
            return None
        return {"lmcache_mm": {"wait": True}}

    def drop(self, request: Request) -> None:
        """Forgets a request, but not its load in progress: vLLM keeps the pages until workers report the load."""
        self._requests.pop(request.request_id, None)

    # --- Matching

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens after the first `local_tokens` can be loaded (None if not known yet), and whether in the
        background."""
        if self._pool is not None and _cached_blocks(self._pool) is not self._cached_blocks:
            self.reset()
        ours = self._requests.get(request.request_id)
        if ours is None:
            return 0, False
        try:
            matched = self._match(ours, local_tokens)
            if self._places.states and matched[0] is not None:
                self._saving.plan_stops(ours, local_tokens + matched[0])
            return matched
        except Exception:
            self._leave_out(ours)
            return 0, False

    def _leave_out(self, ours: OurRequest) -> None:
        """Stops caching a request that caused an exception, so that it does not end the engine."""
        logger.exception("%s: request %s is no longer cached", NAME, ours.request.request_id)
        ours.loads = ours.saves = False
        ours.tracker = ours.lookup = ours.identifying = None

    def _match(self, ours: OurRequest, local_tokens: int) -> tuple[int | None, bool]:
        request = ours.request
        ours.asked_at = ours.asked_at or time.monotonic()
        if self._namespace.weights == identity.UNKNOWN and ours.loads:
            self._look = True
            return self._later(ours, 0.0)
        if ours.identifying is not None and not self._is_done(ours.identifying):
            return self._later(ours, self._identifying.stalled_s())
        tracker = ours.identified()
        if tracker is None or not ours.loads or ours.failed or not self._naming.agreed(request.mm_features):
            return 0, False
        if ours.waits and time.monotonic() < ours.ask_at:
            return None, False
        found = self._found(ours, tracker)
        if found is None:
            return self._later(ours, self._lookups.stalled_s())
        if ours.waits and self._more_may_come(ours, tracker, max(local_tokens, found[-1].end if found else 0)):
            return None, False
        ours.waits = False
        ours.hit, ours.local_tokens, ours.asked_at = found, local_tokens, 0.0
        if self.events:
            self.events.expect(request, found, found=True, states={record.end for record in found[-1:]})
        if not ours.counted:
            ours.counted = True
            self.stats.add(queried_tokens=request.num_tokens)
        end = ours.hit[-1].end if ours.hit else 0
        # After a hit of all tokens, vLLM recomputes the last one. Loading only that token is useless, and with a prompt
        # of one token vLLM would ask forever.
        if min(end, request.num_tokens - 1) <= local_tokens:
            return 0, False
        if self._places.windows:  # by then, vLLM has dropped a page that the last token's window needs
            end = min(end, request.num_tokens - 1)
        return end - local_tokens, self._options.load == "async"

    def _more_may_come(self, ours: OurRequest, tracker: RequestTracker, tokens: int) -> bool:
        """Whether to ask the store again for a prompt of which it has `tokens`."""
        prompt_tokens = ours.request.num_prompt_tokens
        ends = [record.end for record in self._loadable(ours.request, tracker) if record.end <= prompt_tokens]
        if not ends or tokens >= ends[-1]:
            return False
        ours.ask_at = time.monotonic() + ASK_AGAIN_S
        if ours.ask_at < ours.asked_at + self._options.timeout_s:
            return True
        self.stats.add(broken_promises=1)
        return False

    def _is_done(self, work: Work) -> bool:
        """Whether the work is done. Waits for it; all such waits of one step take at most AT_ONCE_S together."""
        if not work.future.done() and self._at_once_left_s > 0:
            begun = time.monotonic()
            wait([work.future], self._at_once_left_s)
            self._at_once_left_s -= time.monotonic() - begun
        return work.future.done()

    def _found(self, ours: OurRequest, tracker: RequestTracker) -> list[Record] | None:
        """The request's records that the store has; None if the lookup is still in progress."""
        if ours.lookup is None:
            records = self._loadable(ours.request, tracker)
            if self._store.local:
                return self._look_up(ours, records)
            ours.lookup = self._lookups.submit(lambda _: self._look_up(ours, records))
        if not self._is_done(ours.lookup):
            return None
        found: list[Record] = ours.lookup.future.result()
        ours.lookup = None
        return found

    def _look_up(self, ours: OurRequest, records: list[Record]) -> list[Record]:
        try:
            found, ours.reach = self._places.longest(self._store, records)
            return found
        except Exception:
            logger.exception("%s: a lookup in the store failed; the request is computed", NAME)
            ours.waits = False
            self.stats.add(failed_lookups=1)
            return []

    def _later(self, ours: OurRequest, stalled_s: float) -> tuple[int | None, bool]:
        """Tells vLLM to ask again, unless the request has waited too long or its lane makes no progress."""
        timeout_s = self._options.timeout_s
        if stalled_s < timeout_s and time.monotonic() - ours.asked_at < timeout_s:
            return None, False
        if ours.identifying is not None:  # vLLM's caches will have its items before they are identified
            self._naming.distrust(ours.request.mm_features)
            ours.saves = False
        ours.loads = False
        ours.identifying = ours.lookup = None
        # A store that answers, but not with what was promised, is not to blame.
        self.stats.add(**{"broken_promises" if ours.waits and stalled_s < timeout_s else "failed_lookups": 1})
        return 0, False

    def _loadable(self, request: Request, tracker: RequestTracker) -> list[Record]:
        """The request's records that can end a hit."""
        limit = request.num_tokens
        if self._options.load != "async" or self._places.states:
            limit -= 1  # the last token is computed in the same step, or the state must not include it
        records = tracker.records(request.all_token_ids, limit)
        if self._options.load == "layers":
            # A layer's pages are written whole, after the step has put its new tokens into them.
            records = [record for record in records if record.end % self._unit == 0]
        return records

    # --- Loads

    def plan_load(self, request: Request, block_ids: tuple[list[int], ...], tokens: int) -> None:
        """Plans a load of the first `tokens` of the last match that vLLM does not have. The store keeps the records
        until workers report the load."""
        ours = self._requests.get(request.request_id)
        if ours is not None:
            try:
                self._plan_load(ours, block_ids, tokens)
                return
            except Exception:
                self._leave_out(ours)
        # vLLM has allocated pages for the load and waits for it, so give it a load that fails.
        pages = [
            RecordPages(table, NO_RECORD, [page], group.page_tokens)
            for table, group in (self._places.tables | self._places.states).items()
            for page in block_ids[table]
        ]
        self._loading.plan(request.request_id, b"", pages, lambda: None)

    def _plan_load(self, ours: OurRequest, block_ids: tuple[list[int], ...], tokens: int) -> None:
        first, end = ours.local_tokens, ours.local_tokens + tokens
        records = [record for record in ours.hit if record.end > first and record.begin < end]
        if ours.tracker is None or not records:
            raise LookupError("the match that this load is for is no longer valid")
        pages = self._places.pages(records, block_ids, first, end)
        keys = [key for record in records for key in self._places.keys(record)]
        if self._places.states:
            last = records[-1]
            pages += self._places.state_pages(last, end, block_ids)
            keys += self._places.state_keys(last)
            ours.states_at.add(end)
        self._loading.plan(ours.request.request_id, ours.tracker.owner, pages, self._hold(keys))
        whole = [record.end for record in records if record.end <= end]
        ours.tracker.stored_tokens = max([ours.tracker.stored_tokens, *whole])
        self.stats.add(hit_tokens=tokens)

    def _hold(self, keys: list[bytes]) -> Callable[[], object]:
        """Calls Store.hold; on a lane if the store may block."""
        if self._store.local:
            return self._store.hold(keys)
        held = self._lookups.submit(lambda _: self._store.hold(keys))
        return lambda: self._lookups.submit(lambda _: held.future.result()())

    # --- Steps

    def plan_step(self, step: SchedulerOutput) -> Metadata:
        self._send_all_items(step)
        metadata = Metadata(loads=self._loading.take_planned())
        if self._namespace.weights == identity.UNKNOWN and (self._look or step.total_num_scheduled_tokens):
            # Not in other empty steps: the engine may be paused, and its weights about to change.
            metadata.look = self._namespace.resets
        self._look, self._at_once_left_s = False, AT_ONCE_S
        metadata.written = self._saving.written(step, metadata.loads, self._requests)
        if self._options.load != "async" and self._loading.request_ids():
            # Tokens computed from pages that are being loaded are valid only if all ranks report that the loads
            # succeeded. They are saved after that.
            return metadata
        computed = [(ours, n) for name, n in step.num_scheduled_tokens.items() if (ours := self._requests.get(name))]
        self._saving.begin_step(ours for ours, _ in computed)
        for ours, scheduled in computed:
            if not ours.saves:
                continue
            try:
                save = self._saving.plan(ours, scheduled, step)
            except Exception:
                self._leave_out(ours)
                continue
            if save is not None:
                metadata.saves.append(save)
        return metadata

    def _send_all_items(self, step: SchedulerOutput) -> None:
        """Adds the data of items that vLLM leaves out because they lie wholly within a hit. If the hit is lost, to a
        failed load within the step or to a preemption, workers would have to encode an item without data, which ends
        the engine. Model Runner V2 gets the data when it needs it."""
        if not self._sends_all_items:
            return
        for new in step.scheduled_new_reqs:
            if ours := self._requests.get(new.req_id):
                new.mm_features = ours.request.mm_features

    def saves_are_under_way(self) -> bool:
        """Whether the engine should run another step, so that workers can report what they have stored."""
        return self._saving.are_under_way() or (self.events is not None and self.events.are_under_way())

    def take_output(self, output: KVConnectorOutput) -> None:
        """Takes the workers' reports. Requests whose load failed are computed and never matched again. Otherwise, a
        store that claims to have records but does not deliver them would be asked forever."""
        told = output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            self.learn_layouts(told.layouts)
            if self._namespace.learn_weights(told.weights):
                self._name_again()
            self._saving.end(told.saves)
            if self.events and told.saves:
                self.events.look()
        for request_id, failed in self._loading.take_ended(output):
            ours = self._requests.get(request_id)
            if failed and ours is not None:
                ours.failed = True
                self.stats.add(failed_loads=1)
                ours.planned_until = 0
                ours.states_at.clear()
                if ours.tracker:
                    ours.tracker.stored_tokens = 0

    def take_events(self) -> list[Any]:
        return self.events.take() if self.events else []


def _cached_blocks(pool: BlockPool) -> object:
    """The map in which vLLM finds cached pages. A reset replaces it."""
    return getattr(pool, "cached_block_hash_to_block", None)
