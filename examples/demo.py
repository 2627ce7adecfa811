"""Questions about photographs, answered with KV from a store and checked token by token."""

# ruff: noqa: PLC0415  Imports inside functions are optional packages that take seconds to import.

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

import lmcache_mm as lmc

if TYPE_CHECKING:
    from PIL.Image import Image as Photograph
    from rich.console import Console

    from paged_qwen2_vl import Image, PagedQwen2VL, Request

PAGE_TOKENS = 16
CHUNK_TOKENS = 256
DEFAULT_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")

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

DESCRIPTION = f"""\
Answers questions about photographs with Qwen2-VL in its own inference loop with a paged KV cache, and reuses KV by keys
made from the images' content. Without options it needs no download and no GPU: it runs a tiny Qwen2-VL with random
weights on three photographs that scikit-image ships.

The table has one row for each of these: the first image; the same again; the same text about the second image; the
first image with another question after it; the first image with other text before it; a text-only prompt; the same
again; and the same text about every further image. A second table has the same rows with keys from raw token ids, which
cannot tell images of equal size apart: it shows the wrong answers that keys from content prevent.

  KV hits   tokens whose KV was restored from the store. Measured: the request's pages are filled with NaN before, and
            tokens without a NaN in any layer are counted after. The last token is always computed, for its logits.
  encoder   images whose vision encoder output came from the same store, wherever in a prompt the image was before, and
            the time saved against running the encoder. Images that KV covers need neither.
  TTFT      time to first token of a tokenized prompt: hashing the image, looking up, restoring, computing the rest.
  equal     the answer is, token for token, the one computed without any cache, and the restored KV is the prompt's own
            (with raw token ids only the answer counts). On the CPU in float32 the answer without a cache comes from
            transformers' generate(). Elsewhere kernels round differently for different sizes: there the loop computes
            it from the same token on as the row's answer, after the prompt's own KV, and the restored KV must equal
            that KV bit for bit.

Chunks have {CHUNK_TOKENS} tokens, pages {PAGE_TOKENS}."""

EPILOG = """\
exit status: 0 all answers equal; 1 an answer with keys from content differs; 2 wrong usage.

--json writes {"rows": [{"query", "total_tokens", "kv_hits", "hit_rate" (0 to 1), "encoder_hits", "encoder_saved_s",
"ttft_s" (seconds), "equal"}, ...], "raw_id_rows": [the same]}.

examples:
  python examples/demo.py
  python examples/demo.py --model Qwen/Qwen2-VL-2B-Instruct --device cuda --image cat.jpg dog.jpg
  python examples/demo.py --store 'shm:///demo?capacity=1GiB'
  python examples/demo.py --random-weights qwen2-vl-2b --device cuda --json rows.json"""


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


