"""The simulation of deployments, checked against real stores on the same trace."""

import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import simulate
import simulate_states
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab
from simulate import GIB, Endless, Load, Sieve, Tier

LOAD = Load(pictures=200, picture_tokens=(1024, 2048), system_tokens=300, requests=2000)
TOKEN_BYTES = 64  # a record of 256 tokens is a granule of the slab


@pytest.mark.parametrize("capacity", [1 << 20, 4 << 20])
def test_a_simulated_tier_hits_what_a_real_slab_hits(capacity):
    """Record by record: the same trace gives the same evictions."""
    name = f"shm:///test-{uuid.uuid4().hex}"
    store = open_store(f"{name}?capacity={capacity}")
    tier = Sieve(capacity)
    buffer = bytearray(256 * TOKEN_BYTES)
    simulated = real = asked = 0
    for request in simulate.trace(LOAD, 1, 400, np.random.default_rng(0)):
        for record, tokens in request.records:
            if tokens < 256:
                continue  # tails share granules, which the simulation ignores
            key = repr(record).encode().ljust(36)
            asked += 1
            simulated += record in tier
            there = store.get_into([key], [buffer])[0]
            real += there
            tier.put(record, len(buffer))
            if not there:
                store.put([key], [buffer])
    store.close()
    assert slab.remove(slab_directory(name)[1])
    assert 0.2 < real / asked < 0.95
    assert abs(simulated - real) <= 0.03 * asked, (simulated, real, asked)


def test_tiers_are_asked_from_the_fastest_on_and_fill_those_above():
    first, second = Sieve(GIB), Sieve(GIB)
    (request,) = simulate.trace(LOAD, 1, 1, np.random.default_rng(0))
    tokens = sum(tokens for _, tokens in request.records)
    assert simulate.ask(request, [first, second], TOKEN_BYTES) == [0, 0]
    assert simulate.ask(request, [first, second], TOKEN_BYTES) == [tokens, 0]
    empty = Sieve(GIB)
    assert simulate.ask(request, [empty, second], TOKEN_BYTES) == [0, tokens]
    assert simulate.ask(request, [empty, second], TOKEN_BYTES) == [tokens, 0]


def test_a_record_counts_only_behind_all_before_it():
    tier = Sieve(GIB)
    (request,) = simulate.trace(LOAD, 1, 1, np.random.default_rng(0))
    for key, tokens in request.records[1:]:
        tier.put(key, tokens)
    assert simulate.ask(request, [tier], TOKEN_BYTES) == [0]


def test_pictures_are_drawn_by_the_law_and_an_endless_store_has_what_was_asked():
    rng = np.random.default_rng(0)
    shares = simulate.share_of(LOAD, np.arange(LOAD.pictures))
    assert shares.sum() == pytest.approx(1)
    drawn = np.bincount(simulate.pictures(LOAD, 200_000, rng), minlength=LOAD.pictures) / 200_000
    assert np.abs(drawn - shares).max() < 0.005
    asked = 300
    there = np.mean([[(p, 256) in Endless(LOAD, asked, rng, 1) for p in range(0, 200, 10)] for _ in range(50)])
    seen = np.mean([np.isin(np.arange(0, 200, 10), simulate.pictures(LOAD, asked, rng)) for _ in range(50)])
    assert there == pytest.approx(seen, abs=0.05)


def test_more_room_hits_more_and_a_shared_tier_adds_to_it():
    small, large = (simulate.simulate(LOAD, [Tier("shm", size, 1e10, 0)], 4, token_bytes=1024) for size in (4e6, 4e7))
    shared = Tier("valkey", 2e8, 1e9, 1e-3, True)
    both = simulate.simulate(LOAD, [Tier("shm", 4e6, 1e10, 0), shared], 4, token_bytes=1024)
    assert small.hit_rate < large.hit_rate < both.hit_rate <= 1
    assert small.shared_bytes_per_s == 0 < both.shared_bytes_per_s
    assert sum(both.of_tiers) == pytest.approx(both.hit_rate)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hosts", "3"], "expected --hosts with at least one --tier"),
        (["--hosts", "3", "--tier", "shm:1GiB:x:0"], "could not convert string to float"),
        (["--hosts", "3", "--tier", "shm:1GiB"], "expected NAME:CAPACITY:BANDWIDTH:SECONDS"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        simulate.main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_prints_a_row_and_draws(tmp_path, capsys):
    tiers = ["--tier", "shm:1GiB:8GB/s:0.0005", "--tier", "s3:inf:1GB/s:0.05:shared"]
    plot = tmp_path / "plan.svg"
    assert simulate.main(["--hosts", "4", *tiers, "--requests", "200", "--plot", str(plot)]) == 0
    assert "| 4 | as given |" in capsys.readouterr().out
    assert plot.read_text().startswith("<?xml")


SMALL_TALK = simulate_states.Talk(at_once=20, applications=3)
NO_LIMIT = 1 << 60


def hits_and_bytes(policy: simulate_states.Policy, capacity: float = NO_LIMIT) -> tuple[float, float]:
    prompts = simulate_states.conversations(SMALL_TALK, 400, seed=0)
    outcome = simulate_states.simulate(simulate_states.Model(), policy, prompts, capacity)
    return outcome.hit_rate, outcome.written_bytes


def test_more_states_never_hit_less_where_there_is_room_and_are_never_fewer_bytes():
    seen = [hits_and_bytes(policy) for policy in simulate_states.POLICIES]
    assert [sorted(column) for column in zip(*seen, strict=True)] == [
        list(column) for column in zip(*seen, strict=True)
    ]
    assert seen[0][1] < seen[-1][1]


def test_without_states_nothing_is_hit():
    nowhere = simulate_states.Policy("nowhere", lambda *_: set())
    assert hits_and_bytes(nowhere)[0] == 0
    assert hits_and_bytes(simulate_states.POLICIES[-1], capacity=1)[0] == 0


def test_a_question_hits_the_system_prompt_where_another_has_parted():
    """The first stores its own end, the second the place where they part, and the third hits that."""
    asked = [simulate_states.Prompt([3000, 5000], [0, i], 0) for i in range(1, 4)]
    model = simulate_states.Model(block=1000)
    hits = {
        policy.name: simulate_states.simulate(model, policy, [asked[0], *asked], NO_LIMIT).hit_rate
        for policy in simulate_states.POLICIES[:3]
    }
    assert list(hits.values()) == [0, 0, 3000 / 10_000]


def test_the_table_of_policies(capsys):
    assert simulate_states.main(["--requests", "20", "--capacity", "1GiB", "64GiB"]) == 0
    assert capsys.readouterr().out.count("(default)") == 4
