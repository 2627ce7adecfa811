"""A custom inference loop for transformers' Qwen2-VL: paged KV cache, prefill from any token on, greedy decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.cache_utils import Cache, CacheLayerMixin


class _PagedLayer(CacheLayerMixin):
    """One layer's view of one sequence: reads and writes the pages in a block table, and owns no KV."""

    def __init__(self, pages: torch.Tensor, block_table: torch.Tensor, length: int) -> None:
        super().__init__()
        self.pages, self.block_table, self.length = pages, block_table, length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [1, kv_heads, new, head_dim] and returns K and V of the whole sequence in the same form."""
        page_tokens = self.pages.shape[2]
        end = self.length + key_states.shape[2]
        positions = torch.arange(self.length, end, device=self.pages.device)
        block_ids, slots = self.block_table[positions // page_tokens], positions % page_tokens
        self.pages[block_ids, 0, slots] = key_states[0].transpose(0, 1)
        self.pages[block_ids, 1, slots] = value_states[0].transpose(0, 1)
        self.length = end
        return self._read(0), self._read(1)

    def _read(self, plane: int) -> torch.Tensor:
        used = self.block_table[: -(-self.length // self.pages.shape[2])]
        return self.pages[used, plane].flatten(0, 1)[: self.length].transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Image:
    """One image of a request: its processed data, and its placeholder tokens [offset, offset + length).

    pixel_values: patches from the processor [patches, values per patch]; grid: [1, 3] int64 (t, h, w).
    """

    offset: int
    length: int
    pixel_values: torch.Tensor
    grid: torch.Tensor

    @property
    def end(self) -> int:
        return self.offset + self.length


class Request:
    """A processed prompt: what Qwen2VLProcessor returned for one text (`inputs`), and its images."""

    def __init__(self, inputs: dict[str, torch.Tensor], image_token_id: int, merge_size: int) -> None:
        self.inputs = inputs
        self.token_ids: list[int] = inputs["input_ids"][0].tolist()
        self.images: list[Image] = []
        end = first_patch = 0
        for grid in inputs.get("image_grid_thw", ()):
            patches = int(grid.prod())
            offset, length = self.token_ids.index(image_token_id, end), patches // merge_size**2
            pixels = inputs["pixel_values"][first_patch : first_patch + patches]
            self.images.append(Image(offset, length, pixels, grid[None]))
            end, first_patch = offset + length, first_patch + patches


class PagedQwen2VL:
    """Greedy decoding with any Qwen2VLForConditionalGeneration over KV pages that the caller can access.

    `kv_caches` holds one tensor per layer: [num_pages, 2 (K, V), page_tokens, kv_heads, head_dim] on the model's device
    in its dtype. A request's pages are drawn at random, so that nothing works only because pages are adjacent. The loop
    knows nothing of lmcache_mm: `start` says how many tokens have KV already, which is then read, not computed.
    """

    def __init__(
        self, model: Qwen2VLForConditionalGeneration, num_pages: int, page_tokens: int = 16, seed: int = 0
    ) -> None:
        self.model, self.page_tokens = model, page_tokens
        self.device, self.dtype = model.device, model.dtype
        text: Any = model.config.text_config
        head_dim = text.hidden_size // text.num_attention_heads
        page_shape = (num_pages, 2, page_tokens, text.num_key_value_heads, head_dim)
        self.kv_caches = [
            torch.zeros(page_shape, device=self.device, dtype=self.dtype) for _ in range(text.num_hidden_layers)
        ]
        self._free = list(range(num_pages))
        self._random = random.Random(seed)
        end_ids = model.generation_config.eos_token_id
        self.end_ids = set(end_ids if isinstance(end_ids, list) else [end_ids])

    def allocate(self, tokens: int) -> list[int]:
        """Pages for that many tokens, in random order; ValueError if too few are free. Give them back with `free`."""
        count = -(-tokens // self.page_tokens)
        if count > len(self._free):
            raise ValueError(f"tokens: expected at most {len(self._free) * self.page_tokens}, got {tokens}")
        self._random.shuffle(self._free)
        block_ids, self._free = self._free[:count], self._free[count:]
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        self._free += block_ids

    def poison(self, block_ids: list[int]) -> None:
        """Fills these pages with NaN: then reading unwritten KV shows in the answer."""
        for pages in self.kv_caches:
            pages[block_ids] = float("nan")

    def count_written(self, block_ids: list[int], tokens: int) -> int:
        """How many of a poisoned sequence's first tokens have been written since, in every layer, K and V.

        A token counts if none of its KV is NaN and not all of it is zero: restoring a partly filled page zeroes its
        unused slots.
        """
        kv = self.read_kv(block_ids, tokens).transpose(0, 2).flatten(1)
        return int((~kv.isnan().any(1) & kv.any(1)).sum())

    def read_kv(self, block_ids: list[int], tokens: int) -> torch.Tensor:
        """A copy of the KV of a sequence's first `tokens` tokens: [layers, 2, tokens, kv_heads, head_dim]."""
        layers = [pages[block_ids].transpose(0, 1).flatten(1, 2)[:, :tokens] for pages in self.kv_caches]
        return torch.stack(layers)

    def synchronize(self) -> None:
        """Waits for the device to finish, so that a time taken next is right."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def encode(self, image: Image) -> torch.Tensor:
        """The vision encoder's output for an image: [image.length, hidden]."""
        features: torch.Tensor = self.model.model.get_image_features(
            image.pixel_values.to(self.device), image.grid.to(self.device)
        ).pooler_output[0]
        return features

    @torch.inference_mode()
    def generate(
        self,
        request: Request,
        block_ids: list[int],
        start: int,
        max_new_tokens: int,
        encode: Callable[[Image], torch.Tensor] | None = None,
    ) -> Iterator[int]:
        """Yields the greedy answer, token by token, up to and including an end token.

        block_ids: the sequence's pages from token 0 on, enough for prompt and answer. start: tokens [0, start) have
        their KV in these pages already; 0 ≤ start < prompt tokens, since the last one's logits are needed. encode:
        replaces this class's own `encode`.

        The prefill is split at the last image's end. So an image's KV does not depend on the length of the question
        after it (kernels are chosen by size and round differently), and a caller that reuses KV up to there continues
        exactly like the request that stored it.
        """
        token_ids = request.token_ids
        if not 0 <= start < len(token_ids):
            raise ValueError(f"start: expected 0 to {len(token_ids) - 1}, got {start}")
        block_table = torch.tensor(block_ids, device=self.device)
        cache = Cache(layers=[_PagedLayer(pages, block_table, start) for pages in self.kv_caches])
        embeddings, positions = self._embed(request, start, encode or self.encode), self._positions(request)
        stops = [image.end - start for image in request.images[-1:] if start < image.end < len(token_ids)]
        for begin, end in zip([0, *stops], [*stops, len(token_ids) - start], strict=True):
            logits = self._forward(embeddings[begin:end], positions[:, start + begin : start + end], cache)

        # After the prompt, a token's three positions (time, height, width) all continue from the greatest so far.
        next_position = positions.max() + 1
        for step in range(max_new_tokens):
            token = int(logits.argmax())
            yield token
            if token in self.end_ids or step == max_new_tokens - 1:
                return
            embedding = self.model.get_input_embeddings()(torch.tensor([token], device=self.device))
            logits = self._forward(embedding, (next_position + step).expand(3, 1), cache)

    def _forward(self, embeddings: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Runs tokens [new, hidden] at positions [3, new] and returns the last one's logits [vocabulary]."""
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=positions[:, None], past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden[0, -1])
        return logits

    def _positions(self, request: Request) -> torch.Tensor:
        """Rotary positions of the whole prompt: [3 (time, height, width), tokens]."""
        if not request.images:
            return torch.arange(len(request.token_ids), device=self.device).expand(3, -1)
        positions: torch.Tensor = self.model.model.get_rope_index(
            request.inputs["input_ids"],
            mm_token_type_ids=request.inputs["mm_token_type_ids"],
            image_grid_thw=request.inputs["image_grid_thw"],
        )[0]
        return positions[:, 0].to(self.device)

    def _embed(self, request: Request, start: int, encode: Callable[[Image], torch.Tensor]) -> torch.Tensor:
        """Embeddings of the tokens [start, n): [n − start, hidden]. Images with KV for all their tokens are skipped."""
        token_ids = torch.tensor(request.token_ids[start:], device=self.device)
        embeddings: torch.Tensor = self.model.get_input_embeddings()(token_ids)
        for image in request.images:
            if image.end > start:
                # The encoder always sees the whole image, even where only the features of its last tokens are needed.
                first = max(image.offset, start)
                embeddings[first - start : image.end - start] = encode(image)[first - image.offset :]
        return embeddings
