"""The connectors' options, requests' wishes, and the engine's KV cache groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from lmcache_mm.codec import check_name as check_codec
from lmcache_mm.engine import check_number, check_options
from lmcache_mm.vllm.api import (
    MINOR_VERSION,
    KVCacheConfig,
    KVCacheSpec,
    KVCacheSpecKind,
    MambaSpec,
    Request,
    VllmConfig,
    get_conv_state_layout,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
)

NAME = "LMCacheMMConnector"
ENCODER_NAME = "LMCacheMMEncoderConnector"
GROUPS_OF_TABLE = 256
ASK_AGAIN_S = 0.01  # how often a store is asked for records that another engine promised
CHOICES = {"load": ("async", "sync", "layers"), "identifiers": ("verify", "trust")}
KINDS = {
    KVCacheSpecKind.FULL_ATTENTION,
    KVCacheSpecKind.MLA_ATTENTION,
    KVCacheSpecKind.SLIDING_WINDOW,
    KVCacheSpecKind.SLIDING_WINDOW_MLA,
}


@dataclass(frozen=True)
class EncoderOptions:
    """ec_connector_extra_config, checked: see LMCacheMMEncoderConnector."""

    connector: ClassVar[str] = ENCODER_NAME

    store: str | list[str]
    weights: str | None = None
    timeout_s: float = 5.0
    codec: str | None = None

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Self:
        name_of_connector = cls.connector
        known = [field.name for field in fields(cls)]
        check_options(name_of_connector, extra, known, "shm:///vllm?capacity=32GiB")
        for name, allowed in CHOICES.items():
            if extra.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{name_of_connector}: {name}: expected {' or '.join(allowed)}, got {extra[name]!r}")
        for name in ("opaque_tails", "store_generated"):
            if not isinstance(extra.get(name, False), bool):
                raise ValueError(f"{name_of_connector}: {name}: expected true or false, got {extra[name]!r}")
        check_number(name_of_connector, "chunk_tokens", extra.get("chunk_tokens", 1), whole=True)
        if extra.get("state_tokens") is not None:
            check_number(name_of_connector, "state_tokens", extra["state_tokens"], whole=True)
        try:
            check_codec(extra.get("codec"))
        except ValueError as error:
            raise ValueError(f"{name_of_connector}: {error}") from None
        options = cls(**extra)
        urls = options.store if isinstance(options.store, list) else [options.store]
        if any(tier.startswith("mem:") for url in urls for tier in url.removeprefix("tiered:").split(",")):
            raise ValueError(
                f"{name_of_connector}: store: only one process can use mem:, and vLLM has several; use shm:, such as "
                '"shm:///vllm?capacity=32GiB"'
            )
        return options


@dataclass(frozen=True)
class Options(EncoderOptions):
    """kv_connector_extra_config, checked: see LMCacheMMConnector."""

    connector: ClassVar[str] = NAME

    chunk_tokens: int = 256
    load: str = "async"
    identifiers: str = "verify"
    opaque_tails: bool = False
    store_generated: bool = False
    state_tokens: int | None = None


@dataclass(frozen=True)
class Wishes:
    """What a request asks of a connector."""

    load: bool = True
    store: bool = True
    wait: bool = False  # for records that another engine promised


def wishes_of(own: object, *others: object) -> Wishes:
    """What a request's transfer params say under "lmcache_mm". `own`: the params of the calling connector. `others`
    apply where `own` says nothing, but cannot make it wait. Clients can write anything: only true and false count."""
    said = [params.get("lmcache_mm") if isinstance(params, dict) else None for params in (own, *others)]
    flags: dict[str, bool] = {}
    for i, wishes in enumerate(said):
        for name in ("load", "store", "wait") if i == 0 else ("load", "store"):
            value = wishes.get(name) if isinstance(wishes, dict) else None
            if isinstance(value, bool):
                flags.setdefault(name, value)
    return Wishes(**flags)


def drop_malformed_params(request: Request) -> None:
    """Replaces transfer params that are not dicts with None: vLLM expects dicts, but does not check them."""
    for name in ("kv_transfer_params", "ec_transfer_params"):
        if not isinstance(getattr(request, name), dict):
            setattr(request, name, None)


@dataclass
class Group:
    """The layers of one of vLLM's KV cache groups that have equal pages. Only workers see all of them: vLLM tells its
    scheduler about one layer per group."""

    table: int  # index of their block table in a request
    number: int  # in record keys: 256 * table + index among the groups of that table
    layers: list[str]
    page_tokens: int
    window: int | None  # of sliding-window attention
    kv_dtype: str  # for states: what a state consists of
    kind: str  # vLLM's name for it
    states: bool = False  # a page is the state after the tokens up to its end, not the KV of its own tokens


def groups_of(config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[Group]:
    """The engine's groups; ValueError for an engine whose KV cannot be cached."""
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"{NAME}: {name} > 1 is not supported, as ranks would hold parts of pages; set it to 1")
    if config.model_config is not None and not config.model_config.is_prefix_caching_supported:
        raise ValueError(
            f"{NAME}: vLLM cannot reuse a prefix's KV with this model (bidirectional attention, or MEAN, CLS or STEP "
            "pooling): start it without --kv-transfer-config"
        )
    groups = []
    for table, group in enumerate(kv_cache_config.kv_cache_groups):
        if not group.enable_kv_transfer:
            continue  # a copy that vLLM makes from another group
        spec = group.kv_cache_spec
        kind = get_kv_cache_spec_kind(spec)
        states = kind == KVCacheSpecKind.MAMBA
        if (kind not in KINDS and not states) or not spec.prefix_cacheable or group.host_resident:
            what = f"{kind.value!r}{' in host memory' if group.host_resident else ''}"
            raise ValueError(f"{NAME}: layers of kind {what} are not supported ({', '.join(group.layer_names[:1])}, …)")
        alike: dict[KVCacheSpec, list[str]] = {}
        for layer in group.layer_names:
            alike.setdefault(getattr(spec, "kv_cache_specs", {}).get(layer, spec), []).append(layer)
        for i, (one, layers) in enumerate(alike.items()):
            if isinstance(one, MambaSpec):
                window, dtype = None, _states_of(config, one, group.layer_names)
            else:
                mode = getattr(one, "kv_quant_mode", None)
                dtype = str(one.dtype).removeprefix("torch.") + (f" {mode.name}" if mode else "")
                window = get_kv_cache_spec_sliding_window(spec)
            number = GROUPS_OF_TABLE * table + i
            groups.append(Group(table, number, layers, one.block_size, window, dtype, kind.value, states))
    return groups


