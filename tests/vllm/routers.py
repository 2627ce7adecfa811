"""A router's view of an engine: its published events, and an index of them by llm-d's rules.

The rules are those of llm-d-kv-cache, pkg/kvevents/pool.go, event_dedup_filter.go and pkg/kvcache/kvblock (the index,
its keys and their inputs), <https://github.com/llm-d/llm-d-kv-cache>; the rule for the block size is Dynamo's,
lib/kv-router/src/zmq_wire/convert.rs, <https://github.com/ai-dynamo/dynamo>.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message


@contextmanager
def subscriber(address: str) -> Iterator[tuple[Callable[[], None], Callable[[], list[dict[str, Any]]]]]:
    """Yields a function that waits for the publisher, which drops what it publishes before, and one that returns the
    decoded events published since its last call."""
    context = zmq.Context()
    receiver = context.socket(zmq.SUB)
    monitor = receiver.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    receiver.setsockopt_string(zmq.SUBSCRIBE, "")
    receiver.connect(address)

    def joined() -> None:
        assert monitor.poll(30_000)
        recv_monitor_message(monitor)
        receiver.poll(100)  # the subscription is on its way

    def published() -> list[dict[str, Any]]:
        events = []
        while receiver.poll(500):
            events += msgspec.msgpack.decode(receiver.recv_multipart()[-1])[1]
        return events

    try:
        yield joined, published
    finally:
        receiver.disable_monitor()
        context.destroy(0)


class Picture(NamedTuple):
    identifier: str
    offset: int
    length: int


class Question(NamedTuple):
    """A router's knowledge of a request."""

    token_ids: Sequence[int]
    pictures: Sequence[Picture] = ()
    salt: str | None = None
    adapter: str | None = None

    def of_blocks(self, size: int) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        """For each whole block: its tokens, and its extra keys."""
        for begin in range(0, len(self.token_ids) // size * size, size):
            names = [p.identifier for p in self.pictures if p.offset < begin + size and p.offset + p.length > begin]
            names = [*([self.adapter] if self.adapter else []), *names]
            yield (
                tuple(self.token_ids[begin : begin + size]),
                tuple([*names, self.salt] if self.salt and not begin else names),
            )


class Index:
    """A router's index of one engine, made only from its events. block_size: the router's own."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._refused: list[dict[str, Any]] = []
        self._keys: dict[Any, int] = {}  # keys of blocks, by the engine's hashes
        self._there: Counter[tuple[int, str, int]] = Counter()  # by key, medium and group
        self._announced: Counter[tuple[Any, str, int]] = Counter()  # by hash, medium and group

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "BlockStored":
                if not self._stored(event):
                    self._refused.append(event)
            elif event["type"] == "BlockRemoved":
                self._removed(event)
            else:
                self._there.clear()
                self._announced.clear()

    def _stored(self, event: dict[str, Any]) -> bool:
        """Whether the event could be understood."""
        size, hashes, tokens = event["block_size"], event["block_hashes"], event["token_ids"]
        parent = event["parent_block_hash"]
        if size != self.block_size or len(tokens) != size * len(hashes):
            return False
        if parent is not None and parent not in self._keys:
            return False
        key = 0 if parent is None else self._keys[parent]
        extra_keys = event.get("extra_keys") or [None] * len(hashes)
        for i, (block, extra) in enumerate(zip(hashes, extra_keys, strict=True)):
            names = tuple(name if isinstance(name, str) else name[0] for name in extra or ())
            key = self._key(key, tuple(tokens[i * size : (i + 1) * size]), names)
            self._keys[block] = key
            self._there[key, event["medium"], event["group_idx"]] = 1
            self._announced[block, event["medium"], event["group_idx"]] += 1
        return True

    def _removed(self, event: dict[str, Any]) -> None:
        for block in event["block_hashes"]:
            announced = (block, event["medium"], event["group_idx"])
            self._announced[announced] -= 1
            if self._announced[announced] <= 0 and block in self._keys:
                self._there[self._keys[block], event["medium"], event["group_idx"]] = 0

    def _key(self, parent: int, tokens: tuple[int, ...], names: tuple[str, ...]) -> int:
        return hash((parent, tokens, names))

    def tokens_at(self, question: Question, medium: str = "CPU", group: int = 0) -> int:
        """How many leading tokens the engine has in a medium."""
        key = found = 0
        for tokens, names in question.of_blocks(self.block_size):
            key = self._key(key, tokens, names)
            if not self._there[key, medium, group]:
                break
            found += self.block_size
        return found

    def wrong(self) -> list[Any]:
        """Events that were not understood, and blocks that were announced twice; vLLM's own are left out."""
        twice = [announced for announced, count in self._announced.items() if count > 1 and announced[1] != "GPU"]
        return [event for event in self._refused if event["medium"] != "GPU"] + twice


def by_block(events: Iterable[dict[str, Any]], medium: str) -> dict[tuple[int, Any], dict[str, Any]]:
    """Everything announced about each block of a medium, by group and hash."""
    blocks = {}
    for event in events:
        if event["type"] != "BlockStored" or event["medium"] != medium:
            continue
        size = event["block_size"]
        of_event = {name: event.get(name) for name in ("block_size", "lora_id", "lora_name", "kv_cache_spec_kind")}
        of_event["kv_cache_spec_sliding_window"] = event.get("kv_cache_spec_sliding_window")
        parent = event["parent_block_hash"]
        extra_keys = event.get("extra_keys") or [None] * len(event["block_hashes"])
        for i, (block, extra) in enumerate(zip(event["block_hashes"], extra_keys, strict=True)):
            tokens = event["token_ids"][i * size : (i + 1) * size]
            blocks[event["group_idx"], block] = {**of_event, "parent": parent, "tokens": tokens, "extra": extra}
            parent = block
    return blocks
