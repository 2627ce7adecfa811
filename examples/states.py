"""Your own loop over a recurrent model: it keeps the state after a prefix, instead of KV per token."""

from __future__ import annotations

import torch

import lmcache_mm as lmc

VOCABULARY, WIDTH, LAYERS, PAGES, STEP_TOKENS = 128, 32, 2, 8, 64


class Model:
    """Linear attention and nothing else, with random weights. states: [page, layer, width, width], one page each."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.weights = torch.randn(LAYERS, 3, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.states = torch.zeros(PAGES, LAYERS, WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, page: int) -> int:
        """Continues from the state in a page and leaves the state after `x` there; returns the next token."""
        for layer, state in enumerate(self.states[page]):
            q, k, v = (x @ weight for weight in self.weights[layer])
            out = []
            for i in range(len(x)):
                state.mul_(0.95).addr_(k[i], v[i])
                out.append(q[i] @ state)
            x = x + torch.stack(out) / WIDTH
        return int((x[-1] @ self.embedding.T).argmax())


def answer(model: Model, prompt: lmc.Prompt, image: torch.Tensor, cache: lmc.StateCache | None) -> tuple[int, int]:
    """The next token, and how many tokens of the prompt were not computed. image: the rows of the prompt's item."""
    page = int(torch.randint(PAGES, ()))
    x = model.embedding[torch.tensor(prompt.token_ids)]
    (item,) = prompt.items
    x[item.offset : item.offset + item.length] = image
    done = cache.match(prompt) if cache else 0
    if not (cache and done and cache.retrieve(prompt, done, page).result()):
        done = 0
        model.states[page] = 0
    restored, token = done, 0
    # A step ends where a state is to be kept: at multiples of STEP_TOKENS, and at the image's end.
    for end in (end for end in prompt.cuts(STEP_TOKENS) if end > restored):
        token = model.forward(x[done:end], page)
        done = end
        if cache:
            cache.store(prompt, end, page).result()
    return token, restored


def main() -> None:
    model = Model()
    layout = lmc.KVLayout.from_tensors([model.states], page_tokens=1, page_dim=0, opaque=True)
    namespace = lmc.Namespace(model="linear attention only", weights="seed 0", dtype=torch.float32)
    images = {name: torch.randn(150, WIDTH) for name in ("hash of a cat", "hash of a dog")}
    with lmc.StateCache(layout, "mem://?capacity=64MiB", namespace, every_tokens=STEP_TOKENS) as cache:
        for name, question in (("hash of a cat", 5), ("hash of a cat", 5), ("hash of a cat", 6), ("hash of a dog", 6)):
            prompt = lmc.Prompt([1] * 20 + [99] * 150 + [question] * 30, [lmc.Item(name, offset=20, length=150)])
            token, restored = answer(model, prompt, images[name], cache)
            expected, _ = answer(model, prompt, images[name], None)
            assert token == expected
            print(f"{name}, question {question}: {restored} of {len(prompt)} tokens restored, the answer is the same")


if __name__ == "__main__":
    main()
