"""Whole observations to tensors and back, and into a small model."""

from __future__ import annotations

import dataclasses
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfpi.config import FeatureStats, Pi05Config, ProcessingConfig, ResizeRule
from halfpi.model import Pi05
from halfpi.processing import Processor, PromptTooLongError, Tokenizer, load_tokenizer
from halfpi.processing.images import to_model
from halfpi.types import Observation

# Halves and quarters, so that the state below falls on known bins.
STATS = FeatureStats(q01=(-2.0,) * 8, q99=(2.0,) * 8)
LIBERO = ProcessingConfig(
    image_size=28,
    norm_rule="lerobot",
    state_stats=STATS,
    robot="libero",
    robot_action_dim=7,
)
# Normalised by STATS this is what the golden prompt's bins are of.
STATE = np.array([0.0, -2.0, 2.0, -2.2, -1.0, 1.125, -1.89, -1.7], np.float32)
PROMPT = "Task: pick up the red cube, State: 128 0 255 -1 64 200 7 19;\nAction: "


def observation(state: Any = STATE, prompt: str | None = "pick up_the red cube\n") -> Observation:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Observation({"base_0_rgb": pixels, "left_wrist_0_rgb": pixels[::-1]}, state, prompt)


def test_inputs(table_tokenizer: Tokenizer, gemma_ids: dict[str, list[int]]) -> None:
    inputs = Processor(LIBERO, 32, table_tokenizer).inputs(observation())
    assert inputs.prepared.shape == (1, 3, 28, 28, 3)
    assert inputs.image_mask.tolist() == [[True, True, False]]
    assert inputs.tokens.shape == inputs.token_mask.shape == (1, 200)
    assert inputs.tokens.dtype == torch.int64
    assert inputs.token_mask.dtype == torch.bool
    assert inputs.tokens[inputs.token_mask].tolist() == [2, *gemma_ids[PROMPT]]


@pytest.mark.parametrize("resize", ["pil", "interpolate"])
def test_deferred_inputs_are_the_inputs(table_tokenizer: Tokenizer, resize: ResizeRule) -> None:
    processor = Processor(dataclasses.replace(LIBERO, resize=resize), 32, table_tokenizer)
    deferred, inputs = processor.deferred_inputs(observation()), processor.inputs(observation())
    assert torch.equal(deferred.image_mask, inputs.image_mask)
    assert deferred.places == inputs.places == inputs.image_mask[0].nonzero()[:, 0].tolist()
    assert torch.equal(deferred.tokens, inputs.tokens)
    assert torch.equal(deferred.token_mask, inputs.token_mask)
    if resize == "pil":  # as they came: the engine resizes
        came = observation().images
        assert deferred.images[2] is None
        for picture, name in zip(deferred.images[:2], LIBERO.cameras[:2], strict=True):
            assert np.array_equal(picture, came[name])
    else:
        assert torch.equal(deferred.prepared, inputs.prepared)


def test_a_deferred_prompt_is_at_fault_when_it_is_read(table_tokenizer: Tokenizer) -> None:
    deferred = Processor(LIBERO, 32, table_tokenizer).deferred_inputs(observation(prompt=" "))
    assert deferred.image_mask.any()
    with pytest.raises(ValueError, match="the prompt is empty"):
        _ = deferred.tokens


