"""Your own inference loop: a small attention model with a paged KV cache, and reuse across questions."""

from __future__ import annotations

import torch

import lmcache_mm as lmc

VOCABULARY, WIDTH, LAYERS, PAGE_TOKENS, PAGES = 128, 32, 2, 16, 64


class Model:
    """Only attention, with random weights. kv: one tensor per layer, [page, 2, token, width]."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.weights = torch.randn(LAYERS, 3, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.kv = [torch.zeros(PAGES, 2, PAGE_TOKENS, WIDTH) for _ in range(LAYERS)]

    def forward(self, x: torch.Tensor, begin: int, block_ids: list[int]) -> int:
        """Computes the KV of tokens [begin, begin + len(x)), attending to all before them; returns the next token."""
        pages = torch.tensor(block_ids)
        positions = torch.arange(begin, begin + len(x))
        for layer, kv in enumerate(self.kv):
            q, k, v = (x @ weight for weight in self.weights[layer])
            kv[pages[positions // PAGE_TOKENS], :, positions % PAGE_TOKENS] = torch.stack([k, v], dim=1)
            keys, values = kv[pages].transpose(0, 1).flatten(1, 2)[:, : begin + len(x)]
            scores = (q @ keys.T / WIDTH**0.5).masked_fill(torch.arange(len(keys)) > positions[:, None], -torch.inf)
            x = x + scores.softmax(-1) @ values
        return int((x[-1] @ self.embedding.T).argmax())


def answer(model: Model, prompt: lmc.Prompt, image: torch.Tensor, cache: lmc.KVCache | None) -> tuple[list[int], int]:
    """Eight tokens, and how many prompt tokens were restored. image: the embeddings of the prompt's item."""
    block_ids = torch.randperm(PAGES)[: -(-(len(prompt) + 8) // PAGE_TOKENS)].tolist()
    x = model.embedding[torch.tensor(prompt.token_ids)]
    for item in prompt.items:
        x[item.offset : item.offset + item.length] = image
    restored = 0
    if cache:
        hit = min(cache.match(prompt), len(prompt) - 1)  # the last token is computed, for its logits
        restored = cache.retrieve(prompt, block_ids, hit).result()
    tokens = [model.forward(x[restored:], restored, block_ids)]
    if cache:
        cache.store(prompt, block_ids).result()
    while len(tokens) < 8:
        begin = len(prompt) + len(tokens) - 1
        tokens.append(model.forward(model.embedding[tokens[-1:]], begin, block_ids))
    return tokens, restored


def main() -> None:
    model = Model()
    layout = lmc.KVLayout.from_tensors(model.kv, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2)
    namespace = lmc.Namespace(model="attention only", weights="seed 0", dtype=torch.float32)
    images = {name: torch.randn(300, WIDTH) for name in ("hash of a cat", "hash of a dog")}
    with lmc.KVCache(layout, "mem://?capacity=64MiB", namespace, chunk_tokens=64) as cache:
        for name, question in (
            *(("hash of a cat", 5), ("hash of a cat", 5), ("hash of a cat", 6), ("hash of a dog", 5)),
            ("hash of a dog", 6),
        ):
            prompt = lmc.Prompt([1] * 20 + [99] * 300 + [question] * 30, [lmc.Item(name, offset=20, length=300)])
            tokens, restored = answer(model, prompt, images[name], cache)
            expected, _ = answer(model, prompt, images[name], None)
            assert tokens == expected
            print(f"{name}, question {question}: {restored} of {len(prompt)} tokens restored, the answer is the same")


if __name__ == "__main__":
    main()
