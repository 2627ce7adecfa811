"""EncoderCache: outputs of vision and audio encoders, keyed by the content that was encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from blake3 import blake3

from lmcache_mm import codec as codecs
from lmcache_mm.base_cache import BaseCache
from lmcache_mm.layout import check_storage
from lmcache_mm.prompt import Namespace, owner_of, utf8
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import Store

OUTPUT_CONTEXT = "lmcache_mm v1 encoder output"
PAYLOAD_CONTEXT = "lmcache_mm v1 encoder payload"
CODED_PAYLOAD_CONTEXT = "lmcache_mm v2 encoder payload"
DIGEST_CONTEXT = "lmcache_mm v1 item digest"
DESCRIPTION_BYTES = 4096  # always, since stores look records up by key and length
ALIGNMENT = 64  # each tensor begins on a cache line, so that its bytes can be viewed in its dtype
MOST_ELEMENTS = 1 << 48  # per tensor
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}

Output = torch.Tensor | Sequence[torch.Tensor]


class EncoderCache(BaseCache):
    """Keeps encoder outputs in a store. An output is one tensor or a list of tensors, of any dtypes and shapes.

    store: a URL or a list of URLs (see `open_store`), or an open store, which the caller must close; the same store may
    hold KV; the attribute `backend` is the open store. namespace: everything besides the item that decides the output:
    model, weights, dtype, and in `encoder` any other setting of the engine. Several threads may call methods;
    RuntimeError after `close`.

    `identifier` and `modality` name an item, as in `Item`: its place in a prompt and the text around it do not
    matter. Compute the identifier from the data that the encoder gets; never let a client choose it.
    salt: the tenant's; different salts share nothing. lora: a fingerprint of an adapter that changes the encoder.
    codec: "split" stores bfloat16 outputs in 0.78 of their length, see `KVCache`. The CPU does it, also for outputs on
    a GPU.
    """

    def __init__(self, store: str | Sequence[str] | Store, namespace: Namespace, codec: str | None = None) -> None:
        if not isinstance(namespace, Namespace):
            raise TypeError(f"namespace: expected lmcache_mm.Namespace, got {type(namespace).__name__}")
        codecs.check_name(codec)
        self._namespace, self._codec = namespace, codec
        super().__init__(store, "items", "stored_items")

    def contains(
        self,
        identifier: str,
        modality: str = "image",
        *,
        salt: str | bytes | None = None,
        lora: str | bytes | None = None,
    ) -> bool:
        """Whether the output could be loaded now. Nothing is reserved: a later load may not find it."""
        key = self._key(identifier, modality, salt, lora)
        description = read_description(self.backend, key, owner_of(salt))
        return description is not None and has_payload(self.backend, key, description, self._codec)

    def load(
        self,
        identifier: str,
        modality: str = "image",
        *,
        device: torch.device | str = "cpu",
        salt: str | bytes | None = None,
        lora: str | bytes | None = None,
    ) -> torch.Tensor | list[torch.Tensor] | None:
        """The output as it was saved, a tensor or a list of tensors, on `device`; None if it is missing or damaged.

        On CUDA the copy from pinned memory is enqueued on torch's current stream of the device; load does not wait
        for it, and work on that stream may use the output at once. torch reuses the pinned memory after the copy.
        """
        device = torch.device(device)
        key = self._key(identifier, modality, salt, lora)
        packed = read(self.backend, key, owner_of(salt), device.type == "cuda", self._codec)
        self._count(queried_items=1, hit_items=packed is not None)
        return None if packed is None else packed.unpack(device)

    def load_into(
        self,
        identifier: str,
        output: Output,
        modality: str = "image",
        *,
        salt: str | bytes | None = None,
        lora: str | bytes | None = None,
    ) -> bool:
        """Fills tensors of the saved dtypes and shapes, with any strides. If the output is missing or damaged, returns
        False and leaves them unchanged. On CUDA it enqueues, as `load` does. Raises what `save` raises."""
        into = as_tensors(output)
        key, description = self._key(identifier, modality, salt, lora), describe(output)
        pinned = any(tensor.is_cuda for tensor in into)
        packed = read_payload(self.backend, key, description, owner_of(salt), pinned, self._codec)
        self._count(queried_items=1, hit_items=packed is not None)
        if packed is None:
            return False
        with torch.no_grad():
            for tensor, saved in zip(into, packed.views(), strict=True):
                tensor.copy_(saved, non_blocking=tensor.is_cuda)
        return True

    def save(
        self,
        identifier: str,
        output: Output,
        modality: str = "image",
        *,
        salt: str | bytes | None = None,
        lora: str | bytes | None = None,
    ) -> bool:
        """Stores a copy of the output. False: the store has it or has no room for it, or memory for a copy is short.

        On CUDA the copy is enqueued on torch's current streams of the tensors' devices, and save waits for it.
        Raises TypeError or ValueError for anything but dense tensors on the CPU or CUDA, and for more than about 100.
        """
        key, description = self._key(identifier, modality, salt, lora), describe(output)
        as_of = self.backend.moment()
        there = read_description(self.backend, key, owner_of(salt))
        if there == description and has_payload(self.backend, key, description, self._codec):
            return False
        if there is not None and there != description:
            self.backend.delete([key])  # a put would not replace it, and it names another payload
        packed = unless_lacking(lambda: pack(output), None)
        if packed is None:
            return False
        for device in {tensor.device for tensor in as_tensors(output) if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        write(self.backend, key, packed, owner_of(salt), as_of, self._codec)
        wanted = payload_key(key, description, self._codec)
        stored = not self.backend.local or self.backend.contains([wanted], peek=True)[0]
        self._count(stored_items=stored)
        return stored

    def stats(self) -> dict[str, float]:
        """Counts since this cache was made: queried_items and hit_items (by `load` and `load_into`), hit_rate (their
        ratio, 0 to 1) and stored_items. The store's own counters are `backend.stats()`."""
        return super().stats()

    def _key(self, identifier: str, modality: str, salt: str | bytes | None, lora: str | bytes | None) -> bytes:
        self._check()
        if identifier == "":
            raise ValueError("identifier: expected a name for the item's content, got an empty string")
        return output_key(self._namespace.root(salt, lora), identifier, modality)


