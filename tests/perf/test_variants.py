"""The models between plain torch and the engine compute what plain torch computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.config import Pi05Config
from halfpi.model import Pi05
from halfpi.perf.ablation import bench_ablation
from halfpi.perf.bench import model_inputs
from halfpi.perf.cases import ABLATION, Case
from halfpi.perf.engines import random_scales
from halfpi.perf.synthetic import random_model
from halfpi.perf.variants import (
    Fp8Linear,
    fuse_attention,
    fuse_quantisation,
    quantise_linears,
    sharing_copy,
)
from halfpi.quant import FakeQuantPi05, Scales

CASE = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=2, precision="bf16")


def actions(model: Pi05) -> Tensor:
    inputs, noise = model_inputs(model.config, CASE, torch.device("cpu"))
    return model.sample_actions(**vars(inputs), noise=noise, num_steps=CASE.steps)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def constant(scales: Scales) -> Scales:
    """One input scale for all steps, as the variants have."""
    sites = {
        name: dataclasses.replace(site, input=(max(site.input),) * len(site.input))
        for name, site in scales.sites.items()
    }
    return dataclasses.replace(scales, sites=sites)


def test_fused_attention_changes_nothing(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config)
    fused = sharing_copy(model)
    fuse_attention(fused)
    torch.testing.assert_close(actions(fused), actions(model), rtol=1e-4, atol=1e-4)
    shared = (each.vision.projector.weight.data_ptr() for each in (fused, model))
    assert len(set(shared)) == 1


@pytest.mark.parametrize("changes", [(), (fuse_attention,), (fuse_attention, fuse_quantisation)])
def test_fp8_variants_compute_what_fake_quantisation_does(
    tiny_config: Pi05Config, changes: tuple[Callable[[Pi05], None], ...]
) -> None:
    model = random_model(tiny_config, dtype="bfloat16")
    scales = random_scales(model, CASE)
    expected = actions(FakeQuantPi05(model, constant(scales)))
    changed = sharing_copy(model)
    if fuse_attention in changes:
        fuse_attention(changed)
    quantise_linears(changed, scales)
    if fuse_quantisation in changes:
        fuse_quantisation(changed)
    assert difference(actions(changed), expected) < 0.03
    assert 0 < difference(actions(changed), actions(model)) < 0.3


def test_a_quantised_layer_takes_what_is_quantised_already() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 32).requires_grad_(False)
    layer = Fp8Linear(plain, weight_scale=0.001, input_scale=0.01)
    x = torch.randn(2, 5, 48)
    narrow = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(layer(x), layer(narrow))
    assert difference(layer(x).float(), plain(x)) < 0.05


def test_the_waterfall_of_a_tiny_model(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config, dtype="bfloat16")
    names = ("naive fp8", "eager", "fused attention", "fused fp8")
    records = bench_ablation(model, CASE, names, repeats=2)
    assert [record.engine for record in records] == [name for name in ABLATION if name in names]
    assert [record.case["precision"] for record in records] == ["bf16", "bf16", "fp8", "fp8"]
    errors = [record.error for record in records]
    assert all(error is not None and 1e-4 < error < 0.3 for error in errors)


def test_a_variant_must_exist(tiny_config: Pi05Config) -> None:
    with pytest.raises(ValueError, match=r"variants must be of eager, graph, .*, got faster"):
        bench_ablation(random_model(tiny_config), CASE, ("faster",))


def test_the_engines_variants_need_a_gpu(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config, dtype="bfloat16")
    with pytest.raises(ValueError, match="backend triton needs a CUDA device, got cpu"):
        bench_ablation(model, CASE, ("restructured expert",))
