"""The names of an engine's weights: from the files or the commit that they come from, or from the user."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmcache_mm.engine import VLLM_FROM_THE_MODEL, digest_of_folder
from lmcache_mm.vllm import identity

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "model.safetensors.index.json": "{}",
    "hf_quant_config.json": "fp8",
    "modeling.py": "code",
    "tokenizer_of_audio.py": "code",
    "vocab_embeddings.safetensors": "more weights",
    "encoder/config.json": "{}",
    "encoder/model.safetensors": "weights of the encoder",
    "encoder/inner/layer.bin": "a layer",
}
OTHERS = {
    "README.md": "text",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.json": "{}",
    "generation_config.json": "{}",
    "original/consolidated.00.pth": "the same weights",
    "optimizer.pt": "of training",
    "checkpoint-1/model.safetensors": "former weights",
    ".cache/huggingface/model.safetensors.metadata": "when",
    ".cache/model.safetensors": "a part of a download",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_decides_what_a_model_computes_changes_its_digest(name, tmp_path):
    folder = write(tmp_path / "model", FILES)
    first = digest_of_folder(str(folder))
    (folder / name).write_text("other")
    second = digest_of_folder(str(folder))
    (folder / name).unlink()
    assert len({first, second, digest_of_folder(str(folder))}) == 3


def test_files_exchanged_between_folders_change_the_digest(tmp_path):
    names = ("encoder/model.safetensors", "decoder/model.safetensors")
    of = [write(tmp_path / str(i), dict(zip(names, order, strict=True))) for i, order in enumerate(("ab", "ba"))]
    assert len({digest_of_folder(str(folder)) for folder in of}) == 2


def test_the_digest_depends_on_nothing_else(tmp_path):
    one, other = write(tmp_path / "one", FILES), write(tmp_path / "other", FILES | OTHERS)
    (other / "above").symlink_to(tmp_path)
    (other / "nothing.bin").symlink_to(tmp_path / "nowhere")
    assert digest_of_folder(str(one)) == digest_of_folder(str(other))


def test_folders_and_files_behind_links_belong_to_the_model(tmp_path):
    folder = write(tmp_path / "model", FILES)
    first = digest_of_folder(str(folder))
    shutil.move(folder / "encoder", tmp_path / "encoder")
    assert digest_of_folder(str(folder)) != first
    (folder / "encoder").symlink_to(tmp_path / "encoder")
    assert digest_of_folder(str(folder)) == first
    write(tmp_path, {"encoder/model.safetensors": "others"})
    assert digest_of_folder(str(folder)) != first


def test_a_folder_without_weights_has_no_digest(tmp_path):
    assert digest_of_folder(str(write(tmp_path, {"config.json": "{}", "modeling.py": "code"}))) is None
    assert digest_of_folder(str(tmp_path / "none")) is None


# --- vLLM


def engine(model: str | Path, load_format: str = "auto", commit: str | None = None, **settings):
    """What the connectors read of a VllmConfig."""
    text = SimpleNamespace(rope_parameters={"rope_theta": 1e4}, max_position_embeddings=64, _commit_hash=commit)
    extra = settings.pop("model_loader_extra_config", {})
    model_config = {
        "model": str(model),
        "model_weights": "",
        "hf_config_path": None,
        "hf_overrides": {},
        "revision": None,
        "code_revision": None,
        "hf_config": text,
        "hf_text_config": text,
        "quantization": None,
        "quantization_config": None,
        "dtype": torch.bfloat16,
        "multimodal_config": None,
        "seed": 0,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**model_config | settings),
        load_config=SimpleNamespace(load_format=load_format, model_loader_extra_config=extra),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        speculative_config=None,
    )


def roots(config, weights=None) -> tuple[bytes, bytes]:
    return (
        identity.namespace_of(config, ["bfloat16"], weights).root(),
        identity.encoder_namespace_of(config, weights).root(),
    )


def formats(version: str) -> set[str]:
    """All values of load_format that vLLM declares."""
    spec = importlib.util.find_spec("vllm")
    if (spec is None or spec.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ:
        pytest.skip("no vLLM (tests/vllm/requirements*.txt)")
    package = Path(sys.prefix) / "vllm-0.33" / "vllm" if version == "0.33" else Path(spec.origin).parent
    source = (package / "model_executor" / "model_loader" / "__init__.py").read_text()
    (names,) = [
        node.value.slice
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LoadFormats"
    ]
    return set(ast.literal_eval(names))


@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_every_format_reads_the_model_or_needs_a_name(version, tmp_path):
    folder, known = write(tmp_path, FILES), formats(version)
    assert set(VLLM_FROM_THE_MODEL) < known
    read = {roots(engine(folder, load_format)) for load_format in VLLM_FROM_THE_MODEL}
    assert len(read) == 1  # the same files are the same weights
    assert roots(engine(folder, "dummy")) not in read
    elsewhere = known - {*VLLM_FROM_THE_MODEL, "dummy"}
    assert elsewhere == {"ipc_cache", "modelexpress", "npcache", "tensorizer"}
    for load_format in (*elsewhere, "of a plugin"):
        with pytest.raises(ValueError, match=f'load_format {load_format}; name them with "weights": "NAME"'):
            roots(engine(folder, load_format))
        assert roots(engine(folder, load_format), "named") not in read


@pytest.mark.parametrize("weights", [None, "named"])
def test_what_changes_vllms_weights_is_in_the_key(weights, tmp_path):
    folder = write(tmp_path, FILES)
    changes = [
        {},
        {"model_loader_extra_config": {"pattern": "one-{rank}-{part}.safetensors"}},
        {"model_loader_extra_config": {"pattern": "two-{rank}-{part}.safetensors"}},
        {"code_revision": "a"},
        {"code_revision": "b"},
        {"hf_overrides": {"rope_theta": 7}},
        {"quantization": "online"},
        {"quantization": "online", "quantization_config": {"linear": "fp8_per_channel"}},
        *([{"hf_config_path": "/another"}] if weights else []),
    ]
    found = [roots(engine(folder, "sharded_state", **change), weights) for change in changes]
    for of_one_kind in zip(*found, strict=True):
        assert len(set(of_one_kind)) == len(changes)


def test_a_tensorized_model_is_named_by_the_user_and_its_place(tmp_path):
    found = set()
    for uri in ("s3://one", "s3://two"):
        config = engine(
            tmp_path, "tensorizer", model_loader_extra_config={"tensorizer_config": {"tensorizer_uri": uri}}
        )
        found.add(roots(config, "named"))
    assert len(found) == 2


@pytest.mark.parametrize("setting", ["model_weights", "hf_config_path"])
def test_parts_of_another_model_need_a_name(setting, tmp_path):
    folder = write(tmp_path, FILES)
    with pytest.raises(ValueError, match=f'{setting} s3://bucket/other; name them with "weights": "NAME"'):
        roots(engine(folder, **{setting: "s3://bucket/other"}))
    roots(engine(folder, **{setting: "s3://bucket/other"}), "named")
    assert roots(engine(folder, hf_config_path=str(folder)))


@pytest.mark.parametrize("field", ["audio_model_id", "text_model_id"])
def test_models_that_load_another_model_of_the_hub_need_a_name(field, tmp_path):
    config = engine(write(tmp_path, FILES))
    setattr(config.model_config.hf_config, field, "owner/other")
    with pytest.raises(ValueError, match=f'{field} owner/other; name them with "weights": "NAME"'):
        roots(config)
    roots(config, "named")


def test_scales_of_an_encoder_are_known_by_their_content(tmp_path):
    folder, scales, found = write(tmp_path / "model", FILES), tmp_path / "scales.json", set()
    for content in ("one", "two"):
        scales.write_text(content)
        settings = SimpleNamespace(mm_encoder_fp8_scale_path=str(scales))
        found.add(roots(engine(folder, multimodal_config=settings))[1])
    assert len(found) == 2


def test_a_model_of_the_hub_is_named_by_its_commit(tmp_path):
    hub = pytest.importorskip("huggingface_hub").HfApi()
    commits, resolved = ["1" * 40, "2" * 40], []
    for commit in commits:
        write(tmp_path / "models--owner--model", {"refs/main": commit, f"snapshots/{commit}/config.json": "{}"})
        # As vLLM does, and keeps it.
        resolved.append(hub.resolve_revision("owner/model", cache_dir=tmp_path, local_files_only=True))
    named = [roots(engine("owner/model", revision=revision)) for revision in (*commits, *resolved)]
    named += [roots(engine("owner/model", commit=commit)) for commit in commits]  # as transformers 5.16 tells it
    assert named == named[:2] * 3
    assert named[0] != named[1]
    for revision in (None, "main", "1" * 39):
        with pytest.raises(ValueError, match="neither files nor a commit identify the weights of 'owner/model'"):
            roots(engine("owner/model", revision=revision))


def test_a_folder_is_not_named_by_a_commit(tmp_path):
    folder = write(tmp_path, {"config.json": "{}"})
    with pytest.raises(ValueError, match="neither files nor a commit"):
        roots(engine(folder, commit="1" * 40, revision="1" * 40))
