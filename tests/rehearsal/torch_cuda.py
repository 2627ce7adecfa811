"""torch.cuda over the emulated CUDA (tests/host_cuda), for a machine without a GPU.

Streams and events are those of the emulation; torch's own work waits for its stream and then runs at once. Anything not
implemented here raises NotImplementedError with its name.
"""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any, ClassVar

import torch

import torch_device

POOL = 32  # streams per priority, as many as torch has; then the first one is used again
LEAST_PRIORITY, GREATEST_PRIORITY = 0, -5


def device_index(device: Any = None) -> int:
    if device is None:
        return 0
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
    return 0


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        if interprocess:
            raise NotImplementedError("torch.cuda.Event(interprocess=True)")
        self._event = torch_device.Event(enable_timing)
        self.device = torch.device("cuda", 0)

    def record(self, stream: Stream | None = None) -> None:
        self._event.record((stream or current_stream()).cuda_stream)

    def wait(self, stream: Stream | None = None) -> None:
        self._event.wait((stream or current_stream()).cuda_stream)

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        return self._event.elapsed_time(end_event._event)


class Stream:
    """A stream of the pool, or one given by a handle."""

    _pools: ClassVar[dict[int, Any]] = {}
    _lock = threading.Lock()

    def __init__(self, device: Any = None, priority: int = 0, *, _handle: int | None = None) -> None:
        device_index(device)
        self.device, self.device_index = torch.device("cuda", 0), 0
        self.priority = max(GREATEST_PRIORITY, min(priority, LEAST_PRIORITY))
        self.cuda_stream = self._next(self.priority) if _handle is None else _handle
        self.stream_id = self.cuda_stream
        self.device_type = int(torch._C._autograd.DeviceType.CUDA)

    @classmethod
    def _next(cls, priority: int) -> int:
        with cls._lock:
            if priority not in cls._pools:
                made = [torch_device.new_stream(priority) for _ in range(POOL)]
                cls._pools[priority] = itertools.cycle(made)
            return next(cls._pools[priority])

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return torch_device.query_stream(self.cuda_stream)

    def synchronize(self) -> None:
        torch_device.synchronize_stream(self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def __enter__(self) -> Stream:
        self._before = StreamContext(self)
        self._before.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._before.__exit__(*error)


class ExternalStream(Stream):
    def __init__(self, stream_ptr: int, device: Any = None) -> None:
        super().__init__(device, _handle=stream_ptr)


class StreamContext:
    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._before = torch_device.current_stream()
            torch_device.set_current_stream(self.stream.cuda_stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            torch_device.set_current_stream(self._before)


class CUDAGraph:
    def __init__(self) -> None:
        self._graph = torch_device.Graph()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if pool is not None or capture_error_mode != "global":
            raise NotImplementedError("torch.cuda.CUDAGraph.capture_begin(pool, capture_error_mode)")
        self._graph.begin()

    def capture_end(self) -> None:
        self._graph.end()

    def replay(self) -> None:
        self._graph.replay()

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"torch.cuda.CUDAGraph.{name}")


class Capture:
    """torch.cuda.graph"""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph, self._arguments = cuda_graph, (pool, capture_error_mode)
        self._context = StreamContext(stream or Stream())

    def __enter__(self) -> None:
        synchronize()
        self._context.__enter__()
        self._graph.capture_begin(*self._arguments)

    def __exit__(self, *error: object) -> None:
        self._graph.capture_end()
        self._context.__exit__(*error)


class Device:
    """torch.cuda.device"""

    def __init__(self, device: Any) -> None:
        self.idx = device_index(device)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Properties:
    def __init__(self) -> None:
        self.__dict__.update(torch_device.properties())

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"torch.cuda.get_device_properties().{name}")


def current_stream(device: Any = None) -> Stream:
    device_index(device)
    return Stream(_handle=torch_device.current_stream())


def default_stream(device: Any = None) -> Stream:
    device_index(device)
    return Stream(_handle=0)


def get_device_properties(device: Any = None) -> Properties:
    device_index(device)
    return Properties()


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return get_device_properties(device).major, get_device_properties(device).minor


def synchronize(device: Any = None) -> None:
    device_index(device)
    torch_device.synchronize()


KNOWN: dict[str, Any] = {
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "ExternalStream": ExternalStream,
    "Stream": Stream,
    "StreamContext": StreamContext,
    "current_device": lambda: 0,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "device": Device,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,  # freed memory is kept only while streams need it
    "get_device_capability": get_device_capability,
    "get_device_name": lambda device=None: get_device_properties(device).name,
    "get_device_properties": get_device_properties,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "graph": Capture,
    "init": lambda: None,
    "is_available": lambda: True,
    "is_current_stream_capturing": torch_device.capturing,
    "is_initialized": lambda: True,
    "manual_seed": lambda seed: None,  # random numbers come from the CPU's generator
    "manual_seed_all": lambda seed: None,
    "set_device": device_index,
    "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
    "set_stream": lambda stream: torch_device.set_current_stream(stream.cuda_stream),
    "stream": StreamContext,
    "synchronize": synchronize,
}
MODULES = ("amp", "graphs", "jiterator", "memory", "nccl", "nvtx", "profiler", "random", "sparse", "streams", "tunable")


def install() -> None:
    """Gives this process a GPU. Call it before anything asks torch whether there is one."""
    torch_device.install()
    for name in torch.cuda.__all__:
        real = getattr(torch.cuda, name)
        if name in KNOWN:
            setattr(torch.cuda, name, KNOWN[name])
        elif name not in MODULES and callable(real):
            unknown = functools.wraps(real)(_unknown(name))  # torch's compiler inspects what is wrapped
            setattr(torch.cuda, name, type(name, (), {"__init__": unknown}) if isinstance(real, type) else unknown)
    torch.cuda.streams.Stream, torch.cuda.streams.Event = Stream, Event
    torch.cuda._lazy_init = lambda: None
    torch.cuda._sleep = lambda cycles: Event(enable_timing=True).record()  # enqueues something without duration
    torch.Tensor.record_stream = lambda tensor, stream: torch_device.record_stream(
        tensor.data_ptr(), stream.cuda_stream
    )


def _unknown(name: str) -> Any:
    def raise_not_implemented(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"torch.cuda.{name}")

    return raise_not_implemented
