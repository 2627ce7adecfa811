"""nixl: another host's slab, read one-sided: what it promises, in good weather and in bad."""

import os
import signal
import struct
import uuid
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

import test_peer
import test_stores
from lmcache_mm import cli, nixl_agent
from lmcache_mm.serve import Server
from lmcache_mm.stores import channel, nixl, open_store, slab, slab_directory
from test_peer import LARGE, PATIENCE_S, SEAL, Written, can_be_replaced, connected, large, serve_process, until
from test_stores import get, key, payload

pytest.importorskip("nixl", reason="needs NIXL: pip install 'lmcache-mm[nixl]'")

secret, url = test_peer.secret, test_peer.url


@pytest.fixture(autouse=True, scope="module")
def tcp():
    """As between hosts: else UCX would read the other process's memory without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield


@pytest.fixture(scope="module")
def lent_slab():
    """(a store of this host, the process that lends it), which take seconds to start."""
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
    """(URL, store) that a process of its own serves."""
    with closing(open_store(f"{url}?capacity=4MiB")) as store:
        yield url, store


@pytest.fixture
def server(lent, agent):
    with closing(Server(lent, ("127.0.0.1", 0), SEAL, None, agent=agent)) as server:
        yield server


@contextmanager
def opened(port, options="timeout=20"):
    with closing(open_store(f"nixl://127.0.0.1:{port}?trusted_network=1&{options}")) as store:
        yield store


@pytest.fixture
def reader(server):
    with opened(server.address[1]) as reader:
        yield reader


@pytest.fixture
def store(lent, reader):
    return Written(lent, reader)


for contract in (
    test_stores.test_what_was_put_is_contained_and_read_back,
    test_stores.test_a_record_of_another_length_is_a_miss_and_stays,
    test_stores.test_one_key_twice_in_a_call_is_one_record,
    test_stores.test_empty_payloads_and_no_keys_are_valid,
    test_stores.test_keys_of_another_length_are_refused,
):
    globals()[contract.__name__] = contract


def test_payloads_of_any_size_come_in_batches(lent, reader, monkeypatch):
    monkeypatch.setattr(nixl, "STAGING_BYTES", 4 * LARGE)
    sizes = [1, 15, 4097, LARGE, LARGE - 1, 0, LARGE + 1, 3 * LARGE, LARGE, 2 * LARGE, 7]
    lent.put([key(i) for i in range(len(sizes))], [large(i, size) for i, size in enumerate(sizes)])
    memory = np.zeros(sum(sizes) + len(sizes), np.uint8)
    ends = np.cumsum([size + 1 for size in sizes])
    buffers = [memory[end - size - 1 : end - 1] for end, size in zip(ends, sizes, strict=True)]
    for _ in range(2):  # once with the connection that is there
        memory[:] = 0
        assert all(reader.get_into([key(i) for i in range(len(sizes))], buffers))
        assert all(bytes(buffer) == large(i, sizes[i]) for i, buffer in enumerate(buffers))
        assert not memory[ends - 1].any()
    assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0


def test_the_process_that_lends_has_the_slab_read_only_and_listens_on_one_interface(lent, agent):
    pid = agent._process.pid
    slabs = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if str(lent.directory) in line]
    assert [(line[1], Path(line[-1]).name) for line in slabs] == [("r--s", "slab")]
    own = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if "socket:" in str(link.readlink())}
    listening = [
        row.split()[1].partition(":")[0]
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if row.split()[3] == "0A" and f"socket:[{row.split()[9]}]" in own
    ]
    assert set(listening) == {struct.pack(">I", 0x7F000001)[::-1].hex().upper()}


def test_the_process_that_lends_is_given_no_secret(lent):
    """Who reaches its port can read its memory."""
    assert "LMCACHE_MM_SECRET" in os.environ
    with closing(nixl_agent.SlabAgent(lent.directory / "slab", "lo")) as agent:
        environment = Path(f"/proc/{agent._process.pid}/environ").read_text()
    names = {entry.partition("=")[0] for entry in environment.split("\0") if entry}
    assert "UCX_TLS" in names
    assert {name for name in names if not name.startswith(("UCX_", "NIXL_"))} <= set(nixl_agent.NEEDED)


def test_a_transfer_that_fails_under_way_leaves_a_store_that_works(lent, reader):
    """As when the other side's process is killed."""
    lent.put([key(1)], [large(1)])
    assert get(reader, 1, LARGE) == large(1)
    real = reader._agent

    class Fails:
        def __getattr__(self, name):
            return getattr(real, name)

        def check_xfer_state(self, transfer):
            raise LookupError("NIXL_ERR_REMOTE_DISCONNECT")

        def transfer(self, transfer):
            real.transfer(transfer)
            return "PROC"

    reader._agent = Fails()
    assert get(reader, 1, LARGE) is None
    assert reader.stats()["errors"] == 1
    reader._agent = real
    until(lambda: reader._breaker.tell(True) or get(reader, 1, LARGE) == large(1), "it is not read again")


