"""The real LeRobot at a small size, with the golden weights and a tokenizer of a few hundred words.

These tests run in an environment of their own: see CONTRIBUTING.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lerobot.policies.pi05.modeling_pi05 as pi05
import lerobot.processor.tokenizer_processor as tokenizer_processor
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import lerobot_policy_halfpi.configuration_halfpi as configuration
import lerobot_policy_halfpi.modeling_halfpi as modeling
from halfpi import load_policy
from halfpi.checkpoints import open_checkpoint

GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "lerobot_tiny_ckpt"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PROMPT_TOKENS = 200
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def small(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `build` gives while LeRobot takes the golden sizes for π0.5's; head counts are fixed."""
    sizes = {
        "gemma_2b": pi05.GemmaConfig(64, 3, 128, 8, 1, 16),
        "gemma_300m": pi05.GemmaConfig(32, 3, 64, 8, 1, 16),
    }
    paligemma, gemma = pi05.PaliGemmaForConditionalGenerationWithPiGemma, pi05.PiGemmaForCausalLM

    def small_paligemma(config: Any) -> Any:
        for name, value in VISION.items():
            setattr(config.vision_config, name, value)
        config.vision_config.projection_dim = config.text_config.hidden_size
        config.text_config.vocab_size = 512
        return paligemma(config=config)

    def small_gemma(config: Any) -> Any:
        config.vocab_size = 512
        return gemma(config=config)

    with monkeypatch.context() as patch:
        patch.setattr(pi05, "get_gemma_config", sizes.__getitem__)
        patch.setattr(pi05, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
        patch.setattr(pi05, "PiGemmaForCausalLM", small_gemma)
        return build()


@pytest.fixture
def make_pi05(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Build LeRobot's own policy; options are of PI05Config."""

    def make(**options: Any) -> Any:
        config = pi05.PI05Config(
            device="cpu",
            chunk_size=10,
            n_action_steps=10,
            image_resolution=(28, 28),
            tokenizer_max_length=PROMPT_TOKENS,
            input_features={
                "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
                **{
                    f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, 28, 28))
                    for camera in CAMERAS
                },
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
            **options,
        )
        policy = small(lambda: pi05.PI05Policy(config), monkeypatch)
        missing, unexpected = policy.load_state_dict(
            load_file(GOLDEN / "model.safetensors"), strict=False
        )
        assert not unexpected
        assert all("lm_head" in name for name in missing)
        return policy.eval()

    return make


@pytest.fixture
def observation() -> dict[str, Any]:
    """What a robot with two of the three cameras sees, as LeRobot has it before its processors."""
    generator = torch.Generator().manual_seed(5)
    return {
        "observation.state": torch.rand(8, generator=generator) * 2 - 1,
        "observation.images.base_0_rgb": torch.rand(3, 28, 28, generator=generator),
        "observation.images.left_wrist_0_rgb": torch.rand(3, 21, 40, generator=generator),
        "task": "pick_up the block\n",
    }


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Task: pick up the block, State: 1 23;\nAction: "], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


class SmallTokenizer:
    """Where LeRobot would fetch PaliGemma's."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            encoded = [1, *self.tokenizer.encode(text).ids]  # <bos> first, as PaliGemma's does
            ids[row, : len(encoded)] = torch.tensor(encoded)
            mask[row, : len(encoded)] = 1
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def load_pi05_processors(
    make_pi05: Callable[..., Any], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], tuple[Any, Any]]:
    """LeRobot's own pre- and postprocessor of a checkpoint."""
    auto = SimpleNamespace(from_pretrained=lambda *_, **__: SmallTokenizer(tokenizer_file))
    monkeypatch.setattr(tokenizer_processor, "AutoTokenizer", auto)
    config = make_pi05().config
    overrides = {"tokenizer_processor": {"max_length": PROMPT_TOKENS}}
    return lambda path: make_pre_post_processors(
        config, pretrained_path=str(path), preprocessor_overrides=overrides
    )


@pytest.fixture
def pi05_processors(
    load_pi05_processors: Callable[[Path], tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Those of the golden checkpoint."""
    return load_pi05_processors(GOLDEN)


@pytest.fixture
def golden_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Path:
    """LeRobot's checkpoint of type "pi05"; its files leave open what released sizes tell."""
    sizes = {"vision_heads": 4, "max_prompt_tokens": PROMPT_TOKENS}
    monkeypatch.setattr(
        configuration, "open_checkpoint", functools.partial(open_checkpoint, **sizes)
    )
    monkeypatch.setattr(modeling, "load_policy", functools.partial(load_policy, **sizes))
    return GOLDEN
