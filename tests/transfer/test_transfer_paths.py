"""The ways of transfers: how they follow from measurements, and how they are saved."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_mm import transfer_paths
from lmcache_mm.commands.calibrate import LayerTimes, Times, layer_blocks_of, ring_blocks_of, rows_of
from lmcache_mm.transfer_paths import Paths

NAME = "NVIDIA H100 80GB HBM3"
KIB = 1 << 10


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_batch_is_for_long_fragments_and_for_as_many_as_pay():
    paths = Paths(store=((16, 512 * KIB), (128, 64 * KIB)), load=())
    assert paths.store_fragment_bytes(1 << 30) == 64 * KIB
    assert paths.store_fragment_bytes(128 * 64 * KIB) == 64 * KIB
    assert paths.store_fragment_bytes(128 * 64 * KIB - 1) == 0
    assert paths.store_fragment_bytes(16 * 512 * KIB) == 64 * KIB
    assert paths.load_fragment_bytes(1 << 30) == 0


def test_a_measurement_is_kept_and_found_by_the_devices_name(cache_home):
    paths = Paths(((16, 4096),), ((1, 8192), (128, 512)), 2, 4, 12)
    file = transfer_paths.save(paths, NAME)
    assert file == cache_home / "lmcache_mm" / "paths-nvidia-h100-80gb-hbm3.json"
    assert transfer_paths.load(transfer_paths.file_of(NAME)) == paths
    assert transfer_paths.load(transfer_paths.file_of("another")) is None
    transfer_paths.save(Paths(), NAME)
    assert transfer_paths.load(file) == Paths()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"store": 7},
        {"load": [[0, 5]]},
        {"load_layer_blocks": -1},
        {"ring_blocks": "x"},
        {"store": [["a", 1]]},
    ],
)
def test_a_file_that_is_none_is_left_aside_and_said_so(change, caplog):
    file = transfer_paths.save(Paths(), NAME)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with caplog.at_level(logging.WARNING):
        assert transfer_paths.load(file) is None
    assert "is left aside" in caplog.text
    file.write_text("{")
    assert transfer_paths.load(file) is None


def test_rows_say_from_which_length_on_a_batch_gains():
    times = {
        (16, 1024): Times(1.0, 3.0),
        (16, 2048): Times(1.0, 0.9),
        (16, 4096): Times(1.0, 0.9),
        (128, 1024): Times(1.0, 0.99),  # within the noise
        (128, 2048): Times(1.0, 0.9),
        (1024, 1024): Times(1.0, 0.9),
        (1024, 2048): Times(1.0, 0.9),
    }
    assert rows_of(times) == ((16, 2048), (1024, 1024))
    times[16, 4096] = Times(1.0, 1.1)  # longer fragments do not gain, so gains of shorter ones do not count
    assert rows_of(times) == ((128, 2048), (1024, 1024))
    assert rows_of({}) == ()


@given(st.dictionaries(st.tuples(st.sampled_from([16, 128]), st.sampled_from([1, 2, 4, 8])), st.booleans()))
def test_a_measured_case_goes_by_batch_only_if_it_gained_by_it(gains):
    rows = rows_of({case: Times(1.0, 0.5 if gain else 1.5) for case, gain in gains.items()})
    for (count, size), gain in gains.items():
        if any(least_count == count and least <= size for least_count, least in rows):
            assert gain


def test_the_ring_has_the_fewest_blocks_that_are_as_fast_as_any():
    assert ring_blocks_of({4: 1.3, 8: 1.01, 16: 1.0, 32: 1.0}) == 8
    assert ring_blocks_of({4: 0.99, 8: 1.0}) == 4


def test_kernels_move_layers_where_they_gain_and_cost_compute_no_more():
    ring = LayerTimes(1.0, 1.0)
    assert layer_blocks_of(ring, {2: LayerTimes(0.99, 1.0), 4: LayerTimes(1.2, 1.0)}) == 0
    assert layer_blocks_of(ring, {2: LayerTimes(0.9, 1.0), 4: LayerTimes(0.8, 1.01), 8: LayerTimes(0.7, 1.5)}) == 4
    assert layer_blocks_of(ring, {}) == 0
