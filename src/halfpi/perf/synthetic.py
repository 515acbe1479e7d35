"""Random models, policies and observations of any case: what speed is measured with.

Weights and inputs are random and not zero: a zero costs a GPU less power, and so less time.
"""

from __future__ import annotations

import numpy as np
import torch

from halfpi.checkpoints.load import DTYPES
from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.engine import Engine
from halfpi.model import Pi05
from halfpi.perf.cases import Case
from halfpi.policy import Policy
from halfpi.processing.pipeline import ModelInputs, Processor
from halfpi.types import Observation

_STATE_DIM = 8
# BOS before the instruction, and the newline after it.
_FRAME_TOKENS = 2


class _LetterTokenizer:
    """One token a letter: a prompt's length is its number of tokens."""

    bos_id = 1
    pad_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.vocab_size for letter in text]


def random_model(
    config: Pi05Config,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> Pi05:
    """A model for inference whose every weight is random; activations keep their size.

    dtype: "float32" or "bfloat16", as in `load_model`. Memory peaks at the model in fp32.
    """
    with torch.device(device), torch.no_grad():
        model = Pi05(config)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:  # norms and biases: around what they start from
                parameter.add_(noise, alpha=0.2)
    return model.to_dtype(DTYPES[dtype]).requires_grad_(False).eval()


def random_inputs(
    config: Pi05Config, case: Case, seed: int = 0
) -> tuple[ModelInputs, torch.Tensor]:
    """The model's inputs in `case`, nothing masked, and noise fp32 (h, a)."""
    generator = torch.Generator().manual_seed(seed)
    size, length = config.image_size, case.prompt_tokens
    inputs = ModelInputs(
        images=torch.randint(
            256, (1, case.cameras, size, size, 3), generator=generator, dtype=torch.uint8
        ),
        image_mask=torch.ones((1, case.cameras), dtype=torch.bool),
        tokens=torch.randint(config.vocab_size, (1, length), generator=generator),
        token_mask=torch.ones((1, length), dtype=torch.bool),
    )
    return inputs, torch.randn((case.horizon, config.action_dim), generator=generator)


def random_policy(engine: Engine, case: Case) -> Policy:
    """A policy of `engine`, for the observations of `random_observations(engine.config, case)`.

    Raises ValueError when `case` has another horizon than the model, or a prompt without room for
    an instruction.
    """
    config = engine.config
    if case.horizon != config.horizon:
        raise ValueError(f"the model's horizon is {config.horizon}, the case's {case.horizon}")
    if case.prompt_tokens <= _FRAME_TOKENS:
        raise ValueError(
            f"a policy's prompt has more than {_FRAME_TOKENS} tokens, got {case.prompt_tokens}"
        )
    processing, tokenizer = random_processing(config, case), _LetterTokenizer(config.vocab_size)
    processor = Processor(processing, config.action_dim, tokenizer)
    return Policy(processor, engine, num_steps=case.steps)


def random_processing(config: Pi05Config, case: Case) -> ProcessingConfig:
    """Of observations as `random_observations(config, case)` makes them."""
    return ProcessingConfig(
        cameras=_cameras(case),
        image_size=config.image_size,
        state_norm="identity",
        action_norm="identity",
        state_in_prompt=False,
        max_prompt_tokens=config.max_prompt_tokens,
        robot_action_dim=config.action_dim,
    )


def random_observations(
    config: Pi05Config,
    case: Case,
    count: int,
    seed: int = 0,
    image_shape: tuple[int, int] | None = None,
) -> list[Observation]:
    """Observations with prompts of the case's length, and images of the model's size.

    image_shape: height and width of images, if a camera has others than the model.
    """
    rng = np.random.default_rng(seed)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    shape = (*(image_shape or (config.image_size, config.image_size)), 3)
    return [
        Observation(
            images={name: rng.integers(0, 256, shape, dtype=np.uint8) for name in _cameras(case)},
            state=rng.standard_normal(_STATE_DIM, dtype=np.float32),
            prompt="".join(rng.choice(letters, case.prompt_tokens - _FRAME_TOKENS)),
        )
        for _ in range(count)
    ]


def _cameras(case: Case) -> tuple[str, ...]:
    return tuple(f"camera_{index}" for index in range(case.cameras))