# --- Keys


def output_key(root: bytes, identifier: str, modality: str) -> bytes:
    """The 32-byte key of an encoder output, under which its description is stored. root: see `Namespace.root`."""
    parts = utf8("modality", modality), utf8("identifier", identifier)
    material = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    digest = blake3(material, derive_key_context=DIGEST_CONTEXT).digest()
    return blake3(root + digest, derive_key_context=OUTPUT_CONTEXT).digest()


def payload_key(key: bytes, description: bytes, codec: str | None = None) -> bytes:
    """The key under which an output's bytes are stored; it depends on the description and the codec."""
    context = CODED_PAYLOAD_CONTEXT if _is_coded(description, codec) else PAYLOAD_CONTEXT
    return blake3(key + description, derive_key_context=context).digest()


def _is_coded(description: bytes, codec: str | None) -> bool:
    """Whether `codec` applies: only to outputs whose tensors are all bf16."""
    return codec is not None and {place.dtype for place in _places(description)[1]} == {torch.bfloat16}


# --- Descriptions


def as_tensors(output: Output) -> list[torch.Tensor]:
    """An output's tensors; TypeError or ValueError for those that cannot be stored."""
    if not isinstance(output, (torch.Tensor, Sequence)):
        raise TypeError(f"output: expected a torch.Tensor or a list of them, got {type(output).__name__}")
    tensors = [output] if isinstance(output, torch.Tensor) else list(output)
    for i, tensor in enumerate(tensors):
        name = "output" if isinstance(output, torch.Tensor) else f"output[{i}]"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout} of {tensor.dtype}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {tensor.device}")
        check_storage(name, tensor)
    return tensors


def describe(output: Output) -> bytes:
    """An output's dtypes and shapes in DESCRIPTION_BYTES bytes. ValueError if they do not fit."""
    tensors = as_tensors(output)
    parts = [bytes([not isinstance(output, torch.Tensor)]), len(tensors).to_bytes(4, "little")]
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.").encode()
        parts += [len(dtype).to_bytes(4, "little"), dtype, tensor.ndim.to_bytes(4, "little")]
        parts += [size.to_bytes(8, "little") for size in tensor.shape]
    description = b"".join(parts)
    if len(description) > DESCRIPTION_BYTES:
        raise ValueError(
            f"output: expected tensors that {DESCRIPTION_BYTES} bytes can describe, got {len(tensors)}, which need "
            f"{len(description)}"
        )
    return description.ljust(DESCRIPTION_BYTES, b"\0")


