"""The connector's cost in steps of the real vLLM: time inside its calls, in scheduler and worker."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from functools import wraps
from typing import Any

import numpy as np
import pytest

import tiny_qwen2_vl
from lmcache_mm.commands import cli

VLLM = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(VLLM is None or VLLM.origin is None, reason="no vLLM (tests/vllm/requirements*.txt)")

ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CALLS = (
    *("on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"),
    *("update_connector_output", "request_finished_all_groups", "take_events", "has_pending_push_work"),
    *("bind_connector_metadata", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"),
    *("get_transfer_results", "get_block_ids_with_load_errors", "get_kv_connector_stats"),
    *("build_connector_worker_meta", "clear_connector_metadata", "handle_preemptions", "finish_forward"),
)
PROMPT_TOKENS, REQUESTS = 2048, 8


class Engine:
    """vLLM in this process, on a small Qwen2-VL; `spent_s`: time inside the connector's calls so far."""

    def __init__(self, folder: Any, url: str) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415

        from lmcache_mm.vllm.connector import LMCacheMMConnector  # noqa: PLC0415

        self.spent_s = 0.0
        for name in CALLS:
            self._time(LMCacheMMConnector, name)
        self._sampling = SamplingParams
        self._random = np.random.default_rng(0)
        self._requests = 0
        self.llm = LLM(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=PROMPT_TOKENS + REQUESTS,
            block_size=32,
            num_gpu_blocks_override=1024,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 0, "video": 0},
            kv_transfer_config={
                "kv_connector": "LMCacheMMConnector",
                "kv_connector_module_path": "lmcache_mm.vllm.connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"store": url},
            },
        ).llm_engine

    def _time(self, owner: type, name: str) -> None:
        call = getattr(owner, name)

        @wraps(call)
        def timed(*arguments: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **more)
            finally:
                self.spent_s += time.perf_counter() - begin

        setattr(owner, name, timed)

    def ask(self, answer_tokens: int) -> None:
        """Adds a request with a new prompt."""
        self._requests += 1
        prompt = {"prompt_token_ids": self._random.integers(0, 250, PROMPT_TOKENS).tolist()}
        sampling = self._sampling(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        self.llm.add_request(str(self._requests), prompt, sampling)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    os.environ.update(ENVIRONMENT)
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen2_vl.write_checkpoint(folder)
    url = f"shm:///bench-vllm-{os.getpid()}"
    engine = Engine(folder, f"{url}?capacity=1GiB")
    yield engine
    engine.llm.engine_core.shutdown()
    cli.main(["clear", url])


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_time_inside_connector_calls(benchmark, engine, kind):
    """prefill: a step computes and stores a new prompt of 2,048 tokens; decode: one token for each of 8 requests."""
    spent: list[float] = []
    took: list[float] = []
    if kind == "decode":
        for _ in range(REQUESTS):
            engine.ask(answer_tokens=1000)
        for _ in range(REQUESTS * 4):
            engine.llm.step()

    def prepare() -> None:
        if kind == "prefill":
            while engine.llm.has_unfinished_requests():
                engine.llm.step()
            engine.ask(answer_tokens=1)
            time.sleep(0.02)  # so that its identity is known, as it is when requests have to wait

    def step() -> None:
        before, begin = engine.spent_s, time.perf_counter()
        engine.llm.step()
        took.append(time.perf_counter() - begin)
        spent.append(engine.spent_s - before)

    benchmark.pedantic(step, setup=prepare, rounds=100 if kind == "prefill" else 500, warmup_rounds=5)
    shares = np.array(spent[5:]) / np.array(took[5:])
    benchmark.extra_info.update(
        steps_of={
            "prefill": f"a prompt of {PROMPT_TOKENS:,} tokens computed and stored",
            "decode": f"a token of each of {REQUESTS} requests",
        }[kind],
        connector_s=float(np.median(spent[5:])),
        connector_p99_s=float(np.quantile(spent[5:], 0.99)),
        share=float(np.median(shares)),
        share_p99=float(np.quantile(shares, 0.99)),
    )
