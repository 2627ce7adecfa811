"""nixl: another host's slab, read one-sided: its promises, with and without failures."""

import os
import secrets
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import test_stores
from lending import LARGE, SEAL, SECRET, answering, can_be_replaced, connected, large, serve_process
from lmcache_mm.commands import cli
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.peers import channel, nixl, nixl_agent
from lmcache_mm.stores.peers.server import Server
from servers import PATIENCE_S, until
from test_stores import get, key, payload

pytest.importorskip("nixl", reason="needs NIXL: pip install -e '.[nixl]'")


@pytest.fixture(autouse=True, scope="module")
def tcp():
    """Forces TCP, as between hosts: else UCX would read the other process's memory directly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield
        for reader in idle_readers:
            reader.close()


@pytest.fixture(scope="module")
def lent_slab():
    """(a store of this host, the process that lends it). Shared by tests, since it takes seconds to start."""
    url = f"shm:///test-{uuid.uuid4().hex}"
    with (
        closing(open_store(f"{url}?capacity=32MiB")) as store,
        closing(nixl_agent.SlabAgent(store.directory / "slab", "lo")) as agent,
    ):
        yield store, agent
    assert slab.remove(slab_directory(url)[1])


@pytest.fixture
def lent(lent_slab):
    lent_slab[0].clear()
    return lent_slab[0]


@pytest.fixture
def agent(lent_slab):
    return lent_slab[1]


@pytest.fixture
def own(url):
    """(URL, store), served by a separate process."""
    with closing(open_store(f"{url}?capacity=4MiB")) as store:
        yield url, store


@pytest.fixture
def server(lent, agent):
    with closing(Server(lent, ("127.0.0.1", 0), SEAL, None, agent=agent)) as server:
        yield server


idle_readers = []


@contextmanager
def opened(port, options="timeout=20", fresh=False):
    """A store; unless `fresh`, it reuses the last one's process, since starting takes half a second."""
    with closing(open_store(f"nixl://127.0.0.1:{port}?trusted_network=1&{options}")) as store:
        if not fresh:
            store._readers.extend(idle_readers)
            idle_readers.clear()
        yield store
        if not fresh:
            store._pool.shutdown()
            idle_readers.extend(one for one in store._readers if not one.ended)
            store._readers = [one for one in store._readers if one.ended]


@pytest.fixture
def reader(server):
    with opened(server.address[1]) as reader:
        yield reader


for contract in (
    test_stores.test_what_was_put_is_contained_and_read_back,
    test_stores.test_a_record_of_another_length_is_a_miss_and_stays,
    test_stores.test_one_key_twice_in_a_call_is_one_record,
    test_stores.test_empty_payloads_and_no_keys_are_valid,
    test_stores.test_keys_of_another_length_are_refused,
):
    globals()[contract.__name__] = contract


def test_payloads_of_any_size_come_in_batches(lent, server, monkeypatch):
    monkeypatch.setattr(nixl_agent, "STAGING_BYTES", 4 * LARGE)
    sizes = [1, 15, 4097, LARGE, LARGE - 1, 0, LARGE + 1, 3 * LARGE, LARGE, 2 * LARGE, 7]
    lent.put([key(i) for i in range(len(sizes))], [large(i, size) for i, size in enumerate(sizes)])
    memory = np.zeros(sum(sizes) + len(sizes), np.uint8)
    ends = np.cumsum([size + 1 for size in sizes])
    buffers = [memory[end - size - 1 : end - 1] for end, size in zip(ends, sizes, strict=True)]
    with opened(server.address[1], fresh=True) as reader:
        assert get(reader, 0, 1) == large(0, 1)  # more room is needed later
        for _ in range(2):  # the first time with the existing connection
            memory[:] = 0
            assert all(reader.get_into([key(i) for i in range(len(sizes))], buffers))
            assert all(bytes(buffer) == large(i, sizes[i]) for i, buffer in enumerate(buffers))
            assert not memory[ends - 1].any()
        assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0


