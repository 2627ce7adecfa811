"""The connector in the real vLLM, on the CPU: every answer is compared with that of an engine without the connector.

Pages are opaque on the CPU: without opaque_tails, hits end at whole pages.
"""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

import servers
from lmcache_mm.commands import certificates
from lmcache_mm.commands.cli import main as lmcache_mm
from lmcache_mm.stores import open_store

HERE = Path(__file__).parent
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
}

# vLLM's versions and model runners. GPUs use V2; here its kernels are interpreted, at half the speed.
COMBINATIONS = ("0.32-V1", "0.33-V1", "0.32-V2", "0.33-V2")
OVERLAY = HERE.parent.parent / ".venv" / "vllm-0.33"
LIMIT_S = 900  # of a scenario
CHOSEN = os.environ.get("TEST_VLLM", "").split()  # to run everything on; `make test-vllm-all` tries each

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)


# Each runs in a process of its own; the longest first. Those that tests need run two at a time. Without TEST_VLLM each
# runs once or twice, on the combinations named here: on V2 if the order of loads, saves and resets within a step
# matters, since GPUs run V2; otherwise on V1, which takes half the time; and some of each kind on the older version.
SCENARIOS = {
    "answers": ("0.33-V2", "0.32-V1"),
    "trouble:async": ("0.33-V2",),
    "trouble:sync": ("0.33-V1",),
    "trouble:layers": ("0.32-V1",),
    "pressure": ("0.33-V2",),
    "pausing": ("0.33-V1",),
    "weights": ("0.33-V2",),
    "odd_requests": ("0.33-V1",),
    "pooling": ("0.33-V1",),
    "identity": ("0.33-V1",),
    "adapters": ("0.32-V1",),
    "encoder_trouble": ("0.33-V1",),
    "encoder": ("0.33-V2",),
    "encoder_identity": ("0.33-V1",),
    "encoder_ranks": ("0.33-V1",),
    "inside_multi": ("0.32-V1",),
    "sliding_windows": ("0.32-V2",),
    "states:qwen3next": ("0.33-V1",),
    "states:lfm2": (),  # these are run by `make test-vllm-all`
    "states:granite": (),
    "states:falcon": (),
    "states_of_pictures": ("0.33-V1",),
    "sessions": ("0.33-V1",),
    "sessions_in_trouble": ("0.33-V2",),
    "sessions_served": ("0.32-V1",),
    "routing": ("0.33-V2",),
    "routing_groups": ("0.33-V1",),
}


def python(combination: str) -> list[Any]:
    """The command that runs a script or -m MODULE."""
    return [sys.executable, *([HERE / "model_runner_v2.py"] if combination.endswith("V2") else [])]


def environment(combination: str, **more: str) -> dict[str, str]:
    overlay = [str(OVERLAY)] if combination.startswith("0.33") else []
    path = os.pathsep.join([*overlay, str(HERE.parent.parent), str(HERE.parent.parent / "examples"), str(HERE)])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **more}


def run(name: str, folder: Path, combination: str = "0.33-V1", **more: str) -> dict[str, Any]:
    """A scenario's findings, from a process that shares nothing with others, not even the seed of Python's hashes."""
    done = subprocess.run(
        [*python(combination), HERE / "engines" / "scenarios.py", name, folder],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        env=environment(combination, **more),
    )
    return findings(done.returncode, done.stdout)


def findings(status: int, said: str) -> dict[str, Any]:
    assert status == 0, said[-8000:]
    # An exception that the schedulers' hooks catch is a bug in them.
    caught = re.search(r"is no longer cached\n.{,4000}", said, re.DOTALL)
    assert caught is None, caught
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))


