"""transformers' DynamicCache, which is dense: its KV goes to the store and back through a few pages of this file's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import lmcache_mm as lmc

PAGE_TOKENS, PAGES = 16, 32  # room for one prompt of 512 tokens
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, tie_word_embeddings=True,
)  # fmt: skip


class DenseReuse:
    """Prompts of a transformers model through `cache`'s store."""

    def __init__(self, model: LlamaForCausalLM, store: str, weights: str) -> None:
        config: Any = model.config
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        # [K or V, head, page, token, dim]: a DynamicCache's [1, head, token, dim] with its tokens cut into pages.
        self.pages = [torch.zeros(2, heads, PAGES, PAGE_TOKENS, dim) for _ in range(config.num_hidden_layers)]
        layout = lmc.KVLayout.from_tensors(self.pages, page_tokens=PAGE_TOKENS, page_dim=2, token_dim=3)
        namespace = lmc.Namespace(model="llama", weights=weights, dtype=torch.float32)
        self.cache = lmc.KVCache(layout, store, namespace, chunk_tokens=64)
        self.block_ids = list(range(PAGES))

    def past(self, prompt: lmc.Prompt) -> DynamicCache:
        """A DynamicCache with the KV of all tokens that the store has, except the prompt's last."""
        hit = min(self.cache.match(prompt), len(prompt) - 1)
        restored = self.cache.retrieve(prompt, self.block_ids, hit).result()
        past = DynamicCache()
        for layer, pages in enumerate(self.pages if restored else ()):
            dense = pages.flatten(2, 3)[:, None, :, :restored].clone()  # [K or V, 1, head, token, dim]
            past.update(dense[0], dense[1], layer)
        return past

    def keep(self, prompt: lmc.Prompt, past: DynamicCache) -> None:
        """Stores the part of the prompt's KV that the store lacks."""
        layers: Any = past.layers
        for pages, layer in zip(self.pages, layers, strict=True):
            dense = torch.stack([layer.keys[0], layer.values[0]])[:, :, : len(prompt)]
            pages.flatten(2, 3)[:, :, : len(prompt)] = dense
        self.cache.store(prompt, self.block_ids).result()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    reuse = DenseReuse(model, "mem://?capacity=64MiB", "seed 0")
    document = torch.randint(256, (300,)).tolist()
    for question in ([5] * 20, [5] * 20, [6] * 25):
        prompt = lmc.Prompt(document + question)
        ids = torch.tensor([prompt.token_ids.tolist()])
        past = reuse.past(prompt)
        restored = past.get_seq_length()
        logits = model(ids[:, restored:], past_key_values=past).logits[0, -1]
        reuse.keep(prompt, past)
        expected = model(ids).logits[0, -1]
        assert torch.allclose(logits, expected, atol=1e-4)
        assert logits.argmax() == expected.argmax()
        print(f"{len(prompt)} tokens, {restored} restored")
    reuse.cache.close()


if __name__ == "__main__":
    main()
