"""KVLayout: any engine's paged KV cache, by addresses and strides."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from lmcache_mm import _C
from lmcache_mm.prompt import count, encode_fields

FINGERPRINT_CONTEXT = "lmcache_mm v1 layout"
PAYLOAD_VERSION, CODED_PAYLOAD_VERSION = 1, 2


def check_device(name: str, device: torch.device) -> None:
    """ValueError for a device that has no operations, RuntimeError for one that this build has none for."""
    if device.type == "cuda":
        if not _C.cuda_version:
            raise RuntimeError(f"{name}: on {device}, but this build of lmcache_mm has CPU operations only")
    elif device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {device}")


def as_tensor(
    name: str, value: Any, writable: bool = False, kind: str = "a torch tensor or an array with DLPack"
) -> torch.Tensor:
    """`value` as a torch tensor that shares its memory: torch, numpy, cupy, anything with DLPack or
    __cuda_array_interface__. A read-only numpy array is copied, or refused if it is to be written. A tensor whose
    storage has been resized to less than it needs is refused. kind: what the error for anything else expects."""
    if isinstance(value, torch.Tensor):
        check_storage(name, value)
        return value.detach()
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        if writable:
            raise ValueError(f"{name}: expected writable memory, got a read-only numpy array")
        value = value.copy()
    if hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value)
    if hasattr(value, "__cuda_array_interface__"):
        if not torch.cuda.is_available():
            why = _C.cuda_devices()[1] if _C.cuda_version else "this build of lmcache_mm has CPU operations only"
            raise RuntimeError(f"{name}: in CUDA memory, but no GPU can be used: {why or 'torch finds none'}")
        return torch.as_tensor(value, device="cuda")
    raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")


def check_storage(name: str, tensor: torch.Tensor) -> None:
    """ValueError for a tensor that reaches beyond its storage, because resizing the storage to 0 frees the memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if there < needed:
        raise ValueError(f"{name}: expected a storage of {needed} bytes or more, got {there}: was it freed?")


