"""What a router knows of an engine's store."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from vllm import LLM

import routers
from lmcache_mm.prompt import owner_of
from small_engine import ask, engine, image, prompt, store, wishing


@contextmanager
def questions(llm: LLM):
    """Yields a list that collects a router's knowledge of each request."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    add, asked = scheduler.add_request, []

    def adding(request: Any) -> None:
        places = [(f.identifier, f.mm_position.offset, f.mm_position.length) for f in request.mm_features]
        pictures = [routers.Picture(*place) for place in places]
        asked.append(routers.Question(list(request.all_token_ids), pictures, request.cache_salt))
        add(request)

    scheduler.add_request = adding
    try:
        yield asked
    finally:
        scheduler.add_request = add


def elsewhere(program: str, *arguments: str) -> None:
    """Another process does something to a store."""
    begin = "import sys; from lmcache_mm.stores import open_store; store = open_store(sys.argv[1]); "
    subprocess.run([sys.executable, "-c", begin + program + "; store.close()", *arguments], check=True)


@contextmanager
def routed(url: str, **options: Any):
    """An engine, its questions, a function that returns how many tokens of some questions a router finds there, the
    engine's events, and the router's index."""
    address = f"ipc://{tempfile.mkdtemp()}/events"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": address}
    index, told = routers.Index(32), []
    with (
        routers.subscriber(address) as (joined, published),
        engine(url, **{"kv_events_config": events, "enable_prefix_caching": True, **options}) as llm,
        questions(llm) as asked,
    ):

        def where(about: Sequence[routers.Question]) -> list[int]:
            time.sleep(1.1)  # a round of looks
            ask(llm, prompt("hm? "), prompt("hm? "), sampling=wishing({"store": False, "load": False}))
            new = published()
            index.take(new)
            told.extend(new)
            return [index.tokens_at(question) for question in about]

        joined()
        yield llm, asked, where, told, index


def routing() -> dict[str, Any]:
    """Where a router would send requests about pictures, as the store's contents come and go."""
    about = "words before it, so that it begins late | what?"
    one, other = prompt(about, image(0, 336)), prompt(about, image(1, 336))
    ours, theirs = {**one, "cache_salt": "ours"}, {**one, "cache_salt": "theirs"}
    not_stored = wishing({"store": False})
    seen: dict[str, Any] = {}
    with store("1MiB") as url:
        with routed(url) as (llm, asked, where, told, index):
            ask(llm, one, ours)
            ask(llm, other, theirs, sampling=wishing({"store": False, "load": False}))
            known = list(asked)
            seen["stored"] = where(known)
            elsewhere("store.forget(bytes.fromhex(sys.argv[2]))", url, owner_of("ours").hex())
            seen["forgotten"] = where(known)
            gpu, cpu = (routers.by_block(told, medium) for medium in ("GPU", "CPU"))
            seen["blocks"] = [len(cpu), sum(block == gpu.get(name) for name, block in cpu.items())]
            seen["wrong"] = index.wrong()
        with routed(url) as (llm, _, where, _, index):
            ask(llm, one, ours, sampling=not_stored)
            seen["found"] = where(known)
            llm.reset_prefix_cache()
            seen["vLLM's cache reset"] = where(known)
            ask(llm, one, sampling=not_stored)
            seen["found again"] = where(known)
            elsewhere("store.put([bytes([i]) * 32 for i in range(64)], [bytes(1 << 16)] * 64)", url)
            seen["evicted"] = where(known)
            ask(llm, one, ours)
            seen["stored anew"] = where(known)
            llm.reset_prefix_cache(reset_connector=True)
            seen["reset"] = where(known)
            seen["wrong"] += index.wrong()
    return seen


def routing_groups() -> dict[str, Any]:
    """Groups of layers, of full attention and of windows; also without vLLM's own cache."""
    words = prompt(" ".join(f"word{i}" for i in range(40)))
    with store() as url:
        with routed(url, model="swa") as (llm, asked, where, told, index):
            ask(llm, words)
            where([])
            wrong = index.wrong()
        with routed(url, model="swa", enable_prefix_caching=False) as (llm, asked, where, _, index):
            ask(llm, words)
            where([])
            found = [index.tokens_at(asked[0], group=group) for group in range(4)]
            wrong += index.wrong()
    gpu, cpu = (routers.by_block(told, medium) for medium in ("GPU", "CPU"))
    seen: dict[str, Any] = {"wrong": wrong, "without vLLM's cache": found}
    for group in sorted({group for group, _ in cpu}):
        ours = {name: block for name, block in cpu.items() if name[0] == group}
        one, *_ = ours.values()
        of_group = {
            "window": one["kv_cache_spec_sliding_window"],
            "blocks": len(ours),
            "of vLLM": len(ours.keys() & gpu.keys()),
            "same": sum(gpu.get(name) == block for name, block in ours.items()),
        }
        seen.setdefault(one["kv_cache_spec_kind"], []).append(of_group)
    return seen
