"""Builds for this machine's GPU, tests and measures, the most informative steps first. scripts/gpu_check.sh runs it.

OUT/gpu_check.json describes the machine and each step's result; it is replaced atomically after each step, so that it
is readable however the run ends. OUT/gpu_check.jsonl has a line for each finished benchmark case, OUT/gpu_check.log
all output. Steps run one after another, each in its own process group with its own time limit; a step that fails or
takes too long does not affect the others.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = ROOT / "tests" / "rehearsal"
LIMIT_S = 560
TAIL = 3000  # characters of a step's output that the report keeps
CASE_S = 60  # the longest that one test or benchmark case may take
SLOWER = 10  # how much longer everything may take in a rehearsal
NEEDED = ("blake3", "hypothesis", "numpy", "pybind11", "pytest", "pytest_benchmark")  # and torch, see ABOUT
BENCHMARKS = ("transfers", "keys", "copies", "interference")  # bench_gpu_*.py, the most informative first
DRIVERS = ("driver", "transfer_driver")  # tests/host_cuda/*.cpp
ENCODER_TEST = "test_tensors_of_any_strides_and_devices_are_saved_and_filled"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Fields of the report from nvidia-smi.
QUERIES = {
    "name": "name",
    "driver": "driver_version",
    "bus": "pci.bus_id",
    "pcie_generation": "pcie.link.gen.current",
    "pcie_generation_most": "pcie.link.gen.max",
    "pcie_width": "pcie.link.width.current",
    "pcie_width_most": "pcie.link.width.max",
    "ecc": "ecc.mode.current",
    "sm_mhz": "clocks.sm",
    "sm_mhz_most": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_mhz_most": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "persistence": "persistence_mode",
    "throttled": "clocks_event_reasons.active",
}
# And from torch, for the device that it uses.
ABOUT = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "memory_bytes": p.total_memory, "multiprocessors": p.multi_processor_count,
    "l2_bytes": p.L2_cache_size, "capability": f"{p.major}{p.minor}", "torch": torch.__version__,
    "torch_cuda": torch.version.cuda}))
"""


@dataclass
class Step:
    name: str
    commands: Sequence[Sequence[object]]  # one after another, until one fails
    limit_s: float
    needs: str = ""  # an earlier step that must have succeeded
    good: tuple[int, ...] = (0,)  # exit statuses of success
    environment: dict[str, str] = field(default_factory=dict)


class Interrupted(BaseException): ...


