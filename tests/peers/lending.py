"""Hosts that lend a store, stand-ins for them, and who reads from them."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np

from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store
from lmcache_mm.stores.peers import channel, peer
from lmcache_mm.stores.peers.server import Server
from servers import PATIENCE_S
from test_stores import key

SECRET = b"a secret of the tests"
SEAL = Seal(SECRET)
LARGE = 1 << 20


def large(i, size=LARGE):
    """payload(i, size), made faster."""
    return np.resize(np.roll(np.arange(251, dtype=np.uint8), -i), size).tobytes()


@contextmanager
def serving(store, seal=SEAL, tls=None, connections=64, port=0):
    server = Server(store, ("127.0.0.1", port), seal, tls, connections)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def serve_process(url, *arguments):
    """(process, port) of `python -m lmcache_mm serve`."""
    command = [sys.executable, "-m", "lmcache_mm", "serve", "--store", url, "--listen", *(arguments or ["127.0.0.1:0"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert f"{url} is lent at " in line, process.stderr.read()
        yield process, int(line.partition(" is lent at ")[2].partition(",")[0].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


@contextmanager
def answering(script, handshake=True):
    """The port of a peer that runs `script` on each connection, after a handshake with the secret unless disabled."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def run():
        while not ended.is_set():
            with suppress(OSError):
                sock, _ = listener.accept()
                with sock:
                    script(channel.accept(sock.dup(), None, SEAL, time.monotonic() + PATIENCE_S) if handshake else sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    ended.set()
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def head(place, size, mac):
    return peer.RECORD_HEAD.pack(place, size, mac)


@contextmanager
def opened(port, options="timeout=20", host="127.0.0.1"):
    store = open_store(f"peer://{host}:{port}?{options}")
    try:
        yield store
    finally:
        store.close()


def connected(port, seal=SEAL):
    return channel.connect(("127.0.0.1", port), "127.0.0.1", None, seal, time.monotonic() + PATIENCE_S)


def half_open(port):
    """(socket, the server's answer) of a client that has said hello."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    hello = channel._HELLO.pack(channel._MAGIC, channel.VERSION, bytes(32))
    sock.sendall(hello)
    said = b""
    while len(said) < len(hello) + 32:
        said += sock.recv(1000)
    return sock, said


def ends(sock):
    with suppress(ConnectionResetError):
        return sock.recv(1000) == b""
    return True


def pinned(port, records):
    """A connection whose client has requested records and reads only one frame of the answer."""
    ch = connected(port)
    ch.send(channel.GET, channel.pack_keys([key(i) for i in range(records)], [2 * LARGE] * records))
    ch.expect(channel.RECORD)
    return ch


def can_be_replaced(store):
    """Whether all of the store's room can be taken, which pinned slots prevent."""
    slots = store.reserve([key(1000 + i) for i in range(16)], [2 * LARGE] * 16)
    store.abandon([slot for slot in slots if slot])
    return all(slots)