def listening(pid):
    """(address, port), as in /proc, of the process's listening sockets."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            own.add(str(link.readlink()))
    return {
        tuple(row.split()[1].split(":"))
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if row.split()[3] == "0A" and f"socket:[{row.split()[9]}]" in own
    }


LOOPBACK = struct.pack(">I", 0x7F000001)[::-1].hex().upper()


def environment(pid):
    return {entry.partition("=")[0] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if entry}


def mapped(pid):
    """(begin, end, rights, path) of the process's mappings."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, _, _, _, *path = line.split(maxsplit=5)
        yield *(int(at, 16) for at in place.split("-")), rights, path[0] if path else ""


def read_again(reader, size=LARGE):
    """Reads again, skipping the pause."""

    def reads():
        reader._breaker.tell(True)
        return get(reader, 1, size) == large(1, size)

    until(reads, "it is not read again")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_that_lends_has_the_slab_read_only_and_listens_on_one_interface(lent, agent):
    pid = agent._process.pid
    slabs = [(rights, Path(path).name) for _, _, rights, path in mapped(pid) if str(lent.directory) in path]
    assert slabs == [("r--s", "slab")]
    assert {address for address, _ in listening(pid)} == {LOOPBACK}


def test_the_processes_are_given_no_secret(agent, reader):
    """A host that can reach their ports can read their memory."""
    get(reader, 1)
    assert "LMCACHE_MM_SECRET" in os.environ
    for pid in (agent._process.pid, reader._readers[-1]._process.pid):
        names = environment(pid)
        assert "UCX_TLS" in names
        assert {name for name in names if not name.startswith(("UCX_", "NIXL_"))} <= set(nixl_agent.NEEDED)


def test_the_process_that_reads_has_no_memory_of_its_parents_but_staging(lent, reader):
    lent.put([key(1)], [large(1)])
    assert get(reader, 1, LARGE) == large(1)
    mine = np.frombuffer(secrets.token_bytes(64) + bytes(LARGE), np.uint8).copy()
    assert reader.get_into([key(2)], [mine]) == [False]
    pid = reader._readers[-1]._process.pid
    shared = [path for _, _, rights, path in mapped(pid) if rights.startswith("rw") and rights.endswith("s")]
    assert shared == ["/memfd:lmcache_mm nixl (deleted)"]
    found = set()
    wanted = {"secret": SECRET, "key": SEAL._mac_key, "buffer": mine[:64].tobytes(), "payload": large(1)}
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for begin, end, rights, path in mapped(pid):
            if rights.startswith("rw") and path != "[vvar]":
                memory.seek(begin)
                content = memory.read(end - begin)
                found |= {name for name, what in wanted.items() if what in content}
    assert found == {"payload"}


def test_the_engines_process_listens_nowhere(lent, server):
    lent.put([key(1)], [payload(1)])
    before = listening(os.getpid())
    assert before
    with opened(server.address[1]) as reader:
        assert get(reader, 1) == payload(1)
        assert listening(os.getpid()) == before
        assert {address for address, _ in listening(reader._readers[-1]._process.pid)} == {LOOPBACK}


# --- What others may do to the process that reads


@pytest.mark.parametrize("when", ["between copy and check", "before the copy"])
def test_staging_that_is_altered_gives_no_wrong_payload(lent, reader, monkeypatch, when):
    lent.put([key(i) for i in range(4)], [large(i) for i in range(4)])
    assert get(reader, 0, LARGE) == large(0)

    def alter():
        os.pwrite(reader._readers[-1]._memory, bytes(4 * LARGE), 0)

    verify, read = reader._seal.verify, reader._readers[-1].read

    def then_altered(*arguments):
        found = verify(*arguments)
        alter()
        return found

    if when == "before the copy":
        monkeypatch.setattr(reader._readers[-1], "read", lambda *arguments: read(*arguments) or alter())
    else:
        monkeypatch.setattr(reader._seal, "verify", then_altered)
    buffers = [bytearray(LARGE) for _ in range(4)]
    found = reader.get_into([key(i) for i in range(4)], buffers)
    assert found == [when != "before the copy", False, False, False]
    assert not found[0] or buffers[0] == large(0)
    assert reader.stats()["corrupt"] == found.count(False)


