"""Floors against a count over the model's own layers, and against what was worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from halfpi.config import PRESETS, Pi05Config
from halfpi.model import Pi05
from halfpi.perf.bench import model_inputs
from halfpi.perf.cases import STAGES, Case, Precision, standard_case
from halfpi.perf.devices import NoFloorError, devices, find_device
from halfpi.perf.roofline import floors, stage_costs
from halfpi.perf.synthetic import random_model
from halfpi.quant import quantised_sites

PI05 = PRESETS["pi05"]


def test_the_standard_case_is_4_8_tflop() -> None:
    costs = stage_costs(PI05, standard_case()).values()
    assert sum(cost.flops for cost in costs) == pytest.approx(4.8e12, rel=0.01)


@pytest.mark.parametrize(("precision", "floor_ms"), [("bf16", 8.01), ("fp8", 4.54)])
def test_the_floor_of_the_standard_case_on_an_h200(precision: Precision, floor_ms: float) -> None:
    ms = floors(find_device("NVIDIA H200"), PI05, standard_case(precision))
    assert list(ms) == [*STAGES, "total"]
    assert ms["total"] == sum(ms[stage] for stage in STAGES)
    assert ms["total"] == pytest.approx(floor_ms, rel=0.02)


@pytest.mark.parametrize(("precision", "streamed"), [("bf16", 622e6), ("fp8", 311e6)])
def test_the_expert_streams_its_weights_every_step(precision: Precision, streamed: float) -> None:
    cost = stage_costs(PI05, standard_case(precision))["denoise"]
    assert cost.passes == 10
    assert cost.weight_bytes == pytest.approx(streamed, rel=0.005)


def test_quantised_weights_are_those_of_the_sites(tiny_config: Pi05Config) -> None:
    with torch.device("meta"):
        model = Pi05(tiny_config)
    case = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=1, precision="bf16")
    costs = stage_costs(tiny_config, case)
    rows = {"vision": 2 * 4, "prefill": 2 * 4 + 9, "denoise": 7}
    for stage in STAGES:
        sites = [site for site in quantised_sites(tiny_config) if site.stage == stage]
        weights = sum(layer.weight.numel() for site in sites for layer in site.layers(model))
        assert costs[stage].narrow_flops == 2 * rows[stage] * weights


@pytest.mark.parametrize(
    ("stage", "weights"),
    [
        ("vision", 27 * 1152 * (3 * 1152 + 2 * 4304)),  # q, k, v, fc1, fc2
        ("prefill", 17 * 3 * 2048 * 16384),  # gate, up, down
        ("denoise", 18 * 1024 * (18 * 256 + 3 * 4096)),  # and 8 + 1 + 1 + 8 heads
    ],
)
def test_fp8_halves_the_bytes_of_quantised_weights_alone(stage: str, weights: int) -> None:
    wide, narrow = (stage_costs(PI05, standard_case(each))[stage] for each in ("bf16", "fp8"))
    assert wide.weight_bytes - narrow.weight_bytes == weights
    assert wide.flops == narrow.flops


def test_flops_are_what_torch_counts(tiny_config: Pi05Config) -> None:
    case = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=3, precision="bf16")
    model = random_model(tiny_config)
    inputs, noise = model_inputs(tiny_config, case, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.sample_actions(**vars(inputs), noise=noise, num_steps=case.steps)
    once = sum(  # the time MLP and the modulations, which an engine has ready
        2 * case.steps * layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (".dense" in name or "time_mlp" in name)
    )
    expected = sum(cost.flops for cost in stage_costs(tiny_config, case).values())
    assert counter.get_total_flops() - once == expected


def test_a_small_expert_is_read_once_because_it_stays_in_the_cache() -> None:
    nano = PRESETS["nano"]
    case = Case("nano", cameras=2, prompt_tokens=20, horizon=16, steps=10, precision="bf16")
    cost = stage_costs(nano, case)["denoise"]
    h200 = find_device("H200")
    tiny_cache = dataclasses.replace(h200, l2_mb=dataclasses.replace(h200.l2_mb, value=0.1))
    read_once = (cost.weight_bytes + cost.other_bytes) / 4.3e12 * 1e3
    compute_ms = cost.flops / 677e12 * 1e3
    assert cost.floor_ms(h200, "bf16") == pytest.approx(max(read_once, compute_ms))
    assert cost.floor_ms(tiny_cache, "bf16") == pytest.approx(10 * read_once)


def test_less_work_has_a_lower_floor() -> None:
    h200, case = find_device("H200"), standard_case()
    total = floors(h200, PI05, case)["total"]
    for change in ({"cameras": 2}, {"prompt_tokens": 20}, {"steps": 5}, {"precision": "fp8"}):
        assert floors(h200, PI05, dataclasses.replace(case, **change))["total"] < total


@pytest.mark.parametrize("precision", ["fp32", "nvfp4"])
def test_a_precision_without_rates_has_no_floor(precision: Precision) -> None:
    with pytest.raises(NoFloorError, match=f"no floor is known in {precision}, only in bf16, fp8"):
        stage_costs(PI05, standard_case(precision))


def test_an_unknown_device_has_no_floor() -> None:
    with pytest.raises(NoFloorError, match=r"no floor is known on 'NVIDIA A100'; .* H200"):
        find_device("NVIDIA A100")


def test_every_device_has_its_limits_with_a_source() -> None:
    assert set(devices()) == {"H200", "H100", "RTX 4090", "RTX 5090", "Thor"}
    names = [name for device in devices().values() for name in device.names]
    assert len(names) == len(set(names))
    for device in devices().values():
        for limit in (device.bf16_tflops, device.fp8_tflops, device.bandwidth_tbs, device.l2_mb):
            assert limit.value > 0
            assert limit.kind in ("measured", "quoted")
            assert limit.source
        assert 1.8 < device.fp8_tflops.value / device.bf16_tflops.value < 2.1  # dense both


@pytest.mark.parametrize("field", ["cameras", "prompt_tokens", "horizon", "steps"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_a_case_counts_in_positive_ints(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Case.{field} must be an int of at least 1, got"):
        dataclasses.replace(standard_case(), **{field: value})


def test_a_case_has_a_known_precision_and_texts() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of fp32, .*, got 'int8'"):
        standard_case("int8")  # type: ignore[arg-type]
    for field in ("model", "reuse"):
        wrong: dict[str, Any] = {field: 1}
        with pytest.raises(ValueError, match=rf"Case\.{field} must be a text, got 1"):
            dataclasses.replace(standard_case(), **wrong)
