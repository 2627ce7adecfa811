"""Makes the tables of docs/benchmarks.md: python benchmarks/report.py RESULTS.json... [--gpu LINES.jsonl] [--write]

RESULTS: files kept by make bench and make bench-sglang. LINES: the lines that the benchmarks appended on a GPU, by
default benchmarks/results/gpu.jsonl if it exists. Prints Markdown; --write puts it between the markers in
docs/benchmarks.md and draws the pictures in docs. Every figure there comes from here.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = PAGE.with_name("benchmarks.svg")
GPU_PLOT = PLOT.with_name("benchmarks-gpu.svg")
GPU_LINES = ROOT / "benchmarks" / "results" / "gpu.jsonl"
BEGIN, END = "<!-- benchmarks begin -->", "<!-- benchmarks end -->"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns except the first are right-aligned. Without rows, an empty string."""
    if not rows:
        return ""
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
    rows = [memcpy] if cells else []
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
    return table(headings, cells)


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
    return table(headings, rows)


def network(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "network" not in facts:
            continue
        shares = [f"{time / median:.0%} of {name}" for name, time in facts["peers_s"].items()]
        rows.append([facts["network"], speed(facts["bytes"] / median), ", ".join(shares)])
    headings = ["64 records of 7 MiB over loopback", "median", "of the same bytes over bare connections"]
    return table(headings, rows)


def codec(benchmarks: list[dict[str, Any]]) -> str:
    """The codec beside codecs of bytes, and caches with and without it."""

    def speed(bytes_per_second: float) -> str:
        return f"{bytes_per_second / 1e9:.2f} GB/s"

    speeds: list[list[str]] = []
    ends: list[list[str]] = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "codec" in facts:
            name = f"{facts['codec']}, {facts['simd']}"
            speeds.append([name, f"{facts['ratio']:.3f}", speed(facts["bytes"] / median), ""])
            for rival, time in facts["peers_s"].items():
                cells = [f"{facts['ratios'][rival]:.3f}", speed(facts["bytes"] / time), f"{time / median:.1f}×"]
                speeds.append([f"{facts['codec']}, {rival}", *cells])
        elif "coded_store" in facts:
            raw = facts["peers_s"]["without the codec"]
            cells = [*(speed(facts["bytes"] / s) for s in (raw, median)), f"{raw / median:.2f}×"]
            ends.append([f"{facts['coded_store']}, {facts['direction']}", *cells])
    speeds_table = table(["KV of SmolLM2-135M, one thread", "ratio", "of raw bytes", "ours is faster by"], speeds)
    ends_table = table(["KVCache, 4,096 tokens of SmolLM2-135M", "raw", "with the codec", "faster by"], ends)
    return "\n".join(filter(None, (speeds_table, ends_table)))


def vllm(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "steps_of" in facts:
            times = [seconds(median), *(f"{seconds(facts[name])}" for name in ("connector_s", "connector_p99_s"))]
            rows.append([facts["steps_of"], *times, f"{facts['share']:.1%}", f"{facts['share_p99']:.1%}"])
    headings = ["vLLM 0.32, tiny model, steps", "step", "inside connector calls", "p99", "share of its step", "p99"]
    return table(headings, rows)


def sglang(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for one in benchmarks:
        facts, median = one["extra_info"], one["stats"]["median"]
        if "hicache" in facts:
            theirs = facts["peers_s"]["file"]
            speeds = [speed(facts["bytes"] / took) for took in (median, theirs)]
            rows.append([facts["hicache"], *speeds, f"{theirs / median:.1f}×"])
    headings = ["SGLang 0.5.23, 32 pages of 3.7 MB per call", "ours", "SGLang's file", "times as fast"]
    return table(headings, rows)


def transfers(cases: list[dict[str, Any]], device: str) -> str:
    """The results of bench_gpu_*.py, on a GPU or on the CPU."""
    rows = []
    for facts in cases:
        if "device_s" not in facts or (device == "cpu" and ("run_bytes" in facts or facts["gpu"] == "keys")):
            continue  # those have their own tables
        took, what = facts["device_s"], facts["gpu"]
        if what == "keys":
            what = f"keys of {facts['tokens']:,} tokens, {facts['cuts']:,} cuts"
        elif "run_bytes" in facts:
            what += f", runs of {facts['run_bytes']:,} bytes{', checksum' * facts.get('checksum', False)}"
        elif "tokens" in facts:
            what += f" of {facts['tokens']:,} tokens"
        what += f", {facts['model']}" if "model" in facts else ""
        what += " (the device waited for the host)" if facts.get("queue_was_full") is False else ""
        first, *peers = facts["peers_s"].items() or [("", 0.0)]
        others = [*peers, *facts["others_s"].items()]
        share = f"{first[1] / took:.0%} of {first[0]}" if first[0] else ""
        compared = ", ".join(f"{name} {first[1] / time:.0%}" for name, time in others if first[0])
        compared = compared or ", ".join(f"{name} {seconds(time)}" for name, time in others)
        compared = compared or (f"the CPU {seconds(facts['on_cpu_s'])}" if "on_cpu_s" in facts else "")
        of_host = (
            [seconds(facts["times"]["ours"][of]["median"]) for of in ("call_s", "total_s")] if device == "gpu" else []
        )
        rows.append(
            [what, speed(facts["bytes"] / took) if "bytes" in facts else seconds(took), *of_host, share, compared]
        )
    of_host = ["call", "call until done"] if device == "gpu" else []
    headings = [f"on the {device.upper()}", "ours", *of_host, "share", "others, as shares of the same"]
    tables = [table(headings, rows)]
    beside = [facts for facts in cases if "beside" in facts and "median_s" in facts]
    for where in dict.fromkeys(facts.get("where", "") for facts in beside):
        here = [facts for facts in beside if facts.get("where", "") == where]
        nothing = next((facts for facts in here if facts["beside"] == "nothing"), None)
        heading = f"a step of compute on the {device.upper()}{f' in {where}' * bool(where)}, beside"
        steps = [
            [
                facts["beside"] + (f" ({facts['late']} steps late)" if facts.get("late") else ""),
                *(
                    f"{seconds(facts[name])} ({facts[name] / nothing[name] - 1:+.1%})"
                    for name in ("median_s", "p99_s_of_step")
                ),
                speed(facts["transferred_bytes_per_s"]) if facts["transferred_bytes_per_s"] else "",
            ]
            for facts in (here if nothing else [])
        ]
        tables.append(table([heading, "median", "p99", "transferred"], steps))
    return "\n".join(filter(None, tables))


def on_cpu(benchmarks: list[dict[str, Any]]) -> str:
    return transfers([one["extra_info"] for one in benchmarks if one["extra_info"].get("device") == "cpu"], "cpu")


def place_of_gpu(lines: list[dict[str, Any]]) -> str:
    machine = next(line["machine"] for line in lines if "machine" in line)
    state = ", ".join(f"{name} {value}" for name, value in machine.get("state", {}).items())
    return f"{machine['gpu']}, torch {machine['torch']}, {machine.get('copy_engines')} copy engines ({state})"


def measured_on_gpu(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with times, also those in which one of our ways or an alternative failed."""
    return [line for line in lines if line.get("device") == "gpu" and (line.get("device_s") or "median_s" in line)]


def on_gpu(lines: list[dict[str, Any]]) -> str:
    cases = measured_on_gpu(lines)
    if not cases:
        return "**GPU: not measured yet.**\n"
    kinds = {"transfers": "fragment_bytes", "keys": "cuts", "copies": "run_bytes", "interference": "beside"}
    absent = [kind for kind, fact in kinds.items() if not any(fact in facts for facts in cases)]
    missing = {f"{name} ({why})" for line in lines for name, why in line.get("missing", {}).items()}
    failed = [
        line["name"] + "".join(f", {way} ({why})" for way, why in line.get("failed", {}).items())
        for line in lines
        if line.get("outcome") == "failed"
    ]
    notes = [
        f"Medians on {place_of_gpu(lines)}. `ours` is the device's time; a call's times are the host's.",
        *(f"{kind}: not measured yet." for kind in absent),
        *(f"Missing: {one}." for one in sorted(missing)),
        *(f"Failed: {name}." for name in failed),
    ]
    return "\n\n".join(notes) + "\n\n" + transfers(cases, "gpu")


def draw_gpu(lines: list[dict[str, Any]]) -> None:
    """Transfers by each way, and how much they slow a decoding step."""
    cases = measured_on_gpu(lines)
    speeds: dict[str, float] = {}
    for facts in cases:
        if facts["gpu"] in ("store", "load") and len(facts["peers_s"]) > 1:
            for name, time in ({"ours": facts["device_s"]} | facts["others_s"] | facts["peers_s"]).items():
                speeds[f"{facts['gpu']}, {facts['model']}: {name}"] = facts["bytes"] / time / 1e9
    beside = [facts for facts in cases if facts.get("where") == "this process" and "median_s" in facts]
    nothing = next((facts for facts in beside if facts["beside"] == "nothing"), None)
    title = f"Medians on {place_of_gpu(lines).partition(' (')[0]}"
    figure, (left, right) = new_figure(title, 1.4 + 0.22 * max(len(speeds), len(beside), 10))
    colors = [OURS if name.endswith(": ours") else RIVAL for name in speeds]
    left.bar_label(left.barh(list(speeds), list(speeds.values()), color=colors), fmt="%.1f", padding=3, fontsize=7)
    left.invert_yaxis()
    left.margins(x=0.12)
    left.tick_params("y", labelsize=7)
    left.set(xlabel="GB/s", title="transfers of one prompt")
    for facts in beside if nothing else []:
        slower, tail = (100 * (facts[of] / nothing[of] - 1) for of in ("median_s", "p99_s_of_step"))
        name = f"{facts['beside']}, {facts['transferred_bytes_per_s'] / 1e9:.1f} GB/s"
        right.barh(name, slower, color=RIVAL if facts["beside"].startswith("nothing") else OURS)
        right.plot([slower, tail], [name, name], color="black", linewidth=1)
    right.invert_yaxis()
    right.tick_params("y", labelsize=7)
    right.set(xlabel="% slower, line to p99", title="a decoding step beside transfers")
    figure.savefig(GPU_PLOT, metadata={"Date": None})


OURS, OURS_TOO, RIVAL = "tab:blue", "lightskyblue", "darkgrey"  # in all plots


def new_figure(title: str, height: float = 3.6) -> Any:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lmcache_mm"  # the same figures give the same file
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 2, figsize=(10, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, axes


def draw(benchmarks: list[dict[str, Any]], place: str) -> None:
    """The keys of one prompt, and copies within memory by the page's size, each beside its rivals."""
    figure, (left, right) = new_figure(f"Medians on {place}")
    times: dict[str, float] = {}
    for one in benchmarks:
        facts = one["extra_info"]
        if one["name"].startswith("test_keys") and (facts["tokens"], facts["cuts"]) == (16384, 64):
            times[f"ours, {facts['simd']}"] = one["stats"]["median"]
            for name, time in facts["peers_s"].items():
                times[name] = min(time, times.get(name, time))
    times = dict(sorted(times.items(), key=lambda item: (not item[0].startswith("ours"), item[1])))
    colors = [OURS if name.startswith("ours") else RIVAL for name in times]
    bars = left.barh([textwrap.fill(name, 22) for name in times], [1e3 * time for time in times.values()], color=colors)
    left.bar_label(bars, [seconds(time) for time in times.values()], padding=3, fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.15)
    rival = min(time for name, time in times.items() if not name.startswith("ours"))
    left.set(xlabel="ms, one core, a prompt of 16,384 tokens with 64 cuts")
    left.set_title(f"keys: {rival / min(times.values()):.1f}× as fast as the fastest other way", fontsize=11)
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for one in benchmarks:
        facts = one["extra_info"]
        if "page_bytes" in facts and facts["threads"] == 1:
            share = facts["peers_s"]["memcpy"] / one["stats"]["median"]
            lines.setdefault((facts["direction"], facts["checksum"]), []).append((facts["page_bytes"], share))
    for (direction, checksum), points in lines.items():
        style = {"color": OURS if direction == "gather" else OURS_TOO, "linestyle": "--" if checksum else "-"}
        name = f"ours: {direction}{', checksum' * checksum}"
        right.plot(*zip(*sorted(points), strict=True), marker="o", label=name, **style)
    right.axhline(1, color=RIVAL, label="memcpy of the same bytes")
    sizes = sorted({size for points in lines.values() for size, _ in points})
    right.set(xscale="log", ylim=(0, None), xlabel="page", ylabel="speed as a share of memcpy's")
    right.set_xticks(sizes, [f"{size >> 10} KiB" if size >= 1 << 10 else f"{size} B" for size in sizes])
    right.minorticks_off()
    right.set_title("copies of shuffled pages, one thread", fontsize=11)
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def place_of(results: dict[str, Any]) -> str:
    machine = results["machine_info"]["lmcache_mm"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}"


PARTS = (keys, copies, cache, encoder, stores, remote, network, codec, vllm, sglang, on_cpu)


def report(paths: Sequence[Path], gpu_lines: list[dict[str, Any]]) -> str:
    parts = []
    for path in paths:
        results = json.loads(path.read_text())
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        commit = results["commit_info"]
        of = f"{results['datetime'][:10]}, commit {commit['id'][:7]}{', with changes' * commit['dirty']}"
        parts.append(f"Medians on {place_of(results)} (`{name}`), {of}.\n")
        parts += [part(results["benchmarks"]) for part in PARTS]
    return "\n".join(part for part in (*parts, on_gpu(gpu_lines)) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files written by make bench or make bench-sglang")
    parser.add_argument("--gpu", type=Path, help="lines that the benchmarks appended on a GPU")
    parser.add_argument(
        "--write", action="store_true", help="replace the tables in docs/benchmarks.md and the pictures"
    )
    args = parser.parse_args()
    try:
        file = args.gpu or (GPU_LINES if GPU_LINES.exists() else None)
        gpu_lines = [json.loads(line) for line in file.read_text().splitlines()] if file else []
        text = report([path.resolve() for path in args.results], gpu_lines)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{' '.join(map(str, args.results))}: not results of make bench: {error!r}")
    if args.write and any(line["machine"]["sizes"] != "gpu" for line in gpu_lines if "machine" in line):
        parser.error(f"{file}: not written, since it was measured with other sizes than a GPU's")
    if args.write:
        before, rest = PAGE.read_text().split(BEGIN)
        results = json.loads(args.results[0].read_text())
        draw(results["benchmarks"], place_of(results))
        plots = [PLOT]
        if measured_on_gpu(gpu_lines):
            draw_gpu(gpu_lines)
            plots.append(GPU_PLOT)
        pictures = "\n".join(f"![{plot.stem}]({plot.name})" for plot in plots)
        PAGE.write_text(f"{before}{BEGIN}\n{pictures}\n\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
