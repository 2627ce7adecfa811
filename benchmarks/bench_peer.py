"""Stores of other hosts, over loopback: records of 7 MiB, against the same bytes over bare sockets and bare NIXL."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench_stores import RECORD_BYTES, aligned, key
from lmcache_mm.commands import certificates, cli
from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store
from lmcache_mm.stores.peers import nixl_agent

RECORDS = 64  # a prompt of 16,384 tokens of Qwen2-VL-2B
TOTAL_BYTES = RECORDS * RECORD_BYTES
CONNECTIONS = 4
FORK = multiprocessing.get_context("fork")
SECRET = secrets.token_hex(16)
SEAL = Seal(SECRET.encode())


@pytest.fixture(scope="module")
def lent() -> Iterator[tuple[Any, str]]:
    url = f"shm:///bench-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCACHE_MM_SECRET", SECRET)
        patch.delenv("LMCACHE_MM_SECRET_FILE", raising=False)
        patch.setenv("UCX_TLS", "tcp")
        store = open_store(f"{url}?capacity={TOTAL_BYTES}")
        for i in range(RECORDS):
            store.put([key(i)], [payload(i)])
        yield store, url
        store.close()
        assert cli.main(["clear", url]) == 0


def payload(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, RECORD_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def buffers() -> list[np.ndarray]:
    return [aligned(RECORD_BYTES) for _ in range(RECORDS)]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (place,) = certificates.make(tmp_path_factory.mktemp("tls") / "tls", ["127.0.0.1"], 1)
    return place


@pytest.fixture
def serve(lent: tuple[Any, str]) -> Iterator[Callable[..., int]]:
    """serve(arguments) starts a process that lends the store, and returns its port."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> int:
        command = [sys.executable, "-m", "lmcache_mm", "serve", "--store", lent[1], "--listen", "127.0.0.1:0"]
        started.append(subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        return int(started[-1].stdout.readline().partition(" is lent at 127.0.0.1:")[2].partition(",")[0])

    yield start
    for process in started:
        process.terminate()
        assert process.wait() == 0


def send_for_ever(listener: socket.socket, share: int, tls: Path | None) -> None:
    """Sends `share` records over each connection on every request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if tls:
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")

    def send(sock: socket.socket, memory: np.ndarray) -> None:
        sock = context.wrap_socket(sock, server_side=True) if tls else sock
        while sock.recv(1):
            for begin in range(0, memory.nbytes, RECORD_BYTES):
                sock.sendall(memory[begin : begin + RECORD_BYTES].data)

    while True:
        threading.Thread(target=send, args=(listener.accept()[0], aligned(share * RECORD_BYTES)), daemon=True).start()


def bare(connections: int, tls: Path | None, buffers: list[np.ndarray], stack: Any) -> Callable[[], None]:
    """Reads all records over bare sockets from another process."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    share = RECORDS // connections
    process = FORK.Process(target=send_for_ever, args=(listener, share, tls), daemon=True)
    process.start()
    stack.callback(process.join)
    stack.callback(process.kill)
    socks: list[socket.socket] = []
    for _ in range(connections):
        sock = stack.enter_context(socket.create_connection(listener.getsockname()))
        if tls:
            context = ssl.create_default_context(cafile=tls / "ca.pem")
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))
        socks.append(sock)

    def receive(sock: socket.socket, into: list[np.ndarray]) -> None:
        sock.sendall(b"g")
        for buffer in into:
            view = memoryview(buffer)
            while view:
                view = view[sock.recv_into(view) :]

    def read() -> None:
        shares = [buffers[i * share : (i + 1) * share] for i in range(connections)]
        threads = [threading.Thread(target=receive, args=both) for both in zip(socks, shares, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return read


@pytest.fixture
def stack() -> Iterator[Any]:
    with ExitStack() as stack:
        yield stack


def check(store: Any, buffers: list[np.ndarray]) -> Callable[[], None]:
    """Returns a function that reads all records, after checking that it reads the right ones."""
    keys = [key(i) for i in range(RECORDS)]
    assert all(store.get_into(keys, buffers))
    assert all(np.array_equal(buffer, payload(i)) for i, buffer in enumerate(buffers))

    def read() -> None:
        assert all(store.get_into(keys, buffers))

    return read


@pytest.mark.parametrize("mac", [True, False], ids=["MAC", "no MAC"])
@pytest.mark.parametrize("over", ["TLS", "TCP"])
def test_peer(against, serve, lent, buffers, tls, stack, over, mac):
    directory = tls if over == "TLS" else None
    port = serve(*(["--tls", str(tls)] if directory else []))
    options = f"timeout=60&connections={CONNECTIONS}" + (f"&tls={tls}" if directory else "")
    store = stack.enter_context(closing(open_store(f"peer://127.0.0.1:{port}?{options}")))
    read = check(store, buffers)
    if not mac:
        store._seal.verify = lambda *_: True
    peers = {f"bare {n}": bare(n, directory, buffers, stack) for n in (1, CONNECTIONS)}
    against(read, peers, 8, bytes=TOTAL_BYTES, network=f"peer: over {over}" + ("" if mac else ", MACs not checked"))


def test_nixl(against, serve, lent, buffers, stack):
    port = serve("--nixl", "--trusted-network")
    store = stack.enter_context(closing(open_store(f"nixl://127.0.0.1:{port}?trusted_network=1&timeout=60")))
    read = check(store, buffers)
    slab_agent = stack.enter_context(closing(nixl_agent.SlabAgent(lent[0].directory / "slab", "lo")))
    base, _, metadata = nixl_agent.described_agent(slab_agent.describe())
    agent, memory = nixl_agent.new_agent("lo"), aligned(TOTAL_BYTES)
    agent.register_memory(agent.get_reg_descs([(memory.ctypes.data, TOTAL_BYTES, 0, "")], "DRAM"))
    name = agent.add_remote_agent(metadata)

    def transfer() -> None:
        to, source = (
            agent.get_xfer_descs([(begin + i * RECORD_BYTES, RECORD_BYTES, 0) for i in range(RECORDS)], "DRAM")
            for begin in (memory.ctypes.data, base)
        )
        handle = agent.initialize_xfer("READ", to, source, name)
        with slab_agent.busy():
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
        assert state == "DONE"
        agent.release_xfer_handle(handle)

    against(read, {"bare NIXL": transfer}, 8, bytes=TOTAL_BYTES, network="nixl: over UCX's TCP")
