"""What packing adds to the weights of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import pytest
import torch
from tests.conftest import TINY, build_pi05
from tests.engine.conftest import random_model
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.engine.packing import HIDDEN_ALIGN, Packer
from halfpi.engine.persistent import persistent_vision, siglip_weights
from halfpi.kernels.siglip_layers import SITES, siglip_layers_reference
from halfpi.kernels.spec import FP8_MAX
from halfpi.model.siglip import VisionBlock
from halfpi.quant import Scales
from halfpi.quant.scales import SiteScales
from halfpi.quant.sites import quantised_sites

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_activations_of_siglip_are_whole_lines(dtype: torch.dtype) -> None:
    model = random_model()
    hidden, width = model.config.vision_mlp, model.config.vision_width
    padded = -(-hidden // HIDDEN_ALIGN) * HIDDEN_ALIGN
    assert padded > hidden
    layer = Packer(model, CPU, dtype, None).vision().layers[0]
    fc1, fc2 = layer.fc1, layer.fc2
    assert fc1.weight.shape == (padded, width)
    assert fc2.weight.shape == (width, padded)
    assert fc1.bias is not None
    assert fc1.bias.dtype == fc1.weight.dtype == fc2.weight.dtype == dtype
    # What is added is GELU(0) = 0 and meets zeros.
    for tensor in (fc1.weight[hidden:], fc1.bias[hidden:], fc2.weight[:, hidden:]):
        assert tensor.count_nonzero() == 0
    plain = dict(model.vision.layers[0].named_parameters())
    torch.testing.assert_close(fc1.weight[:hidden], plain["mlp.fc1.weight"].to(dtype))
    torch.testing.assert_close(fc2.weight[:, :hidden], plain["mlp.fc2.weight"].to(dtype))


def test_layers_of_siglip_have_their_parts_of_a_stack() -> None:
    weights = Packer(random_model(), CPU, torch.float32, None).vision()
    for name, stack in weights.stacks.items():
        for index, layer in enumerate(weights.layers):
            own = getattr(layer, name).weight
            assert own.data_ptr() == stack[index].data_ptr()
            assert torch.equal(own, stack[index])
    assert set(weights.stacks) == {"qkv", "out", "fc1", "fc2"}


def test_siglip_as_one_kernel_has_the_layers_of_the_model() -> None:
    config = dataclasses.replace(
        TINY, vision_width=1152, vision_mlp=4304, vision_depth=4, vision_heads=16
    )
    model = build_pi05(config).requires_grad_(False).eval()
    sites = {
        site.name: SiteScales(
            max(float(one.weight.abs().max()) for one in site.layers(model)) / FP8_MAX,
            (0.01 + 0.001 * index,),
        )
        for index, site in enumerate(quantised_sites(config))
        if site.stage == "vision"
    }
    packed = Packer(model, CPU, torch.bfloat16, Scales(1, 1, 1.0, sites)).vision()
    weights = siglip_weights(packed)
    weights.check()
    exact = {
        site: getattr(weights, site).float()
        * (weights.alphas / weights.input_scales)[:, SITES.index(site), None, None]
        for site in SITES
    }
    x = torch.randn(256, config.vision_width)
    expected = x[None]
    for index, layer in enumerate(model.vision.layers):
        _round(cast("VisionBlock", layer), {site: exact[site][index] for site in SITES})
        expected = layer(expected)
    result = siglip_layers_reference(x, dataclasses.replace(weights, **exact))
    # A value's bias went into out's before the weights of out were rounded.
    assert (result - expected[0]).norm() <= 1e-3 * (expected[0] - x).norm()
    assert persistent_vision(config, packed, 2, CPU) is None


def _round(block: VisionBlock, weights: Mapping[str, Tensor]) -> None:
    """Give `block` the numbers that E4M3 and bfloat16 leave of its weights."""
    attn, mlp = block.attn, block.mlp
    for linear, weight in zip((attn.q, attn.k, attn.v), weights["qkv"].chunk(3), strict=True):
        linear.weight.copy_(weight)
    attn.o.weight.copy_(attn.o.weight.bfloat16())
    hidden = mlp.fc1.out_features
    mlp.fc1.weight.copy_(weights["fc1"][:hidden])
    mlp.fc2.weight.copy_(weights["fc2"][:, :hidden])
