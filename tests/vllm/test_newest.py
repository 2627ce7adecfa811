"""What needs no engine, on the newest vLLM."""

from __future__ import annotations

import subprocess
import sys

from combinations import HERE, environment, pytestmark  # noqa: F401


def test_what_needs_no_engine_holds_on_the_newest_vllm_too():
    """This process has the installed vLLM."""
    files = [path for path in HERE.glob("test_*.py") if path.name not in ("test_newest.py", "test_disaggregated.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment("0.33-V1"), timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
