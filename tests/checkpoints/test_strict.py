"""Nothing that does not fit loads: each wrong tensor, file and option is named in one error."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfpi.checkpoints import CheckpointError, convert, load_model, open_checkpoint

EditWeights = Callable[[Path, Callable[[dict[str, Tensor]], None]], None]
EditJson = Callable[[Path, Callable[[dict[str, Any]], None]], None]

EXPERT = "model.paligemma_with_expert.gemma_expert.model."
LANGUAGE = "model.paligemma_with_expert.paligemma.model.language_model."
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"


def fails(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(path, **{"vision_heads": 4, **options})


def test_missing_tensors_are_named(lerobot: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[EXPERT + "layers.1.mlp.up_proj.weight"]
        del weights[LANGUAGE + "layers.2.self_attn.v_proj.weight"]

    edit_weights(lerobot, change)
    fails(
        lerobot, "missing: prefix.layers.2.attn.v.weight, expert.layers.1.mlp.up.weight(?!.*unexp)"
    )


def test_a_list_of_missing_tensors_is_bounded(lerobot: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "gemma_expert.model.layers" in name]:
            del weights[name]

    edit_weights(lerobot, change)
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more") as caught:
        load_model(lerobot, vision_heads=4)
    assert len(str(caught.value)) < 2000


def test_unexpected_tensors_are_named(lerobot: Path, edit_weights: EditWeights) -> None:
    extra = "model.proprio_history_proj.weight"
    edit_weights(lerobot, lambda weights: weights.update({extra: torch.zeros(2)}))
    fails(lerobot, f"unexpected: {extra}")


def test_a_layer_too_many_is_unexpected(lerobot: Path, edit_weights: EditWeights) -> None:
    name = LANGUAGE + "layers.3.self_attn.q_proj.weight"
    edit_weights(lerobot, lambda weights: weights.update({name: torch.zeros(128, 64)}))
    fails(lerobot, f"unexpected: {name}")


@pytest.mark.parametrize("index", range(0, 104, 9))
def test_misshapen_tensors_are_named(lerobot: Path, edit_weights: EditWeights, index: int) -> None:
    names = [
        (name, stored.stored_as)
        for name, stored in open_checkpoint(lerobot, vision_heads=4).stored.items()
    ]
    name, stored_as = sorted(names)[index]

    def change(weights: dict[str, Tensor]) -> None:
        tensor = weights[stored_as]
        weights[stored_as] = torch.cat([tensor, tensor[:1]])

    edit_weights(lerobot, change)
    fails(lerobot, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_dtypes_that_are_no_weights(
    lerobot: Path, edit_weights: EditWeights, dtype: torch.dtype
) -> None:
    name = "model.time_mlp_in.weight"
    edit_weights(lerobot, lambda weights: weights.update({name: weights[name].to(dtype)}))
    fails(lerobot, rf"not fp32, fp16 or bf16: time_mlp_in.weight \(stored as {name}\) is {dtype}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(lerobot: Path, edit_weights: EditWeights, value: float) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["model.action_in_proj.weight"][3, 4] = value

    edit_weights(lerobot, change)
    fails(lerobot, "action_in.weight has NaN or infinite values")


def test_dtypes_may_differ_between_tensors(lerobot: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["model.time_mlp_in.weight"] = weights["model.time_mlp_in.weight"].half()
        weights[EXPERT + "norm.dense.bias"] = weights[EXPERT + "norm.dense.bias"].bfloat16()

    edit_weights(lerobot, change)
    model = load_model(lerobot, vision_heads=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    dtypes = open_checkpoint(lerobot, vision_heads=4).describe().dtypes
    assert dtypes == {"float32": 263248 - 1024 - 96, "float16": 1024, "bfloat16": 96}


def test_two_names_for_one_tensor(lerobot: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["time_mlp_in.weight"] = weights["model.time_mlp_in.weight"].clone()

    edit_weights(lerobot, change)
    fails(lerobot, r"time_mlp_in.weight twice: as (model\.)?time_mlp_in.weight and as (model\.)?t")


def test_the_token_table_is_preferred_to_the_head(lerobot: Path) -> None:
    checkpoint = open_checkpoint(lerobot, vision_heads=4)
    assert checkpoint.stored["prefix.embed.weight"].stored_as == LANGUAGE + "embed_tokens.weight"
    assert HEAD in checkpoint.unused


def test_the_token_table_may_be_stored_as_the_head(
    lerobot: Path, edit_weights: EditWeights
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[LANGUAGE + "embed_tokens.weight"]

    edit_weights(lerobot, change)
    checkpoint = open_checkpoint(lerobot, vision_heads=4)
    assert checkpoint.stored["prefix.embed.weight"].stored_as == HEAD
    assert HEAD not in checkpoint.unused


def test_unused_tensors_are_reported_and_may_be_absent(
    lerobot: Path, edit_weights: EditWeights
) -> None:
    unused = open_checkpoint(lerobot, vision_heads=4).unused
    assert {name.removeprefix(LANGUAGE) for name in unused} == {
        HEAD,
        "model.paligemma_with_expert.gemma_expert.lm_head.weight",
        "norm.weight",
        *(f"layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"layers.2.self_attn.{name}_proj.weight" for name in "qo"),
        "layers.2.post_attention_layernorm.weight",
    }

    def change(weights: dict[str, Tensor]) -> None:
        for name in unused:
            del weights[name]

    edit_weights(lerobot, change)
    assert open_checkpoint(lerobot, vision_heads=4).unused == ()


def test_leftovers_of_a_pi0_are_unused(lerobot: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for end in ("in", "out"):
            for leaf in ("weight", "bias"):
                tensor = weights.pop(f"model.time_mlp_{end}.{leaf}")
                weights[f"model.action_time_mlp_{end}.{leaf}"] = tensor
        weights["model.state_proj.weight"] = torch.zeros(32, 32)
        weights[EXPERT + "layers.0.input_layernorm.weight"] = torch.zeros(32)
        weights[EXPERT + "norm.weight"] = torch.zeros(32)

    before = load_model(lerobot, vision_heads=4).state_dict()
    edit_weights(lerobot, change)
    after = load_model(lerobot, vision_heads=4).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "model.state_proj.weight" in open_checkpoint(lerobot, vision_heads=4).unused


def test_pi0_is_refused(openpi_torch: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if ".dense." in name or "time_mlp" in name]:
            del weights[name]
        for layer in range(3):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"paligemma_with_expert.gemma_expert.model.layers.{layer}.{norm}.weight"
                weights[name] = torch.zeros(32)
        weights["action_time_mlp_in.weight"] = torch.zeros(32, 64)
        weights["state_proj.weight"] = torch.zeros(32, 32)

    edit_weights(openpi_torch, change)
    fails(openpi_torch, "holds π0, not π0.5")


def test_old_layouts_of_transformers(openpi_torch: Path, edit_weights: EditWeights) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            old = name.replace("paligemma.model.", "paligemma.")
            old = old.replace("language_model.", "language_model.model.")
            old = old.replace("paligemma.lm_head", "paligemma.language_model.lm_head")
            weights[old] = weights.pop(name)

    before = load_model(openpi_torch, vision_heads=4).state_dict()
    edit_weights(openpi_torch, change)
    after = load_model(openpi_torch, vision_heads=4).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_truncated_weights(lerobot: Path) -> None:
    path = lerobot / "model.safetensors"
    content = path.read_bytes()
    rng = random.Random(0)
    for length in [0, 7, 8, len(content) - 1, *rng.choices(range(len(content)), k=40)]:
        path.write_bytes(content[:length])
        fails(lerobot, r"model\.safetensors (is truncated|has a corrupt header)")


def test_flipped_bits_in_the_header(lerobot: Path) -> None:
    path = lerobot / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for bit in [*range(64), *rng.choices(range(8 * header), k=150)]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        fails(lerobot, ".")


@pytest.mark.parametrize("name", ["horizons", "dtype_", "image"])
def test_unknown_overrides_are_named(golden: Path, name: str) -> None:
    fails(golden / "lerobot_tiny_ckpt", f"Pi05Config has no field {name}", **{name: 3})


@pytest.mark.parametrize("value", ["10", 10.0, True, None])
def test_overrides_of_the_wrong_type(golden: Path, value: Any) -> None:
    fails(golden / "lerobot_tiny_ckpt", "horizon must be of type int, got", horizon=value)


@pytest.mark.parametrize(
    ("name", "value", "tensor"),
    [
        ("prefix_width", 65, r"prefix\.embed\.weight of shape \(512, 64\), which gives 64"),
        ("depth", 4, r"expert\.layers\.2"),
        ("vision_depth", 3, r"vision\.layers\.1"),
        ("image_size", 224, r"vision\.position_embed of shape \(4, 48\), .* 28 pixels"),
        ("head_dim", 32, r"prefix\.layers\.0\.attn\.k\.weight"),
        ("q_heads", 4, r"expert\.layers\.0\.attn\.q\.weight"),
        ("action_dim", 7, r"action_out\.bias of shape \(32,\), which gives 32"),
    ],
)
def test_overrides_that_contradict_a_shape(
    golden: Path, name: str, value: int, tensor: str
) -> None:
    fails(golden / "lerobot_tiny_ckpt", f"{name}={value} contradicts {tensor}", **{name: value})


def test_overrides_that_shapes_do_not_tell(golden: Path) -> None:
    config = open_checkpoint(
        golden / "lerobot_tiny_ckpt",
        vision_heads=6,
        kv_heads=2,
        horizon=3,
        max_prompt_tokens=48,
        time_max_period=5,
    ).config
    assert (config.vision_heads, config.kv_heads, config.head_dim, config.q_heads) == (6, 2, 8, 16)
    assert (config.horizon, config.max_prompt_tokens, config.time_max_period) == (3, 48, 5)


def test_impossible_head_counts(golden: Path) -> None:
    fails(golden / "lerobot_tiny_ckpt", "multiple of vision_heads", vision_heads=5)
    fails(golden / "lerobot_tiny_ckpt", "no multiple of kv_heads=3", kv_heads=3)
    fails(golden / "lerobot_tiny_ckpt", "kv_heads must be positive, got 0", kv_heads=0)


def test_vision_heads_must_be_given(golden: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .* pass vision_heads=…"):
        open_checkpoint(golden / "lerobot_tiny_ckpt")


def test_overrides_of_processing(golden: Path) -> None:
    path = golden / "lerobot_tiny_ckpt"

    def opened(**overrides: object) -> Any:
        return open_checkpoint(path, processing_overrides=overrides, vision_heads=4).processing

    assert opened(cameras=("a", "b")).cameras == ("a", "b")
    assert opened(prompt_state_dim=32, resize="interpolate-0.4").prompt_state_dim == 32
    for overrides, message in (
        ({"resizing": "pil"}, "ProcessingConfig has no field resizing"),
        ({"resize": "lanczos"}, "resize must be one of pil, .*got 'lanczos'"),
        ({"cameras": ("a", "a")}, "cameras must be different names"),
        ({"image_size": 224}, "image_size is 28 in the model, got 224"),
        ({"robot_action_dim": 0}, "robot_action_dim must be in"),
        ({"robot_action_dim": 8}, "action_stats have length 7, the robot has 8"),
        ({"delta_mask": (True,) * 8}, "delta_mask has 8 entries"),
        ({"delta_mask": 3}, "the processing does not fit"),
        ({"robot": "aloha"}, "state_stats have length 8, the robot has 14"),
        ({"action_norm": "mean_std"}, "action normalisation needs the statistic mean"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened(**overrides)


def test_paths_that_are_no_checkpoint(golden: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails(golden / "openpi_tiny_io.npz", "is a file; a checkpoint is a directory")
    (tmp_path / "30000").mkdir()
    fails(tmp_path, r"is no checkpoint: expected halfpi.json .*, found 30000")


@pytest.fixture
def own(golden: Path, tmp_path: Path) -> Path:
    """A checkpoint in halfpi's own format."""
    return convert(golden / "lerobot_tiny_ckpt", tmp_path / "own", vision_heads=4)