@dataclass(frozen=True)
class _Place:
    """Where in a payload a tensor lies."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _places(description: bytes) -> tuple[bool, list[_Place]]:
    """Whether the output is a list, and its tensors' places. ValueError for an unknown description."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        if at > len(description):
            raise ValueError("description: it ends early")
        return description[at - size : at]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    is_list, count = number(1), number(4)
    places, begin = [], 0
    for _ in range(count):
        name = take(number(4)).decode()
        dtype = DTYPES.get(name)
        if dtype is None:
            raise ValueError(f"description: torch has no dtype {name!r}")
        shape = tuple(number(8) for _ in range(number(4)))
        if prod(max(size, 1) for size in shape) >= MOST_ELEMENTS:
            raise ValueError(f"description: no tensor has the shape {shape}")
        end = begin + prod(shape) * dtype.itemsize
        places.append(_Place(begin, end, dtype, shape))
        begin = -(-end // ALIGNMENT) * ALIGNMENT
    if is_list > 1 or (count != 1 and not is_list) or any(description[at:]):
        raise ValueError("description: unknown version")
    return bool(is_list), places


def payload_bytes(description: bytes) -> int:
    _, places = _places(description)
    return places[-1].end if places else 0


# --- Outputs in host memory


@dataclass(eq=False)
class Packed:
    """An encoder output in host memory, in its stored form. payload: uint8 [payload_bytes(description)]."""

    description: bytes
    payload: torch.Tensor

    def views(self) -> list[torch.Tensor]:
        """The tensors, as views of the payload."""
        return [
            self.payload[place.begin : place.end].view(place.dtype).view(place.shape)
            for place in _places(self.description)[1]
        ]

    def unpack(self, device: torch.device) -> torch.Tensor | list[torch.Tensor]:
        """The output on `device`: on the CPU as views of the payload; on CUDA enqueued, as in `EncoderCache.load`."""
        there = self.payload
        if device.type == "cuda":
            there = (there if there.is_pinned() else there.pin_memory()).to(device, non_blocking=True)
        tensors = Packed(self.description, there).views()
        return tensors if _places(self.description)[0] else tensors[0]


def pack(output: Output) -> Packed:
    """A copy in host memory. From CUDA it is enqueued on torch's current streams of the tensors' devices."""
    tensors = as_tensors(output)
    description = describe(output)
    pinned = any(tensor.is_cuda for tensor in tensors)
    packed = Packed(description, torch.zeros(payload_bytes(description), dtype=torch.uint8, pin_memory=pinned))
    for tensor, into in zip(tensors, packed.views(), strict=True):
        into.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return packed


# --- Records


def read_description(store: Store, key: bytes, owner: bytes) -> bytes | None:
    """None if there is none, or only one of another version."""
    description = bytearray(DESCRIPTION_BYTES)
    if not store.get_into([key], [description], owner)[0]:
        return None
    try:
        _places(bytes(description))
    except ValueError:
        return None
    return bytes(description)


def has_payload(store: Store, key: bytes, description: bytes, codec: str | None = None) -> bool:
    return store.contains([payload_key(key, description, codec)])[0]


def read_payload(
    store: Store, key: bytes, description: bytes, owner: bytes, pinned: bool = False, codec: str | None = None
) -> Packed | None:
    size = payload_bytes(description)
    memory = unless_lacking(lambda: torch.empty(size, dtype=torch.uint8, pin_memory=pinned), None)
    if memory is None:
        return None
    packed = Packed(description, memory)
    wanted = payload_key(key, description, codec)
    coded_bytes = codecs.coded_bytes(1, size) if _is_coded(description, codec) else None
    if coded_bytes is not None:
        coded = unless_lacking(lambda: torch.empty(coded_bytes, dtype=torch.uint8), None)
        if coded is None:
            return None
        if store.get_into([wanted], [coded.numpy().data], owner)[0]:
            if codecs.decode(packed.payload, coded):
                return packed
            store.delete([wanted])
            return None
    return packed if store.get_into([wanted], [packed.payload.numpy().data], owner)[0] else None


def read(store: Store, key: bytes, owner: bytes, pinned: bool = False, codec: str | None = None) -> Packed | None:
    """The output, verified, in newly allocated memory; None if one of its records is missing or damaged."""
    description = read_description(store, key, owner)
    if description is None or not has_payload(store, key, description, codec):  # checked before allocating
        return None
    return read_payload(store, key, description, owner, pinned, codec)


def write(store: Store, key: bytes, packed: Packed, owner: bytes, as_of: int, codec: str | None = None) -> None:
    """Writes the payload first, so that a reader who finds the description finds the payload. as_of: the store's moment
    when the caller handed over the output, see `Store.put`."""
    keys = [payload_key(key, packed.description, codec), key]
    coded = codecs.encode(packed.payload) if _is_coded(packed.description, codec) else None
    payload = packed.payload if coded is None else coded
    store.put(keys[:1], [payload.numpy().data], owner, None, as_of)
    store.put(keys[1:], [packed.description], owner, None, as_of)
