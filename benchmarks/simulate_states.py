"""Which states are worth their bytes: conversations on a model with states beside attention, in one host's store.

  python benchmarks/simulate_states.py                     Qwen3-Next-80B
  python benchmarks/simulate_states.py --state-bytes 20MiB --token-bytes 16384 --block 528

Applications have a system prompt each. A conversation takes turns: a message, sometimes with a picture, and an answer;
a message is edited now and then, and the conversation goes on from there. A question is a conversation of one turn.
Prompts are stored in blocks, and states at the boundaries that a policy chooses among those that were computed. A hit
ends where all blocks before it and a state are there. Records are evicted by SIEVE, as shm: and file: do. Nothing here
is measured; lengths and odds are what you see in `Talk`. Figures are means over three traces.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from report import table
from simulate import GIB, Sieve, units


@dataclass(frozen=True)
class Model:
    token_bytes: int = 24 << 10  # 12 layers of 2 heads of 256 numbers, K and V, in bf16
    state_bytes: int = 72 << 20  # 36 layers of 32 x 128 x 128 numbers in fp32
    block: int = 1056  # as vLLM makes it: a page of attention is no smaller than one of states


@dataclass(frozen=True)
class Talk:
    """What is asked. Lengths are in tokens, of which these are means of exponential distributions."""

    applications: int = 20
    system_tokens: int = 4000
    message_tokens: int = 200
    picture_tokens: int = 1500
    answer_tokens: int = 400
    document_tokens: int = 12_000  # in the first message of some conversations
    picture_odds: float = 0.3
    document_odds: float = 0.3
    edit_odds: float = 0.15
    turns: int = 8  # a mean, too
    at_once: int = 200  # conversations


TALKS = {"chats": Talk(), "questions": Talk(system_tokens=8000, message_tokens=3000, document_odds=0, turns=1)}
TRACES = 3


class Prompt(NamedTuple):
    ends: list[int]  # where its segments end, ascending
    names: list[int]  # of segments: of all that comes before, too
    end_of_items: int


class Policy(NamedTuple):
    name: str
    boundaries: Callable[[Prompt, int, int], set[int]]  # of a prompt, reach of what is stored, and block


def ends(prompt: Prompt, _: int, block: int) -> set[int]:
    return {(prompt.ends[-1] - 1) // block * block}


def items(prompt: Prompt, reach: int, block: int) -> set[int]:
    return ends(prompt, reach, block) | {prompt.end_of_items // block * block}


def parts(prompt: Prompt, reach: int, block: int) -> set[int]:
    return items(prompt, reach, block) | {reach}


def every(tokens: int) -> Callable[[Prompt, int, int], set[int]]:
    def boundaries(prompt: Prompt, reach: int, block: int) -> set[int]:
        step = -(-tokens // block) * block
        return parts(prompt, reach, block) | set(range(step, prompt.ends[-1], step))

    return boundaries


POLICIES = (
    Policy("the prompt's end", ends),
    Policy("and the last item's end", items),
    Policy("and where prompts part (default)", parts),
    Policy("and every 16,384 tokens", every(16_384)),
    Policy("and every 4,096 tokens", every(4096)),
    Policy("every block", every(1)),
)


def conversations(talk: Talk, count: int, seed: int) -> list[Prompt]:
    """The prompts of `count` requests, in the order of time."""
    rng = np.random.default_rng(seed)
    number = iter(range(talk.applications, sys.maxsize))

    def length(mean: int) -> int:
        return 1 + int(rng.exponential(mean))

    systems = [length(talk.system_tokens) for _ in range(talk.applications)]

    def begin() -> Prompt:
        application = int(rng.integers(talk.applications))
        return Prompt([systems[application]], [application], 0)

    waiting = [(float(rng.exponential()), i, begin()) for i in range(talk.at_once)]
    heapq.heapify(waiting)
    prompts = []
    while len(prompts) < count:
        now, i, before = heapq.heappop(waiting)
        message, end, end_of_items = length(talk.message_tokens), before.ends[-1], before.end_of_items
        if rng.random() < talk.picture_odds:
            end_of_items = end + talk.picture_tokens
            message += talk.picture_tokens
        if len(before.ends) == 1 and rng.random() < talk.document_odds:
            message += length(talk.document_tokens)
        asked = Prompt([*before.ends, end + message], [*before.names, next(number)], end_of_items)
        prompts.append(asked)
        after = Prompt(
            [*asked.ends, asked.ends[-1] + length(talk.answer_tokens)], [*asked.names, next(number)], end_of_items
        )
        if rng.random() < 1 / talk.turns:
            after = begin()
        elif rng.random() < talk.edit_odds:
            after = before
        heapq.heappush(waiting, (now + float(rng.exponential()), i, after))
    return prompts


class Outcome(NamedTuple):
    hit_rate: float  # of all tokens of prompts
    of_states: float  # share of the store's bytes
    written_bytes: float  # per token of prompts


def simulate(model: Model, policy: Policy, prompts: Sequence[Prompt], capacity: float) -> Outcome:
    """Of the second half of the prompts."""
    store, block = Sieve(capacity), model.block
    hits = tokens = written = 0
    for i, prompt in enumerate(prompts):
        count = prompt.ends[-1]
        of_segment = np.searchsorted(prompt.ends, np.arange(block, count + 1, block))
        names = [(prompt.names[segment], (k + 1) * block) for k, segment in enumerate(of_segment)]
        limit = (count - 1) // block
        reach = next((k for k in range(limit) if ("kv", names[k]) not in store), limit)
        hit = next((k for k in range(reach, 0, -1) if ("state", names[k - 1]) in store), 0)
        records = [(("kv", name), block * model.token_bytes) for name in names[hit:]]
        chosen = policy.boundaries(prompt, reach * block, block)
        records += [
            (("state", names[e // block - 1]), model.state_bytes)
            for e in chosen
            if hit * block < e <= len(names) * block
        ]
        counted = i >= len(prompts) // 2
        for key, size in records:
            written += size * (counted and key not in store._sizes)
            store.put(key, size)
        hits, tokens = hits + counted * hit * block, tokens + counted * count
    of_states = sum(size for key, size in store._sizes.items() if key[0] == "state")
    return Outcome(hits / tokens, of_states / max(1, store.used), written / tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-bytes", type=int, default=Model.token_bytes, help="KV of one token, of all ranks")
    parser.add_argument("--state-bytes", type=units, default=Model.state_bytes, help="one state, of all ranks")
    parser.add_argument("--block", type=int, default=Model.block, help="tokens of a page (default: %(default)s)")
    parser.add_argument("--capacity", type=units, nargs="+", default=[64 * GIB, 256 * GIB, 2048 * GIB])
    parser.add_argument("--requests", type=int, default=3000, help="counted, of a trace (default: %(default)s)")
    args = parser.parse_args(arguments)
    if min(args.token_bytes, args.state_bytes, args.block, args.requests, *args.capacity) < 1:
        parser.error("expected numbers above 0")
    model = Model(args.token_bytes, int(args.state_bytes), args.block)
    rows = []
    for name, talk in TALKS.items():
        traces = [conversations(talk, 2 * args.requests, seed) for seed in range(TRACES)]
        for capacity in args.capacity:
            for policy in POLICIES:
                hit, states, written = np.mean([simulate(model, policy, one, capacity) for one in traces], axis=0)
                figures = [f"{hit:.1%}", f"{states:.0%}", f"{written / 1024:.0f} KiB"]
                rows.append([name, f"{capacity / GIB:,.0f} GiB", policy.name, *figures])
    print(table(["load", "store", "states at", "tokens hit", "bytes of states", "written per token"], rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