def test_own_format_needs_no_options(own: Path) -> None:
    assert open_checkpoint(own).config.vision_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "is of version 2; this halfpi reads 1"),
        (lambda data: data.pop("version"), "'version' must be of type int, got nothing"),
        (lambda data: data.update(model=3), "'model' must be of type dict, got 3"),
        (lambda data: data["model"].update(dept=3), "Pi05Config has no field dept"),
        (lambda data: data["model"].update(horizon="9"), "halfpi.json"),
        (lambda data: data["model"].update(horizon=9.5), "horizon must be of type int, got 9.5"),
        (lambda data: data["model"].update(depth=4), "depth=4 contradicts"),
        (lambda data: data["model"].update(prefix_width=32), "prefix_width=32 contradicts"),
        (lambda data: data["processing"].update(fps=3), "ProcessingConfig has no field fps"),
        (lambda data: data["processing"].update(robot="r2d2"), "robot must be one of"),
        (lambda data: data["processing"].update(image_size=3), "image_size is 28 in model, 3 in"),
        (
            lambda data: data["processing"]["state_stats"].update(q01=[float("nan")] * 8),
            "state_stats.q01 is not finite",
        ),
        (
            lambda data: data["processing"]["action_stats"]["q01"].pop(),
            "action_stats has statistics of unequal lengths: {'q01': 6, 'q99': 7}",
        ),
    ],
)
def test_broken_metadata_of_our_own(
    own: Path, edit_json: EditJson, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_json(own / "halfpi.json", change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(own)


def test_every_truncation_of_our_metadata(own: Path) -> None:
    path = own / "halfpi.json"
    text = path.read_text().rstrip()
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        with pytest.raises(CheckpointError, match=r"halfpi\.json is not readable JSON"):
            open_checkpoint(own)


def test_own_format_takes_no_foreign_names(own: Path, lerobot: Path) -> None:
    shutil.copy(lerobot / "model.safetensors", own)
    with pytest.raises(CheckpointError, match=r"missing: .*unexpected: model\."):
        open_checkpoint(own)
