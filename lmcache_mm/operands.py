"""Operands: the arguments of operations on tensors, checked, as the compiled module takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lmcache_mm import _C
from lmcache_mm.layout import KVLayout, as_tensor, check_device
from lmcache_mm.prompt import count

# How many threads a copy on the CPU may use: one per core of the process, at most 8, because more threads do not help
# when memory is the limit. The environment variable LMCACHE_MM_THREADS overrides this.
THREADS = min(8, len(os.sched_getaffinity(0)))
if setting := os.environ.get("LMCACHE_MM_THREADS"):
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"LMCACHE_MM_THREADS: expected a number of threads of at least 1, got {setting!r}")
    THREADS = int(setting)

Ids = Any  # a sequence of integers, or a 1-D integer tensor


def launch(device: torch.device) -> dict[str, Any]:
    """Where a CUDA operation runs: torch's current stream of `device`. Tables too large for kernel parameters are
    uploaded on that stream, through pinned memory that torch keeps until the copy is done."""
    uploaded = []

    def upload(table: bytes) -> int:
        pinned = torch.frombuffer(bytearray(table), dtype=torch.uint8).pin_memory()
        uploaded.append(pinned.to(device, non_blocking=True))
        return uploaded[-1].data_ptr()

    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream, "upload": upload}


def ids_tensor(name: str, value: Ids) -> torch.Tensor:
    """`value` as a contiguous 1-D int32 or int64 tensor."""
    if isinstance(value, (list, tuple, range)):
        try:
            array = np.array(value) if value else np.empty(0, np.int64)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: expected integers, got {type(value).__name__}: {error}") from None
        if array.dtype.kind == "u" or (array.dtype == object and all(isinstance(v, int) for v in value)):
            raise ValueError(f"{name}: expected integers that int64 can hold, got {max(value)}")
        if array.dtype.kind != "i":
            raise TypeError(f"{name}: expected integers, got {array.dtype}")
        tensor = torch.from_numpy(array.astype(np.int64, copy=False))
    else:
        tensor = as_tensor(name, value, kind="a list of integers, a torch tensor or an array with DLPack")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype} on {tensor.device}")
    if tensor.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def offset_and_length(i: int, position: Any) -> tuple[int, int]:
    if hasattr(position, "offset") and hasattr(position, "length"):
        return position.offset, position.length
    try:
        offset, length = position
    except (TypeError, ValueError):
        raise TypeError(f"mm_positions[{i}]: expected (offset, length), got {position!r}") from None
    return offset, length


def checked_root(root: bytes) -> bytes:
    if not isinstance(root, bytes):
        raise TypeError(f"root: expected bytes, got {type(root).__name__}")
    if len(root) != 32:
        raise ValueError(f"root: expected 32 bytes, got {len(root)}")
    return root


class Chunks:
    """The checked arguments of one gather or scatter: the ids, tokens and payload of each chunk."""

    def __init__(self, layout: KVLayout, name: str, ids: Ids | Sequence[Ids], token_mode: bool = False):
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout: expected lmcache_mm.KVLayout, got {type(layout).__name__}")
        check_device("layout", layout.device)
        self.many = isinstance(ids, (list, tuple)) and len(ids) > 0 and not isinstance(ids[0], (int, float, np.number))
        self.layout, self.token_mode = layout, token_mode
        self.ids = (
            [ids_tensor(f"{name}[{i}]", part) for i, part in enumerate(ids)] if self.many else [ids_tensor(name, ids)]
        )
        self.ids_device = self.ids[0].device
        for i, part in enumerate(self.ids):
            if part.device not in (layout.device, torch.device("cpu")) or part.device != self.ids_device:
                expected = self.ids_device if i else layout.device
                raise ValueError(f"{self._nth(name, i)}: expected a tensor on {expected}, got one on {part.device}")
        self.tokens = [len(part) * layout.page_tokens for part in self.ids]

    @classmethod
    def of_slots(cls, layout: KVLayout, slots: Ids | Sequence[Ids]) -> Chunks:
        if isinstance(layout, KVLayout) and layout.opaque:
            raise ValueError("layout: expected one with a token dimension, got opaque pages: only pages can be copied")
        return cls(layout, "slots", slots, token_mode=True)

    def _nth(self, name: str, i: int) -> str:
        return f"{name}[{i}]" if self.many else name

    def _check_device(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.layout.device:
            raise ValueError(f"{name}: expected a tensor on {self.layout.device}, got one on {tensor.device}")

    def take_tokens(self, tokens: int | Sequence[int] | None) -> None:
        if tokens is None:
            return
        if isinstance(tokens, Sequence) != self.many or (isinstance(tokens, Sequence) and len(tokens) != len(self.ids)):
            raise ValueError(f"tokens: expected {'one per chunk' if self.many else 'one integer'}, got {tokens!r}")
        given = tokens if isinstance(tokens, Sequence) else [tokens]
        size = self.layout.page_tokens
        for i, (number, part) in enumerate(zip(given, self.ids, strict=True)):
            valid = count(self._nth("tokens", i), number)
            if (valid + size - 1) // size != len(part):
                raise ValueError(f"{self._nth('tokens', i)}: expected the tokens of {len(part)} pages, got {valid}")
            if self.layout.opaque and valid % size:
                raise ValueError(f"{self._nth('tokens', i)}: expected whole pages of an opaque layout, got {valid}")
            self.tokens[i] = valid

    def _payloads(self, name: str, given: Any, unit_bytes: int) -> list[torch.Tensor]:
        if self.many != isinstance(given, (list, tuple)):
            expected = "a list, one payload per chunk" if self.many else "one payload"
            raise TypeError(f"{name}: expected {expected}, got {type(given).__name__}")
        parts = list(given) if self.many else [given]
        if len(parts) != len(self.ids):
            raise ValueError(f"{name}: expected {len(self.ids)} payloads, one per chunk, got {len(parts)}")
        payloads = []
        for i, (part, ids) in enumerate(zip(parts, self.ids, strict=True)):
            where = self._nth(name, i)
            tensor = as_tensor(where, part, writable=name == "out")
            self._check_device(where, tensor)
            size = len(self.layout.planes) * len(ids) * unit_bytes
            if tensor.dtype != torch.uint8:
                raise TypeError(f"{where}: expected uint8, got {tensor.dtype}")
            if tensor.numel() != size or not tensor.is_contiguous():
                raise ValueError(
                    f"{where}: expected {size} contiguous bytes, got shape {tuple(tensor.shape)}, "
                    f"strides {tensor.stride()}"
                )
            payloads.append(tensor)
        return payloads

    def _checksums(self, checksums: torch.Tensor | None, filled: bool) -> torch.Tensor | None:
        if checksums is None:
            return None
        tensor = as_tensor("checksums", checksums, writable=filled)
        self._check_device("checksums", tensor)
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (len(self.ids),) or not tensor.is_contiguous():
            raise ValueError(
                f"checksums: expected contiguous int64 [{len(self.ids)}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor

    def _plain(self, payloads: list[torch.Tensor]) -> list[tuple[int, bool, int, int, int, int]]:
        return [
            (ids.data_ptr(), ids.dtype == torch.int64, len(ids), tokens, payload.data_ptr(), 0)
            for ids, tokens, payload in zip(self.ids, self.tokens, payloads, strict=True)
        ]

    def gather(self, out: Any, checksums: torch.Tensor | None, unit_bytes: int, threads: int, max_blocks: int) -> Any:
        if out is None:
            sizes = [len(self.layout.planes) * len(ids) * unit_bytes for ids in self.ids]
            out = [torch.empty(size, dtype=torch.uint8, device=self.layout.device) for size in sizes]
            out = out if self.many else out[0]
        payloads = self._payloads("out", out, unit_bytes)
        sums = self._checksums(checksums, filled=True)
        arguments = (self.layout._compiled, self.token_mode, self._plain(payloads))
        address = 0 if sums is None else sums.data_ptr()
        if self.layout.device.type == "cuda":
            _C.cuda_gather(*arguments, self._host_ids, address, **launch(self.layout.device), max_blocks=max_blocks)
        else:
            _C.gather(*arguments, address, count("threads", threads) or THREADS)
        return out

    def scatter(
        self, payload: Any, checksums: torch.Tensor | None, unit_bytes: int, threads: int, max_blocks: int
    ) -> torch.Tensor | None:
        payloads = self._payloads("payload", payload, unit_bytes)
        expected = self._checksums(checksums, filled=False)
        sums = None if expected is None else torch.empty_like(expected)
        arguments = (self.layout._compiled, self.token_mode, self._plain(payloads))
        address = 0 if sums is None else sums.data_ptr()
        if self.layout.device.type == "cuda":
            _C.cuda_scatter(*arguments, self._host_ids, address, **launch(self.layout.device), max_blocks=max_blocks)
        else:
            _C.scatter(*arguments, address, count("threads", threads) or THREADS)
        return None if sums is None or expected is None else torch.eq(sums, expected)

    @property
    def _host_ids(self) -> bool:
        return self.ids_device.type == "cpu"
