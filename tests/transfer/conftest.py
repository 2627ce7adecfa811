"""Transfers over stores of both kinds."""

import pytest

from jobs import Gate, layout_of
from lmcache_mm.copies import HostCopies
from lmcache_mm.transfer import Transfer
from test_stores import new_store


@pytest.fixture(params=[4, 5], ids=["whole lanes", "odd"])
def row(request):
    """Bytes per token in a layer; with 4, a layer's part of a payload begins at a lane of its checksum."""
    return request.param


@pytest.fixture
def small_steps(monkeypatch):
    """Makes jobs take a step per chunk, through staging memory and in place."""
    monkeypatch.setattr("lmcache_mm.transfer.STAGING_BYTES", 1)
    monkeypatch.setattr("lmcache_mm.transfer.SLOTS_BYTES", 1)


@pytest.fixture
def at_each_copy(monkeypatch):
    """Has functions called before each copy of pages."""
    copy = HostCopies._copy

    def call(*functions):
        def both(*arguments):
            for function in functions:
                function()
            return copy(*arguments)

        monkeypatch.setattr(HostCopies, "_copy", both)

    return call


@pytest.fixture(params=["mem", "shm"])
def store(request, tmp_path):
    opened, remove = new_store(request.param, tmp_path, capacity="4MiB")
    yield opened
    opened.close()
    remove()


@pytest.fixture
def make(store):
    """Transfers over the store, some of whose methods hang until the gate opens."""
    made = []

    def transfer(kv, *shut, largest=1 << 16):
        gate = Gate(store, shut)
        made.append((gate, Transfer(layout_of(kv), gate, largest)))
        return gate, made[-1][1]

    yield transfer
    for gate, transfer in made:
        gate.open.set()
        transfer.close()
