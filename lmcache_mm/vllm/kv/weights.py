"""Identifies an engine's weights while it runs.

Weights can change in place: by a trainer's updates, by a reload, by any code that a worker is told to run. vLLM tells
connectors only that it resets its caches. An operator who changes weights must reset the caches, but a pause or sleep
also resets them and changes no weights. So workers digest the weights after every reset. A change without a reset goes
unnoticed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import chain

import torch
from blake3 import blake3

from lmcache_mm import ops
from lmcache_mm.layout import KVLayout
from lmcache_mm.vllm.api import VllmConfig, WorkerBase

logger = logging.getLogger("vllm.lmcache_mm")

WEIGHTS_CONTEXT = "lmcache_mm v1 vllm weights in memory"
PAGE_BYTES, PIECE_BYTES = 1 << 16, 8 << 20  # weights are read in pieces, as pages


def worker_of(config: VllmConfig) -> WorkerBase | None:
    """The worker that is creating its connector, found in the call stack: vLLM gives connectors no access to the model.
    None if there is none, or if it belongs to another engine."""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, WorkerBase):
            return owner if owner.vllm_config is config else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def digest_of(worker: WorkerBase | None) -> bytes:
    """A digest of all parameters and buffers that a worker's models have in memory now: names, dtypes, shapes, strides,
    and checksums (docs/design.md) of the memory that they are views of. It tells updates apart, but does not resist
    attacks. Empty if the weights cannot be read. Takes as long as reading the weights once."""
    if worker is None:
        return b""
    try:
        return _digest_of_models(worker.get_model(), getattr(worker, "get_draft_model", lambda: None)())
    except Exception:  # for example, from tensors without memory of their own
        logger.warning(
            "the weights cannot be read: after a reset of vLLM's caches, records count as old", exc_info=True
        )
        return b""


def _digest_of_models(*models: torch.nn.Module | None) -> bytes:
    hasher = blake3(derive_key_context=WEIGHTS_CONTEXT)
    storages: dict[int, torch.UntypedStorage] = {}  # by address: several weights may be views of one
    for model in models:
        for name, tensor in [] if model is None else chain(model.named_parameters(), model.named_buffers()):
            said = f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.storage_offset()}".encode()
            hasher.update(len(said).to_bytes(4, "little") + said)
            if not tensor.is_meta and tensor.numel():
                storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
    for storage in storages.values():
        for total in _checksums(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)):
            hasher.update(total.to_bytes(8, "little", signed=True))
    return hasher.digest()


def _checksums(flat: torch.Tensor) -> Iterator[int]:
    """The checksums of the pieces of `flat`, computed on its device: a gather returns them with a copy, which is
    dropped."""
    copy = torch.empty(min(len(flat), PIECE_BYTES), dtype=torch.uint8, device=flat.device)
    sums = torch.empty(1, dtype=torch.int64, device=flat.device)
    for piece in flat.split(PIECE_BYTES):
        page_bytes = PAGE_BYTES if len(piece) % PAGE_BYTES == 0 else len(piece)
        layout = KVLayout.from_tensors([piece.view(-1, page_bytes)], page_tokens=1, page_dim=0, opaque=True)
        pages = list(range(len(piece) // page_bytes))
        ops.gather_pages(layout, [pages], [copy[: len(piece)]], checksums=sums)
        yield int(sums.item())
