"""The operations on tensors: content ids, prefix keys (also for growing prompts), gather and scatter of paged KV.

Tensors are torch tensors or anything with DLPack (numpy, cupy); lists of integers stand for host ids. Wrong arguments
raise a TypeError or ValueError that names the argument, before anything is written.

torch.compile puts operators (operators.py) into its graphs for calls of these functions, even with fullgraph=True; only
`checksum` and `RunningKeys` break a graph. Arguments must then be torch tensors or lists of integers. Lists are
constants of the graph, like identifiers, modalities and roots: each new value compiles another graph. Create layouts
with `KVLayout.from_tensors`, outside the compiled function. Wrong ids, sizes and dtypes raise when the graph runs.
A function that reads or writes the caches itself must use the tensors in `layout.memory`: if a graph has two tensors of
one storage and writes one of them, torch copies it or raises, and with dynamic=True computes wrong values (torch 2.14).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lmcache_mm import _C, operators
from lmcache_mm.layout import KVLayout, as_tensor
from lmcache_mm.prompt import Item, checked_items, count

__all__ = [
    "RunningKeys",
    "apply_mm_hashes_to_token_ids",
    "checksum",
    "checksum_of_parts",
    "gather_pages",
    "gather_tokens",
    "prefix_keys",
    "scatter_pages",
    "scatter_tokens",
]

# How many threads a copy on the CPU may use: one per core of the process, at most 8, because more threads do not help
# when memory is the limit. The environment variable LMCACHE_MM_THREADS overrides this.
THREADS = min(8, len(os.sched_getaffinity(0)))
if setting := os.environ.get("LMCACHE_MM_THREADS"):
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"LMCACHE_MM_THREADS: expected a number of threads of at least 1, got {setting!r}")
    THREADS = int(setting)

Ids = Any  # a sequence of integers, or a 1-D integer tensor


def _check_device(name: str, device: torch.device) -> None:
    if device.type == "cuda":
        if not _C.cuda_version:
            raise RuntimeError(f"{name}: on {device}, but this build of lmcache_mm has CPU operations only")
    elif device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {device}")


def _launch(device: torch.device) -> dict[str, Any]:
    """Where a CUDA operation runs: torch's current stream of `device`. Tables too large for kernel parameters are
    uploaded on that stream, through pinned memory that torch keeps until the copy is done."""
    uploaded = []

    def upload(table: bytes) -> int:
        pinned = torch.frombuffer(bytearray(table), dtype=torch.uint8).pin_memory()
        uploaded.append(pinned.to(device, non_blocking=True))
        return uploaded[-1].data_ptr()

    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream, "upload": upload}


def _validate_on_device(ids: torch.Tensor) -> None:
    bad = torch.nonzero((ids < 0) | (ids >= 1 << 32))
    if len(bad):
        p = int(bad[0])
        raise ValueError(f"token_ids[{p}]: expected a token id in [0, 2**32), got {int(ids[p])}")


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
        tensor = as_tensor(name, value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype} on {tensor.device}")
    if tensor.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def apply_mm_hashes_to_token_ids(
    token_ids: torch.Tensor,
    mm_hashes: Sequence[str],
    mm_positions: Sequence[Any],
    modalities: Sequence[str] | None = None,
    *,
    validate: bool = False,
) -> torch.Tensor:
    """Overwrites, in place, the ids of every position that an item covers with content ids; returns `token_ids`.

    token_ids: int64 [n], contiguous. mm_hashes: one identifier per item. mm_positions: (offset, length) pairs or
    objects with .offset and .length. modalities: one per item, "image" if omitted.
    A content id has bit 63 set: as int64 it is negative, so it never equals a token id. Spans are cut at the tensor's
    end, and spans beyond it are ignored, so that a prefix of the prompt gives the prefix of the result.

    Raises TypeError or ValueError for ids outside `[0, 2**32)`, including overwritten ones, and for hashes, positions
    and modalities of different number: an item without its hash would share its KV with every other item.
    On CUDA the work is put on torch's current stream and nothing waits for it: a bad id stays as it is, unless
    validate=True, which waits and raises before anything is written. A CUDA graph can capture a call with up to about
    20 items, which the graph keeps; capturing more, or with validate=True, is a RuntimeError.
    Source: docs/design.md, "Identity".
    """
    if torch.compiler.is_compiling():
        return operators.apply_mm_hashes_to_token_ids(token_ids, mm_hashes, mm_positions, modalities, validate)
    if isinstance(token_ids, (list, tuple)):
        raise TypeError(f"token_ids: expected a tensor, to be overwritten in place, got {type(token_ids).__name__}")
    tensor = as_tensor("token_ids", token_ids, writable=True)
    if tensor.dtype != torch.int64:
        raise TypeError(f"token_ids: expected int64, got {tensor.dtype} on {tensor.device}")
    if tensor.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"token_ids: expected 1 contiguous dimension, got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    _check_device("token_ids", tensor.device)
    if isinstance(mm_hashes, (str, bytes)):
        raise TypeError(f"mm_hashes: expected a sequence of str, got {type(mm_hashes).__name__}")
    if len(mm_hashes) != len(mm_positions):
        raise ValueError(f"mm_positions: expected {len(mm_hashes)}, one for each of mm_hashes, got {len(mm_positions)}")
    if modalities is None:
        modalities = ["image"] * len(mm_hashes)
    elif isinstance(modalities, (str, bytes)) or len(modalities) != len(mm_hashes):
        raise ValueError(f"modalities: expected {len(mm_hashes)}, one for each of mm_hashes, got {modalities!r}")
    items = [
        Item(identifier, *_offset_and_length(i, position), modality)
        for i, (identifier, position, modality) in enumerate(zip(mm_hashes, mm_positions, modalities, strict=True))
    ]
    if tensor.device.type == "cuda":
        if validate:
            _validate_on_device(tensor)
        launch = _launch(tensor.device)
        _C.cuda_apply_mm_hashes_to_token_ids(tensor.data_ptr(), len(tensor), _plain(items), **launch)
    else:
        _C.apply_mm_hashes_to_token_ids(tensor.data_ptr(), len(tensor), _plain(items))
    return token_ids


def _offset_and_length(i: int, position: Any) -> tuple[int, int]:
    if hasattr(position, "offset") and hasattr(position, "length"):
        return position.offset, position.length
    try:
        offset, length = position
    except (TypeError, ValueError):
        raise TypeError(f"mm_positions[{i}]: expected (offset, length), got {position!r}") from None
    return offset, length


def _plain(items: Sequence[Item]) -> list[tuple[str, str, int, int]]:
    return [(item.modality, item.identifier, item.offset, item.length) for item in items]


def prefix_keys(
    token_ids: Ids, items: Sequence[Item], root: bytes, cuts: Sequence[int], *, validate: bool = False
) -> torch.Tensor:
    """The prefix keys of a prompt at `cuts`: uint8 [len(cuts), 32], on the ids' device.

    token_ids: int32 or int64 [n], raw ids in `[0, 2**32)`. root: 32 bytes, see `Namespace.root`. cuts: token counts,
    strictly ascending, 0 <= cut <= n. Overwriting and hashing are one pass; the overwritten ids are never in memory.

    Raises TypeError or ValueError for an id outside `[0, 2**32)` before the last cut, for cuts that do not ascend or
    lie beyond the prompt, and for a root of another size. On CUDA the work is put on torch's current stream, for
    prompts of at most `2**21` tokens, and nothing waits for it: from the first cut after a bad id on, keys are zeros,
    which no store holds; validate=True waits and raises instead. A CUDA graph can capture a call and keeps its items
    and cuts: up to about 20 items, or 900 cuts besides those at one constant step from the first on. Capturing more is
    a RuntimeError. Source: docs/design.md, "Identity".
    """
    if torch.compiler.is_compiling():
        return operators.prefix_keys(token_ids, items, root, cuts, validate)
    tensor = ids_tensor("token_ids", token_ids)
    device = tensor.device
    _check_device("token_ids", device)
    plain_items = _plain(checked_items(items))
    _checked_root(root)
    ends = ids_tensor("cuts", cuts)
    if ends.dtype != torch.int64:
        ends = ends.to(torch.int64)
    if ends.device.type != "cpu":
        raise ValueError(f"cuts: expected host integers, got a tensor on {ends.device}")
    num_cuts = ends.numel()
    keys = torch.empty((num_cuts, 32), dtype=torch.uint8, device=device)
    plain = (tensor.data_ptr(), tensor.numel(), tensor.dtype == torch.int64, plain_items, root)
    if device.type == "cuda":
        if validate and num_cuts:
            _validate_on_device(tensor[: max(0, int(ends[-1]))])
        size = _C.cuda_prefix_keys_workspace_bytes(tensor.numel(), num_cuts)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        arguments = (ends.data_ptr(), num_cuts, keys.data_ptr(), workspace.data_ptr())
        _C.cuda_prefix_keys(*plain, *arguments, **_launch(device))
    else:
        _C.prefix_keys(*plain, ends.data_ptr(), num_cuts, keys.data_ptr())
    return keys


class RunningKeys:
    """The prefix keys of a growing prompt: `extend` returns the keys that `prefix_keys` returns for all tokens so far,
    but hashes only the new ones. On the host; one thread at a time.

    items: all items of the prompt, including those past its present end. root: 32 bytes, see `Namespace.root`.
    """

    def __init__(self, items: Sequence[Item], root: bytes) -> None:
        self._running = _C.RunningKeys(_plain(checked_items(items)), _checked_root(root))

    @property
    def tokens(self) -> int:
        """How many tokens have been appended."""
        return self._running.tokens

    def extend(self, token_ids: Ids, cuts: Sequence[int] = ()) -> torch.Tensor:
        """Appends tokens; returns the keys at `cuts`: uint8 [len(cuts), 32].

        token_ids: as in `prefix_keys`, on the host, only the new ones. cuts: token counts from the beginning of the
        prompt, strictly ascending, between the number of tokens before the call and the number after it.
        Raises TypeError or ValueError as `prefix_keys` does; then nothing is appended.
        """
        tensor = ids_tensor("token_ids", token_ids)
        ends = ids_tensor("cuts", cuts).to(torch.int64)
        for name, given in (("token_ids", tensor), ("cuts", ends)):
            if given.device.type != "cpu":
                raise ValueError(f"{name}: expected host integers, got a tensor on {given.device}")
        keys = torch.empty((len(ends), 32), dtype=torch.uint8)
        self._running.extend(
            tensor.data_ptr(), len(tensor), tensor.dtype == torch.int64, ends.data_ptr(), len(ends), keys.data_ptr()
        )
        return keys


def _checked_root(root: bytes) -> bytes:
    if not isinstance(root, bytes):
        raise TypeError(f"root: expected bytes, got {type(root).__name__}")
    if len(root) != 32:
        raise ValueError(f"root: expected 32 bytes, got {len(root)}")
    return root


def gather_pages(
    layout: KVLayout,
    block_ids: Ids | Sequence[Ids],
    out: Any = None,
    *,
    tokens: int | Sequence[int] | None = None,
    checksums: torch.Tensor | None = None,
    threads: int = 0,
    max_blocks: int = 0,
) -> Any:
    """Copies pages into contiguous payloads [plane, page, page byte]; returns the payload, or one per chunk.

    block_ids: the pages of a chunk, as an int32 or int64 tensor or a list of integers; or a list of these, for many
    chunks in one call. -1 stands for a missing page: its bytes are zeros.
    out: uint8 [layout.payload_bytes(pages)] (a list of them for many chunks); allocated if None.
    tokens: how many tokens of each chunk are valid. The slots past them in its last page are zeroed, because they hold
    other requests' KV. None: all tokens, the only choice for opaque pages.
    checksums: int64 [chunks], filled with the payloads' checksums.
    threads: the most threads on the CPU; 0: THREADS.
    max_blocks: limits the CUDA grid, to leave multiprocessors to other work; 0: no limit.

    On CUDA the copy is put on torch's current stream of layout.device and nothing waits for it. Block ids may be on the
    host or on that device; ids on the device that are outside the cache count as missing, and memory outside it is
    never touched. All tensors must stay alive and unchanged until the stream has passed.
    A CUDA graph can capture the call: it keeps host ids, and reads ids on the device on each run. Capturing a chunk
    with more than about 800 host ids is a RuntimeError; put its ids on the device.
    Raises TypeError or ValueError for host ids outside the cache, sizes that do not fit and tensors on other devices.
    """
    if torch.compiler.is_compiling():
        return operators.gather(layout, False, block_ids, out, tokens, checksums, threads, max_blocks)
    chunks = _Chunks(layout, "block_ids", block_ids)
    chunks.take_tokens(tokens)
    return chunks.gather(out, checksums, layout.page_bytes, threads, max_blocks)


def scatter_pages(
    layout: KVLayout,
    block_ids: Ids | Sequence[Ids],
    payload: Any,
    *,
    checksums: torch.Tensor | None = None,
    threads: int = 0,
    max_blocks: int = 0,
) -> torch.Tensor | None:
    """Copies payloads of `gather_pages` into pages; block id -1 skips its page's part of the payload.

    Writes whole pages, including the zeros past a payload's last token. checksums: int64 [chunks], the expected ones;
    the result is then a bool tensor [chunks] that says which payloads match. Pages of a payload that does not match
    hold its bytes: treat them as garbage.

    Raises as `gather_pages` does.
    """
    if torch.compiler.is_compiling():
        return operators.scatter(layout, False, block_ids, payload, checksums, threads, max_blocks)
    return _Chunks(layout, "block_ids", block_ids).scatter(payload, checksums, layout.page_bytes, threads, max_blocks)


def gather_tokens(
    layout: KVLayout,
    slots: Ids | Sequence[Ids],
    out: Any = None,
    *,
    checksums: torch.Tensor | None = None,
    threads: int = 0,
    max_blocks: int = 0,
) -> Any:
    """Copies tokens by slot (page * page_tokens + position in it) into contiguous payloads [plane, token, row byte].

    slots: like block_ids of `gather_pages`; -1 for a missing token. out: uint8 [planes * tokens * layout.row_bytes].
    Raises as `gather_pages` does, and ValueError for opaque layouts.
    """
    if torch.compiler.is_compiling():
        return operators.gather(layout, True, slots, out, None, checksums, threads, max_blocks)
    return _Chunks.of_slots(layout, slots).gather(out, checksums, layout.row_bytes, threads, max_blocks)


def scatter_tokens(
    layout: KVLayout,
    slots: Ids | Sequence[Ids],
    payload: Any,
    *,
    checksums: torch.Tensor | None = None,
    threads: int = 0,
    max_blocks: int = 0,
) -> torch.Tensor | None:
    """Copies payloads of `gather_tokens` into slots; otherwise like `scatter_pages`."""
    if torch.compiler.is_compiling():
        return operators.scatter(layout, True, slots, payload, checksums, threads, max_blocks)
    return _Chunks.of_slots(layout, slots).scatter(payload, checksums, layout.row_bytes, threads, max_blocks)


def checksum(payload: Any) -> int:
    """The checksum (version 1) of a contiguous uint8 tensor, as a signed 64-bit integer. Source: docs/design.md."""
    tensor = as_tensor("payload", payload)
    if tensor.dtype != torch.uint8 or not tensor.is_contiguous():
        raise TypeError(f"payload: expected contiguous uint8, got {tensor.dtype}, strides {tensor.stride()}")
    if tensor.device.type != "cpu":
        raise ValueError(f"payload: expected a tensor on cpu, got one on {tensor.device}")
    return _C.checksum(tensor.data_ptr(), tensor.numel())


def checksum_of_parts(parts: Iterable[int]) -> int:
    """The checksum of a payload from the unsigned checksums of all its parts (`_C.checksum_part`)."""
    return (sum(parts) + (1 << 63)) % (1 << 64) - (1 << 63)


class _Chunks:
    """The checked arguments of one gather or scatter: the ids, tokens and payload of each chunk."""

    def __init__(self, layout: KVLayout, name: str, ids: Ids | Sequence[Ids], token_mode: bool = False):
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout: expected lmcache_mm.KVLayout, got {type(layout).__name__}")
        _check_device("layout", layout.device)
        self.many = isinstance(ids, (list, tuple)) and len(ids) > 0 and not isinstance(ids[0], (int, np.integer))
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
    def of_slots(cls, layout: KVLayout, slots: Ids | Sequence[Ids]) -> _Chunks:
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
            raise ValueError(f"tokens: expected {'one for each chunk' if self.many else 'one integer'}, got {tokens!r}")
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
            raise TypeError(f"{name}: expected {'a list, one payload a chunk' if self.many else 'one payload'}")
        parts = list(given) if self.many else [given]
        if len(parts) != len(self.ids):
            raise ValueError(f"{name}: expected {len(self.ids)} payloads, one a chunk, got {len(parts)}")
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
        arguments = (self.layout.compiled, self.token_mode, self._plain(payloads))
        address = 0 if sums is None else sums.data_ptr()
        if self.layout.device.type == "cuda":
            _C.cuda_gather(*arguments, self._host_ids, address, **_launch(self.layout.device), max_blocks=max_blocks)
        else:
            _C.gather(*arguments, address, count("threads", threads) or THREADS)
        return out

    def scatter(
        self, payload: Any, checksums: torch.Tensor | None, unit_bytes: int, threads: int, max_blocks: int
    ) -> torch.Tensor | None:
        payloads = self._payloads("payload", payload, unit_bytes)
        expected = self._checksums(checksums, filled=False)
        sums = None if expected is None else torch.empty_like(expected)
        arguments = (self.layout.compiled, self.token_mode, self._plain(payloads))
        address = 0 if sums is None else sums.data_ptr()
        if self.layout.device.type == "cuda":
            _C.cuda_scatter(*arguments, self._host_ids, address, **_launch(self.layout.device), max_blocks=max_blocks)
        else:
            _C.scatter(*arguments, address, count("threads", threads) or THREADS)
        return None if sums is None or expected is None else torch.eq(sums, expected)

    @property
    def _host_ids(self) -> bool:
        return self.ids_device.type == "cpu"


operators.define(sys.modules[__name__])
