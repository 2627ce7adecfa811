"""The promises of every store, and mem:// when it is full."""

import atexit
import functools
import os
import tempfile
import uuid
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import servers
from lmcache_mm import ops
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import mem as mem_module
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.local.mem import MemStore
from lmcache_mm.stores.remote.remote import RemoteStore


def key(i):
    return i.to_bytes(36, "little")


def payload(i, size=100):
    return bytes((i + k) % 251 for k in range(size))


OWNER, OTHER_OWNER = b"tenant-seven....", b"tenant-eight...."


@functools.cache
def server(scheme):
    """The tests' own server, started at its first use and stopped at their end."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    start = {
        "valkey": servers.valkey,
        "cluster": servers.ValkeyCluster,
        "s3": servers.seaweed,
        "mooncake": servers.mooncake,
    }[scheme]
    started = start(Path(folder.name))
    atexit.register(started.stop)
    return started


def remote_url(scheme):
    return server(scheme).url + "&capacity=256MiB" * (scheme == "mooncake")


@functools.cache
def one_client(connecting):
    """`connecting` with one client for all stores: Mooncake's takes seconds to set up and to close."""

    @functools.cache
    def connect(*arguments):
        engine = connecting(*arguments)()
        atexit.register(engine.close)
        engine.close = lambda: None
        return engine

    return lambda *arguments: functools.partial(connect, *arguments)


def new_store(scheme, folder, capacity="1MiB", options=""):
    """(a new open store, a function that closes and removes it); a remote one has its own deployment."""
    places = {
        "mem": lambda: f"mem://?capacity={capacity}{options}",
        "shm": lambda: f"shm:///test-{uuid.uuid4().hex}?capacity={capacity}{options}",
        "file": lambda: f"file://{folder}/{uuid.uuid4().hex}?capacity={capacity}{options}",
    }
    if "mooncake" in scheme:
        servers.need_mooncake()
    urls = [places[one]() if one in places else remote_url(one) for one in scheme.split(",")]
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**servers.AWS, "LMCACHE_MM_SECRET": uuid.uuid4().hex}.items():
            environment.setenv(name, value)
        if "mooncake" in scheme:
            module = import_module("lmcache_mm.stores.remote.mooncake")
            environment.setattr(module, "connecting", one_client(module.connecting))
        store = open_store(urls[0] if len(urls) == 1 else f"tiered:{','.join(urls)}")

    def remove():
        store.close()
        for url in urls:
            if url.startswith(("shm:", "file:")):
                assert slab.remove(slab_directory(url)[1])

    return store, remove


LOCAL = ["mem", "shm", "file"]
REMOTE = ["valkey", "s3", "mooncake"]
TIERED = ["mem,mem", "mem,file", "shm,file", "mem,shm,file"]
TIERED_REMOTE = ["mem,valkey", "shm,s3", "file,mooncake"]


@pytest.fixture(params=[*LOCAL, *REMOTE, "cluster", *TIERED, *TIERED_REMOTE])
def store(request, tmp_path):
    """Any store."""
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


@pytest.fixture(params=[*LOCAL, *REMOTE, "cluster"])
def single(request, tmp_path):
    """Any store except tiered:."""
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


@pytest.fixture(params=LOCAL)
def local(request, tmp_path):
    """Any store with a capacity."""
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


@pytest.fixture(params=["mem", "shm", "file", "mem,mem", "valkey"])
def checked(request, tmp_path):
    """Any store that checks its arguments by `checked_records`."""
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


def stats_of(store):
    return {**store.stats(), **(store.sizes() if isinstance(store, RemoteStore) else {})}


@pytest.fixture
def mem():
    store = open_store("mem://?capacity=1KiB")
    yield store
    store.close()


def get(store, i, size=100):
    buffer = bytearray(size)
    return bytes(buffer) if store.get_into([key(i)], [buffer]) == [True] else None


# --- The contract


def test_what_was_put_is_contained_and_read_back(store):
    store.put([key(1), key(2)], [payload(1), memoryview(payload(2, 7))])
    assert store.contains([key(1), key(3), key(2)]) == [True, False, True]
    assert get(store, 1) == payload(1)
    assert get(store, 2, 7) == payload(2, 7)
    assert get(store, 3) is None


def test_stats_count_what_was_done(single):
    single.put([key(1), key(2)], [payload(1), payload(2)])
    get(single, 1)
    get(single, 2)
    get(single, 3)
    stats = stats_of(single)
    assert (stats["puts"], stats["hits"], stats["misses"], stats["records"]) == (2, 2, 1, 2)


