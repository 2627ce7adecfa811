"""The whole demo, its answers to wrong usage, and its inference loop against transformers' generate()."""

# ruff: noqa: E402  the imports follow the check for installed packages

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import uuid

import pytest
import torch

for package in ("transformers", "torchvision", "skimage", "rich"):
    pytest.importorskip(package, reason=f"the demo needs {package}: pip install -e '.[demo]'")

import PIL.Image
import skimage.data
import transformers

import demo
import questions
import tiny_qwen2_vl
from lmcache_mm.secret import Seal
from lmcache_mm.stores import open_store, slab_directory
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.peers.server import Server
from paged_qwen2_vl import PagedQwen2VL, Request

FIRST, AGAIN, OTHER_IMAGE, OTHER_QUESTION, TEXT_BEFORE, TEXT, TEXT_AGAIN, THIRD_IMAGE = range(8)
IMAGE_TOKENS = 1024
TOKENS_BEFORE_IMAGE = 7  # <|im_start|>, "user\n" byte by byte, <|vision_start|>


def run_demo(*options):
    return demo.main([str(option) for option in options])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Exit status, report and output of one run with only the option --json."""
    file = tmp_path_factory.mktemp("demo") / "rows.json"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = run_demo("--json", file)
    return status, json.loads(file.read_text()), output.getvalue()


@pytest.fixture(scope="module")
def rows(outcome):
    return outcome[1]["rows"]


@pytest.fixture(scope="module")
def raw_id_rows(outcome):
    return outcome[1]["raw_id_rows"]


def test_the_demo_succeeds_and_prints_its_tables_where_there_is_no_terminal(outcome):
    status, _, output = outcome
    assert status == 0
    assert "Keys from content" in output
    assert "Keys from raw token ids" in output
    assert "astronaut: the same again" in output
    assert re.search(r"1 hit, [0-9.]+ ms (saved|lost)", output)


def test_the_report_has_eight_rows_of_either_kind_with_the_documented_fields(outcome):
    report = outcome[1]
    assert list(report) == ["rows", "raw_id_rows"]
    for row in report["rows"] + report["raw_id_rows"]:
        assert list(row) == [
            *("query", "total_tokens", "kv_hits", "hit_rate", "encoder_hits", "encoder_saved_s", "ttft_s", "equal")
        ]
        assert row["hit_rate"] == row["kv_hits"] / row["total_tokens"]
        assert row["ttft_s"] > 0
    assert [row["query"] for row in report["rows"]] == [row["query"] for row in report["raw_id_rows"]]
    assert len(report["rows"]) == 8


def test_the_first_question_hits_nothing(rows):
    assert rows[FIRST]["kv_hits"] == 0


def test_the_same_question_again_hits_all_but_its_last_token(rows):
    assert rows[AGAIN]["kv_hits"] == rows[AGAIN]["total_tokens"] - 1


@pytest.mark.parametrize("row", [OTHER_IMAGE, THIRD_IMAGE])
def test_the_same_text_about_another_image_hits_nothing(rows, row):
    assert rows[row]["total_tokens"] == rows[FIRST]["total_tokens"]
    assert rows[row]["kv_hits"] == 0


def test_another_question_about_the_first_image_hits_everything_up_to_the_end_of_the_image(rows):
    assert rows[OTHER_QUESTION]["kv_hits"] == TOKENS_BEFORE_IMAGE + IMAGE_TOKENS


def test_other_text_before_the_first_image_hits_nothing(rows):
    assert rows[TEXT_BEFORE]["kv_hits"] == 0


def test_the_first_image_is_not_encoded_again_behind_other_text(rows, raw_id_rows):
    """Images that KV covers need no encoder, and all other rows show an image or a text for the first time."""
    assert [row["encoder_hits"] for row in rows] == [row == TEXT_BEFORE for row in range(8)]
    assert rows[TEXT_BEFORE]["equal"]
    assert all((row["encoder_saved_s"] != 0) == row["encoder_hits"] for row in rows)
    assert not any(row["encoder_hits"] for row in raw_id_rows)


def test_a_text_of_several_chunks_hits_all_but_its_last_token_the_second_time(rows):
    assert rows[TEXT]["total_tokens"] > 2 * demo.CHUNK_TOKENS
    assert rows[TEXT]["kv_hits"] == 0
    assert rows[TEXT_AGAIN]["kv_hits"] == rows[TEXT]["total_tokens"] - 1


def test_every_answer_equals_the_one_computed_without_a_cache(rows):
    assert all(row["equal"] for row in rows)


def test_raw_token_ids_answer_a_question_about_one_image_with_another(raw_id_rows):
    assert raw_id_rows[OTHER_IMAGE]["kv_hits"] == raw_id_rows[OTHER_IMAGE]["total_tokens"] - 1
    assert not raw_id_rows[OTHER_IMAGE]["equal"]


def test_raw_token_ids_do_no_harm_where_nothing_can_be_confused(raw_id_rows):
    assert all(raw_id_rows[row]["equal"] for row in (FIRST, AGAIN, OTHER_QUESTION, TEXT_BEFORE, TEXT, TEXT_AGAIN))


def test_in_bfloat16_the_restored_kv_is_bitwise_the_prompts_own(tmp_path, capsys):
    assert run_demo("--dtype", "bfloat16", "--image-size", 224, "--json", tmp_path / "rows.json") == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["rows"][OTHER_QUESTION]["kv_hits"] == TOKENS_BEFORE_IMAGE + 64
    assert "bfloat16" in capsys.readouterr().out


def test_images_of_ones_own_are_named_by_their_files(tmp_path, capsys):
    files = [tmp_path / "[red] a.png", tmp_path / "b.jpg"]
    for file, pixels in zip(files, (skimage.data.rocket(), skimage.data.camera()), strict=True):
        PIL.Image.fromarray(pixels).save(file)
    assert run_demo("--image", *files, "--image-size", 224, "--max-new-tokens", 4) == 0
    output = capsys.readouterr().out
    assert "[red] a.png: another question" in output
    assert "b.jpg: the same text" in output


def test_a_second_process_starts_warm_from_the_store_of_the_first(tmp_path):
    command = [sys.executable, demo.__file__, "--image-size", "196", "--max-new-tokens", "2"]
    store = f"file://{tmp_path}/store?capacity=64MiB"
    hits = []
    for run in ("first", "second"):
        report = tmp_path / f"{run}.json"
        subprocess.run([*command, "--store", store, "--json", report], check=True, capture_output=True, timeout=300)
        rows = json.loads(report.read_text())
        assert all(row["equal"] for row in rows["rows"])
        assert rows["raw_id_rows"][0]["kv_hits"] == 0  # raw token ids never touch the store
        hits.append([row["total_tokens"] - row["kv_hits"] for row in rows["rows"]])
    assert hits[0][0] > 1
    assert hits[1] == [1] * 8


def test_a_second_host_starts_warm_from_the_store_of_the_first(tmp_path, monkeypatch):
    """Two hosts: processes with separate stores, where the second reads the first's over the network."""
    monkeypatch.setenv("LMCACHE_MM_SECRET", "a secret of two hosts")
    one, other = (f"shm:///test-{uuid.uuid4().hex}?capacity=64MiB" for _ in range(2))
    sizes = ["--image-size", "196", "--max-new-tokens", "2", "--json", tmp_path / "rows.json"]
    try:
        with contextlib.closing(open_store(one)) as lent, contextlib.redirect_stdout(io.StringIO()):
            assert run_demo(*sizes, "--store", one) == 0
            seal = Seal.of_deployment("test")
            with contextlib.closing(Server(lent, ("127.0.0.1", 0), seal, None)) as server:
                peer = f"peer://127.0.0.1:{server.address[1]}?timeout=20"
                command = [sys.executable, demo.__file__, *sizes, "--store", f"tiered:{other},{peer}"]
                subprocess.run(command, check=True, capture_output=True, timeout=300)
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert all(row["equal"] for row in rows)
        assert [row["total_tokens"] - row["kv_hits"] for row in rows] == [1] * 8
    finally:
        for url in (one, other):
            slab.remove(slab_directory(url)[1])


