"""The model against actions that LeRobot 0.6.1 computed from the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.model import Pi05

GOLDEN = Path(__file__).parents[1] / "golden" / "pi05_tiny_golden.safetensors"

CONFIG = Pi05Config(
    image_size=28,
    vision_width=48,
    vision_mlp=96,
    vision_depth=2,
    vision_heads=4,
    vocab_size=512,
    prefix_width=64,
    prefix_mlp=128,
    expert_width=32,
    expert_mlp=64,
    depth=3,
    head_dim=16,
    horizon=10,
    max_prompt_tokens=24,
)

# LeRobot's names to halfpi's, applied in this order.
RENAMES = {
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.": "vision.",
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "vision.",
    "paligemma_with_expert.paligemma.model.multi_modal_projector.linear": "vision.projector",
    "paligemma_with_expert.paligemma.model.language_model.": "prefix.",
    "paligemma_with_expert.gemma_expert.model.": "expert.",
    "embeddings.patch_embedding": "patch_embed",
    "embeddings.position_embedding.weight": "position_embed",
    "post_layernorm": "norm",
    "embed_tokens": "embed",
    "layer_norm1": "attn_norm",
    "layer_norm2": "mlp_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.out_proj": "attn.o",
    "self_attn": "attn",
    "action_in_proj": "action_in",
    "action_out_proj": "action_out",
    "_proj.": ".",
}


def _rename(name: str) -> str:
    for theirs, ours in RENAMES.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def model(golden: dict[str, Tensor]) -> Pi05:
    weights = {_rename(key[2:]): value for key, value in golden.items() if key.startswith("w.")}
    model = Pi05(CONFIG)
    outcome = model.load_state_dict(weights, strict=False)
    assert outcome.missing_keys == []
    last = f"prefix.layers.{CONFIG.depth - 1}."
    assert set(outcome.unexpected_keys) == {
        "paligemma_with_expert.paligemma.lm_head.weight",
        "prefix.norm.weight",
        *(last + name for name in ("attn.q.weight", "attn.o.weight", "mlp_norm.weight")),
        *(last + f"mlp.{name}.weight" for name in ("gate", "up", "down")),
    }
    return model


@pytest.fixture(scope="module")
def inputs(golden: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "images": torch.stack([golden[f"in.image{i}"] for i in range(3)], 1),
        "image_mask": torch.stack([golden[f"in.image_mask{i}"] for i in range(3)], 1),
        "tokens": golden["in.tokens"],
        "token_mask": golden["in.token_mask"],
        "noise": golden["in.noise"],
    }


def test_fp32_matches_lerobot(
    model: Pi05, inputs: dict[str, Any], golden: dict[str, Tensor]
) -> None:
    actions = model.sample_actions(**inputs)
    torch.testing.assert_close(actions, golden["out.actions"], atol=1e-5, rtol=0)


def test_bf16_is_close_to_lerobot_fp32(
    model: Pi05, inputs: dict[str, Any], golden: dict[str, Tensor]
) -> None:
    actions = model.to_dtype(torch.bfloat16).sample_actions(**inputs)
    assert actions.dtype == torch.float32
    torch.testing.assert_close(actions, golden["out.actions"], atol=3e-2, rtol=0)
