"""A chat about a picture: each turn finds the KV of the turns before it, answers included."""

from __future__ import annotations

import torch

import lmcache_mm as lmc
from own_loop import PAGE_TOKENS, PAGES, WIDTH, Model

ANSWER_TOKENS = 8


def main() -> None:
    model = Model()
    layout = lmc.KVLayout.from_tensors(model.kv, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2)
    namespace = lmc.Namespace(model="attention only", weights="seed 0", dtype=torch.float32)
    picture = torch.randn(100, WIDTH)
    items = [lmc.Item("hash of the picture", offset=10, length=100)]
    said = [1] * 10 + [99] * 100  # what the model has seen so far
    turns: list[int] = []
    with lmc.KVCache(layout, "mem://?capacity=64MiB", namespace, chunk_tokens=64) as cache:
        for question in (5, 6, 7):
            prompt = lmc.Prompt(said + [question] * 12, items, turns=turns)
            block_ids = torch.randperm(PAGES)[: -(-(len(prompt) + ANSWER_TOKENS) // PAGE_TOKENS)].tolist()
            restored = cache.retrieve(prompt, block_ids).result()
            x = model.embedding[torch.tensor(prompt.token_ids)]
            x[10:110] = picture
            tokens = [model.forward(x[restored:], restored, block_ids)]
            while len(tokens) < ANSWER_TOKENS:
                tokens.append(model.forward(model.embedding[tokens[-1:]], len(prompt) + len(tokens) - 1, block_ids))
            # The last token's KV has not been computed, since no token was generated after it.
            turn = lmc.Prompt([*prompt.token_ids.tolist(), *tokens[:-1]], items, turns=turns)
            cache.store(turn, block_ids).result()
            print(f"{len(prompt)} tokens, {restored} restored, {len(tokens)} generated")
            said, turns = [*prompt.token_ids.tolist(), *tokens], [*turns, len(turn)]
        print(f"hit rate {cache.stats()['hit_rate']:.0%}")


if __name__ == "__main__":
    main()
