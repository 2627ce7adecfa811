"""The backend's options, and what determines the bytes of SGLang's pages besides the hash of their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from lmcache_mm.engine import SGLANG_FROM_THE_MODEL, check_options, commit_of, digest_of_files, digest_of_folder
from lmcache_mm.prompt import Namespace
from lmcache_mm.secret import secret
from lmcache_mm.sglang.api import HF_HUB_CACHE

NAME = "HiCacheBackend"
EXAMPLE = "shm:///sglang?capacity=32GiB"
# The longest that one call may take. If a call takes 10 s while SGLang flushes its cache, SGLang raises and ends.
CALL_S = 8.0
# SGLang's own options in --hicache-storage-backend-extra-config. A decode server that offloads KV leaves the last four
# in; other servers remove them first.
SGLANG_OPTIONS = (
    *("backend_name", "module_path", "class_name", "interface_v1", "allocator"),
    *(
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
    ),
)
# Options that change the weights or how they are quantized.
QUANTIZATION = ("quantization", "modelopt_quant", "rl_quant_profile")
# Options that say in what precision KV and states are kept.
DTYPES = (
    *("kv_cache_dtype", "speculative_draft_kv_cache_dtype", "mamba_ssm_dtype", "qsa_indexer_dtype"),
    *("enable_deepseek_v4_fp4_indexer", "enable_int8_mamba_checkpoint"),
)
# Options with which weights come from elsewhere than from the model.
ELSEWHERE = (
    *("custom_weight_loader", "weight_cache_mode", "checkpoint_engine_wait_weights_before_ready"),
    "modelopt_checkpoint_restore_path",
)
# Fields of a model's configuration that name a model of the hub, of which SGLang loads whatever is there now.
PARTS_OF_MODELS = ("mm_vision_tower",)
NOT_SET: tuple[Any, ...] = (None, False, "", "{}", [], "off")
# Options that name a file that KV depends on.
FILES = ("quantization_param_path", "decrypted_config_file")


@dataclass(frozen=True)
class Options:
    """--hicache-storage-backend-extra-config, checked: see HiCacheBackend."""

    store: str | list[str]
    weights: str | None = None
    timeout_s: float = 5.0
    identifiers: str | None = None

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Self:
        given = {name: value for name, value in extra.items() if name not in SGLANG_OPTIONS}
        check_options(NAME, given, [field.name for field in fields(cls)], EXAMPLE)
        if given.get("timeout_s", 0) > CALL_S:
            raise ValueError(f"{NAME}: timeout_s: expected at most {CALL_S:g}, got {given['timeout_s']!r}")
        if given.get("identifiers", "trust") != "trust":
            raise ValueError(f'{NAME}: identifiers: expected "trust" or nothing, got {given["identifiers"]!r}')
        return cls(**given)


def check_clients(multimodal: bool, adapters: bool, options: Options) -> None:
    """ValueError for an engine in which one client's pages can serve another's request, unless the options say that
    this cannot happen.

    The backend sees only hashes of pages, not their inputs, so it cannot tell what they stand for."""
    if options.identifiers == "trust" or not (multimodal or adapters):
        return
    what = 'images by the "mm_hashes" of requests' if multimodal else 'adapters by the "extra_key" of requests'
    raise ValueError(
        f"{NAME}: SGLang lets clients name {what}, so that a client can store KV that answers others' questions. "
        'If all clients are trusted, or a gateway removes "mm_hashes", "mm_content_hashes", "extra_key" and processed '
        "items from requests and rejects token ids outside the vocabulary (docs/sglang.md), say "
        '"identifiers": "trust" in --hicache-storage-backend-extra-config'
    )


def namespace_of(args: Any, model: Any, config: Any, weights: str | None) -> Namespace:
    """The namespace of an engine, without the layout of a pool. `args`: ServerArgs, resolved; `model`: ModelConfig;
    `config`: HiCacheStorageConfig; `weights`: the user's name for them."""
    overrides = args.json_model_override_args
    speculative = args.speculative_algorithm
    encoder = args.mm_process_config
    return Namespace(
        secret=secret(),
        model=str(args.model_path),
        weights=_weights(args, model, weights),
        quantization=_given(args, QUANTIZATION),
        hf_overrides=overrides if overrides not in (None, "", "{}") else None,
        dtype=str(args.dtype),
        kv_dtype=_given(args, DTYPES),
        tp=config.tp_size,
        pp=config.pp_size,
        cp=config.attn_cp_size,
        speculative=None if speculative is None else f"{speculative} {args.speculative_draft_model_path}",
        encoder=json.dumps(encoder, sort_keys=True, default=str) if encoder else None,
    )


