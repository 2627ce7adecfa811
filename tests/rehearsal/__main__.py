"""Runs a program as on a machine with a GPU: python tests/rehearsal (-m MODULE | -c CODE | SCRIPT) [ARGUMENTS]

The GPU is tests/host_cuda: lmcache_mm._C is built a second time, with its .cu files compiled by the C++ compiler, and
torch.cuda is replaced (torch_cuda.py). Kernels run thread by thread on the host, so sizes must be small: see SMALL;
other code that chooses sizes checks LMCACHE_MM_REHEARSAL in the environment. HOST_CUDA_SEED chooses when streams run.
LMCACHE_MM_REHEARSAL_PACKAGES: names of packages; all others, except their dependencies, are hidden.
The build is kept in build/rehearsal; python tests/rehearsal without arguments makes it and prints its path.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import multiprocessing.spawn
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
BUILD = REPO / "build" / "rehearsal"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
KIB = 1 << 10
# Constants of modules, replaced because they are meant for a real GPU.
SMALL: dict[str, dict[str, Any]] = {
    "lmcache_mm.commands.calibrate": {
        "FRAGMENT_BYTES": (4 * KIB, 16 * KIB),
        "COUNTS": (2, 16),
        "MOST_BYTES": 256 * KIB,
        "LAYERS": 2,
        "LAYER_BYTES": 64 * KIB,
        "LAYER_BLOCKS": (2, 4),
        "RING_BLOCKS": (2, 4),
        "ROUNDS": 1,
        "CHUNK_BYTES": 64 * KIB,
        "BUFFER_BYTES": 256 * KIB,
        "WIDTH": 16,
    },
    "lmcache_mm.commands.doctor": {"MEASURED_BYTES": 1024 * KIB},
}


def build() -> None:
    """Builds what has changed since the last build; one process at a time."""
    pybind11 = importlib.import_module("pybind11").get_cmake_dir()
    BUILD.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja come as packages
    options = ["-DLMCACHE_MM_REHEARSAL=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            must_run(path, "cmake", "-S", REPO, "-B", BUILD, "-G", "Ninja", *options)
        must_run(path, "cmake", "--build", BUILD)


def must_run(path: str, *command: object) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        sys.exit(f"tests/rehearsal: {' '.join(str(word) for word in command)}\n{done.stdout}")


class Find:
    """Finds the built module, gives modules their small constants, and hides packages."""

    def __init__(self, hidden: set[str]) -> None:
        self._hidden = hidden

    def find_spec(self, name: str, path: Any = None, _: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self._hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "lmcache_mm._C":
            return importlib.util.spec_from_file_location(name, BUILD / f"_C{SUFFIX}")
        if name not in SMALL:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        spec.loader.exec_module = then_set(spec.loader.exec_module, SMALL[name])  # type: ignore[method-assign]
        return spec


def then_set(run: Callable[[ModuleType], None], values: dict[str, Any]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        run(module)
        vars(module).update(values)

    return exec_module


def hide_all_but(names: list[str]) -> set[str]:
    """The modules of all packages except these and their dependencies; hides pytest's plugins among them too."""
    requirements = importlib.import_module("packaging.requirements")
    canonical = importlib.import_module("packaging.utils").canonicalize_name
    kept: set[str] = set()
    while names:
        name = canonical(names.pop())
        if name in kept:
            continue
        kept.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in map(requirements.Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                names.append(need.name)
    of_modules = importlib.metadata.packages_distributions()
    every = importlib.metadata.distributions
    importlib.metadata.distributions = lambda **given: (  # type: ignore[assignment]
        one for one in every(**given) if canonical(one.metadata["Name"] or "") in kept
    )
    return {module for module, of in of_modules.items() if not kept.intersection(map(canonical, of))}


def main() -> None:
    build()
    if len(sys.argv) == 1:
        print(BUILD)
        return
    os.environ["LMCACHE_MM_REHEARSAL"] = "1"
    os.environ["LMCACHE_MM_REHEARSAL_PYTHON"] = sys.executable  # for `spawned`
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on host memory
    if (BUILD / "librivals.so").exists():
        os.environ["LMCACHE_MM_BENCH_RIVALS"] = str(BUILD / "librivals.so")
    names = os.environ.get("LMCACHE_MM_REHEARSAL_PACKAGES")
    sys.meta_path.insert(0, Find(hide_all_but(names.split()) if names else set()))  # type: ignore[arg-type]
    sys.path[0] = str(BUILD)
    sys.path.insert(0, str(HERE))
    importlib.import_module("torch_device")  # before torch, which looks for CUDA on import
    importlib.import_module("torch_cuda").install()
    multiprocessing.spawn.set_executable(str(HERE / "spawned"))  # spawned processes rehearse too
    del sys.path[:2]
    sys.path.append(str(HERE / "packages"))  # stand-ins for packages that need a GPU
    how, *rest = sys.argv[1:]
    if how == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(how).resolve().parent))
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    main()
