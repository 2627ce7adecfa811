"""The encoder connector, without and with the KV connector."""

from __future__ import annotations

from typing import Any

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens

PATCHES, VIDEO_PATCHES = 144, 128  # of the images and videos in the questions


def test_an_image_is_encoded_once_whatever_the_text_around_it(encoder):
    """By the first engine; the second loads it from the store, for three prompts at once and in steps of 64 tokens."""
    expected = tokens(encoder["expected"]["rows"])
    assert len({tuple(answer) for answer in expected}) == 6
    assert encoder["expected"]["encoded"] == [PATCHES] * 2 + [VIDEO_PATCHES] * 2
    assert encoder["first"]["encoded"] == [PATCHES, VIDEO_PATCHES]
    assert tokens(encoder["first"]["rows"]) == [expected[0], expected[4]]
    assert (tokens(encoder["at once"]["rows"]), encoder["at once"]["encoded"]) == (expected[:3], [])


def test_of_two_images_the_one_that_is_new_is_encoded(encoder):
    both = encoder["one of two known"]
    assert (tokens(both["rows"]), both["encoded"]) == (tokens(encoder["expected"]["rows"])[3:4], [PATCHES])


def test_a_video_seen_before_is_not_encoded(encoder):
    videos = encoder["videos"]
    assert (tokens(videos["rows"]), videos["encoded"]) == (tokens(encoder["expected"]["rows"])[4:], [VIDEO_PATCHES])


def test_what_was_encoded_loaded_and_stored_is_counted(encoder):
    """Prompts about images in vLLM's own cache ask for nothing. The last stores are reported with another step."""
    names = ("hit_items", "loaded_items", "failed_lookups", "failed_stores")
    assert [encoder["counts"][f"encoder_{name}"] for name in names] == [2, 2, 0, 0]
    assert encoder["counts"]["encoder_queried_items"] >= 4  # on a busy machine vLLM may ask again
    assert encoder["counts"]["encoder_stored_items"] >= 1


def test_an_image_that_vllm_has_forgotten_is_computed_or_loaded(encoder):
    assert tokens(encoder["after vLLM forgot"]["rows"]) == tokens(encoder["expected"]["rows"])[3:4]


def test_both_connectors_share_a_store_and_each_has_its_own_hits(encoder):
    """The store has both images, but no KV at first: nothing is ever encoded."""
    expected = tokens(encoder["expected"]["rows"])[:4]
    first, again = encoder["with KV"], encoder["with KV, again"]
    assert tokens(first["rows"]) == tokens(again["rows"]) == expected
    assert first["encoded"] == again["encoded"] == []
    assert cached(first["rows"]) == [0, 0, 0, 0]
    assert cached(again["rows"]) == [row["prompt_tokens"] for row in again["rows"]]


def test_images_are_encoded_again_once_weights_have_changed(encoder):
    """The KV connector learns of the change."""
    after = encoder["changed weights"]
    assert (tokens(after["rows"]), after["encoded"]) == (tokens(encoder["expected changed"]), [PATCHES])


def answers_of(identity: dict[str, Any], images: str) -> list[list[int]]:
    """Answers by the images' numbers."""
    expected = tokens(identity["expected"]["rows"])
    return [expected[int(i)] for i in images]


def test_images_are_known_by_their_data_where_identifiers_are_counters(encoder_identity):
    seen = encoder_identity["counters"]
    assert (tokens(seen["rows"]), seen["encoded"]) == (answers_of(encoder_identity, "0101"), [PATCHES] * 2)


def test_an_image_under_anothers_uuid_is_loaded_for_nobody_else(encoder_identity):
    """Two images alternate under one uuid, each evicted from vLLM's own cache before the next; only a third is new."""
    seen = encoder_identity["one uuid"]
    assert (tokens(seen["rows"]), seen["encoded"]) == (answers_of(encoder_identity, "02120"), [PATCHES])
    honest = encoder_identity["honest"]
    assert (tokens(honest["rows"]), honest["encoded"]) == (answers_of(encoder_identity, "012"), [])


def test_two_images_under_one_uuid_in_one_prompt_are_stored_as_what_was_encoded(encoder_identity):
    """vLLM encodes the first one and uses it for both."""
    seen = encoder_identity["one uuid twice"]
    assert (tokens(seen["rows"])[1:], seen["encoded"]) == (answers_of(encoder_identity, "01"), [PATCHES] * 2)


def test_tenants_share_no_encoder_output_through_the_store(encoder_identity):
    seen = encoder_identity["tenants"]
    assert (tokens(seen["rows"]), seen["encoded"]) == (answers_of(encoder_identity, "0000"), [PATCHES] * 2)


def test_a_request_that_wants_no_cache_stores_and_loads_no_encoder_output(encoder_identity):
    answers = {name: encoder_identity[name] for name in ("no store", "not stored", "no load", "stored")}
    assert [seen["encoded"] for seen in answers.values()] == [[PATCHES], [PATCHES], [PATCHES], []]
    assert len({tuple(seen["rows"][0]["answer"]) for seen in answers.values()}) == 1


def test_a_request_that_describes_an_image_and_brings_none_ends_and_nothing_else_does(encoder_identity):
    """vLLM accepts such requests if there is a connector; encoding a missing image would end the engine."""
    assert [row["finish"] for row in encoder_identity["no image"]["rows"]] == ["error"]
    after = encoder_identity["afterwards"]
    assert (tokens(after["rows"]), after["encoded"]) == (answers_of(encoder_identity, "0"), [])


ENCODER_COUNTED = {"FailsToStore": "failed_stores", "HangsToStore": "failed_stores"} | dict.fromkeys(
    ("Fails", "FailsToTell", "Hangs", "HangsToTell"), "failed_lookups"
)


@pytest.mark.parametrize(
    "fault",
    [
        *("Fails", "FailsToTell", "Lies", "Loses", "Corrupts", "Hangs", "HangsToTell", "Emptied"),
        *("FailsToStore", "HangsToStore"),
    ],
)
def test_an_encoder_store_that_misbehaves_costs_an_encoding_and_nothing_else(encoder_trouble, fault):
    """The image was stored and then evicted from vLLM's own cache. A loss after the read has no effect."""
    found = encoder_trouble[fault]
    assert tokens(found["rows"]) == tokens(found["expected"])
    assert found["encoded"] == ([] if fault == "Emptied" else [PATCHES])
    assert found["loaded"] == (fault == "Emptied")
    assert all(row["finish"] == "length" for row in found["then"]["rows"])
    assert found["seconds"] < 30
    if fault in ENCODER_COUNTED:
        assert found["counts"][f"encoder_{ENCODER_COUNTED[fault]}"] >= 1


def test_workers_in_processes_of_their_own_load_what_the_scheduler_read(encoder_ranks, encoder, encoder_identity):
    one, two, three = tokens(encoder["expected"]["rows"])[:3]
    other = answers_of(encoder_identity, "1")[0]
    assert tokens(encoder_ranks["got"]) == [one, other, two, other, three]
    assert encoder_ranks["counts"]["encoder_loaded_items"] == 3
    assert encoder_ranks["counts"]["encoder_stored_items"] == 2
