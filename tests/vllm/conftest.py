"""What the tests with vLLM's own schedulers and caches share."""

from __future__ import annotations

import importlib
import uuid
from typing import Any

import pytest

from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab


@pytest.fixture(scope="module")
def cases() -> Any:
    """Imported here, since an import at the top would load vLLM in every test run."""
    return importlib.import_module("cases")


@pytest.fixture
def url():
    url = f"shm:///test-{uuid.uuid4().hex}"
    opened = open_store(f"{url}?capacity=16MiB")
    yield url
    opened.close()
    assert slab.remove(slab_directory(url)[1])
