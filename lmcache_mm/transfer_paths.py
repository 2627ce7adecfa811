"""The choice of paths between a GPU's pages and the host, as measured on the device by `lmcache-mm calibrate`.

There are three paths, and all give the same result: through a ring of buffers in device memory; in one batch of copies
directly from or to pages, which needs neither ring nor kernels and is faster for long fragments; and, layer by layer,
by a few blocks of a kernel. See docs/design.md, Transfers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

FORMAT = 3

logger = logging.getLogger("lmcache_mm")


@dataclass(frozen=True)
class Paths:
    """A device's choices.

    store, load: pairs (count, bytes): a batch of at least `count` fragments is faster if they are at least `bytes` long
    on average. Default without a measurement: 256 KiB. A fragment has a fixed cost, which long fragments spread over
    more bytes. The length that suffices has not been measured.
    store_layer_blocks, load_layer_blocks: how many blocks of a kernel run a transfer by layers; 0: the ring runs it.
    ring_blocks: the most blocks of the ring's kernels; 0: as many as should keep up with the device's bus. Kernels with
    the codec have up to three times as many.
    """

    store: tuple[tuple[int, int], ...] = ((1, 256 << 10),)
    load: tuple[tuple[int, int], ...] = ((1, 256 << 10),)
    store_layer_blocks: int = 0
    load_layer_blocks: int = 0
    ring_blocks: int = 0

    def store_fragment_bytes(self, total_bytes: int) -> int:
        """The least average fragment length at which a batch of `total_bytes` is faster; 0: never."""
        return _least(self.store, total_bytes)

    def load_fragment_bytes(self, total_bytes: int) -> int:
        return _least(self.load, total_bytes)


def _least(rows: tuple[tuple[int, int], ...], total_bytes: int) -> int:
    return min((size for count, size in rows if count * size <= total_bytes), default=0)


def file_of(device_name: str) -> Path:
    """The file with the choices for devices of this name: in $XDG_CACHE_HOME/lmcache_mm, by default ~/.cache/…"""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "lmcache_mm" / f"paths-{re.sub('[^a-z0-9]+', '-', device_name.lower())}.json"


def save(paths: Paths, device_name: str) -> Path:
    """Saves a measurement for processes that start from now on. Replaces an earlier one."""
    file = file_of(device_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "device": device_name, **asdict(paths)}
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(file)
    return file


def load(file: Path) -> Paths | None:
    """The saved measurement; None if there is none or, with a warning, if it is invalid or of another version."""
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        rows = {name: tuple((int(count), int(size)) for count, size in content[name]) for name in ("store", "load")}
        blocks = {name: int(content[name]) for name in ("store_layer_blocks", "load_layer_blocks", "ring_blocks")}
        if any(count < 1 or size < 1 for row in rows.values() for count, size in row) or min(blocks.values()) < 0:
            raise ValueError("expected positive counts and sizes")
        return Paths(rows["store"], rows["load"], *blocks.values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is left aside: %s; lmcache-mm calibrate makes a new one", file, error)
        return None


@cache
def of_device(device: torch.device) -> Paths:
    """The choices for a CUDA device: as measured on a device of the same name, else the defaults."""
    return load(file_of(torch.cuda.get_device_name(device))) or Paths()
