"""Peers that lie."""

import os
import struct
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lending import SEAL, answering, head, opened
from lmcache_mm.secret import MAC_BYTES
from lmcache_mm.stores.peers import channel
from servers import PATIENCE_S
from test_stores import key, payload


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
