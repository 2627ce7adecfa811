"""model_runner_v2.py SCRIPT or -m MODULE, ARGUMENTS...: runs it with Model Runner V2 on the CPU.

vLLM uses V2 wherever Triton works, which is on every GPU. Here Triton's kernels are interpreted. Forked processes
inherit this.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from functools import cache
from typing import Any

import torch
import triton.backends
from triton import language
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter


class _Properties:
    def get_device_properties(self, _: int) -> dict[str, int]:
        names = ("max_num_regs", "multiprocessor_count", "warpSize", "sm_clock_rate", "mem_clock_rate", "mem_bus_width")
        return {"max_shared_mem": 1 << 16, **dict.fromkeys(names, 1)}


class _Driver:
    """The parts of a device's driver that vLLM and Triton use when they start."""

    utils = _Properties()

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", "x86", 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0


class _Backend:
    driver, compiler = _Driver, None


triton.backends.backends.clear()
triton.backends.backends["cpu"] = _Backend
triton.runtime.driver.set_active(_Driver())


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    members = ((name, getattr(package, name)) for name in dir(package))
    return [(name, member) for name, member in members if language.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


# A third of the interpreter's time goes into looking for what to patch, at each launch, and for overflows.
interpreter._patch_builtin = _patch_builtin
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

if __name__ == "__main__":
    sys.argv.pop(0)
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
