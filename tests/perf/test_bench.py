"""Benchmarks of a tiny model on whatever is here, down to the line in the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console

from halfpi.config import PRESETS, Pi05Config
from halfpi.engine import EagerEngine
from halfpi.perf import bench
from halfpi.perf.bench import bench_e2e, bench_stages, report
from halfpi.perf.cases import Case
from halfpi.perf.environment import environment
from halfpi.perf.records import Record, append_record, read_records
from halfpi.perf.synthetic import (
    random_inputs,
    random_model,
    random_observations,
    random_policy,
)
from halfpi.policy import Policy
from halfpi.quant import FakeQuantPi05, calibrate

CASE = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=2, precision="fp32")
BF16 = dataclasses.replace(CASE, precision="bf16")


def shown(record: Record) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report(record))
    return capture.get()


def test_stages_are_timed_and_recorded(tiny_config: Pi05Config, tmp_path: Path) -> None:
    record = bench_stages(random_model(tiny_config), CASE, repeats=3)
    assert list(record.ms) == ["vision", "prefill", "denoise", "total"]
    assert record.case == dataclasses.asdict(CASE)
    assert (record.kind, record.engine, record.error) == ("measured", "eager", 0.0)
    assert record.commit
    append_record(record, tmp_path)
    assert read_records(tmp_path) == [record]


def test_a_narrow_model_is_compared_with_itself_in_fp32(tiny_config: Pi05Config) -> None:
    record = bench_stages(random_model(tiny_config, dtype="bfloat16"), BF16, repeats=1)
    assert record.error is not None
    assert 1e-4 < record.error < 0.1


def test_a_policy_is_timed_from_end_to_end(tiny_config: Pi05Config) -> None:
    policy = random_policy(random_model(tiny_config), CASE)
    observations = random_observations(tiny_config, CASE, 2)
    record = bench_e2e(policy, observations, name="tiny", repeats=3)
    assert list(record.ms) == ["processing", "vision", "prefill", "denoise", "total"]
    assert record.case == dataclasses.asdict(CASE)
    assert record.ms["total"].p50 > record.ms["denoise"].p50


def test_without_a_known_device_there_is_no_floor(tiny_config: Pi05Config) -> None:
    record = bench_stages(random_model(tiny_config), CASE, repeats=1)
    assert record.floor_ms is None
    text = shown(record)
    assert f"No floor is known on {record.device} in fp32" in text
    assert "vision" in text


def test_on_a_known_device_floor_and_share_are_shown(
    tiny_config: Pi05Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment(torch.device("cpu"))
    on_h200 = dataclasses.replace(here, device="NVIDIA H200")
    monkeypatch.setattr(bench, "environment", lambda _: on_h200)
    record = bench_stages(random_model(tiny_config, dtype="bfloat16"), BF16, repeats=1)
    assert record.floor_ms is not None
    assert list(record.floor_ms) == list(record.ms)
    text = shown(record)
    assert "share of floor" in text
    assert "0%" in text
    assert "No floor" not in text


def test_the_precision_must_be_the_models(tiny_config: Pi05Config) -> None:
    with pytest.raises(ValueError, match="the model is fp32, the case bf16"):
        bench_stages(random_model(tiny_config), BF16)


def test_fake_quantisation_is_not_timed(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config)
    policy = random_policy(model, CASE)
    observations = random_observations(tiny_config, CASE, 1)
    fake = FakeQuantPi05(model, calibrate(model, policy.infer, observations))
    with pytest.raises(ValueError, match="its time means nothing"):
        bench_stages(fake, dataclasses.replace(CASE, precision="fp8"))
    slow = Policy(policy.processor, EagerEngine(fake), num_steps=2)
    with pytest.raises(ValueError, match="its time means nothing"):
        bench_e2e(slow, observations, name="tiny")


def test_observations_must_be_alike(tiny_config: Pi05Config) -> None:
    policy = random_policy(random_model(tiny_config), CASE)
    with pytest.raises(ValueError, match=r"must be of one number .*, got none"):
        bench_e2e(policy, [], name="tiny")
    observations = random_observations(tiny_config, CASE, 2)
    longer = dataclasses.replace(observations[0], prompt="abcdefghi")
    with pytest.raises(ValueError, match=r"got \[\(2, 9\), \(2, 11\)\]"):
        bench_e2e(policy, [*observations, longer], name="tiny")


def test_a_random_policy_refuses_what_it_cannot_be(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config)
    with pytest.raises(ValueError, match="the model's horizon is 7, the case's 50"):
        random_policy(model, dataclasses.replace(CASE, horizon=50))
    with pytest.raises(ValueError, match="prompt has more than 2 tokens, got 2"):
        random_policy(model, dataclasses.replace(CASE, prompt_tokens=2))


def test_random_models_repeat_and_have_no_zero_matrix(tiny_config: Pi05Config) -> None:
    first, again, other = (random_model(tiny_config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(bool((tensor != 0).any()) for tensor in first.values())


def test_random_models_keep_the_size_of_activations() -> None:
    nano = PRESETS["nano"]
    case = Case("nano", cameras=2, prompt_tokens=20, horizon=16, steps=10, precision="fp32")
    inputs, noise = random_inputs(nano, case)
    actions = random_model(nano).sample_actions(**vars(inputs), noise=noise[None])
    assert 0.1 < float(actions.std()) < 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stages_are_timed_on_a_gpu(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config, device="cuda", dtype="bfloat16")
    record = bench_stages(model, BF16, repeats=5)
    assert record.driver
    assert record.cuda
    assert record.peak_bytes is not None
    assert record.device == torch.cuda.get_device_name()
