"""The connector's side in the scheduler: looks up requests in the store, and plans what each step loads and stores."""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import count
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
from lmcache_mm.vllm.kv.messages import NULL_BLOCK, Layout, Load, Metadata, RecordPages, Save, WorkerMetadata
from lmcache_mm.vllm.kv.naming import Naming
from lmcache_mm.vllm.kv.places import Places
from lmcache_mm.vllm.kv.request_tracker import RequestTracker
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


@dataclass
class _Request:
    request: Request
    loads: bool
    saves: bool
    waits: bool  # for records that another engine promised
    prompt_tokens: int  # in the prompt that is identified or being identified
    items: int
    identifying: Work | None = None  # the work that makes its tracker
    tracker: RequestTracker | None = None  # without one, and without one being made, the request is not cached
    planned_until: int = 0  # saves are planned for tokens up to here
    asked_at: float = 0.0  # when it was first matched
    ask_at: float = 0.0  # if it waits: do not ask the store before this time
    counted: bool = False
    lookup: Work | None = None  # the lookup under way
    hit: list[Record] = field(default_factory=list)
    local_tokens: int = 0  # tokens that vLLM had at the last match
    reach: int = 0  # how far the hit would reach if the store had all states
    stops: list[int] = field(default_factory=list)  # where steps of its prompt should end, to have states; ascending
    states_at: set[int] = field(default_factory=set)  # ends of states that were handed to the store, or came from it


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
        self._requests: dict[str, _Request] = {}
        self._unknown: dict[Work, set[str]] = {}  # identifiers of items that are computed before they are identified
        # If a stop token is noticed one step late, the running state has already consumed it and cannot be rolled back.
        late = bool(self._places.states) and bool(config.scheduler_config.async_scheduling)
        self._session_ends_caching = late or (SESSIONS_OUTRUN_TOKENS and config.speculative_config is not None)
        self._failed: set[str] = set()  # requests that are not matched any more
        self._planned: list[Load] = []  # for the next step
        self._loading: dict[int, tuple[Load, Callable[[], object]]] = {}  # by serial: load and release of its records
        self._serials = count()
        self._at_once_left_s = AT_ONCE_S  # left in this step
        self._saving = 0  # saves that workers have not reported as ended
        self._saves_until = 0.0
        self.events = Events.of(config, self._store, groups, options.timeout_s)

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
        loading = {load.request_id for load, _ in self._loading.values()}
        for ours in self._requests.values():
            ours.tracker = ours.lookup = ours.identifying = None
            begun = ours.request.num_computed_tokens > 0 or ours.request.num_preemptions > 0
            if begun or ours.request.request_id in loading:
                ours.loads = ours.saves = False

    def take_stats(self) -> Stats | None:
        return self.stats.take()

    def close(self) -> None:
        for _, release in self._loading.values():
            release()
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
        ours = _Request(request, loads, saves, waits, request.num_prompt_tokens, len(request.mm_features))
        self._requests[request.request_id] = ours
        if ours.loads or ours.saves or request.mm_features:
            self._begin_identifying(ours)

    def _begin_identifying(self, ours: _Request) -> None:
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

    def _follow(self, ours: _Request) -> None:
        request = ours.request
        tracker, before = self._tracker(ours), ours.identifying
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
            self._unknown[ours.identifying] = {feature.identifier for feature in features}
        self._is_done(ours.identifying)

    def _tracker(self, ours: _Request) -> RequestTracker | None:
        """The request's tracker; for a session, with the parts identified so far. None if the request is not cached or
        not identified yet."""
        if ours.identifying is not None and ours.identifying.future.done():
            stored_tokens = ours.tracker.stored_tokens if ours.tracker else 0
            ours.tracker, ours.identifying, ours.planned_until = ours.identifying.future.result(), None, 0
            if ours.tracker is not None:
                ours.tracker.stored_tokens = stored_tokens
        return ours.tracker if ours.loads or ours.saves else None

    def promise(self, request: Request) -> dict[str, Any] | None:
        """The answer to a request that another engine will decode: that engine may wait for its KV. It names no keys,
        because an engine that loads computes them from its own request."""
        ours = self._requests.get(request.request_id)
        if ours is None or not ours.saves or self._namespace.weights is not None:
            return None
        if (request.kv_transfer_params or {}).get("do_remote_decode") is not True:
            return None
        try:
            tracker = self._tracker(ours)
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
        """Forgets a request, but not its load under way: vLLM keeps the pages until workers report the load."""
        self._requests.pop(request.request_id, None)
        self._failed.discard(request.request_id)

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
                self._plan_stops(ours, local_tokens + matched[0])
            return matched
        except Exception:
            self._leave_out(ours)
            return 0, False

    def _leave_out(self, ours: _Request) -> None:
        """Stops caching a request that caused an exception, so that it does not end the engine."""
        logger.exception("%s: request %s is no longer cached", NAME, ours.request.request_id)
        ours.loads = ours.saves = False
        ours.tracker = ours.lookup = ours.identifying = None

    def _match(self, ours: _Request, local_tokens: int) -> tuple[int | None, bool]:
        request = ours.request
        ours.asked_at = ours.asked_at or time.monotonic()
        if self._namespace.weights == identity.UNKNOWN and ours.loads:
            self._look = True
            return self._later(ours, 0.0)
        if ours.identifying is not None and not self._is_done(ours.identifying):
            return self._later(ours, self._identifying.stalled_s())
        tracker = self._tracker(ours)
        if (
            tracker is None
            or not ours.loads
            or request.request_id in self._failed
            or not self._naming.agreed(request.mm_features)
        ):
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

    def _plan_stops(self, ours: _Request, computed: int) -> None:
        """Decides where steps should end after the first `computed` tokens, so that there are states to store: at the
        last item's end, where the store has another prompt's KV but no state to continue from, and every
        `state_tokens`. vLLM itself adds the point where its own pages diverge, and the prompt's end."""
        request, tracker = ours.request, self._tracker(ours)
        if tracker is None or not ours.saves:
            return
        limit = request.num_tokens
        stops = {*tracker.ends, ours.reach, request.shared_prefix_boundary // self._unit * self._unit}
        if self._options.state_tokens is not None:
            every = -(-self._options.state_tokens // self._chunk_tokens) * self._chunk_tokens
            stops.update(range(every, limit + 1, every))
        ours.stops = sorted(stop for stop in stops if computed < stop <= limit)
        self._stop(ours, computed)

    def _stop(self, ours: _Request, computed: int) -> None:
        """Tells vLLM the next stop. vLLM ends a step there, and also keeps the state in its own cache. After the last
        stop, vLLM cuts steps as usual. If generated tokens are stored, each whole chunk of them is a stop."""
        following = ours.stops[bisect_right(ours.stops, computed) :]
        if not following and self._options.store_generated and computed >= ours.request.num_prompt_tokens - 1:
            following = [(computed // self._chunk_tokens + 1) * self._chunk_tokens]
        ours.request.shared_prefix_boundary = following[0] if following else 0

    def _more_may_come(self, ours: _Request, tracker: RequestTracker, tokens: int) -> bool:
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

    def _found(self, ours: _Request, tracker: RequestTracker) -> list[Record] | None:
        """The request's records that the store has; None if the lookup is still under way."""
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

    def _look_up(self, ours: _Request, records: list[Record]) -> list[Record]:
        try:
            found, ours.reach = self._places.longest(self._store, records)
            return found
        except Exception:
            logger.exception("%s: a lookup in the store failed; the request is computed", NAME)
            ours.waits = False
            self.stats.add(failed_lookups=1)
            return []

    def _later(self, ours: _Request, stalled_s: float) -> tuple[int | None, bool]:
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
        load = Load(next(self._serials), request.request_id, b"", pages)
        self._planned.append(load)
        self._loading[load.serial] = (load, lambda: None)

    def _plan_load(self, ours: _Request, block_ids: tuple[list[int], ...], tokens: int) -> None:
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
        release = self._hold(keys)
        load = Load(next(self._serials), ours.request.request_id, ours.tracker.owner, pages)
        self._planned.append(load)
        self._loading[load.serial] = (load, release)
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
        metadata = Metadata(loads=self._planned)
        if self._namespace.weights == identity.UNKNOWN and (self._look or step.total_num_scheduled_tokens):
            # Not in other empty steps: the engine may be paused, and its weights about to change.
            metadata.look = self._namespace.resets
        self._planned, self._look = [], False
        self._at_once_left_s = AT_ONCE_S
        if self._saving > 0:
            metadata.written = self._written(step, metadata.loads)
        if self._loading and self._options.load != "async":
            # Tokens computed from pages that are being loaded are valid only if all ranks report that the loads
            # succeeded. They are saved after that.
            return metadata
        self._unknown = {work: names for work, names in self._unknown.items() if not work.future.done()}
        for request_id in step.num_scheduled_tokens:
            # vLLM computes requests that read no cache, such as those with prompt_logprobs, without calling `match`.
            ours = self._requests.get(request_id)
            if ours is not None and ours.items and ours.identifying and not ours.identifying.future.done():
                self._unknown.setdefault(ours.identifying, {one.identifier for one in ours.request.mm_features})
        for request_id, scheduled in step.num_scheduled_tokens.items():
            ours = self._requests.get(request_id)
            if ours is None or not ours.saves:
                continue
            try:
                save = self._save_of(ours, scheduled, step)
                if self._places.states and ours.tracker is not None:
                    # vLLM cannot have kept states of tokens that it does not know yet.
                    self._stop(ours, min(ours.request.num_computed_tokens + scheduled, ours.request.num_tokens))
            except Exception:
                self._leave_out(ours)
                continue
            if save is not None:
                metadata.saves.append(save)
        if metadata.saves:
            self._saving += len(metadata.saves) * self._namespace.ranks
            self._saves_until = time.monotonic() + 2 * self._options.timeout_s
        return metadata

    def _written(self, step: SchedulerOutput, loads: list[Load]) -> set[int]:
        """Pages that a step writes, by computing or loading."""
        written = {page for load in loads for one in load.records for page in one.pages}
        for request_id in step.num_scheduled_tokens:
            block_ids = step.kv_connector_block_state.get_block_ids(request_id)
            if block_ids is None:
                continue
            ours = self._requests.get(request_id)
            # Tokens that vLLM counts as computed may include drafts that it rejects later.
            computed = min(ours.request.num_computed_tokens, ours.request.num_tokens - 1) if ours is not None else 0
            for table, pages in enumerate(block_ids):
                group = self._places.tables.get(table) or self._places.states.get(table)
                written.update(pages[computed // group.page_tokens :] if group else pages)
        return written

    def _save_of(self, ours: _Request, scheduled: int, step: SchedulerOutput) -> Save | None:
        """The save of tokens that this step computes, and of earlier tokens that could not be saved before."""
        request, tracker = ours.request, self._tracker(ours)
        if tracker is None:
            return None
        features = request.mm_features[: len(tracker.items)]
        unknown = {name for names in self._unknown.values() for name in names}
        if not self._naming.agreed(features) or any(feature.identifier in unknown for feature in features):
            return None
        drafts = len(step.scheduled_spec_decode_tokens.get(request.request_id, ()))
        until = min(request.num_computed_tokens + scheduled - drafts, request.num_tokens)
        if not self._options.store_generated:
            until = min(until, request.num_prompt_tokens)
        # The next items of a session are not identified yet.
        until = min([until, *(f.mm_position.offset for f in request.mm_features[len(tracker.items) :])])
        states = self._states_of(ours, tracker, until, step) if self._places.states else []
        if until <= ours.planned_until and not states:
            return None
        records = tracker.records(request.all_token_ids, until, tracker.stored_tokens)
        block_ids = step.kv_connector_block_state.get_block_ids(request.request_id) if records else ()
        if block_ids is None:
            return None
        ours.planned_until = until
        if not records and not states:
            return None
        if not self._naming.adapter_agreed(request.lora_request):
            ours.loads = ours.saves = False
            return None
        pages = self._places.pages(records, block_ids) if records else []
        whole = [one for one in pages if NULL_BLOCK not in one.pages]
        whole += [page for _, pages in states for page in pages]
        if records:
            tracker.stored_tokens = records[-1].end
        ours.states_at.update(record.end for record, _ in states)
        if not whole:
            return None
        if self.events:
            self.events.expect(request, records, found=False, states={record.end for record, _ in states})
        return Save(tracker.owner, whole)

    def _states_of(
        self, ours: _Request, tracker: RequestTracker, until: int, step: SchedulerOutput
    ) -> list[tuple[Record, list[RecordPages]]]:
        """The request's states that vLLM has in this step at ends of records within the first `until` tokens. vLLM says
        which page holds each state once the step has ended: the state at the step's end, or one that the step has
        passed."""
        offered = step.kv_connector_block_state.boundary_state_offloads.get(ours.request.request_id, ())
        return [
            (record, self._places.offered_pages(record, pages))
            for tokens, pages in self._places.offered_states(offered, max(ours.states_at, default=0), until).items()
            for record in tracker.records(ours.request.all_token_ids, tokens, tokens - 1)
        ]

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
        saving = self._saving > 0 and time.monotonic() < self._saves_until
        return saving or (self.events is not None and self.events.are_under_way())

    def take_output(self, output: KVConnectorOutput) -> None:
        """Takes the workers' reports. Requests whose load failed are computed and never matched again. Otherwise, a
        store that claims to have records but does not deliver them would be asked forever."""
        finished = set(output.finished_recving or ()) | set(output.failed_recving or ())
        ended = {serial for serial, (load, _) in self._loading.items() if load.request_id in finished}
        failed = {serial for serial in ended if self._loading[serial][0].request_id in (output.failed_recving or ())}
        told = output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            self.learn_layouts(told.layouts)
            if self._namespace.learn_weights(told.weights):
                self._name_again()
            bad_pages = output.invalid_block_ids or set()
            for serial in told.loaded & self._loading.keys():
                ended.add(serial)
                records = self._loading[serial][0].records
                if not bad_pages.isdisjoint(page for one in records for page in one.pages):
                    failed.add(serial)
            self._saving -= told.saves
            if self.events and told.saves:
                self.events.look()
        for serial in ended:  # other loads belong to another connector
            load, release = self._loading.pop(serial)
            release()
            ours = self._requests.get(load.request_id)
            if serial in failed and ours is not None:
                self._failed.add(load.request_id)
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
