"""Tensor names of openpi's torch checkpoints and of LeRobot's, which add `model.` in front.

The names are those of the transformers modules that both build on. Before 4.52 these had no
`model.` after `paligemma.` but one after `language_model.`; both layouts are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from halfpi.checkpoints.contents import StoredTensor, by_canonical_name

_SIGLIP = {
    "embeddings.patch_embedding": "patch_embed",
    "embeddings.position_embedding": "position_embed",
    "layer_norm1": "attn_norm",
    "layer_norm2": "mlp_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.o",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "post_layernorm": "norm",
}
_GEMMA = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "input_layernorm.dense": "attn_norm.dense",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_layernorm.dense": "mlp_norm.dense",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "norm": "norm",
    "norm.dense": "norm.dense",
}
# action_time_mlp is π0's name for it; LeRobot's loader accepts it for a π0.5 too.
_PROJECTIONS = {
    "action_in_proj": "action_in",
    "action_out_proj": "action_out",
    "time_mlp_in": "time_mlp_in",
    "time_mlp_out": "time_mlp_out",
    "action_time_mlp_in": "time_mlp_in",
    "action_time_mlp_out": "time_mlp_out",
    "state_proj": "state_proj",
}
_PALIGEMMA = r"paligemma_with_expert\.paligemma\.(?:model\.)?"
_EXPERT = r"paligemma_with_expert\.gemma_expert\."
_TREES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (_PALIGEMMA + r"vision_tower\.vision_model\.(?:encoder\.)?", "vision.", _SIGLIP),
    (_PALIGEMMA + r"multi_modal_projector\.", "vision.", {"linear": "projector"}),
    (_PALIGEMMA + r"(?:language_model\.)?(?=lm_head\.)", "prefix.", {"lm_head": "lm_head"}),
    (_PALIGEMMA + r"language_model\.(?:model\.)?", "prefix.", _GEMMA),
    (_EXPERT + r"model\.", "expert.", _GEMMA),
    (_EXPERT, "expert.", {"lm_head": "lm_head"}),
    ("", "", _PROJECTIONS),
)
_LEAF = re.compile(r"((?:layers\.\d+\.)?)(.+)(\.(?:weight|bias))")


def canonical_name(stored: str) -> str | None:
    """The canonical name of a tensor of openpi or LeRobot, or None if there is none."""
    name = stored.removeprefix("model.")
    for tree, prefix, modules in _TREES:
        head = re.match(tree, name)
        leaf = _LEAF.fullmatch(name, head.end()) if head else None
        if leaf and leaf[2] in modules:
            renamed = prefix + leaf[1] + modules[leaf[2]] + leaf[3]
            return "vision.position_embed" if renamed == "vision.position_embed.weight" else renamed
    return None


def torch_tensors(
    stored: Iterable[StoredTensor], source: object
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """`by_canonical_name` of theirs, where the tied token table may be stored as the LM head."""
    tensors, unknown = by_canonical_name(stored, canonical_name, source)
    if "prefix.embed.weight" not in tensors and "prefix.lm_head.weight" in tensors:
        tensors["prefix.embed.weight"] = tensors.pop("prefix.lm_head.weight")
    return tensors, unknown
