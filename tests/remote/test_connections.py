"""Calls over several connections, late answers and a lack of memory, with stand-ins for clients."""

import errno
import math
import mmap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_mm.secret import Seal
from lmcache_mm.stores.remote import hands, record
from lmcache_mm.stores.remote.record import HEADER_BYTES
from lmcache_mm.stores.remote.remote import RemoteStore
from remotes import later, within
from servers import Kept, until
from test_stores import OTHER_OWNER, OWNER, get, key, payload


def test_a_buffer_is_left_alone_once_the_call_has_returned(environment, monkeypatch):
    """The client returns the data long after the deadline."""
    answer, asked = threading.Event(), threading.Event()
    released = []

    class Late:
        def exists(self, names, peek):
            return [False] * len(names)

        def read(self, name, into):
            asked.set()
            answer.wait(30)
            record = np.full(HEADER_BYTES + 100, ord("x"), np.uint8)
            store._headers.write(record, name, 0, b"")
            into[:] = record.data
            released.append(name)
            return len(into)

        def write(self, name, record, ttl_s, replace):
            return True

        def close(self):
            pass

    store = RemoteStore("late", Late, Seal(b"a secret of a deployment"), 0.2, 1, 10)
    buffer = bytearray(100)
    assert store.get_into([key(1)], [buffer]) == [False]
    assert asked.wait(10)
    answer.set()
    until(lambda: released and not store._calls.hands[0].busy, "the request has not ended")
    assert buffer == bytes(100)
    later(monkeypatch, 11)
    assert store.get_into([key(1)], [buffer]) == [True]  # and data in time arrives
    assert buffer == b"x" * 100
    store.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_arrives_of_a_request_given_up_earlier_is_never_taken_for_a_payload(store, monkeypatch, when):
    """It arrives in the connection's memory before or after the payload is copied from there."""
    store.put([key(1)], [payload(1)])
    touch = hands.Call.touch

    def touch_and_late_arrival(call, move):
        (hand,) = (hand for hand in store._calls.hands if len(hand._memory))
        if when == "before":
            hand._memory[HEADER_BYTES + 50] ^= 1
        done = touch(call, move)
        hand._memory[:] = 0
        return done

    monkeypatch.setattr(hands.Call, "touch", touch_and_late_arrival)
    buffer = bytearray(100)
    found = store.get_into([key(1)], [buffer])
    assert (found, buffer == payload(1)) == ([when == "after"], when == "after")


ANY_RECORD = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda end: record.MAGIC + bytes([record.VERSION, 0, 0, 0, 0, 0]) + end),
    st.tuples(st.integers(0, HEADER_BYTES + 100), st.integers(0, HEADER_BYTES + 100), st.binary(max_size=20)),
)


@settings(max_examples=300, deadline=None)
@given(ANY_RECORD)
def test_whatever_a_server_holds_under_a_name_is_a_miss_unless_it_was_put(content):
    """`content`: bytes; or a range of a real record and its replacement."""
    kept = {}
    store = RemoteStore("kept", lambda: Kept(kept), Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)], OWNER)
    (name,) = kept
    put = kept[name]
    kept[name] = content if isinstance(content, bytes) else put[: content[0]] + content[2] + put[content[1] :]
    same = kept[name] == put
    assert store.sizes()["records"] == (store.ages([key(1)]) != [math.inf])
    assert get(store, 1) == (payload(1) if same else None)
    assert store.forget(OWNER) in (0, 1)
    store.clear()
    assert not [left for left in kept if left.startswith(store._records)]
    assert (store.stats()["errors"], store.stats()["down"]) == (0, 0)
    store.close()


def test_a_put_that_arrives_after_its_time_is_removed_if_its_owner_was_forgotten_meanwhile():
    kept, arrive, arriving = {}, threading.Event(), threading.Event()

    class Slow(Kept):
        def write(self, *arguments):
            arriving.set()
            arrive.wait(30)
            return super().write(*arguments)

    seal = Seal(b"a secret of a deployment")
    slow, other = (RemoteStore("kept", lambda e=engine: e(kept), seal, 0.2, 1, 10) for engine in (Slow, Kept))
    for forgotten in (True, False):
        owner = OWNER if forgotten else OTHER_OWNER
        slow._calls.breaker.tell(True)
        slow.put([key(1)], [payload(1)], owner)
        assert arriving.wait(10)
        assert other.forget(OWNER) == 0
        arrive.set()
        until(lambda: not slow._calls.hands[0].busy, "the put has not ended")
        assert other.contains([key(1)]) == [not forgotten]
        arrive.clear()
        arriving.clear()
    slow.close()
    other.close()


