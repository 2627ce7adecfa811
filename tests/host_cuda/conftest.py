"""The programs, which all tests share."""

from __future__ import annotations

import platform
import shutil

import pytest

from builds import Builds
from coded_cases import coded_cases
from copy_cases import copy_cases
from driver_cases import write_cases
from identity_cases import blake3_cases, identity_cases
from programs import CXX


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    tried = [item for item in items if item.name.startswith("test_what_is_taken_away_is_missed")]
    numbers = [item.callspec.params["number"] for item in tried if isinstance(item, pytest.Function)]
    return [f"mutations: {', '.join(map(str, numbers))}"] if numbers else []


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    if platform.machine() != "x86_64":
        pytest.skip("the emulated device supports x86-64 only")
    if shutil.which(CXX) is None:
        pytest.skip(f"no {CXX}")
    folder = tmp_path_factory.mktemp("host_cuda")
    cases = [*blake3_cases(), *identity_cases(), *copy_cases(), *coded_cases()]
    small = [case for case in cases if case.small]
    return Builds(folder, write_cases(folder / "cases", cases), write_cases(folder / "small_cases", small))
