"""The versions of vLLM and the model runners that the tests run, and processes with each."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
}

# vLLM's versions and model runners. GPUs use V2; here its kernels are interpreted, at half the speed.
COMBINATIONS = ("0.32-V1", "0.33-V1", "0.32-V2", "0.33-V2")
OVERLAY = HERE.parent.parent / ".venv" / "vllm-0.33"
CHOSEN = os.environ.get("TEST_VLLM", "").split()  # to run everything on; `make test-vllm-all` tries each

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)


def python(combination: str) -> list[Any]:
    """The command that runs a script or -m MODULE."""
    return [sys.executable, *([HERE / "model_runner_v2.py"] if combination.endswith("V2") else [])]


def environment(combination: str, **more: str) -> dict[str, str]:
    overlay = [str(OVERLAY)] if combination.startswith("0.33") else []
    path = os.pathsep.join([*overlay, str(HERE.parent.parent), str(HERE.parent.parent / "examples"), str(HERE)])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **more}
