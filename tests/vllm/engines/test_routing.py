"""What routers are told of an engine's store."""

from __future__ import annotations

from combinations import pytestmark  # noqa: F401


def test_routers_find_a_picture_where_it_is_stored_and_no_other_picture_or_tenant(routing):
    """Four questions: the picture; the same under another salt; another picture, whose preceding words are stored; and
    the first one under a salt without records."""
    assert routing["stored"] == routing["stored anew"] == [192, 192, 32, 0]
    assert routing["wrong"] == []


def test_routers_are_told_of_what_another_engine_stored_once_it_is_found(routing):
    assert routing["found"] == [192, 0, 32, 0]


def test_routers_are_told_what_other_processes_took_from_the_store(routing):
    """A tenant is forgotten; other records evict everything."""
    assert routing["forgotten"] == [192, 0, 32, 0]
    assert routing["evicted"] == [0, 0, 0, 0]


def test_routers_forget_with_a_reset_and_are_told_again_of_what_is_found_after_it(routing):
    """After a reset of the connector, nothing older is found."""
    assert routing["vLLM's cache reset"] == routing["reset"] == [0, 0, 0, 0]
    assert routing["found again"] == [192, 0, 32, 0]


def test_blocks_are_told_as_vllms_own_pool_tells_them_in_the_same_engine(routing):
    assert routing["blocks"] == [12, 12]


def test_blocks_of_all_groups_are_told(routing_groups):
    """vLLM's pool leaves out blocks of windows at which no hit can end, and includes other groups' tokens."""
    (whole,) = routing_groups["full_attention"]
    assert whole == {"window": None, "blocks": 8, "of vLLM": 8, "same": 8}
    windows = routing_groups["sliding_window"]
    assert windows == [{**window, "window": 64, "blocks": 8} for window in windows]
    assert len(windows) == 3
    assert all(window["of vLLM"] for window in windows)
    assert routing_groups["without vLLM's cache"] == [256] * 4
    assert routing_groups["wrong"] == []
