"""The small models that the engines run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import tiny_qwen2_vl


def folder() -> Path:
    """The folder with the models, as the process's arguments name it."""
    return Path(sys.argv[2])


def make_models() -> dict[str, Any]:
    tiny_qwen2_vl.write_checkpoint(folder() / "vlm")
    processor = tiny_qwen2_vl.build_processor(tiny_qwen2_vl.shape("tiny"))
    torch.manual_seed(0)
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    end = processor.tokenizer.eos_token_id
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3TextConfig(
        **shape,
        vocab_size=320,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=layers,
        sliding_window=64,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,
    )
    model = Gemma3ForCausalLM(config).float().eval()
    with torch.no_grad():  # so that attention decides the answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 3.0 if "o_proj" in name or "v_proj" in name else 1.0
                weight.normal_(0, 0.05 if "embed" in name else gain * weight.shape[1] ** -0.5)
            elif "post_attention_layernorm" in name:
                weight.fill_(2.0)
    model.save_pretrained(folder() / "swa")
    processor.tokenizer.save_pretrained(folder() / "swa")
    common = {"vocab_size": 320, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)}
    common |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "tie_word_embeddings": False}
    for name, hybrid in hybrids(common).items():
        hybrid.float().eval()
        with torch.no_grad():
            for key, weight in hybrid.named_parameters():
                if weight.ndim == 2:
                    weight.normal_(0, 0.05 if "embed" in key else 2.0 * weight.shape[1] ** -0.5)
        hybrid.save_pretrained(folder() / name)
        processor.tokenizer.save_pretrained(folder() / name)
    make_vision_model_with_states(processor.tokenizer)
    return {}


def make_vision_model_with_states(tokenizer: Any) -> None:
    """A small Qwen3.5: a vision tower, full attention, and Gated DeltaNet."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    patches = {"patch_size": 14, "temporal_patch_size": 2}
    config = Qwen3_5Config(
        **{field: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for field, token in names.items()},
        text_config={
            **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256},
            **{"linear_num_value_heads": 1, "linear_num_key_heads": 1},
            **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
                **{"mrope_section": [11, 11, 10], "mrope_interleaved": True},
            },
        },
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
            **{"num_position_embeddings": 256, "spatial_merge_size": 2, **patches},
        },
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # so that the picture decides the answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.0 if "embed_tokens" in name else 2.0 * weight[0].numel() ** -0.5)
    model.save_pretrained(folder() / "qwen3_5")
    limits = {"shortest_edge": tiny_qwen2_vl.MIN_PIXELS, "longest_edge": tiny_qwen2_vl.MAX_PIXELS}
    settings = {**patches, "merge_size": 2, "size": limits}
    images, videos = Qwen2VLImageProcessor(**settings), Qwen3VLVideoProcessor(**settings)
    template = tiny_qwen2_vl.CHAT_TEMPLATE
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=template).save_pretrained(folder() / "qwen3_5")


def hybrids(common: dict[str, Any]) -> dict[str, Any]:
    """Models whose layers keep a state beside attention: of short convolutions, of Gated DeltaNet, of Mamba2."""
    conv = {"block_auto_adjust_ff_dim": False, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0}
    conv |= {"conv_dim": 64, "block_dim": 64}  # as vLLM names them
    linear = {"linear_num_value_heads": 1, "linear_num_key_heads": 1}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    mamba = {"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_head": 32}
    return {
        "lfm2": Lfm2ForCausalLM(
            Lfm2Config(
                **common,
                **conv,
                num_hidden_layers=4,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"] * 2,
            )
        ),
        "qwen3next": Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **common,
                **linear,
                **experts,
                num_hidden_layers=4,
                num_key_value_heads=2,
                head_dim=256,
                shared_expert_intermediate_size=64,
                layer_types=["linear_attention", "full_attention"] * 2,
            )
        ),
        "granite": GraniteMoeHybridForCausalLM(
            GraniteMoeHybridConfig(
                **common,
                **mamba,
                num_hidden_layers=4,
                num_key_value_heads=1,
                mamba_n_heads=4,
                mamba_expand=2,
                num_local_experts=2,
                num_experts_per_tok=1,
                shared_intermediate_size=64,
                layer_types=["mamba", "attention"] * 2,
            )
        ),
        "falcon": FalconH1ForCausalLM(
            FalconH1Config(
                **common,
                **mamba,
                num_hidden_layers=2,
                num_key_value_heads=1,
                head_dim=32,
                mamba_d_ssm=64,
                mamba_n_heads=2,
            )
        ),
    }