def _states_of(config: VllmConfig, spec: MambaSpec, layers: list[str]) -> str:
    """What a layer's state consists of: its tensors, in the order of their bytes. ValueError for states that are not
    kept at the ends of blocks, or that share pages with drafts."""
    where = f"({', '.join(layers[:1])}, …)"
    if spec.mamba_cache_mode != "align":
        raise ValueError(
            f"{NAME}: layers whose state is kept in mamba_cache_mode={spec.mamba_cache_mode!r} are not supported "
            f"{where}; start vLLM with --enable-prefix-caching --mamba-cache-mode align"
        )
    if spec.num_speculative_blocks or config.speculative_config is not None:
        raise ValueError(
            f"{NAME}: speculative decoding is not supported with layers that keep a state {where}, whose pages then "
            "hold states of drafts too; leave out --speculative-config"
        )
    tensors = [
        f"{str(dtype).removeprefix('torch.')}{list(shape)}"
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    ]
    copies = "on every rank" if spec.tp_replicated else "of the rank's heads"
    mamba = config.mamba_config
    rounding = "stochastic rounding" if mamba.enable_stochastic_rounding else ""
    # Shapes do not show the order of equal dimensions, which may change between versions of vLLM.
    how = f"{get_conv_state_layout()} {mamba.backend.name} {copies} vLLM {MINOR_VERSION} {rounding}".strip()
    return f"state {spec.mamba_type.name} {' '.join(tensors)} {how}"