class Check:
    """Runs steps and keeps their results."""

    def __init__(self, out: Path, limit_s: float) -> None:
        self.out = out
        self.until = time.monotonic() + limit_s
        self.found: dict[str, Any] = {"ended": False, "machine": {}, "steps": []}
        self.log = (out / "gpu_check.log").open("wb")

    def run(self, step: Step) -> None:
        left = self.until - time.monotonic()
        record = {"name": step.name, "status": "running", "seconds": 0.0, "tail": ""}
        self.found["steps"].append(record)
        states = {one["name"]: one["status"] for one in self.found["steps"]}
        if step.needs and states.get(step.needs, "ok") != "ok":
            record["status"] = f"skipped, since there is no {step.needs}"
        elif left < 5:
            record["status"] = "no time left"
        else:
            self.write()
            print(f"{step.name} ...", flush=True)
            self.log.write(f"=== {step.name}\n".encode())
            self.log.flush()
            begun, at = time.monotonic(), self.log.tell()
            try:
                for command in step.commands:
                    end = min(begun + step.limit_s, self.until)
                    record["status"] = self._status(command, end - time.monotonic(), step)
                    if record["status"] != "ok":
                        break
            except Interrupted:
                record["status"] = "interrupted"
                raise
            finally:
                record["seconds"] = round(time.monotonic() - begun, 1)
                record["tail"] = self._said(at)[-TAIL:]
                self.write()
        print(f"{record['seconds']:7.1f} s  {step.name}: {record['status']}", flush=True)
        if record["status"] != "ok":
            print(record["tail"][-1500:], flush=True)
        self.write()

    def _status(self, command: Sequence[object], limit_s: float, step: Step) -> str:
        environment = {**os.environ, **step.environment}
        words = [str(word) for word in command]
        self.log.write(f"$ {' '.join(words)}\n".encode())
        self.log.flush()
        try:
            process = subprocess.Popen(
                words, stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return f"not started: {error}"
        try:
            code = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return f"over {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.log.seek(0, os.SEEK_END)
        return "ok" if code in step.good else f"exit {code}"

    def _said(self, begin: int) -> str:
        with (self.out / "gpu_check.log").open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    def write(self) -> None:
        """Replaces the report atomically."""
        new = self.out / "gpu_check.json.new"
        new.write_text(json.dumps(self.found, indent=1) + "\n")
        new.replace(self.out / "gpu_check.json")


# --- The machine


def output(*command: object, limit_s: float = 120) -> str:
    """The command's output; OSError or RuntimeError with the reason if there is none."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, errors="replace", timeout=limit_s, cwd=ROOT
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{words[0]}: {(done.stderr or done.stdout).strip()[-300:] or f'exit {done.returncode}'}")
    return done.stdout.strip()


def smi(names: Sequence[str]) -> list[str]:
    query = f"--query-gpu={','.join(names)}"
    values = output("nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0").splitlines()[0].split(", ")
    if len(values) != len(names):
        raise RuntimeError(f"nvidia-smi: {len(values)} values for {query}")
    return values


def machine(python: Sequence[object]) -> dict[str, Any]:
    """The facts that figures depend on. Unknown ones are None, and `unknown` says why."""
    found: dict[str, Any] = {"unknown": {}}

    def add(name: str, find: Any) -> None:
        try:
            value = find()
            if isinstance(value, str) and value.strip("[]") in ("", "N/A", "Not Supported", "Unknown Error"):
                raise RuntimeError(value)
            found[name] = value
        except Exception as error:
            found[name] = None
            found["unknown"][name] = f"{type(error).__name__}: {error}"

    def all_of_smi() -> None:
        for name, value in zip(QUERIES, smi(list(QUERIES.values())), strict=True):
            add(name, lambda value=value: value)

    try:
        all_of_smi()
    except Exception:  # one name that the driver does not know makes the whole query fail
        for name, query in QUERIES.items():
            add(name, lambda query=query: smi([query])[0])
    try:
        found |= json.loads(output(*python, "-c", ABOUT, limit_s=1200).splitlines()[-1])  # a rehearsal builds first
    except Exception as error:
        found["unknown"]["gpu"] = str(error)
        found["gpu"] = found["capability"] = None

    def numa_of_gpu() -> int:
        domain, rest = found["bus"].lower().split(":", 1)
        return int(Path(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text())

    add("numa_node_of_gpu", numa_of_gpu)
    add("numa_nodes", lambda: len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
    add("cpu", lambda: re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[0])
    add("cores", lambda: len(os.sched_getaffinity(0)))
    add("memory_of_host_kib", lambda: int(re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[0]))
    add("kernel", platform.release)
    add("python", platform.python_version)
    add("nvcc", lambda: output(of_cuda("nvcc"), "--version").splitlines()[-1])
    # A tree that was copied to the machine has no .git.
    add("commit", lambda: os.environ.get("LMCACHE_MM_COMMIT") or output("git", "rev-parse", "HEAD"))
    add("changed", lambda: len(output("git", "status", "--porcelain", "--branch").splitlines()) - 1)
    return found


def of_cuda(program: str) -> str:
    """The program's path, or its name if it is not found."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(program) or shutil.which(f"{home}/bin/{program}") or program


# --- The steps


def check_what_is_needed() -> None:
    """RuntimeError that names what this machine lacks, before anything is compiled."""
    missing = [name for name in ("cmake", "ninja", of_cuda("nvcc")) if shutil.which(name) is None]
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:  # or a wheel for another Python
            missing.append(str(error))
    if missing:
        raise RuntimeError(f"not found: {', '.join(missing)}; pip has all of these but nvcc, which CUDA has")


def build_folder(capability: str, rehearse: bool) -> Path:
    return ROOT / "build" / ("rehearsal" if rehearse else f"gpu_check-{sys.implementation.cache_tag}-{capability}")


def build(python: Sequence[object], capability: str, rehearse: bool) -> Step:
    """Builds by CMake, since setup.py needs a recent setuptools."""
    pybind11 = output(sys.executable, "-m", "pybind11", "--cmakedir")
    folder = build_folder(capability, rehearse)
    if rehearse:
        options = ["-DLMCACHE_MM_REHEARSAL=ON"]
    else:
        options = [
            "-DLMCACHE_MM_CUDA=ON",
            f"-DLMCACHE_MM_CUDA_ARCHS={capability}",
            f"-DCMAKE_CUDA_COMPILER={of_cuda('nvcc')}",
        ]
        options.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'lmcache_mm'}")
    options += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options]
    show = "from lmcache_mm import _C; print(_C.__file__, _C.cuda_version, _C.cuda_archs); assert _C.cuda_devices()[0]"
    return Step("build", [configure, ["cmake", "--build", folder], [*python, "-c", show]], 240)


