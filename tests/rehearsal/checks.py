"""What torch on the emulated device has in common with torch on CUDA; run by tests/test_rehearsal.py."""

from __future__ import annotations

import importlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import torch_device
from lmcache_mm import _C, ops
from lmcache_mm.encoder_cache import read
from lmcache_mm.layout import KVLayout, as_tensor

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_late_as_is_legal():
    torch_device.seed(0)


def test_tensors_say_that_they_are_on_cuda_and_the_host_cannot_have_them():
    x = torch.arange(6, device="cuda").view(2, 3)
    assert x.device == CUDA
    assert x.is_cuda
    assert x.t()[1:].device == CUDA
    assert (x.t() * 2)[1:].cpu().tolist() == [[2, 8], [4, 10]]
    with pytest.raises(TypeError, match=r"cpu\(\)"):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="same device"):
        torch.add(x, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(2, 3)])
    assert (x + torch.tensor(1)).sum().item() == 21  # as torch allows
    assert x[torch.tensor([1])].device == CUDA
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.synchronize("cuda:1")


def test_views_share_memory_and_results_do_not():
    x = torch.zeros(4, 4, device=CUDA)
    x[1:3, ::2] = 5
    x.view(-1)[0] += 1
    assert x.sum().item() == 21
    y = x + 0
    y.fill_(9)
    assert x.sum().item() == 21
    out = torch.empty(0, device=CUDA)
    assert torch.add(x, x, out=out) is out
    assert out.shape == (4, 4)
    assert out.sum().item() == 42
    whole = torch.empty(0, dtype=torch.uint8, device=CUDA).set_(x[1:].untyped_storage())
    assert whole.shape == (64,)
    assert whole.data_ptr() == x.data_ptr()


def test_arrays_of_others_are_shared():
    class Array:
        __cuda_array_interface__ = (kept := torch.arange(3, device=CUDA)).__cuda_array_interface__

    shared = as_tensor("array", Array())
    assert (shared.device, shared.data_ptr()) == (CUDA, Array.kept.data_ptr())
    assert torch.from_dlpack(Array.kept).data_ptr() == Array.kept.data_ptr()


def test_pinned_memory_is_known_and_nothing_else():
    assert torch.ones(3, pin_memory=True).is_pinned()
    pinned = torch.arange(5000).pin_memory()
    assert pinned[100:].is_pinned()
    assert not torch.ones(3).is_pinned()
    registered = np.ones(4096, np.uint8)
    _C.cuda_register_host(0, registered.ctypes.data, registered.nbytes, 4096)
    assert torch.from_numpy(registered).is_pinned()
    _C.cuda_unregister_host(0, registered.ctypes.data, registered.nbytes, 4096)


def test_what_a_stream_was_given_waits_until_somebody_does():
    """Including a copy from pinned memory, which is read when the copy runs."""
    stream = torch.cuda.Stream()
    pinned, there = torch.ones(4, pin_memory=True), torch.zeros(4, device=CUDA)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        there.copy_(pinned, non_blocking=True)
        done = stream.record_event()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not done.query()
    pinned.fill_(2)
    done.synchronize()
    assert done.query()
    assert there.tolist() == [2, 2, 2, 2]


def test_threads_have_current_streams_of_their_own():
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        thread = threading.Thread(target=lambda: found.append(torch.cuda.current_stream().cuda_stream))
        thread.start()
        thread.join()
    assert found == [0]


def test_events_measure_in_the_order_of_the_stream():
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    with pytest.raises(ValueError, match="recorded"):
        begin.elapsed_time(end)
    end.record()
    end.synchronize()
    assert 0 <= begin.elapsed_time(end) < 10_000


def test_memory_is_overwritten_once_the_streams_that_it_is_known_to_are_done():
    """This exposes callers that do not tell torch that another stream uses it."""
    kv = torch.ones(4, 4, 16, dtype=torch.uint8, device=CUDA)
    layout = KVLayout.from_tensors([kv], page_tokens=4, page_dim=0, token_dim=1)
    for told in (False, True):
        stream, other = torch.cuda.Stream(), torch.ones(64, dtype=torch.uint8, device=CUDA)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            ops.scatter_pages(layout, [0], other)
        if told:
            other.record_stream(stream)
        del other  # known to the default stream only
        torch.cuda.default_stream().synchronize()
        stream.synchronize()
        assert (kv[0] == (1 if told else 0xDB)).all()


def test_a_graph_runs_what_was_captured_as_often_as_it_is_replayed():
    """With torch's operators and ours."""
    x, y = torch.ones(4, 4, device=CUDA), torch.zeros(4, 4, device=CUDA)
    kv = torch.arange(256, dtype=torch.uint8, device=CUDA).view(4, 4, 16)
    layout = KVLayout.from_tensors([kv], page_tokens=4, page_dim=0, token_dim=1)
    payload, graph = torch.zeros(64, dtype=torch.uint8, device=CUDA), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y.copy_((x @ x + 1).t())
        x += 1
        ops.gather_pages(layout, [2], payload)
        with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            x.cpu()
    assert (x == 1).all()  # nothing ran yet
    for value in (5, 9):
        x.fill_(value)
        kv.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert (y == 4 * value**2 + 1).all()
        assert (x == value + 1).all()
        assert (payload == value).all()


def test_the_encoders_worker_copies_on_the_stream_of_the_forward_pass():
    pytest.importorskip("vllm")
    worker_of = importlib.import_module("lmcache_mm.vllm.encoder.worker").EncoderWorker
    messages = importlib.import_module("lmcache_mm.vllm.encoder.messages")
    parallel = SimpleNamespace(rank=0, tensor_parallel_size=1, pipeline_parallel_size=1)
    config = SimpleNamespace(parallel_config=parallel, ec_transfer_config=SimpleNamespace(is_ec_producer=True))
    worker = worker_of(config, SimpleNamespace(store="mem://?capacity=1MiB", timeout_s=5.0, codec=None))
    key = messages.OutputKey(b"k" * 32, b"")
    with torch.cuda.stream(torch.cuda.Stream()):
        output = torch.empty(6, 8, device=CUDA)
        output.copy_(torch.ones(6, 8, pin_memory=True), non_blocking=True)
        worker.save({"item": output}, "item", messages.EncoderMetadata(saves={"item": key}))
        output.zero_()
        while not (news := worker.take_news()):
            time.sleep(0.001)
        assert (news.counts["encoder_stored_items"], news.counts.get("encoder_failed_stores")) == (1, None)
        cache: dict[str, torch.Tensor] = {}
        stored = read(worker._store, *key)
        worker.load(cache, messages.EncoderMetadata(loads={"again": stored}), CUDA)
        assert cache["again"].device == CUDA
        assert (cache["again"] == 1).all()
    worker.close()


def test_what_is_not_there_says_so():
    with pytest.raises(NotImplementedError, match=r"torch\.cuda\.memory_stats"):
        torch.cuda.memory_stats()
    with pytest.raises(NotImplementedError, match=r"torch\.cuda\.CUDAGraph\.pool"):
        torch.cuda.CUDAGraph().pool()
    with pytest.raises(NotImplementedError, match="uuid"):
        torch.cuda.get_device_properties(0).uuid  # noqa: B018
