"""Identifies what determines a request's KV bytes besides token ids: model, weights, adapters, and items by content."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from lmcache_mm.engine import VLLM_FROM_THE_MODEL, commit_of, digest_of_files, digest_of_folder
from lmcache_mm.prompt import Namespace
from lmcache_mm.secret import secret

ITEM_DATA_CONTEXT = "lmcache_mm v1 vllm item data"
MOST_IDENTIFIERS = 1 << 17
# Fields that only give the size of an item's placeholders, as vLLM declares them (embedding_fields of its parsers).
METADATA_FIELDS = {
    *("image_grid_thw", "video_grid_thw", "image_sizes", "video_image_sizes", "timestamps", "second_per_grid_ts"),
    *("audio_num_tokens", "audio_feature_lengths", "feature_attention_mask", "patch_positions"),
}
# vLLM settings that change the output of an item's encoder.
ENCODER_SETTINGS = (
    *("mm_encoder_tp_mode", "mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path"),
    *("video_pruning_rate", "video_pruning_method", "mm_processor_kwargs", "mm_device_do_normalize"),
)
# vLLM settings that say how weights are quantized.
QUANTIZATION = ("quantization", "quantization_config")
# vLLM settings that change the model's configuration or code.
CONFIG_SETTINGS = ("hf_overrides", "hf_config_path", "code_revision")
# vLLM settings that name another model than `model`, from which weights or the configuration come.
OTHER_MODELS = ("model_weights", "hf_config_path")
# Fields of a model's configuration that name models of the hub, of which vLLM loads whatever is there now.
PARTS_OF_MODELS = ("audio_model_id", "text_model_id")

UNKNOWN = ""
# By instance_id of an engine: the name of its weights since its caches were last reset, None for those it started with.
# While it is UNKNOWN, nothing is cached. vLLM tells only the KV connector of resets; the encoder connector of the same
# engine reads this.
weights_now: dict[str, str | None] = {}
_items: dict[int, tuple[weakref.ref[Any], str, str]] = {}  # by id of an item's data: the data, modality, digest


class Unknown(Exception):
    """An input that determines the KV bytes has no digest, so nothing that depends on it is cached."""


class Missing(Unknown):
    """An item comes without the data that its encoder needs."""


def namespace_of(config: Any, kv_dtypes: Iterable[str], weights: str | None) -> Namespace:
    """The namespace of an engine, without its layout. `config`: VllmConfig. `weights`: the user's name for them."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    text_config = model.hf_text_config
    rope = {
        name: getattr(text_config, name, None)
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
    }
    speculative = config.speculative_config
    return Namespace(
        secret=secret(),
        model=str(model.model),
        weights=_weights(config, weights),
        quantization=_given(model, QUANTIZATION),
        rope=json.dumps(rope, sort_keys=True, default=str),
        hf_overrides=_given(model, CONFIG_SETTINGS),
        dtype=model.dtype,
        kv_dtype=f"{cache.cache_dtype} {' '.join(sorted(set(kv_dtypes)))}",
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        speculative=None if speculative is None else f"{speculative.method} {speculative.model}",
        encoder=_encoder_settings(model),
    )


def encoder_namespace_of(config: Any, weights: str | None) -> Namespace:
    """The namespace of an engine's encoder outputs. Arguments as in `namespace_of`."""
    model = config.model_config
    return Namespace(
        secret=secret(),
        model=str(model.model),
        weights=_weights(config, weights),
        quantization=_given(model, QUANTIZATION),
        hf_overrides=_given(model, CONFIG_SETTINGS),
        dtype=model.dtype,
        tp=config.parallel_config.tensor_parallel_size,
        encoder=_encoder_settings(model),
    )


def _encoder_settings(model: Any) -> str | None:
    settings = model.multimodal_config
    if settings is None:
        return None
    given = {name: getattr(settings, name, None) for name in ENCODER_SETTINGS}
    if scales := given["mm_encoder_fp8_scale_path"]:
        given["mm_encoder_fp8_scale_path"] = digest_of_files([Path(scales)])
    return json.dumps({name: value for name, value in given.items() if value is not None}, sort_keys=True, default=str)


def _given(config: Any, names: Iterable[str]) -> str | None:
    """The settings that are not empty, as JSON."""
    given = {name: getattr(config, name) for name in names if getattr(config, name)}
    return json.dumps(given, sort_keys=True, default=str) if given else None


def _weights(config: Any, weights: str | None) -> str:
    """A name for the weights, with the loader's options, which may change them or say where they are."""
    options = _given(config.load_config, ("model_loader_extra_config",))
    named = weights or _weights_of_model(config.model_config, config.load_config.load_format)
    return f"{named} {options}" if options else named


def _weights_of_model(model: Any, load_format: str) -> str:
    if load_format == "dummy":
        return f"dummy {model.seed}"
    others = {name: getattr(model, name) for name in OTHER_MODELS}
    others |= {name: getattr(model.hf_config, name, None) for name in PARTS_OF_MODELS}
    elsewhere = [f"{name} {other}" for name, other in others.items() if other not in ("", None, model.model)]
    if load_format in VLLM_FROM_THE_MODEL and not elsewhere:
        if Path(model.model).exists():
            named = digest_of_folder(model.model)
        else:  # older versions of transformers know the commit even if vLLM has not resolved the revision
            named = commit_of(model.revision) or getattr(model.hf_config, "_commit_hash", None)
        if named:
            return named
    raise ValueError(
        f"lmcache_mm: neither files nor a commit identify the weights of {model.model!r}, which are loaded with "
        f"{', '.join([f'load_format {load_format}', *elsewhere])}; name them with "
        '"weights": "NAME" in the extra config of the connector, and use a new name whenever they change'
    )