def test_the_exit_status_is_1_if_identifiers_do_not_tell_images_apart(monkeypatch, capsys):
    monkeypatch.setattr(questions, "_identifier", lambda image: "an image")
    assert run_demo("--image-size", 224) == 1
    assert "2 of 8 answers differ" in capsys.readouterr().out


def test_the_exit_status_is_1_if_a_restored_token_is_wrong_in_one_place(monkeypatch):
    read_kv = PagedQwen2VL.read_kv

    def damaged(self, block_ids, tokens):
        kv = read_kv(self, block_ids, tokens)
        if not damaged.done and tokens == TOKENS_BEFORE_IMAGE + 64:
            damaged.done = True
            kv[2, 1, 5] = kv[2, 1, 6]
        return kv

    damaged.done = False
    monkeypatch.setattr(PagedQwen2VL, "read_kv", damaged)
    assert run_demo("--image-size", 224) == 1


def test_wrong_usage_is_answered_by_status_2_and_what_was_expected(tmp_path, capsys):
    no_image, no_model, other_model = tmp_path / "bad.jpg", tmp_path / "model", tmp_path / "other"
    no_image.write_text("no image")
    no_model.mkdir()
    other_model.mkdir()
    (other_model / "config.json").write_text('{"model_type": "llama"}')
    for options, expected in [
        (["--image", no_image], "expected two files or more, got 1"),
        (["--image", no_image, no_image], "cannot read"),
        (["--image", tmp_path / "none.jpg", no_image], "none.jpg"),
        (["--store", "nix"], "--store: store: expected a URL that begins with"),
        (["--store", "mem://?capacity=64KiB"], "expected a capacity of at least a chunk's"),
        (["--device", "tpu"], "expected cpu, cuda or cuda:N, got tpu"),
        (["--model", tmp_path / "none"], "expected a directory or a hub id"),
        (["--model", no_model], "no model configuration"),
        (["--model", other_model], "expected a model of type qwen2_vl"),
        (["--random-weights", "qwen2-vl-3b"], "expected one of qwen2-vl-2b"),
        (["--random-weights", no_image], "no model configuration"),
        (["--json", tmp_path / "none" / "rows.json"], "--json"),
    ]:
        assert run_demo(*options) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("demo.py: --")
        assert expected in complaint


