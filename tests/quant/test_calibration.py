"""Calibration against maxima found by hand, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from halfpi.model import Pi05
from halfpi.policy import Policy
from halfpi.quant import DispersionWarning, Scales, calibrate, quantised_sites
from halfpi.quant.scales import SMALLEST_INPUT_SCALE
from halfpi.types import Observation

Infer = Callable[[Observation], object]


def largest_inputs(model: Pi05, linear: str, run: Callable[[], object]) -> list[float]:
    """The largest magnitude that enters the layer `linear` at each call while `run` runs."""
    seen: list[float] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(float(inputs[0].abs().max()))

    with model.get_submodule(linear).register_forward_pre_hook(note):
        run()
    return seen


def amplified(infer: Infer, linear: nn.Module, factors: Sequence[float]) -> Infer:
    """`infer`, with the input of `linear` times the next of `factors` at each frame."""
    remaining = iter(factors)

    def infer_amplified(observation: Observation) -> object:
        factor = next(remaining)

        def amplify(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return inputs[0] * factor

        with linear.register_forward_pre_hook(amplify, prepend=True):
            return infer(observation)

    return infer_amplified


@pytest.mark.parametrize(
    ("site", "linear"),
    [
        ("vision.layers.1.mlp.fc1", "vision.layers.1.mlp.fc1"),
        ("vision.layers.0.mlp.fc2", "vision.layers.0.mlp.fc2"),
        ("prefix.layers.0.mlp.gate_up", "prefix.layers.0.mlp.up"),
        ("prefix.layers.1.mlp.down", "prefix.layers.1.mlp.down"),
    ],
)
def test_a_scale_maps_the_largest_input_of_all_frames_to_448(
    model: Pi05,
    policy: Policy,
    observations: list[Observation],
    scales: Scales,
    site: str,
    linear: str,
) -> None:
    largest = largest_inputs(model, linear, lambda: [policy.infer(each) for each in observations])
    assert len(largest) == len(observations)
    assert [scale * 448 for scale in scales.sites[site].input] == pytest.approx([max(largest)])


@pytest.mark.parametrize(
    ("site", "linear"),
    [
        ("expert.layers.0.attn.qkv", "expert.layers.0.attn.v"),
        ("expert.layers.2.mlp.down", "expert.layers.2.mlp.down"),
    ],
)
def test_the_expert_has_the_scale_of_each_step(
    model: Pi05,
    policy: Policy,
    observations: list[Observation],
    scales: Scales,
    site: str,
    linear: str,
) -> None:
    policy.reseed(0)  # the noise that calibration saw
    largest = largest_inputs(model, linear, lambda: [policy.infer(each) for each in observations])
    by_step = [max(largest[step::4]) for step in range(4)]
    assert len(set(by_step)) == 4
    assert [scale * 448 for scale in scales.sites[site].input] == pytest.approx(by_step)


def test_the_scale_of_tiny_inputs_has_a_reciprocal_in_half_precision(
    model: Pi05, policy: Policy, observations: list[Observation]
) -> None:
    name = "vision.layers.0.mlp.fc2"
    infer = amplified(policy.infer, model.get_submodule(name), [1e-6] * len(observations))
    (scale,) = calibrate(model, infer, observations).sites[name].input
    assert scale == SMALLEST_INPUT_SCALE
    assert torch.tensor(1 / scale).half().isfinite()


def test_the_weight_scale_is_of_the_packed_weight(model: Pi05, scales: Scales) -> None:
    for site in quantised_sites(model.config):
        packed = torch.cat([layer.weight for layer in site.layers(model)])
        assert scales.sites[site.name].weight * 448 == pytest.approx(float(packed.abs().max()))


def test_it_says_what_it_saw_and_leaves_no_hook(model: Pi05, scales: Scales) -> None:
    assert (scales.num_steps, scales.frames, scales.percentile) == (4, 3, 100.0)
    scales.check(model.config)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("percentile", "factor"), [(100, 3.0), (75, 2.0), (50, 1.0)])
def test_the_percentile_is_of_the_frames_maxima(
    model: Pi05,
    policy: Policy,
    observations: list[Observation],
    percentile: float,
    factor: float,
) -> None:
    site = "vision.layers.0.mlp.fc1"
    one = observations[:1]
    plain = calibrate(model, policy.infer, one).sites[site]
    infer = amplified(policy.infer, model.get_submodule(site), (1.0, 3.0, 1.0))
    scales = calibrate(model, infer, one * 3, percentile=percentile)
    assert scales.sites[site].input[0] == pytest.approx(plain.input[0] * factor)


def test_frames_that_disagree_are_warned_about_by_site(
    model: Pi05, policy: Policy, observations: list[Observation]
) -> None:
    down = model.get_submodule("prefix.layers.1.mlp.down")
    infer = amplified(policy.infer, down, (1.0, 1.0, 6.0))
    with pytest.warns(DispersionWarning, match=r"of 22 sites .*: prefix\.layers\.1\.mlp\.down ×6"):
        calibrate(model, infer, observations[:1] * 3)


def test_it_needs_an_observation(model: Pi05, policy: Policy) -> None:
    with pytest.raises(ValueError, match="needs at least one observation, got none"):
        calibrate(model, policy.infer, [])


@pytest.mark.parametrize("percentile", [49.9, 100.1, math.nan])
def test_the_percentile_must_be_in_its_range(
    model: Pi05, policy: Policy, observations: list[Observation], percentile: float
) -> None:
    with pytest.raises(ValueError, match=r"percentile must be in \[50, 100\], got"):
        calibrate(model, policy.infer, observations, percentile=percentile)


def test_the_number_of_steps_must_not_change(
    model: Pi05, policy: Policy, observations: list[Observation]
) -> None:
    steps = iter((4, 5, 4))
    with pytest.raises(ValueError, match=r"infer must always take as many steps, got \[4, 5\]"):
        calibrate(model, lambda each: policy.infer(each, num_steps=next(steps)), observations)


def test_the_whole_model_must_run(
    model: Pi05, policy: Policy, observations: list[Observation]
) -> None:
    with pytest.raises(ValueError, match=r"in frame 0 it ran vision\.layers\.0\.attn\.qkv 0 times"):
        calibrate(model, lambda _: None, observations)

    def infer_twice(observation: Observation) -> None:
        policy.infer(observation)
        policy.infer(observation)

    with pytest.raises(ValueError, match=r"in frame 0 it ran vision\.layers\.0\.attn\.qkv 2 times"):
        calibrate(model, infer_twice, observations)


def test_an_input_that_is_not_finite_is_named(
    model: Pi05, policy: Policy, observations: list[Observation]
) -> None:
    noise = torch.zeros(7, 6)
    infer = amplified(
        lambda each: policy.engine.run(policy.processor.inputs(each), noise, 4),
        model.get_submodule("vision.layers.1.mlp.fc1"),
        (1.0, math.inf),
    )
    with pytest.raises(ValueError, match=r"of vision\.layers\.1\.mlp\.fc1 is NaN or .* frame 1"):
        calibrate(model, infer, observations)
