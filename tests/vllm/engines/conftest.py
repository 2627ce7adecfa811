"""Which scenarios run, and the fixtures with their findings."""

from __future__ import annotations

import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from combinations import CHOSEN
from findings import Forks
from lmcache_mm.commands.cli import main as lmcache_mm

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


@pytest.fixture(scope="session")
def forks():
    with closing(Forks()) as forks:
        yield forks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder with the models."""
    folder = tmp_path_factory.mktemp("vllm")
    forks.run("make_models", folder)
    return folder


@pytest.fixture(scope="session")
def under_way(request: pytest.FixtureRequest, forks: Forks, folder: Path):
    """Running scenarios, by scenario and combination.

    Tests that start further engines are in the modules that come last by name: they find all these ended.
    """
    needed = {run for item in request.session.items for run in _parameters(item) if run in RUNS}
    with ThreadPoolExecutor(2) as pool:
        yield {one: pool.submit(forks.run, one[0], folder, one[1]) for one in RUNS if one in needed}


def _parameters(item: pytest.Item) -> list[Any]:
    callspec = getattr(item, "callspec", None)
    return [] if callspec is None else [value for value in callspec.params.values() if isinstance(value, tuple)]


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


@pytest.fixture
def shared_store():
    url = f"shm:///vllm-test-{uuid.uuid4().hex}"
    yield url
    assert lmcache_mm(["clear", url]) == 0
