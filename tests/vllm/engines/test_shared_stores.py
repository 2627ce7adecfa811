"""Engines that share stores: with other processes, with other hosts, and within MultiConnector."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import servers
from combinations import pytestmark  # noqa: F401
from findings import Forks, cached, run, tokens
from lmcache_mm.commands import certificates
from lmcache_mm.commands.cli import main as lmcache_mm
from lmcache_mm.stores import open_store


def test_multi_connector_stores_in_all_and_loads_from_one(inside_multi):
    one, two = tokens(inside_multi["expected"])
    assert (tokens(inside_multi["both"]), cached(inside_multi["both"])) == ([one, one, two], [0, 59, 0])
    assert inside_multi["counts"]["loaded_tokens"] == 59
    for name in ("first", "second"):
        assert (tokens(inside_multi[name]), cached(inside_multi[name])) == ([one, two], [59, 59])


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
