"""Stores that misbehave, caches that are too small, steps that fail, and requests of any content."""

from __future__ import annotations

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens

COUNTED = {"FailsToStore": "failed_stores", "HangsToStore": "failed_stores"} | dict.fromkeys(
    ("FailsToTell", "HangsToTell"), "failed_lookups"
)


@pytest.mark.parametrize(
    "fault",
    [
        *("Fails", "FailsToTell", "FailsToStore", "Lies", "Loses", "Corrupts"),
        *("Hangs", "HangsInPlace", "HangsToTell", "HangsToStore"),
    ],
)
def test_a_store_that_misbehaves_costs_time_and_nothing_else(trouble, fault):
    """Six requests on a store that hangs forever wait for it only once: five seconds, and one for a save."""
    found, expected = trouble[fault], tokens(trouble["expected"][fault])
    assert tokens(found["got"]) == expected * 2
    assert all(row["finish"] == "length" for row in found["got"])
    assert found["blocks"][0] == found["blocks"][1]
    assert found["counts"][COUNTED.get(fault, "failed_loads")] > 0
    assert tokens(found["then"]) == expected  # the store has no wrong records
    assert cached(found["then"])[2] >= 64  # and it is used again
    assert found["seconds"] < 60


def test_preempted_requests_answer_as_ever_and_no_page_is_lost(pressure):
    assert pressure["preemptions"] > 0
    assert tokens(pressure["preempted"]) == tokens(pressure["expected long"]) * 2
    assert pressure["preempted blocks"][0] == pressure["preempted blocks"][1]


def test_a_request_aborted_in_the_middle_of_its_load_gives_its_pages_back(pressure):
    one, two = tokens(pressure["expected"])
    assert tokens(pressure["after the abort"]) == [two, one]
    before, during, after = pressure["aborted blocks"]
    assert during < before == after


def test_a_prompt_of_one_token_is_answered_again(odd_requests):
    """vLLM reduces a hit of all tokens by one and asks again if that is 0: such a request would never end."""
    assert tokens(odd_requests["one token"]) == tokens(odd_requests["expected"])[1:] * 3
    assert cached(odd_requests["one token"]) == [0, 0, 0]


def test_transfer_params_of_any_type_end_no_engine(odd_requests):
    """vLLM's own front end refuses some."""
    expected = tokens(odd_requests["expected"])[0]
    for params, (ended,) in odd_requests["ended"]:
        malformed = any(value and not isinstance(value, dict) for value in params.values())
        assert ended.get("answer") == expected or (malformed and "has no attribute" in ended["error"]), params
    assert len(odd_requests["ended"]) == 24
    assert all("has no attribute" in error for error in odd_requests["aborted"])
    assert tokens(odd_requests["afterwards"]) == tokens(odd_requests["expected"])
    assert cached(odd_requests["afterwards"]) == [59, 0]


def test_models_whose_pooling_needs_all_tokens_at_once_are_refused_at_start(pooling):
    """Otherwise the second request would end the engine."""
    apart, hit = pooling["LAST"]
    assert apart < 1e-4
    assert hit >= 96
    for kind in ("MEAN", "CLS"):
        assert "LMCacheMMConnector: vLLM cannot reuse a prefix's KV with this model" in pooling[kind]


def test_salts_of_any_content_end_no_engine(odd_requests):
    assert tokens(row for rows in odd_requests["salts"] for row in rows) == tokens(odd_requests["expected"])[:1] * 4


def test_what_a_failed_step_did_not_compute_is_not_stored(pressure):
    """The failure ends the engine, but not the store."""
    assert "as out of memory" in pressure["failed"]
    one, _ = tokens(pressure["expected"])
    assert (tokens(pressure["after a step that failed"]), cached(pressure["after a step that failed"])) == ([one], [0])


def test_generated_tokens_are_stored_on_request(pressure):
    """80 tokens of a prompt and 60 of its answer, in chunks of 64."""
    assert cached(pressure["generated"]) == [128]
