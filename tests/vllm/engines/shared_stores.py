"""Engines that share stores: with other processes, with other hosts, and within MultiConnector."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from answers import QUESTIONS
from small_engine import ask, ask_at_once, counts, engine, image, prompt, store


def share() -> dict[str, Any]:
    """Asks this process's engine, on the store that the environment names."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    options = json.loads(os.environ.get("TEST_OPTIONS", "{}"))
    with engine(os.environ["TEST_STORE"], extra={"opaque_tails": True}, **options) as llm:
        return {"got": ask(llm, one, two, one), "counts": counts(llm)}


def first_host() -> dict[str, Any]:
    """This process's engine on all stores that the environment names at once."""
    with engine(multi=json.loads(os.environ["TEST_STORES"]), extra={"opaque_tails": True}) as llm:
        return {"got": ask(llm, *far_questions())}


def second_host() -> dict[str, Any]:
    """This process's engines on the stores that the environment names, one after another."""
    seen: dict[str, Any] = {}
    for name, url in json.loads(os.environ["TEST_STORES"]).items():
        # As long as the stores themselves wait: on a busy machine NIXL's process starts slowly.
        with engine(url, extra={"opaque_tails": True, "timeout_s": 30}) as llm:
            seen[name] = {"got": ask(llm, *far_questions()), "counts": counts(llm)}
    return seen


def far_questions() -> list[dict[str, Any]]:
    return [
        prompt("| what is it? ", image(0)),
        prompt("| what is it? ", image(1)),
        prompt("what is | or | ?", image(1), image(0)),
    ]


def evicting() -> dict[str, Any]:
    """This process's engine, concurrent with another's, on a store too small for their prompts."""
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask_at_once(llm, list(QUESTIONS.values()))}
    with engine(os.environ["TEST_STORE"], extra={"opaque_tails": True}) as llm:
        order = np.random.default_rng(int(os.environ["TEST_SEED"]))
        seen["got"] = []
        for _ in range(6):
            shuffled = order.permutation(len(QUESTIONS))
            got = ask_at_once(llm, [list(QUESTIONS.values())[i] for i in shuffled])
            seen["got"].append([got[i] for i in np.argsort(shuffled)])
        seen["counts"] = counts(llm)
    return seen


def inside_multi() -> dict[str, Any]:
    """Inside MultiConnector, twice."""
    one, two = prompt("| what is it? ", image(0)), prompt("| what is it? ", image(1))
    with engine() as llm:
        seen: dict[str, Any] = {"expected": ask(llm, one, two)}
    with store() as first, store() as second:
        with engine(multi=[first, second], extra={"opaque_tails": True}) as llm:
            seen["both"] = ask(llm, one, one, two)
            seen["counts"] = counts(llm)
        for name, url in (("first", first), ("second", second)):
            with engine(url, extra={"opaque_tails": True}) as llm:
                seen[name] = ask(llm, one, two)
    return seen