def functions(path: Path) -> list[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text())
    return [one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")]


def benchmark_files() -> list[Path]:
    def rank(path: Path) -> int:
        subject = path.stem.removeprefix("bench_gpu_")
        return BENCHMARKS.index(subject) if subject in BENCHMARKS else len(BENCHMARKS)

    return sorted(sorted((ROOT / "benchmarks").glob("bench_gpu*.py")), key=rank)


def cases_file() -> Path:
    """The small cases of tests/*_cases.py for `driver`, by a digest of what makes them."""
    sources = [*(ROOT / "tests").glob("*_cases.py"), ROOT / "tests" / "layouts.py", ROOT / "tests" / "vectors.json"]
    sources.append(ROOT / "lmcache_mm" / "reference.py")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources))).hexdigest()[:16]
    return ROOT / "build" / f"cases-{digest}"


def driver_steps(python: Sequence[object], capability: str, objects: Path, folder: Path) -> Iterator[Step]:
    """Builds the drivers of tests/host_cuda from the kernels that `build` compiled, and runs each for a moment: whether
    kernels hang or write wrong bytes is known before anything is measured."""
    write = f"""
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from coded_cases import coded_cases; from copy_cases import copy_cases
from driver_cases import write_cases; from identity_cases import identity_cases
cases = Path({str(cases_file())!r})
if not cases.exists():
    new = cases.with_suffix(".new")
    write_cases(new, [case for make in (identity_cases, copy_cases, coded_cases) for case in make() if case.small])
    new.replace(cases)
"""
    kernels = [objects / f"{source.name}.o" for source in sorted((ROOT / "csrc").glob("*.cu"))]
    for name in reversed(DRIVERS):
        if name == "driver":
            yield Step("cases", [[*python, "-c", write]], 120, "build")
        flags = ["-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{capability}", f"-I{ROOT / 'csrc'}"]
        source, compiled = ROOT / "tests" / "host_cuda" / f"{name}.cpp", folder / f"{name}.o"
        compile_it = [of_cuda("nvcc"), *flags, "-x", "cu", "-c", source, "-o", compiled]
        link_it = [of_cuda("nvcc"), f"-arch=sm_{capability}", compiled, *kernels, "-o", folder / name]
        yield Step(f"{name} built", [compile_it, link_it], 100, "cases" if name == "driver" else "build")
        yield Step(name, [drive(folder, name, "--schedules", 2)], 40, f"{name} built")


def drive(folder: Path, name: str, *options: object) -> list[object]:
    return [folder / name, *([cases_file()] if name == "driver" else []), *options]


