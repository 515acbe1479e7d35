"""What must hold for a π0.5 of any size, on a tiny one whose every weight is random."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfpi.config import PRESETS, Pi05Config
from halfpi.model import Pi05, PrefixCache

Inputs = dict[str, Any]


@pytest.fixture
def model(random_pi05: Callable[..., Pi05]) -> Pi05:
    return random_pi05()


@pytest.fixture
def inputs(tiny_config: Pi05Config) -> Inputs:
    """Two rows: one complete, one without its second camera and with three padded tokens."""
    generator = torch.Generator().manual_seed(1)
    size, action = tiny_config.image_size, tiny_config.action_dim
    token_mask = torch.ones(2, 8, dtype=torch.bool)
    token_mask[1, 5:] = False
    return {
        "images": torch.rand(2, 3, 3, size, size, generator=generator) * 2 - 1,
        "image_mask": torch.tensor([[True, True, True], [True, False, True]]),
        "tokens": torch.randint(0, tiny_config.vocab_size, (2, 8), generator=generator),
        "token_mask": token_mask,
        "noise": torch.randn(2, tiny_config.horizon, action, generator=generator),
    }


def _given(inputs: Inputs, count: int) -> Tensor:
    return torch.randn(
        2, count, inputs["noise"].shape[2], generator=torch.Generator().manual_seed(2)
    )


def _prefill(model: Pi05, inputs: Inputs) -> PrefixCache:
    image_tokens = model.vision(inputs["images"])
    return model.prefill(image_tokens, inputs["image_mask"], inputs["tokens"], inputs["token_mask"])


def test_stages_compose_to_sample_actions(model: Pi05, inputs: Inputs) -> None:
    composed = model.denoise(_prefill(model, inputs), inputs["noise"], num_steps=4)
    assert torch.equal(composed, model.sample_actions(**inputs, num_steps=4))


def test_denoise_is_euler_on_velocity(model: Pi05, inputs: Inputs) -> None:
    cache, actions = _prefill(model, inputs), inputs["noise"]
    for time in (1.0, 0.75, 0.5, 0.25):
        actions = actions - model.velocity(cache, actions, torch.full((2,), time)) / 4
    torch.testing.assert_close(
        model.sample_actions(**inputs, num_steps=4), actions, atol=1e-5, rtol=0
    )


def test_the_prefix_matters(model: Pi05, inputs: Inputs) -> None:
    """Guards the other tests: actions depend on every camera, on the prompt and on camera order."""
    actions = model.sample_actions(**inputs)[0]
    swapped = {**inputs, "images": inputs["images"].flip(1)}
    dimmed = {**inputs, "images": inputs["images"] * 0.5}
    reworded = {**inputs, "tokens": inputs["tokens"].flip(1)}
    for changed in (swapped, dimmed, reworded):
        assert (model.sample_actions(**changed)[0] - actions).abs().max() > 1e-2


def test_masked_cameras_and_padding_can_be_dropped(model: Pi05, inputs: Inputs) -> None:
    row = {name: value[1:] for name, value in inputs.items()}
    kept = row["image_mask"][0]
    trimmed = {
        **row,
        "images": row["images"][:, kept],
        "image_mask": row["image_mask"][:, kept],
        "tokens": row["tokens"][:, :5],
        "token_mask": row["token_mask"][:, :5],
    }
    expected = model.sample_actions(**inputs)[1:]
    torch.testing.assert_close(model.sample_actions(**trimmed), expected, atol=1e-5, rtol=0)


def test_what_is_masked_is_never_read(model: Pi05, inputs: Inputs) -> None:
    changed = {**inputs, "images": inputs["images"].clone(), "tokens": inputs["tokens"].clone()}
    changed["images"][1, 1] = 1e4
    changed["tokens"][1, 5:] = 0
    assert torch.equal(model.sample_actions(**inputs), model.sample_actions(**changed))


def test_one_valid_token_is_enough(model: Pi05, inputs: Inputs) -> None:
    alone = {**inputs, "image_mask": torch.zeros(2, 3, dtype=torch.bool)}
    alone["token_mask"] = torch.arange(8).expand(2, 8) == 3
    assert model.sample_actions(**alone).isfinite().all()


def test_rows_of_a_batch_are_independent(model: Pi05, inputs: Inputs) -> None:
    single = {name: value[:1] for name, value in inputs.items()}
    expected = model.sample_actions(**inputs)[:1]
    torch.testing.assert_close(model.sample_actions(**single), expected, atol=1e-5, rtol=0)


def test_given_actions_match_a_loop_with_a_time_per_action(model: Pi05, inputs: Inputs) -> None:
    cache, given = _prefill(model, inputs), _given(inputs, 3)
    actions = inputs["noise"].clone()
    for step in range(5):
        actions[:, :3] = given
        time = torch.full(actions.shape[:2], 1 - step / 5)
        time[:, :3] = 0
        actions = actions - model.velocity(cache, actions, time) / 5
    actions[:, :3] = given
    sampled = model.sample_actions(**inputs, num_steps=5, given=given)
    torch.testing.assert_close(sampled, actions, atol=1e-5, rtol=0)
    assert torch.equal(sampled[:, :3], given)
    plain = model.sample_actions(**inputs, num_steps=5)
    assert (plain - sampled)[:, 3:].abs().max() > 1e-2


def test_no_given_actions_is_the_plain_path(model: Pi05, inputs: Inputs) -> None:
    plain = model.sample_actions(**inputs)
    assert torch.equal(model.sample_actions(**inputs, given=_given(inputs, 0)), plain)


def test_all_actions_given_are_returned(model: Pi05, inputs: Inputs) -> None:
    given = _given(inputs, inputs["noise"].shape[1])
    assert torch.equal(model.sample_actions(**inputs, given=given), given)


def test_equal_times_per_action_are_one_time(model: Pi05, inputs: Inputs) -> None:
    cache, noise, time = _prefill(model, inputs), inputs["noise"], torch.tensor([0.3, 0.9])
    per_action = model.velocity(cache, noise, time[:, None].expand(noise.shape[:2]))
    torch.testing.assert_close(per_action, model.velocity(cache, noise, time), atol=1e-5, rtol=0)


def test_repeated_cache_serves_many_noises(model: Pi05, inputs: Inputs) -> None:
    cache, noise = _prefill(model, inputs), inputs["noise"]
    both = torch.stack([noise, -noise], 1).flatten(0, 1)
    got = model.denoise(cache.repeat_interleave(2), both).view(2, 2, *noise.shape[1:])
    torch.testing.assert_close(got[:, 0], model.denoise(cache, noise), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, 1], model.denoise(cache, -noise), atol=1e-5, rtol=0)


def test_cache_counts_valid_tokens(model: Pi05, inputs: Inputs) -> None:
    per_image = model.config.tokens_per_image
    assert _prefill(model, inputs).lengths.tolist() == [3 * per_image + 8, 2 * per_image + 5]


def test_gradients_reach_every_parameter(model: Pi05, inputs: Inputs) -> None:
    cache = _prefill(model, inputs)
    velocity = model.velocity(cache, inputs["noise"], torch.tensor([0.2, 0.7]))
    torch.autograd.backward(velocity.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key bias moves all logits of a query alike, so softmax hides it.
        assert parameter.grad.any() or re.search(r"vision.*attn\.k\.bias", name), name


def test_sampling_leaves_no_graph(model: Pi05, inputs: Inputs) -> None:
    assert not model.sample_actions(**inputs).requires_grad


def test_stages_compile_without_graph_breaks(model: Pi05, inputs: Inputs) -> None:
    def stages(images: Tensor, noise: Tensor, given: Tensor) -> Tensor:
        cache = _prefill(model, {**inputs, "images": images})
        return model.denoise(cache, noise, 2, given)

    compiled: Callable[..., Tensor] = torch.compile(stages, fullgraph=True, backend="eager")
    arguments = inputs["images"], inputs["noise"], _given(inputs, 2)
    torch.testing.assert_close(compiled(*arguments), stages(*arguments))


def test_a_new_model_starts_unmodulated(tiny_config: Pi05Config, inputs: Inputs) -> None:
    model = Pi05(tiny_config)
    condition = torch.randn(4, tiny_config.expert_width)
    assert not any(modulation.any() for modulation in model.expert.modulations(condition))
    assert 0.1 < model.vision(inputs["images"]).std() < 10


def test_released_size_has_the_parameters_of_the_paper() -> None:
    """Counts of openpi's modules, less what the last prefix layer and its final norm never use."""
    with torch.device("meta"):
        model = Pi05(PRESETS["pi05"])
    unused = 2 * 2048 * 2048 + 3 * 2048 * 16384 + 2 * 2048
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_children()
    }
    assert round(counts["vision"] / 1e6, 2) == round(412.44 + 2.36, 2)
    assert round((counts["prefix"] + unused) / 1e6, 2) == round(1981.88 + 526.65, 2)
    assert round(counts["expert"] / 1e6, 2) == 427.93


