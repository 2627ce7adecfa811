"""The crash test of the stores: processes that use one are killed, stopped and resumed, thousands of times.

    python tests/soak.py --kills 10000 --stops 10000 --schedules 1000000 --json soak.json

First the index of slabs runs under the simulator (tests/slab/simulation.cpp), then real processes use shm:, file:,
tiered:, valkey: and peer:, in phases of some hundred signals, some of which hit a worker while it changes an index.
After each phase all processes are dead; records that were accepted and flushed must exist with the right payload, and
all room must be accounted for. In a tight phase records are evicted all the time; in a roomy phase never, so that a
missing record is a lost one. --seed: of the choices made here; the system schedules the processes. Prints a table;
exits with 1 if anything was wrong, lost, or over its budget.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import servers
from lmcache_mm import _C
from lmcache_mm.commands import cli
from lmcache_mm.stores import TieredStore, breaker, open_store, slab_directory
from lmcache_mm.stores.local import slab, slab_files
from lmcache_mm.stores.local.slab import SlabStore
from programs import CXX, REPO, must_run

KEYS, KEPT = 60, 40  # the first KEPT are never deleted in a roomy phase
LARGEST = 90_000
WORKERS = 4
TIGHT, ROOMY = "2MiB", "192MiB"  # slots that dead processes had reserved rest for 10 s
PHASE = 400  # signals
PACE_S = 0.008  # a worker's longest pause between two calls
SIGNAL_S = 0.06  # the longest time between two signals
AIM_S = 0.1  # how long to look for a worker that changes an index
REMOTE_S = 1.0  # timeout of remote stores
PAUSE_S = 0.5  # how long they are left alone after a failure, instead of ten seconds
REST_S = 10.0
SLACK_S = 0.5  # for the work itself, on a busy machine
CALLS = ("open", "get", "contains", "put", "delete", "forget", "flush", "slots", "close")
COUNTS = ("opened", "hits", "wrong", "refused", "raised")
STORES = ("shm", "file", "tiered", "valkey", "peer")
# Seconds, as promised in docs/reliability.md. None: it waits for the work of others.
SLAB_BUDGETS = {"get": 0.25, "contains": 0.0, "put": 0.75, "slots": 0.75, "delete": 5.0, "forget": 5.0, "close": 0.25}
BUDGETS: dict[str, dict[str, float]] = {
    "shm": SLAB_BUDGETS | {"open": 65.0},
    "file": SLAB_BUDGETS | {"open": 65.0},
    "tiered": {"open": 130.0, "get": 1.5, "contains": 0.0, "put": 0.75, "slots": 1.5, "delete": 11.0, "forget": 11.0},
    "valkey": {"open": 1.0, "get": 1.0, "contains": 1.0, "put": 3.0, "delete": 1.0, "close": 1.0},
    "peer": SLAB_BUDGETS | {"open": 65.0, "get": 1.0, "contains": 1.0, "close": 1.0},  # the lender's host also writes
}


def key(i: int) -> bytes:
    return i.to_bytes(36, "little")


def size(i: int) -> int:
    return 1 + i * 7919 % LARGEST


def payload(i: int) -> np.ndarray:
    """The only payload ever stored under key(i): anything else is wrong."""
    return ((np.arange(size(i)) * (2 * i + 1) + i) % 251).astype(np.uint8)


PAYLOADS = [payload(i) for i in range(KEYS)]


def shared(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Memory shared with forked processes, which outlives its writers."""
    nbytes = int(np.prod(shape)) * 8
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 4096)), dtype=kind)[: nbytes // 8].reshape(shape)


def run_delay_ns(pid: int | str = "self") -> int:
    """How long the first thread of a process was ready to run but did not."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])


class Seat:
    """Shared records of a worker, which its successor continues after its death."""

    def __init__(self) -> None:
        self.counts = shared((len(COUNTS),), np.int64)
        self.longest = shared((len(CALLS),), np.float64)
        # Of the current call: which, since when (0: none), and how long the process had by then been stopped and had
        # waited for a processor.
        self.now = shared((4,), np.int64)
        self.stopped_ns = shared((1,), np.int64)  # in total, written by the parent
        self.pid = 0
        self.stopped_at = 0

    def count(self, name: str, by: int = 1) -> None:
        self.counts[COUNTS.index(name)] += by

    def begin(self, call: str) -> None:
        self.now[:] = CALLS.index(call), 0, self.stopped_ns[0], run_delay_ns()
        self.now[1] = time.monotonic_ns()

    def end(self, pid: int | str = "self") -> None:
        """Ends the current call: its wait, minus the time in which its process was stopped or had no processor."""
        call, begun, stopped, delay = map(int, self.now)
        if not begun:
            return
        waited = time.monotonic_ns() - begun - (int(self.stopped_ns[0]) - stopped) - (run_delay_ns(pid) - delay)
        self.longest[call] = max(self.longest[call], waited / 1e9)
        self.now[1] = 0


class Worker:
    """One process that uses a store until it is killed."""

    def __init__(self, url: str, seat: Seat, kept: np.ndarray, roomy: bool) -> None:
        self.url, self.seat, self.kept, self.never_deleted = url, seat, kept, KEPT if roomy else 0
        self.store: Any = None

    def call(self, name: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.seat.begin(name)
        try:
            return work(*arguments, **named)
        except (RuntimeError, TimeoutError):  # such as when another process is stopped while it changes the index
            if name not in ("open", "delete", "forget"):
                raise
            self.seat.count("refused")
            return None
        finally:
            self.seat.end()

    def run(self) -> None:
        while True:
            self.store = self.call("open", open_store, self.url)
            if self.store is None:
                continue
            self.seat.count("opened")
            for _ in range(500):
                time.sleep(random.random() * PACE_S)
                self.step()
            if isinstance(self.store, TieredStore):  # its end waits for pending writes
                self.store.close()
            else:
                self.call("close", self.store.close)

    def step(self) -> None:
        ids = random.sample(range(KEYS), 4)
        what = random.random()
        if what < 0.35:
            self.put(ids)
        elif what < 0.75 or self.store.read_only:
            self.get(ids)
        elif what < 0.80:
            self.call("contains", self.store.contains, [key(i) for i in ids])
        elif what < 0.85 and (gone := [i for i in ids if i >= self.never_deleted]):
            self.call("delete", self.store.delete, [key(i) for i in gone])
        elif what < 0.87 and "forget" in BUDGETS[scheme(self.url)]:
            self.call("forget", self.store.forget, bytes([random.randrange(1, 4)]) * 16)
        elif hasattr(self.store, "lend"):
            self.call("slots", self.use_slots, ids)

    def put(self, ids: list[int]) -> None:
        ids = [i for i in ids if (i < self.never_deleted) == (ids[0] < self.never_deleted)]
        owner = bytes([9 if ids[0] < self.never_deleted else 1 + ids[0] % 3]) * 16
        kept = int(self.kept[-1])
        self.call("put", self.store.put, [key(i) for i in ids], [PAYLOADS[i] for i in ids], owner)
        if ids[0] < self.never_deleted and random.random() < 0.2:
            self.call("flush", self.store.flush)
            there = self.call("contains", self.store.contains, [key(i) for i in ids])
            self.kept[[i for i, is_there in zip(ids, there, strict=True) if is_there]] = kept

    def get(self, ids: list[int]) -> None:
        buffers = [np.zeros(size(i), np.uint8) for i in ids]
        found = self.call("get", self.store.get_into, [key(i) for i in ids], buffers)
        self.look(list(zip(ids, found, buffers, strict=True)))

    def look(self, read: list[tuple[int, bool, np.ndarray]]) -> None:
        self.seat.count("hits", sum(found for _, found, _ in read))
        self.seat.count("wrong", sum(found and not np.array_equal(PAYLOADS[i], buffer) for i, found, buffer in read))

    def use_slots(self, ids: list[int]) -> None:
        """Lends some slots for a while, and reserves others, which stay unpublished if the worker is killed here."""
        keys, sizes = [key(i) for i in ids], [size(i) for i in ids]
        lent = [slot for slot in self.store.lend(keys, sizes) if slot]
        ids = [i for i in ids if i >= self.never_deleted]
        reserved = [slot for slot in self.store.reserve([key(i) for i in ids], [size(i) for i in ids]) if slot]
        if hasattr(self.store, "view"):
            self.look([(index_of(slot), True, self.store.view(slot)) for slot in lent])
            for slot in reserved:
                self.store.view(slot)[:] = PAYLOADS[index_of(slot)]
            sums = [_C.checksum(self.store.view(slot).ctypes.data, slot.payload_bytes) for slot in reserved]
            if random.random() < 0.5:
                self.store.publish(reserved, sums)
                reserved = []
        self.store.abandon(reserved)
        self.store.release(lent)


def index_of(slot: slab.Slot) -> int:
    return int.from_bytes(slot.key, "little")


def scheme(url: str) -> str:
    return url.partition(":")[0]


class Helper:
    """A server process that workers need."""

    def __init__(self, start: Callable[[], int], end: Callable[[int], None] = lambda pid: None) -> None:
        self._start, self._end = start, end
        self.pid, self.stopped_at = start(), 0

    def restart(self) -> None:
        self._end(self.pid)
        self.pid = self._start()


class Setting:
    """The setting of a phase: where the store is, who serves it, and what must hold when all are dead."""

    def __init__(self, name: str, roomy: bool, folder: Path) -> None:
        self.roomy, self.folder = roomy, folder
        self.helpers: list[Helper] = []
        self.locks: list[int] = []  # of the slabs
        self.kept = shared((KEYS + 1,), np.int64)  # by key: the server's life that stored it; last: the current life
        self.kept[-1] = 1
        room = ROOMY if roomy else TIGHT
        self.shm = f"shm:///soak-{uuid.uuid4().hex}?capacity={room}"
        self.own = f"{name}:"
        if name == "valkey":
            self.server = servers.valkey(folder)
            self.helpers = [Helper(lambda: self.server.process.pid, self._restart_valkey)]
            self.own = f"valkey://127.0.0.1:{self.server.port}?timeout={REMOTE_S:g}"
        else:
            file = f"file://{folder}/store?capacity={room}"
            self.own = {"shm": self.shm, "file": file, "tiered": f"tiered:{self.shm},{file}", "peer": self.shm}[name]
            open_store(self.own).close()
            places = [slab_directory(url)[1] for url in self.own.removeprefix("tiered:").split(",")]
            self.locks = [slab_files.lock_file(place / "lock") for place in places]
        self.urls = [self.own] * WORKERS
        if name == "peer":
            self.port = servers.free_port()
            self.helpers = [Helper(self._lend)]
            self.urls[1:] = [f"peer://127.0.0.1:{self.port}?timeout={REMOTE_S:g}"] * (WORKERS - 1)

    def _lend(self) -> int:
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                url = self.shm.partition("?")[0]
                cli.main(["serve", "--store", url, "--listen", f"127.0.0.1:{self.port}"])
            os._exit(1)
        return child

    def _restart_valkey(self, pid: int) -> None:
        self.server.process.wait()
        self.server.start()
        self.kept[-1] += 1  # it kept everything in memory

    def problems(self) -> tuple[int, list[str]]:
        """The number of lost records and a list of other problems, when all are dead."""
        with closing(open_store(self.own)) as store:
            lost = 0
            for i in np.flatnonzero(self.kept[:-1] == self.kept[-1]).tolist():
                buffer = np.zeros(size(i), np.uint8)
                lost += not (store.get_into([key(i)], [buffer])[0] and np.array_equal(buffer, PAYLOADS[i]))
            slabs = [
                s for s in (store.tiers if isinstance(store, TieredStore) else [store]) if isinstance(s, SlabStore)
            ]
            said = [f"{type(one).__name__}: {what}" for one in slabs if (what := room_lost(one))]
            if (corrupt := sum(value for name, value in store.stats().items() if name.endswith("corrupt"))) > 0:
                said.append(f"{corrupt} records did not have their payload")
        return lost, said

    def close(self) -> None:
        if self.own.startswith("valkey:"):
            self.server.stop()
        else:
            for url in self.own.removeprefix("tiered:").split(","):
                assert slab.remove(slab_directory(url)[1])


def room_lost(store: SlabStore) -> str:
    """Empties a slab that nobody else has open; returns what is wrong with it."""
    store._look_for_dead()
    if what := store._index.check(store._terms(1)):
        return what
    clock, later = slab.boot_clock, slab.boot_clock() + REST_S + 1
    slab.boot_clock = lambda: later  # slots reserved by dead processes are free by then
    try:
        store.put([key(KEYS)], [bytes(1)])
        store.put([key(KEYS + 1)], [bytes(1)])
        store.clear()
        stats = store.stats()
        left = {name: stats[name] for name in ("records", "used_bytes", "pending", "owners") if stats[name]}
        if stats["processes"] != 1:
            left["processes"] = stats["processes"]
        if stats["free_bytes"] != stats["capacity_bytes"]:
            left["lost_bytes"] = stats["capacity_bytes"] - stats["free_bytes"]
        return f"left: {left}" if left else store._index.check(store._terms(1))
    finally:
        slab.boot_clock = clock


class Phase:
    """A phase of some hundred signals."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.seats = [Seat() for _ in range(WORKERS)]
        self.done: Counter[str] = Counter()
        self.late_s = 0.0  # how late the system woke this process

    def start(self, seat: Seat) -> None:
        worker_seed, place = random.random(), self.seats.index(seat)
        seat.now[1] = seat.stopped_at = 0
        child = os.fork()
        if child == 0:
            try:
                random.seed(worker_seed)
                Worker(self.setting.urls[place], seat, self.setting.kept, self.setting.roomy).run()
            except BaseException as error:  # no worker may end by itself
                print(f"raised: {error!r}", file=sys.stderr, flush=True)
                seat.count("raised")
            finally:
                os._exit(1)
        seat.pid = child

    def run(self, kills: int, stops: int) -> None:
        for seat in self.seats:
            self.start(seat)
        left = ["kills"] * kills + ["stops"] * stops
        random.shuffle(left)
        due: list[tuple[float, Seat | Helper]] = []
        while left:
            self.rest(random.random() * SIGNAL_S)
            for one in [one for one in due if one[0] <= time.monotonic()]:
                due.remove(one)
                self.go_on(one[1])
            victims: list[Seat | Helper] = [*self.seats, *(self.setting.helpers if random.random() < 0.1 else [])]
            times_s = [0.02] * 300 + [0.3] * 60 + [1.5] * 10 + [7.0]
            what = left.pop()
            changing = self.stop_in_a_change() if random.random() < 0.3 else None
            if changing:
                victims, times_s = [changing], [0.02, 0.3, 1.5, 7.0]
                self.done["in a change"] += 1
            if what == "kills":
                victim = random.choice(victims)
                due = [one for one in due if one[1] is not victim]
                self.kill(victim)
            else:
                moving = [victim for victim in victims if not victim.stopped_at or victim is changing]
                if not moving:
                    left.insert(0, what)
                    continue
                victim = random.choice(moving)
                due.append((time.monotonic() + random.choice(times_s) * (0.5 + random.random()), victim))
                victim.stopped_at = time.monotonic_ns()
                os.kill(victim.pid, signal.SIGSTOP)
            self.done[what] += 1
        for _, victim in due:
            self.go_on(victim)
        self.rest(0.2)
        for seat in self.seats:
            self.end(seat)

    def stop_in_a_change(self) -> Seat | None:
        """Stops a worker while it changes an index, which chance would rarely do; None if it finds none."""
        until = time.monotonic() + AIM_S
        while self.setting.locks and time.monotonic() < until:
            seat = random.choice(self.seats)
            if seat.stopped_at:
                continue
            stopped_at = time.monotonic_ns()
            os.kill(seat.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, seat.pid, os.WSTOPPED | os.WNOWAIT)
            if any(slab_files._holder(lock, slab_files.WRITING) == seat.pid for lock in self.setting.locks):
                seat.stopped_at = stopped_at
                return seat
            seat.stopped_ns[0] += time.monotonic_ns() - stopped_at
            os.kill(seat.pid, signal.SIGCONT)
        return None

    def rest(self, for_s: float) -> None:
        begun = time.monotonic()
        time.sleep(for_s)
        self.late_s = max(self.late_s, time.monotonic() - begun - for_s)

    def go_on(self, victim: Seat | Helper) -> None:
        if victim.stopped_at:
            if isinstance(victim, Seat):
                victim.stopped_ns[0] += time.monotonic_ns() - victim.stopped_at
            victim.stopped_at = 0
            os.kill(victim.pid, signal.SIGCONT)

    def end(self, seat: Seat) -> None:
        if not seat.stopped_at:
            with suppress(OSError):
                seat.end(seat.pid)  # its unfinished wait counts
        os.kill(seat.pid, signal.SIGKILL)
        os.waitpid(seat.pid, 0)

    def kill(self, victim: Seat | Helper) -> None:
        if isinstance(victim, Seat):
            self.end(victim)
            self.start(victim)
            return
        victim.stopped_at = 0
        os.kill(victim.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(victim.pid, 0)
        victim.restart()

    def close(self) -> None:
        for helper in self.setting.helpers:
            os.kill(helper.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(helper.pid, 0)


def soak_store(name: str, kills: int, stops: int, say: Callable[[str], None]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    longest: dict[str, float] = {}
    said: list[str] = []
    phases = max(2, round((kills + stops) / PHASE))
    for i in range(phases):
        share = [number * (i + 1) // phases - number * i // phases for number in (kills, stops)]
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(name, i % 2 == 1, Path(folder))
            phase = Phase(setting)
            phase.run(*share)
            if name == "valkey":
                lost, problems = setting.problems()  # while its server lives
                phase.close()
            else:
                phase.close()
                lost, problems = setting.problems()
            setting.close()
        counts.update(phase.done)
        counts["lost"] += lost
        for seat in phase.seats:
            counts.update({counted: int(n) for counted, n in zip(COUNTS, seat.counts, strict=True)})
            for call, waited in zip(CALLS, seat.longest, strict=True):
                longest[call] = max(longest.get(call, 0.0), float(waited))
        longest["this process was late"] = max(longest.get("this process was late", 0.0), phase.late_s)
        said += problems
        say(f"{name}: phase {i + 1} of {phases}, {dict(counts)}, {problems or 'all is well'}")
    for call, budget in BUDGETS[name].items():
        if longest.get(call, 0.0) > budget + SLACK_S:
            said.append(f"{call} took {longest[call]:.2f} s, its budget is {budget} s")
    said += [f"{counts[bad]} {bad}" for bad in ("wrong", "lost", "raised") if counts[bad]]
    return {"store": name, **counts, "longest_s": {call: round(s, 3) for call, s in longest.items()}, "problems": said}


def simulate(schedules: int, seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Half of them with kills and stops, three tenths with power cuts too, two tenths with damage."""
    rows, csrc = [], REPO / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "slab_simulation"
        files = [REPO / "tests" / "slab" / "simulation.cpp", csrc / "slab_index.cpp"]
        must_run([CXX, "-std=c++17", "-O2", "-DLMC_SLAB_HOOK", f"-I{csrc}", *files, "-o", program])
        for mode, share in (("kills", 0.5), ("cuts", 0.3), ("damage", 0.2)):
            arguments = [program, mode, str(seed), str(round(schedules * share)), "300"]
            done = subprocess.run(arguments, check=False, capture_output=True, text=True)
            last = done.stdout.strip().rpartition("\n")[2]
            say(f"simulated, {mode}: {last}")
            rows.append({"simulated": mode, "said": last, "problems": [last] * (done.returncode != 0)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| store | kills | stops | hits | wrong | lost | longest get / put / delete, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [str(row.get(name, 0)) for name in ("kills", "stops", "hits", "wrong", "lost")]
        waits = " / ".join(f"{row['longest_s'].get(call, 0):.2f}" for call in ("get", "put", "delete"))
        lines.append(f"| {row['store']} | {' | '.join(counts)} | {waits} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", default=",".join(STORES))
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--stops", type=int, default=10_000)
    parser.add_argument("--schedules", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ["LMCACHE_MM_SECRET"] = "a secret of the crash test"
    os.environ.pop("LMCACHE_MM_SECRET_FILE", None)
    breaker.PAUSE_S = PAUSE_S
    logging.getLogger("lmcache_mm").setLevel(logging.ERROR)  # servers are down on purpose
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)

    simulated = simulate(arguments.schedules, arguments.seed, say) if arguments.schedules else []
    if arguments.json:
        arguments.json.parent.mkdir(exist_ok=True)
    names = arguments.stores.split(",")
    if "valkey" in names:
        import_module("lmcache_mm.stores.remote.valkey")  # once, not in each worker
    rows = []
    for i, name in enumerate(names):
        share = [n * (i + 1) // len(names) - n * i // len(names) for n in (arguments.kills, arguments.stops)]
        rows.append(soak_store(name, *share, say))
        if arguments.json:
            report = {"seed": arguments.seed, "simulated": simulated, "stores": rows}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    problems = [problem for row in (*simulated, *rows) for problem in row["problems"]]
    print("\n".join(problems) or "nothing wrong, nothing lost, nothing over its budget")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
