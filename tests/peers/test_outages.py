"""Peers that are slow, dead, or come back, and what a server leaves behind."""

import os
import signal
import socket
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest

from lending import LARGE, SEAL, answering, can_be_replaced, head, large, opened, pinned, serve_process, serving
from lmcache_mm.stores import breaker, open_store
from lmcache_mm.stores.peers import channel
from servers import PATIENCE_S, until
from test_stores import get, key, payload


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


def test_slots_are_released_when_the_client_dies(lent, server):
    lent.put([key(i) for i in range(16)], [bytes(2 * LARGE)] * 16)
    ch = pinned(server.address[1], 16)
    assert not can_be_replaced(lent)
    ch.close()
    until(lambda: not server._open, "the connection has not ended")
    assert can_be_replaced(lent)


def test_slots_are_released_when_the_client_stalls(lent, server, monkeypatch):
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
