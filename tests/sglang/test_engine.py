"""An engine of SGLang's, from prompts to tokens; it takes a minute to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def test_an_engine_answers_from_the_store_as_it_did_before(tmp_path, url_of):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = Qwen2Config(**sizes, **heads, initializer_range=0.3)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    command = [sys.executable, Path(__file__).parent / "engine.py", tmp_path / "model", url_of("shm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    first, *others = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[[")]
    assert [cached for _, cached in first] == [None, None]
    answers = [tokens for tokens, _ in first]
    assert answers[0] != answers[1]  # so it is the first page that tells them apart
    assert len(others) == 2
    for run in others:
        assert [tokens for tokens, _ in run] == answers
        for _, cached in run:
            assert cached == {"device": 0, "host": 0, "storage": 96, "storage_backend": "HiCacheBackend"}