def measuring_steps(python: Sequence[object], out: Path, case_s: float) -> Iterator[Step]:
    pytest = [*python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        # A thread ends the process: a signal would wait for the call of CUDA that hangs.
        pytest += [f"--timeout={case_s:.0f}", "--timeout-method=thread"]
    # Machines without a GPU run the CPU part of these tests.
    tests = ["tests/test_devices.py", "tests/test_encoder_cache.py::" + ENCODER_TEST]
    yield Step("operations and transfers", [[*pytest, "--maxfail=5", *tests, "-k", "not cpu"]], 150, "build")
    yield Step("doctor", [[*python, "-m", "lmcache_mm", "doctor"]], 60, "build", good=(0, 1))  # 1: it found something
    yield Step("calibrate", [[*python, "-m", "lmcache_mm", "calibrate", "--dry-run"]], 60, "build")
    lines = {"LMCACHE_MM_BENCH_LINES": str(out / "gpu_check.jsonl")}
    for path in benchmark_files():
        for name in functions(path):
            of = [*pytest, f"{path.relative_to(ROOT)}::{name}", "-o", "python_files=bench_*.py"]
            yield Step(f"{path.stem} {name.removeprefix('test_')}", [of], 120, "build", environment=lines)


def sanitizing_steps(folder: Path) -> Iterator[Step]:
    """The drivers again: with more schedules, and under compute-sanitizer."""
    for name in DRIVERS:
        yield Step(f"{name} again", [drive(folder, name, "--seed", 2, "--schedules", 20)], 60, f"{name} built")
    for tool in TOOLS:
        command = [of_cuda("compute-sanitizer"), "--tool", tool, "--error-exitcode", 9]
        for name in DRIVERS:
            # Seeds 2 and 3 of transfers: one plane and six, all at once and by layers, raw and coded, by each path.
            options = ["--seed", 2, "--schedules", 1 if name == "driver" else 2]
            yield Step(f"{name} under {tool}", [[*command, *drive(folder, name, *options)]], 60, f"{name} built")


def chosen(every: list[Step], pattern: str) -> list[Step]:
    """The steps whose names match, and those that they need."""
    names: set[str] = set()
    for step in reversed(every):
        if re.search(pattern, step.name) or step.name in names:
            names |= {step.name, step.needs}
    return [step for step in every if step.name in names]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="directory for the results")
    only = "only steps whose names this expression matches, and those that they need"
    parser.add_argument("--only", default="", metavar="PATTERN", help=only)
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help=f"for all steps ({LIMIT_S})")
    parser.add_argument("--list", action="store_true", help="print the steps' names")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: on tests/rehearsal, with tiny sizes")
    args = parser.parse_args()
    if args.out is None and not args.list:
        parser.error("OUT is missing")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: expected a regular expression, got {args.only!r}: {error}")
    return args


def interrupt(number: int, _: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def main() -> int:
    args = arguments()
    python: list[object] = [sys.executable]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if args.rehearse:
        python.append(REHEARSAL)
        os.environ["PATH"] = f"{REHEARSAL / 'bin'}{os.pathsep}{os.environ['PATH']}"
        os.environ["LMCACHE_MM_BENCH_TINY"] = "1"
    if args.list:
        every = every_step(python, args, Step("build", [], 0), "", Path(), Path())
        print("\n".join(step.name for step in chosen(every, args.only)))
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, args.limit)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return steps(check, args, python, Path(folder))
    except Interrupted as error:
        check.found["interrupted"] = str(error)
        print(f"gpu_check: {error}", file=sys.stderr)
        return 130
    finally:
        check.write()


def every_step(
    python: list[object], args: argparse.Namespace, first: Step, capability: str, out: Path, folder: Path
) -> list[Step]:
    slower = SLOWER if args.rehearse else 1
    objects = build_folder(capability, args.rehearse) / "CMakeFiles" / "_C.dir" / "csrc"
    every = [first, *driver_steps(python, capability, objects, folder)]
    every += [*measuring_steps(python, out, CASE_S * slower), *sanitizing_steps(folder)]
    for step in every:
        step.limit_s *= slower
    return every


def steps(check: Check, args: argparse.Namespace, python: list[object], folder: Path) -> int:
    try:
        check_what_is_needed()
        check.found["machine"] = about = machine(python)
        check.write()
        if about["gpu"] is None:
            raise RuntimeError(f"torch finds no GPU on this machine: {about['unknown']['gpu']}")
        print(json.dumps(about, indent=1), flush=True)
        first = build(python, about["capability"], args.rehearse)
    except RuntimeError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    for step in chosen(every_step(python, args, first, about["capability"], check.out, folder), args.only):
        check.run(step)
        if step.name in DRIVERS and check.found["steps"][-1]["status"] != "ok":
            # Where the kernel of bulk copies hangs, it would hang each benchmark.
            os.environ["LMCACHE_MM_BENCH_NO_BULK"] = "1"
    check.found["ended"] = True
    return 0 if all(one["status"] == "ok" for one in check.found["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
