"""Stores on the tests' servers."""

import uuid

import pytest

import servers
from test_stores import REMOTE, new_store


@pytest.fixture
def environment(monkeypatch):
    for name, value in {**servers.AWS, "LMCACHE_MM_SECRET": uuid.uuid4().hex}.items():
        monkeypatch.setenv(name, value)
    for name in ("PASSWORD", "PASSWORD_FILE", "USERNAME"):
        monkeypatch.delenv(f"LMCACHE_MM_VALKEY_{name}", raising=False)
    return monkeypatch


@pytest.fixture(params=[*REMOTE, "cluster"])
def store(request, tmp_path):
    store, remove = new_store(request.param, tmp_path)
    yield store
    remove()


@pytest.fixture
def far(tmp_path):
    """A valkey: store."""
    store, remove = new_store("valkey", tmp_path)
    yield store
    remove()


@pytest.fixture
def own_server(tmp_path, environment):
    """A Valkey server that the test may stop."""
    started = servers.valkey(tmp_path)
    yield started
    started.stop()
