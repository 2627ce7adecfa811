"""Programs that tests compile and run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "g++")
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(command: Sequence[object], timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository; stdout has both outputs."""
    return subprocess.run(
        [str(word) for word in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=REPO,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def must_run(command: Sequence[object]) -> None:
    done = run(command)
    assert done.returncode == 0, f"{' '.join(str(word) for word in command)}\n{done.stdout}"
