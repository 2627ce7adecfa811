"""peer: another host's store over the network: its promises, with and without failures."""

import ipaddress
import os
import select
import shutil
import signal
import socket
import ssl
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
from hypothesis import given, settings
from hypothesis import strategies as st

import test_stores
from lmcache_mm import lane
from lmcache_mm.commands import certificates, cli
from lmcache_mm.secret import MAC_BYTES, Seal
from lmcache_mm.stores import breaker, open_store, slab_directory
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.peers import channel, peer
from lmcache_mm.stores.peers.channel import ProtocolError, Tls
from lmcache_mm.stores.peers.server import Server
from test_stores import OWNER, get, key, payload

SECRET = b"a secret of the tests"
SEAL = Seal(SECRET)
LARGE = 1 << 20
PATIENCE_S = 30  # no assertion depends on time: after this long something is stuck


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.delenv("LMCACHE_MM_SECRET_FILE", raising=False)
    monkeypatch.setenv("LMCACHE_MM_SECRET", SECRET.decode())


@pytest.fixture
def url():
    """The URL of a shm: store that does not exist yet."""
    url = f"shm:///test-{uuid.uuid4().hex}"
    yield url
    directory = slab_directory(url)[1]
    assert not directory.exists() or slab.remove(directory)


@pytest.fixture
def lent(url):
    """A store of this host that is lent."""
    store = open_store(f"{url}?capacity=32MiB")
    yield store
    store.close()


@contextmanager
def serving(store, seal=SEAL, tls=None, connections=64, port=0):
    server = Server(store, ("127.0.0.1", port), seal, tls, connections)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def opened(port, options="timeout=20", host="127.0.0.1"):
    store = open_store(f"peer://{host}:{port}?{options}")
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def server(lent):
    with serving(lent) as server:
        yield server


@pytest.fixture
def reader(server):
    with opened(server.address[1]) as store:
        yield store


def large(i, size=LARGE):
    """payload(i, size), made faster."""
    return np.resize(np.roll(np.arange(251, dtype=np.uint8), -i), size).tobytes()


def until(condition, what):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def connected(port, seal=SEAL):
    return channel.connect(("127.0.0.1", port), "127.0.0.1", None, seal, time.monotonic() + PATIENCE_S)


# --- The contract


class Written:
    """A store that writes to the other host's store and reads through the peer's."""

    def __init__(self, lent, reader):
        self.put = lent.put
        self.delete = lent.delete
        self.flush = lent.flush
        for name in ("contains", "get_into", "stats"):
            setattr(self, name, getattr(reader, name))


@pytest.fixture
def store(lent, reader):
    return Written(lent, reader)


for contract in (
    test_stores.test_what_was_put_is_contained_and_read_back,
    test_stores.test_payloads_of_any_size_at_any_address_are_read_back,
    test_stores.test_a_record_of_another_length_is_a_miss_and_stays,
    test_stores.test_a_key_that_is_there_keeps_its_record,
    test_stores.test_one_key_twice_in_a_call_is_one_record,
    test_stores.test_empty_payloads_and_no_keys_are_valid,
    test_stores.test_deleted_records_are_gone_and_unknown_keys_are_ignored,
    test_stores.test_keys_of_another_length_are_refused,
):
    globals()[contract.__name__] = contract


def test_a_peer_is_read_and_nothing_else(lent, reader):
    lent.put([key(1)], [payload(1)], owner=OWNER)
    reader.put([key(2)], [payload(2)])
    reader.delete([key(1)])
    reader.flush()
    with pytest.raises(RuntimeError, match="call it on its own host's store"):
        reader.forget(OWNER)
    with pytest.raises(ValueError, match="keys: expected 32 to 64 bytes"):
        reader.delete([b"key"])
    with pytest.raises(ValueError, match="buffers: expected 1, as many as keys, got 2"):
        reader.get_into([key(1)], [bytearray(1), bytearray(1)])
    reader.hold([key(1)])()
    assert reader.contains([key(1), key(2)]) == [True, False]
    stats = reader.stats()
    assert (stats["dropped_puts"], stats["capacity_bytes"], reader.moment()) == (1, 0, 0)
    assert (reader.local, reader.read_only) == (False, True)


def test_a_damaged_record_is_a_miss_and_is_removed_where_it_lies(lent, reader):
    lent.put([key(1), key(2)], [payload(1), payload(2)], checksums=[1, 2])
    lent.put([key(3)], [payload(3)])
    assert reader.get_into([key(i) for i in (1, 2, 3)], [bytearray(100) for _ in range(3)]) == [False, False, True]
    assert lent.contains([key(1), key(2), key(3)]) == [False, False, True]
    assert lent.stats()["corrupt"] == 2
    assert reader.stats()["errors"] == 0


def test_a_record_damaged_after_it_was_read_once_is_a_miss_and_the_peer_is_not_left_alone(lent, reader):
    """A cached MAC says nothing about the current bytes."""
    lent.put([key(1), key(2)], [payload(1), payload(2)])
    assert get(reader, 1) == payload(1)
    (slot,) = lent.lend([key(1)], [100])
    lent.view(slot)[50] ^= 1
    lent.release([slot])
    assert get(reader, 1) is None
    assert lent.contains([key(1)]) == [False]
    assert get(reader, 2) == payload(2)
    assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0


def test_what_no_socket_says_is_a_miss_too(monkeypatch):
    with closing(open_store("peer://127.0.0.1:1?timeout=1")) as reader:

        def fails(deadline):
            raise UnicodeError("a label is too long")

        monkeypatch.setattr(reader, "_connect", fails)
        assert reader.contains([key(1)]) == [False]
        assert reader.stats()["errors"] == 1