class _Misuse(Exception):
    """The user's request cannot be done; the text says what was expected and what was found."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    text = "Qwen2-VL checkpoint: a directory or a hub id (default: a tiny one, built on the fly)"
    model.add_argument("--model", metavar="DIR_OR_ID", help=text)
    text = "a model of this shape with random weights, made on the device: qwen2-vl-2b, qwen2-vl-7b, "
    text += "tiny, or the config.json (file, directory or hub id) of a Qwen2-VL checkpoint"
    model.add_argument("--random-weights", metavar="CONFIG", help=text)
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    text = "of weights and KV (default: float32 on the CPU, bfloat16 elsewhere)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    text = "two images or more, in any format that Pillow reads (default: three photographs from scikit-image)"
    add("--image", nargs="+", metavar="FILE", help=text)
    text = "every image is cropped and scaled to a square of this side, within the limits of the model's processor, "
    text += "since raw token ids only confuse images of equal size (default: %(default)s, which gives 1024 tokens)"
    add("--image-size", type=_at_least(28), default=896, metavar="PIXELS", help=text)
    text = "the most tokens per answer (default: %(default)s)"
    add("--max-new-tokens", type=_at_least(1), default=16, metavar="N", help=text)
    text = "keep KV in this store, such as shm:///demo?capacity=1GiB, and use what an earlier run left there; the rows "
    text += "with raw token ids never do (default: a new store for this run)"
    add("--store", metavar="URL", help=text)
    add("--json", type=Path, metavar="FILE", help="write the rows to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo, prints its tables to stdout and returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        import rich.console
        import skimage  # noqa: F401
        import torchvision  # noqa: F401  without it transformers' image processor fails late

        import tiny_qwen2_vl  # noqa: F401
    except ImportError as error:
        return _complain(f"{error}. The demo needs more packages: pip install '.[demo]'")
    try:
        return _run(args, rich.console.Console())
    except _Misuse as error:
        return _complain(str(error))
    except torch.OutOfMemoryError as error:
        return _complain(f"--device {args.device}: the model and its KV do not fit: {_first_line(error)}")


def _run(args: argparse.Namespace, console: Console) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        console.width = max(console.width, 120)
    if args.json:
        try:
            args.json.touch()  # now, not after minutes of work
        except OSError as error:
            raise _Misuse(f"--json: {error}") from error
    device, dtype = _device_and_dtype(args)
    photographs = _read_photographs(args)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading the model", total=None)
        demo = _Demo(args, device, dtype, photographs)
        if args.store:
            demo.try_store()
        console.print(demo.headline(), highlight=False, markup=False)
        progress.update(task, total=1 + 2 * len(demo.queries), description="warm-up")

        def advance(description: str) -> None:
            progress.update(task, advance=1, description=description)

        demo.warm_up()
        rows, _ = demo.ask_all(True, advance)
        raw_id_rows, mistakes = demo.ask_all(False, advance)

    _print_table(console, "Keys from content", rows)
    _print_table(console, "Keys from raw token ids, for comparison", raw_id_rows)
    for mistake in mistakes:
        console.print(f"Prevented: {mistake}", style="yellow", highlight=False, markup=False)
    wrong = sum(not row.equal for row in rows)
    verdict = f"{wrong} of {len(rows)} answers differ from" if wrong else f"All {len(rows)} answers equal"
    console.print(
        f"{verdict} those computed without a cache.", style="bold red" if wrong else "bold green", highlight=False
    )
    if args.json:
        report = {"rows": [asdict(row) for row in rows], "raw_id_rows": [asdict(row) for row in raw_id_rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


class _Demo:
    """The model, its loop and the questions; asks them all, with either kind of keys, each with its own store."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype,
        photographs: list[tuple[str, Photograph]],
    ) -> None:
        import PIL.Image

        from paged_qwen2_vl import PagedQwen2VL

        self.model, self.processor, self.model_name, self.weights = _load_model(args, device, dtype)
        self.max_new_tokens: int = args.max_new_tokens
        self.store: str | None = args.store
        self.exact = device.type == "cpu" and dtype == torch.float32
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
        try:
            self._open_cache([], self.store).close()
        except (ValueError, OSError, RuntimeError) as error:
            raise _Misuse(f"--store: {error}") from error

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
        encoder = _Encoder(loop, lmc.EncoderCache(self.namespace, cache.backend) if by_content else None)
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