@pytest.mark.parametrize("misalignment", [0, 1, 16])
@pytest.mark.parametrize("size", [1, 15, 4095, 4096, 4097, 16384, 100_003, 500_000])
def test_payloads_of_any_size_at_any_address_are_read_back(store, size, misalignment):
    memory = np.zeros(size + 8192, np.uint8)
    begin = -memory.ctypes.data % 4096 + misalignment
    buffer = memory[begin : begin + size]
    buffer[:] = np.arange(size) % 251
    store.put([key(1)], [buffer])
    expected = buffer.copy()
    memory[:] = 7
    assert store.get_into([key(1)], [buffer]) == [True]
    assert np.array_equal(buffer, expected)
    buffer[:] = 7
    assert (memory == 7).all()


def test_a_record_of_another_length_is_a_miss_and_stays(store):
    store.put([key(1)], [payload(1)])
    assert get(store, 1, 99) is None
    assert get(store, 1) == payload(1)
    assert store.stats()["misses"] == 1


def test_a_key_that_is_there_keeps_its_record(store):
    store.put([key(1)], [payload(1)])
    store.put([key(1)], [payload(2)])
    assert get(store, 1) == payload(1)


def test_one_key_twice_in_a_call_is_one_record(store):
    store.put([key(1), key(1)], [payload(1), payload(1)])
    one, other = bytearray(100), bytearray(100)
    assert store.get_into([key(1), key(1)], [one, other]) == [True, True]
    assert one == other == payload(1)
    store.delete([key(1), key(1)])
    assert store.contains([key(1)]) == [False]


def test_empty_payloads_and_no_keys_are_valid(store):
    store.put([], [])
    store.put([key(1)], [b""])
    assert store.contains([]) == store.get_into([], []) == []
    assert get(store, 1, 0) == b""


def test_deleted_records_are_gone_and_unknown_keys_are_ignored(store):
    store.put([key(1), key(2)], [payload(1), payload(2)])
    store.delete([key(1), key(9)])
    assert store.contains([key(1), key(2)]) == [False, True]
    store.put([key(1)], [payload(5)])
    assert get(store, 1) == payload(5)
    store.flush()


def test_keys_of_another_length_are_refused(store):
    for call in (store.contains, store.delete):
        with pytest.raises(ValueError, match="keys: expected 32 to 64 bytes, got 3"):
            call([b"key"])
    for call in (store.put, store.get_into):
        with pytest.raises(ValueError, match="keys: expected 32 to 64 bytes, got 65"):
            call([bytes(65)], [bytearray(5)])


def test_another_number_of_buffers_than_of_keys_is_refused(store):
    for buffers in ([], [bytearray(5)] * 2):
        with pytest.raises(ValueError, match=f"buffers: expected 1, as many as keys, got {len(buffers)}"):
            store.get_into([key(1)], buffers)


def test_a_wrong_checksum_is_never_read_back(single):
    store = single
    store.put([key(1)], [payload(1)], checksums=[ops.checksum(np.frombuffer(payload(1), np.uint8)) ^ 1])
    assert get(store, 1) is None
    assert store.stats()["corrupt"] == 1
    assert store.contains([key(1)]) == [False]


def test_a_record_larger_than_the_store_is_dropped_and_counted(local):
    local.put([key(1), key(2)], [bytes(2 << 20), payload(2)])
    assert local.contains([key(1), key(2)]) == [False, True]
    assert local.stats()["dropped_puts"] == 1


def test_a_full_store_evicts_and_goes_on(local):
    store = local
    for i in range(30):
        store.put([key(i)], [payload(i, 100_000)])
    there = store.contains([key(i) for i in range(30)])
    assert 9 <= sum(there) <= 10
    assert there[29]
    assert store.stats()["evictions"] == 30 - sum(there)
    for i in range(30):
        assert get(store, i, 100_000) == (payload(i, 100_000) if there[i] else None)


@pytest.mark.parametrize("scheme", [*LOCAL, *TIERED])
def test_what_is_held_is_not_evicted_until_it_is_given_back(scheme, tmp_path):
    store, remove = new_store(scheme, tmp_path)
    store.put([key(1)], [payload(1, 200_000)])
    store.flush()
    for release in [store.hold([key(1), key(2)]) for _ in range(2)]:
        store.put([key(3)], [payload(3, 900_000)])  # room for one of the two
        store.flush()
        assert store.contains([key(1), key(3)]) == [True, False]
        release()
    store.put([key(3)], [payload(3, 900_000)])
    store.flush()
    assert store.contains([key(1), key(3)]) == [False, True]
    remove()


