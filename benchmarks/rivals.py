"""Rival ways to copy pages, and rival codecs. They run in the same process on the same bytes, and their results are
checked first. The report names missing rivals, with the reason."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device import BULK, DEVICE, ON_GPU, Work

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Rivals:
    """Works that copy the right bytes, and why others are missing."""

    works: dict[str, Work] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Work], check: Callable[[Work], None]) -> None:
        """check: raises if the work copies wrong bytes."""
        try:
            work = make()
            check(work)
        except Exception as error:
            self.missing[name] = f"{type(error).__name__}: {error}"[-300:]
        else:
            self.works[name] = work


@dataclass
class PageCopies:
    """Copies of pages one by one: uint64 addresses of `bytes` bytes each."""

    to: np.ndarray
    source: np.ndarray
    bytes: int

    def add_to(self, rivals: Rivals, check: Callable[[Work], None], to_host: bool | None) -> None:
        """All ways, with and without kernels; to_host=None: within the device's memory, by kernels."""
        if not ON_GPU:
            return
        kept = (self.to, self.source)
        tables = tuple(torch.from_numpy(a.view(np.int64)).to(DEVICE) for a in kept)
        if to_host is not None:
            for name, function in (("one memcpy per page in C", "copy_each"), ("cuMemcpyBatchAsync", "copy_batch")):
                rivals.add(name, lambda f=function: _call(f, kept, self.bytes, to_host), check)
            for blocks in (2, 8):
                rivals.add(
                    f"bulk copies by {blocks} blocks", lambda n=blocks: _call("copy_bulk", tables, self.bytes, n), check
                )
        rivals.add("Triton", lambda: _by_triton(*tables, self.bytes), check)


def _call(function: str, tables: tuple[Any, Any], size: int, option: int) -> Work:
    """Returns a call of rivals.cu on the current stream; its tables live as long as the returned work."""
    if function == "copy_bulk" and not BULK:
        raise RuntimeError("left out, since a driver of tests/host_cuda failed")
    call = getattr(_library(), function)
    call.restype = ctypes.c_char_p

    def work() -> None:
        addresses = [t.ctypes.data if isinstance(t, np.ndarray) else t.data_ptr() for t in tables]
        words = (*addresses, len(tables[0]), size, option, torch.cuda.current_stream().cuda_stream)
        if message := call(*(ctypes.c_uint64(word) for word in words)):
            raise RuntimeError(message.decode())

    return work


@cache
def _library() -> ctypes.CDLL:
    """rivals.cu, built once for this GPU. LMCACHE_MM_BENCH_RIVALS: the path of an existing build."""
    if built := os.environ.get("LMCACHE_MM_BENCH_RIVALS"):
        return ctypes.CDLL(built)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if not nvcc:
        raise RuntimeError("no nvcc to build rivals.cu")
    headers = [*(ROOT / "csrc").glob("*.h"), ROOT / "benchmarks" / "rivals.cu"]
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(headers))).hexdigest()[:16]
    library = ROOT / "build" / f"rivals-{arch}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run(
            [nvcc, *flags, headers[-1], "-o", made], check=False, capture_output=True, text=True, timeout=100
        )
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr}")
        made.replace(library)
    return ctypes.CDLL(str(library))


