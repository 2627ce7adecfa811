"""The operations as operators of torch.library, which torch.compile puts into its graphs for calls of `ops`.

A compiler moves and reorders memory, and knows only by an operator's arguments what it reads and writes. So operators
take a layout as its tensors (`KVLayout.memory`), which scatters declare as written, and as text that says where in them
the planes are (`KVLayout._description`). An operator calls the function of `ops` that it stands for, with all its
checks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from lmcache_mm.layout import KVLayout
from lmcache_mm.operands import checked_root, offset_and_length
from lmcache_mm.prompt import Item, checked_items

Tensors = Sequence[torch.Tensor]
ops: Any = None  # the module lmcache_mm.ops, which passes itself to `define`

# --- The operators at run time


def _apply_mm_hashes(
    token_ids: Any, identifiers: Any, offsets: Any, lengths: Any, modalities: Any, validate: bool
) -> None:
    positions = list(zip(offsets, lengths, strict=True))
    ops.apply_mm_hashes_to_token_ids(token_ids, identifiers, positions, modalities, validate=validate)


def _prefix_keys(token_ids: Any, *rest: Any) -> torch.Tensor:
    *items, root, cuts, validate = rest
    checked = [Item(*fields) for fields in zip(*items, strict=True)]
    keys: torch.Tensor = ops.prefix_keys(token_ids, checked, bytes(root), cuts, validate=validate)
    return keys


def _gather(memory: Tensors, layout: str, token_mode: bool, ids: Any, out: Any, tokens: Any, *rest: Any) -> None:
    options = dict(zip(("checksums", "threads", "max_blocks"), rest, strict=True))
    if token_mode:
        ops.gather_tokens(_layout(memory, layout), ids, out, **options)
    else:
        ops.gather_pages(_layout(memory, layout), ids, out, tokens=tokens, **options)


def _scatter(memory: Tensors, layout: str, token_mode: bool, ids: Any, payload: Any, *rest: Any) -> torch.Tensor:
    options = dict(zip(("checksums", "threads", "max_blocks"), rest, strict=True))
    run = ops.scatter_tokens if token_mode else ops.scatter_pages
    intact = run(_layout(memory, layout), ids, payload, **options)
    return memory[0].new_empty(0, dtype=torch.bool) if intact is None else intact


def _layout(memory: Tensors, description: str) -> KVLayout:
    """The layout in the tensors that a graph passes."""
    if not all(tensor.is_contiguous() for tensor in memory):
        raise RuntimeError("layout: expected contiguous tensors, but the compiler has given one other strides")
    return _layout_at(description, tuple(tensor.data_ptr() for tensor in memory), memory[0].device)


@lru_cache(maxsize=64)
def _layout_at(description: str, addresses: tuple[int, ...], device: torch.device) -> KVLayout:
    places, sizes = json.loads(description)
    fields = [tuple(addresses[i] + offset for i, offset in places), *sizes, device]
    return KVLayout(*fields)


ITEMS = "str[] identifiers, SymInt[] offsets, SymInt[] lengths, str[]"
LIMITS = "SymInt threads, SymInt max_blocks"
# Otherwise Inductor's own CUDA graphs would copy the caches into their memory.
TAGS: Any = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
OPERATORS: Any = (
    (_apply_mm_hashes, "token_ids", f"(Tensor(a!) token_ids, {ITEMS}? modalities, bool validate) -> ()", None),
    (
        _prefix_keys,
        "",
        f"(Tensor token_ids, {ITEMS} modalities, int[] root, Tensor cuts, bool validate) -> Tensor",
        lambda token_ids, *rest: token_ids.new_empty((rest[5].numel(), 32), dtype=torch.uint8),
    ),
    (
        _gather,
        "out checksums",
        "(Tensor[] memory, str layout, bool token_mode, Tensor[] ids, Tensor(a!)[] out, SymInt[]? tokens, "
        f"Tensor(b!)? checksums, {LIMITS}) -> ()",
        None,
    ),
    (
        _scatter,
        "memory",
        "(Tensor(a!)[] memory, str layout, bool token_mode, Tensor[] ids, Tensor[] payload, Tensor? checksums, "
        f"{LIMITS}) -> Tensor",
        lambda memory, *rest: memory[0].new_empty(0 if rest[4] is None else len(rest[2]), dtype=torch.bool),
    ),
)


def define(operations: ModuleType) -> None:
    """Defines the operators, for the functions of `operations`."""
    global ops  # noqa: PLW0603
    ops = operations
    for run, mutates, schema, fake in OPERATORS:
        name = f"lmcache_mm::{run.__name__[1:]}"
        operator = torch.library.custom_op(name, run, mutates_args=mutates.split(), schema=schema, **TAGS)
        operator.register_fake(fake or (lambda *_: None))


# --- The functions that `ops` calls while torch.compile traces it


def apply_mm_hashes_to_token_ids(
    token_ids: torch.Tensor, mm_hashes: Any, mm_positions: Any, *rest: Any
) -> torch.Tensor:
    positions = [offset_and_length(i, position) for i, position in enumerate(mm_positions)]
    offsets, lengths = [offset for offset, _ in positions], [length for _, length in positions]
    torch.ops.lmcache_mm.apply_mm_hashes(token_ids, mm_hashes, offsets, lengths, *rest)
    return token_ids


def prefix_keys(token_ids: Any, items: Any, root: bytes, cuts: Any, validate: bool) -> torch.Tensor:
    items = checked_items(items)
    fields = [[getattr(item, name) for item in items] for name in ("identifier", "offset", "length", "modality")]
    rest = (list(checked_root(root)), _tensor(cuts), validate)
    keys: torch.Tensor = torch.ops.lmcache_mm.prefix_keys(_tensor(token_ids), *fields, *rest)
    return keys


def gather(layout: KVLayout, token_mode: bool, ids: Any, out: Any, tokens: Any, *rest: Any) -> Any:
    chunks, many = _chunks(layout, ids)
    if out is None:
        unit_bytes = len(layout.planes) * (layout.row_bytes if token_mode else layout.page_bytes)
        payloads = [torch.empty(len(chunk) * unit_bytes, dtype=torch.uint8, device=layout.device) for chunk in chunks]
        out = payloads if many else payloads[0]
    else:
        payloads = out if many else [out]
    tokens = [tokens] if isinstance(tokens, int) else tokens
    torch.ops.lmcache_mm.gather(layout.memory, layout._description, token_mode, chunks, payloads, tokens, *rest)
    return out


def scatter(
    layout: KVLayout, token_mode: bool, ids: Any, payload: Any, checksums: Any, *rest: Any
) -> torch.Tensor | None:
    chunks, many = _chunks(layout, ids)
    payloads = payload if many else [payload]
    intact: torch.Tensor = torch.ops.lmcache_mm.scatter(
        layout.memory, layout._description, token_mode, chunks, payloads, checksums, *rest
    )
    return None if checksums is None else intact


def _tensor(ids: Any) -> torch.Tensor:
    return ids if isinstance(ids, torch.Tensor) else torch.tensor(list(ids), dtype=torch.int64)


def _chunks(layout: KVLayout, ids: Any) -> tuple[list[torch.Tensor], bool]:
    """The ids of each chunk, and whether they were given as a list of chunks."""
    if not layout._description:
        raise TypeError("layout: expected one made by from_tensors inside torch.compile, got one made from addresses")
    many = isinstance(ids, (list, tuple)) and len(ids) > 0 and not isinstance(ids[0], int)
    return [_tensor(chunk) for chunk in (ids if many else [ids])], many