class Forks:
    """Runs scenarios as `run` does, each in a fork of a process that has imported vLLM: of one for each combination."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: dict[str, tuple[socket.socket, subprocess.Popen[bytes]]] = {}

    def run(self, name: str, folder: Path, combination: str = "0.33-V1", **more: str) -> dict[str, Any]:
        request = {"arguments": [name, str(folder)], "environment": environment(combination, **more)}
        answer, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as output, answer:
            answer.settimeout(LIMIT_S)
            with theirs:
                asking = self._process(combination)
                socket.send_fds(asking, [json.dumps(request).encode()], [output.fileno(), theirs.fileno()])
            told = answer.makefile()
            process_id = int(told.readline())
            try:
                status = int(told.readline())
            except TimeoutError:
                os.killpg(process_id, signal.SIGKILL)  # its engines' workers too
                raise
            output.seek(0)
            return findings(status, output.read().decode(errors="replace"))

    def _process(self, combination: str) -> socket.socket:
        with self._lock:
            if combination not in self._processes:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    command = [*python(combination), HERE / "engines" / "scenarios.py"]
                    process = subprocess.Popen(command, stdin=theirs, env=environment(combination))
                self._processes[combination] = ours, process
            return self._processes[combination][0]

    def close(self) -> None:
        for asking, process in self._processes.values():
            asking.close()
            process.wait(60)


@pytest.fixture(scope="module", params=CHOSEN or ("0.33-V1",))
def combination(request: pytest.FixtureRequest) -> str:
    """The combination of a test with its own process."""
    return request.param


@pytest.fixture
def combination_of_spawned(combination: str) -> str:
    """The combination of a test whose engine is in a process that vLLM spawns."""
    if combination.endswith("V2"):
        pytest.skip("the stand-in for Triton does not reach processes that vLLM spawns")
    return combination


@pytest.fixture(scope="module")
def forks():
    with closing(Forks()) as forks:
        yield forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder with the models."""
    folder = tmp_path_factory.mktemp("vllm")
    forks.run("make_models", folder)
    return folder


@pytest.fixture(scope="module")
def under_way(request: pytest.FixtureRequest, forks: Forks, folder: Path):
    """Running scenarios, by scenario and combination."""
    needed = {run for item in request.session.items for run in _parameters(item) if run in RUNS}
    with ThreadPoolExecutor(2) as pool:
        yield {one: pool.submit(forks.run, one[0], folder, one[1]) for one in RUNS if one in needed}


def _parameters(item: pytest.Item) -> list[Any]:
    callspec = getattr(item, "callspec", None)
    return [] if callspec is None else [value for value in callspec.params.values() if isinstance(value, tuple)]


NOT_ON_V2 = (
    *("trouble:sync", "trouble:layers"),  # loads that V2 does not support
    *("states:granite", "states:falcon"),  # Mamba2's kernels, which take minutes when they are interpreted
    "states_of_pictures",  # Qwen3.5's own answers about pictures are NaN when V2's kernels are interpreted
)
RUNS = [
    (name, combination)
    for name, on in SCENARIOS.items()
    for combination in CHOSEN or on
    if not (combination.endswith("V2") and name in NOT_ON_V2)
]


def _fixture(scenario: str):
    runs = [one for one in RUNS if one[0].partition(":")[0] == scenario]

    @pytest.fixture(scope="module", name=scenario, params=runs, ids="-".join)
    def seen(
        request: pytest.FixtureRequest, under_way: dict[tuple[str, str], Future[dict[str, Any]]]
    ) -> dict[str, Any]:
        return under_way[request.param].result()

    return seen


for _scenario in {name.partition(":")[0] for name in SCENARIOS}:
    globals()[f"_{_scenario}"] = _fixture(_scenario)


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["answer"] for row in rows]


def cached(rows: list[dict[str, Any]]) -> list[int]:
    return [row["cached"] for row in rows]


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


def test_what_a_failed_step_did_not_compute_is_not_stored(pressure):
    """The failure ends the engine, but not the store."""
    assert "as out of memory" in pressure["failed"]
    one, _ = tokens(pressure["expected"])
    assert (tokens(pressure["after a step that failed"]), cached(pressure["after a step that failed"])) == ([one], [0])


def test_generated_tokens_are_stored_on_request(pressure):
    """80 tokens of a prompt and 60 of its answer, in chunks of 64."""
    assert cached(pressure["generated"]) == [128]


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
    assert max(difference(hit[name], expected[name]) for name in NAMES_OF_STATES) <= 4 * own + 1e-6


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


def test_multi_connector_stores_in_all_and_loads_from_one(inside_multi):
    one, two = tokens(inside_multi["expected"])
    assert (tokens(inside_multi["both"]), cached(inside_multi["both"])) == ([one, one, two], [0, 59, 0])
    assert inside_multi["counts"]["loaded_tokens"] == 59
    for name in ("first", "second"):
        assert (tokens(inside_multi[name]), cached(inside_multi[name])) == ([one, two], [59, 59])


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


