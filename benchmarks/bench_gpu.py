"""Keys, copies and transfers on the GPU, by shapes of real models, each beside what the device itself does in the same
run and beside what others do. Without a GPU the same runs on the CPU, on less, and says so.

Times on a GPU are of CUDA events around the call, or, of transfers, of the host's clock until the device is idle: they
run on streams of their own. Before each timed call the L2 cache is written over and the device is idle.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm import _C, cli, ops
from lmcache_mm.transfer import RING_BUFFERS, _HostCopies, _Ring

ON_GPU = torch.cuda.is_available() and bool(_C.cuda_version)
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PAYLOAD_BYTES = (512 << 20) if ON_GPU else (64 << 20)
MOST_BYTES = (4 << 30) if ON_GPU else (512 << 20)  # of a transfer
ROUNDS = 20 if ON_GPU else 7
LEAST_ROUNDS, CASE_S = 5, 4.0  # a case ends after so many seconds
STEPS = 1000 if ON_GPU else 200
PAGE_TOKENS, CHUNK_TOKENS = 16, 256
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is nothing like it on a CPU")


class Clock:
    """Times of calls, in seconds, the L2 cache being cold: on a GPU by events on the current stream, or by_host."""

    def __init__(self, by_host: bool) -> None:
        self._cold = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if ON_GPU else None
        self._by_host = by_host

    def __call__(self, work: Callable[[], Any]) -> float:
        if self._cold is not None:
            self._cold.zero_()
            torch.cuda.synchronize()
        if self._by_host or self._cold is None:
            begun = time.perf_counter()
            work()
            if self._cold is not None:
                torch.cuda.synchronize()
            return time.perf_counter() - begun
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def compare(
    benchmark: Any, ours: dict[str, Callable[[], Any]], peers: dict[str, Callable[[], Any]], **facts: Any
) -> None:
    """Medians of all of `ours`, of which the first is ours as it is used, and of each peer, timed in turn; of whole
    transfers, which have a model, by the host's clock."""
    clock = Clock(by_host="model" in facts or facts["gpu"] in ("retrieve", "pin and unpin"))
    times: dict[str, list[float]] = {name: [] for name in (*peers, *ours)}
    begun = time.monotonic()
    for i in range(ROUNDS + 2):
        if i >= LEAST_ROUNDS + 2 and time.monotonic() - begun > CASE_S:
            break
        for name, work in (peers | ours).items():
            times[name].append(clock(work))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    first, *others = ours
    benchmark.pedantic(lambda: None, rounds=1)  # its own clock is the host's
    benchmark.extra_info.update(
        facts,
        device="gpu" if ON_GPU else "cpu",
        device_s=medians[first],
        others_s={name: medians[name] for name in others},
        peers_s={name: medians[name] for name in peers},
    )


# --- Keys