def test_no_job_begins_after_its_call_has_ended():
    call, begun, go_on = lane.Call(), threading.Event(), threading.Event()
    running = threading.Thread(target=call.run, args=(lambda: begun.set() or go_on.wait(10),))
    running.start()
    assert begun.wait(10)
    ended = threading.Thread(target=call.end)
    ended.start()
    ended.join(0.1)
    assert ended.is_alive()  # it waits for calls that have begun
    go_on.set()
    ended.join(10)
    assert not ended.is_alive()
    ran = []
    call.run(ran.append, 1)
    assert not ran


def test_ten_thousand_keys_of_which_every_other_is_missing(lent, reader):
    there = range(0, 2000, 2)
    lent.put([key(i) for i in there], [payload(i, 40) for i in there])
    keys = [key(i) for i in range(10_000)]
    assert reader.contains(keys) == [i < 2000 and i % 2 == 0 for i in range(10_000)]
    buffers = [bytearray(40) for _ in keys]
    found = reader.get_into(keys, buffers)
    assert found == [i < 2000 and i % 2 == 0 for i in range(10_000)]
    assert all(buffers[i] == payload(i, 40) for i in there)
    assert reader.stats()["misses"] == 9000


def test_what_comes_over_several_connections_lies_where_it_belongs(lent, reader):
    sizes = [LARGE + i for i in range(24)]
    lent.put([key(i) for i in range(24)], [large(i, size) for i, size in enumerate(sizes)])
    buffers = [bytearray(size) for size in sizes]
    assert all(reader.get_into([key(i) for i in range(24)], buffers))
    assert all(buffer == large(i, sizes[i]) for i, buffer in enumerate(buffers))
    assert len(reader._idle) == 3


@given(st.lists(st.integers(0, 40 << 20), min_size=1, max_size=200), st.integers(1, 8))
def test_shares_are_runs_that_cover_all_records_once(sizes, connections):
    shares = peer._shares(sizes, connections)
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    assert len(shares) <= connections
    assert all(shares)


def test_promoted_records_keep_their_age_and_a_peer_is_not_written_to(lent, server):
    lent.put([key(1)], [payload(1)], owner=OWNER, age_s=1000.0)
    local = f"shm:///test-{uuid.uuid4().hex}"
    tiers = open_store(f"tiered:{local}?capacity=1MiB,peer://127.0.0.1:{server.address[1]}?timeout=20")
    try:
        buffer = bytearray(100)
        assert tiers.get_into([key(1)], [buffer], owner=OWNER) == [True]
        assert buffer == payload(1)
        assert tiers._tiers[0].contains([key(1)]) == [True]
        assert tiers._tiers[0].ages([key(1)])[0] >= 1000
        tiers.put([key(2)], [payload(2)], owner=OWNER)
        (slot,) = tiers.reserve([key(3)], [100], OWNER)
        tiers.publish([slot], [0])
        tiers.flush()
        stats = tiers.stats()
        assert (stats["dropped_puts"], stats["tier1.dropped_puts"], stats["waiting"]) == (0, 0, 0)
        assert tiers.read_only is False
        with pytest.raises(RuntimeError, match=r"tier 1: .*call it on its own host's store"):
            tiers.forget(OWNER)
        assert tiers._tiers[0].contains([key(1), key(2)]) == [False, False]
        (slot,) = tiers.lend([key(1)], [100])  # into a slot of the first tier
        assert bytes(tiers.view(slot)) == payload(1)
        tiers.release([slot])
    finally:
        tiers.close()
        slab.remove(slab_directory(local)[1])


# --- Who may connect


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A directory of certificates: good ones, some of another CA, and an expired one."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, hosts in (("ours", ["127.0.0.1", "localhost"]), ("theirs", ["127.0.0.1"])):
        certificates.make(folder / name, hosts, 30)
    (folder / "expired").mkdir()
    certificates._make_host(folder / "expired", "127.0.0.1", *certificates._read_ca(folder / "ours"), days=-1)
    return folder


def test_certificates_are_private_and_one_command_makes_them(tmp_path, capsys):
    place = tmp_path / "tls"
    assert cli.main(["certificates", str(place), "one.example", "10.0.0.7"]) == 0
    assert cli.main(["certificates", str(place), "::1"]) == 0
    assert f"{place}/one.example: copy it to that host" in capsys.readouterr().out
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == 2 + 3 * 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert len({(place / host / "ca.pem").read_bytes() for host in ("one.example", "10.0.0.7", "::1")}) == 1
    assert cli.main(["certificates", str(place), "one.example"]) == 2
    assert "remove it to make a new one" in capsys.readouterr().err
    (place / "one.example" / "key.pem").chmod(0o640)
    with pytest.raises(PermissionError, match="expected mode 0600"):
        Tls(place / "one.example")
    with pytest.raises(ValueError, match=r"there is no .*ca\.pem"):
        Tls(tmp_path)


NO_HOSTS = ["", "../x", "..", "a/b", "a..b", "h.", "*.example", "Host", "-h", "é", "ca.key", 64 * "a", 127 * "x." + "y"]
NO_ADDRESSES = ["[::1]", "::0", "10.0.0.256", "fe80::1%lo"]


