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

import sys
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch

from lmcache_mm import _C, operators
from lmcache_mm.layout import KVLayout, as_tensor, check_device
from lmcache_mm.operands import Chunks, Ids, checked_root, ids_tensor, launch, offset_and_length
from lmcache_mm.prompt import Item, checked_items

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


def _validate_on_device(ids: torch.Tensor) -> None:
    bad = torch.nonzero((ids < 0) | (ids >= 1 << 32))
    if len(bad):
        p = int(bad[0])
        raise ValueError(f"token_ids[{p}]: expected a token id in [0, 2**32), got {int(ids[p])}")


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
    check_device("token_ids", tensor.device)
    if isinstance(mm_hashes, (str, bytes)) or not isinstance(mm_hashes, Sized):
        raise TypeError(f"mm_hashes: expected a sequence of str, got {type(mm_hashes).__name__}")
    if not isinstance(mm_positions, Sized):
        raise TypeError(f"mm_positions: expected a sequence of (offset, length), got {type(mm_positions).__name__}")
    if len(mm_hashes) != len(mm_positions):
        raise ValueError(f"mm_positions: expected {len(mm_hashes)}, one for each of mm_hashes, got {len(mm_positions)}")
    if modalities is None:
        modalities = ["image"] * len(mm_hashes)
    elif isinstance(modalities, (str, bytes)) or len(modalities) != len(mm_hashes):
        raise ValueError(f"modalities: expected {len(mm_hashes)}, one for each of mm_hashes, got {modalities!r}")
    items = [
        Item(identifier, *offset_and_length(i, position), modality)
        for i, (identifier, position, modality) in enumerate(zip(mm_hashes, mm_positions, modalities, strict=True))
    ]
    if tensor.device.type == "cuda":
        if validate:
            _validate_on_device(tensor)
        where = launch(tensor.device)
        _C.cuda_apply_mm_hashes_to_token_ids(tensor.data_ptr(), len(tensor), _plain(items), **where)
    else:
        _C.apply_mm_hashes_to_token_ids(tensor.data_ptr(), len(tensor), _plain(items))
    return token_ids


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
    check_device("token_ids", device)
    plain_items = _plain(checked_items(items))
    checked_root(root)
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
        _C.cuda_prefix_keys(*plain, *arguments, **launch(device))
    else:
        _C.prefix_keys(*plain, ends.data_ptr(), num_cuts, keys.data_ptr())
    return keys


class RunningKeys:
    """The prefix keys of a growing prompt: `extend` returns the keys that `prefix_keys` returns for all tokens so far,
    but hashes only the new ones. On the host; one thread at a time.

    items: all items of the prompt, including those past its present end. root: 32 bytes, see `Namespace.root`.
    """

    def __init__(self, items: Sequence[Item], root: bytes) -> None:
        self._running = _C.RunningKeys(_plain(checked_items(items)), checked_root(root))

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
    threads: the most threads on the CPU; 0: one per core of the process, at most 8, or LMCACHE_MM_THREADS.
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
    chunks = Chunks(layout, "block_ids", block_ids)
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
    return Chunks(layout, "block_ids", block_ids).scatter(payload, checksums, layout.page_bytes, threads, max_blocks)


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
    return Chunks.of_slots(layout, slots).gather(out, checksums, layout.row_bytes, threads, max_blocks)


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
    return Chunks.of_slots(layout, slots).scatter(payload, checksums, layout.row_bytes, threads, max_blocks)


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


operators.define(sys.modules[__name__])
