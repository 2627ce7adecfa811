"""Estimates what KV reuse saves in a deployment: runs a trace of questions about pictures through models of the stores.

  python benchmarks/simulate.py                      the plans for 10, 1,000 and 100,000 hosts
  python benchmarks/simulate.py --hosts 40 --tier shm:64GiB:8GB/s:0.0005 --tier valkey:1TiB:2GB/s:0.001:shared
  python benchmarks/simulate.py --plot plan.svg      hit rate and time saved, drawn

A tier is NAME:CAPACITY:BANDWIDTH:SECONDS[:shared], the fastest first: CAPACITY per host, or in total if it is shared;
BANDWIDTH per host; SECONDS before a load begins. Each request asks one question about one picture on some host.
Pictures are drawn by Zipf's law, all prompts begin with the same system prompt, and hits are whole records, as in
KVCache: chunks from the first on, then the picture's tail. A hit in one tier is copied to the tiers before it.

Only some hosts are simulated. The shared tiers hold what all hosts asked in the days before, as far as it fits. For a
given law of popularity, a full cache's hit rate depends only on what fits, not on the number of requests; that number
decides the bandwidth needed, which is printed. You supply the figures of hardware: nothing here is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from report import speed, table

CHUNK_TOKENS = 256
GIB = 1 << 30
PREFILL_S = 1e-4  # per token, assumed: a GPU that encodes and computes 10,000 tokens per second
TOKEN_BYTES = 28 << 10  # Qwen2-VL-2B


class Sieve:
    """The records in a cache of `capacity` bytes under SIEVE, as in shm: and file:. Zhang et al., NSDI 2024."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used, self.evictions = capacity, 0, 0
        self._sizes: dict[Hashable, int] = {}
        self._visited: set[Hashable] = set()
        self._order: list[Hashable] = []  # oldest first, including evicted ones
        self._hand = 0

    def settled(self) -> bool:
        """Whether the eviction hand has gone around a few times."""
        return self.evictions > 3 * len(self._sizes)

    def __contains__(self, key: Hashable) -> bool:
        if key not in self._sizes:
            return False
        self._visited.add(key)
        return True

    def put(self, key: Hashable, size: int) -> None:
        """Keeps an existing key's record; skips a record larger than the cache."""
        if key in self._sizes or size > self.capacity:
            return
        while self.used + size > self.capacity:
            self._evict()
        self._sizes[key] = size
        self._order.append(key)
        self.used += size

    def _evict(self) -> None:
        while True:
            if self._hand >= len(self._order):
                self._order = [key for key in self._order if key is not None]
                self._hand = 0
            key = self._order[self._hand]
            self._hand += 1
            if key is None:
                continue
            if key in self._visited:
                self._visited.discard(key)
                continue
            self._order[self._hand - 1] = None
            self.used -= self._sizes.pop(key)
            self.evictions += 1
            return


