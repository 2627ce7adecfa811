"""The operations by themselves, on NumPy arrays and, on a machine with a GPU, on CuPy arrays."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

import lmcache_mm as lmc


def main() -> None:
    token_ids: Any = np.array([1] * 20 + [99] * 300 + [5] * 30)
    items = [lmc.Item("hash of the picture", offset=20, length=300)]
    root = lmc.Namespace(model="my-model").root(salt="tenant-7")
    overwritten = lmc.ops.apply_mm_hashes_to_token_ids(token_ids.copy(), ["hash of the picture"], [(20, 300)])
    keys = lmc.ops.prefix_keys(token_ids, items, root, [256, 320, 350])
    print(f"{len(set(np.asarray(overwritten)[20:320].tolist()))} different ids for 300 placeholders")
    print(f"keys of the first 256, 320 and 350 tokens begin with {[bytes(key[:2]).hex() for key in keys.numpy()]}")
    if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
        import cupy  # noqa: PLC0415

        assert torch.equal(lmc.ops.prefix_keys(cupy.asarray(token_ids), items, root, [256, 320, 350]).cpu(), keys)
        print("the GPU makes the same keys")


if __name__ == "__main__":
    main()
