"""Turns a benchmark JSON into the README's tables: python benchmarks/report.py benchmarks/results/FILE.json [--write]

Prints Markdown; --write puts it between the markers in README.md, and draws docs/benchmarks.svg. Every figure in the
README comes from here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
PLOT = README.parent / "docs" / "benchmarks.svg"
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


def encoder(benchmarks: list[dict[str, Any]]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "encoder_store" in facts:
            encoding = facts["peers_s"]["encoder"]
            row = rows.setdefault(facts["tower"], {"encoder": seconds(encoding)})
            row[facts["encoder_store"]] = f"{seconds(median)} ({encoding / median:,.0f}×)"
    cells = [[name, *(row.get(column, "") for column in ("encoder", "mem", "shm"))] for name, row in rows.items()]
    headings = ["EncoderCache, one image", "encoded again", "loaded from mem:", "from shm:"]
    return table(headings, cells) if cells else ""


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


def remote(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "remote" in facts:
            bare, without = (facts["peers_s"][peer] for peer in ("bare client", "without MACs"))
            name = f"{facts['remote']}: {facts['direction']} of {facts['bytes'] // (7 << 20)}"
            rows.append(
                [
                    name,
                    *(speed(facts["bytes"] / s) for s in (bare, median, without)),
                    f"{bare / median:.0%}",
                    f"{bare / without:.0%}",
                ]
            )
        elif "mac_bytes" in facts:
            rows.append(["the MAC alone, one thread", "", speed(facts["mac_bytes"] / median), "", "", ""])
    headings = ["stores beyond one host, records of 7 MiB, servers on this machine", "bare client", "ours"]
    headings += ["ours without MACs", "ours / bare", "without MACs / bare"]
    return table(headings, rows) if rows else ""


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


def transfers(benchmarks: list[dict[str, Any]], device: str) -> str:
    """What bench_gpu.py measured, on a GPU or on the CPU."""
    of_device = [one["extra_info"] for one in benchmarks if one["extra_info"].get("device") == device]
    rows = []
    for facts in of_device:
        if facts["gpu"] == "interference" or (device == "cpu" and ("run_bytes" in facts or facts["gpu"] == "keys")):
            continue  # the latter have tables of their own
        took, what = facts["device_s"], facts["gpu"]
        if what == "keys":
            what = f"keys of {facts['tokens']:,} tokens, {facts['cuts']:,} cuts"
        elif "run_bytes" in facts:
            what += f", runs of {facts['run_bytes']:,} bytes{', checksum' * facts['checksum']}"
        elif "tokens" in facts:
            what += f" of {facts['tokens']:,} tokens"
        what += f", {facts['model']}" if "model" in facts else ""
        first, *peers = facts["peers_s"].items() or [("", 0.0)]
        others = [*peers, *facts["others_s"].items()]
        share = f"{first[1] / took:.0%} of {first[0]}" if first[0] else ""
        compared = ", ".join(f"{name} {first[1] / time:.0%}" for name, time in others if first[0])
        compared = compared or ", ".join(f"{name} {seconds(time)}" for name, time in others)
        rows.append([what, speed(facts["bytes"] / took) if "bytes" in facts else seconds(took), share, compared])
    if not rows:
        return ""
    headings = [f"on the {device.upper()}", "ours", "share", "others, as shares of the same"]
    beside = [facts for facts in of_device if facts["gpu"] == "interference"]
    nothing = next((facts for facts in beside if facts["beside"] == "nothing"), None)
    steps = [
        [
            facts["beside"],
            *(
                f"{seconds(facts[name])} ({facts[name] / nothing[name] - 1:+.1%})"
                for name in ("median_s", "p99_s_of_step")
            ),
            speed(facts["transferred_bytes_per_s"]) if facts["transferred_bytes_per_s"] else "",
        ]
        for facts in (beside if nothing else [])
    ]
    heading = f"a step of compute on the {device.upper()}, beside"
    return table(headings, rows) + ("\n" + table([heading, "median", "p99", "transferred"], steps) if steps else "")


def on_gpu(benchmarks: list[dict[str, Any]]) -> str:
    return transfers(benchmarks, "gpu") or "**GPU: not measured yet.**\n"


def on_cpu(benchmarks: list[dict[str, Any]]) -> str:
    return transfers(benchmarks, "cpu")


def draw(benchmarks: list[dict[str, Any]], place: str) -> None:
    """Keys by the prompt's length, and copies within memory by the page's, as shares of memcpy's speed."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lmcache_mm"  # the same figures make the same file
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"Medians on {place}", fontsize=9)
    lines: dict[str, list[tuple[int, float]]] = {}
    for one in benchmarks:
        facts = one["extra_info"]
        if (
            one["name"].startswith("test_keys")
            and facts["simd"] != "portable"
            and facts["cuts"] == facts["tokens"] // 256
        ):
            lines.setdefault(f"ours, {facts['simd']}", []).append((facts["tokens"], one["stats"]["median"]))
            for name, time in facts["peers_s"].items():
                lines.setdefault(name, []).append((facts["tokens"], time))
    for name, points in lines.items():
        left.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="prefix keys, one core")
    lines = {}
    for one in benchmarks:
        facts = one["extra_info"]
        if "page_bytes" in facts and facts["threads"] == 1:
            name = f"{facts['direction']}{', checksum' * facts['checksum']}"
            share = facts["peers_s"]["memcpy"] / one["stats"]["median"]
            lines.setdefault(name, []).append((facts["page_bytes"], share))
    for name, points in lines.items():
        right.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    right.axhline(1, color="grey", linewidth=1, label="memcpy of the same bytes")
    right.set(xscale="log", ylim=(0, None), xlabel="bytes of a page", ylabel="speed, memcpy's being 1")
    right.set_title("copies of shuffled pages, one thread")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def place_of(results: dict[str, Any]) -> str:
    machine = results["machine_info"]["lmcache_mm"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}"


def report(path: Path) -> str:
    results = json.loads(path.read_text())
    heading = f"Medians on {place_of(results)} (`{path.relative_to(README.parent)}`), {results['datetime'][:10]}.\n"
    parts = [
        part(results["benchmarks"])
        for part in (keys, copies, cache, encoder, stores, remote, network, vllm, on_cpu, on_gpu)
    ]
    return "\n".join(part for part in (heading, *parts) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file written by make bench")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md and the picture")
    args = parser.parse_args()
    try:
        text = report(args.results.resolve())
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{args.results}: not a result of make bench: {error}")
    if args.write:
        before, rest = README.read_text().split(BEGIN)
        picture = f"![{PLOT.stem}]({PLOT.relative_to(README.parent)})"
        README.write_text(f"{before}{BEGIN}\n{picture}\n\n{text}\n{END}{rest.split(END)[1]}")
        results = json.loads(args.results.read_text())
        draw(results["benchmarks"], place_of(results))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