class Endless:
    """The records in a cache that never evicts, after `asked` earlier requests."""

    def __init__(self, load: Load, asked: float, rng: np.random.Generator, token_bytes: int) -> None:
        self._load, self._asked, self._rng = load, asked, rng
        edges = np.unique(np.geomspace(1, load.pictures + 1, 100_000).astype(np.int64))
        middle = ((edges[1:] + edges[:-1]) // 2 - 1).astype(np.float64)
        there = -np.expm1(-asked * share_of(load, middle))
        self.used = float((there * np.diff(edges)).sum()) * np.mean(load.picture_tokens) * token_bytes
        self._known: dict[int, bool] = {}  # by picture, whether anybody asked about it before
        self._since: set[Hashable] = set()

    def __contains__(self, key: tuple[int, int]) -> bool:
        picture = key[0]
        if picture not in self._known:
            there = -math.expm1(-self._asked * share_of(self._load, picture)) if picture >= 0 else 1.0
            self._known[picture] = self._rng.random() < there
        return self._known[picture] or key in self._since

    def put(self, key: tuple[int, int], size: int) -> None:
        self._since.add(key)


@dataclass(frozen=True)
class Tier:
    name: str
    capacity: float  # bytes
    bandwidth: float  # bytes/s per host
    latency: float  # s, before a load begins
    shared: bool = False


@dataclass(frozen=True)
class Load:
    """The requests."""

    pictures: int = 100_000
    zipf: float = 0.9
    system_tokens: int = 512
    picture_tokens: tuple[int, ...] = (1024, 4096, 16_384)  # equally frequent
    question_tokens: int = 64
    requests: int = 20_000  # of all simulated hosts; as many more warm the caches first
    requests_per_host_s: float = 0.2
    days: float = 1.0  # of earlier requests by all hosts


class Request(NamedTuple):
    host: int
    records: list[tuple[Hashable, int]]  # keys and tokens, from the first on
    tokens: int


class Outcome(NamedTuple):
    hit_rate: float  # share of all tokens
    of_tiers: list[float]
    saved_s: float  # per request, loads deducted
    prefill_s: float  # per request, without a cache
    shared_bytes: float  # held by shared tiers
    shared_bytes_per_s: float  # read from shared tiers by all hosts


def records_of(load: Load, picture: int) -> tuple[list[tuple[Hashable, int]], int]:
    """A prompt's records and tokens: chunks, then the rest up to the picture's end. The question is always new, so
    nobody asks for its records again. All prompts share the records that contain no picture."""
    end = load.system_tokens + load.picture_tokens[picture % len(load.picture_tokens)]
    cuts = [*range(CHUNK_TOKENS, end + 1, CHUNK_TOKENS), *([end] if end % CHUNK_TOKENS else [])]
    records = []
    begin = 0
    for cut in cuts:
        records.append(((-1 if cut <= load.system_tokens else picture, cut), cut - begin))
        begin = cut
    return records, end + load.question_tokens


def pictures(load: Load, count: int, rng: np.random.Generator) -> np.ndarray:
    """Ranks in [0, load.pictures), from Zipf's law in its continuous form, at the same cost for any number of them."""
    u, s, n = rng.random(count), load.zipf, load.pictures
    ranks = np.exp(u * math.log(n + 1)) if s == 1 else (u * ((n + 1) ** (1 - s) - 1) + 1) ** (1 / (1 - s))
    return np.minimum(ranks.astype(np.int64) - 1, n - 1)


def share_of(load: Load, picture: Any) -> Any:
    """The share of requests about the picture of this rank, or of each rank in an array."""
    s, n = load.zipf, load.pictures
    if s == 1:
        return np.log((picture + 2) / (picture + 1)) / math.log(n + 1)
    return ((picture + 2) ** (1 - s) - (picture + 1) ** (1 - s)) / ((n + 1) ** (1 - s) - 1)


def fill(tiers: Sequence[Sieve], load: Load, asked: float, token_bytes: int, rng: np.random.Generator) -> None:
    """Puts the records of the last `asked` requests, as far back as there is room."""
    while asked > 0 and not all(tier.settled() for tier in tiers):
        count = int(min(asked, 1 << 20))
        asked -= count
        distinct, times = np.unique(pictures(load, count, rng), return_counts=True)
        for i in rng.permutation(len(distinct)):
            for key, tokens in records_of(load, int(distinct[i]))[0]:
                for tier in tiers:
                    tier.put(key, tokens * token_bytes)
                    if times[i] > 1:
                        tier.__contains__(key)
            if all(tier.settled() for tier in tiers):
                return


def trace(load: Load, hosts: int, count: int, rng: np.random.Generator) -> Iterator[Request]:
    for host, picture in zip(rng.integers(0, hosts, count), pictures(load, count, rng), strict=True):
        yield Request(int(host), *records_of(load, int(picture)))


def ask(request: Request, tiers: Sequence[Sieve | Endless], token_bytes: int) -> list[int]:
    """How many tokens each tier delivers, the fastest first; missing records are put into all tiers."""
    given = [0] * len(tiers)
    missing = False
    for key, tokens in request.records:
        found = next((i for i, tier in enumerate(tiers) if key in tier), None)
        missing |= found is None
        if found is not None and not missing:
            given[found] += tokens
        for tier in tiers if found is None else tiers[:found]:
            tier.put(key, tokens * token_bytes)
    return given


def simulate(
    load: Load,
    tiers: Sequence[Tier],
    hosts: int,
    sample: int = 16,
    token_bytes: int = TOKEN_BYTES,
    prefill_s: float = PREFILL_S,
    seed: int = 0,
) -> Outcome:
    """Simulates `sample` of the hosts."""
    rng = np.random.default_rng(seed)
    simulated = min(hosts, sample)
    asked = hosts * load.requests_per_host_s * load.days * 86_400
    shared = [
        None
        if not tier.shared
        else Endless(load, asked, rng, token_bytes)
        if tier.capacity == math.inf
        else Sieve(tier.capacity)
        for tier in tiers
    ]
    of_host = [
        [kept or Sieve(tier.capacity) for tier, kept in zip(tiers, shared, strict=True)] for _ in range(simulated)
    ]
    fill([kept for kept in shared if isinstance(kept, Sieve)], load, asked, token_bytes, rng)
    for request in trace(load, simulated, load.requests, rng):
        ask(request, of_host[request.host], token_bytes)
    tokens, saved, all_given = 0, 0.0, np.zeros(len(tiers))
    for request in trace(load, simulated, load.requests, rng):
        given = ask(request, of_host[request.host], token_bytes)
        for tier, of_tier in zip(tiers, given, strict=True):
            if of_tier:
                saved -= tier.latency + of_tier * token_bytes / tier.bandwidth
        saved += sum(given) * prefill_s
        tokens += request.tokens
        all_given += given
    from_shared = sum(given for given, tier in zip(all_given, tiers, strict=True) if tier.shared)
    return Outcome(
        sum(all_given) / tokens,
        [given / tokens for given in all_given],
        saved / load.requests,
        tokens * prefill_s / load.requests,
        sum(kept.used for kept in shared if kept),
        from_shared * token_bytes / load.requests * load.requests_per_host_s * hosts,
    )


# Assumed hardware, for planning: DDR5 and an NVMe disk in each host, 25 and 100 Gbit/s networks.
SHM = Tier("shm", 64 * GIB, 20e9, 100e-6)
FILE = Tier("file", 1024 * GIB, 3e9, 1e-3)
S3 = Tier("s3", math.inf, 1e9, 50e-3, True)
PLANS = {  # the first of each size is what a host has without others
    10: (("shm", [SHM]), ("shm, valkey of 512 GiB", [SHM, Tier("valkey", 512 * GIB, 2.5e9, 1e-3, True)])),
    1000: (
        ("shm", [SHM]),
        ("shm, file", [SHM, FILE]),
        ("shm, mooncake of 32 TiB", [SHM, Tier("mooncake", 32 * 1024 * GIB, 5e9, 1e-3, True)]),
        ("shm, file, s3", [SHM, FILE, S3]),
    ),
    100_000: (("shm", [SHM]), ("shm, file", [SHM, FILE]), ("shm, file, s3", [SHM, FILE, S3])),
}
PICTURES_OF_HOST = 2000  # more hosts have more users


def units(text: str) -> float:
    for suffix, unit in (
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", GIB),
        ("TiB", GIB << 10),
        ("GB/s", 1e9),
        ("MB/s", 1e6),
    ):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * unit
    return math.inf if text == "inf" else float(text)


def to_tier(text: str) -> Tier:
    parts = text.split(":")
    name, capacity, bandwidth, latency, *more = parts if len(parts) > 3 else ("", "", "", "", text)
    if more not in ([], ["shared"]):
        raise argparse.ArgumentTypeError(f"expected NAME:CAPACITY:BANDWIDTH:SECONDS[:shared], got {text!r}")
    try:
        return Tier(name, units(capacity), units(bandwidth), float(latency), bool(more))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def row(hosts: int, name: str, outcome: Outcome, tiers: Sequence[Tier]) -> list[str]:
    shares = ", ".join(f"{tier.name} {share:.0%}" for tier, share in zip(tiers, outcome.of_tiers, strict=True))
    needs = [f"{outcome.shared_bytes / 2**40:,.1f} TiB", speed(outcome.shared_bytes_per_s)]
    saved = f"{outcome.saved_s:.2f} of {outcome.prefill_s:.2f} s"
    return [
        f"{hosts:,}",
        name,
        f"{outcome.hit_rate:.0%}",
        shares,
        saved,
        *(needs if outcome.shared_bytes else ["", ""]),
    ]


HEADINGS = ["hosts", "stores", "tokens hit", "by tier", "prefill saved per request", "shared tiers hold", "deliver"]


def draw(file: Path, outcomes: Sequence[tuple[int, str, Outcome]], prefill_s: float) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "lmcache_mm"
    from matplotlib import pyplot  # noqa: PLC0415

    # A row per plan, and a gap where the number of hosts changes: only rows of one number compare.
    sizes = [hosts for hosts, _, _ in outcomes]
    places = [i + 0.6 * len(set(sizes[: i + 1])) for i in range(len(sizes))]
    found = [outcome for _, _, outcome in outcomes]
    height = 0.4 * places[-1] + 1.6
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    figure.suptitle("Simulated, not measured: what stores restore, and the prefill they save", fontsize=11)
    bars = left.barh(places, [outcome.hit_rate for outcome in found], color="tab:blue")
    left.bar_label(bars, [f"{outcome.hit_rate:.0%}" for outcome in found], padding=3, fontsize=8)
    left.set_yticks(places, [f"{hosts:,} hosts: {name}" for hosts, name, _ in outcomes])
    left.set(xlabel="share of tokens restored", xlim=(0, 1.1))
    right.barh(places, [outcome.prefill_s for outcome in found], color="lightgrey", label="prefill without stores")
    right.barh(places, [outcome.saved_s for outcome in found], color="tab:blue", label="saved, loads deducted")
    right.set(xlabel=f"seconds per request, at {1 / prefill_s:,.0f} tokens/s")
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    left.invert_yaxis()
    figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, help="simulate this many hosts instead of the plans")
    parser.add_argument(
        "--tier", type=to_tier, action="append", default=[], metavar="TIER", help="a tier for --hosts; in order"
    )
    parser.add_argument("--pictures", type=int, help=f"number of pictures (default: {PICTURES_OF_HOST:,} per host)")
    parser.add_argument("--zipf", type=float, default=Load.zipf, help="the law's exponent (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=Load.requests, help="requests to count (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=Load.requests_per_host_s, help="requests/s per host")
    parser.add_argument("--days", type=float, default=Load.days, help="days of earlier requests in the shared tiers")
    parser.add_argument("--token-bytes", type=int, default=TOKEN_BYTES, help="bytes per token (default: Qwen2-VL-2B)")
    parser.add_argument("--prefill", type=float, default=PREFILL_S, help="seconds per token (default: %(default).2g)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results to this .png or .svg")
    args = parser.parse_args(arguments)
    if bool(args.hosts) != bool(args.tier) or (args.hosts or 1) < 1 or args.zipf <= 0 or args.requests < 1:
        parser.error("expected --hosts with at least one --tier, or neither; numbers are positive")
    plans = {args.hosts: (("as given", args.tier),)} if args.hosts else PLANS
    base = Load(zipf=args.zipf, requests=args.requests, requests_per_host_s=args.rate, days=args.days)
    rows, outcomes = [], []
    for hosts, choices in plans.items():
        load = replace(base, pictures=args.pictures or PICTURES_OF_HOST * hosts)
        for name, tiers in choices:
            print(f"{hosts:,} hosts, {name} ...", file=sys.stderr, flush=True)
            outcome = simulate(load, tiers, hosts, token_bytes=args.token_bytes, prefill_s=args.prefill)
            rows.append(row(hosts, name, outcome, tiers))
            outcomes.append((hosts, name, outcome))
    print(table(HEADINGS, rows), end="")
    if args.plot:
        draw(args.plot, outcomes, args.prefill)
    return 0


if __name__ == "__main__":
    sys.exit(main())
