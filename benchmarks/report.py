"""Turns a benchmark JSON into the README's tables: python benchmarks/report.py benchmarks/results/FILE.json [--write]

Prints Markdown; --write puts it between the markers in README.md. Every figure in the README comes from here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks begin -->", "<!-- benchmarks end -->"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are right-aligned."""
    rule = ["---"] + ["--:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)) + "\n"


def seconds(value: float) -> str:
    return f"{value * 1e6:.0f} µs" if value < 1e-3 else f"{value * 1e3:.1f} ms"


def speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def keys(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if not one["name"].startswith("test_keys"):
            continue
        cells = [f"{facts['tokens']:,} tokens, {facts['cuts']:,} cuts, {facts['simd']}", seconds(median)]
        for peer in ("blake3 package and numpy", "chained SHA-256 in Python, every 256"):
            time = facts["peers_s"].get(peer)
            cells.append(f"{seconds(time)} ({time / median:.1f}×)" if time else "")
        rows.append(cells)
    headings = ["prefix keys, one core, warm caches", "ours", "blake3 + numpy, same keys", "chained SHA-256, Python"]
    return table(headings, rows)


def copies(benchmarks: list[dict[str, Any]]) -> str:
    cells: dict[tuple[int, str], dict[tuple[int, bool], str]] = {}
    speeds: dict[int, list[float]] = {}
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "page_bytes" not in facts:
            continue
        share = facts["peers_s"]["memcpy"] / median
        row = cells.setdefault((facts["page_bytes"], facts["direction"]), {})
        row[facts["threads"], facts["checksum"]] = f"{share:.0%}"
        speeds.setdefault(facts["threads"], []).append(facts["bytes"] / facts["peers_s"]["memcpy"])
    columns = [(threads, checksum) for threads in sorted(speeds) for checksum in (False, True)]
    headings = ["copy of shuffled pages, speed as a share of memcpy's"]
    headings += [f"{t} thread{'s' * (t > 1)}{', checksum' * checksum}" for t, checksum in columns]
    memcpy = ["memcpy of the same bytes"]
    memcpy += [speed(sorted(speeds[threads])[len(speeds[threads]) // 2]) for threads, _ in columns]
    rows = [memcpy]
    for (page_bytes, direction), row in sorted(cells.items()):
        rows.append([f"{direction}, {page_bytes:,} byte pages", *(row.get(column, "") for column in columns)])
    return table(headings, rows)


def cache(benchmarks: list[dict[str, Any]]) -> str:
    cells: dict[str, list[str]] = {}
    stores: list[str] = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "store" not in facts:
            continue
        if facts["store"] not in stores:
            stores.append(facts["store"])
        peer = facts.get("peers_s", {}).get("memcpy")
        share = f" ({peer / median:.0%})" if peer else ""
        cells.setdefault(one["name"].partition("[")[0].removeprefix("test_"), []).append(seconds(median) + share)
    headings = ["KVCache, 4,096 tokens of Qwen2-VL-2B (speed as a share of memcpy's)"]
    return table([*headings, *(f"{store}:" for store in stores)], [[name, *row] for name, row in cells.items()])


def stores(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "p99_s" in facts:
            name = "shm: match of 128 keys" + (", another process writing" if facts["writer"] else "")
            rows.append([name, seconds(median), f"p99 {seconds(facts['p99_s'])}"])
        elif "disk" in facts:
            share = facts["peers_s"]["plain O_DIRECT"] / median
            rows.append([f"file: {facts['disk']}", speed(facts["bytes"] / median), f"{share:.0%} of plain O_DIRECT"])
        elif "processes" in facts:
            count = facts["processes"]
            name = f"shm: {count} process{'es' * (count > 1)} reading at once"
            rows.append([name, speed(facts["bytes"] / median), ""])
    return table(["stores, records of 7 MiB", "median", ""], rows)


def network(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "network" not in facts:
            continue
        shares = [f"{time / median:.0%} of {name}" for name, time in facts["peers_s"].items()]
        rows.append([facts["network"], speed(facts["bytes"] / median), ", ".join(shares)])
    headings = ["64 records of 7 MiB over loopback", "median", "of the same bytes over bare connections"]
    return table(headings, rows) if rows else ""


def vllm(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "steps_of" in facts:
            times = [seconds(median), *(f"{seconds(facts[name])}" for name in ("connector_s", "connector_p99_s"))]
            rows.append([facts["steps_of"], *times, f"{facts['share']:.1%}", f"{facts['share_p99']:.1%}"])
    headings = ["vLLM 0.32, tiny model, steps", "step", "inside connector calls", "p99", "share of its step", "p99"]
    return table(headings, rows) if rows else ""


def gpu(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts = one["extra_info"]
        if "gpu" not in facts:
            continue
        took = facts["device_s"]
        if facts["gpu"] == "keys":
            rows.append([f"keys of {facts['tokens']:,} tokens, {facts['cuts']:,} cuts", seconds(took), ""])
        elif "model" in facts:
            share = facts["peers_s"]["one DMA"] / took
            name = f"{facts['gpu']} of 16,384 tokens of {facts['model']}"
            rows.append([name, speed(facts["bytes"] / took), f"{share:.0%} of one DMA"])
        else:
            share = facts["peers_s"]["memcpy"] / took
            name = f"{facts['gpu']}, runs of {facts['run_bytes']:,} bytes{', checksum' * facts['checksum']}"
            rows.append([name, speed(facts["bytes"] / took), f"{share:.0%} of memcpy"])
    return table(["on the GPU", "median", ""], rows) if rows else "**GPU: not measured yet.**\n"


def report(path: Path) -> str:
    results = json.loads(path.read_text())
    machine = results["machine_info"]["lmcache_mm"]
    place = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}"
    heading = f"Medians on {place} (`{path.relative_to(README.parent)}`), {results['datetime'][:10]}.\n"
    parts = [part(results["benchmarks"]) for part in (keys, copies, cache, stores, network, vllm, gpu)]
    return "\n".join(part for part in (heading, *parts) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file written by make bench")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    args = parser.parse_args()
    try:
        text = report(args.results.resolve())
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{args.results}: not a result of make bench: {error}")
    if args.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
