import ctypes

import torch

from lmcache.lmcache_native import EngineKVFormat, TransferDirection


def multi_layer_kv_transfer(
    payload: torch.Tensor,
    pointers: torch.Tensor,
    slots: torch.Tensor,
    device: torch.device,
    slots_of_all: int,
    direction: TransferDirection,
    layout: EngineKVFormat,
    page_tokens: int,
) -> None:
    """payload: [2, layers, tokens, hidden] in pinned or device memory; pointers: to each layer's [2, slots_of_all,
    hidden]. Copies at once, after waiting for the current stream."""
    torch.cuda.current_stream(device).synchronize()
    row = payload.shape[3] * payload.itemsize
    assert slots_of_all % page_tokens == 0
    for k in range(2):
        for i, layer in enumerate(pointers.tolist()):
            for j, slot in enumerate(slots.tolist()):
                pair = (layer + (k * slots_of_all + slot) * row, payload[k, i, j].data_ptr())
                ctypes.memmove(*(pair if direction == TransferDirection.H2D else pair[::-1]), row)
