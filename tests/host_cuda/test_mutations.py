"""Mutations of the kernels: each takes one safeguard away, and some test must fail."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest

from builds import DRIVERS, Builds
from kernel_mutations import KERNEL_MUTATIONS
from mutation import Mutation
from programs import REPO, SANITIZERS, run
from transfer_mutations import TRANSFER_MUTATIONS

MUTATIONS = [*KERNEL_MUTATIONS, *TRANSFER_MUTATIONS]


def find(mutation: Mutation, text: str) -> tuple[int, int]:
    within = mutation.within or mutation.original
    assert text.count(within) == 1, f"{mutation.file}: expected once, found {text.count(within)} times: {within}"
    assert within.count(mutation.original) == 1, within
    start = text.index(within) + within.index(mutation.original)
    return start, start + len(mutation.original)


def write_mutants(csrc: Path) -> None:
    """Writes a copy of csrc/ with all mutations in it, where LMC_MUTANT=n activates the n-th: one build for all."""
    shutil.copytree(REPO / "csrc", csrc)
    for file in {mutation.file for mutation in MUTATIONS}:
        text = (csrc / file).read_text()
        inserts: list[tuple[int, bool, int, int, str]] = []  # position, whether it opens, nesting order, text
        for number, mutation in enumerate(MUTATIONS, 1):
            if mutation.file != file:
                continue
            start, end = find(mutation, text)
            if mutation.original.endswith(";"):
                opening = f"{{ if (::lmc_mutant == {number}) {{ {mutation.replacement} }} else {{ "
                closing = " } }"
            else:
                opening, closing = f"(::lmc_mutant == {number} ? ({mutation.replacement}) : (", "))"
            inserts.append((start, True, -end, number, opening))
            inserts.append((end, False, -start, -number, closing))
        for where, *_, inserted in sorted(inserts, reverse=True):
            text = text[:where] + inserted + text[where:]
        (csrc / file).write_text("extern int lmc_mutant; " + text)


SYNCHRONISES = (
    r"__syncthreads|__syncwarp|__\w+_sync\b|__threadfence|\batomic[A-Z]\w*|cudaEvent(Query|Record|Synchronize)"
    r"|cudaStreamWaitEvent|(filled|summed)\S*\.(wait|arrive)|(?<!:)fence_for_bulk_copies\(\);"
)


def test_every_barrier_shuffle_atomic_access_and_event_has_a_mutation():
    missed = []
    for path in sorted((REPO / "csrc").iterdir()):
        text = path.read_text()
        spans = [find(mutation, text) for mutation in MUTATIONS if mutation.file == path.name]
        for match in re.finditer(SYNCHRONISES, re.sub(r"//.*", lambda comment: " " * len(comment[0]), text)):
            if not any(start <= match.start() and match.end() <= end for start, end in spans):
                missed.append(f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    assert not missed


# `make mutations` tries all of them, in ten minutes; `make test` tries one in twelve, each day others.
SHARE = 1 if "TEST_MUTATIONS" in os.environ else 12
CHOSEN = range(1 + date.today().toordinal() % SHARE, len(MUTATIONS) + 1, SHARE)


@pytest.fixture(scope="module")
def verdicts(builds: Builds) -> dict[int, str | None]:
    """For each mutation, the failure that shows it, None if nothing fails; 0: the same without a mutation."""
    csrc = builds.folder / "mutants"
    write_mutants(csrc)
    programs = {(name, sanitizer): builds.driver(sanitizer, name, csrc) for name in DRIVERS for sanitizer in SANITIZERS}

    def verdict(driver: str, number: int) -> str | None:
        args = MUTATIONS[number - 1].args if number else ()
        for sanitizer in SANITIZERS:
            cases = [builds.cases[sanitizer]] if driver == "driver.cpp" else []
            options = [*args, "--schedules", 3 if cases else 12, "--fail-fast", "--watchdog", 5]
            done = run([programs[driver, sanitizer], *cases, *options], LMC_MUTANT=str(number))
            if done.returncode:
                return f"{sanitizer}: {done.stdout[:2000]}"
        return None

    def verdict_of(number: int) -> str | None:
        return (
            verdict(MUTATIONS[number - 1].driver, number)
            if number
            else " ".join(found for found in (verdict(driver, 0) for driver in DRIVERS) if found) or None
        )

    numbers = [0, *CHOSEN]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(numbers, pool.map(verdict_of, numbers), strict=True))


def test_nothing_is_missed_where_nothing_is_taken_away(verdicts: dict[int, str | None]):
    assert verdicts[0] is None


@pytest.mark.parametrize("number", CHOSEN, ids=lambda n: f"{n} {MUTATIONS[n - 1].what}")
def test_what_is_taken_away_is_missed(verdicts: dict[int, str | None], number: int):
    mutation = MUTATIONS[number - 1]
    assert verdicts[number] is not None, f"{mutation.file}: {mutation.original} -> {mutation.replacement or 'nothing'}"
