"""Questions about photographs, answered with KV from a store and checked token by token."""

# ruff: noqa: PLC0415  Imports inside functions are optional packages that take seconds to import.

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from lmcache_mm.extras import how_to_install
from questions import CHUNK_TOKENS, PAGE_TOKENS, Questions, Row

if TYPE_CHECKING:
    from PIL.Image import Image as Photograph
    from rich.console import Console

DEFAULT_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")

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
        return _complain(f"{error}. The demo needs more packages: {how_to_install('demo')}")
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
        questions = Questions(*_load_model(args, device, dtype), photographs, args.max_new_tokens, args.store)
        if args.store:
            try:
                questions.try_store()
            except (ValueError, OSError, RuntimeError) as error:
                raise _Misuse(f"--store: {error}") from error
        console.print(questions.headline(), highlight=False, markup=False)
        progress.update(task, total=1 + 2 * len(questions.queries), description="warm-up")

        def advance(description: str) -> None:
            progress.update(task, advance=1, description=description)

        questions.warm_up()
        rows, _ = questions.ask_all(True, advance)
        raw_id_rows, mistakes = questions.ask_all(False, advance)

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
    from huggingface_hub import snapshot_download

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
        folder = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise _Misuse(f"--model: {source} has no *.safetensors, which name the weights in keys")
        digest = blake3()
        for file in files:
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
