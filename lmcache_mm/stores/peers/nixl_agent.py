"""NIXL agents bound to one interface, and the processes that run them: one lends a slab, one reads slabs.

UCX, below NIXL, trusts every host that can reach its port: over TCP such a host can read and write any memory of the
process, registered or not, and so run code there. So these processes hold as little as possible: no secret, no
credentials, only a slab mapped read-only or the memory that reads go to. They run this file alone, without the package,
and so start sooner."""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import logging
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_mm.extras import how_to_install

IDLE_POLL_S = 0.05
POLL_S = 3e-4
START_S = 60.0
RETRY_S = 10.0  # pause before a process that failed to start is started again
LONGEST_S = 30.0  # the longest transfer: slots are lent for no longer
LEAST_WAIT_S = 1e-3  # a socket timeout of 0 would mean non-blocking
SAY_S = 1.0  # timeout of a message to the lending process
NEEDED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")  # environment variables
STAGING_BYTES = 64 << 20  # at least
READY, DONE = b"ready", b"done"
SIOCGIFCONF = 0x8912  # <linux/sockios.h>

logger = logging.getLogger("lmcache_mm")

_AGENT = struct.Struct("<QQI")  # the slab's address in the agent's process, its bytes, bytes of metadata
_READ = struct.Struct("<QI")  # bytes of staging memory, bytes of metadata; metadata and pieces follow
_PIECE = struct.Struct("<QQQ")  # place in the staging memory, address in the other agent's process, bytes
_MOST_SAID = 1 << 18  # bytes per message
_IFREQ = struct.Struct("16s4x4s16x")  # of <net/if.h>, with an IPv4 address


def check_package() -> None:
    """RuntimeError if NIXL is not installed."""
    if importlib.util.find_spec("nixl") is None:
        raise RuntimeError(f"nixl: needs an extra: {how_to_install('nixl')}")


def interface_of(address: str) -> str:
    """The name of this host's interface with that address; ValueError if there is none.

    UCX itself uses the interface's first IPv4 address, or its first IPv6 address if it has no IPv4 address."""
    plain, _, scope = address.partition("%")
    try:
        wanted = ipaddress.ip_address(plain)
    except ValueError:
        raise ValueError(f"nixl: expected an address of this host such as 127.0.0.1, got {address!r}") from None
    if wanted.is_loopback:
        return "lo"
    for name, found in _ipv4_addresses() if wanted.version == 4 else _ipv6_addresses():
        if found == wanted.packed and scope in ("", name):
            return name
    raise ValueError(f"nixl: no interface has the address {address}; UCX_NET_DEVICES can name one")


def _ipv4_addresses() -> Iterator[tuple[str, bytes]]:
    """(interface, address), including secondary addresses."""
    memory = np.zeros(1024 * _IFREQ.size, np.uint8)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = struct.pack("iP", memory.nbytes, memory.ctypes.data)
        (used, _) = struct.unpack("iP", fcntl.ioctl(sock, SIOCGIFCONF, asked))
    for label, found in _IFREQ.iter_unpack(memory[:used].tobytes()):
        yield label.rstrip(b"\0").decode().partition(":")[0], found  # eth0:1 is an address of eth0


def _ipv6_addresses() -> Iterator[tuple[str, bytes]]:
    table = Path("/proc/net/if_inet6")
    for row in table.read_text().splitlines() if table.exists() else ():
        found, *_, name = row.split()
        yield name, bytes.fromhex(found)


def new_agent(interface: str) -> Any:
    """An agent over UCX without its own thread: it makes progress only when called. UCX_* variables that are already
    set take precedence; the missing ones are set in the environment, which UCX reads again later.

    The package must be installed, see `check_package`."""
    api = _nixl()
    os.environ.setdefault("UCX_NET_DEVICES", interface)
    config = api.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
    return api.nixl_agent(uuid.uuid4().hex, config)


def _nixl() -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if not Path("/sys/class/infiniband").exists():
        os.environ.setdefault("UCX_MODULES", "^ib")  # else UCX crashes at exit
    from nixl import _api  # noqa: PLC0415

    return _api


# --- The processes, seen from their parents


