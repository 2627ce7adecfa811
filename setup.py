"""Builds lmcache_mm._C with CMake and ninja.

LMCACHE_MM_CUDA=AUTO|ON|OFF   AUTO (default): CUDA kernels if nvcc is found; ON: fail without it; OFF: CPU ops only
LMCACHE_MM_CUDA_ARCHS=80;90   compute capabilities to build for, also as 9.0 or sm_90 (default 80;90;100;120)
CUDACXX, CUDA_HOME            where nvcc is, if not on PATH or in /usr/local/cuda

The version's local label says what was built: 0.1.0+cu130 has CUDA kernels, 0.1.0+cpu has not.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "lmcache_mm" / "__init__.py").read_text())[1]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc")
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def cuda_compiler() -> tuple[str | None, str]:
    """(nvcc or None for a CPU build, local version label)."""
    wanted = os.environ.get("LMCACHE_MM_CUDA", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "OFF"):
        sys.exit(f"LMCACHE_MM_CUDA: expected AUTO, ON or OFF, got {wanted!r}")
    nvcc = None if wanted == "OFF" else find_nvcc()
    if nvcc is None:
        if wanted == "ON":
            sys.exit("LMCACHE_MM_CUDA=ON: no nvcc found; put it on PATH or set CUDACXX or CUDA_HOME")
        return None, "cpu"
    version = subprocess.run([nvcc, "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or int(release[1]) < 12:
        found = f"{nvcc} is release {release[0].split()[1]}" if release else f"{nvcc} --version is not understood"
        if wanted == "ON":
            sys.exit(f"LMCACHE_MM_CUDA=ON: CUDA 12.0 or newer is needed, {found}")
        print(f"lmcache_mm: CUDA 12.0 or newer is needed, {found}: CPU ops only")
        return None, "cpu"
    return nvcc, f"cu{release[1]}{release[2]}"


def architectures() -> str:
    """What CMake takes, from what people write."""
    wanted = re.split(r"[;,\s]+", os.environ.get("LMCACHE_MM_CUDA_ARCHS", "").strip())
    for one in filter(None, wanted):
        if not re.fullmatch(r"(sm_)?(\d{2,3}|\d{1,2}\.\d)[af]?", one):
            sys.exit(f"LMCACHE_MM_CUDA_ARCHS: expected compute capabilities such as 90, 9.0 or sm_90, got {one!r}")
    return ";".join(one.removeprefix("sm_").replace(".", "") for one in filter(None, wanted))


NVCC, LABEL = cuda_compiler()
ARCHITECTURES = architectures()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{LABEL}"  # kept, so that the next build is short
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # pip's of this build: that of the last one is gone
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLMCACHE_MM_CUDA={'ON' if NVCC else 'OFF'}",
        ]
        if NVCC:
            configure.append(f"-DCMAKE_CUDA_COMPILER={NVCC}")
            # -U: the default again, whatever an earlier build was told.
            configure.append(f"-DLMCACHE_MM_CUDA_ARCHS={ARCHITECTURES}" if ARCHITECTURES else "-ULMCACHE_MM_CUDA_ARCHS")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        print(f"lmcache_mm: built with {'CUDA kernels, ' + NVCC if NVCC else 'CPU ops only'}")


setup(
    version=VERSION if "sdist" in sys.argv else f"{VERSION}+{LABEL}",  # sources may be built for anything
    ext_modules=[Extension("lmcache_mm._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
