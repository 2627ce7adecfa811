"""The checks that the benchmarks of a device make before they time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_gpu_transfers
import device
import rivals
from bench_gpu_transfers import Pages, one_copy, transfers
from rivals import Rivals, byte_codecs


@pytest.fixture(params=["Qwen2-VL-2B", "Qwen2-VL-2B joined", "DeepSeek-V3 MLA"])
def pages(request) -> Pages:
    return Pages(request.param, 272)


def flip(memory: torch.Tensor, at: int) -> None:
    memory.view(-1).view(torch.uint8)[at] ^= 1


@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_rival_that_copies_something_else_is_left_out_and_named(pages, direction):
    rivals = Rivals()
    ours = transfers(pages, direction)["ours"]
    memory = pages.host if direction == "store" else pages.kv
    in_other_page = int(pages._others[0]) * pages.layout.page_stride

    def wrong(at: int) -> None:
        ours()
        flip(memory, at)

    def check(work) -> None:
        pages.check(direction, work)

    rivals.add("right", lambda: ours, check)
    rivals.add("nothing", lambda: lambda: None, check)
    for at in (0, memory.nbytes - 1):
        rivals.add(f"wrong at {at}", lambda at=at: lambda: wrong(at), check)
    rivals.add("one copy", lambda: next(iter(one_copy(pages, direction).values())), check)
    if direction == "load":
        rivals.add("another page", lambda: lambda: wrong(in_other_page), check)
    rivals.add("right again", lambda: ours, check)
    # A store by one copy starts from finished payloads.
    assert list(rivals.works) == ["right", *(["one copy"] if direction == "store" else []), "right again"]
    assert all("wrong bytes" in why or "other pages" in why for why in rivals.missing.values())


def test_one_of_our_ways_that_fails_costs_no_other_and_the_case_fails(monkeypatch):
    def ways(pages: Pages, *_: object) -> dict:
        def wrong():
            flip(pages.host, 0)

        return {"wrong": wrong, **transfers(pages, "store"), "failing": lambda: 1 // 0}

    monkeypatch.setattr(bench_gpu_transfers, "transfers", ways)
    monkeypatch.setattr(device, "SIZES", device.TINY)
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda *_, **__: None)
    with pytest.raises(AssertionError, match="wrong bytes"):
        bench_gpu_transfers.measure(benchmark, "store", "Qwen2-VL-2B", 272)
    found = benchmark.extra_info
    assert found["device_s"] > 0
    assert found["others_s"] == {}
    assert list(found["failed"]) == ["wrong", "failing"]
    assert "ZeroDivisionError" in found["failed"]["failing"]


def test_a_rival_that_cannot_be_made_is_named_with_the_reason():
    rivals = Rivals()
    rivals.add("it", lambda: 1 // 0, lambda work: work())
    assert rivals.works == {}
    assert rivals.missing == {"it": "ZeroDivisionError: integer division or modulo by zero"}


def test_a_codec_that_returns_other_bytes_or_is_not_there_is_no_rival(monkeypatch):
    raw = np.arange(200_000, dtype=np.uint32).view(np.uint8)
    monkeypatch.setattr(rivals, "_zstd", lambda raw: (raw.tobytes, lambda coded: coded[:-1] + b"x"))
    monkeypatch.setattr(rivals, "_lz4", lambda raw: (raw[::2].tobytes, lambda coded: raw))
    monkeypatch.setattr(rivals, "_nvcomp", lambda raw: 1 // 0)
    there, missing = byte_codecs(raw)
    assert {name: codec.coded_bytes for name, codec in there.items()} == {"LZ4": raw.nbytes // 2}
    assert np.array_equal(there["LZ4"].decode(), raw)
    assert missing == {
        "zstd -1": "RuntimeError: it returns wrong bytes",
        "nvCOMP's GDeflate on the CPU": "ZeroDivisionError: integer division or modulo by zero",
    }
