"""An engine of SGLang's on the CPU, with its hierarchical cache over a store: python engine.py MODEL STORE.

SGLang's hierarchical cache runs on accelerators only: it has no other kernels that copy between an engine's KV cache
and its host pool, and registers the pool's memory with CUDA. Here the cache is in host memory, torch makes the copies,
and nothing is registered. Streams are a CPU's, as SGLang chooses by itself where there is no accelerator. All else is
SGLang's own. The processes that it starts import this module too.
Prints as JSON, for each run, the tokens that were generated and how many were cached, and where.
"""

from __future__ import annotations

import json
import sys

import sglang
import torch
from sglang.srt.managers import cache_controller
from sglang.srt.mem_cache import l2_transfer
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

PROMPTS = [[*first, *range(16, 100)] for first in (range(16), range(100, 116))]  # they differ in their first page only


def load(pool, device_pool, host_indices, device_indices, layer, io_backend, *, is_draft=False):
    for device, host in ((pool.device_k_buffers, pool.k_data_refs), (pool.device_v_buffers, pool.v_data_refs)):
        device[layer][device_indices] = host[layer][host_indices]


def back_up(pool, device_pool, host_indices, device_indices, io_backend):
    for device, host in ((pool.device_k_buffers, pool.k_data_refs), (pool.device_v_buffers, pool.v_data_refs)):
        for layer in range(pool.layer_num):
            host[layer][host_indices] = device[layer][device_indices]


common._cuda_host_register = lambda *_: None
cache_controller.device_module = l2_transfer.device_module = torch.cpu
MHATokenToKVPoolHost.load_to_device_per_layer = load
MHATokenToKVPoolHost.backup_from_device_all_layer = back_up


def main(model, store):
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        skip_tokenizer_init=True,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        max_total_tokens=4096,
        page_size=16,
        enable_hierarchical_cache=True,
        hicache_size=1,  # GiB; by default SGLang leaves 10 GiB of the host free and refuses where there is no more
        hicache_mem_layout="page_first",
        hicache_io_backend="kernel",
        hicache_write_policy="write_through",
        hicache_storage_backend="dynamic",
        hicache_storage_prefetch_policy="wait_complete",
        enable_cache_report=True,
        hicache_storage_backend_extra_config=json.dumps(
            {
                "backend_name": "lmcache_mm",
                "module_path": "lmcache_mm.sglang",
                "class_name": "HiCacheBackend",
                "store": store,
                "prefetch_threshold": 16,
            }
        ),
    )
    for _ in range(3):
        answers = engine.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": 8, "temperature": 0})
        print(json.dumps([(a["output_ids"], a["meta_info"]["cached_tokens_details"]) for a in answers]), flush=True)
        engine.flush_cache()  # on the device and in the host pool; the store stays
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