def test_a_network_must_be_called_trusted(url, capsys):
    with pytest.raises(ValueError, match="say trusted_network=1 where that is so, or use peer:"):
        open_store("nixl://127.0.0.1:7700")
    assert cli.main(["serve", "--store", f"{url}?capacity=1MiB", "--listen", "127.0.0.1:0", "--nixl"]) == 2
    assert "say --trusted-network where that is so" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no interface has the IPv4 address 192\.0\.2\.1"):
        nixl_agent.interface_of("192.0.2.1")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install 'lmcache-mm\[nixl\]'"):
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
    monkeypatch.setattr("lmcache_mm.serve.LEASE_S", 0.5)
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
        until(lambda: reader.get_into([key(1)], [buffer]) == [True] or reader._breaker.tell(True), "no hit")
        agent._process.send_signal(signal.SIGSTOP)
        try:
            buffer[:] = 5
            assert reader.get_into([key(1)], [buffer]) == [False]
            assert reader._under_way is not None
            reader._breaker.tell(True)
            assert reader.get_into([key(1)], [buffer]) == [False]  # that transfer is still under way
        finally:
            agent._process.send_signal(signal.SIGCONT)
        with agent.busy():
            until(lambda: reader._agent.check_xfer_state(reader._under_way) != "PROC", "it never ends")
        assert (buffer == 5).all()
        reader._breaker.tell(True)
        assert reader.get_into([key(1)], [buffer]) == [True]
        assert bytes(buffer) == large(1, size)


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
            reader._breaker.tell(True)
            until(lambda: get(reader, 1, LARGE) or reader._breaker.tell(True), "it is not read again")
            assert get(reader, 1, LARGE) == large(1)
            again.send_signal(signal.SIGTERM)
            assert again.wait(PATIENCE_S) == 0


def test_serve_ends_when_the_process_that_lends_does(own):
    url, _ = own
    with serve_process(url, "127.0.0.1:0", "--nixl", "--trusted-network") as (process, _):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (child,) = [int(child) for child in children if b"nixl_agent" in Path(f"/proc/{child}/cmdline").read_bytes()]
        signal.pidfd_send_signal(os.pidfd_open(child), signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 2
        assert "the process that lends through NIXL has ended" in process.stderr.read()


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
        ch.send(channel.AGENT, agent.described)
        ch.expect(channel.LEASE)
        with agent.busy():
            ch.send(channel.LEASED, LIES[lie](lent))
            with pytest.raises(OSError):  # the client closes the connection
                ch.expect(channel.RETURN)

    with test_peer.answering(script) as port, opened(port) as reader:
        assert get(reader, 1) is None
        stats = reader.stats()
        assert (stats["errors"], stats["corrupt"]) == (1, lie in ("another slot", "the payload of another key"))


@pytest.mark.parametrize(
    "described",
    [b"", bytes(20), bytes(25), struct.pack("<QQI", 0, 1 << 40, 5) + b"agent"],
    ids=["nothing", "no metadata", "too much", "other metadata"],
)
def test_a_peer_that_describes_no_agent_is_a_miss(described):
    def script(ch):
        ch.expect(channel.AGENT)
        ch.send(channel.AGENT, described)
        with pytest.raises(OSError):
            ch.receive()

    with test_peer.answering(script) as port, opened(port) as reader:
        assert get(reader, 1) is None
        assert reader.stats()["errors"] == 1
