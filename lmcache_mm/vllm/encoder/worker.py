"""The encoder connector's side in a worker: loads outputs that came with the step, and saves computed outputs."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from lmcache_mm import _C
from lmcache_mm.copies import current_event
from lmcache_mm.encoder_cache import Packed, pack, write
from lmcache_mm.lane import Lane
from lmcache_mm.stores import kind_of, open_store
from lmcache_mm.stores.store import Store
from lmcache_mm.vllm.api import VllmConfig
from lmcache_mm.vllm.encoder.messages import EncoderMetadata, EncoderWorkerMetadata, OutputKey
from lmcache_mm.vllm.metrics import EncoderStats
from lmcache_mm.vllm.options import ENCODER_NAME, EncoderOptions

MOST_WAITING_BYTES = 256 << 20  # memory for outputs that wait to be stored; outputs beyond it are not stored

logger = logging.getLogger("vllm.lmcache_mm")


class EncoderWorker:
    """See the module. All workers of an engine compute the same outputs; the first worker stores them."""

    def __init__(self, config: VllmConfig, options: EncoderOptions) -> None:
        self._timeout_s, self._codec = options.timeout_s, options.codec
        parallel = config.parallel_config
        first = parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size) == 0
        saves = first and config.ec_transfer_config.is_ec_producer
        self._stats, self._kind = EncoderStats(), kind_of(options.store)
        self._store: Store | None = open_store(options.store, self._stats.observe) if saves else None
        self._puts = Lane("lmcache_mm encoder store")
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def close(self) -> None:
        if self._puts.close(self._timeout_s) and self._store is not None:
            self._store.close()

    def load(self, encoder_cache: dict[str, torch.Tensor], step: EncoderMetadata, device: torch.device) -> None:
        """Puts the step's outputs into vLLM's cache. The step carries all of them: no store is read. On CUDA: as in
        `EncoderCache.load`, on the stream of the forward pass."""
        for identifier, output in step.loads.items():
            # Copy it: other requests may load the same output, and vLLM may change what is in its cache.
            own = output if device.type == "cuda" else Packed(output.description, output.payload.clone())
            loaded = own.unpack(device)
            assert isinstance(loaded, torch.Tensor)
            encoder_cache[identifier] = loaded

    def save(self, encoder_cache: dict[str, torch.Tensor], identifier: str, step: EncoderMetadata) -> None:
        """Copies an output that this step computed; a lane writes the copy to the store in the background."""
        key, store = step.saves.get(identifier), self._store
        if key is None or store is None:
            return
        output = encoder_cache[identifier]
        with self._lock:
            fits = self._waiting_bytes + output.nbytes <= MOST_WAITING_BYTES
        if not fits or self._puts.stalled_s() >= self._timeout_s:
            self._stats.add(encoder_failed_stores=1)
            return
        try:
            as_of = store.moment()
            packed = pack(output)
            copied = current_event(output.device) if _C.cuda_version else None
            if output.is_cuda and copied is None:  # a build with CPU operations only
                torch.cuda.current_stream(output.device).synchronize()
        except Exception:  # out of memory, or not a tensor
            logger.exception("%s: an encoder output could not be copied, and is not stored", ENCODER_NAME)
            self._stats.add(encoder_failed_stores=1)
            return
        with self._lock:
            self._waiting_bytes += packed.payload.nbytes
        self._puts.submit(lambda _: self._put(store, key, packed, as_of, copied))

    def _put(self, store: Store, key: OutputKey, packed: Packed, as_of: int, copied: Any) -> None:
        try:
            if copied is not None:
                copied.wait()
            begun = time.perf_counter()
            write(store, key.key, packed, key.owner, as_of, self._codec)
            seconds = time.perf_counter() - begun
            self._stats.add(encoder_stored_items=1)
            self._stats.observe(self._kind, "store", seconds, packed.payload.nbytes)
        except Exception:
            logger.exception("%s: an encoder output could not be stored", ENCODER_NAME)
            self._stats.add(encoder_failed_stores=1)
        finally:
            with self._lock:
                self._waiting_bytes -= packed.payload.nbytes

    def take_news(self) -> EncoderWorkerMetadata | None:
        taken = self._stats.take()
        return EncoderWorkerMetadata(taken.data) if taken else None
