"""benchmarks/report.py: the tables in docs/benchmarks.md come from the results named there."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import report

ROOT = Path(__file__).parent.parent
PAGE = report.PAGE.read_text()
RESULTS = [ROOT / name for name in re.findall(r"\(`(benchmarks/results/[^`]+\.json)`\)", PAGE)]


def times(median: float) -> dict[str, dict[str, float]]:
    return {of: {"median": median, "iqr": 0.0, "rounds": 3} for of in ("device_s", "call_s", "total_s")}


def case(ours: float, **facts: object) -> dict[str, object]:
    found = {"name": f"synthetic {facts['gpu']}", "outcome": "passed", "device": "gpu", "device_s": ours}
    found |= {"peers_s": {}, "others_s": {}, "times": {"ours": times(2 * ours)}, "missing": {}}
    return found | facts


def step(where: str, beside: str, median: float) -> dict[str, object]:
    found = {"name": f"synthetic {beside}", "outcome": "passed", "device": "gpu", "gpu": "interference"}
    found |= {"where": where, "beside": beside, "median_s": median, "p99_s_of_step": 2 * median}
    return found | {"transferred_bytes_per_s": 0.0 if beside.startswith("nothing") else 5e10}


MACHINE = {"machine": {"gpu": "a synthetic GPU", "sizes": "gpu", "torch": "0", "state": {"ecc": "on"}}}
LINES = [
    MACHINE,
    case(
        *(0.02,),
        **{
            "gpu": "store",
            "model": "M",
            "tokens": 16_384,
            "bytes": 10**9,
            "fragment_bytes": 1,
            "missing": {"Triton": "none here"},
        },
        **{"peers_s": {"one DMA": 0.018, "torch": 0.036}, "others_s": {"ring": 0.02}},
    ),
    case(1e-5, gpu="keys", tokens=1024, cuts=4, on_cpu_s=8e-5),
    case(
        1e-3, gpu="gather", run_bytes=256, bytes=4 * 10**9, peers_s={"memcpy": 9e-4}, others_s={"with checksum": 1e-3}
    ),
    *(step("this process", beside, t) for beside, t in (("nothing", 1e-3), ("load: ring", 1.1e-3))),
    {"name": "synthetic failure", "outcome": "failed", "why": "it did"},
]


def test_readme_is_what_the_report_makes_of_the_results_that_it_names():
    lines = report.GPU_LINES.read_text().splitlines() if report.GPU_LINES.exists() else []
    text = report.report(RESULTS, [json.loads(line) for line in lines])
    assert f"{text}\n{report.END}" in PAGE


def test_without_lines_a_gpu_is_not_measured():
    assert report.on_gpu([]) == "**GPU: not measured yet.**\n"
    assert report.on_gpu([MACHINE]) == "**GPU: not measured yet.**\n"


def test_lines_of_a_gpu_become_tables():
    text = report.on_gpu(LINES)
    assert "a synthetic GPU" in text
    assert (
        "\n| store of 16,384 tokens, M | 50.0 GB/s | 40.0 ms | 40.0 ms | 90% of one DMA | torch 50%, ring 90% |\n"
        in text
    )
    assert "\n| keys of 1,024 tokens, 4 cuts | 10 µs | 20 µs | 20 µs |  | the CPU 80 µs |\n" in text
    assert "| gather, runs of 256 bytes | 4000.0 GB/s |" in text
    assert "\n| load: ring | 1.1 ms (+10.0%) | 2.2 ms (+10.0%) | 50.0 GB/s |\n" in text
    assert "Missing: Triton (none here)." in text
    assert "Failed: synthetic failure." in text
    assert "not measured yet" not in text
    partly = report.on_gpu(LINES[:2])
    assert [
        kind for kind in ("transfers", "keys", "copies", "interference") if f"{kind}: not measured yet." in partly
    ] == [
        *("keys", "copies", "interference"),
    ]


def test_times_of_a_device_that_waited_for_the_host_say_so():
    text = report.on_gpu([MACHINE, *(case(1e-5, gpu="keys", tokens=n, cuts=4, queue_was_full=n > 9) for n in (9, 10))])
    assert "\n| keys of 9 tokens, 4 cuts (the device waited for the host) | 10 µs |" in text
    assert "\n| keys of 10 tokens, 4 cuts | 10 µs |" in text


def test_lines_of_a_gpu_become_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GPU_PLOT", tmp_path / "plot.svg")
    report.draw_gpu(LINES)
    assert "a synthetic GPU" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("options", [[], ["--write"]])
def test_what_was_measured_with_tiny_sizes_is_never_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(report, "PLOT", tmp_path / "docs" / "plot.svg")
    report.PAGE.write_text(PAGE)
    lines = tmp_path / "lines.jsonl"
    tiny = [{"machine": MACHINE["machine"] | {"sizes": "tiny"}}, *LINES[1:]]
    lines.write_text("\n".join(json.dumps(line) for line in tiny))
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, RESULTS), "--gpu", str(lines), *options])
    if options:
        with pytest.raises(SystemExit):
            report.main()
        assert "not written" in capsys.readouterr().err
    else:
        assert report.main() == 0
        assert "a synthetic GPU" in capsys.readouterr().out
    assert report.PAGE.read_text() == PAGE
