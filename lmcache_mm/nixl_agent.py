"""NIXL agents bound to one interface, and the process that maps a slab read-only and lets other hosts read it.

UCX, below NIXL, trusts whoever reaches its port: over TCP it reads and writes any memory of the process, registered or
not. So that process has the slab, read-only, and as little else as it can run with: no secret, no credentials.
"""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

IDLE_POLL_S = 0.05
START_S = 60.0
NEEDED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")  # of the environment
SIOCGIFADDR = 0x8915  # <linux/sockios.h>

_AGENT = struct.Struct("<QQI")  # where the slab lies in the agent's process, its bytes, bytes of metadata
_environment = threading.Lock()


def check_package() -> None:
    """RuntimeError where NIXL is not installed."""
    if importlib.util.find_spec("nixl") is None:
        raise RuntimeError("nixl: needs an extra: pip install 'lmcache-mm[nixl]'")


def interface_of(address: str) -> str:
    """The name of the interface that has an address of this host; ValueError where none has."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(sock, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # one without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    raise ValueError(f"nixl: no interface has the IPv4 address {address}; UCX_NET_DEVICES can name one")


def new_agent(interface: str) -> Any:
    """An agent over UCX, without a thread of its own: it moves when it is asked. The environment's UCX_* go first.

    The package must be there, see `check_package`."""
    with _ucx_environment(interface):
        from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415

        config = nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
        return nixl_agent(uuid.uuid4().hex, config)


@contextmanager
def _ucx_environment(interface: str) -> Iterator[None]:
    """What UCX reads when an agent is made."""
    wanted = {"UCX_NET_DEVICES": interface, "NIXL_LOG_LEVEL": "ERROR"}
    if not Path("/sys/class/infiniband").exists():
        wanted["UCX_MODULES"] = "^ib"  # else UCX crashes at exit
    with _environment:
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


class SlabAgent:
    """The process that lets a slab be read, as its parent sees it. Raises RuntimeError where it does not come up."""

    def __init__(self, slab: Path, interface: str) -> None:
        check_package()
        program = "import sys; from lmcache_mm.nixl_agent import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", program, str(slab), interface]
        environment = {n: v for n, v in os.environ.items() if n in NEEDED or n.startswith(("UCX_", "NIXL_"))}
        # Of a session of its own, so that an interrupt is its parent's alone: it ends with its input.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], START_S)[0]
        said = self._process.stdout.read(1 << 16) if ready else b""
        if not said:
            self.close()
            raise RuntimeError(f"nixl: the process that maps {slab} did not start")
        self.described = said  # what `described_agent` reads

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While somebody may be reading: the process polls, which takes a core."""
        self._say(b"+")
        try:
            yield
        finally:
            self._say(b"-")

    def _say(self, word: bytes) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(word)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def described_agent(said: bytes) -> tuple[int, int, bytes]:
    """(where the slab lies in the agent's process, its bytes, the agent's metadata); ValueError for anything else."""
    if len(said) < _AGENT.size:
        raise ValueError("no description of an agent")
    base, slab_bytes, metadata_bytes = _AGENT.unpack_from(said)
    metadata = said[_AGENT.size :]
    if len(metadata) != metadata_bytes:
        raise ValueError("no description of an agent")
    return base, slab_bytes, metadata


def main(path: str, interface: str) -> None:
    """Maps the slab, writes the agent's description to stdout, and serves until stdin ends; `+` and `-` there say how
    many are reading."""
    said = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    slab_bytes = os.fstat(fd).st_size
    slab = np.frombuffer(mmap.mmap(fd, slab_bytes, mmap.MAP_SHARED, mmap.PROT_READ), dtype=np.uint8)
    agent = new_agent(interface)
    agent.register_memory(agent.get_reg_descs([(slab.ctypes.data, slab_bytes, 0, "slab")], "DRAM"))
    metadata = agent.get_agent_metadata()
    os.write(said, _AGENT.pack(slab.ctypes.data, slab_bytes, len(metadata)) + metadata)
    readers = 0
    while True:
        if select.select([0], [], [], 0 if readers else IDLE_POLL_S)[0]:
            words = os.read(0, 4096)
            if not words:
                return
            readers += words.count(b"+") - words.count(b"-")
        agent.get_new_notifs()  # moves what is under way