def test_what_is_held_can_be_deleted(store):
    store.put([key(1)], [payload(1)])
    release = store.hold([key(1)])
    store.delete([key(1)])
    assert store.contains([key(1)]) == [False]
    release()
    store.put([key(1)], [payload(1)])
    assert get(store, 1) == payload(1)


def test_an_owner_is_forgotten_alone(store):
    store.put([key(1), key(2)], [payload(1), payload(2)], owner=OWNER)
    store.put([key(3)], [payload(3)], owner=OTHER_OWNER)
    store.put([key(4)], [payload(4)])
    assert store.forget(OWNER) == 2
    assert store.contains([key(i) for i in range(1, 5)]) == [False, False, True, True]
    assert store.forget(OWNER) == 0


def test_stats_tell_capacity_use_and_records(local):
    local.put([key(1)], [payload(1, 5000)])
    stats = local.stats()
    assert stats["records"] == 1
    assert 5000 <= stats["used_bytes"] <= 5064
    assert stats["capacity_bytes"] == 1 << 20


@pytest.mark.parametrize("scheme", [*LOCAL, *REMOTE])
def test_any_sequence_of_calls_never_returns_a_wrong_payload(scheme, tmp_path):
    calls = st.lists(st.tuples(st.sampled_from("pppgdf"), st.integers(0, 9), st.integers(0, 60_000)), max_size=60)

    @settings(max_examples=40 if scheme in LOCAL else 5, deadline=None)
    @given(calls)
    def run(calls):
        store, remove = new_store(scheme, tmp_path, capacity="128KiB")
        sizes = {}
        for call, i, size in calls:
            if call == "p":
                there = store.contains([key(i)])[0]
                store.put([key(i)], [payload(i + size, size)], owner=OWNER if i % 2 else b"")
                sizes[i] = sizes[i] if there else size
            elif call == "d":
                store.delete([key(i)])
            elif call == "f":
                store.forget(OWNER)
                assert not any(store.contains([key(k) for k in range(1, 10, 2)]))
            elif store.contains([key(i)])[0]:
                assert get(store, i, sizes[i]) == payload(i + sizes[i], sizes[i])
            if scheme in LOCAL:
                stats = store.stats()
                assert stats["used_bytes"] <= stats["capacity_bytes"] == 128 << 10
        store.delete([key(i) for i in range(10)])
        assert stats_of(store)["records"] == stats_of(store)["used_bytes"] == 0
        store.put([key(99)], [bytes(128 << 10)])
        assert store.contains([key(99)]) == [True]  # no room is lost
        remove()

    run()


# --- mem:


@pytest.mark.parametrize(
    "wrong, error, text",
    [
        ({"checksums": [2**64]}, ValueError, r"checksums: expected 2|checksums\[0\]: expected a signed"),
        ({"checksums": [0, 2**63]}, ValueError, r"checksums\[1\]: expected a signed integer of 64 bits"),
        ({"checksums": []}, ValueError, "checksums: expected 2, as many as keys, got 0"),
        ({"checksums": [1, "2"]}, TypeError, r"checksums\[1\]: expected an integer, got str"),
        ({"buffers": [payload(1)]}, ValueError, "buffers: expected 2, as many as keys, got 1"),
        ({"owner": "tenant-seven...."}, TypeError, "owner: expected bytes, got str"),
        ({"owner": b"seven"}, ValueError, "owner: expected 16 bytes or none, got 5"),
        ({"keys": [key(1), "k" * 36]}, TypeError, "keys: expected bytes, got str"),
    ],
)
def test_a_put_that_is_wrong_is_refused_before_anything_is_stored(checked, wrong, error, text):
    before = {name: value for name, value in checked.stats().items() if name != "processes"}
    arguments = {"keys": [key(1), key(2)], "buffers": [payload(1), payload(2)], "owner": OWNER, "checksums": None}
    with pytest.raises(error, match=text):
        checked.put(**{**arguments, **wrong})
    assert {name: value for name, value in checked.stats().items() if name != "processes"} == before
    assert checked.contains([key(1), key(2)]) == [False, False]


