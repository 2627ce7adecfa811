"""Requests and their names: items, prompts, namespaces and the cuts at which a prefix has a key."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3

NAMESPACE_CONTEXT = "lmcache_mm v1 namespace"
OWNER_CONTEXT = "lmcache_mm v1 owner"
REQUEST_FIELDS = ("salt", "lora", "prompt_embeds")
NAMESPACE_FIELDS = (
    *("secret", "model", "weights", "quantization", "rope", "hf_overrides", "dtype", "kv_dtype", "layout"),
    *("tp", "pp", "cp", "speculative", "encoder"),
)
HASHED_NAMES = {"quantization": "quantisation"}  # as the first version spelled it: another spelling is another key


def utf8(name: str, value: Any) -> bytes:
    """`value` in UTF-8; TypeError or ValueError, naming `name`, if it is not a str or cannot be encoded."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, got {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected a string that UTF-8 can hold, got {value!r}") from error


def count(name: str, value: Any) -> int:
    """`value` as an integer in [0, 2**63); TypeError or ValueError, naming `name`, for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{name}: expected an integer in [0, 2**63), got {number}")
    return number


def encode_fields(fields: dict[str, bytes]) -> bytes:
    """The fields sorted by name, each as str(name) || str(value); str is a u32 length, little-endian, and the bytes."""
    encoded = sorted((name.encode(), value) for name, value in fields.items())
    return b"".join(len(part).to_bytes(4, "little") + part for pair in encoded for part in pair)


@dataclass(frozen=True, slots=True)
class Item:
    """One image, video or audio of a prompt.

    `identifier` names the content: any string, normally a hash of the decoded data. Equal identifiers are assumed to
    mean equal content, so clients must not choose them.
    The item covers positions [offset, offset + length) of the prompt, clipped to the prompt's end.

    Raises TypeError or ValueError for strings that UTF-8 cannot hold and for offsets or lengths outside `[0, 2**63)`.
    """

    identifier: str
    offset: int
    length: int
    modality: str = "image"

    def __post_init__(self) -> None:
        utf8("identifier", self.identifier)
        utf8("modality", self.modality)
        object.__setattr__(self, "offset", count("offset", self.offset))
        object.__setattr__(self, "length", count("length", self.length))
        if self.offset + self.length >= 1 << 63:
            raise ValueError(f"offset + length: expected less than 2**63, got {self.offset} + {self.length}")


def checked_items(items: Any) -> tuple[Item, ...]:
    if not isinstance(items, Iterable):
        raise TypeError(f"items: expected a sequence of lmcache_mm.Item, got {type(items).__name__}")
    out = tuple(items)
    for i, item in enumerate(out):
        if not isinstance(item, Item):
            raise TypeError(f"items[{i}]: expected lmcache_mm.Item, got {type(item).__name__}")
    return out


class Namespace:
    """Everything besides the prompt that decides the bytes of KV or encoder outputs.

    Namespace(model=..., weights=..., dtype=...). All fields are optional; give each one that applies, since two caches
    with equal namespaces read each other's records:

    - model, weights: the model's name, and its commit or a digest of its weights
    - quantization, rope, hf_overrides: how the model was changed when it was loaded
    - dtype, kv_dtype: of activations and of the KV cache
    - tp, pp, cp: the number of tensor-, pipeline- and context-parallel ranks
    - speculative: the method of speculative decoding and its draft model
    - encoder: settings of the vision or audio encoder
    - secret: bytes that outsiders cannot guess; without them, anyone can compute keys
    - layout: `KVCache` and `StateCache` add it themselves

    Values are str, bytes, int or, for dtypes, torch.dtype; None is the same as leaving a field out. TypeError for other
    names or types.
    """

    def __init__(self, **fields: str | bytes | int | torch.dtype | None) -> None:
        for name in fields:
            if name not in NAMESPACE_FIELDS:
                hint = " (it belongs to the request: Prompt)" if name in REQUEST_FIELDS else ""
                raise TypeError(f"Namespace: expected fields among {', '.join(NAMESPACE_FIELDS)}, got {name!r}{hint}")
        self._fields = {name: _field_value(name, value) for name, value in fields.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __repr__(self) -> str:
        shown = (f"{name}={'...' if name == 'secret' else repr(value)}" for name, value in self._fields.items())
        return f"Namespace({', '.join(shown)})"

    def with_layout(self, fingerprint: bytes) -> Namespace:
        """This namespace with its `layout` field set to a layout fingerprint; ValueError if it has one."""
        if "layout" in self._fields:
            raise ValueError("layout: the namespace has this field already")
        out = Namespace()
        out._fields = {**self._fields, "layout": bytes(fingerprint)}
        return out

    def _with_weights(self, weights: str) -> Namespace:
        """This namespace with other `weights`."""
        out = Namespace()
        out._fields = {**self._fields, "weights": utf8("weights", weights)}
        return out

    def root(
        self,
        salt: str | bytes | None = None,
        lora: str | bytes | None = None,
        prompt_embeds: str | bytes | None = None,
    ) -> bytes:
        """The 32-byte root of all prefix keys of one tenant (`salt`), LoRA and digest of prompt embeddings. Raises
        TypeError or ValueError for values that `Prompt` does not accept."""
        fields = {HASHED_NAMES.get(name, name): value for name, value in self._fields.items()}
        for name, value in (("salt", salt), ("lora", lora), ("prompt_embeds", prompt_embeds)):
            if value is not None:
                fields[name] = _request_field(name, value)
        return blake3(encode_fields(fields), derive_key_context=NAMESPACE_CONTEXT).digest()


def owner_of(salt: str | bytes | None) -> bytes:
    """The 16 bytes that name a tenant in stores, for quotas and `forget`; empty for None. Raises TypeError or
    ValueError for values that `Prompt` does not accept."""
    if salt is None:
        return b""
    return blake3(_request_field("salt", salt), derive_key_context=OWNER_CONTEXT).digest(length=16)


def owner_to_forget(salt: str | bytes) -> bytes:
    """As `owner_of`; ValueError for None too, since records without a salt have no owner."""
    if salt is None or (isinstance(salt, (str, bytes)) and not salt):
        raise ValueError(f"salt: expected a nonempty str or bytes, got {salt!r}")
    return owner_of(salt)


def _request_field(name: str, value: Any) -> bytes:
    """A salt, LoRA or digest of embeddings as bytes: a nonempty str or bytes, for keys and owners alike."""
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected str or bytes, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected a nonempty str or bytes; pass None for no {name}")
    return _field_value(name, value)


def _field_value(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return utf8(name, value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.").encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value).encode()
    raise TypeError(f"{name}: expected str, bytes or int, got {type(value).__name__}")


def checked_prompt(prompt: Any) -> Prompt:
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt: expected lmcache_mm.Prompt, got {type(prompt).__name__}")
    return prompt


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request: token ids, the items that cover some of them, the tenant's salt, LoRA and prompt embeddings.

    `token_ids`: integers, 1-D, in `[0, 2**32)`, not overwritten; copied. `items`: each needs an identifier, since two
    without one would look equal; the positions that an item covers are clipped to the prompt's end. `salt`, `lora` (a
    fingerprint of the adapter's file) and `prompt_embeds` (a digest) are fields of the namespace: a nonempty str or
    bytes, or None. Requests with different salts share nothing.
    `turns`: token counts at which earlier prompts ended that this one continues, such as the turns of a chat; their
    records are looked up there. TypeError or ValueError for anything else. The repr shows neither tokens nor names.
    """

    token_ids: Any  # afterwards a read-only int64 array
    items: Sequence[Item] = ()
    salt: str | bytes | None = None
    lora: str | bytes | None = None
    prompt_embeds: str | bytes | None = None
    turns: Sequence[int] = ()
    _end_of_items: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.token_ids
        if isinstance(ids, torch.Tensor):
            ids = ids.detach().cpu().numpy()
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            what = ids.dtype if ids.ndim else type(self.token_ids).__name__
            raise TypeError(f"token_ids: expected integers, got {what}")
        if ids.ndim != 1:
            raise ValueError(f"token_ids: expected 1 dimension, got shape {tuple(ids.shape)}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
            raise ValueError(f"token_ids: expected ids in [0, 2**32), got {int(ids.min())} to {int(ids.max())}")
        ids = np.array(ids, dtype=np.int64)
        ids.flags.writeable = False
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "items", checked_items(self.items))
        for i, item in enumerate(self.items):
            if not item.identifier:
                raise ValueError(f"items[{i}].identifier: expected a name for its content, got an empty string")
        for name in REQUEST_FIELDS:
            if getattr(self, name) is not None:
                _request_field(name, getattr(self, name))
        if not isinstance(self.turns, Iterable):
            raise TypeError(f"turns: expected a sequence of token counts, got {type(self.turns).__name__}")
        turns = tuple(count(f"turns[{i}]", turn) for i, turn in enumerate(self.turns))
        if any(turn > len(ids) for turn in turns):
            raise ValueError(f"turns: expected at most the prompt's {len(ids)} tokens, got {max(turns)}")
        object.__setattr__(self, "turns", turns)
        ends = (item.offset + item.length for item in self.items)
        object.__setattr__(self, "_end_of_items", min(len(ids), max(ends, default=0)))

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        given = [f", {name}=..." for name in REQUEST_FIELDS if getattr(self, name) is not None]
        return f"Prompt({len(self)} tokens, {len(self.items)} items{''.join(given)})"

    def cuts(self, chunk_tokens: int, whole: int = 1, turns: bool = False) -> list[int]:
        """The token counts, ascending, at which this prompt has keys: every multiple of `chunk_tokens`, and, rounded
        down to a multiple of `whole` tokens, the last item's end, the prompt's end and, with `turns`, the ends of its
        turns."""
        n = len(self)
        ends = {end // whole * whole for end in (n, self._end_of_items, *(self.turns if turns else ()))} - {0}
        return sorted({*range(chunk_tokens, n + 1, chunk_tokens), *ends})
