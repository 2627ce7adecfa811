"""Programs of the CUDA kernels on the host, under sanitizers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from programs import CXX, REPO, SANITIZERS, must_run

HOST_CUDA = Path(__file__).resolve().parent
# Each driver, with its files of csrc/.
DRIVERS = {"driver.cpp": ["prefix_keys.cu", "page_copy.cu"], "transfer_driver.cpp": ["page_copy.cu", "transfer.cu"]}


class Builds:
    """Programs, each built at its first use."""

    def __init__(self, folder: Path, cases: Path, small_cases: Path) -> None:
        self.folder = folder
        self.cases = {"asan": cases, "tsan": small_cases}
        self._done: set[Path] = set()

    def _object(self, source: Path, sanitizer: str | None) -> Path:
        out = self.folder / f"{source.parent.name}_{source.name}_{sanitizer}.o"
        if out not in self._done:
            flags = ["-std=c++17", "-g", "-fno-omit-frame-pointer", "-DLMC_HOST_CUDA", "-Wall", "-Wno-unknown-pragmas"]
            flags += [f"-I{HOST_CUDA}", f"-I{source.parent}", f"-I{REPO / 'csrc'}"]
            if sanitizer:
                flags += ["-O1", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
            else:
                flags += ["-O2"]  # the emulated runtime itself is not sanitized
            must_run([CXX, *flags, "-x", "c++", "-c", source, "-o", out])
            self._done.add(out)
        return out

    def _program(self, name: str, sanitizer: str, sources: Sequence[Path]) -> Path:
        out = self.folder / f"{name}_{sanitizer}"
        if out not in self._done:
            jobs = [(source, sanitizer) for source in sources]
            jobs += [(HOST_CUDA / source, None) for source in ("kernels.cpp", "streams.cpp")]
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda job: self._object(*job), jobs))
            must_run([CXX, f"-fsanitize={SANITIZERS[sanitizer]}", *objects, "-o", out])
            self._done.add(out)
        return out

    def driver(self, sanitizer: str, name: str = "driver.cpp", csrc: Path = REPO / "csrc") -> Path:
        files = [csrc / file for file in DRIVERS[name]]
        return self._program(f"{csrc.name}_{name}", sanitizer, [HOST_CUDA / name, *files])

    def selftest(self, sanitizer: str) -> Path:
        return self._program("selftest", sanitizer, [HOST_CUDA / "selftest.cu", REPO / "csrc" / "host_memory.cu"])
