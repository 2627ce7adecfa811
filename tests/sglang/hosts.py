"""Engines, and host pools of SGLang's own, filled on the CPU."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from sglang.srt.arg_groups.lora_hook import check_lora_server_args
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

PAGE = 4  # tokens
STORES = ("mem", "shm", "file", "valkey", "tiered")


def write_model(folder, **changes):
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        **changes,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.arange(8)}, folder / "model.safetensors")
    return folder


def start(model, **arguments):
    """What an engine of this model would have published."""
    arguments = ServerArgs(model_path=str(model), page_size=PAGE, device="cpu", **arguments)
    check_lora_server_args(arguments)
    set_global_server_args_for_scheduler(arguments)
    return arguments


def storage_config(extra=None, **changes):
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "model",
        "extra_config": extra,
        **changes,
    }
    return HiCacheStorageConfig(**fields)


def register(backend, pools):
    """As SGLang's controllers do."""
    first, *_ = pools.values()
    backend.register_mem_pool_host(first)
    for name, pool in pools.items():
        backend.register_mem_host_pool_v2(pool, name)
    backend.on_host_pools_registered()
    return backend


def mha(layout="layer_first", pages=32, heads=2, width=16, layers=3, width_of_values=None):
    device = MHATokenToKVPool(
        size=(pages - 1) * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=heads,
        head_dim=width,
        v_head_dim=width_of_values,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    host = AsymmetricMHATokenToKVPoolHost if width_of_values else MHATokenToKVPoolHost
    return host(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=layers,
    )


def mla(layout="page_first", pages=32):
    device = MLATokenToKVPool(
        size=(pages - 1) * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )
    return MLATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=3,
        target_layer_num=3,
    )


def mamba(
    layout="page_first", states=32, side_states=False, temporal=torch.float32, conv=torch.bfloat16, side=torch.float32
):
    """States with these dtypes."""
    temporal = torch.zeros(2, states, 5, 7, dtype=temporal)
    conv = (torch.zeros(2, states, 6, 3, dtype=conv), torch.zeros(2, states, 9, dtype=conv))
    extra = (torch.zeros(states, 11, dtype=side),) if side_states else ()
    return MambaPoolHost(
        MambaStateBufferInfo(temporal=temporal, conv=conv, extra_checkpoint_buffers=extra),
        1.0,
        0,
        device_capacity=states,
        pin_memory=False,
        layout=layout,
    )


def rows(layout="layer_first", pages=32, dtype=torch.uint8):
    """Pages of one row a layer: an indexer's."""
    buffers = [torch.zeros(pages, 40, dtype=dtype) for _ in range(3)]
    return DeepSeekV4PagedHostPool(PoolName.DEEPSEEK_V4_C4_INDEXER, buffers, 40, pages, PAGE, layout, pin_memory=False)


POOLS = {
    "mha layer_first": lambda: {PoolName.KV: mha("layer_first")},
    "mha page_first": lambda: {PoolName.KV: mha("page_first")},
    "mha page_first_direct": lambda: {PoolName.KV: mha("page_first_direct")},
    "mha page_head": lambda: {PoolName.KV: mha("page_head")},
    "mla layer_first": lambda: {PoolName.KV: mla("layer_first")},
    "mla page_first": lambda: {PoolName.KV: mla("page_first")},
    "window": lambda: {PoolName.KV: mha(), PoolName.SWA: mha(layers=2, heads=1)},
    "states": lambda: {PoolName.KV: mha("page_first"), PoolName.MAMBA: mamba()},
    "side states": lambda: {PoolName.KV: mha("page_first"), PoolName.MAMBA: mamba(side_states=True)},
    "indexer": lambda: {PoolName.KV: mla(), PoolName.DEEPSEEK_V4_C4_INDEXER: rows()},
    "logical": lambda: {
        PoolName.KV: LogicalHostPool(32 * PAGE, PAGE),
        PoolName.DEEPSEEK_V4_C4_INDEXER: rows("page_first"),
    },
}


def slots(pool, pages):
    """The slots of these pages of a pool."""
    size = pool.page_size
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


def pages_of(pool, pages):
    """Their bytes, by SGLang's own reading."""
    return [
        bytes(pool.get_data_page(page * pool.page_size).contiguous().flatten().view(torch.uint8).numpy())
        for page in pages
    ]


def fill(pool, pages, seed):
    generator = torch.Generator().manual_seed(seed)
    for page in pages:
        flat = pool.get_dummy_flat_data_page()
        content = torch.randint(0, 256, (flat.nbytes,), generator=generator, dtype=torch.uint8)
        pool.set_from_flat_data_page(page * pool.page_size, content.view(flat.dtype))


def hashes(count, start=0):
    return [f"{number:064x}" for number in range(start, start + count)]
