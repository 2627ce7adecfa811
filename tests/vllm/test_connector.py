"""The connector in the real vLLM, on the CPU: every answer is compared with that of an engine without it.

Pages are opaque there: without opaque_tails, hits end at whole pages.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from lmcache_mm.cli import main as lmcache_mm

HERE = Path(__file__).parent
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}",
}

VLLM = importlib.util.find_spec("vllm")  # this folder looks like a package of that name: it has no origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("vllm")

    @functools.cache
    def seen(name: str, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, HERE / "scenarios.py", name, folder],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            env={**os.environ, **ENVIRONMENT, **environment},
        )
        assert done.returncode == 0, done.stdout[-8000:]
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))

    seen("make_models")
    return seen


def answers(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["answer"] for row in rows]


def cached(rows: list[dict[str, Any]]) -> list[int]:
    return [row["cached"] for row in rows]


def test_the_model_answers_about_what_it_is_shown(scenario):
    """Else equal answers would tell nothing."""
    expected = scenario("answers")["expected"]
    assert len({tuple(row["answer"]) for row in expected}) == 8
    assert all(row["cached"] == 0 for row in expected)


@pytest.mark.parametrize(
    "setting",
    [
        "opaque tails",
        "a new engine",
        "prefix caching",
        "16 at once",
        "whole pages",
        "synchronous",
        "chunked prefill",
        "pages of 128",
    ],
)
def test_every_answer_is_the_one_without_the_connector(scenario, setting):
    seen = scenario("answers")
    expected = answers(seen["expected"])
    assert answers(seen[setting]) == (expected + expected)[: len(seen[setting])]
    assert len(seen[setting]) >= 12


@pytest.mark.parametrize("setting", ["opaque tails", "pages of 128"])
def test_hits_are_exact_to_the_token_with_opaque_tails(scenario, setting):
    """In the order of the questions: same again, all; other image or order, nothing; another question, the image."""
    assert cached(scenario("answers")[setting]) == [0, 59, 0, 43, 0, 0, 0, 91, 0, 205, 0, 98]


@pytest.mark.parametrize("setting", ["whole pages", "chunked prefill"])
def test_hits_end_at_whole_pages_without(scenario, setting):
    assert cached(scenario("answers")[setting]) == [0, 32, 0, 32, 0, 0, 0, 64, 0, 192, 0, 96]


@pytest.mark.parametrize("setting", ["a new engine", "prefix caching", "16 at once"])
def test_another_engine_finds_all_that_the_first_stored(scenario, setting):
    rows = scenario("answers")[setting]
    assert cached(rows) == [row["prompt_tokens"] for row in rows]


def test_synchronous_hits_end_before_the_end_of_the_first_image(scenario):
    assert cached(scenario("answers")["synchronous"])[-2:] == [96, 96]
    assert max(cached(scenario("answers")["synchronous"])[:8]) == 32


def test_what_was_hit_loaded_and_stored_is_counted(scenario):
    counts = scenario("answers")["counts"]
    hits = 59 + 43 + 91 + 205 + 98
    assert counts["hit_tokens"] == counts["loaded_tokens"] == hits
    assert counts["queried_tokens"] == sum(row["prompt_tokens"] for row in scenario("answers")["expected"])
    assert counts["stored_tokens"] > 0
    assert counts["failed_loads"] == counts["failed_stores"] == 0


def test_identifiers_that_are_counters_never_stand_for_an_image(scenario):
    seen = scenario("identity")
    one, two = answers(seen["expected"])
    assert answers(seen["counters, first"]) == [one]
    assert (answers(seen["counters, other image"]), cached(seen["counters, other image"])) == ([two], [0])
    assert (answers(seen["counters, same image"]), cached(seen["counters, same image"])) == ([one], [59])


def test_an_image_under_anothers_uuid_answers_nobody_elses_question(scenario):
    seen = scenario("identity")
    one, two = answers(seen["expected"])
    assert answers(seen["claimed"]) == [one]
    foreign = seen["another engine's image under the same uuid"]
    assert (answers(foreign), cached(foreign)) == ([two], [0])
    assert answers(seen["that uuid's own image"]) == [one]


def test_tenants_share_nothing(scenario):
    rows = scenario("identity")["tenants"]
    assert cached(rows) == [0, 0, 0, 59, 59, 59]
    assert answers(rows) == answers(scenario("identity")["expected"])[:1] * 6


def test_a_request_may_be_left_out(scenario):
    seen = scenario("identity")
    assert cached(seen["no store"]) == [0, 0]
    assert cached(seen["no load"]) == [0, 59]


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("fault", ["Fails", "Lies", "Corrupts", "Loses", "FailsToStore"])
def test_a_store_that_misbehaves_costs_time_and_nothing_else(scenario, fault, load):
    seen = scenario("trouble")
    one, two, words = answers(seen["expected"])
    found = seen[f"{fault} {load}"]
    assert answers(found["got"]) == [one, two, words] * 2
    assert all(row["finish"] == "length" for row in found["got"])
    assert found["blocks"][0] == found["blocks"][1]
    if fault == "FailsToStore":
        assert found["counts"]["failed_stores"] > 0
    else:
        assert found["counts"]["failed_loads"] > 0
    assert answers(seen[f"{fault} {load}, then"]) == [one, two, words]  # nothing wrong was left in the store


def test_preempted_requests_answer_as_ever_and_no_page_is_lost(scenario):
    seen = scenario("trouble")
    assert seen["preemptions"] > 0
    assert answers(seen["preempted"]) == answers(seen["expected long"]) * 2
    assert seen["preempted blocks"][0] == seen["preempted blocks"][1]


def test_a_request_aborted_in_the_middle_of_its_load_gives_its_pages_back(scenario):
    seen = scenario("trouble")
    one, two, _ = answers(seen["expected"])
    assert answers(seen["after the abort"]) == [two, one]
    before, during, after = seen["aborted blocks"]
    assert during < before == after


def test_sliding_window_layers_are_stored_and_loaded_with_the_others(scenario):
    seen = scenario("sliding_windows")
    expected = answers(seen["expected"])
    assert len({tuple(answer) for answer in expected}) == 3
    assert answers(seen["first"]) == answers(seen["second"]) == expected
    assert cached(seen["first"]) == [0, 277, 256, 0]
    assert cached(seen["second"]) == [277, 277, 295, 283]


def test_engines_in_processes_of_their_own_share_a_store(scenario):
    """The second with its scheduler, worker and front end apart, the third with two workers, whose KV is another."""
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    shared = {"TEST_STORE": f"{url}?capacity=64MiB"}
    one, two = answers(scenario("identity")["expected"])
    first = scenario("share", **shared)
    apart = scenario("share", **shared, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    ranks = json.dumps({"tensor_parallel_size": 2})
    parallel = scenario("share", **shared, VLLM_ENABLE_V1_MULTIPROCESSING="1", TEST_OPTIONS=ranks)
    assert answers(first["got"]) == answers(apart["got"]) == answers(parallel["got"]) == [one, two, one]
    assert cached(first["got"]) == cached(parallel["got"]) == [0, 0, 59]
    assert cached(apart["got"]) == [59, 59, 59]
    assert lmcache_mm(["clear", url]) == 0
