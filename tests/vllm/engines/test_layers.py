"""Models with layers that keep windows or states beside those of full attention."""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any

import pytest

from combinations import pytestmark  # noqa: F401
from findings import cached, tokens


def test_sliding_window_layers_are_stored_and_loaded_with_the_others(sliding_windows):
    expected = tokens(sliding_windows["expected"])
    assert len({tuple(answer) for answer in expected}) == 6
    assert tokens(sliding_windows["first"]) == tokens(sliding_windows["second"]) == expected
    assert cached(sliding_windows["first"]) == [0, 276, 256, 0, 0, 0, 0]
    assert cached(sliding_windows["second"]) == [276, 276, 294, 282, 253, 254, 286]


NAMES_OF_STATES = (
    *("600", "600 again", "goes on", "640", "640 again"),
    *("parts at 500", "parts there too"),
)


def agree(answer: list[int], expected: dict[str, Any]) -> bool:
    """Whether an answer is the expected one, or parts from it where the model finds two tokens as good: to within what
    differently cut steps make of a logarithm of a probability: two steps of bfloat16 at most, which are 0.0625."""
    for token, best, steps in zip(answer, expected["answer"], expected["logprobs"], strict=True):
        if token != best:
            of_step = dict(map(tuple, steps))
            return token in of_step and of_step[best] - of_step[token] < 0.07
    return True


def test_a_hit_of_states_changes_no_answer(states):
    """Of the store's, in an engine with the same steps and in one with others, alone and all at once."""
    expected = [states["expected"][name] for name in NAMES_OF_STATES]
    assert len({tuple(row["answer"]) for row in expected}) == 5
    rows = [[states[where][name] for name in NAMES_OF_STATES] for where in ("other steps", "first", "second")]
    for of_engine in (*rows, states.get("at once", expected)):
        assert all(agree(row["answer"], want) for row, want in zip(of_engine, expected, strict=True))


def test_a_hit_of_states_ends_where_one_was_kept(states):
    """At the end of the prompt's last whole block that leaves a token to be computed; and where another prompt parts
    from one that is stored, once that has been seen."""
    block = states["block"]
    chunk = -(-64 // block) * block
    end, later, junction = 599 // block * block, 639 // block * block, 500 // chunk * chunk
    assert cached(list(states["expected"].values())) == [0] * 7
    assert cached(list(states["first"].values())) == [0, end, end, end, later, 0, junction]
    of_its_own = 649 // block * block
    assert cached(list(states["second"].values())) == [end, end, 799 // block * block, later, later, *[of_its_own] * 2]


def test_a_hit_of_states_is_exact_for_the_same_steps(states):
    """Bit by bit, as with vLLM's own cache."""
    computed, hit = states["by vLLM's own cache"]
    assert (computed["cached"], hit["cached"]) == (0, 599 // states["block"] * states["block"])
    assert states["first"]["600"]["logprobs"] == computed["logprobs"]
    assert states["first"]["600 again"]["logprobs"] == hit["logprobs"]


def test_a_hit_of_states_of_other_steps_is_as_near_as_vllm_is_to_itself(states):
    """The second engine computes in steps of 512 what it does not find in states of steps of 256."""

    def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
        same = sum(1 for _ in takewhile(bool, map(operator.eq, one["answer"], two["answer"])))
        steps = zip(one["logprobs"][: same + 1], two["logprobs"], strict=False)
        pairs = [(dict(map(tuple, a)), dict(map(tuple, b))) for a, b in steps]
        return max(abs(a[t] - b[t]) for a, b in pairs for t in a.keys() & b.keys())

    expected, other, hit = states["expected"], states["other steps"], states["second"]
    own = max(difference(expected[name], other[name]) for name in NAMES_OF_STATES)
    assert max(difference(hit[name], expected[name]) for name in NAMES_OF_STATES) <= own + 1e-6


def test_a_state_that_is_lost_is_computed(states):
    assert agree(states["states lost"]["answer"], states["expected"]["600"])
    assert states["states lost"]["cached"] == 0
    assert states["states lost counts"]["failed_loads"] == 1


def test_states_are_kept_every_so_many_tokens_and_in_answers_if_asked_for(states):
    block = states["block"]
    chunk = -(-64 // block) * block
    assert cached(states["every 256"]) == [512]
    assert cached(states["goes on from the answer"]) == [(640 + 149) // chunk * chunk]


def test_states_of_preempted_requests(states):
    if "preempted" not in states:
        pytest.skip("of one model only")
    assert states["preemptions"] > 0
    want = 2 * states["expected long"]
    assert all(agree(row["answer"], one) for row, one in zip(states["preempted"], want, strict=True))
    assert len(set(states["preempted blocks"])) == 1
    assert states["preempted counts"]["failed_loads"] == 0
    assert states["preempted counts"]["hit_tokens"] > 0


def test_a_hit_of_states_is_about_the_same_picture(states_of_pictures):
    """A question about a picture hits the state at the picture's end, if another question about it came before."""
    expected = states_of_pictures["expected"]
    assert len({tuple(row["answer"]) for row in expected}) == 5
    for engine in ("first", "second", "at once"):
        rows = states_of_pictures[engine]
        assert all(agree(row["answer"], want) for row, want in zip(rows, expected, strict=True)), engine
    assert states_of_pictures["block"] == 64  # each picture is 256 tokens long, behind a few others
    assert cached(states_of_pictures["first"]) == [0, 256, 0, 256, 256]
    assert cached(states_of_pictures["second"]) == [256, 256, 256, 512, 512]
    assert states_of_pictures["counts"]["failed_loads"] == 0
