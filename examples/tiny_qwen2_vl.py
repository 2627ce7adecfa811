"""Qwen2-VL models with random weights whose answers depend on the image, built without a download.

`python examples/tiny_qwen2_vl.py DIR` writes a tiny checkpoint (1.7 MB) that transformers and vLLM load like any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.initialization import no_init_weights

MIN_PIXELS = 56 * 56
MAX_PIXELS = 896 * 896  # 1024 vision tokens: a prompt about one image exceeds two chunks of 256 tokens

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = [END, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}<|vision_start|><|image_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Everything else is transformers' default for Qwen2-VL, as in the published checkpoints of these sizes.
_TEXT: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320},
    "qwen2-vl-2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "qwen2-vl-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
_TINY_VISION = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2}
BUILT_IN_SHAPES = sorted(_TEXT)

_ATTENTION_GAIN = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 3.0, "o_proj": 3.0}


def shape(name: str) -> Qwen2VLConfig:
    """The configuration of a built-in shape, one of `BUILT_IN_SHAPES`; KeyError for another name."""
    text = _TEXT[name]
    sixteenth = text["hidden_size"] // text["num_attention_heads"] // 16
    # A head's rotary pairs are split 2 : 3 : 3 between time, height and width.
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * sixteenth, 3 * sixteenth, 3 * sixteenth]}
    rest = {"rope_parameters": rope, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}
    vision = _TINY_VISION if name == "tiny" else {}
    return Qwen2VLConfig(text_config={**text, **rest}, vision_config={**vision, "hidden_size": text["hidden_size"]})


def build_processor(config: Qwen2VLConfig) -> Qwen2VLProcessor:
    """Makes a processor for `config`, and sets the special token ids of `config` to those of its tokenizer.

    The tokenizer has a token for each byte and one for each of Qwen2-VL's special tokens: it needs no vocabulary file.
    Images are resized to between 56² and 896² pixels.
    """
    byte_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(byte_letters)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token=END, pad_token=END, extra_special_tokens=SPECIAL_TOKENS[1:]
    )

    ids: Any = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config.image_token_id, config.video_token_id = ids[IMAGE_PAD], ids[VIDEO_PAD]
    config.vision_start_token_id, config.vision_end_token_id = ids[VISION_START], ids[VISION_END]
    text: Any = config.text_config
    vision: Any = config.vision_config
    text.bos_token_id = text.eos_token_id = ids[END]
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    config: Qwen2VLConfig, device: torch.device, dtype: torch.dtype, seed: int = 1
) -> Qwen2VLForConditionalGeneration:
    """A model of the shape `config` with random weights, made on `device` in `dtype`; the embeddings are untied.

    With the usual initialization every image gets the same answer, and comparing answers would prove nothing. Here
    each matrix preserves variance, attention is selective (q, k) and outweighs the residual stream (v, o): answers
    depend on the image. With tied embeddings answers would only repeat the last token.
    """
    text: Any = config.text_config
    config.tie_word_embeddings = text.tie_word_embeddings = False
    with torch.device(device), no_init_weights():
        model: Qwen2VLForConditionalGeneration = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                weight.normal_(generator=generator)
            else:
                gain = _ATTENTION_GAIN.get(name.removesuffix(".weight").rpartition(".")[2], 1.0)
                weight.normal_(std=gain * weight[0].numel() ** -0.5, generator=generator)
    model.eval()
    return model


def write_checkpoint(directory: Path, seed: int = 1) -> None:
    """Writes the tiny model (float32, 4 layers) with its processor into `directory`, which it creates if missing."""
    config = shape("tiny")
    processor = build_processor(config)
    build_model(config, torch.device("cpu"), torch.float32, seed).save_pretrained(directory)
    processor.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny Qwen2-VL checkpoint with random weights.")
    parser.add_argument("directory", type=Path)
    write_checkpoint(parser.parse_args().directory)
