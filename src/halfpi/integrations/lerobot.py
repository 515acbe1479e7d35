"""LeRobot's π0.5, sampled by halfpi: `accelerate` a loaded policy in place, `restore` undoes it.

LeRobot is not imported. Of a policy are used its `config`, and of its `model` (PI05Pytorch of
LeRobot's modeling_pi05.py) the weights, `sample_noise` and `sample_actions`, which is replaced on
the instance. What calls it stays LeRobot's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from halfpi.checkpoints import model_of_module
from halfpi.checkpoints.lerobot import UNSUPPORTED
from halfpi.config import Backend, EngineConfig
from halfpi.engine import Engine, make_engine
from halfpi.model import Guidance, Pi05
from halfpi.model.inputs import check_inputs
from halfpi.processing.pipeline import ModelInputs
from halfpi.runtime.rtc import Schedule, guidance

Precision = Literal["fp32", "bf16"]
P = TypeVar("P", bound=nn.Module)

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def accelerate(
    policy: P,
    *,
    precision: Precision | None = None,
    backend: Backend = "eager",
    num_steps: int | Sequence[int] | None = None,
) -> P:
    """Let halfpi sample the actions of `policy`, LeRobot's π0.5 (0.6), from now on; returns it.

    It stays LeRobot's policy of type "pi05", with its processors, queues and real-time chunking;
    `select_action` and `predict_action_chunk` work as before, and so does what calls them.

    precision: "fp32" or "bf16"; None: as the policy's own dtype. backend: see `EngineConfig`.
    "triton" has a copy of the weights. Others share those of the right dtype with the policy, and
    copy the rest; LeRobot's bfloat16 keeps the vision tower in fp32.
    num_steps: Euler steps where the caller names none; of several, which "triton" plans for, the
    first. None: as the policy's config has it now.

    A policy that is accelerated already is accelerated anew, which it needs after its weights have
    changed or moved: until then a call raises ValueError.

    Raises ValueError for another policy or a variant that halfpi does not run, for training mode,
    and as `make_engine` does; CheckpointError, a ValueError, for weights that are not π0.5's.
    """
    _check(policy)
    config: Any = policy.config
    if precision is None:
        precision = "bf16" if config.dtype == "bfloat16" else "fp32"
    if precision not in get_args(Precision):
        expected = ", ".join(get_args(Precision))
        raise ValueError(f"precision must be one of {expected}, got {precision!r}")
    wanted = config.num_inference_steps if num_steps is None else num_steps
    steps = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    engine_config = EngineConfig(
        backend,
        precision,
        steps,
        max_cameras=len(config.image_features),
        max_prompt_tokens=config.tokenizer_max_length,
    )
    module: Any = policy.model
    engine = make_engine(_model(module, config, _DTYPES[precision]), engine_config)
    restore(policy)
    module.sample_actions = _Sampler(module, engine, steps[0])
    return policy


def _model(module: Any, config: Any, dtype: str) -> Pi05:
    paligemma = module.paligemma_with_expert.paligemma.config
    return model_of_module(
        module,
        dtype=dtype,
        vision_heads=paligemma.vision_config.num_attention_heads,
        kv_heads=paligemma.text_config.num_key_value_heads,
        image_size=config.image_resolution[0],
        horizon=config.chunk_size,
        max_prompt_tokens=config.tokenizer_max_length,
        time_min_period=config.min_period,
        time_max_period=config.max_period,
    )


def restore(policy: P) -> P:
    """Give `policy` LeRobot's own sampler back, if it was accelerated; returns it."""
    module: Any = policy.model
    sampler = vars(module).get("sample_actions")
    if isinstance(sampler, _Sampler):
        del module.sample_actions
        if sampler.replaced is not None:
            module.sample_actions = sampler.replaced
    return policy


def lerobot_guidance(
    config: Any,
    rest: Tensor,
    delay: int | None,
    execution_horizon: int | None,
    shape: tuple[int, int],
) -> Guidance:
    """Guidance of a chunk of `shape` (h, a) as LeRobot's RTCProcessor.denoise_step has it.

    config: LeRobot's RTCConfig. rest: fp32 (r ≤ h, ≤ a), normalised, what is left of the plan.
    delay: how many of it are decided. execution_horizon: how many guide; None: as `config`.

    Raises ValueError naming what is wrong, or what halfpi does not do.
    """
    if getattr(config, "mode", "guided") != "guided":
        raise ValueError(f"rtc_config's mode must be 'guided', got {config.mode!r}")
    if config.debug:
        raise ValueError("rtc_config's debug is not supported: halfpi records no denoising steps")
    if type(delay) is not int or delay < 0:
        raise ValueError(f"inference_delay must be an int of at least 0, got {delay!r}")
    if rest.ndim != 2 or rest.shape[0] > shape[0] or rest.shape[1] > shape[1]:
        raise ValueError(f"prev_chunk_left_over must be at most {shape}, got {tuple(rest.shape)}")
    horizon = config.execution_horizon if execution_horizon is None else execution_horizon
    schedule: Schedule = config.prefix_attention_schedule.name.lower()
    return guidance(rest[:horizon], delay, shape, schedule, config.max_guidance_weight)


