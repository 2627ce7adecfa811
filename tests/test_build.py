"""The build's promises: it needs only the C++ runtime at load time, and gives clear errors without a GPU."""

import ast
import ctypes
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm import _C

ROOT = Path(__file__).parent.parent
CUDA_BUILD = bool(_C.cuda_version)


class ArrayInCudaMemory:
    """Has the interface of a CuPy array, with an invalid address."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (4,),
        "typestr": "<i8",
        "data": (0x7F0000000000, False),
        "version": 3,
    }


def test_the_module_needs_neither_torch_nor_a_shared_cuda_runtime_at_load_time():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if name.startswith(("libtorch", "libc10", "libcuda", "libcudart", "libnv"))]
    symbols = subprocess.run(["nm", "-D", "-u", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert not [line for line in symbols.splitlines() if "c10" in line or "torch" in line or " cuda" in line]


def test_the_module_shows_no_symbol_but_its_entry():
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines() if " T " in line] == ["PyInit__C"]


def test_the_module_can_be_imported_without_torch():
    folder = str(Path(_C.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import _C; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stub_of_the_module_agrees_with_it(tmp_path):
    absent, config = tmp_path / "allowed", tmp_path / "mypy.ini"
    absent.write_text("" if CUDA_BUILD else "lmcache_mm\\._C\\.[Cc]uda.*\n")
    config.write_text("[mypy]\nfollow_imports = skip\n")  # the package's other modules would bring torch
    command = [sys.executable, "-m", "mypy.stubtest", "lmcache_mm._C", "--ignore-unused-allowlist"]
    command += ["--mypy-config-file", str(config)]
    run = subprocess.run([*command, "--allowlist", str(absent)], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_parameters_in_the_stub_are_those_of_the_module():
    """Read from docstrings, since pybind11 gives stubtest no signatures."""
    told: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "lmcache_mm" / "_C.pyi").read_text()).body:
        functions = [node] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef):
            functions = [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.decorator_list]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        told |= {f"{prefix}{f.name}": [a.arg for a in f.args.args if a.arg != "self"] for f in functions}
    found: dict[str, list[str]] = {}
    for name, thing in vars(_C).items():
        methods = {name: thing}
        if isinstance(thing, type):
            methods = {f"{name}.{m}": f for m, f in vars(thing).items() if not m.startswith("_") or m == "__init__"}
        for full_name, function in methods.items():
            if not name.startswith("_") and callable(function):
                signature = function.__doc__.splitlines()[0].split("->")[0]
                found[full_name] = [p for p in re.findall(r"(\w+): ", signature) if p != "self"]
    if not CUDA_BUILD:
        told = {name: parameters for name, parameters in told.items() if not name.lower().startswith("cuda")}
    assert found == told


def test_public_names_have_docstrings():
    public = [getattr(lmc, name) for name in lmc.__all__]
    public += [f for f in vars(lmc.ops).values() if inspect.isfunction(f) and f.__module__ == "lmcache_mm.ops"]
    public = [thing for thing in public if not getattr(thing, "__name__", "_").startswith("_")]
    assert [thing for thing in public if not thing.__doc__] == []


@pytest.mark.skipif(not CUDA_BUILD, reason="built with CPU operations only")
def test_a_cuda_build_says_for_what_it_was_built():
    assert _C.cuda_version.split(".")[0].isdigit()
    assert _C.cuda_archs
    devices, why = _C.cuda_devices()
    assert devices > 0 or why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_arrays_in_cuda_memory_raise_one_clear_error():
    with pytest.raises(RuntimeError, match="token_ids: in CUDA memory, but no GPU can be used: "):
        lmc.ops.prefix_keys(ArrayInCudaMemory(), [], bytes(32), [1])


@pytest.mark.skipif(not CUDA_BUILD or torch.cuda.is_available(), reason="needs a CUDA build on a machine without GPU")
def test_without_a_driver_kernels_raise_an_error_that_names_operation_error_and_place():
    memory = ctypes.create_string_buffer(1 << 16)
    address = ctypes.addressof(memory)
    with pytest.raises(RuntimeError, match=r"apply_mm_hashes_to_token_ids: cudaError\w+: .* \(csrc/\w+\.\w+:\d+\)"):
        _C.cuda_apply_mm_hashes_to_token_ids(address, 4, [("image", "a", 0, 2)], 0, 0, lambda size: address)


@pytest.mark.skipif(CUDA_BUILD, reason="built with CUDA kernels")
def test_a_cpu_build_says_so_when_it_is_given_cuda_memory():
    with pytest.raises(RuntimeError, match="CPU operations only"):
        lmc.ops.prefix_keys(ArrayInCudaMemory(), [], bytes(32), [1])


@pytest.mark.parametrize(
    "environment, text",
    [
        ({"LMCACHE_MM_CUDA": "YES"}, "LMCACHE_MM_CUDA: expected AUTO, ON or OFF, got 'YES'"),
        ({"LMCACHE_MM_CUDA_ARCHS": "90;sm90x"}, "expected compute capabilities such as 90, 9.0 or sm_90, got 'sm90x'"),
        ({"LMCACHE_MM_CUDA": "ON", "PATH": "/nowhere", "CUDACXX": "", "CUDA_HOME": "/nowhere"}, "no nvcc found"),
    ],
)
def test_a_build_that_cannot_be_is_refused_with_the_reason(environment, text):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert text in run.stderr


def test_a_build_goes_on_where_the_one_before_had_a_ninja_that_is_gone(tmp_path):
    """Such as pip's, which exists only during one `pip install .`. Compiles only CMake's own checks."""
    clone, ninja = tmp_path / "clone", shutil.which("ninja")
    for part in ("csrc", "lmcache_mm"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        (folder / "ninja").write_text(f'#!/bin/sh\n[ $# = 0 ] || exec {ninja} "$@"\n')
        (folder / "ninja").chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LMCACHE_MM_CUDA": "OFF"}
        subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=clone, check=True, env=environment)
        shutil.rmtree(folder)


def test_the_sources_that_are_packed_can_be_built_from(tmp_path):
    for part in ("csrc", "lmcache_mm"):
        shutil.copytree(ROOT / part, tmp_path / "clone" / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "clone")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=tmp_path / "clone", check=True, capture_output=True)
    with tarfile.open(tmp_path / f"lmcache_mm-{lmc.__version__.partition('+')[0]}.tar.gz") as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert {*sources, "CMakeLists.txt", "lmcache_mm/_C.pyi", "lmcache_mm/py.typed"} <= names


def test_a_clone_that_hides_the_installation_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "lmcache_mm", tmp_path / "lmcache_mm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-S", "-m", "lmcache_mm"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert "has no compiled module. If this is a clone and you ran `pip install .`, run Python in" in done.stderr
