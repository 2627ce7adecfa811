"""The demo's questions about photographs: asked with a cache, and compared with the answers without one."""

# ruff: noqa: PLC0415  Imports inside functions are optional packages that take seconds to import.

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

import lmcache_mm as lmc

if TYPE_CHECKING:
    from PIL.Image import Image as Photograph

    from paged_qwen2_vl import Image, PagedQwen2VL, Request

PAGE_TOKENS = 16
CHUNK_TOKENS = 256

QUESTION = "What is in this picture?"
OTHER_QUESTION = "Which colours stand out, and where are they?"
TEXT_BEFORE = "Here is a photograph that I took on a journey."
TEXT_ONLY = """\
A language model reads its prompt once and keeps, for each token and each layer, a key and a value. Together they are \
called the KV cache. Every further token of the answer looks back at them, so they have to stay where the model can \
reach them for as long as the answer grows. When the answer is finished they are usually thrown away, and when the \
same beginning comes along again, in the next turn of a conversation or from another person who asks about the same \
document, all of it is computed a second time. A cache that keeps keys and values by the content of the prompt saves \
this work: it cuts the prompt into chunks, names each chunk by everything that stands before it and in it, and looks \
the names up. Pictures make this harder. To the language model a picture is a run of placeholder tokens that look \
alike for every picture, and only the vision encoder fills in what they stand for. Whoever names chunks by the tokens \
alone gives two pictures of equal size the same name, and then answers a question about one picture with the keys and \
values of the other. Nothing crashes and nothing warns: the answer is fluent, and it is wrong. The remedy is to put \
the content of the picture into the name. Explain in your own words why a name of a chunk has to cover everything \
that stands before the chunk, and what would go wrong if it did not."""


@dataclass(frozen=True)
class Row:
    """The results of one question, named as in the JSON. hit_rate = kv_hits / total_tokens; times in seconds.

    encoder_saved_s: for the images in encoder_hits, the encoding time in the answer without cache minus their loading
    time.
    """

    query: str
    total_tokens: int
    kv_hits: int
    hit_rate: float
    encoder_hits: int
    encoder_saved_s: float
    ttft_s: float
    equal: bool


