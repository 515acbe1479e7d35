"""Fake quantisation against its own maths written out, and what it does to actions."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfpi.config import Pi05Config
from halfpi.engine import EagerEngine
from halfpi.model import Pi05, PrefixCache
from halfpi.perf.cases import Case
from halfpi.perf.synthetic import random_inputs, random_model
from halfpi.policy import Policy
from halfpi.processing.images import to_model
from halfpi.processing.pipeline import ModelInputs
from halfpi.quant import (
    FakeQuantPi05,
    Scales,
    Site,
    SiteScales,
    dequantise,
    quantise,
    quantised_sites,
)
from halfpi.quant.fake import FakeQuantLinear
from halfpi.quant.sites import matrix_products
from halfpi.types import Observation

STEPS = 4


@pytest.fixture
def inputs(tiny_config: Pi05Config) -> tuple[ModelInputs, Tensor]:
    case = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=STEPS, precision="fp32")
    inputs, noise = random_inputs(tiny_config, case, seed=5)
    return dataclasses.replace(inputs, images=to_model(inputs.prepared)), noise


def actions_of(model: Pi05, inputs: tuple[ModelInputs, Tensor]) -> Tensor:
    tensors, noise = inputs
    return model.sample_actions(**vars(tensors), noise=noise[None], num_steps=STEPS)


def prefilled(model: Pi05, inputs: ModelInputs) -> PrefixCache:
    image_tokens = model.vision(inputs.images)
    return model.prefill(image_tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def relative_error(actions: Tensor, expected: Tensor) -> float:
    return float((actions - expected).norm() / expected.norm())


def test_actions_are_near_those_of_fp32_and_farther_than_those_of_bf16(
    model: Pi05, scales: Scales, inputs: tuple[ModelInputs, Tensor]
) -> None:
    expected = actions_of(model, inputs)
    fake = actions_of(FakeQuantPi05(model, scales), inputs)
    narrow = actions_of(model.to_dtype(torch.bfloat16), inputs)
    assert cosine(fake, expected) > 0.995
    assert relative_error(narrow, expected) < relative_error(fake, expected) < 0.1


def test_every_site_is_quantised_and_nothing_else(model: Pi05, scales: Scales) -> None:
    fake = FakeQuantPi05(model, scales)
    replaced = {n for n, module in fake.named_modules() if isinstance(module, FakeQuantLinear)}
    listed = {name for site in quantised_sites(model.config) for name in site.linears}
    assert replaced == listed
    assert fake.dtype == torch.bfloat16
    assert fake.expert.norm.dense.weight.dtype == torch.float32


def test_products_that_are_not_quantised_are_those_of_bf16(model: Pi05, scales: Scales) -> None:
    narrow = copy.deepcopy(model).to_dtype(torch.bfloat16)
    fake = FakeQuantPi05(model, scales)
    wide = set(matrix_products(model.config)) - set(quantised_sites(model.config))
    assert {site.stage for site in wide} == {"vision", "prefill"}
    for site in wide:
        for name, layer, expected in zip(
            site.linears, site.layers(fake), site.layers(narrow), strict=True
        ):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(3, layer.in_features, generator=generator).to(torch.bfloat16)
            assert type(layer) is nn.Linear, name
            assert torch.equal(layer(x), expected(x)), name


def test_the_model_stays_as_it_is(
    model: Pi05, scales: Scales, inputs: tuple[ModelInputs, Tensor]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    actions_of(FakeQuantPi05(model, scales), inputs)
    after = model.state_dict()
    assert model.dtype == torch.float32
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["vision.layers.0.mlp.fc1", "expert.layers.1.mlp.down"])
def test_a_layer_multiplies_dequantised_values(model: Pi05, scales: Scales, name: str) -> None:
    (linear,) = Site(name, "vision", (name,)).layers(model)
    own = scales.sites[name]
    layer = FakeQuantPi05(model, scales).get_submodule(name)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    weight = dequantise(quantise(linear.weight, own.weight), own.weight)
    product = dequantise(quantise(x, own.input[0]), own.input[0]) @ weight.T
    expected = product if linear.bias is None else product + linear.bias
    torch.testing.assert_close(layer(x), expected)
    wide = layer(x.to(torch.bfloat16))
    assert wide.dtype == torch.bfloat16


def test_each_step_takes_its_own_scale(
    model: Pi05, scales: Scales, inputs: tuple[ModelInputs, Tensor]
) -> None:
    """Ruining the scale of one step changes that step's velocity and no earlier one."""
    tensors, noise = inputs

    def velocities(scales: Scales) -> list[Tensor]:
        fake = FakeQuantPi05(model, scales)
        cache = prefilled(fake, tensors)
        times = [torch.tensor([1 - step / STEPS]) for step in range(STEPS)]
        return [fake.velocity(cache, noise[None], time) for time in times]

    ruined_step = 2
    name = "expert.layers.1.mlp.down"
    own = scales.sites[name]
    ruined = [value * (1000 if step == ruined_step else 1) for step, value in enumerate(own.input)]
    sites = dict(scales.sites) | {name: SiteScales(own.weight, tuple(ruined))}
    pairs = zip(
        velocities(scales), velocities(dataclasses.replace(scales, sites=sites)), strict=True
    )
    assert [torch.equal(good, bad) for good, bad in pairs] == [True, True, False, True]


def test_denoising_goes_through_the_steps_as_velocity_does(
    model: Pi05, scales: Scales, inputs: tuple[ModelInputs, Tensor]
) -> None:
    fake = FakeQuantPi05(model, scales)
    tensors, noise = inputs
    cache = prefilled(fake, tensors)
    actions = noise[None]
    for step in range(STEPS):
        time = torch.tensor([1 + step * (-1 / STEPS)])
        actions = actions - fake.velocity(cache, actions, time) / STEPS
    torch.testing.assert_close(fake.denoise(cache, noise[None], STEPS), actions)


def test_the_last_scale_serves_times_behind_the_last_step(
    model: Pi05, scales: Scales, inputs: tuple[ModelInputs, Tensor]
) -> None:
    fake = FakeQuantPi05(model, scales)
    tensors, noise = inputs
    cache = prefilled(fake, tensors)
    assert fake.velocity(cache, noise[None], torch.tensor([0.0])).isfinite().all()


def test_another_number_of_steps_is_refused(
    model: Pi05, scales: Scales, policy: Policy, observations: list[Observation]
) -> None:
    fake = Policy(policy.processor, EagerEngine(FakeQuantPi05(model, scales)), num_steps=5)
    with pytest.raises(ValueError, match="scales are for 4 denoising steps, got num_steps=5"):
        fake.infer(observations[0])
    assert fake.infer(observations[0], num_steps=4).actions.shape == (7, 6)


def test_scales_of_another_model_are_refused(tiny_config: Pi05Config, scales: Scales) -> None:
    other = random_model(dataclasses.replace(tiny_config, vision_depth=3))
    with pytest.raises(ValueError, match=r"missing: vision\.layers\.2\.attn\.qkv, vision"):
        FakeQuantPi05(other, scales)


def test_an_input_that_is_not_finite_is_refused(model: Pi05, scales: Scales) -> None:
    layer = FakeQuantPi05(model, scales).get_submodule("vision.layers.0.mlp.fc1")
    with pytest.raises(ValueError, match="only finite values can be quantised"):
        layer(torch.full((1, model.config.vision_width), math.nan))