def test_a_checkpoint_whose_weights_cannot_be_read_is_named(tmp_path, capsys):
    tiny_qwen2_vl.write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert run_demo("--model", tmp_path) == 2
    assert f"--model: cannot load {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--max-new-tokens", "0"], ["--image-size", "x"], ["--model", "a", "--random-weights", "b"]]
)
def test_options_that_make_no_sense_end_in_usage(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_demo(*options)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none_is_a_clear_error(capsys):
    assert run_demo("--device", "cuda") == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert run_demo() == 2
    complaint = capsys.readouterr().err
    assert "skimage" in complaint
    assert "pip install -e '.[demo]'" in complaint


class Fixture:
    """The tiny model in its loop, and two small images."""

    def __init__(self):
        config = tiny_qwen2_vl.shape("tiny")
        self.processor = tiny_qwen2_vl.build_processor(config)
        self.model = tiny_qwen2_vl.build_model(config, torch.device("cpu"), torch.float32)
        self.loop = PagedQwen2VL(self.model, num_pages=100)
        self.images = [
            PIL.Image.fromarray(pixels).resize((224, 168))
            for pixels in (skimage.data.astronaut(), skimage.data.coffee())
        ]

    def request(self, *parts):
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        return Request(dict(inputs), self.model.config.image_token_id, merge_size=2)

    def expected(self, request):
        output = self.model.generate(**request.inputs, max_new_tokens=8, do_sample=False)
        return output[0, len(request.token_ids) :].tolist()

    @contextlib.contextmanager
    def pages(self, request):
        block_ids = self.loop.allocate(len(request.token_ids) + 8)
        self.loop.poison(block_ids)
        yield block_ids
        self.loop.free(block_ids)

    @contextlib.contextmanager
    def encoded_patches(self):
        """Records the number of patches of each image that the vision encoder gets meanwhile."""
        seen = []
        hook = self.model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        yield seen
        hook.remove()


@pytest.fixture(scope="module")
def tiny():
    return Fixture()


def test_the_loop_answers_as_transformers_does(tiny):
    first, second = tiny.images
    for parts in [("Hello",), (first, "What is it?"), ("Look: ", first, " and ", second, " differ how?")]:
        request = tiny.request(*parts)
        with tiny.pages(request) as block_ids:
            assert list(tiny.loop.generate(request, block_ids, 0, 8)) == tiny.expected(request)


def test_the_answer_depends_on_the_image(tiny):
    first, second = (tiny.expected(tiny.request(image, "What is it?")) for image in tiny.images)
    assert first != second


def test_prefill_can_start_at_any_token_whose_predecessors_have_kv(tiny):
    request = tiny.request("Look: ", tiny.images[0], " and ", tiny.images[1], " differ how?")
    first, second = request.images
    n = len(request.token_ids)
    with tiny.pages(request) as block_ids:
        list(tiny.loop.generate(request, block_ids, 0, 1))
        own = tiny.loop.read_kv(block_ids, n)
        starts = {
            1,
            15,
            16,
            17,
            first.offset,
            first.offset + 1,
            first.end - 1,
            first.end,
            second.offset + 20,
            second.end,
        }
        for start in sorted(starts | {n - 1}):
            # Old KV of the tokens from start on must not be needed.
            tiny.loop.poison(block_ids)
            for pages, kv in zip(tiny.loop.kv_caches, own, strict=True):
                for token in range(start):
                    pages[block_ids[token // 16], :, token % 16] = kv[:, token]
            assert list(tiny.loop.generate(request, block_ids, start, 8)) == tiny.expected(request), start


def test_the_vision_encoder_sees_only_images_with_tokens_to_compute(tiny):
    request = tiny.request(tiny.images[0], " and ", tiny.images[1], " differ how?")
    first, second = request.images
    patches = 16 * 12
    with tiny.pages(request) as block_ids:
        list(tiny.loop.generate(request, block_ids, 0, 1))
        for start, expected in [
            (0, [patches, patches]),
            (first.end - 1, [patches, patches]),
            (first.end, [patches]),
            (second.end - 1, [patches]),
            (second.end, []),
        ]:
            with tiny.encoded_patches() as seen:
                list(tiny.loop.generate(request, block_ids, start, 1))
            assert seen == expected, start


def test_a_request_writes_no_page_but_its_own(tiny):
    request = tiny.request(tiny.images[0], "What is it?")
    with tiny.pages(request) as block_ids:
        others = [page for page in range(100) if page not in block_ids]
        before = [pages[others].clone() for pages in tiny.loop.kv_caches]
        list(tiny.loop.generate(request, block_ids, 0, 8))
        for pages, copy in zip(tiny.loop.kv_caches, before, strict=True):
            assert torch.equal(pages[others].view(torch.int32), copy.view(torch.int32))
        assert block_ids != list(range(block_ids[0], block_ids[0] + len(block_ids)))


def test_the_loop_refuses_a_start_outside_the_prompt_and_more_tokens_than_it_has_pages(tiny):
    request = tiny.request("Hello")
    with tiny.pages(request) as block_ids:
        for start in (-1, len(request.token_ids)):
            with pytest.raises(ValueError, match="start: expected 0 to"):
                next(tiny.loop.generate(request, block_ids, start, 1))
    with pytest.raises(ValueError, match="tokens: expected at most 1600, got 1601"):
        tiny.loop.allocate(1601)


def test_a_tokens_kv_counts_as_written_if_no_layer_holds_nan_or_only_zeros(tiny):
    loop = tiny.loop
    block_ids = loop.allocate(48)
    loop.poison(block_ids)
    for pages in loop.kv_caches:
        pages[block_ids[:2]] = 1
        pages[block_ids[1], :, 3:] = 0  # like a partly filled page after a restore
    assert loop.count_written(block_ids, 48) == 19
    loop.kv_caches[2][block_ids[0], 1, 4, 0, 7] = float("nan")
    assert loop.count_written(block_ids, 48) == 18
    loop.free(block_ids)


def test_the_tiny_checkpoint_is_the_same_each_time_it_is_written(tmp_path):
    for name in ("a", "b"):
        tiny_qwen2_vl.write_checkpoint(tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_built_in_shape_has_the_kv_heads_of_the_published_checkpoint():
    text = tiny_qwen2_vl.shape("qwen2-vl-2b").text_config
    assert (text.num_hidden_layers, text.num_key_value_heads, text.hidden_size // text.num_attention_heads) == (
        28,
        2,
        128,
    )
    assert isinstance(tiny_qwen2_vl.shape("qwen2-vl-7b"), transformers.Qwen2VLConfig)
    with pytest.raises(KeyError):
        tiny_qwen2_vl.shape("qwen2-vl-3b")
