"""Everything that runs on a GPU, run on an emulated one: see tests/rehearsal."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from programs import REPO, run

REHEARSAL = REPO / "tests" / "rehearsal"
# What gpu_check may import: packages on a machine with a GPU, and the two wheels that are carried there.
GPU_MACHINE = (
    "torch numpy cupy-cuda13x pytest pytest-benchmark pytest-timeout hypothesis transformers triton pybind11 cmake "
    "ninja blake3 lmcache-mm"
)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulated device supports x86-64 only")


def rehearse(*command: object, **environment: str) -> str:
    """Runs a program, which must succeed; returns its output."""
    done = run([sys.executable, REHEARSAL, *command], 600, PYTHONPATH=str(REPO), **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_torch_on_the_stand_in_is_as_on_cuda():
    rehearse("-m", "pytest", "-q", REHEARSAL / "checks.py")


def test_operations_and_transfers_on_cuda_whose_streams_run_in_a_random_order():
    """gpu_check, below, runs them as late as is legal, and runs the tests that need unfinished work."""
    chosen = "not cpu and not waits and not wait_for"
    said = rehearse("-m", "pytest", "-q", "tests/test_devices.py", "-k", chosen, HOST_CUDA_SEED="1")
    assert "skipped" not in said


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM (tests/vllm/requirements*.txt)")
def test_the_worker_of_vllm_stores_and_loads_caches_on_cuda():
    """In all orders of dimensions, with one and two kernel blocks per block, and while the engine sleeps."""
    some = "(bit_by_bit and (GQA-LBHNC-1 or fp8-LBNHC-1 or indexer-BLHNC-1 or windows-BLNHC-2)) or sleeps"
    said = rehearse("-m", "pytest", "-q", "tests/vllm/test_layouts.py", "-k", some)
    assert "skipped" not in said


# --- scripts/gpu_check.py


def gpu_check(out: Path, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, REPO / "scripts" / "gpu_check.py", out, "--rehearse", *options], 3600, **environment)


def steps_of(out: Path) -> dict[str, str]:
    return {step["name"]: step["status"] for step in json.loads((out / "gpu_check.json").read_text())["steps"]}


def test_gpu_check_runs_whole_with_what_the_machine_of_a_gpu_has(tmp_path: Path):
    """All tests and benchmarks for a GPU, doctor, calibrate, and the drivers under a stand-in for compute-sanitizer.
    Every contestant of a benchmark copies the right bytes."""
    given = {"LMCACHE_MM_REHEARSAL_PACKAGES": GPU_MACHINE, "LMCACHE_MM_COMMIT": "a commit"}
    done = gpu_check(tmp_path, "--limit", 3000, **given)
    assert done.returncode == 0, done.stdout
    steps = steps_of(tmp_path)
    assert set(steps.values()) == {"ok"}
    benchmarks = [name for name in steps if name.startswith("bench_gpu")]
    assert len(benchmarks) >= 13
    log = (tmp_path / "gpu_check.log").read_text()
    assert "host_cuda, sm_90" in log
    assert "SKIPPED" not in log
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert sum("machine" in line for line in lines) == 2 * len(benchmarks)  # before and after its cases
    for line in lines:
        if "machine" in line:
            assert line["machine"]["sizes"] == "tiny"
            continue
        assert line["outcome"] == "passed"
        missing = {name for name, why in line.get("missing", {}).items() if "only separate K and V" not in why}
        assert missing == set()
        times = line["times"] if "times" in line else {"step": {"total_s": {"median": line["median_s"]}}}
        assert all(one["median"] > 0 for of in times.values() for one in of.values())
    machine = json.loads((tmp_path / "gpu_check.json").read_text())["machine"]
    assert (machine["gpu"], machine["pcie_generation"], machine["power_limit_w"]) == ("host_cuda", "5", "700.00")
    assert machine["commit"] == "a commit"
    assert machine["ecc"] is None
    assert machine["throttled"] is None
    assert "[N/A]" in machine["unknown"]["ecc"]
    assert "not a valid field" in machine["unknown"]["throttled"]


def test_other_packages_are_hidden_there():
    show = "try:\n import obstore\nexcept ModuleNotFoundError as error: print(error)\nimport pytest, blake3"
    said = rehearse("-c", show, LMCACHE_MM_REHEARSAL_PACKAGES=GPU_MACHINE)
    assert "No module named 'obstore'" in said


@pytest.fixture
def broken_compiler(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on which the drivers cannot be built."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "g++").write_text("#!/bin/sh\nexit 3\n")
    (folder / "g++").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_a_step_that_fails_costs_no_other_and_what_it_needs_comes_before_it(
    tmp_path: Path, broken_compiler: dict[str, str]
):
    out = tmp_path / "out"
    assert gpu_check(out, "--only", "^driver$|^doctor", **broken_compiler).returncode == 1
    assert steps_of(out) == {
        "build": "ok",
        "cases": "ok",
        "driver built": "exit 3",
        "driver": "skipped, since there is no driver built",
        "doctor": "ok",
    }


def test_benchmarks_leave_out_bulk_copies_where_a_driver_fails(tmp_path: Path, broken_compiler: dict[str, str]):
    out = tmp_path / "out"
    assert gpu_check(out, "--only", "^transfer_driver$|one_chunk", **broken_compiler).returncode == 1
    assert steps_of(out)["bench_gpu_transfers one_chunk"] == "ok"
    cases = [line for line in map(json.loads, (out / "gpu_check.jsonl").open()) if "times" in line]
    assert [case["gpu"] for case in cases] == ["store", "load"]
    for case in cases:
        assert list(case["others_s"]) == ["ring", "batch"]
        assert {name for name, why in case["missing"].items() if "a driver" in why} == {
            "bulk copies by 2 blocks",
            "bulk copies by 8 blocks",
        }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_gpu_check_leaves_a_report(tmp_path: Path, number: signal.Signals):
    command = [sys.executable, REPO / "scripts" / "gpu_check.py", tmp_path, "--rehearse", "--only", "calibrate"]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as run:
        until = time.monotonic() + 300
        while "build" not in running(tmp_path) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(number)
        status = run.wait(30)
    assert status == (-9 if number == signal.SIGKILL else 130)
    assert steps_of(tmp_path) == {"build": "running" if number == signal.SIGKILL else "interrupted"}
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["ended"] is False
    assert report.get("interrupted") == (None if number == signal.SIGKILL else number.name)


def running(out: Path) -> str:
    try:
        return (out / "gpu_check.json").read_text()
    except FileNotFoundError:
        return ""


def test_gpu_check_says_what_it_would_run_and_what_it_is_given_wrong(tmp_path: Path):
    def say(*options: str) -> tuple[int, str]:
        command = [sys.executable, str(REPO / "scripts" / "gpu_check.py"), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert say("--list", "--only", "driver under synccheck") == (
        0,
        "build\ntransfer_driver built\ncases\ndriver built\ndriver under synccheck\ntransfer_driver under synccheck\n",
    )
    every = say("--list")[1].split("\n")
    first = ["build", "transfer_driver built", "transfer_driver", "cases", "driver built", "driver"]
    assert every[: len(first)] == first
    # A folder with a package that cannot be imported.
    (tmp_path / "blake3.py").write_text("raise ImportError('a wheel for another Python')")
    done = run([sys.executable, REPO / "scripts" / "gpu_check.py", tmp_path, "--rehearse"], PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "not found: a wheel for another Python; pip has all" in done.stdout
    assert say("--help")[0] == 0
    assert say()[0] == 2
    assert "expected a regular expression" in say("out", "--only", "(")[1]


def test_the_script_finds_the_programs_beside_a_python_that_is_not_on_the_path(tmp_path: Path):
    """cmake and ninja came with it as packages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "env", "mkdir", "mktemp", "realpath"):
        (folder / name).symlink_to(str(shutil.which(name)))
    (folder / "python3").write_text(f'#!{shutil.which("sh")}\nexec {sys.executable} "$@"\n')
    (folder / "python3").chmod(0o755)
    command = [REPO / "scripts" / "gpu_check.sh", tmp_path / "out"]
    assert run([*command, "--list", "--only", "doctor"], PATH=str(folder)).stdout == "build\ndoctor\n"
    done = run([*command, "--limit", 0, "--only", "^build$"], PATH=str(folder))
    assert "gpu_check: " in done.stdout or "no time left" in done.stdout  # no GPU, or no nvcc, or all is there
    assert "cmake" not in done.stdout