def _check(policy: Any) -> None:
    config = getattr(policy, "config", None)
    kind = getattr(config, "type", type(policy).__name__)
    if kind != "pi05":
        raise ValueError(f"the policy must be LeRobot's of type 'pi05', got {kind!r}")
    for name in UNSUPPORTED:
        if getattr(config, name, False):
            raise ValueError(f"the policy has {name} set, which halfpi does not support")
    if policy.training:
        raise ValueError("the policy is in training mode: call its eval() first")


class _Sampler:
    """PI05Pytorch.sample_actions, by an engine."""

    def __init__(self, module: Any, engine: Engine, num_steps: int) -> None:
        # An instance has one of its own where LeRobot compiled it.
        self.replaced = vars(module).get("sample_actions")
        self._module = module
        self._engine = engine
        self._num_steps = num_steps
        self._built_from = self._weights()

    @torch.no_grad()
    def __call__(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        tokens: Tensor,
        masks: Tensor,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Actions fp32 (b, h, a) on the device of `tokens`, one observation after the other.

        images: n of fp32 (b, 3, image_size, image_size) in [-1, 1]. img_masks: n of bool (b,).
        tokens: int64 (b, l). masks: bool (b, l), padded on the right. noise: fp32 (b, h, a).
        The last three are for guided real-time chunking, if the policy's `rtc_config` enables it:
        prev_chunk_left_over, normalised, is fp32 (r, ≤a) or (b, r, ≤a), r ≤ h.

        Raises ValueError naming the argument that is wrong, and when the weights have changed.
        """
        if self._weights() != self._built_from:
            raise ValueError(
                "the policy's weights have changed or moved since it was accelerated: "
                "call halfpi.accelerate(policy) again"
            )
        steps = self._num_steps if num_steps is None else num_steps
        inputs = self._inputs(images, img_masks, tokens, masks, noise)
        check_inputs(inputs, self._engine.config, torch.device("cpu"), steps)
        noise = inputs.pop("noise")
        plans = self._plans(prev_chunk_left_over, inference_delay, execution_horizon, len(noise))
        chunks = [
            self._engine.run(
                ModelInputs(**{name: value[row : row + 1] for name, value in inputs.items()}),
                noise[row],
                steps,
                guidance=plan,
            )[0]
            for row, plan in enumerate(plans)
        ]
        return torch.stack(chunks).to(tokens.device)

    def _inputs(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        tokens: Tensor,
        masks: Tensor,
        noise: Tensor | None,
    ) -> dict[str, Tensor]:
        """The fields of `ModelInputs`, and the noise, on the CPU."""
        config = self._engine.config
        shape = (len(tokens), config.horizon, config.action_dim)
        if noise is None:
            noise = self._module.sample_noise(shape, tokens.device)
        if noise.shape != shape:
            raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
        if (masks[:, 1:] > masks[:, :-1]).any():
            raise ValueError("the prompt must be padded on the right, got a mask with gaps")
        tensors = {
            "images": torch.stack(images, 1),
            "image_mask": torch.stack(img_masks, 1),
            "tokens": tokens,
            "token_mask": masks,
            "noise": noise,
        }
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _plans(
        self, rest: Tensor | None, delay: int | None, execution_horizon: int | None, rows: int
    ) -> list[Guidance | None]:
        """What each row is guided to, as LeRobot's rtc_config has it."""
        config = self._module.config.rtc_config
        if config is None or not config.enabled or rest is None:
            return [None] * rows
        shape = (self._engine.config.horizon, self._engine.config.action_dim)
        return [
            lerobot_guidance(config, row.cpu(), delay, execution_horizon, shape)
            for row in (rest if rest.ndim == 3 else rest.expand(rows, *rest.shape))
        ]

    def _weights(self) -> tuple[int, int]:
        """Changes when they do: training, loading and moving all touch this one, too."""
        witness = self._module.action_out_proj.weight
        return witness.data_ptr(), 0 if witness.is_inference() else witness._version