@pytest.fixture
def shared_store():
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    yield url
    assert lmcache_mm(["clear", url]) == 0


def test_engines_in_processes_of_their_own_share_a_store(forks, folder, shared_store, combination):
    """The second has its scheduler, worker and front end in separate processes; the third has two workers and so
    different KV."""
    shared = {"TEST_STORE": f"{shared_store}?capacity=64MiB"}
    first = run("share", folder, combination, **shared)
    ranks = json.dumps({"tensor_parallel_size": 2})
    with ThreadPoolExecutor(2) as pool:
        apart = pool.submit(forks.run, "share", folder, combination, **shared, VLLM_ENABLE_V1_MULTIPROCESSING="1")
        parallel = pool.submit(
            forks.run, "share", folder, combination, **shared, VLLM_ENABLE_V1_MULTIPROCESSING="1", TEST_OPTIONS=ranks
        ).result()
        apart = apart.result()
    one, two, _ = tokens(first["got"])
    assert one != two
    assert tokens(first["got"]) == tokens(apart["got"]) == tokens(parallel["got"]) == [one, two, one]
    assert cached(first["got"]) == cached(parallel["got"]) == [0, 0, 59]
    assert cached(apart["got"]) == [59, 59, 59]


def test_what_needs_no_engine_holds_on_the_newest_vllm_too():
    """This process has the installed vLLM."""
    files = [path for path in HERE.glob("test_*.py") if path.name not in ("test_connector.py", "test_disaggregated.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment("0.33-V1"), timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " skipped" not in done.stdout.splitlines()[-1]


FAR = ("valkey", "s3", "mooncake", "peer", "nixl")


@pytest.fixture(scope="module")
def two_hosts(forks: Forks, folder: Path, combination: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The findings of an engine on other hosts' stores, then of a second engine that shares nothing else with it."""
    place = tmp_path_factory.mktemp("far")
    urls = [f"shm:///test-{uuid.uuid4().hex}" for _ in range(3)]  # one of the first host, two of the second
    secret = {"LMCACHE_MM_SECRET": uuid.uuid4().hex, **servers.AWS, "UCX_TLS": "tcp"}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in secret.items():
            patch.setenv(name, value)
        stores = {}
        for name, start in ("valkey", servers.valkey), ("s3", servers.seaweed), ("mooncake", servers.mooncake):
            (place / name).mkdir()
            server = start(place / name)
            stack.callback(server.stop)
            stores[name] = server.url
        stack.enter_context(closing(open_store(f"{stores['mooncake']}&capacity=64MiB")))  # the memory of a third host
        first = run(
            "first_host", folder, combination, TEST_STORES=json.dumps([*stores.values(), f"{urls[0]}?capacity=64MiB"])
        )
        (tls,) = certificates.make(place / "tls", ["127.0.0.1"], 1)
        lender = subprocess.Popen(
            [
                *(sys.executable, "-m", "lmcache_mm", "serve", "--store", urls[0], "--listen", "127.0.0.1:0"),
                *("--tls", tls, "--nixl", "--trusted-network"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(lender.wait)
        stack.callback(lender.terminate)
        assert lender.stdout is not None
        address = lender.stdout.readline().partition(" is lent at ")[2].partition(",")[0]
        stores["peer"] = f"tiered:{urls[1]}?capacity=64MiB,peer://{address}?tls={tls}&timeout=20"
        stores["nixl"] = f"tiered:{urls[2]}?capacity=64MiB,nixl://{address}?tls={tls}&timeout=20&trusted_network=1"
        second = forks.run("second_host", folder, combination, TEST_STORES=json.dumps(stores))
    assert [lmcache_mm(["clear", url]) for url in urls] == [0, 0, 0]
    return {"first": first, **second}


@pytest.mark.parametrize("far", FAR)
def test_a_second_host_starts_with_what_the_first_one_stored(two_hosts, far):
    first, second = two_hosts["first"], two_hosts[far]
    assert cached(first["got"]) == [0, 0, 0]
    assert len({tuple(answer) for answer in tokens(first["got"])}) == 3
    assert tokens(second["got"]) == tokens(first["got"])
    assert cached(second["got"]) == [59, 59, 98]


def test_two_engines_at_once_on_a_store_that_evicts(forks, folder, shared_store, combination):
    """The store has room for about eight records; both engines ask the same prompts, six times each, in any order."""
    shared = {"TEST_STORE": f"{shared_store}?capacity=512KiB"}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(forks.run, "evicting", folder, combination, **shared, TEST_SEED=seed) for seed in "12"]
        both = [one.result() for one in runs]
    for seen in both:
        assert [tokens(rows) for rows in seen["got"]] == [tokens(seen["expected"])] * 6
        assert seen["counts"]["loaded_tokens"] > 0
    with closing(open_store(shared_store)) as store:
        assert store.stats()["records"] < 20


def test_vllm_serve_answers_and_shows_what_was_hit_in_metrics(combination_of_spawned, folder, shared_store):
    """Starts its server module, since the command itself looks for a package named vllm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "kv_connector": "LMCacheMMConnector",
        "kv_connector_module_path": "lmcache_mm.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": f"{shared_store}?capacity=64MiB", "chunk_tokens": 64},
    }
    command = [
        *python(combination_of_spawned),
        *("-m", "vllm.entrypoints.openai.api_server", "--model", folder / "vlm", "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
        *("--block-size", "32", "--num-gpu-blocks-override", "256", "--no-enable-prefix-caching"),
        *("--served-model-name", "tiny", "--kv-transfer-config", json.dumps(config)),
    ]
    log = (folder / "serve.log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(combination_of_spawned))

    def fetch(path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    try:
        until = time.monotonic() + 180
        while True:
            try:
                fetch("/health")
                break
            except OSError:
                assert server.poll() is None, (folder / "serve.log").read_text()[-8000:]
                assert time.monotonic() < until
                time.sleep(0.5)
        question = {"model": "tiny", "prompt": "alpha " * 30, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        texts = [json.loads(fetch("/v1/completions", question))["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1] != ""
        until = time.monotonic() + 60
        counts: dict[str, float] = {}
        while not counts.get("loaded_tokens"):
            assert time.monotonic() < until
            time.sleep(0.5)
            for line in fetch("/metrics").splitlines():
                if line.startswith("vllm:lmcache_mm_") and "_total{" in line:
                    name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
                    counts[name.removeprefix("vllm:lmcache_mm_").removesuffix("_total")] = float(value)
                if line.startswith("vllm:lmcache_mm_") and "_sum{" in line and 'store="shm"' in line:
                    counts[line.split("{")[0].removeprefix("vllm:lmcache_mm_")] = float(line.rsplit(" ", 1)[1])
        assert counts["hit_tokens"] == counts["loaded_tokens"] >= 128
        assert counts["stored_tokens"] >= 128
        assert counts["failed_loads"] == 0
        assert counts["load_bytes_sum"] / counts["loaded_tokens"] == counts["store_bytes_sum"] / counts["stored_tokens"]
        assert 0 < counts["load_seconds_sum"] < 60
        assert 0 < counts["store_seconds_sum"] < 60
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


def run_example(number: int, folder: Path, shared_store: str, tmp_path: Path, combination: str) -> str:
    """The output of the documentation's example."""
    code = re.findall(r"```python\n(.*?)```", (HERE.parent.parent / "docs" / "vllm.md").read_text(), re.DOTALL)[number]
    code = code.replace("shm:///vllm", shared_store).replace("tiny-qwen2-vl", str(folder / "vlm"))
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [*python(combination), tmp_path / "example.py"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        env=environment(combination, VLLM_ENABLE_V1_MULTIPROCESSING="1"),
    )
    return done.stdout


def test_the_example_in_the_documentation_runs(combination_of_spawned, folder, shared_store, tmp_path):
    for again in (False, True):
        printed = run_example(0, folder, shared_store, tmp_path, combination_of_spawned)
        reused = [int(n) for n in re.findall(r"(\d+) of \d+ tokens reused", printed)]
        assert len(reused) == 3
        assert min(reused[1:]) >= 1024  # the picture's tokens
        assert (reused[0] >= 1024) == again


def test_the_example_of_the_encoder_connector_runs(combination_of_spawned, folder, shared_store, tmp_path):
    assert "0 pictures not encoded" in run_example(1, folder, shared_store, tmp_path, combination_of_spawned)
