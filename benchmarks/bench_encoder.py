"""EncoderCache over stores of this host: loading a vision encoder's output, against encoding the image again."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import lmcache_mm as lmc
from lmcache_mm.commands import cli

pytest.importorskip("transformers", reason="the model needs transformers: pip install '.[demo]'")

import PIL.Image

import tiny_qwen2_vl
from paged_qwen2_vl import PagedQwen2VL, Request

SIDE = 896  # pixels, 1,024 embeddings


class Tower:
    """The demo's vision encoder (tiny, float32), or one whose outputs are as wide as Qwen2-VL-2B's, in bfloat16."""

    def __init__(self, wide: bool) -> None:
        config = tiny_qwen2_vl.shape("tiny")
        self.name = "the demo's tower"
        if wide:
            config.text_config.hidden_size = config.vision_config.hidden_size = 1536
            self.name += ", outputs as wide as Qwen2-VL-2B's"
        processor = tiny_qwen2_vl.build_processor(config)
        model = tiny_qwen2_vl.build_model(config, torch.device("cpu"), torch.bfloat16 if wide else torch.float32)
        self._loop = PagedQwen2VL(model, num_pages=1)
        pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        content = [{"role": "user", "content": [{"type": "image"}]}]
        inputs = processor(
            text=[processor.apply_chat_template(content)], images=[PIL.Image.fromarray(pixels)], return_tensors="pt"
        )
        (self._image,) = Request(dict(inputs), config.image_token_id, config.vision_config.spatial_merge_size).images

    def encode(self) -> torch.Tensor:
        return self._loop.encode(self._image)


@pytest.fixture(scope="module", params=[False, True], ids=["demo", "wide"])
def tower(request):
    return Tower(request.param)


@pytest.mark.parametrize("store", ["mem", "shm"])
def test_load_encoder_output(against, tower, store):
    output = tower.encode()
    url = {"mem": "mem://", "shm": f"shm:///bench-{os.getpid()}"}[store]
    namespace = lmc.Namespace(model="m", dtype=output.dtype)
    with lmc.EncoderCache(f"{url}?capacity=64MiB", namespace) as cache:
        cache.save("a", output)
        assert torch.equal(cache.load("a"), output)
        against(
            lambda: cache.load("a"),
            {"encoder": tower.encode},
            rounds=20,
            bytes=output.nbytes,
            encoder_store=store,
            tower=f"{tower.name}, {output.shape[0]:,} × {output.shape[1]:,} {str(output.dtype).removeprefix('torch.')}",
        )
    if store == "shm":
        assert cli.main(["clear", url]) == 0
