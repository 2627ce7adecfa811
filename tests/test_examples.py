"""Every script in examples/ runs unchanged; tests/test_demo.py has the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from lmcache_mm.stores.local.slab_files import shm_directory

EXAMPLES = Path(__file__).parent.parent / "examples"
NOT_RUN = {"demo", "questions", "paged_qwen2_vl", "tiny_qwen2_vl"}  # run or imported by tests/test_demo.py
SAID = {
    "own_loop": "hash of a cat, question 5: 349 of 350 tokens restored, the answer is the same",
    "chat": "162 tokens, 149 restored, 8 generated",
    "dynamic_cache": "325 tokens, 256 restored",
    "layouts": "MLA, one latent per token: 100 tokens",
    "arrays": "300 different ids for 300 placeholders",
    "states": "hash of a cat, question 6: 170 of 200 tokens restored, the answer is the same",
    "two_hosts": "350 of 350 tokens read from the other host",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in NOT_RUN))
def test_an_example_says_what_it_shows(name):
    if name == "dynamic_cache":
        pytest.importorskip("transformers")
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    assert SAID[name] in done.stdout


def test_without_an_extra_an_example_names_it_and_leaves_no_store(tmp_path):
    name = uuid.uuid4()
    (tmp_path / "cryptography.py").write_text("raise ImportError('no cryptography')")
    (tmp_path / "sitecustomize.py").write_text(f"import uuid; uuid.uuid4 = lambda: uuid.UUID(int={name.int})")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, EXAMPLES / "two_hosts.py"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert "pip install -e '.[peer]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not shm_directory(f"example-{name.hex}").exists()
