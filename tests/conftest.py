"""Fixtures of the tests: paged caches in every layout."""

from __future__ import annotations

import pytest

from layouts import LAYOUTS, PagedCache, opaque

pytest.register_assert_rewrite("slabs", "remotes", "servers", "findings")  # modules whose assertions tests rely on


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def paged(request: pytest.FixtureRequest) -> PagedCache:
    return request.param()


@pytest.fixture(params=[make for make in LAYOUTS if make is not opaque], ids=lambda make: make.__name__)
def dense(request: pytest.FixtureRequest) -> PagedCache:
    return request.param()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests that fork first: forking the process after all other tests takes seconds."""
    items.sort(key=lambda item: not (item.path.parent.name == "slab" or item.path.name == "test_tiered.py"))