def test_bf16_runs_close_and_keeps_norms_wide(model: Pi05, inputs: Inputs) -> None:
    expected = model.sample_actions(**inputs)
    assert model.to_dtype(torch.bfloat16) is model
    assert model.dtype == torch.bfloat16
    wide = r"norm|modul|patch_embed|position_embed|time_mlp|action_(in|out)"
    for name, parameter in model.named_parameters():
        expected_dtype = torch.float32 if re.search(wide, name) else torch.bfloat16
        assert parameter.dtype == expected_dtype, name
    actions = model.sample_actions(**inputs)
    assert actions.dtype == torch.float32
    assert (actions - expected).norm() < 1e-2 * expected.norm()


def test_to_dtype_returns_to_fp32(model: Pi05) -> None:
    model.bfloat16().to_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_to_dtype_refuses_others(model: Pi05) -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16, got torch\.float16"):
        model.to_dtype(torch.float16)


def _with(name: str, edit: Callable[[Tensor], object]) -> Callable[[Inputs], dict[str, Any]]:
    return lambda inputs: {name: edit(inputs[name])}


def _poison(images: Tensor) -> Tensor:
    images = images.clone()
    images[0, 0, 0, 0, 0] = torch.nan
    return images


BAD: list[tuple[Callable[[Inputs], dict[str, Any]], str]] = [
    (_with("images", lambda x: x[:, :, :1]), r"images .*\(b, n, 3, 28, 28\), got \(2, 3, 1, 28"),
    (_with("images", lambda x: x[0]), r"images must have shape .*, got \(3, 3, 28, 28\)"),
    (_with("images", lambda x: (x * 100).byte()), r"images must be torch.float32, got torch.uint8"),
    (_with("images", lambda x: x.numpy()), "images must be a torch.Tensor, got ndarray"),
    (_with("images", lambda x: x.to("meta")), "images must be on .* cpu, got meta"),
    (_with("images", _poison), "images must be finite, got 1 NaN"),
    (_with("image_mask", lambda x: x[:, :2]), r"image_mask must have shape \(2, 3\), got \(2, 2\)"),
    (_with("image_mask", lambda x: x.float()), r"image_mask must be torch.bool, got torch.float32"),
    (_with("tokens", lambda x: x[:1]), r"tokens must have shape \(2, l\), got \(1, 8\)"),
    (_with("tokens", lambda x: x.float()), r"tokens must be torch.int64, got torch.float32"),
    (_with("tokens", lambda x: x + 96), r"tokens must be in \[0, 96\), got"),
    (_with("tokens", lambda x: x - 96), r"tokens must be in \[0, 96\), got -"),
    (_with("token_mask", lambda x: x[:, 1:]), r"token_mask must have shape \(2, 8\), got \(2, 7\)"),
    (_with("noise", lambda x: x[..., 1:]), r"noise must have shape \(2, h, 6\), got \(2, 7, 5\)"),
    (_with("noise", lambda x: x[:, :0]), "noise must hold at least one action"),
    (_with("noise", lambda x: x / 0), "noise must be finite, got 84 NaN or infinite values"),
    (lambda x: {"given": x["noise"][..., :2]}, r"given must have shape \(2, d, 6\), got"),
    (lambda x: {"given": torch.zeros(2, 8, 6)}, "given must have at most 7 actions, got 8"),
    (lambda x: {"num_steps": 0}, "num_steps must be an int of at least 1, got 0"),
    (lambda x: {"num_steps": 2.5}, "num_steps must be an int of at least 1, got 2.5"),
    (
        lambda x: {"image_mask": x["image_mask"] & False, "token_mask": x["token_mask"] & False},
        "must leave every row a valid token, got none in row 0",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_gets_one_clear_error(
    model: Pi05, inputs: Inputs, edit: Callable[[Inputs], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.sample_actions(**{**inputs, **edit(inputs)})


class _TensorsOfTheHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that read or make a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("decided", [0, 3])
def test_stages_leave_the_host_alone_so_that_graphs_can_hold_them(
    decided: int, tiny_config: Pi05Config
) -> None:
    size = tiny_config.image_size
    with torch.device("meta"):
        model = Pi05(tiny_config)
        images, noise = torch.zeros(1, 2, 3, size, size), torch.zeros(1, 7, tiny_config.action_dim)
        image_mask, token_mask = (torch.ones(1, length, dtype=torch.bool) for length in (2, 5))
        tokens = torch.zeros(1, 5, dtype=torch.int64)
    given = noise[:, :decided] if decided else None
    with torch.no_grad(), _TensorsOfTheHost() as host:
        cache = model.prefill(model.vision(images), image_mask, tokens, token_mask)
        assert model.denoise(cache, noise, 4, given).shape == noise.shape
    assert host.seen == []
