"""Every answer is that of an engine without the connector, and only requests for the same share what is stored.

Pages are opaque on the CPU: without opaque_tails, hits end at whole pages.
"""

from __future__ import annotations

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens


def test_the_model_answers_about_what_it_is_shown(answers):
    """Otherwise equal answers would prove nothing."""
    expected = answers["expected"]
    assert len({tuple(row["answer"]) for row in expected}) == 10
    assert all(row["cached"] == 0 for row in expected)


@pytest.mark.parametrize(
    "setting",
    [
        *("opaque tails", "a new engine", "prefix caching", "16 at once", "whole pages"),
        *("steps of 32 tokens", "pages of 128"),
    ],
)
def test_every_answer_is_the_one_without_the_connector(answers, setting):
    expected = tokens(answers["expected"])
    assert tokens(answers[setting]) == (expected + expected)[: len(answers[setting])]
    assert len(answers[setting]) >= 15


@pytest.mark.parametrize("setting", ["opaque tails", "pages of 128"])
def test_hits_are_exact_to_the_token_with_opaque_tails(answers, setting):
    """In the order of the questions: the same again hits all; another image, video or order nothing; another question
    hits up to the image's end."""
    assert cached(answers[setting]) == [0, 59, 0, 43, 0, 0, 0, 91, 0, 205, 0, 56, 0, 0, 98]


@pytest.mark.parametrize("setting", ["whole pages", "steps of 32 tokens"])
def test_hits_end_at_whole_pages_without(answers, setting):
    assert cached(answers[setting]) == [0, 32, 0, 32, 0, 0, 0, 64, 0, 192, 0, 32, 0, 0, 96]


@pytest.mark.parametrize("setting", ["a new engine", "prefix caching", "16 at once"])
def test_another_engine_finds_all_that_the_first_stored(answers, setting):
    rows = answers[setting]
    assert cached(rows) == [row["prompt_tokens"] for row in rows]


WITHIN_STEPS = {
    "sync": [0, 43, 0, 64, 64, 64, 64, 86, 192, 196, 0, 39, 0, 64, 64],
    "layers": [0, 0, 0, 64, 64, 64, 64, 64, 192, 192, 0, 0, 0, 64, 64],
}


@pytest.mark.parametrize("load", WITHIN_STEPS)
def test_loads_within_a_step_leave_a_token_that_it_computes(answers, load):
    """They cover whole images. Another engine answered all questions before, and stored only whole pages; hits of loads
    by layers end at whole pages too."""
    rows = answers[load]
    if isinstance(rows, str):  # Model Runner V2
        assert f"LMCacheMMConnector: load={load} is not supported with Model Runner V2" in rows
        return
    assert tokens(rows) == tokens(answers["expected"])
    assert cached(rows) == WITHIN_STEPS[load]
    assert all(row["cached"] < row["prompt_tokens"] for row in rows)


def test_what_was_hit_loaded_and_stored_is_counted(answers):
    counts = answers["counts"]
    assert counts["hit_tokens"] == counts["loaded_tokens"] == sum(cached(answers["opaque tails"]))
    assert counts["queried_tokens"] == sum(row["prompt_tokens"] for row in answers["expected"])
    assert counts["stored_tokens"] > 0
    assert counts["failed_lookups"] == counts["failed_loads"] == counts["failed_stores"] == 0


def test_identifiers_that_are_counters_never_stand_for_an_image(identity):
    one, two = tokens(identity["expected"])
    assert tokens(identity["counters, first"]) == [one]
    assert (tokens(identity["counters, other image"]), cached(identity["counters, other image"])) == ([two], [0])
    assert (tokens(identity["counters, same image"]), cached(identity["counters, same image"])) == ([one], [59])


def test_an_image_under_anothers_uuid_answers_nobody_elses_question(identity):
    one, two = tokens(identity["expected"])
    assert tokens(identity["claimed"]) == [one]
    foreign = identity["another engine's image under the same uuid"]
    assert (tokens(foreign), cached(foreign)) == ([two], [0])
    assert tokens(identity["that uuid's own image"]) == [one]


def test_one_uuid_for_two_images_fools_its_own_client_only(identity):
    """vLLM's processor cache is keyed by uuids: it never looks at the second image, connector or not."""
    one, two = tokens(identity["expected"])
    assert tokens(identity["one uuid for two images"]) == [one, one]
    assert tokens(identity["honest clients meanwhile"]) == [one, two]
    assert tokens(identity["honest clients later"]) == [one, two]


def test_tenants_share_nothing(identity):
    rows = identity["tenants"]
    assert cached(rows) == [0, 0, 0, 59, 59, 59]
    assert tokens(rows) == tokens(identity["expected"])[:1] * 6


def test_a_request_may_be_left_out(identity):
    assert cached(identity["no store"]) == [0, 0]
    assert cached(identity["no load"]) == [0, 59]


def test_wishes_that_are_none_are_none(identity):
    assert tokens(identity["malformed"]) == tokens(identity["expected"])[:1] * 4


def test_what_vllm_took_for_another_image_is_not_stored(identity):
    """A request without caching puts its image into vLLM's encoder cache under a uuid; the next request with that uuid
    gets that image's KV."""
    assert tokens(identity["behind a poisoned encoder cache"]) == tokens(identity["expected"])


def test_an_adapter_that_changes_while_vllm_uses_it_is_cached_no_more(adapters):
    assert tokens(adapters["changed meanwhile"]) == tokens(adapters["expected changed"])
    assert cached(adapters["changed meanwhile"]) == [0]


def test_adapters_and_the_base_model_share_nothing(adapters):
    """The other adapter has the first one's name, id and path."""
    base, one = tokens(adapters["expected one"])
    _, other = tokens(adapters["expected other"])
    assert len({tuple(answer) for answer in (base, one, other)}) == 3
    assert (tokens(adapters["one"]), cached(adapters["one"])) == ([base, one, base, one], [0, 0, 59, 59])
    assert (tokens(adapters["other"]), cached(adapters["other"])) == ([base, other, base, other], [59, 0, 59, 59])


def test_prompts_of_embeddings_are_known_by_their_content(adapters):
    expected = tokens(adapters["expected embedded"])
    assert expected[0] != expected[1]
    assert (tokens(adapters["embedded"]), cached(adapters["embedded"])) == (expected * 2, [0, 0, 70, 70])
