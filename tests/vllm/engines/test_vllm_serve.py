"""What users start: `vllm serve`, and the documentation's examples."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from combinations import HERE, environment, pytestmark, python  # noqa: F401


def test_vllm_serve_answers_and_shows_what_was_hit_in_metrics(combination_of_spawned, folder, shared_store):
    """Starts its server module, since the command itself looks for a package named vllm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "kv_connector": "LMCacheMMConnector",
        "kv_connector_module_path": "lmcache_mm.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": f"{shared_store}?capacity=64MiB", "chunk_tokens": 64},
    }
    command = [
        *python(combination_of_spawned),
        *("-m", "vllm.entrypoints.openai.api_server", "--model", folder / "vlm", "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
        *("--block-size", "32", "--num-gpu-blocks-override", "256", "--no-enable-prefix-caching"),
        *("--served-model-name", "tiny", "--kv-transfer-config", json.dumps(config)),
    ]
    log = (folder / "serve.log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(combination_of_spawned))

    def fetch(path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    try:
        until = time.monotonic() + 180
        while True:
            try:
                fetch("/health")
                break
            except OSError:
                assert server.poll() is None, (folder / "serve.log").read_text()[-8000:]
                assert time.monotonic() < until
                time.sleep(0.5)
        question = {"model": "tiny", "prompt": "alpha " * 30, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        texts = [json.loads(fetch("/v1/completions", question))["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1] != ""
        until = time.monotonic() + 60
        counts: dict[str, float] = {}
        while not counts.get("loaded_tokens"):
            assert time.monotonic() < until
            time.sleep(0.5)
            for line in fetch("/metrics").splitlines():
                if line.startswith("vllm:lmcache_mm_") and "_total{" in line:
                    name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
                    counts[name.removeprefix("vllm:lmcache_mm_").removesuffix("_total")] = float(value)
                if line.startswith("vllm:lmcache_mm_") and "_sum{" in line and 'store="shm"' in line:
                    counts[line.split("{")[0].removeprefix("vllm:lmcache_mm_")] = float(line.rsplit(" ", 1)[1])
        assert counts["hit_tokens"] == counts["loaded_tokens"] >= 128
        assert counts["stored_tokens"] >= 128
        assert counts["failed_loads"] == 0
        assert counts["load_bytes_sum"] / counts["loaded_tokens"] == counts["store_bytes_sum"] / counts["stored_tokens"]
        assert 0 < counts["load_seconds_sum"] < 60
        assert 0 < counts["store_seconds_sum"] < 60
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


def run_example(number: int, folder: Path, shared_store: str, tmp_path: Path, combination: str) -> str:
    """The output of the documentation's example."""
    code = re.findall(r"```python\n(.*?)```", (HERE.parent.parent / "docs" / "vllm.md").read_text(), re.DOTALL)[number]
    code = code.replace("shm:///vllm", shared_store).replace("tiny-qwen2-vl", str(folder / "vlm"))
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [*python(combination), tmp_path / "example.py"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        env=environment(combination, VLLM_ENABLE_V1_MULTIPROCESSING="1"),
    )
    return done.stdout


def test_the_example_in_the_documentation_runs(combination_of_spawned, folder, shared_store, tmp_path):
    for again in (False, True):
        printed = run_example(0, folder, shared_store, tmp_path, combination_of_spawned)
        reused = [int(n) for n in re.findall(r"(\d+) of \d+ tokens reused", printed)]
        assert len(reused) == 3
        assert min(reused[1:]) >= 1024  # the picture's tokens
        assert (reused[0] >= 1024) == again


def test_the_example_of_the_encoder_connector_runs(combination_of_spawned, folder, shared_store, tmp_path):
    assert "0 pictures not encoded" in run_example(1, folder, shared_store, tmp_path, combination_of_spawned)