def _device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise _Misuse(f"--device: expected cpu, cuda or cuda:N, got {args.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _Misuse(f"--device {args.device}: torch {torch.__version__} finds no CUDA device on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _Misuse(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device, getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def _read_photographs(args: argparse.Namespace) -> list[tuple[str, Photograph]]:
    """Names and square RGB images, in the order of the command line."""
    import PIL.Image
    import PIL.ImageOps
    import skimage.data

    found: list[tuple[str, Photograph]] = []
    if args.image is None:
        found = [(name, PIL.Image.fromarray(getattr(skimage.data, name)())) for name in DEFAULT_PHOTOGRAPHS]
    elif len(args.image) < 2:
        raise _Misuse(f"--image: expected two files or more, got {len(args.image)}")
    for file in args.image or ():
        try:
            with PIL.Image.open(file) as image:
                found.append((Path(file).name, PIL.ImageOps.exif_transpose(image).convert("RGB")))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise _Misuse(f"--image: cannot read {file}: {_first_line(error)}") from error
    size = (args.image_size, args.image_size)
    return [(name, PIL.ImageOps.fit(image, size, PIL.Image.Resampling.BICUBIC)) for name, image in found]


def _load_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, str, str]:
    """The model on `device`, its processor, its name, and a fingerprint of its weights."""
    import transformers

    import tiny_qwen2_vl

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.random_weights:
        config = _read_config("--random-weights", args.random_weights)
        processor = tiny_qwen2_vl.build_processor(config)
        model = tiny_qwen2_vl.build_model(config, device, dtype)
        return model, processor, f"{args.random_weights} with random weights", "random"

    with tempfile.TemporaryDirectory() as directory:
        if args.model is None:
            tiny_qwen2_vl.write_checkpoint(Path(directory))
        source = args.model or directory
        config = _read_config("--model", source)
        try:
            model_class: Any = transformers.Qwen2VLForConditionalGeneration
            model, loaded = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
            processor = transformers.AutoProcessor.from_pretrained(source)
        except Exception as error:  # the readers of the various files raise all kinds of errors
            raise _Misuse(f"--model: cannot load {source}: {_first_line(error)}") from error
        if loaded["missing_keys"]:
            raise _Misuse(f"--model: {source} lacks weights, such as {min(loaded['missing_keys'])}")
        weights = getattr(config, "_commit_hash", None)
        if weights is None:
            digest = blake3()
            for file in sorted(Path(source).glob("*.safetensors")):
                digest.update_mmap(file)
            weights = digest.hexdigest()
    if args.model is None:
        return model.to(device).eval(), processor, "tiny Qwen2-VL with random weights", f"random {weights}"
    return model.to(device).eval(), processor, args.model, weights


def _read_config(option: str, source: str) -> Any:
    """The Qwen2VLConfig of a built-in shape, config.json, directory or hub id."""
    import transformers

    import tiny_qwen2_vl

    if option == "--random-weights" and source in tiny_qwen2_vl.BUILT_IN_SHAPES:
        return tiny_qwen2_vl.shape(source)
    hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not hub_id and not Path(source).exists():
        names = f"one of {', '.join(tiny_qwen2_vl.BUILT_IN_SHAPES)}, " if option == "--random-weights" else ""
        raise _Misuse(f"{option}: expected {names}a directory or a hub id (owner/name), got {source}")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _Misuse(f"{option}: no model configuration at {source}: {_first_line(error)}") from error
    if not isinstance(config, transformers.Qwen2VLConfig):
        raise _Misuse(f"{option}: expected a model of type qwen2_vl, {source} is of type {config.model_type}")
    return config


def _print_table(console: Console, title: str, rows: list[Row]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "query", title=title, title_justify="left")
    for heading in ("tokens", "KV hits", "hit rate", "encoder", "TTFT"):
        table.add_column(heading, justify="right")
    table.add_column("equal")
    for number, row in enumerate(rows, 1):
        saved = "saved" if row.encoder_saved_s >= 0 else "lost"
        encoder = f"{row.encoder_hits} hit, {abs(row.encoder_saved_s) * 1e3:.1f} ms {saved}" if row.encoder_hits else ""
        figures = (
            f"{row.total_tokens}",
            f"{row.kv_hits}",
            f"{row.hit_rate:.1%}",
            encoder,
            f"{row.ttft_s * 1e3:.1f} ms",
        )
        table.add_row(f"{number}", escape(row.query), *figures, "yes" if row.equal else "[bold red]NO[/]")
    console.print(table)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _complain(message: str) -> int:
    print(f"demo.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
