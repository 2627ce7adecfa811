"""Engines that encode, prefill and decode, each a server of vLLM, and a proxy in front of them.

The proxy speaks the protocol of vLLM's example for separate encode, prefill and decode
(examples/disaggregated/disaggregated_encoder/disagg_epd_proxy.py): it passes the ec_transfer_params or
kv_transfer_params in an engine's answer to the next engine unchanged.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

START_S = 240
TIMEOUT_S = 8  # the connectors' timeout_s; what comes in time comes so on a busy machine too


class Engine:
    """A server, in separate processes."""

    def __init__(self, model: Path, log: Path, configs: dict[str, dict[str, Any]]) -> None:
        """configs: --ec-transfer-config and --kv-transfer-config, as ec and kv."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.arguments = [
            *("--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32"),
            *("--num-gpu-blocks-override", "256", "--no-enable-prefix-caching"),
            *("--limit-mm-per-prompt", '{"image": 3, "video": 0}'),
        ]
        for which, config in configs.items():
            self.arguments += [f"--{which}-transfer-config", json.dumps(config)]

    def fetch(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return json.loads(self.fetch("/v1/chat/completions", body))

    def refuses(self, body: dict[str, Any]) -> bool:
        """Whether it answers that it cannot serve a request. If its engine has ended, it does not answer."""
        try:
            self.chat(body)
        except urllib.error.HTTPError:
            return True
        return False

    def counts(self) -> dict[str, float]:
        """The connectors' counters, by name."""
        out: dict[str, float] = {}
        for line in self.fetch("/metrics").splitlines():
            if line.startswith("vllm:lmcache_mm_") and "_total{" in line:
                out[line.split("{")[0].removeprefix("vllm:lmcache_mm_").removesuffix("_total")] = float(
                    line.rsplit(" ", 1)[1]
                )
        return out

    def counted(self, name: str, at_least: float) -> float:
        """A counter, once it has reached `at_least`: engines report counts with a later step."""
        until = time.monotonic() + 20
        while (value := self.counts().get(name, 0.0)) < at_least and time.monotonic() < until:
            time.sleep(0.1)
        return value


@contextmanager
def started(python: list[Any], environment: dict[str, str], engines: dict[str, Engine]):
    """python: the command that runs a script."""
    servers = [[engine.arguments, str(engine.log)] for engine in engines.values()]
    command = [str(part) for part in (*python, Path(__file__), json.dumps(servers))]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + START_S
        for name, engine in engines.items():
            while True:
                try:
                    engine.fetch("/health")
                    break
                except OSError:
                    log = engine.log.read_text()[-8000:] if engine.log.exists() else ""
                    assert process.poll() is None, f"{name}: {log}"
                    assert time.monotonic() < until, f"{name}: {log}"
                    time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):  # what is left of its session
                os.killpg(process.pid, signal.SIGKILL)


def serve(servers: list[tuple[list[str], str]]) -> None:
    """Runs each server in a separate process. They are forked, since most of a start is importing vLLM."""
    for module in ("entrypoints.openai.api_server", "v1.engine.core", "v1.worker.cpu_worker"):
        importlib.import_module(f"vllm.{module}")
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _=None: fork  # vLLM would spawn its engines
    processes = []
    for arguments, log in servers:
        processes.append(fork.Process(target=_serve, args=(arguments, log)))
        processes[-1].start()

    def stop(*_: Any) -> None:
        for process in processes:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    while all(process.is_alive() for process in processes):  # when one has ended, so do the others
        time.sleep(0.2)
    stop()
    for process in processes:
        process.join()


def _serve(arguments: list[str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["api_server", *arguments]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def ec_config(role: str, store: str) -> dict[str, Any]:
    return {
        "ec_connector": "LMCacheMMEncoderConnector",
        "ec_connector_module_path": "lmcache_mm.vllm.encoder_connector",
        "ec_role": role,
        "ec_connector_extra_config": {"store": store, "timeout_s": TIMEOUT_S},
    }


def kv_config(role: str, store: str) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMMConnector",
        "kv_connector_module_path": "lmcache_mm.vllm.connector",
        "kv_role": role,
        "kv_connector_extra_config": {
            **{"store": store, "timeout_s": TIMEOUT_S, "chunk_tokens": 64, "opaque_tails": True}
        },
    }


def question(text: str, *pictures: int, **more: Any) -> dict[str, Any]:
    """A chat request about pictures of these seeds."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": [*map(picture, pictures), {"type": "text", "text": text}]}],
        **{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **more},
    }


def picture(seed: int) -> dict[str, Any]:
    png = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (168, 168, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(png, "png")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def encode(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Sends the request's pictures alone, under names that the proxy makes up. Returns the next engine's request."""
    pictures = [part for part in request["messages"][0]["content"] if part["type"] != "text"]
    if not pictures:
        return request
    content = [{**part, "uuid": uuid.uuid4().hex} for part in pictures]
    answer = engine.chat({"model": "tiny", "messages": [{"role": "user", "content": content}], "stream": False})
    told = answer.get("ec_transfer_params") or {}
    if len(pictures) > 1:
        indices = [i for reported in told.values() for i in reported["item_indices"]]
        assert sorted(indices) == list(range(len(pictures)))  # otherwise vLLM's proxy refuses the request
    return {**request, "ec_transfer_params": told} if told else request


def prefill(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Sends the whole request for a single token. Returns the next engine's request."""
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    params |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    answer = engine.chat({**request, "kv_transfer_params": params, "stream": False, "max_tokens": 1})
    told = answer.get("kv_transfer_params")
    return {**request, "kv_transfer_params": told} if told else request


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
