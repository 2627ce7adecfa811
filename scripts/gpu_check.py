"""The steps of gpu_check.sh: python scripts/gpu_check.py OUT"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WITHIN_S = 560  # all steps
TAIL = 3000  # characters of a step's output that the JSON keeps


class Check:
    """Runs steps and keeps what came of them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.begun = time.monotonic()
        self.found: dict[str, Any] = {"steps": []}
        self.log = (out / "gpu_check.log").open("w")

    def step(self, name: str, command: list[object], limit_s: float, **environment: str) -> bool:
        """Whether it ended well; a step that the time does not suffice for is left out, and said so."""
        left = WITHIN_S - (time.monotonic() - self.begun)
        step: dict[str, Any] = {"name": name, "seconds": 0.0, "status": "no time left", "tail": ""}
        if left > 10:
            begun = time.monotonic()
            limit = min(limit_s, left)
            step["tail"], step["status"] = run(command, limit, environment)
            step["seconds"] = round(time.monotonic() - begun, 1)
            self.log.write(f"=== {name}\n{step['tail']}\n")
            self.log.flush()
            step["tail"] = step["tail"][-TAIL:]
        self.found["steps"].append(step)
        self.write()
        print(f"{step['status']:>12} {step['seconds']:7.1f} s  {name}", flush=True)
        if step["status"] != "ok":
            print(step["tail"][-1500:], flush=True)
        return bool(step["status"] == "ok")

    def write(self) -> None:
        (self.out / "gpu_check.json").write_text(json.dumps(self.found, indent=1) + "\n")


def run(command: list[object], limit_s: float, environment: dict[str, str]) -> tuple[str, str]:
    """(output, status)"""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_s,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return said.decode(errors="replace") if isinstance(said, bytes) else said, f"over {limit_s:.0f} s"
    except OSError as error:
        return str(error), "not started"
    return done.stdout, "ok" if done.returncode == 0 else f"exit {done.returncode}"


def output(*command: str) -> str:
    return run(list(command), 60, {})[0].strip()


def machine() -> dict[str, Any]:
    import torch  # noqa: PLC0415

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}{properties.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version").splitlines()[-1:],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpu": output("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed": output("git", "status", "--porcelain"),
    }


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: scripts/gpu_check.sh OUT [WHEELS]", file=sys.stderr)
        return 2
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    check = Check(Path(sys.argv[1]))
    check.found["machine"] = machine()
    check.write()
    capability = check.found["machine"]["capability"]
    python = sys.executable
    build = {"LMCACHE_MM_CUDA": "ON", "LMCACHE_MM_CUDA_ARCHS": capability}
    install = [python, "setup.py", "build_ext", "--inplace"]
    if not check.step("build the module", install, 240, **build):
        return 1
    tests = [python, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider"]
    check.step("operations and transfers on cuda", [*tests, "tests/test_devices.py", "-k", "cuda or gpu"], 150)
    check.step("doctor", [python, "-m", "lmcache_mm", "doctor"], 60)
    check.step("calibrate", [python, "-m", "lmcache_mm", "calibrate", "--dry-run"], 60)
    results = check.out / "gpu_benchmarks.json"
    bench = [*tests[:-2], "benchmarks/bench_gpu.py", "-o", "python_files=bench_*.py", f"--benchmark-json={results}"]
    check.step("benchmarks", bench, 280)
    if results.exists():
        check.found["benchmarks"] = [
            {"name": one["name"], **one["extra_info"]} for one in json.loads(results.read_text())["benchmarks"]
        ]
        check.write()
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder) / "cases"
        write = f"import sys; sys.path.insert(0, 'tests'); import test_host_cuda as t; from pathlib import Path; \
t.write_cases(Path({str(cases)!r}), [c for c in (*t.identity_cases(), *t.copy_cases()) if c.small])"
        check.step("write the cases", [python, "-c", write], 60)
        kernels = sorted((ROOT / "csrc").glob("*.cu"))
        tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
        for name in ("driver", "transfer_driver"):
            program = Path(folder) / name
            sources = [ROOT / "tests" / "host_cuda" / f"{name}.cpp", *kernels]
            flags = ["-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{capability}", "-x", "cu", f"-I{ROOT / 'csrc'}"]
            if check.step(f"build {name}", ["nvcc", *flags, *sources, "-o", program], 120):
                arguments = [cases] if name == "driver" else []
                check.step(f"{name}", [program, *arguments, "--schedules", 20], 60)
                for tool in tools if shutil.which("compute-sanitizer") else []:
                    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9]
                    check.step(f"{name} under {tool}", [*sanitizer, program, *arguments, "--schedules", 1], 60)
    return 0 if all(step["status"] == "ok" for step in check.found["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
