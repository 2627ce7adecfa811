"""The command that lends a store, and two hosts that use it."""

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from lending import LARGE, large, serve_process
from lmcache_mm.commands import certificates, cli
from servers import until
from test_stores import key


def test_serve_says_what_is_wrong(url, capsys, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    taken = f"127.0.0.1:{listener.getsockname()[1]}"
    for arguments, text in (
        (["--store", url, "--listen", "127.0.0.1:0"], "yet: start the engine that creates it, or"),
        (["--store", "mem://?capacity=1MiB", "--listen", "127.0.0.1:0"], "expected shm:///NAME, got 'mem:"),
        (["--store", f"{url}?capacity=1MiB", "--listen", "7700"], "--listen: expected HOST:PORT, got '7700'"),
        (["--store", f"{url}?capacity=1MiB", "--listen", ":7700"], "--listen: expected HOST:PORT, got ':7700'"),
        (["--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--metrics", "x"], "--metrics: expected HOST:"),
        (["--store", f"{url}?capacity=1MiB", "--listen", taken], f"--listen: {taken}: Address already in use"),
        (
            ["--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--metrics", taken],
            f"--metrics: {taken}: Address already in use",
        ),
        (["--store", f"{url}?capacity=1MiB", "--listen", "0.0.0.0:0"], "both sides need certificates"),
        (
            ["--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--connections", "0"],
            "_mm: connections: expected 1 ",
        ),
        (["--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--connections", "-1"], "got -1; each takes"),
        (["--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--connections", "9999999"], "expected 1 to "),
        (["--store", url, "--listen", "127.0.0.1:0", "--tls", str(tmp_path)], "makes a directory per host"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        assert text in capsys.readouterr().err
    listener.close()


READ = """
import sys
from lmcache_mm.stores import open_store
store = open_store(sys.argv[1])
buffer = bytearray(3 << 20)
print(store.get_into([(1).to_bytes(36, "little")], [buffer]), buffer == bytes((1 + k) % 251 for k in range(3 << 20)))
"""


@contextmanager
def network_namespace():
    """A separate network, connected by a pair of interfaces: (prefix of commands to run there, address here, address
    there). It exists as long as a process in it, which ends with this process, so that it disappears even if this
    process is killed."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("network namespaces take root and the commands ip, unshare and nsenter")
    held = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
    number = uuid.uuid4().int
    name, base = f"l{number % 2**32:x}", ipaddress.ip_address("10.192.0.0") + number % (1 << 20) * 4
    here, there = str(base + 1), str(base + 2)
    inside = ["nsenter", f"--net=/proc/{held.pid}/ns/net"]
    try:
        own = os.readlink("/proc/self/ns/net")
        until(lambda: held.poll() is not None or os.readlink(f"/proc/{held.pid}/ns/net") != own, "no namespace")
        if held.poll() is not None:
            pytest.skip("no network namespace can be made here")
        for command in (
            f"ip link add {name}a type veth peer name {name}b netns {held.pid}",
            f"ip addr add {here}/30 dev {name}a",
            f"ip link set {name}a up",
            f"{' '.join(inside)} ip addr add {there}/30 dev {name}b",
            f"{' '.join(inside)} ip link set {name}b up",
        ):
            made = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no pair of network interfaces can be made here: {made.stderr.strip()}")
        yield inside, here, there
    finally:
        held.communicate()
        subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)


def test_two_network_namespaces_read_each_other(url, lent, tmp_path):
    lent.put([key(1)], [large(1, 3 * LARGE)])
    with network_namespace() as (inside, here, there):
        certificates.make(tmp_path / "tls", [here, there], 1)
        with serve_process(url, f"{here}:0", "--tls", str(tmp_path / "tls" / here)) as (_, port):
            peer_url = f"peer://{here}:{port}?timeout=20&tls={tmp_path}/tls/{there}"
            read = subprocess.run(
                [*inside, sys.executable, "-c", READ, peer_url], capture_output=True, text=True, check=False
            )
        assert read.stdout.split() == ["[True]", "True"], read.stderr


NAMESPACE = """
import os, signal, sys
sys.path[:] = sys.argv[1:]
from test_serve import network_namespace
with network_namespace() as (inside, _, _):
    print(inside[1].split("/")[2], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_network_namespace_whose_test_is_killed():
    def interfaces():
        return set(os.listdir("/sys/class/net"))

    before = interfaces()
    with network_namespace():  # at the same time as another run's
        done = subprocess.run([sys.executable, "-c", NAMESPACE, *sys.path], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        until(lambda: not Path(f"/proc/{done.stdout.strip()}").exists(), "its process lives")
    until(lambda: interfaces() <= before, "its interfaces are left")
