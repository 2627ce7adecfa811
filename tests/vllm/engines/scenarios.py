"""Scenarios on the real vLLM: python scenarios.py NAME FOLDER prints its findings as JSON, in the last line.

FOLDER holds the models, PYTHONPATH names examples and tests/vllm. A process runs one scenario, with its engines one
after another: vLLM leaves too much state. Without arguments it forks such processes as a socket on its stdin asks for
them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import model_runner_v2  # noqa: F401  # an engine's process that is spawned begins here

from answers import adapters, answers, identity
from encoder import encoder, encoder_identity, encoder_ranks, encoder_trouble
from layers import sliding_windows, states, states_of_pictures
from mishaps import odd_requests, pooling, pressure, trouble
from models import make_models
from resets import pausing, weights
from routing import routing, routing_groups
from session_parts import sessions, sessions_in_trouble, sessions_served
from shared_stores import evicting, first_host, inside_multi, second_host, share

SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        make_models,
        answers,
        identity,
        adapters,
        trouble,
        pressure,
        pausing,
        weights,
        odd_requests,
        pooling,
        sliding_windows,
        states,
        states_of_pictures,
        share,
        evicting,
        first_host,
        second_host,
        inside_multi,
        routing,
        routing_groups,
        encoder,
        encoder_identity,
        encoder_trouble,
        encoder_ranks,
        sessions,
        sessions_in_trouble,
        sessions_served,
    )
}


def wait_to_be_forked() -> None:
    """Imports what engines need, then forks whenever the socket on stdin asks for a scenario, until it is closed.

    Returns in each fork, which is as a process started with these arguments and this environment. Beside a request come
    two descriptors: one for the fork's output, and a socket that is told the process id and then the exit status.
    """
    for module in ("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2_vl", "lmcache_mm.vllm.connector"):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1  # a fork would lack the others, and never get the locks they hold
    # Half of a scenario's time would be vLLM's collections around each engine, which go through all that is imported.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    asked = socket.socket(fileno=os.dup(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 2)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    output, answer = descriptors
    if child := os.fork():
        os.write(answer, b"%d\n" % child)
        os.write(answer, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for descriptor in (output, answer, asked.detach()):
        os.close(descriptor)
    request = json.loads(message)
    os.environ.update(request["environment"])
    sys.argv += request["arguments"]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        wait_to_be_forked()
    name, *arguments = sys.argv[1].split(":")
    result = SCENARIOS[name](*arguments)
    print(json.dumps(result), flush=True)
