"""RequestTracker: the record keys of one request's tokens, over all its steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lmcache_mm.cache import Record
from lmcache_mm.ops import RunningKeys
from lmcache_mm.prompt import Item


class RequestTracker:
    """The records of a request's tokens so far, ascending by end. Only new tokens are hashed, whatever happens to the
    request: chunked prefill, decode, preemption.

    items: of the whole prompt. root: of the request's namespace. prompt_tokens: where the prompt ends. whole: ends that
    are not multiples of chunk_tokens are rounded down to a multiple of `whole`. states: layers keep a state, which
    cannot be rolled back, so another request for the same prompt needs a record that leaves one token to compute.
    """

    def __init__(
        self,
        items: Sequence[Item],
        root: bytes,
        owner: bytes,
        prompt_tokens: int,
        chunk_tokens: int,
        whole: int,
        states: bool = False,
    ) -> None:
        self.items = tuple(items)
        self.owner = owner
        self.stored_tokens = 0  # records up to here were handed to the store, or came from it
        self._running = RunningKeys(items, root)
        self._root, self._chunk_tokens, self._whole, self._states = root, chunk_tokens, whole, states
        end_of_items = min(prompt_tokens, max((item.offset + item.length for item in items), default=0))
        ends = (prompt_tokens, end_of_items, *([prompt_tokens - 1] if states else []))
        self._ends = {end // whole * whole for end in ends} - {0}
        self._records: list[Record] = []

    @property
    def tokens(self) -> int:
        """How many tokens have been hashed."""
        return self._running.tokens

    def grown(self, items: Sequence[Item], token_ids: Sequence[int]) -> RequestTracker:
        """A tracker of the same request with `items` appended and with `token_ids` as its prompt. It hashes all tokens
        again, because running keys must know all items from the start."""
        grown = RequestTracker(
            [*self.items, *items], self._root, self.owner, len(token_ids), self._chunk_tokens, self._whole, self._states
        )
        grown._ends |= self._ends
        grown.records(token_ids, len(token_ids))
        return grown

    @property
    def ends(self) -> set[int]:
        """The ends of records that the prompt and its items give: multiples of `whole`, above 0."""
        return self._ends

    def records(self, token_ids: Sequence[int], until: int, after: int = 0) -> list[Record]:
        """The records that end after the first `after` tokens and within the first `until`. token_ids: all of the
        request's, at least `until`."""
        seen = self._running.tokens
        if until > seen:
            size = self._chunk_tokens
            multiples = range((seen // size + 1) * size, until + 1, size)
            cuts = sorted({*multiples, *(end for end in self._ends if seen < end <= until)})
            keys = self._running.extend(list(token_ids[seen:until]), cuts).numpy()
            self._records += [
                Record((cut - 1) // size * size, cut, key.tobytes()) for cut, key in zip(cuts, keys, strict=True)
            ]
        first, end = (bisect_right(self._records, tokens, key=lambda record: record.end) for tokens in (after, until))
        return self._records[first:end]