@dataclass(frozen=True)
class KVLayout:
    """Where the bytes of one paged KV cache are.

    Plane i begins at address planes[i], and its page p at planes[i] + p * page_stride, p in [0, num_pages). A page is
    `runs` runs of `run_bytes` bytes, run_stride apart, together page_bytes. Byte x of a page, in that order, belongs to
    slot (x // token_bytes) % page_tokens; token_bytes = 0 makes pages opaque: they are only copied whole, and have no
    slots.

    A payload in page mode is [plane, page, page byte]; in token mode it is [plane, token, row byte], with row_bytes per
    row. All sizes and strides are in bytes. `device`: where the planes are. `spec` says what the bytes mean (dtype, and
    which dimensions in which order), and `layers` names the layers; both are used only in the fingerprint.
    `planes_until`: for each layer, how many planes, from the first on, hold it and the layers before it.

    `memory` stands for the layout in torch.compile, see operators.py: contiguous tensors over the storages that contain
    the planes.

    The layout keeps no copy: the cache must outlive it and every operation on it. `from_tensors` holds references.
    """

    planes: tuple[int, ...]
    num_pages: int
    page_stride: int
    page_tokens: int
    runs: int
    run_stride: int
    run_bytes: int
    token_bytes: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    spec: str = ""
    layers: tuple[str, ...] = ()
    tensors: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    planes_until: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    memory: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    _description: str = field(default="", init=False, repr=False, compare=False)  # where in `memory` the planes are

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_stride", "page_tokens", "runs", "run_stride", "run_bytes", "token_bytes"):
            object.__setattr__(self, name, count(name, getattr(self, name)))
        object.__setattr__(self, "planes", tuple(count("planes", address) for address in self.planes))
        for name, least in (("page_tokens", 1), ("runs", 1), ("run_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.planes:
            raise ValueError("planes: expected at least one address, got none")
        if self.runs > 1 and self.run_stride < self.run_bytes:
            raise ValueError(f"run_stride: expected at least run_bytes = {self.run_bytes}, got {self.run_stride}")
        extent = (self.runs - 1) * self.run_stride + self.run_bytes
        if self.num_pages > 1 and self.page_stride < extent:
            raise ValueError(f"page_stride: expected at least the page's extent {extent}, got {self.page_stride}")
        if not self.opaque:
            if self.page_bytes % (self.page_tokens * self.token_bytes):
                raise ValueError(
                    f"token_bytes: expected page_tokens * token_bytes to divide the page's {self.page_bytes} bytes, "
                    f"got {self.page_tokens} * {self.token_bytes}"
                )
            if self.run_bytes % self.token_bytes and self.token_bytes % self.run_bytes:
                raise ValueError(
                    f"token_bytes: expected a multiple or divisor of run_bytes = {self.run_bytes}, "
                    f"got {self.token_bytes}"
                )
        if self.num_pages * max(self.page_stride, extent) >= 1 << 62 or len(self.planes) * self.page_bytes >= 1 << 40:
            raise ValueError("KVLayout: the cache exceeds 2**62 bytes, or a page of all planes 2**40")
        plane_bytes = (self.num_pages - 1) * self.page_stride + extent if self.num_pages else 0
        object.__setattr__(self, "_description", self._described(plane_bytes))

    def _described(self, plane_bytes: int) -> str:
        """The text for torch.compile; "" if a plane is outside of `memory`."""
        spans = [(s.data_ptr(), s.nbytes()) for s in (tensor.untyped_storage() for tensor in self.memory)]
        places = [
            next(((i, plane - at) for i, (at, size) in enumerate(spans) if 0 <= plane - at <= size - plane_bytes), None)
            for plane in self.planes
        ]
        if None in places or any(tensor.device != self.device for tensor in self.memory):
            return ""
        sizes = (self.num_pages, self.page_stride, self.page_tokens)
        return json.dumps([places, (*sizes, self.runs, self.run_stride, self.run_bytes, self.token_bytes)])

    @property
    def opaque(self) -> bool:
        """Whether pages can only be copied whole."""
        return self.token_bytes == 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one plane."""
        return self.runs * self.run_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane."""
        return self.page_bytes // self.page_tokens

    def payload_bytes(self, pages: int) -> int:
        """Bytes of a page-mode payload of `pages` pages."""
        return len(self.planes) * pages * self.page_bytes

    @cached_property
    def _compiled(self) -> _C.PagedCache:
        """The same layout in the form that kernels take."""
        return _C.PagedCache(
            planes=self.planes,
            num_pages=self.num_pages,
            page_stride=self.page_stride,
            page_bytes=self.page_bytes,
            run_bytes=self.run_bytes,
            run_stride=self.run_stride,
            page_tokens=self.page_tokens,
            token_bytes=self.token_bytes,
        )

    def fingerprint(self, chunk_tokens: int, mode: str = "page", codec: str | None = None) -> bytes:
        """32 bytes, equal for caches whose payloads of `chunk_tokens` tokens mean the same. `mode`: "page" or "token".
        codec: the payloads' codec."""
        return fingerprint_of_groups([self], chunk_tokens, mode, [codec])

    @classmethod
    def from_tensors(
        cls,
        kv_caches: Sequence[Any] | dict[str, Any],
        *,
        page_tokens: int,
        page_dim: int,
        token_dim: int | None = None,
        opaque: bool = False,
    ) -> KVLayout:
        """The layout of tensors of equal shape, strides and dtype, one per layer.

        kv_caches: torch or cupy tensors (or anything with DLPack); a dict names the layers. All strides are supported:
        dimensions that lie outside a page in memory (for example, separate K and V) become planes, dimensions inside a
        page keep their order in memory, and contiguous bytes are joined, even across layers that share their pages.
        Layers that are views of the same bytes are kept once.
        page_dim: the dimension of pages. token_dim: the dimension of the `page_tokens` slots of a page; or opaque=True,
        if pages must only be copied whole.

        Raises TypeError or ValueError for tensors that differ, overlap themselves, or are expanded.
        """
        if not isinstance(kv_caches, Iterable) or isinstance(kv_caches, torch.Tensor):
            raise TypeError(
                f"kv_caches: expected a list or dict of tensors, one per layer, got {type(kv_caches).__name__}"
            )
        named = dict(kv_caches) if isinstance(kv_caches, dict) else {str(i): t for i, t in enumerate(kv_caches)}
        if not named:
            raise ValueError("kv_caches: expected at least one tensor, got none")
        tensors = {name: as_tensor(f"kv_caches[{name}]", t, writable=True) for name, t in named.items()}
        first_name, first = next(iter(tensors.items()))
        check_device(f"kv_caches[{first_name}]", first.device)
        for name, tensor in tensors.items():
            for what in ("dtype", "device", "shape"):
                if getattr(tensor, what) != getattr(first, what):
                    raise ValueError(
                        f"kv_caches[{name}]: expected {what} {getattr(first, what)} as kv_caches[{first_name}], "
                        f"got {getattr(tensor, what)}"
                    )
            if tensor.stride() != first.stride():
                raise ValueError(
                    f"kv_caches[{name}]: expected strides {first.stride()} as kv_caches[{first_name}], "
                    f"got {tensor.stride()}"
                )
        view = _PageView(first, page_tokens, page_dim, token_dim, opaque)
        layers: list[str] = []
        planes: list[int] = []
        ends: dict[int, int] = {}  # by address of a layer: where its planes end
        for name, tensor in tensors.items():
            if tensor.data_ptr() in ends and tensor.numel():
                continue
            layers.append(name)
            planes.extend(tensor.data_ptr() + offset for offset in view.plane_offsets())
            ends[tensor.data_ptr()] = len(planes)
        joined = _joined_planes(planes, view)
        return cls(
            planes=tuple(planes[::joined]),
            num_pages=view.num_pages,
            page_stride=view.page_stride,
            page_tokens=view.page_tokens,
            runs=view.runs,
            run_stride=view.run_stride,
            run_bytes=view.run_bytes * joined,
            token_bytes=view.token_bytes,
            device=first.device,
            spec=view.spec,
            layers=tuple(layers),
            tensors=tuple(tensors.values()),
            planes_until={name: -(-ends[tensor.data_ptr()] // joined) for name, tensor in tensors.items()},
            memory=_storages([t if isinstance(t, torch.Tensor) else tensors[name] for name, t in named.items()]),
        )


def _storages(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One contiguous tensor over each storage of `tensors`. It is one of the caller's tensors if possible, because a
    graph copies a storage that it knows by several tensors."""
    wholes: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        root = tensor if tensor._base is None else tensor._base
        for whole in (tensor, root):
            if whole.nbytes == storage.nbytes() and whole.is_contiguous():
                break
        else:
            whole = root.detach().as_strided((storage.nbytes() // root.element_size(),), (1,), 0)
        wholes.setdefault(storage.data_ptr(), whole)
    return tuple(wholes.values())


def fingerprint_of_groups(
    layouts: Sequence[KVLayout], chunk_tokens: int, mode: str = "page", codecs: Sequence[str | None] = ()
) -> bytes:
    """The fingerprint of several KV cache groups, whose layers keep their KV in separate pages. codecs: one per group,
    of its payloads, or empty."""
    if mode not in ("page", "token"):
        raise ValueError(f"mode: expected 'page' or 'token', got {mode!r}")
    fields: dict[str, Any] = {
        "mode": mode,
        "chunk_tokens": chunk_tokens,
        "page_tokens": layouts[0].page_tokens,
        "payload": PAYLOAD_VERSION,
        "groups": len(layouts),
    }
    for g, layout in enumerate(layouts):
        fields |= {
            f"{g}.spec": layout.spec,
            f"{g}.layers": "\n".join(layout.layers),
            f"{g}.planes": len(layout.planes),
            f"{g}.page_bytes": layout.page_bytes,
            f"{g}.runs": layout.runs,
            f"{g}.run_bytes": layout.run_bytes,
        }
        if g < len(codecs) and (codec := codecs[g]):
            fields |= {"payload": CODED_PAYLOAD_VERSION, f"{g}.codec": codec}
        if layout.opaque and layout.device.type == "cpu":
            fields["isa"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    encoded = encode_fields({name: str(value).encode() for name, value in fields.items()})
    return blake3(encoded, derive_key_context=FINGERPRINT_CONTEXT).digest()


class _PageView:
    """One layer's tensor as planes of pages of runs. Strides are in bytes; dimensions of size 1 are dropped."""

    def __init__(
        self, tensor: torch.Tensor, page_tokens: int, page_dim: int, token_dim: int | None, opaque: bool
    ) -> None:
        page_dim = _dimension("page_dim", page_dim, tensor)
        self.page_tokens = count("page_tokens", page_tokens)
        if opaque != (token_dim is None):
            raise ValueError(f"token_dim: expected a dimension, or opaque=True without one, got {token_dim}, {opaque=}")
        if token_dim is not None:
            token_dim = _dimension("token_dim", token_dim, tensor)
            if token_dim == page_dim:
                raise ValueError(f"token_dim: expected another dimension than page_dim = {page_dim}")
            if tensor.shape[token_dim] != self.page_tokens:
                raise ValueError(
                    f"page_tokens: expected {tensor.shape[token_dim]}, the size of dimension {token_dim}, "
                    f"got {self.page_tokens}"
                )
        size, itemsize = tensor.shape, tensor.element_size()
        if any(size[d] == 0 for d in range(tensor.ndim) if d != page_dim):
            raise ValueError(f"kv_caches: expected no empty dimension but that of pages, got shape {tuple(size)}")
        stride = [s * itemsize for s in tensor.stride()]
        self.num_pages = size[page_dim]
        self.page_stride = stride[page_dim]
        others = [d for d in range(tensor.ndim) if d != page_dim and size[d] > 1]

        extent = itemsize
        for d in sorted((d for d in range(tensor.ndim) if size[d] > 1), key=lambda d: stride[d]):
            if stride[d] < extent:
                raise ValueError(
                    f"kv_caches: expected elements that do not overlap, got shape {tuple(size)} "
                    f"with strides {tuple(tensor.stride())}"
                )
            extent += stride[d] * (size[d] - 1)

        paged = self.num_pages > 1
        outside = [d for d in others if paged and stride[d] > self.page_stride]
        inside = sorted((d for d in others if d not in outside), key=lambda d: -stride[d])
        # From the innermost dimension outward: first a contiguous run, then runs of one stride. The remaining
        # dimensions become planes.
        self.run_bytes, self.runs, self.run_stride = itemsize, 1, 0
        kept = len(inside)
        while kept and stride[inside[kept - 1]] == self.run_bytes:
            kept -= 1
            self.run_bytes *= size[inside[kept]]
        if kept:
            kept -= 1
            self.runs, self.run_stride = size[inside[kept]], stride[inside[kept]]
        while kept and stride[inside[kept - 1]] == self.runs * self.run_stride:
            kept -= 1
            self.runs *= size[inside[kept]]
        self._outer = [(size[d], stride[d]) for d in sorted([*outside, *inside[:kept]])]
        within = inside[kept:]
        if token_dim is None:
            self.token_bytes = 0
        elif self.page_tokens == 1:
            self.token_bytes = self.runs * self.run_bytes
        elif token_dim in within:
            self.token_bytes = itemsize * math.prod(size[d] for d in within[within.index(token_dim) + 1 :])
        else:
            raise ValueError(
                f"token_dim: the slots of dimension {token_dim} do not lie inside a page in memory "
                f"(strides {tuple(tensor.stride())})"
            )
        dims = " ".join(f"{d}:{size[d]}" for d in within)
        apart = " ".join(f"{d}:{size[d]}" for d in sorted([*outside, *inside[:kept]]))
        slots = "opaque" if token_dim is None else f"slots {token_dim}"
        self.spec = f"{str(tensor.dtype).removeprefix('torch.')}; planes {apart}; page {dims}; {slots}"

    def plane_offsets(self) -> Iterator[int]:
        for index in product(*(range(size) for size, _ in self._outer)):
            yield sum(i * stride for i, (_, stride) in zip(index, self._outer, strict=True))


def _dimension(name: str, dim: int, tensor: torch.Tensor) -> int:
    if not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"{name}: expected a dimension of a tensor of {tensor.ndim} dimensions, got {dim!r}")
    return dim % tensor.ndim


def _joined_planes(planes: list[int], view: _PageView) -> int:
    """How many adjacent planes form one plane of longer contiguous pages, the same number everywhere; 1 if none do."""
    if view.runs > 1:
        return 1
    for joined in range(len(planes), 1, -1):
        if len(planes) % joined or (view.num_pages > 1 and view.run_bytes * joined > view.page_stride):
            continue
        if all(planes[i] - planes[i - 1] == view.run_bytes for i in range(1, len(planes)) if i % joined):
            return joined
    return 1