@pytest.mark.parametrize("owner, error", [(b"", ValueError), (bytes(16), ValueError), ("seven", TypeError)])
def test_nobody_is_not_forgotten(checked, owner, error):
    checked.put([key(1)], [payload(1)])
    with pytest.raises(error, match="owner: expected"):
        checked.forget(owner)
    assert checked.contains([key(1)]) == [True]


def test_what_was_forgotten_since_a_moment_is_not_stored_and_counted(mem):
    moment = mem.moment()
    mem.forget(OWNER)
    mem.put([key(1)], [payload(1)], OWNER, as_of=moment)
    mem.put([key(2)], [payload(2)], OTHER_OWNER, as_of=moment)
    mem.put([key(3)], [payload(3)], as_of=moment)
    mem.put([key(4)], [payload(4)], OWNER, as_of=mem.moment())
    assert mem.contains([key(i) for i in range(1, 5)]) == [False, True, True, True]
    assert mem.stats()["dropped_puts"] == 1


def test_who_was_forgotten_is_known_of_the_last_owners_alone_and_counts_as_forgotten_before(mem, monkeypatch):
    monkeypatch.setattr(mem_module, "MOST_FORGOTTEN", 3)
    moments = [mem.moment()]
    for i in range(10):
        mem.forget(bytes([i + 1]) * 16)
        moments.append(mem.moment())
    assert len(mem._forgotten) == 3
    assert moments == sorted(set(moments))
    mem.put([key(1)], [payload(1)], bytes([1]) * 16, as_of=moments[0])  # forgotten since, but no longer listed
    mem.put([key(2)], [payload(2)], OWNER, as_of=moments[6])  # never forgotten, but the list is too short to tell
    mem.put([key(3)], [payload(3)], bytes([1]) * 16, as_of=moments[7])
    mem.put([key(4)], [payload(4)], bytes([10]) * 16, as_of=moments[9])
    mem.put([key(5)], [payload(5)], bytes([10]) * 16, as_of=moments[10])
    assert mem.contains([key(i) for i in range(1, 6)]) == [False, False, True, False, True]


def test_the_least_recently_used_record_goes_first_and_the_head_of_a_prefix_last(mem):
    for i in range(8):
        mem.put([key(i)], [payload(i)])
    assert mem.stats()["used_bytes"] == 1024
    get(mem, 0)
    mem.put([key(8)], [payload(8)])
    assert mem.contains([key(0), key(1), key(2), key(8)]) == [True, False, True, True]
    mem.get_into([key(2), key(3)], [bytearray(100), bytearray(100)])
    for i in range(10, 16):
        mem.put([key(i)], [payload(i)])
    mem.put([key(16)], [payload(16)])
    assert mem.contains([key(2), key(3)]) == [True, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 9), st.integers(0, 500)), max_size=60))
def test_the_gaps_of_mem_are_apart_and_join(calls):
    store = open_store("mem://?capacity=1KiB")
    for call, i, size in calls:
        if call == "p":
            store.put([key(i)], [payload(i + size, size)])
        elif call == "d":
            store.delete([key(i)])
        assert all(a[1] < b[0] for a, b in zip(store._gaps, store._gaps[1:], strict=False))
    store.delete([key(i) for i in range(10)])
    assert store._gaps == [(0, 1024)]


# --- URLs


