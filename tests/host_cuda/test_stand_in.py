"""The emulated device itself."""

from __future__ import annotations

import re

import pytest

from builds import Builds
from programs import SANITIZERS, run

RIGHT = [
    *(
        "graph_replays",
        "block_sum",
        "reuse_pinned",
        "two_streams",
        "null_stream",
        "pageable_is_staged",
        "event_means_its_last_record",
    ),
    *(
        "host_function_runs_in_its_place",
        "registered_memory_is_pinned",
        "host_memory_is_registered_in_pieces",
        "errors_are_those_of_cuda",
        "add_to_same_word",
    ),
    *("copy_in_bulk", "read_unwritten_shared"),
]
WRONG_RESULT = r"^$"
RACE, OVERRUN, POISONED = "ThreadSanitizer: data race", "heap-buffer-overflow", "use-after-poison"
# What a run reports under one of six seeds; the last column: whether it does under all of them.
WRONG = [
    ("block_sum without its barrier", "asan", WRONG_RESULT, True),
    ("block_sum without its barrier", "tsan", RACE, True),
    ("block_sum without its warp barrier", "asan", WRONG_RESULT, True),
    ("block_sum without its warp barrier", "tsan", RACE, True),
    ("block_sum without its shuffle", "asan", WRONG_RESULT, True),
    ("reuse_pinned without its wait", "asan", WRONG_RESULT, False),
    ("reuse_pinned without its wait", "tsan", RACE, True),
    ("two_streams without their event", "asan", WRONG_RESULT, False),
    ("two_streams without their event", "tsan", RACE, False),
    ("null_stream and one that does not block", "asan", WRONG_RESULT, False),
    ("write_same_word", "tsan", RACE, True),
    ("wait_for_nobody", "asan", "the thread exits while lane|the mask names a lane that has exited", True),
    ("shuffle_in_part_of_a_warp", "asan", "the mask names a lane that the block does not have", True),
    ("shuffle_from_outside_the_mask", "asan", "it reads a lane that the mask leaves out", True),
    ("shuffle_at_two_places", "asan", "another lane of the mask waits in another collective", True),
    ("barrier_in_a_branch", "asan", "while others wait at that of", True),
    ("barrier_that_some_skip", "asan", "exits while others wait at the barrier|threads of the block are missing", True),
    ("barrier_and_collective", "asan", "no thread of the block can go on", True),
    ("too little shared memory", "asan", "kernel .*read_unwritten_shared.*: shared_memory of 4 bytes", True),
    ("shared memory overrun", "asan", OVERRUN, True),
    ("device memory overrun", "asan", OVERRUN, True),
    ("device memory underrun", "asan", "neither device nor pinned memory", True),
    ("misaligned vector", "asan", "store to misaligned address", True),
    ("more arrivals than expected", "asan", "more threads arrive at an mbarrier than it expects", True),
    ("a bulk copy that is not aligned", "asan", "multiples of 16 are needed", True),
    ("a bulk copy in front of shared memory", "asan", "of a bulk copy is not shared memory", True),
    ("a barrier outside of shared memory", "asan", "of an mbarrier is not shared memory", True),
    ("a batch of copies without a context", "asan", "cuMemcpyBatchAsync: error 201", True),
    ("an event of a capture", "asan", "an event that was recorded in a capture", True),
    ("loop", "tsan", "kernel .*loop.*: the watchdog ends", True),
    ("host pointer in a kernel", "asan", "neither device nor pinned memory", True),
    ("host pointer in a copy", "asan", "not on the side that its kind says", True),
    ("copy overrun", "asan", "run past the end of their allocation", True),
    ("device memory on the host", "asan", POISONED, True),
    ("freed too early", "asan", "heap-use-after-free", False),
    ("freed twice", "asan", "is freed twice", True),
    ("destroyed event", "asan", "an event is used that has been destroyed", True),
    ("destroyed stream", "asan", "a stream is used that has been destroyed", True),
]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("scenario", RIGHT)
def test_the_stand_in_takes_what_is_right(builds: Builds, scenario: str, sanitizer: str):
    for seed in range(6):
        done = run([builds.selftest(sanitizer), scenario, seed])
        assert done.returncode == 0, f"seed {seed}\n{done.stdout}"


@pytest.mark.parametrize("scenario, sanitizer, message, always", WRONG, ids=lambda value: str(value)[:40])
def test_the_stand_in_tells_what_is_wrong(builds: Builds, scenario: str, sanitizer: str, message: str, always: bool):
    runs = [run([builds.selftest(sanitizer), scenario, seed]) for seed in range(3 if always else 6)]
    told = [done.returncode not in (0, 2, 3) and re.search(message, done.stdout) is not None for done in runs]
    assert all(told) if always else any(told), "\n".join(f"{done.returncode} {done.stdout}" for done in runs)
