"""Writes tests/vectors.json from reference.py: python tests/write_vectors.py

Run this again only for a new version of the identity or payload format. The section "blake3" stays unchanged: those are
vectors that BLAKE3's authors publish (test_vectors.json of the BLAKE3 repository, first 32 bytes).
"""

import json
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from lmcache_mm import Item, KVLayout, Namespace, reference
from lmcache_mm.prompt import NAMESPACE_CONTEXT, encode_fields

PATH = Path(__file__).with_name("vectors.json")
ROOT = bytes(range(32))


def as_fields(items):
    return [[i.identifier, i.offset, i.length, i.modality] for i in items]


def root_of(fields, request):
    """Of requests that `Namespace.root` refuses too."""
    every = {**Namespace(**fields)._fields, **{name: value.encode() for name, value in request.items()}}
    return blake3(encode_fields(every), derive_key_context=NAMESPACE_CONTEXT).digest()


def as_encoder_vector(item, output):
    """The vector for an output; its description without the zeros at its end."""
    key = reference.encoder_key(ROOT, item)
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in output]
    description = reference.encoder_description(tensors, is_list=True)
    return {
        "root": ROOT.hex(),
        "item": as_fields([item])[0],
        "tensors": output,
        "key": key.hex(),
        "description": description.rstrip(b"\0").hex(),
        "payload_key": reference.encoder_payload_key(key, description).hex(),
    }


def main():
    items = [
        Item("", 0, 1),
        Item("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", 5, 300),
        Item("катя.png", 290, 40, "video"),
        Item("x" * 3000, 310, 100, "audio"),
    ]
    ids = [(7919 * p) % 151936 for p in range(700)]
    cuts = [0, 1, 7, 8, 127, 128, 129, 256, 305, 330, 384, 410, 512, 640, 700]
    namespaces = [
        ({}, {}),
        ({"model": "Qwen/Qwen2-VL-2B-Instruct", "dtype": "bfloat16", "tp": 2}, {}),
        ({"secret": "0123456789abcdef", "model": "m", "kv_dtype": "float8_e4m3fn"}, {"salt": "tenant-7", "lora": "é"}),
        ({"model": "m"}, {"salt": "", "prompt_embeds": "00"}),
    ]
    layouts = [
        dict(
            planes=[0, 4096],
            num_pages=4,
            page_stride=512,
            page_tokens=4,
            runs=1,
            run_stride=0,
            run_bytes=512,
            token_bytes=128,
            spec="float16; planes 0:2; page 2:4 3:2 4:32; slots 2",
            layers=["model.layers.0"],
        ),
        dict(
            planes=[0, 8192, 16384],
            num_pages=9,
            page_stride=900,
            page_tokens=2,
            runs=4,
            run_stride=200,
            run_bytes=96,
            token_bytes=48,
            spec="uint8",
            layers=["a", "b", "c"],
        ),
    ]
    outputs = [
        [("bfloat16", (256, 1536))],
        [("float32", ()), ("bool", (0, 3)), ("float8_e4m3fn", (7, 1, 2))],
        [],
        [("int64", (1,))],
    ]
    payloads = [0, 1, 15, 16, 17, 100]
    some = np.arange(70, dtype=np.uint16)
    numbers = {
        "one": np.array([0xBF80], np.uint16),
        "every kind": np.array([0, 0x8000, 1, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x3F80, 0xC2F7], np.uint16),
        "a window with exceptions": (0x3F80 - 5 * some * 37 % 0x0900 | some << 15).astype(np.uint16),
        "great ones are exceptions": np.where(some % 23 == 3, 0x7F00, 0x3B00 + 29 * some).astype(np.uint16),
        "too many exceptions": (0x2A51 * some).astype(np.uint16),
    }
    vectors = {
        "blake3": json.loads(PATH.read_text())["blake3"],
        "items": [
            {
                "item": as_fields([item])[0],
                "lanes_from": first,
                "lanes": [f"{lane:016x}" for lane in reference.lanes(item, first, 9)],
                "digest": reference.item_digest(item).hex(),
            }
            for item in items
            for first in (0, 1000003)
        ],
        "prompt": {
            "root": ROOT.hex(),
            "token_ids": ids,
            "items": as_fields(items),
            "content_ids": [f"{i:016x}" for i in reference.content_ids(ids, items)],
            "chains": [[end, reference.items_chain(items, end).hex()] for end in cuts],
            "keys": [[end, bytes(reference.prefix_keys(ids, items, ROOT, [end])[0].tolist()).hex()] for end in cuts],
        },
        "namespaces": [
            {"fields": fields, "request": request, "root": root_of(fields, request).hex()}
            for fields, request in namespaces
        ],
        "layouts": [
            {
                "layout": layout,
                "chunk_tokens": 256,
                "mode": mode,
                "fingerprint": KVLayout(
                    **{**layout, "planes": tuple(layout["planes"]), "layers": tuple(layout["layers"])}
                )
                .fingerprint(256, mode)
                .hex(),
            }
            for layout in layouts
            for mode in ("page", "token")
        ],
        "encoder": [as_encoder_vector(item, output) for item, output in zip(items, outputs, strict=True)],
        "codec": [
            {"name": name, "raw": raw.tobytes().hex(), "tile": None if tile is None else tile.hex()}
            for name, raw in numbers.items()
            for tile in [reference.encode_tile(raw)]
        ],
        "checksums": [
            {"bytes": size, "checksum": reference.checksum((torch.arange(size) % 251).to(torch.uint8))}
            for size in payloads
        ],
    }
    PATH.write_text(json.dumps(vectors, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
