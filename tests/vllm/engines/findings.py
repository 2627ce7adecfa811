"""Runs scenarios in processes of their own, and returns what they find."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from combinations import environment, python

HERE = Path(__file__).parent
LIMIT_S = 900  # of a scenario


def run(name: str, folder: Path, combination: str = "0.33-V1", **more: str) -> dict[str, Any]:
    """A scenario's findings, from a process that shares nothing with others, not even the seed of Python's hashes."""
    done = subprocess.run(
        [*python(combination), HERE / "scenarios.py", name, folder],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        env=environment(combination, **more),
    )
    return findings(done.returncode, done.stdout)


def findings(status: int, said: str) -> dict[str, Any]:
    assert status == 0, said[-8000:]
    # An exception that the schedulers' hooks catch is a bug in them.
    caught = re.search(r"is no longer cached\n.{,4000}", said, re.DOTALL)
    assert caught is None, caught
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))


class Forks:
    """Runs scenarios as `run` does, each in a fork of a process that has imported vLLM: of one for each combination."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: dict[str, tuple[socket.socket, subprocess.Popen[bytes]]] = {}

    def run(self, name: str, folder: Path, combination: str = "0.33-V1", **more: str) -> dict[str, Any]:
        request = {"arguments": [name, str(folder)], "environment": environment(combination, **more)}
        answer, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as output, answer:
            answer.settimeout(LIMIT_S)
            with theirs:
                asking = self._process(combination)
                socket.send_fds(asking, [json.dumps(request).encode()], [output.fileno(), theirs.fileno()])
            told = answer.makefile()
            process_id = int(told.readline())
            try:
                status = int(told.readline())
            except TimeoutError:
                os.killpg(process_id, signal.SIGKILL)  # its engines' workers too
                raise
            output.seek(0)
            return findings(status, output.read().decode(errors="replace"))

    def _process(self, combination: str) -> socket.socket:
        with self._lock:
            if combination not in self._processes:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    command = [*python(combination), HERE / "scenarios.py"]
                    process = subprocess.Popen(command, stdin=theirs, env=environment(combination))
                self._processes[combination] = ours, process
            return self._processes[combination][0]

    def close(self) -> None:
        for asking, process in self._processes.values():
            asking.close()
            process.wait(60)


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["answer"] for row in rows]


def cached(rows: list[dict[str, Any]]) -> list[int]:
    return [row["cached"] for row in rows]