def digest_of_lora(request: Any) -> str | None:
    """A digest of the adapter's files, because names and ids of adapters may be reused; None without an adapter."""
    if request is None:
        return None
    folder = Path(request.lora_path)
    files = [p for p in folder.glob("*") if p.is_file()] if request.lora_path and folder.is_dir() else []
    if not any(path.suffix in (".safetensors", ".bin", ".pt") for path in files):
        raise Unknown(f"the adapter {request.lora_name!r} is not in a local folder")
    return digest_of_files(path for path in files if path.suffix in (".safetensors", ".bin", ".pt", ".json"))


def digest_of_item(feature: Any) -> str:
    """`digest_of_data` of one of vLLM's multimodal features. Computed once per data object: vLLM passes the same object
    to both connectors and, from its cache, with every request for the same image."""
    data = feature.data
    known = _items.get(id(data))
    if known is not None and known[0]() is data and known[1] == feature.modality:
        return known[2]
    digest = digest_of_data(feature.modality, data)
    number = id(data)
    _items[number] = (weakref.ref(data, lambda _: _items.pop(number, None)), feature.modality, digest)
    return digest


def lacks_what_is_encoded(data: Any) -> bool:
    """Whether an item only says how many embeddings it has; vLLM accepts such items if it has a connector. Only the
    names of the item's fields are checked."""
    return bool(data) and all(
        name in METADATA_FIELDS or getattr(getattr(data[name], "field", None), "keep_on_cpu", False) for name in data
    )


def digest_of_data(modality: str, data: Any) -> str:
    """A digest of an item's processed data: modality, then the name, dtypes, shapes and bytes of each field."""
    hasher = blake3(derive_key_context=ITEM_DATA_CONTEXT)

    def add(tag: str, content: bytes | memoryview) -> None:
        hasher.update(f"{tag} {len(content)} ".encode())
        hasher.update(content)

    def add_value(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                raise Unknown("an item's data is missing (a meta tensor)")
            add("tensor", f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            add("bytes", flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, np.ndarray):
            add_value(torch.from_numpy(np.ascontiguousarray(value)))
        elif isinstance(value, (list, tuple)):
            add("list", str(len(value)).encode())
            for part in value:
                add_value(part)
        elif isinstance(value, (bool, int, float, str)):
            add(type(value).__name__, repr(value).encode())
        else:
            raise Unknown(f"an item's data contains a {type(value).__name__}, which has no digest")

    add("modality", modality.encode())
    if not data:
        raise Unknown("an item has no data")
    if lacks_what_is_encoded(data):
        raise Missing("an item has no data to encode")
    for name in sorted(data):
        if name == "address":  # vLLM's shared-memory cache holds the bytes, not the field
            raise Unknown("an item's data is in another process (the processor cache in shared memory)")
        add("field", name.encode())
        add_value(data[name].data)
    return hasher.hexdigest()


class Identifiers:
    """The content that each identifier stood for. vLLM's own caches use identifiers, which clients may choose. If one
    has stood for two contents, it is distrusted: KV that vLLM computed for it may belong to either."""

    def __init__(self) -> None:
        self._digests: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def agree(self, identifier: str, digest: str) -> bool:
        with self._lock:
            known = self._digests.setdefault(identifier, digest)
            self._digests.move_to_end(identifier)
            if known != digest:
                self._digests[identifier] = None
            if len(self._digests) > MOST_IDENTIFIERS:
                self._digests.popitem(last=False)
            return known == digest

    def distrust(self, identifiers: Iterable[str]) -> None:
        """Marks identifiers whose content is not known."""
        with self._lock:
            for identifier in identifiers:
                self._digests[identifier] = None

    def distrusted(self, identifier: str) -> bool:
        with self._lock:
            return self._digests.get(identifier, "") is None


class Adapters:
    """Digests of an engine's LoRA adapters. vLLM identifies adapters by number, and either keeps what it has read under
    a number or reads it again in place. So a number that has stood for two contents may mean either of them."""

    def __init__(self) -> None:
        self._digests: dict[int, str | None] = {}
        self._lock = threading.Lock()

    def digest(self, request: Any) -> str | None:
        """The digest of the request's adapter; None without one. Unknown if its number stood for another adapter."""
        digest = digest_of_lora(request)
        if digest is None:
            return None
        with self._lock:
            if self._digests.setdefault(request.lora_int_id, digest) != digest:
                self._digests[request.lora_int_id] = None
                raise Unknown(f"the adapter {request.lora_name!r} is not what it was when it was first used")
        return digest

    def still_agreed(self, request: Any) -> bool:
        """Whether the adapter, if there is one, still has the digest that `digest` returned."""
        try:
            return self.digest(request) is not None or request is None
        except (Unknown, OSError):
            return False


def digest_of_embeds(embeds: Any, is_token: Any) -> str | None:
    """A digest of prompt embeddings and their positions; None without any."""
    if embeds is None:
        return None
    hasher = blake3(derive_key_context=ITEM_DATA_CONTEXT)
    for value in (embeds, is_token):
        tensor = torch.as_tensor([] if value is None else value)
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
