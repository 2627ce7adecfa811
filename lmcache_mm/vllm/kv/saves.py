"""Saves: what each step stores of a request, and where its steps end so that there are states to store."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from lmcache_mm.cache import Record
from lmcache_mm.lane import Work
from lmcache_mm.vllm.api import SchedulerOutput
from lmcache_mm.vllm.kv.events import Events
from lmcache_mm.vllm.kv.messages import NULL_BLOCK, Load, RecordPages, Save
from lmcache_mm.vllm.kv.naming import Naming
from lmcache_mm.vllm.kv.our_request import OurRequest
from lmcache_mm.vllm.kv.places import Places
from lmcache_mm.vllm.kv.request_tracker import RequestTracker
from lmcache_mm.vllm.options import Options


class Saves:
    """See the module. unit: see Scheduler. ranks: how many workers store each save."""

    def __init__(
        self,
        options: Options,
        chunk_tokens: int,
        unit: int,
        ranks: int,
        places: Places,
        naming: Naming,
        events: Events | None,
    ) -> None:
        self._options, self._chunk_tokens, self._unit, self._ranks = options, chunk_tokens, unit, ranks
        self._places, self._naming, self._events = places, naming, events
        self._unknown: dict[Work, set[str]] = {}  # identifiers of items that are computed before they are identified
        self._under_way = 0  # saves that workers have not reported as ended, of all ranks
        self._until = 0.0

    # --- Stops

    def plan_stops(self, ours: OurRequest, computed: int) -> None:
        """Decides where steps should end after the first `computed` tokens, so that there are states to store: at the
        last item's end, where the store has another prompt's KV but no state to continue from, and every
        `state_tokens`. vLLM itself adds the point where its own pages diverge, and the prompt's end."""
        request, tracker = ours.request, ours.identified()
        if tracker is None or not ours.saves:
            return
        limit = request.num_tokens
        stops = {*tracker.ends, ours.reach, request.shared_prefix_boundary // self._unit * self._unit}
        if self._options.state_tokens is not None:
            every = -(-self._options.state_tokens // self._chunk_tokens) * self._chunk_tokens
            stops.update(range(every, limit + 1, every))
        ours.stops = sorted(stop for stop in stops if computed < stop <= limit)
        self._stop(ours, computed)

    def _stop(self, ours: OurRequest, computed: int) -> None:
        """Tells vLLM the next stop. vLLM ends a step there, and also keeps the state in its own cache. After the last
        stop, vLLM cuts steps as usual. If generated tokens are stored, each whole chunk of them is a stop."""
        following = ours.stops[bisect_right(ours.stops, computed) :]
        if not following and self._options.store_generated and computed >= ours.request.num_prompt_tokens - 1:
            following = [(computed // self._chunk_tokens + 1) * self._chunk_tokens]
        ours.request.shared_prefix_boundary = following[0] if following else 0

    # --- Saves

    def wait_for(self, work: Work, features: Iterable[Any]) -> None:
        """Takes items that may be computed before the work has identified them. Until then, nothing that depends on
        items of their identifiers is stored."""
        self._unknown.setdefault(work, {feature.identifier for feature in features})

    def begin_step(self, computed: Iterable[OurRequest]) -> None:
        """Takes the requests that the step computes. Among them are some that were not matched: vLLM does not match
        those that read no cache, such as those with prompt_logprobs."""
        self._unknown = {work: names for work, names in self._unknown.items() if not work.future.done()}
        for ours in computed:
            if ours.items and ours.identifying and not ours.identifying.future.done():
                self.wait_for(ours.identifying, ours.request.mm_features)

    def plan(self, ours: OurRequest, scheduled: int, step: SchedulerOutput) -> Save | None:
        """The save of tokens that this step computes, and of earlier tokens that could not be saved before."""
        request, tracker = ours.request, ours.identified()
        if tracker is None:
            return None
        if self._places.states:
            # vLLM cannot have kept states of tokens that it does not know yet.
            self._stop(ours, min(request.num_computed_tokens + scheduled, request.num_tokens))
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
        if self._events:
            self._events.expect(request, records, found=False, states={record.end for record, _ in states})
        self._under_way += self._ranks
        self._until = time.monotonic() + 2 * self._options.timeout_s
        return Save(tracker.owner, whole)

    def _states_of(
        self, ours: OurRequest, tracker: RequestTracker, until: int, step: SchedulerOutput
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

    # --- Saves under way

    def end(self, saves: int) -> None:
        """Takes how many saves the workers report as ended."""
        self._under_way -= saves

    def are_under_way(self) -> bool:
        """Whether the engine should run another step, so that workers can report what they have stored."""
        return self._under_way > 0 and time.monotonic() < self._until

    def written(self, step: SchedulerOutput, loads: Iterable[Load], requests: Mapping[str, OurRequest]) -> set[int]:
        """Pages that a step writes, by computing or loading, if saves in progress may still read them."""
        if self._under_way <= 0:
            return set()
        written = {page for load in loads for one in load.records for page in one.pages}
        for request_id in step.num_scheduled_tokens:
            block_ids = step.kv_connector_block_state.get_block_ids(request_id)
            if block_ids is None:
                continue
            ours = requests.get(request_id)
            # Tokens that vLLM counts as computed may include drafts that it rejects later.
            computed = min(ours.request.num_computed_tokens, ours.request.num_tokens - 1) if ours is not None else 0
            for table, pages in enumerate(block_ids):
                group = self._places.tables.get(table) or self._places.states.get(table)
                written.update(pages[computed // group.page_tokens :] if group else pages)
        return written
