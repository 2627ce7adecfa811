"""Sessions, whose prompts come in parts."""

from __future__ import annotations

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens


@pytest.mark.parametrize("setting", ["both at once", "prefix caching", "steps of 32 tokens", "sync", "generated"])
def test_every_part_of_a_session_is_answered_as_without_the_connector(sessions, setting):
    if setting == "sync" and setting not in sessions:
        pytest.skip("Model Runner V2 has no loads within a step")
    expected = sessions["expected"]
    assert expected[0][:2] == expected[1][:2]
    assert expected[0][2] != expected[1][2]
    assert sessions["first"] == expected[:1]
    assert sessions["again"] == sessions["a new engine"] == expected
    assert sessions[setting] == expected * 2
    assert tokens(sessions[f"{setting}, as one"]) == tokens(sessions["expected as one"])
    assert sessions["of one token"] == [sessions["expected of one token"]]


def test_what_a_session_has_stored_is_hit_by_requests_that_begin_as_it_did(sessions):
    """Up to where they differ: a chunk that ends before another image; with the same images everything, including the
    ends of parts."""
    assert cached(sessions["two parts"]) == [129]
    assert cached(sessions["as one, other image"]) == [128]
    assert cached(sessions["as one"]) == [201]
    assert cached(sessions["as one, other image, again"]) == [201]
    assert cached(sessions["a new engine, as one"]) == [201, 201]
    for setting in ("both at once", "prefix caching", "steps of 32 tokens", "generated"):
        assert cached(sessions[f"{setting}, as one"]) == [192, 192]
    for name, expected in (("two parts", "two parts"), ("short", "short")):
        assert tokens(sessions[name]) == tokens(sessions[f"expected {expected}"])
    for name in ("as one, other image", "as one, other image, again"):
        assert tokens(sessions[name]) == tokens(sessions["expected as one"])[1:]
    assert sessions["blocks"][0] == sessions["blocks"][1]


def test_the_first_part_of_a_session_is_loaded(sessions):
    """vLLM asks only for the first: 59 tokens of each of two sessions, besides the other requests' loads."""
    assert sessions["counts"]["loaded_tokens"] == 129 + 128 + 201 + 59 + 59 + 201


def test_sessions_that_are_preempted_are_loaded_and_answered_as_ever(sessions_in_trouble):
    assert sessions_in_trouble["preempted"] == sessions_in_trouble["expected"]
    assert sessions_in_trouble["preemptions"] > 0
    # A first part with its answer has fewer tokens: so one was loaded in a later part.
    assert sessions_in_trouble["loaded"] > 89 * sessions_in_trouble["preemptions"]
    assert sessions_in_trouble["blocks"][0] == sessions_in_trouble["blocks"][1]


def test_sessions_aborted_while_they_wait_and_while_they_run_give_their_pages_back(sessions_in_trouble):
    assert sessions_in_trouble["aborted blocks"][0] == sessions_in_trouble["aborted blocks"][1]
    assert tokens(sessions_in_trouble["after the aborts, as one"]) == tokens(sessions_in_trouble["expected as one"])[:1]
    assert cached(sessions_in_trouble["after the aborts, as one"]) == [201]


def test_an_image_under_anothers_uuid_in_a_later_part_answers_nobody_elses_question(sessions_in_trouble):
    one, whole = tokens(sessions_in_trouble["expected as one"])
    assert tokens(sessions_in_trouble["after a lie"]) == [whole, one]
    assert cached(sessions_in_trouble["after a lie"])[0] == 0


def test_images_of_later_parts_are_encoded_once(sessions_in_trouble):
    expected = sessions_in_trouble["expected encoded"]
    assert expected["encoded"] == [144, 144, 144]
    assert sessions_in_trouble["encoded"]["rows"] == expected["rows"][:1]
    assert sessions_in_trouble["encoded before"] == {"rows": expected["rows"], "encoded": [144]}
    assert cached(sessions_in_trouble["encoded before, as one"]) == [201]


def test_a_part_that_describes_an_image_and_brings_none_ends_its_session_and_nothing_else_does(sessions_in_trouble):
    first = sessions_in_trouble["expected encoded"]["rows"][0]
    assert sessions_in_trouble["nothing"] == first[0]
    assert sessions_in_trouble["afterwards"] == [first]


def test_sessions_through_vllms_own_interface_are_stored_as_they_grow(sessions_served):
    session, as_one, hit, again = sessions_served["got"]
    assert session == again
    assert session[24:] == as_one
    assert hit == 201
