"""Registers, spills and bytes in flight of the compiled kernels, read from the module's machine code.

python benchmarks/machine_code.py prints the table. These are expectations: nothing was run.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lmcache_mm import _C

REGISTERS_OF_SM = 65536
THREADS_OF_SM = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
SHARED_BYTES_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}

# Threads per block, dynamic shared memory, and the bytes that a thread requests before it waits: facts of csrc/*.cu
# that machine code does not show. Zero bytes: all of the shared memory is in flight.
LAUNCHES = {
    "hash_leaves": (128, 48256, 64),
    "fold_keys": (128, 32784, 32),
    "overwrite": (256, 0, 64),
    "gather_kernel": (256, 0, 64),
    "scatter_kernel": (256, 0, 64),
    "copy_units_kernel": (256, 0, 4),
    "gather_coded_kernel": (256, 9088, 128),
    "scatter_coded_kernel": (256, 0, 96),
    "gather_bulk_kernel": (288, 98448, 0),
    "scatter_bulk_kernel": (288, 98448, 0),
}


@dataclass(frozen=True)
class Kernel:
    name: str  # such as gather_kernel<page>
    arch: int
    registers: int
    stack_bytes: int
    sass: str

    @property
    def function(self) -> str:
        return self.name.split("<")[0]

    @property
    def blocks_of_sm(self) -> int:
        threads, shared, _ = LAUNCHES[self.function]
        registers = -(-self.registers // 8) * 8
        limits = [REGISTERS_OF_SM // (registers * threads), THREADS_OF_SM[self.arch] // threads]
        if shared:
            limits.append(SHARED_BYTES_OF_SM[self.arch] // (shared + 1024))  # the system reserves 1 KiB per block
        return min(limits)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes in flight per multiprocessor, with all its blocks and every thread waiting."""
        threads, shared, in_flight = LAUNCHES[self.function]
        return self.blocks_of_sm * (threads * in_flight or shared)


def tool(name: str) -> str:
    for directory in Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"):
        if (directory / name).exists():
            return str(directory / name)
    raise FileNotFoundError(f"{name}: pip install nvidia-cuda-{name}")


def kernels(arch: int) -> list[Kernel]:
    """All kernels of the compiled module for one architecture."""

    def dump(*options: str) -> str:
        path = f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"
        command = [tool("cuobjdump"), "-arch", f"sm_{arch}", *options, _C.__file__]
        return subprocess.run(command, env={"PATH": path}, check=True, capture_output=True, text=True).stdout

    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", dump("-sass"), re.DOTALL))
    usage = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    return [Kernel(readable(f), arch, int(reg), int(stack), sass[f]) for f, reg, stack in usage]


def readable(mangled: str) -> str:
    name = next(name for name in LAUNCHES if name in mangled)
    mode = re.search(r"ILNS_4ModeE(\d)E", mangled)
    return f"{name}<{('page', 'token')[int(mode[1])]}>" if mode else name


def main() -> int:
    if not _C.cuda_version:
        print("This build has CPU operations only: there is no machine code of kernels.")
        return 0
    archs = [int(arch) for arch in _C.cuda_archs.split(",")]
    print(f"Expected, from the machine code of nvcc {_C.cuda_version} (not measured):\n")
    print(
        f"{'kernel':26} {'arch':>5} {'registers':>10} {'stack':>6} {'blocks/SM':>10} {'in flight/block':>16} {'/SM':>8}"
    )
    for arch in archs:
        for kernel in sorted(kernels(arch), key=lambda k: k.name):
            print(
                f"{kernel.name:26} {f'sm_{arch}':>5} {kernel.registers:>10} {kernel.stack_bytes:>6} "
                f"{kernel.blocks_of_sm:>10} {kernel.bytes_in_flight // kernel.blocks_of_sm // 1024:>12} KiB "
                f"{kernel.bytes_in_flight // 1024:>4} KiB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