class Shared:
    """A client that all connections share; its calls take a while."""

    def __init__(self, asking_s):
        self.asking_s, self.asked_at_once, self.most_at_once, self.closed = asking_s, 0, 0, []
        self.lock = threading.Lock()

    def exists(self, names, peek):
        with self.lock:
            self.asked_at_once += 1
            self.most_at_once = max(self.most_at_once, self.asked_at_once)
        time.sleep(self.asking_s)
        with self.lock:
            self.asked_at_once -= 1
        return [True] * len(names)

    def close(self):
        self.closed.append(self.asked_at_once)


def ask_at_once(store, callers):
    """Threads that have begun to ask for one record each."""
    threads = [threading.Thread(target=store.contains, args=([key(i)],)) for i in range(callers)]
    for thread in threads:
        thread.start()
    return threads


def test_calls_are_spread_over_the_connections_and_one_that_is_slow_with_much_is_not_down():
    client = Shared(0.05)
    store = RemoteStore("shared", lambda: client, Seal(b"a secret of a deployment"), 30, 4, 1)
    for caller in ask_at_once(store, 16):
        caller.join()
    assert client.most_at_once == 4
    assert [hand.busy for hand in store._calls.hands] == [0] * 4
    store.close()
    slow = RemoteStore("slow", lambda: client, Seal(b"a secret of a deployment"), 0.5, 1, 1)
    found = slow.contains([key(i) for i in range(100)])
    assert 0 < sum(found) < 100
    assert slow.stats()["down"] == 0
    assert slow.stats()["timeouts"] == 1
    slow.close()


def test_a_client_is_closed_once_and_behind_what_it_does():
    client = Shared(0.3)
    store = RemoteStore("shared", lambda: client, Seal(b"a secret of a deployment"), 10, 4, 1)
    callers = ask_at_once(store, 4)
    time.sleep(0.1)
    store.close()
    assert client.closed == [0]
    for caller in callers:
        caller.join()
    hangs = Shared(3)
    store = RemoteStore("hangs", lambda: hangs, Seal(b"a secret of a deployment"), 0.2, 2, 1)
    store.contains([key(1)])
    store.close()
    assert hangs.closed == []  # still in use: it is abandoned


def test_one_connection_that_hangs_does_not_hold_up_the_others(environment):
    hang = threading.Event()
    first = threading.Lock()

    class Sometimes:
        def exists(self, names, peek):
            if first.acquire(blocking=False):
                hang.wait(30)
            return [True] * len(names)

        def close(self):
            pass

    store = RemoteStore("sometimes", Sometimes, Seal(b"a secret of a deployment"), 2, 3, 10)
    assert store.contains([key(i) for i in range(5)]) == [False] * 5
    store._calls.breaker.tell(True)
    for _ in range(10):
        assert store.contains([key(i) for i in range(50)]) == [True] * 50
    within(store.close)
    hang.set()


def test_a_kernel_without_huge_pages_is_good_enough(monkeypatch):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(hands.mmap, "mmap", Plain)
    store = RemoteStore("kept", Kept, Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)
    store.close()


@pytest.mark.parametrize("lack", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_memory_that_cannot_be_had_costs_a_call_and_is_not_held_against_the_server(lack, monkeypatch, caplog):
    store = RemoteStore("kept", Kept, Seal(b"a secret of a deployment"), 30, 1, 100)
    store.put([key(1)], [payload(1)])
    with monkeypatch.context() as patched:

        def fail(*_, **__):
            raise lack

        patched.setattr(hands.Hand, "memory", fail)
        assert get(store, 1) is None
        store.put([key(2)], [payload(2)])
        assert store.stats()["dropped_puts"] == 1
    store.put([key(2)], [payload(2)])
    assert get(store, 1) == payload(1)
    assert get(store, 2) == payload(2)
    assert not caplog.records
    store.close()
