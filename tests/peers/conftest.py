"""A store of this host, the server that lends it, and who reads from that."""

import uuid

import pytest

from lending import SECRET, opened, serving
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab


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


@pytest.fixture
def server(lent):
    with serving(lent) as server:
        yield server


@pytest.fixture
def reader(server):
    with opened(server.address[1]) as store:
        yield store


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
