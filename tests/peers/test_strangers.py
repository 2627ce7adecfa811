"""Clients that send anything, or nothing."""

import socket
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lending import LARGE, connected, ends, half_open, opened, pinned, serving
from lmcache_mm.stores.peers import channel
from lmcache_mm.stores.peers.channel import ProtocolError
from servers import PATIENCE_S, until
from test_stores import get, key, payload


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
