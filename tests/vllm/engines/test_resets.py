"""Weights that change in place, and caches that are reset during requests."""

from __future__ import annotations

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens


def test_a_reset_that_changes_no_weights_keeps_what_is_stored(weights):
    """Such as a pause, a sleep, or a reset of vLLM's own cache. Weights that cannot be checked count as changed."""
    expected = tokens(weights["expected"])
    assert (tokens(weights["first"]), cached(weights["first"])) == (expected, [0])
    for reset in ("reset", "reset of vLLM alone"):
        assert (tokens(weights[reset]), cached(weights[reset])) == (expected, [59])
    unseen = weights["weights that cannot be seen"]
    assert (tokens(unseen), cached(unseen)) == (expected * 2, [0, 59])


def test_weights_that_changed_in_place_are_never_answered_from_before(weights):
    """Engines with the same change share records; changing back restores access to the old ones."""
    before, after = tokens(weights["expected"]), tokens(weights["expected changed"])
    assert before != after
    assert (tokens(weights["changed"]), cached(weights["changed"])) == (after, [0])
    for later in ("changed, again", "another engine with that change"):
        assert (tokens(weights[later]), cached(weights[later])) == (after, [59])
    assert (tokens(weights["changed back"]), cached(weights["changed back"])) == (before, [59])


@pytest.mark.parametrize("setting", ["whole prompts", "steps of 64 tokens", "prefix caching"])
def test_requests_whose_caches_are_reset_under_them_encode_their_images_after_all(pausing, setting):
    """At first all their images came from the store."""
    seen = pausing[setting]
    assert cached(seen["got"]) == [row["prompt_tokens"] for row in seen["got"]]
    assert seen["resets_left"] == 0
    assert tokens(seen["got"]) == tokens(pausing["expected"])
    assert seen["blocks"][0] == seen["blocks"][1]


def test_a_reset_while_requests_are_loaded_is_refused_and_they_go_on(pausing):
    seen = pausing["loading"]
    assert seen["errors"]
    assert all("Failed to reset KV cache" in error for error in seen["errors"])
    assert seen["resets_left"] == 0  # they succeed once the images are loaded
    assert tokens(seen["got"]) == tokens(pausing["expected"])
    assert seen["blocks"][0] == seen["blocks"][1]