def test_a_process_that_is_killed_between_calls_is_replaced(lent, reader):
    lent.put([key(1)], [large(1)])
    assert get(reader, 1, LARGE) == large(1)
    reader._readers[-1]._process.kill()
    reader._readers[-1]._process.wait()
    assert get(reader, 1, LARGE) == large(1)
    assert reader.stats()["errors"] == 0
    assert len(reader._readers) == 1


def test_a_process_that_is_killed_in_a_call_is_a_miss_at_once(lent, server):
    lent.put([key(1)], [large(1)])
    with opened(server.address[1], "timeout=60") as reader:
        assert get(reader, 1, LARGE) == large(1)
        process = reader._readers[-1]._process
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.2, process.kill).start()
        begin = time.monotonic()
        assert get(reader, 1, LARGE) is None
        assert time.monotonic() < begin + PATIENCE_S
        assert reader.stats()["errors"] == 1
        until(lambda: any(not one.ended for one in reader._readers), "no other one is started")  # without another call
        reader._breaker.tell(True)
        assert get(reader, 1, LARGE) == large(1)


def test_a_process_that_is_slow_to_start_is_waited_for_once_and_nobody_is_charged(lent, server, tmp_path, monkeypatch):
    lent.put([key(1)], [large(1)])
    go_on = tmp_path / "go on"
    program = tmp_path / "slow.py"
    program.write_text(
        "import pathlib, runpy, time\n"
        f"while not pathlib.Path({str(go_on)!r}).exists():\n"
        "    time.sleep(0.01)\n"
        f"runpy.run_path({nixl_agent.__file__!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(nixl_agent, "__file__", str(program))
    with opened(server.address[1], "timeout=0.3", fresh=True) as reader:
        began = time.monotonic()
        assert get(reader, 1, LARGE) is None
        assert time.monotonic() - began >= 0.3
        monkeypatch.setattr(reader, "_timeout_s", 2 * PATIENCE_S)
        assert get(reader, 1, LARGE) is None
        assert time.monotonic() < began + PATIENCE_S
        assert reader.stats()["errors"] == 0
        go_on.touch()
        until(lambda: get(reader, 1, LARGE) == large(1), "it does not start")


def test_a_process_that_reads_ends_with_its_parent_though_a_fork_keeps_the_socket():
    program = (
        "import os, sys, time\n"
        "import nixl_agent\n"
        "reader = nixl_agent.Reader('lo')\n"
        "child = os.fork()\n"
        "print(reader._process.pid, child, flush=child > 0) if child else None\n"
        "time.sleep(60)\n"
    )
    path = str(Path(nixl_agent.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{program}"], stdout=-1
    ) as parent:
        pid, fork = map(int, parent.stdout.readline().split())
        try:
            assert alive(pid)
            parent.kill()
            parent.wait()
            until(lambda: not alive(pid), "it does not end")
            assert alive(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_closing_leaves_no_process_and_no_memory(lent, server):
    lent.put([key(1)], [large(1)])

    def memories():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "lmcache_mm nixl" in line] + [
            link for link in Path("/proc/self/fd").iterdir() if "lmcache_mm nixl" in os.path.realpath(link)
        ]

    before = memories()
    with opened(server.address[1], fresh=True) as reader:
        assert get(reader, 1, LARGE) == large(1)
        pid = reader._readers[-1]._process.pid
        assert len(memories()) > len(before)
    assert memories() == before
    assert not Path(f"/proc/{pid}").exists()


def test_a_network_must_be_called_trusted(url, capsys):
    with pytest.raises(ValueError, match="add trusted_network=1 if you trust all those hosts, or use peer:"):
        open_store("nixl://127.0.0.1:7700")
    assert cli.main(["serve", "--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--nixl"]) == 2
    assert "add --trusted-network if all are trusted" in capsys.readouterr().err


def test_every_address_of_an_interface_names_it(tmp_path):
    for nowhere in ("198.51.100.1", "2001:db8::1"):
        with pytest.raises(ValueError, match=f"no interface has the address {nowhere}"):
            nixl_agent.interface_of(nowhere)
    with pytest.raises(ValueError, match=r"expected an address of this host such as 127\.0\.0\.1, got 'localhost'"):
        nixl_agent.interface_of("localhost")
    addresses = "10.9.0.1/24", "10.9.0.2/24", "10.9.0.3/24 label lo:1", "2001:db8::1/64", "2001:db8::2/64"
    commands = [f"ip addr add {address} dev lo" for address in addresses]
    names = [address.partition("/")[0] for address in addresses]
    path = str(Path(nixl_agent.__file__).parent)
    program = (
        f"import sys; sys.path.insert(0, {path!r}); import nixl_agent; print([*map(nixl_agent.interface_of, {names})])"
    )
    script = tmp_path / "script"
    script.write_text(" && ".join(["ip link set lo up", *commands]) + f' || exit 77\n{sys.executable} -c "{program}"')
    ran = subprocess.run(["unshare", "-rn", "sh", script], capture_output=True, text=True, check=False)
    if ran.returncode == 77 or "unshare: " in ran.stderr:
        pytest.skip(f"there is no network of one's own here: {ran.stderr}")
    assert ran.stdout.strip() == str(["lo"] * len(names)), ran.stderr


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install -e '\.\[nixl\]'"):
        open_store("nixl://127.0.0.1:7700?trusted_network=1")


def test_a_server_without_an_agent_disconnects(lent):
    lent.put([key(1)], [payload(1)])
    with closing(Server(lent, ("127.0.0.1", 0), SEAL, None)) as server, opened(server.address[1]) as reader:
        assert get(reader, 1) is None
        assert reader.stats()["errors"] == 1


def test_slots_stay_leased_until_they_are_returned_or_the_client_dies(lent, server):
    ch = connected(server.address[1])
    for ends in (lambda: ch.send(channel.RETURN, b""), ch.close):
        lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
        ch.send(channel.LEASE, channel.pack_keys([key(i) for i in range(16)], [2 * LARGE] * 16))
        _, body = ch.expect(channel.LEASED)
        assert len(body) == 16 * nixl.LEASED_SLOT.size
        assert not can_be_replaced(lent)
        ends()
        until(lambda: can_be_replaced(lent), "slots stay leased")


def test_a_lease_ends_by_itself(lent, server, monkeypatch):
    monkeypatch.setattr("lmcache_mm.stores.peers.server.LEASE_S", 0.5)
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    ch = connected(server.address[1])
    ch.send(channel.LEASE, channel.pack_keys([key(i) for i in range(16)], [2 * LARGE] * 16))
    ch.expect(channel.LEASED)
    until(lambda: can_be_replaced(lent), "slots stay leased")
    ch.close()


def test_a_transfer_that_stalls_costs_the_timeout_and_leaves_buffers_alone(lent, server, agent):
    size = 8 * LARGE
    lent.put([key(1)], [large(1, size)])
    with opened(server.address[1], "timeout=1") as reader:
        buffer = np.zeros(size, np.uint8)
        read_again(reader, size)
        stalled = reader._readers[-1]._process.pid
        agent._process.send_signal(signal.SIGSTOP)
        try:
            buffer[:] = 5
            begin = time.monotonic()
            assert reader.get_into([key(1)], [buffer]) == [False]
            assert time.monotonic() < begin + PATIENCE_S
            assert any(one.leaving for one in reader._readers)
            assert alive(stalled)
            until(lambda: not reader._readers[-1].ended, "no other process is started meanwhile")
        finally:
            agent._process.send_signal(signal.SIGCONT)
        until(lambda: not alive(stalled), "its process does not end with the transfer")
        assert (buffer == 5).all()
        assert not agent.ended
        read_again(reader, size)
        until(lambda: get(reader, 1, size) and len(reader._readers) == 1, "its process is kept")


def test_a_process_that_lends_and_takes_no_word_is_an_error_and_is_used_again(lent, reader, agent):
    lent.put([key(1)], [large(1)])
    assert agent._socket.gettimeout() == nixl_agent.SAY_S
    agent._socket.settimeout(0.1)
    agent._process.send_signal(signal.SIGSTOP)

    def say():
        for _ in range(1 << 16):
            with agent.busy():
                pass

    try:
        with pytest.raises(TimeoutError):
            say()
    finally:
        agent._process.send_signal(signal.SIGCONT)
        agent._socket.settimeout(nixl_agent.SAY_S)
    assert agent._readers == 0
    read_again(reader)


def test_a_server_that_is_killed_and_comes_back_is_read_again(own):
    url, store = own
    store.put([key(1)], [large(1)])
    arguments = ("--nixl", "--trusted-network")
    with serve_process(url, "127.0.0.1:0", *arguments) as (process, port), opened(port, "timeout=5") as reader:
        assert get(reader, 1, LARGE) == large(1)
        process.kill()
        process.wait()
        assert get(reader, 1, LARGE) is None
        with serve_process(url, f"127.0.0.1:{port}", *arguments) as (again, _):
            read_again(reader)
            again.send_signal(signal.SIGTERM)
            assert again.wait(PATIENCE_S) == 0


def test_a_process_that_lends_and_has_ended_is_started_again(own):
    url, store = own
    store.put([key(1)], [large(1)])
    with (
        serve_process(url, "127.0.0.1:0", "--nixl", "--trusted-network") as (process, port),
        opened(port, "timeout=5") as reader,
    ):
        assert get(reader, 1, LARGE) == large(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (child,) = [int(child) for child in children if b"nixl_agent" in Path(f"/proc/{child}/cmdline").read_bytes()]
        signal.pidfd_send_signal(os.pidfd_open(child), signal.SIGKILL)
        read_again(reader)
        assert process.poll() is None


def test_a_process_that_lends_and_has_ended_is_replaced_at_once_and_counted(lent_slab, caplog):
    slab = lent_slab[0].directory / "slab"
    with closing(nixl_agent.SlabAgent(slab, "lo")) as agent, agent.busy():
        for restarts in (1, 2):
            described, ended = agent._described, agent._process
            ended.kill()
            until(lambda n=restarts, old=described: agent.restarts == n and agent._described != old, "not replaced")
            assert agent.describe() == agent._described
            assert agent.restarts == restarts
            assert agent._process is not ended
            assert f"status -9; it has been replaced {restarts} times" in caplog.text
    assert agent.ended
    assert agent.restarts == 2


# --- Peers that lie


def slot(place, offset, mac):
    return nixl.LEASED_SLOT.pack(place, offset, mac)


def right(lent, i=1):
    (lent_slot,) = lent.lend([key(i)], [100])
    lent.release([lent_slot])
    return lent.offset(lent_slot)


LIES = {
    "outside the slab": lambda lent: slot(0, lent.capacity - 99, bytes(32)),
    "far outside the slab": lambda lent: slot(0, (1 << 64) - 50, bytes(32)),
    "another place": lambda lent: slot(1, right(lent), SEAL.mac(key(1), payload(1))),
    "a place twice": lambda lent: slot(0, right(lent), SEAL.mac(key(1), payload(1))) * 2,
    "another slot": lambda lent: slot(0, right(lent, 2), SEAL.mac(key(1), payload(1))),
    "the payload of another key": lambda lent: slot(0, right(lent, 2), SEAL.mac(key(2), payload(2))),
    "no slot": lambda lent: b"short",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_about_slots_is_a_miss(lent, agent, lie):
    lent.put([key(1), key(2)], [payload(1), payload(2)])

    def script(ch):
        ch.expect(channel.AGENT)
        ch.send(channel.AGENT, agent.describe())
        ch.expect(channel.LEASE)
        with agent.busy():
            ch.send(channel.LEASED, LIES[lie](lent))
            with pytest.raises(OSError):  # the client closes the connection
                ch.expect(channel.RETURN)

    with answering(script) as port, opened(port) as reader:
        assert get(reader, 1) is None
        stats = reader.stats()
        assert (stats["errors"], stats["corrupt"]) == (1, lie in ("another slot", "the payload of another key"))


# What a compromised process may do instead of reading: `staging` is a descriptor of the memory.
ANSWERS = {
    "it ends at once": "",
    "it is not ready": "say(b'done')",
    "it ends instead": "say(b'ready'); hear()",
    "nothing": "say(b'ready'); hear(); time.sleep(60)",
    "no command is taken": "say(b'ready'); time.sleep(60)",
    "an empty message": "say(b'ready'); hear(); say(b''); time.sleep(60)",
    "garbage": "say(b'ready'); hear(); say(bytes(range(256)) * 500); time.sleep(60)",
    "done, though it is not": "say(b'ready'); hear(); say(b'done'); time.sleep(60)",
    "done, before it is asked": "say(b'ready'); say(b'done'); say(b'done'); time.sleep(60)",
    "a memory that is taken away": "say(b'ready'); hear(); shrink(); say(b'done'); time.sleep(60)",
    "a memory that is made larger": "os.ftruncate(staging, 1 << 40); say(b'ready'); time.sleep(60)",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_process_that_lies_is_a_miss(lent, server, tmp_path, monkeypatch, answer):
    lent.put([key(1)], [large(1)])
    program = tmp_path / "lies.py"
    program.write_text(
        "import os, socket, sys, time\n"
        "sock, staging = socket.socket(fileno=0), int(sys.argv[-1])\n"
        "say, hear = sock.send, lambda: sock.recv(1 << 20)\n"
        "def shrink():\n"
        "    try: os.ftruncate(staging, 0)\n"
        "    except PermissionError: pass\n"
        f"{ANSWERS[answer]}\n"
    )
    monkeypatch.setattr(nixl_agent, "__file__", str(program))
    started = []
    monkeypatch.setattr(nixl, "Reader", lambda interface: started.append(nixl_agent.Reader(interface)) or started[-1])
    with opened(server.address[1], "timeout=0.5", fresh=True) as reader:
        begin = time.monotonic()
        assert get(reader, 1, LARGE) is None
        assert time.monotonic() < begin + PATIENCE_S
        assert reader.stats()["errors"] == 1
        undetected = answer.startswith("done") or answer == "a memory that is taken away"
        assert reader.stats()["corrupt"] == undetected
        assert started[0].ended != undetected


@pytest.mark.parametrize(
    "described, text",
    [
        (b"", "expected an agent's description of 20 bytes or more, got 0"),
        (struct.pack("<QQI", 0, 1 << 40, 5) + b"met", "expected 5 bytes of an agent's metadata, got 3"),
    ],
)
def test_a_description_of_no_agent_is_told_what_is_wrong(described, text):
    with pytest.raises(ValueError, match=text):
        nixl_agent.described_agent(described)


@pytest.mark.parametrize(
    "described",
    [b"", struct.pack("<QQI", 0, 1 << 40, 0), bytes(25), struct.pack("<QQI", 0, 1 << 40, 5) + b"agent"],
    ids=["nothing", "no metadata", "too much", "other metadata"],
)
def test_a_peer_that_describes_no_agent_is_a_miss(described):
    def script(ch):
        ch.expect(channel.AGENT)
        ch.send(channel.AGENT, described)
        with suppress(OSError):  # the client closes the connection
            ch.expect(channel.LEASE)
            ch.send(channel.LEASED, slot(0, 0, bytes(32)))
            ch.receive()

    with answering(script) as port, opened(port) as reader:
        assert get(reader, 1) is None
        assert reader.stats()["errors"] == 1
