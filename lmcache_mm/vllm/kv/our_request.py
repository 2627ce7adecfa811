"""OurRequest: what the scheduler's side knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache_mm.cache import Record
from lmcache_mm.lane import Work
from lmcache_mm.vllm.api import Request
from lmcache_mm.vllm.kv.request_tracker import RequestTracker


@dataclass
class OurRequest:
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
    failed: bool = False  # a load of it has failed: it is not matched any more
    lookup: Work | None = None  # the lookup under way
    hit: list[Record] = field(default_factory=list)
    local_tokens: int = 0  # tokens that vLLM had at the last match
    reach: int = 0  # how far the hit would reach if the store had all states
    stops: list[int] = field(default_factory=list)  # where steps of its prompt should end, to have states; ascending
    states_at: set[int] = field(default_factory=set)  # ends of states that were handed to the store, or came from it

    def identified(self) -> RequestTracker | None:
        """The request's tracker; for a session, with the parts identified so far. None if the request is not cached or
        not identified yet."""
        if self.identifying is not None and self.identifying.future.done():
            stored_tokens = self.tracker.stored_tokens if self.tracker else 0
            self.tracker, self.identifying, self.planned_until = self.identifying.future.result(), None, 0
            if self.tracker is not None:
                self.tracker.stored_tokens = stored_tokens
        return self.tracker if self.loads or self.saves else None
