"""Code that the packages for engines share: tested versions, names of a model's weights, checks of common options."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

# The versions that the packages are tested with: hooks of others may mean something else.
VLLM_VERSIONS = ("0.32", "0.33")  # the two newest minor versions
SGLANG_VERSIONS = ("0.5.23",)

# Values of --load-format with which an engine reads all weights from the model's folder or from the hub's commit. Not
# npcache: it reads copies that it made of former weights.
FROM_THE_MODEL = (
    *("auto", "pt", "safetensors", "fastsafetensors", "instanttensor", "mistral"),
    *("sharded_state", "runai_streamer"),
)
VLLM_FROM_THE_MODEL = (*FROM_THE_MODEL, "hf", "runai_streamer_sharded")
SGLANG_FROM_THE_MODEL = (*FROM_THE_MODEL, "layered", "gguf", "bitsandbytes")

FILES_CONTEXT = "lmcache_mm v1 vllm files"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".kt")
MODEL_FILES = (*WEIGHT_FILES, ".json", ".py")  # configurations, which files to read, --trust-remote-code
# Files of training that engines leave out.
TRAINING_FILES = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
# JSON files that only decide what the tokens are, by how their names begin.
TEXT_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "chat_template", "generation_config")

_digests: dict[tuple[str, int, int, int, int], bytes] = {}  # of files, by path, device, inode, size and time


def is_tested(version: str, versions: Sequence[str]) -> bool:
    """Whether it is one of these versions, or a release of one of them."""
    return any(f"{version}.".startswith(f"{tested}.") for tested in versions)


def digest_of_files(paths: Iterable[Path], folder: Path | None = None) -> str:
    """A digest of files' contents and their names, relative to `folder` if it is given. Contents are read again when a
    file's inode, size or time changes."""
    hasher = blake3(derive_key_context=FILES_CONTEXT)
    for path in sorted(paths):
        found = path.stat()
        state = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if state not in _digests:
            _digests[state] = blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
        name = (path.relative_to(folder).as_posix() if folder else path.name).encode()
        hasher.update(len(name).to_bytes(4, "little") + name + _digests[state])
    return hasher.hexdigest()


def digest_of_folder(model: str) -> str | None:
    """A digest of the weights, settings and code of a model in a local folder and the folders in it, or of a model that
    is one file; None without weights."""
    if Path(model).is_file():
        return digest_of_files([Path(model)])
    files = [path for path in _files_in(model) if path.suffix in MODEL_FILES and path.name not in TRAINING_FILES]
    files = [path for path in files if path.suffix != ".json" or not path.name.startswith(TEXT_FILES)]
    return digest_of_files(files, Path(model)) if any(path.suffix in WEIGHT_FILES for path in files) else None


def commit_of(revision: Any) -> str | None:
    """The commit that a revision of the hub stands for, if the hub's library has resolved it or it is a commit's full
    name. None for others, which may stand for another commit tomorrow."""
    commit = getattr(revision, "resolved", revision)
    return commit if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) else None


def _files_in(model: str) -> Iterator[Path]:
    """All files in a folder that an engine may read."""
    for name, folders, files in os.walk(model, followlinks=True):
        folder = Path(name)
        # Engines skip "original", and checkpoints of training. A link to a folder above would not end.
        folders[:] = [
            inner
            for inner in folders
            if not inner.startswith(".")
            and inner != "original"
            and not inner.startswith("checkpoint-")
            and not folder.resolve().is_relative_to((folder / inner).resolve())
        ]
        yield from (folder / file for file in files if (folder / file).is_file())


def check_options(owner: str, given: Mapping[str, Any], known: Sequence[str], example: str) -> None:
    """Checks that all options `given` for `owner` are known, and the values of those that every engine takes: store
    (for instance `example`), weights and timeout_s. ValueError that names the wrong option."""
    for name in given:
        if name not in known:
            raise ValueError(f"{owner}: unknown option {name!r}; the options are {', '.join(known)}")
    if "store" not in given:
        raise ValueError(f'{owner}: the option "store" is missing; for example "store": "{example}"')
    check_number(owner, "timeout_s", given.get("timeout_s", 1))
    store = given["store"]
    urls = store if isinstance(store, list) else [store]
    if not urls or not all(isinstance(url, str) and url for url in urls):
        raise ValueError(f'{owner}: store: expected a URL such as "{example}", or a list of them, got {store!r}')
    weights = given.get("weights")
    if weights is not None and not (isinstance(weights, str) and weights):
        raise ValueError(f"{owner}: weights: expected a name, got {weights!r}")


def check_number(owner: str, name: str, value: Any, whole: bool = False) -> None:
    """ValueError unless `value` is a number above 0 and, if `whole`, an integer."""
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{owner}: {name}: expected {what} above 0, got {value!r}")