class Questions:
    """Asks the demo's questions, with either kind of keys, each with its own store.

    weights: their fingerprint. store: the user's, if there is one."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        model_name: str,
        weights: str,
        photographs: list[tuple[str, Photograph]],
        max_new_tokens: int,
        store: str | None,
    ) -> None:
        import PIL.Image

        from paged_qwen2_vl import PagedQwen2VL

        self.model, self.processor, self.model_name, self.weights = model, processor, model_name, weights
        self.max_new_tokens, self.store = max_new_tokens, store
        (first_name, first), (second_name, second), *others = photographs
        about_first, text_only = self._request(first, QUESTION), self._request(TEXT_ONLY)
        self.queries = [
            (f"{first_name}: a question", about_first),
            (f"{first_name}: the same again", about_first),
            (f"{second_name}: the same text", self._request(second, QUESTION)),
            (f"{first_name}: another question", self._request(first, OTHER_QUESTION)),
            (f"{first_name}: other text before it", self._request(TEXT_BEFORE, first, QUESTION)),
            ("text only", text_only),
            ("text only: the same again", text_only),
            *((f"{name}: the same text", self._request(image, QUESTION)) for name, image in others),
        ]
        self.warm_up_request = self._request(PIL.Image.new("RGB", first.size, "grey"), QUESTION)
        longest = max(len(request.token_ids) for _, request in self.queries) + self.max_new_tokens
        # One request needs pages at a time; four times as many make them well scattered.
        self.loop = PagedQwen2VL(self.model, num_pages=4 * -(-longest // PAGE_TOKENS), page_tokens=PAGE_TOKENS)
        self.exact = self.loop.device.type == "cpu" and self.loop.dtype == torch.float32
        self.namespace = lmc.Namespace(model=self.model_name, weights=self.weights, dtype=self.loop.dtype)
        self._generated: dict[Request, list[int]] = {}

    def _request(self, *parts: str | Photograph) -> Request:
        from paged_qwen2_vl import Request

        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        config = self.model.config
        return Request(dict(inputs), config.image_token_id, config.vision_config.spatial_merge_size)

    def headline(self) -> str:
        """Names the model, the device and the sizes."""
        device, dtype = self.loop.device, str(self.loop.dtype).removeprefix("torch.")
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        image_tokens = self.queries[0][1].images[0].length
        return (
            f"{self.model_name}, {len(self.loop.kv_caches)} layers, {dtype}, on {where}; "
            f"{image_tokens} tokens per image, {CHUNK_TOKENS} per chunk, {PAGE_TOKENS} per page"
        )

    def warm_up(self) -> None:
        """Asks about a gray image twice, to get lazy initialization done, with a store that no row sees."""
        with self._open_cache([self.warm_up_request], None) as cache:
            for _ in range(2):
                self._ask("warm-up", self.warm_up_request, cache, True)

    def ask_all(self, by_content: bool, advance: Callable[[str], None]) -> tuple[list[Row], list[str]]:
        """All rows, with the user's store if keys are from content and else with a new one, and a sentence for each
        wrong answer."""
        rows, mistakes = [], []
        # Records under keys from raw token ids are wrong for everybody else: keep them out of shared stores.
        store = self.store if by_content else None
        with self._open_cache([request for _, request in self.queries], store) as cache:
            for query, request in self.queries:
                advance(query if by_content else f"{query} (raw token ids)")
                row, answer, expected = self._ask(query, request, cache, by_content)
                rows.append(row)
                if not row.equal:
                    mistakes.append(f"{query}: answered {self._quote(answer)} instead of {self._quote(expected)}")
        return rows, mistakes

    def try_store(self) -> None:
        """Raises what opening the user's store raises."""
        self._open_cache([], self.store).close()

    def _open_cache(self, requests: list[Request], store: str | None) -> lmc.KVCache:
        kv_caches = self.loop.kv_caches
        # Room for all records: each prompt's whole chunks, and those that end at its image's end and at its own.
        chunks = sum(-(-len(request.token_ids) // CHUNK_TOKENS) + 2 for request in requests)
        chunk_bytes = CHUNK_TOKENS // PAGE_TOKENS * sum(pages[0].nbytes for pages in kv_caches)
        hidden: int = self.model.config.text_config.hidden_size
        image_tokens = sum(image.length for request in requests for image in request.images)
        room = 2 * (chunks * chunk_bytes + image_tokens * hidden * self.loop.dtype.itemsize)
        return lmc.KVCache(
            lmc.KVLayout.from_tensors(kv_caches, page_tokens=PAGE_TOKENS, page_dim=0, token_dim=2),
            store=store or f"mem://?capacity={2 + room // 2**20}MiB",
            namespace=self.namespace,
            chunk_tokens=CHUNK_TOKENS,
        )

    def _ask(
        self, query: str, request: Request, cache: lmc.KVCache, by_content: bool
    ) -> tuple[Row, list[int], list[int]]:
        """Answers one question with `cache`. Returns its row, the answer, and the answer without any cache."""
        loop, n = self.loop, len(request.token_ids)
        block_ids = loop.allocate(n + self.max_new_tokens)
        prompt_block_ids = block_ids[: -(-n // PAGE_TOKENS)]
        loop.poison(block_ids)
        loop.synchronize()
        begin = time.perf_counter()
        items = [lmc.Item(_identifier(image), image.offset, image.length) for image in request.images]
        prompt = lmc.Prompt(request.inputs["input_ids"][0].numpy(), items=items if by_content else [])
        restored = cache.retrieve(prompt, prompt_block_ids, cache.match(prompt)).result()
        loop.synchronize()
        ttft_s = time.perf_counter() - begin

        written = loop.count_written(block_ids, n)
        restored_kv = loop.read_kv(block_ids, restored)

        loop.synchronize()
        begin = time.perf_counter()
        encoder = _Encoder(loop, lmc.EncoderCache(cache.backend, self.namespace) if by_content else None)
        tokens = loop.generate(request, block_ids, min(restored, n - 1), self.max_new_tokens, encoder.encode)
        answer = [next(tokens)]
        ttft_s += time.perf_counter() - begin
        answer += tokens
        cache.store(prompt, prompt_block_ids).result()
        encoder.save_new()
        loop.free(block_ids)

        expected, own_kv, encoding_s = self._answer_without_cache(request, restored)
        saved_s = sum(encoding_s[name] - took_s for name, took_s in encoder.loading_s.items())
        equal = answer == expected
        if by_content:  # raw token ids restore another image's KV: there only the answer matters
            equal = equal and written == restored and self._same_kv(restored_kv, own_kv)
        hits = min(written, n - 1)
        row = Row(query, n, hits, hits / n, len(encoder.loading_s), saved_s, ttft_s, equal)
        return row, answer, expected

    def _answer_without_cache(self, request: Request, split: int) -> tuple[list[int], torch.Tensor, dict[str, float]]:
        """The answer computed without any store, the prompt's own KV of the tokens [0, split), and the seconds that
        each image took to encode."""
        loop, n = self.loop, len(request.token_ids)
        block_ids = loop.allocate(n + self.max_new_tokens)
        loop.poison(block_ids)
        encoder = _Encoder(loop, None)
        next(loop.generate(request, block_ids, 0, 1, encoder.encode))
        own_kv = loop.read_kv(block_ids, split)
        if not self.exact:
            expected = list(loop.generate(request, block_ids, min(split, n - 1), self.max_new_tokens))
        elif request in self._generated:
            expected = self._generated[request]
        else:
            greedy: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
            output = self.model.generate(**request.inputs, max_new_tokens=self.max_new_tokens, **greedy)
            expected = self._generated[request] = output[0, n:].tolist()
        loop.free(block_ids)
        return expected, own_kv, encoder.encoding_s

    def _same_kv(self, restored: torch.Tensor, own: torch.Tensor) -> bool:
        # Swapped pages or slots may not change the answer, since attention ignores the order of its keys: comparing
        # answers is not enough.
        if self.exact:
            return torch.allclose(restored, own, rtol=1e-3, atol=1e-3)
        return torch.equal(restored.view(torch.uint8), own.view(torch.uint8))

    def _quote(self, answer: list[int]) -> str:
        if self.weights.startswith("random"):  # there are no words behind these tokens
            return " ".join(map(str, answer))
        return repr(self.processor.tokenizer.decode(answer, skip_special_tokens=True))


class _Encoder:
    """The loop's vision encoder, behind a cache if there is one; keeps the seconds that each image took."""

    def __init__(self, loop: PagedQwen2VL, cache: lmc.EncoderCache | None) -> None:
        self._loop, self._cache = loop, cache
        self._new: dict[str, torch.Tensor] = {}
        self.encoding_s: dict[str, float] = {}
        self.loading_s: dict[str, float] = {}

    def encode(self, image: Image) -> torch.Tensor:
        name = _identifier(image)
        self._loop.synchronize()
        begin = time.perf_counter()
        features = None if self._cache is None else self._cache.load(name, device=self._loop.device)
        times = self.encoding_s if features is None else self.loading_s
        if features is None:
            features = self._new[name] = self._loop.encode(image)
        self._loop.synchronize()
        times[name] = time.perf_counter() - begin
        assert isinstance(features, torch.Tensor)
        return features

    def save_new(self) -> None:
        """Stores the new outputs, after the answer."""
        if self._cache is not None:
            for name, features in self._new.items():
                self._cache.save(name, features)


def _identifier(image: Image) -> str:
    """A digest of an image's processed data, shape and dtype: the vision encoder's input, which decides the KV.

    A digest of the file would be wrong: two files may hold the same picture, and the file does not say how the
    processor scales it.
    """
    digest = blake3()
    for tensor in (image.pixel_values, image.grid):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return str(digest.hexdigest())
