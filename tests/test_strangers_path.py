"""A stranger's path: a clone, an environment, and what README says to type there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from test_examples import EXAMPLES, NOT_RUN, SAID
from test_readme import ROOT, WITHOUT_VLLM


def run(command: list[str], where: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=where, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def installs_of_readme() -> list[str]:
    """The commands of README's Install, without comments."""
    (block,) = re.findall(r"## Install\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """(clone, environment variables) of a new virtual environment that sees the packages of this one, but not ours."""
    folder = tmp_path_factory.mktemp("stranger") / "lmcache_mm"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    venv = folder.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    # Lines of a .pth file are folders, whose own .pth files, such as that of our editable install, do not count.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LMCACHE_MM_CUDA_ARCHS")},
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LMCACHE_MM_CUDA": "OFF",  # with CUDA kernels it would take minutes
        "CUDA_VISIBLE_DEVICES": "",  # of which doctor would say that this build cannot use them
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return folder, environment


def test_readme_to_the_letter(clone, tmp_path):
    folder, environment = clone
    install, doctor = installs_of_readme()
    assert (install, doctor) == ("pip install -e .", "lmcache-mm doctor")
    run(shlex.split(install), folder, environment)
    where = run(["python", "-c", "import lmcache_mm; print(lmcache_mm.__file__)"], tmp_path, environment)
    assert Path(where.strip()).parent == folder / "lmcache_mm"
    assert "CPU operations only" in run(shlex.split(doctor), tmp_path, environment)
    for name, code in WITHOUT_VLLM:
        said = run(["python", "-c", code], tmp_path, environment)
        assert said.splitlines() == re.findall(r"print\(.*\)  # (.*)", code), name

    (demo,) = re.findall(r"`(pip install [^`]*)` and `python examples/demo.py`", (ROOT / "README.md").read_text())
    run(shlex.split(demo), folder, environment)  # a second build in the same clone
    said = run(["python", "examples/demo.py", "--max-new-tokens", "2"], folder, environment)
    assert "All 8 answers equal those computed without a cache." in said
    for example in sorted(EXAMPLES.glob("*.py")):
        if example.stem not in NOT_RUN:
            assert SAID[example.stem] in run(["python", f"examples/{example.name}"], folder, environment)