@pytest.mark.parametrize("tokens", [16_384, 32_768, 131_072, 1 << 20])
def test_prefix_keys_in_memory(benchmark, tokens):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 150_000, tokens)).to(DEVICE)
    items = [lmc.Item(f"{i:064x}", i * tokens // 4 + 64, tokens // 5) for i in range(4)]
    cuts, root = list(range(256, tokens + 1, 256)), bytes(range(32))
    keys = ops.prefix_keys(ids, items, root, cuts)
    assert torch.equal(keys.cpu(), ops.prefix_keys(ids.cpu(), items, root, cuts))
    ours = {"ours": lambda: ops.prefix_keys(ids, items, root, cuts)}
    compare(benchmark, ours, {}, gpu="keys", tokens=tokens, cuts=len(cuts))


# --- Copies within the device's memory


def cupy_peer(
    direction: str, rows: torch.Tensor, ids: torch.Tensor, flat: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    try:
        import cupy  # noqa: PLC0415
    except ImportError:
        return {}
    if not ON_GPU:
        return {}
    c_rows, c_ids, c_flat = (cupy.from_dlpack(t) for t in (rows, ids, flat.view(len(ids), -1)))

    def on_this_stream() -> Any:
        return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def gather() -> None:
        with on_this_stream():
            cupy.take(c_rows, c_ids, axis=0, out=c_flat)

    def scatter() -> None:
        with on_this_stream():
            c_rows[c_ids] = c_flat

    return {"cupy": gather if direction == "gather" else scatter}


@pytest.mark.parametrize("run_bytes", [256, 2048, 8192, 65_536])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
def test_copies_in_memory(benchmark, direction, run_bytes, checksum):
    pages = PAYLOAD_BYTES // run_bytes
    cache = torch.randint(0, 256, (2 * pages, 16, run_bytes // 16), dtype=torch.uint8, device=DEVICE)
    layout = lmc.KVLayout.from_tensors([cache], page_tokens=16, page_dim=0, token_dim=1)
    ids = torch.randperm(2 * pages)[:pages].to(DEVICE)
    payload, other = (torch.empty(PAYLOAD_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    sums = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ops.gather_pages(layout, [ids], [payload], checksums=sums)
    assert torch.equal(payload, cache[ids].view(-1))
    given = {"checksums": sums} if checksum else {}
    rows = cache.view(2 * pages, run_bytes)
    peers: dict[str, Callable[[], Any]] = {"memcpy": lambda: other.copy_(payload)}
    if direction == "gather":
        peers["torch"] = lambda: torch.index_select(rows, 0, ids, out=other.view(pages, run_bytes))
        ours = {"ours": lambda: ops.gather_pages(layout, [ids], [payload], **given)}
    else:
        peers["torch"] = lambda: rows.index_copy_(0, ids, payload.view(pages, run_bytes))
        ours = {"ours": lambda: ops.scatter_pages(layout, [ids], [payload], **given)}
    peers |= cupy_peer(direction, rows, ids, other)
    facts = {"gpu": direction, "run_bytes": run_bytes, "checksum": checksum, "bytes": 2 * PAYLOAD_BYTES}
    compare(benchmark, ours, peers, **facts)


# --- Transfers between pages and host memory, pinned where there is a GPU


class Model(NamedTuple):
    layers: int
    planes: int  # K and V apart, or one for both
    heads: int  # of one rank
    size: int

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.planes * self.heads * self.size


MODELS = {
    "Qwen2-VL-2B": Model(28, 2, 2, 128),
    "Qwen2-VL-7B": Model(28, 2, 4, 128),
    "Qwen2.5-VL-72B TP4": Model(80, 2, 2, 128),
    "Llama-3.1-8B": Model(32, 2, 8, 128),
    "DeepSeek-V3 MLA": Model(61, 1, 1, 576),
}
PROMPTS = (1024, 16_384, 131_072)
TOKENS = PROMPTS[1] if ON_GPU else PROMPTS[0]  # where one prompt is enough
CASES = [
    (name, tokens)
    for tokens in PROMPTS
    for name, model in MODELS.items()
    if model.token_bytes * tokens <= MOST_BYTES and (tokens == PROMPTS[1] or name == "Qwen2-VL-2B" or tokens < 2048)
]


class Pages:
    """The KV of one prompt of a model in shuffled pages, and host memory for its payloads, twice."""

    def __init__(self, model: str, tokens: int) -> None:
        self.model = MODELS[model]
        pages = -(-tokens // PAGE_TOKENS)
        shape = (self.model.planes, 2 * pages, PAGE_TOKENS, self.model.heads, self.model.size)
        self.kv = [torch.randint(-99, 99, shape, dtype=torch.int16, device=DEVICE) for _ in range(self.model.layers)]
        named = {f"layer{i}": layer for i, layer in enumerate(self.kv)}
        self.layout = lmc.KVLayout.from_tensors(named, page_tokens=PAGE_TOKENS, page_dim=1, token_dim=2)
        self.ids = torch.randperm(2 * pages)[:pages]
        self.chunk_bytes = self.layout.payload_bytes(CHUNK_TOKENS // PAGE_TOKENS)
        self.bytes = self.layout.payload_bytes(pages)
        self.host, self.plain = (host_memory(self.bytes) for _ in range(2))
        self.chunks = list(self.ids.split(CHUNK_TOKENS // PAGE_TOKENS))

    def check_loads(self, load: Callable[[], Any]) -> None:
        """That it fills all pages again, bit by bit, from what was stored of them."""
        ids = self.ids.to(DEVICE)
        want = [layer[:, ids].clone() for layer in self.kv]
        for layer in self.kv:
            layer.zero_()
        load()
        assert all(torch.equal(layer[:, ids], before) for layer, before in zip(self.kv, want, strict=True))

    def copies(self) -> Any:
        return _Ring(self.layout, self.chunk_bytes) if ON_GPU else _HostCopies()

    def parts(self, begin: int = 0) -> list[Any]:
        """What is to be copied, from plane `begin` of the payloads on."""
        at, parts = self.host.data_ptr(), []
        for ids in self.chunks:
            plane_bytes = len(ids) * self.layout.page_bytes
            offset = begin * plane_bytes
            parts.append((ids.data_ptr(), True, len(ids), len(ids) * PAGE_TOKENS, at + offset, offset))
            at += plane_bytes * len(self.layout.planes)
        return parts


def host_memory(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8).pin_memory() if ON_GPU else torch.ones(size, dtype=torch.uint8)


def plain_copies(pages: Pages, direction: str) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    """One copy of the same bytes; and one for each page, as engines without kernels of their own do it."""
    device = torch.empty(pages.bytes, dtype=torch.uint8, device=DEVICE)
    pairs = (pages.plain, device) if direction == "store" else (device, pages.plain)
    peers: dict[str, Callable[[], Any]] = {
        "one DMA" if ON_GPU else "memcpy": lambda: pairs[0].copy_(pairs[1], non_blocking=True)
    }
    try:
        from cupy.cuda import runtime  # noqa: PLC0415
    except ImportError:
        return peers, device
    if not ON_GPU or pages.bytes > 1 << 30:  # a loop in Python over half a million copies
        return peers, device
    layout, size = pages.layout, pages.layout.page_bytes
    addresses = []
    at = pages.plain.data_ptr()
    for ids in pages.chunks:
        for plane in layout.planes:
            for block in ids.tolist():
                addresses.append((at, plane + block * layout.page_stride))
                at += size
    kind = runtime.memcpyDeviceToHost if direction == "store" else runtime.memcpyHostToDevice

    def by_pages() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for host, page in addresses:
            to, source = (host, page) if direction == "store" else (page, host)
            runtime.memcpyAsync(to, source, size, kind, stream)

    return peers | {"a copy a page": by_pages}, device


def lmcache_peer(pages: Pages, direction: str) -> tuple[dict[str, Callable[[], Any]], str]:
    """LMCache's kernel from its own package: each chunk straight between pages and pinned memory. And why not."""
    if not ON_GPU:
        return {}, "needs a GPU"
    try:
        from lmcache.cuda_ops import multi_layer_kv_transfer  # noqa: PLC0415
        from lmcache.lmcache_native import EngineKVFormat, TransferDirection  # noqa: PLC0415

        model = pages.model
        if model.planes != 2:
            return {}, "the peer is called for K and V apart only"
        pointers = torch.tensor([layer.data_ptr() for layer in pages.kv], dtype=torch.int64, device=DEVICE)
        hidden = model.heads * model.size
        which = TransferDirection.D2H if direction == "store" else TransferDirection.H2D
        calls = []
        at = 0
        for ids in pages.chunks:
            tokens = len(ids) * PAGE_TOKENS
            size = tokens * model.token_bytes
            payload = pages.plain[at : at + size].view(torch.int16).view(2, model.layers, tokens, hidden)
            slots = (ids[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).view(-1).to(DEVICE)
            calls.append((payload, slots))
            at += size

        def transfer(buffered: bool) -> None:
            slots_of_all = pages.layout.num_pages * PAGE_TOKENS
            for payload, slots in calls:
                there = buffer[: payload.numel()].view(payload.shape) if buffered else payload
                if buffered and direction == "load":
                    there.copy_(payload, non_blocking=True)
                multi_layer_kv_transfer(
                    *(there, pointers, slots, DEVICE, slots_of_all, which),
                    *(EngineKVFormat.NL_X_TWO_NB_BS_NH_HS, PAGE_TOKENS),
                )
                if buffered and direction == "store":
                    payload.copy_(there, non_blocking=True)

        buffer = torch.empty_like(calls[0][0], device=DEVICE).view(-1)
        for buffered in (True, False):
            pages.plain.zero_()
            transfer(buffered)
            torch.cuda.synchronize()
            if direction == "store":
                kept = pages.kv[0][:, pages.chunks[0].to(DEVICE)].reshape(2, -1, hidden).cpu()
                assert torch.equal(calls[0][0][:, 0], kept), "LMCache's kernel stores something else"
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"[:300]
    return {
        "LMCache, by a buffer": lambda: transfer(True),
        "LMCache, straight": lambda: transfer(False),
    }, ""


@pytest.mark.parametrize("model, tokens", CASES)
@pytest.mark.parametrize("direction", ["store", "load"])
def test_transfers(benchmark, direction, model, tokens):
    """All chunks of a prompt, checksums computed and compared."""
    pages = Pages(model, tokens)
    copies = pages.copies()
    sums = copies.store(pages.layout, pages.parts(), True).wait()
    payloads = pages.host.split(pages.chunk_bytes)
    assert [ops.checksum_of_parts([total]) for total in sums] == [ops.checksum(payload) for payload in payloads]
    assert torch.equal(payloads[-1], ops.gather_pages(pages.layout, pages.chunks[-1]).cpu())
    pages.check_loads(lambda: copies.load(pages.layout, pages.parts(), True).wait())
    peers, _kept = plain_copies(pages, direction)
    ours: dict[str, Callable[[], Any]] = {
        "ours": lambda: getattr(copies, direction)(pages.layout, pages.parts(), True).wait()
    }
    lmcache, why_not = lmcache_peer(pages, direction)
    facts: dict[str, Any] = {"lmcache": why_not} if why_not else {}
    if ON_GPU:
        stream = torch.cuda.current_stream().cuda_stream
        staging = copies._staging
        more = (True, stream, 1, 0) if direction == "load" else (stream, 1)
        ours["batch"] = lambda: getattr(staging, direction)(pages.layout.compiled, pages.parts(), *more).wait()
        pages.check_loads(lambda: staging.load(pages.layout.compiled, pages.parts(), True, stream, 1, 0).wait())
        assert staging.store(pages.layout.compiled, pages.parts(), stream, 1).wait() == sums
        facts["device_bytes"] = copies._memory.numel()
        facts["buffers"] = RING_BUFFERS
    compare(benchmark, ours, peers | lmcache, gpu=direction, model=model, tokens=tokens, bytes=pages.bytes, **facts)


@pytest.mark.parametrize("model", MODELS)
def test_stores_and_loads_at_once(benchmark, model):
    pages, others = Pages(model, TOKENS), Pages(model, TOKENS)
    storing, loading = pages.copies(), others.copies()
    storing.store(others.layout, others.parts(), True).wait()

    def both() -> None:
        started = loading.load(others.layout, others.parts(), True)
        storing.store(pages.layout, pages.parts(), True).wait()
        started.wait()

    device = [torch.empty(pages.bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    stream = torch.cuda.Stream() if ON_GPU else None

    def plain() -> None:
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                device[0].copy_(pages.plain, non_blocking=True)
            others.plain.copy_(device[1], non_blocking=True)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            device[0].copy_(pages.plain)
            others.plain.copy_(device[1])

    name = "both DMAs" if ON_GPU else "both memcpys"
    compare(benchmark, {"ours": both}, {name: plain}, gpu="both at once", model=model, bytes=2 * pages.bytes)


@pytest.mark.parametrize("model", MODELS)
def test_loads_by_layers(benchmark, model):
    """One layer's part of all payloads after the other."""
    pages = Pages(model, TOKENS)
    copies = pages.copies()
    want = copies.store(pages.layout, pages.parts(), True).wait()
    ends = sorted(set(pages.layout.planes_until.values()))
    begins = [0, *ends[:-1]]
    layouts = [
        lmc.KVLayout.from_tensors([layer], page_tokens=PAGE_TOKENS, page_dim=1, token_dim=2) for layer in pages.kv
    ]

    def by_layers(blocks: int | None = None) -> list[list[int]]:
        if blocks is None:
            started = [copies.load(lo, pages.parts(begin), True) for lo, begin in zip(layouts, begins, strict=True)]
        else:
            stream = torch.cuda.current_stream().cuda_stream
            started = [
                copies._staging.load(lo.compiled, pages.parts(begin), True, stream, 0, blocks)
                for lo, begin in zip(layouts, begins, strict=True)
            ]
        return [one.wait() for one in started]

    assert [sum(parts) % (1 << 64) for parts in zip(*by_layers(), strict=True)] == want
    pages.check_loads(by_layers)
    ours: dict[str, Callable[[], Any]] = {"ours": by_layers}
    for blocks in (2, 4, 8, 16) if ON_GPU else ():
        assert [sum(parts) % (1 << 64) for parts in zip(*by_layers(blocks), strict=True)] == want
        pages.check_loads(lambda blocks=blocks: by_layers(blocks))
        ours[f"{blocks} blocks"] = lambda blocks=blocks: by_layers(blocks)
    peers, _kept = plain_copies(pages, "load")
    peers.pop("a copy a page", None)
    compare(benchmark, ours, peers, gpu="load by layers", model=model, bytes=pages.bytes)


@pytest.mark.parametrize("direction", ["store", "load"])
def test_one_chunk(benchmark, direction):
    """The latency of 256 tokens of Qwen2-VL-2B."""
    pages = Pages("Qwen2-VL-2B", CHUNK_TOKENS)
    copies = pages.copies()
    peers, _kept = plain_copies(pages, direction)
    ours = {"ours": lambda: getattr(copies, direction)(pages.layout, pages.parts(), True).wait()}
    compare(benchmark, ours, peers, gpu=f"{direction} of one chunk", model="Qwen2-VL-2B", bytes=pages.bytes)


def test_a_retrieve_and_the_copies_in_it(benchmark):
    """What keys, index, threads and Python add to the copies of one retrieve from shm:."""
    pages = Pages("Qwen2-VL-2B", TOKENS)
    prompt = lmc.Prompt(list(range(TOKENS)))
    url = f"shm:///bench-gpu-{os.getpid()}"
    with lmc.KVCache(pages.layout, f"{url}?capacity=1GiB", lmc.Namespace(model="m"), CHUNK_TOKENS) as cache:
        cache.store(prompt, pages.ids).wait()
        copies = pages.copies()
        assert cache.retrieve(prompt, pages.ids).wait() == len(prompt)
        ours = {
            "ours": lambda: cache.retrieve(prompt, pages.ids, len(prompt)).wait(),
            "its copies": lambda: copies.load(pages.layout, pages.parts(), True).wait(),
        }
        compare(benchmark, ours, {}, gpu="retrieve", bytes=pages.bytes, tokens=len(prompt))
    assert cli.main(["clear", url]) == 0


@needs_gpu
def test_time_to_pin(benchmark):
    memory = np.ones(1 << 30, dtype=np.uint8)

    def pin() -> None:
        _C.cuda_register_host(0, memory.ctypes.data, memory.nbytes, 1 << 30)
        _C.cuda_unregister_host(0, memory.ctypes.data, memory.nbytes, 1 << 30)

    compare(benchmark, {"ours": pin}, {}, gpu="pin and unpin", bytes=memory.nbytes)


# --- What compute loses while transfers are under way


def loads(pages: Pages, copies: Any, blocks: int, fragment_bytes: int) -> Callable[[], None]:
    def load() -> None:
        if ON_GPU:
            stream = torch.cuda.current_stream().cuda_stream
            arguments = (True, stream, fragment_bytes, blocks)
            copies._staging.load(pages.layout.compiled, pages.parts(), *arguments).wait()
        else:
            copies.load(pages.layout, pages.parts(), True).wait()

    return load


def stores(pages: Pages, copies: Any) -> Callable[[], None]:
    return lambda: copies.store(pages.layout, pages.parts(), True).wait()


def interfering() -> Iterator[tuple[str, Callable[[Pages, Any], Callable[[], None]] | None]]:
    yield "nothing", None
    yield "nothing again", None
    yield "loads", lambda pages, copies: loads(pages, copies, 0, 0)
    yield "stores", stores
    if ON_GPU:
        yield "loads in batches", lambda pages, copies: loads(pages, copies, 0, 1)
        for blocks in (2, 4, 8, 16):
            yield f"loads by {blocks} blocks", lambda pages, copies, blocks=blocks: loads(pages, copies, blocks, 0)


def time_of_step(a: torch.Tensor) -> float:
    """In seconds: on a GPU of the device's work alone, whatever the interpreter does meanwhile."""
    if not ON_GPU:
        begun = time.perf_counter()
        for _ in range(4):
            a @ a
        return time.perf_counter() - begun
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(4):
        a @ a
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@pytest.mark.parametrize("what, make", list(interfering()), ids=lambda value: value if isinstance(value, str) else "")
def test_interference(benchmark, what, make):
    """Steps of compute, of about 1 ms, while another thread transfers without a pause."""
    pages = Pages("Qwen2-VL-7B", TOKENS)
    copies = pages.copies()
    size = 4096 if ON_GPU else 512
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    stop = threading.Event()
    transfers = 0

    def transfer() -> None:
        nonlocal transfers
        with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else torch.no_grad():
            work = make(pages, copies)
            while not stop.is_set():
                work()
                transfers += 1

    thread = threading.Thread(target=transfer)
    if make:
        thread.start()
    steps = []
    before = transfers
    begun = time.perf_counter()
    for _ in range(STEPS):
        steps.append(time_of_step(a))
    seconds = time.perf_counter() - begun
    moved = (transfers - before) * pages.bytes
    stop.set()
    if make:
        thread.join()
        assert transfers
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        gpu="interference",
        device="gpu" if ON_GPU else "cpu",
        beside=what,
        steps=STEPS,
        median_s=float(np.median(steps)),
        p99_s_of_step=float(np.quantile(steps, 0.99)),
        transferred_bytes_per_s=moved / seconds,
    )