@pytest.mark.parametrize(
    "hosts, days, text",
    [
        *(([host], 30, "expected a DNS name in lower case or an address") for host in NO_HOSTS + NO_ADDRESSES),
        (["one", "two", "one"], 30, "host: one is named twice"),
        *((["one"], days, "days: expected 1 to 3650, ") for days in (0, -1, 3651, 999_999_999)),
        (["one", "there"], 30, "remove it to make a new one"),
    ],
)
def test_certificates_that_cannot_be_made_are_said_before_anything_is_written(tmp_path, capsys, hosts, days, text):
    (tmp_path / "there").symlink_to("nowhere")
    assert cli.main(["certificates", f"--days={days}", "--", str(tmp_path), *hosts]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_ca_that_is_none_signs_nothing(tmp_path):
    certificates.make(tmp_path / "a", ["one"], 30)
    certificates.make(tmp_path / "b", ["one"], 30)
    for broken, content, text in (
        ("ca.key", (tmp_path / "b" / "ca.key").read_bytes(), r"ca\.key is not the key of .*ca\.pem"),
        ("ca.key", b"", r"ca\.key is not a key made by this command"),
        ("ca.pem", b"", r"ca\.pem is not a certificate"),
        ("ca.key", None, r"ca\.pem has no ca\.key beside it"),
    ):
        place = tmp_path / "a" / broken
        before = place.read_bytes()
        place.unlink() if content is None else place.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            certificates.make(tmp_path / "a", ["two"], 30)
        assert not (tmp_path / "a" / "two").exists()
        place.write_bytes(before)
    with pytest.raises(ValueError, match="days: expected 1 to 3649"):
        certificates.make(tmp_path / "a", ["two"], 3650)


def test_making_certificates_that_was_interrupted_can_be_done_again(tmp_path, monkeypatch):
    """Interrupted after any number of files."""
    write = certificates._write
    for done in range(5):
        left = [None] * done

        def interrupted(path, content, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                certificates.make(tmp_path / str(done), ["one"], 30)
        assert not (tmp_path / str(done) / "one").exists()
        (place,) = certificates.make(tmp_path / str(done), ["one"], 30)
        assert {path.name for path in place.parent.iterdir()} == {"ca.key", "ca.pem", "one"}
        Tls(place)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_hosts_with_certificates_of_one_ca_read_each_other(lent, tls, host):
    lent.put([key(1)], [large(1, 3 * LARGE)])
    with (
        serving(lent, tls=Tls(tls / "ours" / host)) as server,
        opened(server.address[1], f"timeout=20&tls={tls}/ours/localhost", host) as reader,
    ):
        assert get(reader, 1, 3 * LARGE) == large(1, 3 * LARGE)
        assert reader._idle[0]._sock.version() == "TLSv1.3"


@pytest.mark.parametrize(
    "servers, clients, why",
    [
        ("ours/127.0.0.1", "theirs/127.0.0.1", "certificate verify failed"),
        ("theirs/127.0.0.1", "ours/127.0.0.1", "certificate verify failed"),
        ("expired/127.0.0.1", "ours/127.0.0.1", "certificate has expired"),
        ("ours/127.0.0.1", "expired/127.0.0.1", ""),  # the server says so in an alert
        ("ours/localhost", "ours/127.0.0.1", "IP address mismatch"),
        ("ours/127.0.0.1", None, "the server hung up: if it expects TLS, the URL needs ?tls=DIR"),
        ("ours/127.0.0.1", None, "is disconnected: the client does not speak TLS: its URL needs ?tls=DIR"),
        (None, "ours/127.0.0.1", "the server does not speak TLS: start `serve` with --tls, or leave out ?tls="),
        (None, "ours/127.0.0.1", "the client speaks TLS, and this server was started without --tls"),
    ],
)
def test_other_certificates_are_misses_and_said(lent, tls, caplog, servers, clients, why):
    lent.put([key(1)], [payload(1)])
    with (
        serving(lent, tls=Tls(tls / servers) if servers else None) as server,
        opened(server.address[1], "timeout=20" + (f"&tls={tls}/{clients}" if clients else "")) as reader,
    ):
        assert reader.contains([key(1)]) == [False]
        assert get(reader, 1) is None
        assert reader.stats()["errors"] == 1  # once: then it is left alone
    assert f"{reader._name} failed and is left alone for 10 s" in caplog.text
    assert why in caplog.text


def test_tls_before_1_3_is_refused_by_both_sides(lent, tls):
    ours = Tls(tls / "ours" / "127.0.0.1")
    for context in (ours.client, ours.server):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    spoken = []

    def script(sock):
        with ours.server.wrap_socket(sock.dup(), server_side=True) as over_tls:
            spoken.append(over_tls.version())

    with (
        answering(script, handshake=False) as port,
        opened(port, f"timeout=20&tls={tls}/ours/127.0.0.1") as reader,
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        socket.create_connection(server.address, PATIENCE_S) as sock,
    ):
        assert reader.contains([key(1)]) == [False]
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            ours.client.wrap_socket(sock, server_hostname="127.0.0.1")
    assert spoken == []


def test_a_client_without_certificate_is_refused_in_the_handshake(lent, tls):
    context = ssl.create_default_context(cafile=tls / "ours" / "ca.pem")
    with (
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        socket.create_connection(server.address, PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        sock.recv(1000)


def test_without_certificates_only_loopback_is_served_and_read(lent, monkeypatch):
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 is not a loopback address: both sides need certificates"):
        Server(lent, ("0.0.0.0", 0), SEAL, None)
    for host in ("10.0.0.1", "other.example", "0.0.0.0"):
        with pytest.raises(ValueError, match="both sides need certificates"):
            open_store(f"peer://{host}:7700")
    with opened(7700, host="localhost") as reader:
        addresses = [(0, 0, 0, "", (address, 7700)) for address in ("127.0.0.1", "10.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        connected_to = []
        monkeypatch.setattr(peer, "connect", lambda *arguments: connected_to.append(arguments))
        assert reader.contains([key(1)]) == [False]
        assert reader.stats()["errors"] == 1
        assert not connected_to


@pytest.mark.parametrize("over_tls", [False, True])
def test_another_secret_is_a_miss_and_the_server_tells_nothing(lent, tls, caplog, over_tls):
    lent.put([key(1)], [payload(1)])
    ours = Tls(tls / "ours" / "127.0.0.1") if over_tls else None
    with (
        serving(lent, Seal(b"another secret, of another deployment"), ours) as server,
        opened(server.address[1], "timeout=20" + (f"&tls={tls}/ours/127.0.0.1" if over_tls else "")) as reader,
    ):
        assert get(reader, 1) is None
        assert "does not prove the deployment's secret" in caplog.text


def test_without_a_secret_nothing_is_opened_or_served(url, monkeypatch, capsys):
    monkeypatch.delenv("LMCACHE_MM_SECRET")
    with pytest.raises(ValueError, match=r"peer://127\.0\.0\.1:7700: needs the deployment's secret"):
        open_store("peer://127.0.0.1:7700")
    assert cli.main(["serve", "--store", url, "--listen", "127.0.0.1:0"]) == 2
    assert "serve: needs the deployment's secret" in capsys.readouterr().err


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


def test_who_sends_the_servers_proof_back_or_one_of_another_connection_is_disconnected(server):
    sock, said = half_open(server.address[1])
    sock.sendall(said[-32:])
    assert ends(sock)
    other, _ = half_open(server.address[1])
    theirs = channel._HELLO.pack(channel._MAGIC, channel.VERSION, bytes(32))
    recorded = channel._proof(SEAL.connection_key(theirs + said[:-32]), b"client")  # correct for the first connection
    other.sendall(recorded)
    assert ends(other)
    sock.close()
    other.close()


def test_a_certificate_of_the_deployment_is_not_enough_to_stand_between_two_others(lent, tls, caplog):
    lent.put([key(1)], [payload(1)])
    between = Tls(tls / "ours" / "localhost")

    def relay(sock):
        with (
            between.server.wrap_socket(sock.dup(), server_side=True) as client,
            socket.create_connection(server.address) as plain,
            between.client.wrap_socket(plain, server_hostname="127.0.0.1") as behind,
        ):
            behind.sendall(client.recv(1000))  # the hellos
            relayed.append(behind.recv(1000))
            client.sendall(relayed[0])
            relayed.append(client.recv(1000))

    relayed = []
    with (
        serving(lent, tls=Tls(tls / "ours" / "127.0.0.1")) as server,
        answering(relay, handshake=False) as port,
        opened(port, f"timeout=20&tls={tls}/ours/127.0.0.1", "localhost") as reader,
    ):
        assert get(reader, 1) is None
        assert "does not prove the deployment's secret" in caplog.text
        until(lambda: len(relayed) == 2, "nothing was relayed")
        assert relayed[1] == b""


def test_another_version_is_named_on_both_sides(server, caplog):
    with socket.create_connection(server.address, PATIENCE_S) as sock:
        sock.sendall(channel._HELLO.pack(channel._MAGIC, 2, bytes(32)))
        magic, version, _ = channel._HELLO.unpack(sock.recv(1000, socket.MSG_WAITALL)[:42])
        assert (magic, version) == (channel._MAGIC, 1)

    def newer(sock):
        sock.recv(1000)
        sock.sendall(channel._HELLO.pack(channel._MAGIC, 2, bytes(32)))

    with answering(newer, handshake=False) as port, opened(port) as reader:
        assert reader.contains([key(1)]) == [False]
    assert "the other side speaks version 2 of this protocol, this side 1" in caplog.text


# --- Peers that lie


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


def says_another_payload(ch):
    ch.send(channel.RECORD, head(0, 100, SEAL.mac(key(1), payload(1))), memoryview(payload(2)))


def says_the_payload_of_another_key(ch):
    ch.send(channel.RECORD, head(0, 100, SEAL.mac(key(2), payload(2))), memoryview(payload(2)))


def says_another_length(ch):
    ch.send(channel.RECORD, head(0, 99, SEAL.mac(key(1), payload(1, 99))), memoryview(payload(1, 99)))


def says_a_huge_length(ch):
    ch.send(channel.RECORD, head(0, 1 << 60, bytes(32)))


def says_another_place(ch):
    ch.send(channel.RECORD, head(7, 100, SEAL.mac(key(1), payload(1))), memoryview(payload(1)))


def says_a_place_twice(ch):
    for _ in range(2):
        says_another_payload(ch) if _ else ch.send(
            channel.RECORD, head(1, 100, SEAL.mac(key(2), payload(2))), memoryview(payload(2))
        )


def says_another_kind(ch):
    ch.send(channel.AGES, bytes(16))


def says_a_short_record(ch):
    ch.send(channel.RECORD, b"short")


def replays_a_frame(ch):
    ch.send(channel.RECORD, head(1, 100, SEAL.mac(key(2), payload(2))), memoryview(payload(2)))
    ch._sent = 0
    ch.send(channel.DONE, b"")


def leaves_a_frame_out(ch):
    ch._sent = 1
    ch.send(channel.DONE, b"")


def speaks_with_the_clients_key(ch):
    ch._send_key = ch._receive_key
    ch.send(channel.DONE, b"")


def says_garbage(ch):
    ch._sock.sendall(os.urandom(1000))


def says_a_huge_frame(ch):
    ch._sock.sendall(struct.pack("<BI", channel.DONE, (1 << 32) - 1) + bytes(32))


def closes(ch):
    ch.close()


LIES = [
    says_another_payload,
    says_the_payload_of_another_key,
    says_another_length,
    says_a_huge_length,
    says_another_place,
    says_a_place_twice,
    says_another_kind,
    says_a_short_record,
    replays_a_frame,
    leaves_a_frame_out,
    speaks_with_the_clients_key,
    says_garbage,
    says_a_huge_frame,
    closes,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_peer_that_lies_is_a_miss_and_is_disconnected(lie):
    dropped = threading.Event()

    def script(ch):
        ch.expect(channel.GET)
        lie(ch)
        with suppress(OSError):
            ch.receive()
        dropped.set()  # the client has closed the connection

    with answering(script) as port, opened(port) as reader:
        buffers = [bytearray(100), bytearray(100)]
        found = reader.get_into([key(1), key(2)], buffers)
        assert not found[0]
        assert not found[1] or buffers[1] == payload(2)
        assert dropped.wait(PATIENCE_S)
        stats = reader.stats()
        assert (stats["errors"], stats["corrupt"]) == (
            1,
            lie in (says_another_payload, says_the_payload_of_another_key),
        )
        assert reader._idle == []


BODIES = st.binary(max_size=60) | st.builds(
    head, st.integers(0, 3), st.sampled_from([100, 99, 0, 1 << 60]), st.binary(min_size=MAC_BYTES, max_size=MAC_BYTES)
)


def test_a_peer_that_knows_the_secret_may_answer_anything():
    answers = []

    def script(ch):
        ch.receive()
        with suppress(OSError):
            for kind, body, payload in answers:
                ch.send(kind, body, memoryview(payload))

    with answering(script) as port, opened(port) as reader:

        @settings(max_examples=80, deadline=None)
        @given(st.lists(st.tuples(st.integers(1, 9) | st.just(255), BODIES, st.binary(max_size=120)), max_size=4))
        def run(frames):
            answers[:] = frames
            reader._breaker.tell(True)
            assert reader.get_into([key(1), key(2)], [bytearray(100), bytearray(100)]) == [False, False]
            reader._breaker.tell(True)
            (age,) = reader.ages([key(1)])
            assert age >= 0

        run()


def test_an_answer_about_other_keys_is_no_answer():
    def script(ch):
        ch.expect(channel.LOOK)
        ch.send(channel.AGES, bytes(8 * 5))

    with answering(script) as port, opened(port) as reader:
        assert reader.contains([key(1), key(2)]) == [False, False]
        assert reader.stats()["errors"] == 1


@pytest.mark.parametrize("age", [float("nan"), float("inf"), -2.0])
def test_an_age_that_is_none_is_no_answer(age):
    def script(ch):
        ch.expect(channel.LOOK)
        ch.send(channel.AGES, struct.pack("<2d", 1.0, age))

    with answering(script) as port, opened(port) as reader:
        assert reader.contains([key(1), key(2)]) == [False, False]
        assert reader.stats()["errors"] == 1
        assert reader.ages([key(1)]) == [float("inf")]  # left alone: the age is unknown, and the record not new


def test_a_record_whose_age_the_lender_does_not_know_counts_as_missing(lent, reader, monkeypatch):
    lent.put([key(1)], [payload(1)])
    monkeypatch.setattr(lent, "ages", lambda _: [float("inf")])  # evicted meanwhile
    assert reader.contains([key(1)]) == [False]
    assert reader.stats()["errors"] == 0


def test_records_older_than_the_ttl_that_serve_is_told_are_not_lent(url):
    with closing(open_store(f"{url}?capacity=32MiB&ttl=60")) as lent, serving(lent) as server:
        lent.put([key(1)], [payload(1)], age_s=50)
        lent.put([key(2)], [payload(2)], age_s=70)
        with opened(server.address[1]) as reader:
            assert reader.contains([key(1), key(2)]) == [True, False]
            assert get(reader, 2) is None


# --- Peers that are slow, dead, or come back


def test_a_peer_that_never_answers_costs_its_timeout_once_and_is_probed_later(caplog):
    accepted = []
    ended = threading.Event()

    def script(ch):
        accepted.append(ch)
        ended.wait(PATIENCE_S)

    with answering(script) as port, opened(port, "timeout=0.5") as reader:
        begin = time.monotonic()
        assert get(reader, 1) is None
        assert 0.4 < time.monotonic() - begin < PATIENCE_S
        for _ in range(20):
            assert reader.contains([key(1)]) == [False]
        assert (len(accepted), reader.stats()["errors"]) == (1, 1)
        reader._breaker._open_until = time.monotonic()  # the pause is over
        ended.set()
        assert reader.contains([key(1)]) == [False]  # this one probes
        assert reader.stats()["errors"] == 2
    assert "left alone for 10 s" in caplog.text


def test_a_buffer_is_not_written_to_after_a_call_that_took_too_long():
    go = threading.Event()

    def script(ch):
        ch.expect(channel.GET)
        whole = np.full(8 * LARGE, 7, np.uint8)
        ch.send(channel.RECORD, head(0, whole.nbytes, SEAL.mac(key(1), whole.data)), whole.data[:LARGE])
        go.wait(PATIENCE_S)
        ch.deadline = time.monotonic() + 1
        with suppress(OSError):
            channel._send(ch._sock, whole.data[LARGE:], ch.deadline)

    with answering(script) as port, opened(port, "timeout=2") as reader:
        buffer = np.zeros(8 * LARGE, np.uint8)
        assert reader.get_into([key(1)], [buffer]) == [False]
        assert buffer[0] == 7  # it had been partly written
        buffer[:] = 5
        go.set()
    assert (buffer == 5).all()


def test_one_call_probes_a_peer_that_was_down_and_the_others_miss(lent):
    lent.put([key(1)], [payload(1)])
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    with opened(port) as reader:
        assert get(reader, 1) is None
        with serving(lent, port=port):
            assert get(reader, 1) is None  # left alone
            reader._breaker._open_until = time.monotonic()
            assert get(reader, 1) == payload(1)
            assert not reader._breaker.open
            assert reader.contains([key(1)]) == [True]


def test_a_server_that_was_restarted_between_calls_is_not_missed(lent):
    lent.put([key(1)], [payload(1)])
    with serving(lent) as server:
        port = server.address[1]
        reader = open_store(f"peer://127.0.0.1:{port}?timeout=20")
        assert get(reader, 1) == payload(1)
    with serving(lent, port=port):
        assert get(reader, 1) == payload(1)
        assert reader.stats()["errors"] == 0
    reader.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        reader.contains([key(1)])


@pytest.mark.parametrize("names", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_every_address_of_a_name_is_tried(lent, server, monkeypatch, names):
    """127.0.0.2 has no listener."""
    lent.put([key(1)], [payload(1)])
    resolve = socket.getaddrinfo

    def two(host, *arguments, **options):
        asked = names if host == "localhost" else [host]
        return [info for name in asked for info in resolve(name, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with opened(server.address[1], host="localhost") as reader:
        assert get(reader, 1) == payload(1)
        assert reader._idle[0].deadline > time.monotonic() + 10  # the whole call's deadline, not one address's


def test_names_that_are_resolved_for_ever_cost_the_timeout(monkeypatch, caplog):
    stuck = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stuck.wait(PATIENCE_S))
    with opened(7700, "timeout=0.3", "localhost") as reader:
        assert reader.contains([key(1)]) == [False]
        assert reader.stats()["errors"] == 1
        (resolving,) = [thread for thread in threading.enumerate() if thread.name == "lmcache_mm peer names"]
        assert resolving.daemon  # process exit does not wait for it
        assert "localhost was not resolved in time" in caplog.text
        stuck.set()


@pytest.mark.parametrize("answers, errors", [(1, 0), (2, 1)])
def test_a_connection_closed_just_before_it_is_asked_is_no_failure(monkeypatch, answers, errors):
    """Unlike one closed in the middle of an answer."""
    connections = []

    def script(ch):
        connections.append(ch)
        for i in range(answers):
            ch.expect(channel.GET)
            ch.send(channel.RECORD, head(0, 100, SEAL.mac(key(1), payload(1))), memoryview(payload(1)))
            if i == 0:
                ch.send(channel.DONE, b"")
        ch.close()

    with answering(script) as port, opened(port) as reader:
        assert get(reader, 1) == payload(1)
        until(lambda: answers > 1 or reader._idle[0].ended, "it is not closed")
        monkeypatch.setattr(channel.Channel, "ended", False)  # as if checked too early
        assert reader.get_into([key(1)], [bytearray(100)]) == [True]
        assert (reader.stats()["errors"], len(connections)) == (errors, 3 - answers)


def test_a_connection_that_is_used_again_has_the_deadline_of_the_new_call(lent, reader):
    lent.put([key(1)], [payload(1)])
    assert get(reader, 1) == payload(1)
    (idle,) = reader._idle
    idle.deadline = 0.0
    assert get(reader, 1) == payload(1)
    assert reader._idle == [idle]


def test_work_that_waits_behind_other_calls_is_a_miss_and_does_not_tell_of_the_peer(lent, server):
    lent.put([key(1)], [payload(1)])
    with opened(server.address[1], "timeout=0.2") as reader:
        go = threading.Event()
        try:
            for _ in range(4):
                reader._pool.submit(go.wait, PATIENCE_S)
            assert reader.contains([key(1)]) == [False]
            assert (reader.stats()["errors"], reader._breaker.open) == (0, False)
            reader._breaker.tell(False)
            reader._breaker._open_until = time.monotonic()
            assert reader.contains([key(1)]) == [False]  # a probe that does not begin
            assert reader._breaker.open
            reader._breaker._open_until = time.monotonic()
            assert reader._breaker.admit()
        finally:
            go.set()


def test_work_that_began_late_does_not_tell_of_a_slow_peer():
    def too_slow(_):
        raise TimeoutError

    with closing(open_store("peer://127.0.0.1:1?timeout=20")) as reader:
        reader._connect = too_slow
        assert reader._do(too_slow, time.monotonic() + 5) is False
        assert isinstance(reader._do(too_slow, time.monotonic() + 20), TimeoutError)


def test_one_call_at_a_time_probes_what_failed(monkeypatch):
    monkeypatch.setattr(breaker, "PAUSE_S", 0.0)
    one = breaker.Breaker()
    assert one.admit()
    one.tell(False)
    assert [one.admit(), one.admit()] == [True, False]
    one.tell(False)
    assert [one.admit(), one.admit()] == [True, False]
    one.tell(True)
    assert [one.admit(), one.admit()] == [True, True]


def test_a_closed_reader_is_gone_though_a_fork_has_its_connection_open(lent, server):
    with opened(server.address[1]) as reader:
        assert reader.contains([key(1)]) == [False]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        until(lambda: not server._open, "the connection lives on in the child")
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


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


def test_a_server_that_is_killed_in_mid_transfer_costs_misses_until_it_is_back(lent, url):
    keys = [key(i) for i in range(24)]
    lent.put(keys, [large(i) for i in range(24)])
    with serve_process(url) as (process, port), opened(port) as reader:
        buffers = [np.zeros(LARGE, np.uint8) for _ in keys]
        assert all(reader.get_into(keys, buffers))
        for buffer in buffers:
            buffer[:] = 0
        killer = threading.Thread(target=lambda: (until(lambda: buffers[3][0], "no transfer"), process.kill()))
        buffers[3][0] = 0
        killer.start()
        wrong = 0
        while process.poll() is None:
            found = reader.get_into(keys, buffers)
            wrong += sum(f and bytes(b) != large(i) for i, (f, b) in enumerate(zip(found, buffers, strict=True)))
        killer.join()
        assert wrong == 0
        assert not all(reader.get_into(keys, buffers))
        with serve_process(url, f"127.0.0.1:{port}"):
            reader._breaker.tell(True)
            assert all(reader.get_into(keys, buffers))


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


def test_slots_are_released_when_the_client_dies(lent, server):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    ch = pinned(server.address[1], 16)
    assert not can_be_replaced(lent)
    ch.close()
    until(lambda: not server._open, "the connection has not ended")
    assert can_be_replaced(lent)


def test_slots_are_released_when_the_client_stalls(lent, server, monkeypatch, caplog):
    monkeypatch.setattr("lmcache_mm.stores.peers.server.LEASE_S", 0.5)
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    ch = pinned(server.address[1], 16)
    until(lambda: not server._open, "the connection has not ended")
    assert can_be_replaced(lent)
    ch.close()


def test_slots_are_released_when_the_server_is_killed(lent, url):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    with serve_process(url) as (process, port):
        ch = pinned(port, 16)
        assert not can_be_replaced(lent)
        process.kill()
        process.wait()
        until(lambda: can_be_replaced(lent), "slots stay pinned")
        ch.close()


def test_a_server_ends_cleanly_in_mid_transfer(lent, url):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    for number in (signal.SIGTERM, signal.SIGINT):
        with serve_process(url, "127.0.0.1:0", "--verbose") as (process, port):
            ch = pinned(port, 16)
            process.send_signal(number)
            _, said = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
            assert "is connected" in said
            assert "Traceback" not in said
            ch.close()
        assert lent.stats()["processes"] == 1


def test_a_closed_server_frees_its_pins_and_its_port(lent, url):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    with serving(lent) as server:
        ch = pinned(server.address[1], 16)
    assert can_be_replaced(lent)
    ch.close()
    with serving(lent, port=server.address[1]):
        pass


def test_records_that_are_evicted_while_they_are_read_are_never_wrong(lent, server):
    stop = threading.Event()

    def write():
        i = 0
        while not stop.is_set():
            lent.put([key(i % 100)], [large(i % 100)])
            i += 1

    thread = threading.Thread(target=write)
    thread.start()
    hits = 0
    try:
        with opened(server.address[1]) as reader:
            end = time.monotonic() + 2
            while time.monotonic() < end or not hits:
                ids = [int(i) for i in np.random.default_rng(hits).integers(0, 100, 12)]
                buffers = [bytearray(LARGE) for _ in ids]
                found = reader.get_into([key(i) for i in ids], buffers)
                assert all(b == large(i) for f, b, i in zip(found, buffers, ids, strict=True) if f)
                hits += sum(found)
            assert reader.stats()["corrupt"] == reader.stats()["errors"] == 0
    finally:
        stop.set()
        thread.join()
    assert lent.stats()["evictions"] > 0


# --- Clients that send anything


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_the_parser_of_requests_takes_what_is_one_and_refuses_the_rest(body, sized):
    with suppress(ProtocolError):
        keys, sizes, peek = channel.unpack_keys(body or b"\0", sized)
        assert channel.pack_keys(keys, sizes if sized else None, peek) == (body or b"\0")


@given(st.lists(st.binary(min_size=32, max_size=64), max_size=channel.MOST_KEYS), st.booleans())
def test_requests_are_read_as_they_were_written(keys, peek):
    sizes = [i << 40 for i in range(len(keys))]
    assert channel.unpack_keys(channel.pack_keys(keys, sizes, peek), True) == (keys, sizes, peek)
    assert channel.unpack_keys(channel.pack_keys(keys, peek=peek), False) == (keys, [], peek)


def test_the_most_keys_fit_into_a_frame_and_one_more_is_refused():
    keys = [bytes(64)] * channel.MOST_KEYS
    assert len(channel.pack_keys(keys, [0] * len(keys))) <= channel.MOST_BODY_BYTES
    with pytest.raises(ProtocolError, match="of more than 1024 keys"):
        channel.unpack_keys(channel.pack_keys([*keys, bytes(64)]), False)
    with pytest.raises(ProtocolError):
        channel.unpack_keys(b"", False)


@pytest.fixture
def fuzzed(lent, server):
    """A server's port; after the test, other clients must work, and nothing may be left."""
    lent.put([key(1)], [payload(1)])
    with opened(server.address[1]) as reader:
        assert get(reader, 1) == payload(1)
        yield server.address[1]
        assert get(reader, 1) == payload(1)  # over its old connection
        assert reader.stats()["errors"] == 0
    until(lambda: not server._open, "connections are left")
    lent.put([key(2)], [bytes(lent.capacity)])
    assert lent.contains([key(2)]) == [True]  # nothing is pinned


def test_strangers_may_send_anything(fuzzed):
    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=200), st.booleans())
    def run(sent, after_hello):
        sock = half_open(fuzzed)[0] if after_hello else socket.create_connection(("127.0.0.1", fuzzed), PATIENCE_S)
        with sock, suppress(OSError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass

    run()


def test_clients_who_know_the_secret_may_send_any_frame(fuzzed):
    bodies = st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda keys, size, cut: channel.pack_keys(keys, [size] * len(keys))[: cut or None],
            st.lists(st.binary(min_size=30, max_size=66), max_size=5),
            st.integers(0, 2**64 - 1),
            st.integers(0, 100),
        ),
    )

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 255), bodies), max_size=3), st.binary(max_size=60))
    def run(frames, rest):
        ch = connected(fuzzed)
        with suppress(OSError):
            for kind, body in frames:
                ch.send(kind, body)
            ch._sock.sendall(rest)
            ch._sock.shutdown(socket.SHUT_WR)
            while ch._sock.recv(1 << 16):
                pass
        ch.close()

    run()


def test_a_frame_that_claims_to_be_huge_ends_its_connection(fuzzed):
    ch = connected(fuzzed)
    ch._sock.sendall(struct.pack("<BI", channel.GET, (1 << 32) - 1) + bytes(32))
    assert ends(ch._sock)
    ch.close()


def test_silent_strangers_take_no_readers_place_and_the_oldest_makes_room(lent, monkeypatch):
    monkeypatch.setattr("lmcache_mm.stores.peers.server.HANDSHAKES", 3)
    monkeypatch.setattr("lmcache_mm.stores.peers.server.HANDSHAKE_S", 10 * PATIENCE_S)
    lent.put([key(1)], [payload(1)])
    with serving(lent, connections=1) as server, opened(server.address[1]) as reader:
        strangers = []
        for _ in range(5):
            strangers.append(socket.create_connection(server.address, PATIENCE_S))
            until(lambda: len(server._handshakes) == min(3, len(strangers)), "not accepted")
        assert ends(strangers[0])
        assert ends(strangers[1])
        assert get(reader, 1) == payload(1)
        assert reader.stats()["errors"] == 0
        for sock in strangers:
            sock.close()


def test_who_says_nothing_is_disconnected(lent, monkeypatch):
    monkeypatch.setattr("lmcache_mm.stores.peers.server.HANDSHAKE_S", 1.0)
    with serving(lent) as server, socket.create_connection(server.address, PATIENCE_S) as stranger:
        silent = connected(server.address[1])
        assert ends(stranger)
        assert ends(silent._sock)
        silent.close()


def asks(ch):
    """Asks for the age of one record over a connection."""
    ch.send(channel.LOOK, channel.pack_keys([key(1)]))
    return struct.unpack("<d", ch.expect(channel.AGES)[1])[0]


def test_the_connection_idle_longest_makes_room_and_none_that_is_busy(lent, monkeypatch):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    with serving(lent, connections=2) as server:
        port = server.address[1]
        busy = connected(port)
        assert asks(busy) >= 0
        busy.send(channel.GET, channel.pack_keys([key(i) for i in range(16)], [2 * LARGE] * 16))
        busy.expect(channel.RECORD)
        first = connected(port)
        assert asks(first) >= 0
        second = connected(port)
        assert asks(second) >= 0
        assert first.ended
        assert ends(first._sock)
        until(lambda: server._idle, "the second is not idle")
        assert not second.ended
        assert asks(second) >= 0
        third = pinned(port, 16)
        assert ends(second._sock)
        fourth = connected(port)  # it waits, since all are busy
        until(lambda: len(server._open) == 3 and not server._handshakes, "it does not wait")
        busy.close()
        assert asks(fourth) >= 0
        fifth = pinned(port, 16)
        monkeypatch.setattr("lmcache_mm.stores.peers.server.HANDSHAKE_S", 1.0)
        sixth = connected(port)
        assert ends(sixth._sock)  # in vain
        for ch in (first, second, third, fourth, fifth, sixth):
            ch.close()


# --- The command, and two hosts


def test_serve_says_what_is_wrong(url, capsys, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    taken = f"127.0.0.1:{listener.getsockname()[1]}"
    for arguments, text in (
        (["--store", url, "--listen", "127.0.0.1:0"], "there is no store in"),
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


@pytest.mark.parametrize(
    "url, text",
    [
        ("peer://", "expected HOST:PORT, got ''"),
        ("peer://127.0.0.1", "expected HOST:PORT"),
        ("peer://127.0.0.1:70000", "expected HOST:PORT"),
        ("peer://127.0.0.1:1/x", "expected HOST:PORT"),
        ("peer://127.0.0.1:1?connections=0", "connections: expected 1 to 999, got '0'"),
        ("peer://127.0.0.1:1?timeout=never", "timeout: expected seconds, got 'never'"),
        ("peer://127.0.0.1:1?timeout=nan", "timeout: expected seconds"),
        ("peer://127.0.0.1:1?tls=/none-such", "there is no /none-such/ca.pem"),
        ("peer://127.0.0.1:1?secret=x", "unknown option 'secret'"),
    ],
)
def test_urls_that_open_no_peer_say_why(url, text):
    with pytest.raises(ValueError, match=text):
        open_store(url)


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
sys.path.insert(0, sys.argv[1])
from test_peer import network_namespace
with network_namespace() as (inside, _, _):
    print(inside[1].split("/")[2], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_network_namespace_whose_test_is_killed():
    def interfaces():
        return set(os.listdir("/sys/class/net"))

    before = interfaces()
    with network_namespace():  # at the same time as another run's
        done = subprocess.run(
            [sys.executable, "-c", NAMESPACE, str(Path(__file__).parent)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        until(lambda: not Path(f"/proc/{done.stdout.strip()}").exists(), "its process lives")
    until(lambda: interfaces() <= before, "its interfaces are left")


def test_a_store_of_the_parent_is_refused_after_a_fork(reader):
    assert reader.contains([key(1)]) == [False]
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            reader.contains([key(1)])
        except RuntimeError as error:
            os.write(write, str(error).encode())
        reader.close()
        os._exit(0)
    os.wait()
    assert select.select([read], [], [], 0)[0]
    assert b"open it again after a fork" in os.read(read, 1000)
    assert reader.contains([key(1)]) == [False]
    for fd in (read, write):
        os.close(fd)


def test_names_and_addresses_of_peers_are_parsed():
    assert channel.host_and_port("[::1]:7700") == ("::1", 7700)
    assert channel.host_and_port("host.example:7700") == ("host.example", 7700)
    assert Path("/dev/shm").exists()