def _given(args: Any, names: Sequence[str]) -> str | None:
    """The options that are set, as JSON."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in NOT_SET}
    return json.dumps(given, sort_keys=True, default=str) if given else None


def _weights(args: Any, model: Any, weights: str | None) -> str:
    """A name for the model's weights, files that change its KV, and adapters whose names in keys come from paths."""
    named = (
        f"{weights or _weights_of_model(args, model)} {_given(args, ('weight_version', 'model_loader_extra_config'))}"
    )
    if args.kt_weight_path:
        named += f" {_given(args, ('kt_weight_path', 'kt_method'))}"
    for option in FILES:
        if path := getattr(args, option):
            named += f" {option} {digest_of_files([Path(path)])}"
    folders = sorted({str(adapter.lora_path) for adapter in args.lora_paths or []}) if args.enable_lora else []
    for folder in folders:
        if weights and not Path(folder).is_dir():
            continue  # an adapter from the hub: keys contain its name
        files = [path for path in Path(folder).glob("*") if path.is_file()]
        if not any(path.suffix in (".safetensors", ".bin", ".pt") for path in files):
            raise ValueError(
                f"{NAME}: no local files identify the weights of the adapter {folder!r} of --lora-paths; give a folder "
                'with them, or, for an adapter of the hub, name all weights with "weights": "NAME" in '
                "--hicache-storage-backend-extra-config"
            )
        kept = [path for path in files if path.suffix in (".safetensors", ".bin", ".pt", ".json")]
        named += f" {folder} {digest_of_files(kept)}"
    return named


def _weights_of_model(args: Any, model: Any) -> str:
    """A digest of the files, or the hub's commit, that all weights come from. ValueError without them."""
    parts = {name: value for name in PARTS_OF_MODELS if (value := getattr(model.hf_config, name, None))}
    elsewhere = " ".join(filter(None, (_given(args, ELSEWHERE), json.dumps(parts) if parts else None)))
    or_else = ""
    if args.load_format in SGLANG_FROM_THE_MODEL and not elsewhere and not hasattr(model, "model_weights"):
        named = (
            digest_of_folder(model.model_path) if Path(model.model_path).exists() else _commit(args, model.model_path)
        )
        experts = digest_of_folder(args.kt_weight_path) if args.kt_weight_path else ""
        if named and experts is not None:
            return f"{named} {experts}".rstrip()
        if not Path(model.model_path).exists():
            or_else = "; for a model of the hub, --revision with a commit is enough"
    raise ValueError(
        f"{NAME}: neither files nor a commit identify the weights of {args.model_path!r}, which are loaded with "
        f"--load-format {args.load_format}{f' and {elsewhere}' if elsewhere else ''}; name them with "
        '"weights": "NAME" in --hicache-storage-backend-extra-config, and use a new name whenever they change'
        f"{or_else}"
    )


def _commit(args: Any, model: str) -> str | None:
    """The commit of the hub that all files of the model come from, if that is known.

    SGLang does not keep it. If the hub's cache has several, SGLang may have started with any of them, since others may
    have come while it ran."""
    if commit := commit_of(args.revision):
        return commit
    folders = {str(folder) for folder in (HF_HUB_CACHE, args.download_dir) if folder}
    name = "models--" + model.replace("/", "--")
    found = (commit_of(path.name) for folder in folders for path in Path(folder, name, "snapshots").glob("*"))
    commits = set(filter(None, found))
    return commits.pop() if len(commits) == 1 else None
