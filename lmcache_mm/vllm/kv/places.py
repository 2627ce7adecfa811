"""Places: where a record's parts are, as keys in the store and as pages in the engine's block tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain as chained
from itertools import islice, takewhile

from lmcache_mm.cache import Record, chain, record_key
from lmcache_mm.stores.store import Store
from lmcache_mm.vllm.kv.messages import NULL_BLOCK, RecordPages
from lmcache_mm.vllm.options import GROUPS_OF_TABLE, Group

STATES_AT_ONCE = 64  # cuts per lookup of states, the last cuts first


class Places:
    """The parts of records: one per group and rank, and likewise one state at a record's end for each group of layers
    that keep states. groups: the engine's."""

    def __init__(self, groups: Iterable[Group], chunk_tokens: int) -> None:
        groups = list(groups)
        self.tables = {group.table: group for group in groups if not group.states}
        self.states = {group.table: group for group in groups if group.states}
        self.windows = {group.table: group.window for group in groups if group.window is not None}
        self._chunk_tokens = chunk_tokens
        self._parts: list[tuple[int, int]] = []  # group numbers and ranks
        self._state_parts: list[tuple[int, int]] = []

    def learn(self, parts: list[tuple[int, int]]) -> None:
        """Takes the group numbers that each rank has: (number, rank), sorted by rank."""
        self._parts = [part for part in parts if part[0] // GROUPS_OF_TABLE in self.tables]
        self._state_parts = [part for part in parts if part[0] // GROUPS_OF_TABLE in self.states]

    def keys(self, record: Record) -> list[bytes]:
        return [record_key(record.key, number, rank) for number, rank in self._parts]

    def state_keys(self, record: Record) -> list[bytes]:
        return [record_key(record.key, number, rank) for number, rank in self._state_parts]

    def longest(self, store: Store, records: list[Record]) -> tuple[list[Record], int]:
        """The records that cover the longest prefix for which the store has the KV that each group needs and the state
        at its end; and where that prefix would end if the store had all states."""
        present = iter(store.contains([key for record in records for key in self.keys(record)]))
        tables = set(self.tables)
        there = {
            r.end: tables - {number // GROUPS_OF_TABLE for number, _ in self._parts if not next(present)}
            for r in records
        }
        whole = tables - set(self.windows) or tables  # without full attention: every record of every group
        usable = [record for record in records if whole <= there[record.end]]
        chunks = [one for one in chain(usable, self._chunk_tokens) if one.end - one.begin == self._chunk_tokens]
        covered = chunks[-1].end if chunks else 0

        def prefix(last: Record) -> list[Record]:
            return [*chunks[: last.begin // self._chunk_tokens], last]

        def in_windows(last: Record) -> bool:
            return all(
                table in there[one.end]
                for table, window in self.windows.items()
                for one in takewhile(
                    lambda one, first=last.end - window: one.end > first,  # type: ignore[misc]
                    chained([last], (chunks[i] for i in range(last.begin // self._chunk_tokens - 1, -1, -1))),
                )
            )

        ends: Iterator[Record] = (last for last in reversed(usable) if last.begin <= covered and in_windows(last))
        first = next(ends, None)
        if first is None:
            return [], 0
        if not self.states:
            return prefix(first), first.end
        ends = chained([first], ends)
        while some := list(islice(ends, STATES_AT_ONCE)):
            found = iter(store.contains([key for one in some for key in self.state_keys(one)], peek=True))
            for last in some:
                if all([next(found) for _ in self._state_parts]):
                    return prefix(last), first.end
        return [], first.end

    def pages(
        self, records: list[Record], block_ids: tuple[list[int], ...], first: int = 0, end: int | None = None
    ) -> list[RecordPages]:
        """The records' pages in every group, without null pages and pages wholly outside of tokens [first, end).
        Records without any page are left out."""
        out = []
        for table, group in self.tables.items():
            size, blocks = group.page_tokens, block_ids[table]
            for record in records:
                numbers = range(record.begin // size, -(-record.end // size))
                stop = numbers.stop if end is None else -(-end // size)
                pages = [blocks[i] if first // size <= i < stop else NULL_BLOCK for i in numbers]
                if any(page != NULL_BLOCK for page in pages):
                    out.append(RecordPages(table, record.key, pages, record.end - record.begin))
        return out

    def state_pages(self, last: Record, end: int, block_ids: tuple[list[int], ...]) -> list[RecordPages]:
        """The page of every group's state after the first `end` tokens. LookupError if vLLM takes fewer tokens than
        were matched, because their state is a different one, or if it has no page for the state."""
        out = []
        for table, group in self.states.items():
            blocks = block_ids[table][end // group.page_tokens - 1 :]
            if last.end != end or not blocks or blocks[0] == NULL_BLOCK:
                raise LookupError(f"there is no page for the state at {end}, in KV cache group {table}")
            out.append(RecordPages(table, last.key, blocks[:1], group.page_tokens))
        return out

    def offered_states(
        self, offered: Iterable[tuple[int, int, int]], after: int, until: int
    ) -> dict[int, dict[int, int]]:
        """The complete states after more than `after` tokens and at most `until`: tokens → table → page. offered:
        (table, page, tokens), as vLLM offers them."""
        states: dict[int, dict[int, int]] = {}
        for table, page, tokens in offered:
            if table in self.states and page != NULL_BLOCK and after < tokens <= until:
                states.setdefault(tokens, {})[table] = page
        return {tokens: pages for tokens, pages in sorted(states.items()) if pages.keys() == self.states.keys()}

    def offered_pages(self, record: Record, pages: dict[int, int]) -> list[RecordPages]:
        """The pages (by table) of the state at the record's end."""
        return [RecordPages(t, record.key, [page], self.states[t].page_tokens) for t, page in pages.items()]