def test_state_is_left_out_of_the_prompt(table_tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(LIBERO, state_in_prompt=False)
    inputs = Processor(config, 32, table_tokenizer).inputs(observation())
    assert inputs.tokens[inputs.token_mask][-1] == 108


def test_lerobot_0_4_pads_the_state_in_the_prompt(
    table_tokenizer: Tokenizer, gemma_ids: dict[str, list[int]]
) -> None:
    config = dataclasses.replace(LIBERO, prompt_state_dim=32)
    inputs = Processor(config, 32, table_tokenizer).inputs(observation(np.zeros(8, np.float32)))
    text = f"Task: pick up the red cube, State: {' '.join(['128'] * 32)};\nAction: "
    assert inputs.tokens[inputs.token_mask].tolist() == [2, *gemma_ids[text]]
    short = dataclasses.replace(LIBERO, prompt_state_dim=7)
    with pytest.raises(ValueError, match="prompt_state_dim is 7, but the state has 8 values"):
        Processor(short, 32, table_tokenizer).inputs(observation())


def test_default_prompt(table_tokenizer: Tokenizer, gemma_ids: dict[str, list[int]]) -> None:
    config = dataclasses.replace(LIBERO, default_prompt="pick up the red cube")
    processor = Processor(config, 32, table_tokenizer)
    for prompt in (None, " \n"):
        inputs = processor.inputs(observation(prompt=prompt))
        assert inputs.tokens[inputs.token_mask].tolist() == [2, *gemma_ids[PROMPT]]
        with pytest.raises(ValueError, match="the prompt is empty"):
            Processor(LIBERO, 32, table_tokenizer).inputs(observation(prompt=prompt))


def test_prompt_too_long(table_tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(LIBERO, max_prompt_tokens=20)
    with pytest.raises(PromptTooLongError, match="the limit is 20"):
        Processor(config, 32, table_tokenizer).inputs(observation())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.zeros(7, np.float32), r"state must be \(8,\), got \(7,\)"),
        (np.zeros((1, 8), np.float32), r"state must be \(8,\), got \(1, 8\)"),
        (np.zeros(8, np.int64), "state must be float, got int64"),
        (np.full(8, np.nan, np.float32), "state must be finite"),
        (np.array([np.inf] + [0] * 7, np.float32), "state must be finite"),
    ],
)
def test_malformed_states(state: Any, message: str, table_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        Processor(LIBERO, 32, table_tokenizer).inputs(observation(state))


def test_outputs_unnormalise_and_slice(table_tokenizer: Tokenizer) -> None:
    stats = FeatureStats(q01=(-1.0,) * 7, q99=(3.0,) * 7)
    config = dataclasses.replace(LIBERO, action_stats=stats)
    normalized = np.random.default_rng(1).normal(size=(10, 32)).astype(np.float32)
    actions = Processor(config, 32, table_tokenizer).outputs(normalized, observation())
    np.testing.assert_allclose(actions, 2 * normalized[:, :7] + 1, rtol=1e-6)
    assert actions.dtype == np.float32


def test_deltas_are_added_to_the_state_that_is_not_normalised(table_tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(LIBERO, delta_mask=(True,) * 6)
    processor = Processor(config, 32, table_tokenizer)
    normalized = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    kept = normalized.copy()
    actions = processor.outputs(normalized, observation())
    np.testing.assert_allclose(actions[:, :6], normalized[:, :6] + STATE[:6], rtol=1e-6)
    np.testing.assert_array_equal(actions[:, 6], normalized[:, 6])
    np.testing.assert_array_equal(normalized, kept)


@pytest.mark.parametrize("robot", ["none", "aloha"])
def test_normalized_is_the_inverse_of_outputs(robot: Any, table_tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(4)
    low = rng.normal(size=14)
    config = ProcessingConfig(
        robot=robot,
        robot_action_dim=14,
        delta_mask=((True,) * 6 + (False,)) * 2,
        action_stats=FeatureStats(q01=tuple(low), q99=tuple(low + rng.uniform(1, 3, 14))),
    )
    processor = Processor(config, 32, table_tokenizer)
    seen = observation(np.linspace(-1, 1, 14, dtype=np.float32))
    chunk = rng.normal(size=(5, 32)).astype(np.float32)
    actions = processor.outputs(chunk, seen)
    kept = actions.copy()
    np.testing.assert_allclose(processor.normalized(actions, seen), chunk[:, :14], atol=1e-5)
    np.testing.assert_array_equal(actions, kept)
    with pytest.raises(ValueError, match=r"actions must be \(r, 14\), got \(5, 32\)"):
        processor.normalized(chunk, seen)


def test_aloha_adds_deltas_in_the_model_s_units(table_tokenizer: Tokenizer) -> None:
    config = ProcessingConfig(
        robot="aloha", robot_action_dim=14, delta_mask=((True,) * 6 + (False,)) * 2
    )
    processor = Processor(config, 32, table_tokenizer)
    state = np.linspace(-1, 1, 14, dtype=np.float32)
    still = processor.outputs(np.zeros((4, 32), np.float32), observation(state))
    joints = [i for i in range(14) if i not in (6, 13)]
    # No motion keeps every joint where it is: turned on the way in and back on the way out.
    np.testing.assert_allclose(still[:, joints], np.tile(state[joints], (4, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(
            LIBERO,
            delta_mask=(True, False) * 3,
            action_stats=FeatureStats(q01=(-3.0,) * 7, q99=(1.0,) * 7),
        ),
        ProcessingConfig(robot="aloha", robot_action_dim=14, delta_mask=(True,) * 6),
    ],
    ids=["libero", "aloha"],
)
def test_rebased_actions_lead_to_the_same_place(
    config: ProcessingConfig, table_tokenizer: Tokenizer
) -> None:
    processor = Processor(config, 32, table_tokenizer)
    state = np.linspace(-0.5, 0.5, 8 if config.robot == "libero" else 14, dtype=np.float32)
    was, now = observation(state), observation(-state)
    normalized = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    rebased = processor.rebase(normalized, was, now)
    relative = np.flatnonzero(config.delta_mask or ())
    untouched = np.setdiff1d(np.arange(32), relative)
    np.testing.assert_array_equal(rebased[:, untouched], normalized[:, untouched])
    assert (rebased[:, relative] != normalized[:, relative]).all()
    np.testing.assert_allclose(
        processor.outputs(rebased, now), processor.outputs(normalized, was), atol=1e-5
    )


def test_absolute_actions_need_no_rebasing(table_tokenizer: Tokenizer) -> None:
    normalized = np.ones((5, 32), np.float32)
    processor = Processor(LIBERO, 32, table_tokenizer)
    assert processor.rebase(normalized, observation(), observation(-STATE)) is normalized


def test_malformed_outputs(table_tokenizer: Tokenizer) -> None:
    processor = Processor(LIBERO, 32, table_tokenizer)
    with pytest.raises(ValueError, match=r"actions must be \(h, 32\), got \(10, 7\)"):
        processor.outputs(np.zeros((10, 7), np.float32), observation())
    with pytest.raises(ValueError, match="actions must be finite"):
        processor.outputs(np.full((10, 32), np.nan, np.float32), observation())


def test_a_delta_of_what_the_state_lacks(table_tokenizer: Tokenizer) -> None:
    config = ProcessingConfig(delta_mask=(False, False, True))
    processor = Processor(config, 32, table_tokenizer)
    with pytest.raises(ValueError, match="action 2 relative to the state, which has 2 values"):
        processor.outputs(np.zeros((1, 32), np.float32), observation(np.zeros(2, np.float32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robot_action_dim": 33}, r"robot_action_dim must be in \[1, 32\], got 33"),
        ({"robot_action_dim": 8}, "robot libero has 7 action dimensions, but .* is 8"),
        ({"delta_mask": (True,) * 8}, "delta_mask has 8 entries, but robot_action_dim is 7"),
        ({"cameras": ("base",)}, "libero has cameras image, wrist_image, but the model only base"),
        ({"cameras": ("a", "a")}, "cameras must be different names"),
        ({"resize": "nearest"}, "resize must be one of pil, .*, got 'nearest'"),
        ({"robot": "spot"}, "robot must be one of none, .*, got 'spot'"),
        ({"state_norm": "z"}, "state_norm must be one of quantile, .*, got 'z'"),
    ],
)
def test_contradictions_are_found_at_once(
    changes: dict[str, Any], message: str, table_tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        Processor(dataclasses.replace(LIBERO, **changes), 32, table_tokenizer)


def test_dictionary_to_actions(table_tokenizer: Tokenizer) -> None:
    processor = Processor(LIBERO, 32, table_tokenizer)
    first = observation()
    read = processor.observation_from_dict(
        {
            "observation/image": first.images["base_0_rgb"],
            "observation/wrist_image": first.images["left_wrist_0_rgb"],
            "observation/state": STATE.astype(np.float64),
            "prompt": b"pick up the red cube",
        }
    )
    for ours, expected in zip(
        vars(processor.inputs(read)).values(), vars(processor.inputs(first)).values(), strict=True
    ):
        assert torch.equal(ours, expected)


def small(tokenizer: Tokenizer, config: Pi05Config, prompt_tokens: int) -> Pi05Config:
    return dataclasses.replace(
        config, vocab_size=tokenizer.vocab_size, action_dim=8, max_prompt_tokens=prompt_tokens
    )


def act(model: Pi05, processor: Processor, moment: Observation) -> Any:
    inputs = processor.inputs(moment)
    noise = torch.randn(1, model.config.horizon, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actions = model.sample_actions(
            to_model(inputs.prepared), inputs.image_mask, inputs.tokens, inputs.token_mask, noise, 2
        )
    return processor.outputs(actions[0].numpy(), moment)


def test_the_place_of_an_absent_camera_changes_nothing(
    json_tokenizer_path: Path, tiny_config: Pi05Config, random_pi05: Callable[..., Pi05]
) -> None:
    tokenizer = load_tokenizer(json_tokenizer_path)
    model = random_pi05(small(tokenizer, tiny_config, 120))
    moment = observation()
    absent_last = ProcessingConfig(image_size=28, robot_action_dim=7, max_prompt_tokens=120)
    absent_between = dataclasses.replace(
        absent_last, cameras=("base_0_rgb", "right_wrist_0_rgb", "left_wrist_0_rgb")
    )
    first, second = (
        act(model, Processor(config, 8, tokenizer), moment)
        for config in (absent_last, absent_between)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_real_frames_through_the_model(
    shared_data: Path,
    json_tokenizer_path: Path,
    tiny_config: Pi05Config,
    random_pi05: Callable[..., Pi05],
) -> None:
    path = shared_data / "bridge_frames.npz"
    if not path.exists():
        pytest.skip(f"frames of BridgeData are not committed, and {path} does not exist")
    frames = np.load(path)
    q01, q99 = np.quantile(frames["state"], (0.01, 0.99), axis=0)
    config = ProcessingConfig(
        cameras=("image_0", "image_1"),
        image_size=28,
        state_stats=FeatureStats(q01=tuple(q01), q99=tuple(q99)),
        max_prompt_tokens=160,
        robot_action_dim=7,
        delta_mask=(True,) * 6,
    )
    tokenizer = load_tokenizer(json_tokenizer_path)
    model = random_pi05(small(tokenizer, tiny_config, 160))
    processor = Processor(config, 8, tokenizer)
    plans = []
    for index in range(0, 200, 20):
        moment = processor.observation_from_dict(
            {
                "observation.images.image_0": frames["images"][index, 0],
                "observation.state": frames["state"][index],
                "task": str(frames["instruction"][frames["episode"][index]]),
            }
        )
        plans.append(act(model, processor, moment))
        assert plans[-1].shape == (tiny_config.horizon, 7)
    assert np.isfinite(plans).all()
    assert min(np.abs(a - b).max() for a, b in pairwise(plans)) > 1e-3


def test_real_prompts_fit_the_model(shared_data: Path, tmp_path: Path) -> None:
    packed, path = shared_data / "gemma_tokenizer.json.xz", shared_data / "bridge_frames.npz"
    if not (packed.exists() and path.exists()):
        pytest.skip(f"{packed} and {path} are not committed, and one does not exist")
    (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    frames = np.load(path)
    processor = Processor(ProcessingConfig(), 32, load_tokenizer(tmp_path / "tokenizer.json"))
    for index, instruction in enumerate(frames["instruction"]):
        moment = Observation(
            {"base_0_rgb": frames["images"][index, 0]}, frames["state"][index], str(instruction)
        )
        inputs = processor.inputs(moment)
        assert 30 < inputs.token_mask.sum() < 80
        assert 0 <= inputs.tokens.min() <= inputs.tokens.max() < 257_152