class _Process:
    """A process that runs a function of this file. It ends when this object is closed or its parent has ended."""

    def __init__(self, work: str, *arguments: str, fds: Sequence[int] = ()) -> None:
        check_package()
        command = [sys.executable, "-P", __file__, work, str(os.getpid()), *arguments]
        environment = {n: v for n, v in os.environ.items() if n in NEEDED or n.startswith(("UCX_", "NIXL_"))}
        # A socket with message boundaries: nothing to reassemble from untrusted bytes.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # In its own session, so that only its parent gets an interrupt.
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), env=environment, pass_fds=fds, start_new_session=True
                )
        except BaseException:
            self._socket.close()
            raise

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class SlabAgent(_Process):
    """The process that lends a slab. If it ends, which UCX can cause when a reader dies, it is replaced at once, with a
    warning, and counted in `restarts`. Raises RuntimeError if the process does not start."""

    def __init__(self, slab: Path, interface: str) -> None:
        self._slab, self._interface = slab, interface
        self.restarts = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._readers = 0
        self._start()
        try:
            threading.Thread(target=self._watch, name="lmcache_mm nixl", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            super().close()

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._process.wait()
            try:
                self.describe()
            except Exception as error:
                logger.warning("nixl: %s; trying again", error)
                self._closed.wait(RETRY_S)

    def _start(self) -> None:
        super().__init__("lend", self._interface, str(self._slab))
        self._socket.settimeout(START_S)
        try:
            self._described = self._socket.recv(_MOST_SAID)
        except OSError:
            self._described = b""
        if not self._described:
            super().close()
            raise RuntimeError(f"nixl: the process that maps {self._slab} did not start")
        self._socket.settimeout(SAY_S)

    def describe(self) -> bytes:
        """The input of `described_agent`. RuntimeError if the process has ended and cannot be replaced."""
        with self._lock:
            if self.ended and not self._closed.is_set():
                self.restarts += 1
                logger.warning(
                    "nixl: the lending process ended with status %d; it has been replaced %d times so far",
                    *(self._process.returncode, self.restarts),
                )
                super().close()
                self._start()
                self._socket.send(str(self._readers).encode())
            return self._described

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While somebody may be reading: the process polls, which takes a core. OSError if it cannot be told."""
        try:
            self._say(1)
            yield
        finally:
            self._say(-1)

    def _say(self, more: int) -> None:
        with self._lock:
            self._readers += more
            self._socket.send(str(self._readers).encode())


class Reader(_Process):
    """The process that reads slabs into memory that it shares with this one. One thread at a time may use it; after a
    failed call it is unusable.

    A host that can reach its port may have taken it over: nothing it says is trusted, and the staging memory may change
    at any time. A reader that is too late is left alone until its transfer ends, at most LONGEST_S after it began, and
    its data is ignored: if a reader is killed while it reads, UCX can abort the lending process."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.staging = np.empty(0, np.uint8)  # read-only here
        self._ready = self._waited_for = False
        self._begun = time.monotonic()
        self._leaves_until = 0.0
        self._memory = os.memfd_create("lmcache_mm nixl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # If the reader could shrink the memory, reads in this process would fault.
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            super().__init__("read", interface, str(self._memory), fds=(self._memory,))
        except BaseException:
            os.close(self._memory)
            raise

    @property
    def ended(self) -> bool:
        """Whether it can no longer be used."""
        return self._socket.fileno() < 0 or super().ended

    @property
    def leaving(self) -> bool:
        """Whether it must not be closed yet."""
        return time.monotonic() < self._leaves_until and not super().ended

    def close(self) -> None:
        self._let_go()
        super().close()

    def _kill(self) -> None:
        """Closes it without waiting for its end, unlike `close`."""
        self._let_go()
        self._process.kill()

    def _let_go(self) -> None:
        self._socket.close()
        self.staging = np.empty(0, np.uint8)
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def make_room(self, size: int) -> None:
        """Grows `staging` to at least `size` bytes; OSError if it cannot."""
        if size <= len(self.staging):
            return
        size = -(-max(size, STAGING_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            os.ftruncate(self._memory, size)
            self.staging = np.frombuffer(mmap.mmap(self._memory, size, prot=mmap.PROT_READ), np.uint8)
        except OSError:
            self._kill()
            raise

    def wait_until_ready(self, deadline: float) -> bool:
        """Whether it can read. The first call waits until its deadline, later ones do not wait. ConnectionError if the
        process ends, TimeoutError if it has not started after START_S."""
        if self._ready:
            return True
        try:
            left = 0 if self._waited_for else deadline - time.monotonic()
            self._waited_for = True
            self._expect(READY, left)
        except TimeoutError:
            if time.monotonic() < self._begun + START_S:
                return False
            self._kill()
            raise
        except OSError:
            self._kill()
            raise
        self._ready = True
        return True

    def read(self, metadata: bytes, pieces: Sequence[tuple[int, int, int]], deadline: float) -> None:
        """Reads pieces (place in the staging memory, address in the process of the agent with this metadata, bytes).

        OSError if it fails or is not done by the deadline."""
        command = _READ.pack(len(self.staging), len(metadata)) + metadata
        try:
            self._socket.settimeout(max(LEAST_WAIT_S, deadline - time.monotonic()))
            self._socket.send(command + b"".join(_PIECE.pack(*piece) for piece in pieces))
            self._expect(DONE, deadline - time.monotonic())
        except TimeoutError:
            self._leaves_until = time.monotonic() + LONGEST_S
            self._let_go()
            raise
        except OSError:
            self._kill()
            raise

    def _expect(self, message: bytes, timeout_s: float) -> None:
        self._socket.settimeout(max(LEAST_WAIT_S, timeout_s))
        said = self._socket.recv(200)  # empty if it has ended
        if said != message:
            raise ConnectionError(f"nixl: the reading process says {said!r}")


def described_agent(said: bytes) -> tuple[int, int, bytes]:
    """(the slab's address in the agent's process, its bytes, the agent's metadata); ValueError for anything else."""
    if len(said) < _AGENT.size:
        raise ValueError(f"expected an agent's description of {_AGENT.size} bytes or more, got {len(said)}")
    base, slab_bytes, metadata_bytes = _AGENT.unpack_from(said)
    metadata = said[_AGENT.size :]
    if len(metadata) != metadata_bytes:
        raise ValueError(f"expected {metadata_bytes} bytes of an agent's metadata, got {len(metadata)}")
    return base, slab_bytes, metadata


# --- The processes themselves


class _Parent:
    """The process that started this one, which ends with it."""

    def __init__(self, pid: int) -> None:
        self._pid, self._socket = pid, socket.socket(fileno=0)

    def tell(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError:
            os._exit(0)

    def told(self, timeout_s: float = 1.0) -> bytes | None:
        """Its next message; None if it sends nothing in that time."""
        if os.getppid() != self._pid:  # forks of it may keep its end of the socket open
            os._exit(0)
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        try:
            return self._socket.recv(_MOST_SAID) or os._exit(0)
        except OSError:
            os._exit(0)


def lend(parent: _Parent, interface: str, path: str) -> None:
    """Maps the slab, sends the agent's description, and lets others read; the parent says how many are reading."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    slab_bytes = os.fstat(fd).st_size
    slab = np.frombuffer(mmap.mmap(fd, slab_bytes, prot=mmap.PROT_READ), np.uint8)
    agent = new_agent(interface)
    _register(agent, slab)
    metadata = agent.get_agent_metadata()
    parent.tell(_AGENT.pack(slab.ctypes.data, slab_bytes, len(metadata)) + metadata)
    readers = 0
    while True:
        if told := parent.told(0 if readers else IDLE_POLL_S):
            readers = int(told)
        agent.get_new_notifs()  # makes progress on transfers


def read(parent: _Parent, interface: str, fd: str) -> None:
    """Reads what the parent asks for; answers DONE, or reports the failure and ends."""
    try:
        agent = new_agent(interface)
        parent.tell(READY)
        staging, region = np.empty(0, np.uint8), None
        name, known = "", b""
        while True:
            if not (told := parent.told()):
                continue
            staging_bytes, metadata_bytes = _READ.unpack_from(told)
            metadata, pieces = told[_READ.size :][:metadata_bytes], told[_READ.size + metadata_bytes :]
            if staging_bytes != len(staging):
                if region:
                    agent.deregister_memory(region)
                staging = np.frombuffer(mmap.mmap(int(fd), staging_bytes), np.uint8)
                region = _register(agent, staging)
            if metadata != known:
                if name:
                    agent.remove_remote_agent(name)
                name, known = agent.add_remote_agent(metadata), metadata
            to, source = [], []
            for place, address, size in _PIECE.iter_unpack(pieces):
                to.append((staging.ctypes.data + place, size, 0))
                source.append((address, size, 0))
            to, source = (agent.get_xfer_descs(places, "DRAM") for places in (to, source))
            transfer = agent.initialize_xfer("READ", to, source, name)
            state, end = agent.transfer(transfer), time.monotonic() + LONGEST_S
            while state == "PROC" and time.monotonic() < end:
                time.sleep(POLL_S)  # lets the lending process and the verifying threads run
                state = agent.check_xfer_state(transfer)
            if state != "DONE":
                raise RuntimeError(f"a transfer ended as {state}")
            agent.release_xfer_handle(transfer)
            parent.tell(DONE)
    except Exception as error:  # NIXL has exception classes of its own
        parent.tell(f"{type(error).__name__}: {error}".encode())


def _register(agent: Any, memory: np.ndarray) -> Any:
    return agent.register_memory(agent.get_reg_descs([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM"))


if __name__ == "__main__":
    os.dup2(2, 1)  # what libraries print goes to stderr
    {"lend": lend, "read": read}[sys.argv[1]](_Parent(int(sys.argv[2])), *sys.argv[3:])