@pytest.mark.parametrize(
    "url, text",
    [
        ("tiered:", "expected a URL that begins with mem://, .*got ''"),
        ("tiered://mem://?capacity=1MiB", "expected tiered:URL,URL,..., .*got 'tiered://mem://"),
        ("tiered:mem://?capacity=1MiB,disk:///x", "expected a URL that begins with mem://, .*got 'disk:///x'"),
        ("mem://", "capacity is missing"),
        ("mem://?capacity=", "capacity: expected a size such as 512MiB or 8GiB, got ''"),
        ("mem://?capacity=0", "capacity: expected a size"),
        ("mem://?capacity=-1GiB", "capacity: expected a size"),
        ("mem://?capacity=1GiBs", "capacity: expected a size"),
        ("mem://?capacity=8", "capacity: expected at least 64 bytes, got 8"),
        ("mem://?capacity=1GiB&size=3", "unknown option 'size'"),
        ("shm:///name#2?capacity=1GiB", "expected a URL without a fragment, got 'shm:///name#2"),
        ("mem://host?capacity=1GiB", "takes no host and no path"),
        ("memory://?capacity=1GiB", "expected a URL that begins with mem://"),
        ("/tmp/x", "expected a URL that begins with mem://"),
        ("", "expected a URL that begins with mem://"),
        ("mem://?capacity", "expected NAME=VALUE after the question mark, got 'capacity'"),
        ("mem:1", "expected a URL that begins with mem://"),
        ("shm:///none-such", "there is no store in .*capacity=8GiB"),
        ("shm:///small?capacity=100", "capacity: expected at least 16384 bytes, got 100"),
        ("shm://host/name?capacity=1GiB", "expected shm:///NAME"),
        ("shm:///?capacity=1GiB", "expected a name of letters"),
        ("shm:///a/b?capacity=1GiB", "expected a name of letters"),
        ("shm:///..?capacity=1GiB", "expected a name of letters"),
        ("shm:///x?capacity=1GiB&ttl=soon", "ttl: expected seconds, got 'soon'"),
        ("shm:///x?capacity=1GiB&quota=much", "quota: expected a size"),
        ("file://dir?capacity=1GiB", "expected file:///DIR"),
        ("file:///?capacity=1GiB", "expected file:///DIR"),
    ],
)
def test_urls_that_open_no_store_say_why(url, text):
    with pytest.raises(ValueError, match=text):
        open_store(url)


def test_a_directory_without_a_parent_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"parent directory does not exist: '.*/nowhere/store'"):
        open_store(f"file://{tmp_path}/nowhere/store?capacity=1MiB")


def test_no_room_is_an_error_that_says_so(tmp_path):
    size = 1 << 50
    (tmp_path / "mine").mkdir(mode=0o700)
    for name in ("new", "mine"):
        with pytest.raises(OSError, match=rf"no room for {size} bytes in .*, where \d+ bytes are free"):
            open_store(f"file://{tmp_path}/{name}?capacity={size}")
    assert os.listdir(tmp_path) == ["mine"]
    assert os.listdir(tmp_path / "mine") == ["lock"]
    open_store(f"file://{tmp_path}/new?capacity=1MiB").close()


SCHEMES = st.sampled_from(
    [*["mem", "shm", "file", "valkey", "s3", "mooncake", "peer", "nixl"], "tiered", "http", "", "MEM", "mem,mem"]
)
PLACES = st.sampled_from(
    ["", "/", "/x", "bucket", "host:1", "[::1]:1", "[::1", "host:0", ":1", "a b", "\0", "//", "é:1"]
)
VALUES = st.sampled_from(
    ["", "0", "1", "-1", "1e3", "nan", "inf", "2", "1GiB", "1" * 5000, "\u0661", "1MiB", "/x", "%00"]
)
OPTIONS = [
    "capacity",
    "quota",
    "ttl",
    "timeout",
    "connections",
    "tls",
    "ca",
    "cluster",
    "endpoint",
    "region",
    "admin",
    "hostname",
    "trusted_network",
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_url_opens_a_store_or_raises_what_is_documented(data):
    def url():
        options = data.draw(st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=3))
        query = "?" * data.draw(st.booleans()) + "&".join(f"{name}={value}" for name, value in options.items())
        return f"{data.draw(SCHEMES)}:{data.draw(st.sampled_from(['//', '', '/', '////']))}{data.draw(PLACES)}{query}"

    names = [url() for _ in range(data.draw(st.integers(1, 3)))]
    joined = data.draw(st.sampled_from([names, f"tiered:{','.join(names)}", names[0], data.draw(st.text(max_size=20))]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LMCACHE_MM_SECRET", "a secret of a deployment")
        for module in ("valkey", "s3", "mooncake"):  # other tests cover their connections
            patched.setattr(f"lmcache_mm.stores.remote.{module}.connecting", lambda *_, **__: lambda: None)
        patched.setattr(slab.SlabStore, "open", classmethod(lambda *_, **__: MemStore(1 << 20)))
        try:
            store = open_store(joined)
        except (ValueError, OSError, RuntimeError):
            return
        store.close()


def test_a_closed_store_says_so_in_every_method(local):
    local.close()
    for call in (
        *(lambda: local.contains([key(1)]), lambda: local.get_into([key(1)], [bytearray(8)])),
        *(lambda: local.put([key(1)], [payload(1)]), lambda: local.delete([key(1)]), lambda: local.ages([key(1)])),
        *(lambda: local.forget(OWNER), local.moment, local.flush, local.stats),
    ):
        with pytest.raises(RuntimeError, match="it is closed"):
            call()