if triton:

    @triton.jit
    def copy_pages_kernel(to, source, words, BLOCK: tl.constexpr):
        """One program per page, in steps of BLOCK words of 8 bytes."""
        page = tl.program_id(0)
        to_page = tl.multiple_of(tl.load(to + page).to(tl.pointer_type(tl.int64)), 16)
        from_page = tl.multiple_of(tl.load(source + page).to(tl.pointer_type(tl.int64)), 16)
        for begin in range(0, words, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            tl.store(to_page + at, tl.load(from_page + at, mask=at < words), mask=at < words)


def _by_triton(to: torch.Tensor, source: torch.Tensor, size: int) -> Work:
    if not triton:
        raise RuntimeError("no Triton")
    block = min(2048, triton.next_power_of_2(size // 8))
    warps = max(1, min(4, block // 64))
    return lambda: copy_pages_kernel[(len(to),)](to, source, size // 8, BLOCK=block, num_warps=warps)


@dataclass
class ByteCodec:
    """A lossless codec of bytes, on one thread."""

    encode: Callable[[], Any]
    decode: Callable[[], Any]
    coded_bytes: int


def byte_codecs(raw: np.ndarray) -> tuple[dict[str, ByteCodec], dict[str, str]]:
    """The codecs on these bytes, and why others are missing."""
    made: dict[str, ByteCodec] = {}
    missing: dict[str, str] = {}
    for name, make in {"zstd -1": _zstd, "LZ4": _lz4, "nvCOMP's GDeflate on the CPU": _nvcomp}.items():
        try:
            encode, decode = make(raw)
            coded = encode()
            if not np.array_equal(np.frombuffer(decode(coded), np.uint8), raw):
                raise RuntimeError("it returns wrong bytes")
            size = sum(map(len, coded)) if isinstance(coded, list) else len(coded)
            made[name] = ByteCodec(encode, lambda decode=decode, coded=coded: decode(coded), size)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"[-300:]
    return made, missing


def _zstd(raw: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import zstandard  # noqa: PLC0415

    encoder, decoder = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return lambda: encoder.compress(raw.data), decoder.decompress


def _lz4(raw: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    from lz4 import block  # noqa: PLC0415

    return lambda: block.compress(raw.data), block.decompress


def _nvcomp(raw: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """nvcomp::gdeflate::compressCPU and decompressCPU, at level 1, in the batches of 64 KiB that it takes."""
    place = importlib.util.find_spec("nvidia.libnvcomp")
    if place is None or place.origin is None:
        raise RuntimeError("no libnvcomp_cpu.so: pip install --no-deps nvidia-libnvcomp-cu12")
    library = ctypes.CDLL(str(next((Path(place.origin).parent / "lib64").glob("libnvcomp_cpu.so*"))))
    compress = library._ZN6nvcomp8gdeflate11compressCPUEPKPKvPKmmmPKPvPmi
    decompress = library._ZN6nvcomp8gdeflate13decompressCPUEPKPKvPKmmPKPvPmSA_
    count, piece = -(-raw.nbytes // (64 << 10)), 64 << 10
    sizes = np.full(count, piece, np.uint64)
    sizes[-1] = raw.nbytes - (count - 1) * piece
    room = np.empty((count, 2 * piece), np.uint8)
    back, found = np.empty_like(raw), np.empty(count, np.uint64)
    steps = np.arange(count, dtype=np.uint64)
    sources, coded_at, back_at = (
        np.uint64(memory.ctypes.data) + steps * np.uint64(step)
        for memory, step in ((raw, piece), (room, 2 * piece), (back, piece))
    )

    def words(*arrays: Any) -> list[ctypes.c_size_t]:
        return [ctypes.c_size_t(a.ctypes.data if isinstance(a, np.ndarray) else a) for a in arrays]

    def encode() -> list[np.ndarray]:
        lengths = np.empty(count, np.uint64)
        compress(*words(sources, sizes, piece, count, coded_at, lengths), 1)
        return [of_piece[: int(length)] for of_piece, length in zip(room, lengths, strict=True)]

    def decode(coded: list[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(of_piece) for of_piece in coded], np.uint64)
        decompress(*words(coded_at, lengths, count, back_at, sizes, found))
        return back

    return encode, decode


def lmcache_calls(
    kv: list[torch.Tensor], chunks: list[torch.Tensor], page_tokens: int, host: torch.Tensor, direction: str
) -> tuple[Callable[[bool], None], list[torch.Tensor]]:
    """LMCache's kernel from its own package: copies each chunk between pages and pinned memory, directly or through a
    buffer on the device. kv: per layer [2, pages, page_tokens, heads, size]. Payloads: [2, layers, tokens, heads *
    size].
    """
    from lmcache.cuda_ops import multi_layer_kv_transfer  # noqa: PLC0415
    from lmcache.lmcache_native import EngineKVFormat, TransferDirection  # noqa: PLC0415

    pointers = torch.tensor([layer.data_ptr() for layer in kv], dtype=torch.int64, device=DEVICE)
    num_pages, hidden = kv[0].shape[1], kv[0].shape[3] * kv[0].shape[4]
    which = TransferDirection.D2H if direction == "store" else TransferDirection.H2D
    payloads, slots = [], []
    words = host.view(torch.int16)
    for ids in chunks:
        tokens = len(ids) * page_tokens
        size = 2 * len(kv) * tokens * hidden
        payloads.append(words[:size].view(2, len(kv), tokens, hidden))
        words = words[size:]
        slots.append((ids[:, None] * page_tokens + torch.arange(page_tokens)).view(-1).to(DEVICE))
    buffer = torch.empty_like(payloads[0], device=DEVICE).view(-1)

    def transfer(buffered: bool) -> None:
        for payload, of_chunk in zip(payloads, slots, strict=True):
            there = buffer[: payload.numel()].view(payload.shape) if buffered else payload
            if buffered and direction == "load":
                there.copy_(payload, non_blocking=True)
            multi_layer_kv_transfer(
                *(there, pointers, of_chunk, DEVICE, num_pages * page_tokens, which),
                *(EngineKVFormat.NL_X_TWO_NB_BS_NH_HS, page_tokens),
            )
            if buffered and direction == "store":
                payload.copy_(there, non_blocking=True)

    return transfer, payloads
