"""Benchmarks of a tiny model on whatever is here, down to the line in the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from halfpi.config import PRESETS, Pi05Config
from halfpi.engine import EagerEngine, Noise
from halfpi.model import Pi05
from halfpi.perf import bench, engines
from halfpi.perf.bench import (
    bench_e2e,
    bench_stages,
    model_inputs,
    reference_actions,
    relative_error,
)
from halfpi.perf.cases import STAGES, Case
from halfpi.perf.engines import Subject, engine_config, make_subject
from halfpi.perf.environment import environment
from halfpi.perf.records import Record, append_record, read_records
from halfpi.perf.report import number_of, report
from halfpi.perf.synthetic import random_model, random_observations, random_policy
from halfpi.processing.pipeline import ModelInputs
from halfpi.types import StageTimes

CASE = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=2, precision="fp32")
BF16 = dataclasses.replace(CASE, precision="bf16")
CPU = torch.device("cpu")


class GraphStandIn:
    """What a captured engine looks like: stages that note that they were replayed."""

    defers = False

    def __init__(self, model: Pi05) -> None:
        self.eager = EagerEngine(model)
        self.config, self.device = model.config, CPU
        self.replayed: list[str] = []
        self.runs = 0

    def forget(self) -> None:
        self.eager.forget()

    def run(
        self, inputs: ModelInputs | None, noise: Noise, num_steps: int, *rest: object
    ) -> tuple[torch.Tensor, StageTimes]:
        self.runs += 1
        actions, _ = self.eager.run(inputs, noise, num_steps)
        return actions, StageTimes(vision_ms=1.0, prefill_ms=2.0, denoise_ms=3.0)

    def stage_graphs(
        self, cameras: int, prompt_tokens: int, num_steps: int
    ) -> Mapping[str, Callable[[], None]]:
        assert (cameras, prompt_tokens, num_steps) == (2, 9, 2)
        return {stage: lambda stage=stage: self.replayed.append(stage) for stage in STAGES}  # type: ignore[misc]


def subject_of(config: Pi05Config, case: Case = CASE) -> Subject:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[case.precision]
    return make_subject(random_model(config, dtype=dtype), case, engine_config(case, "eager"))


def shown(*records: Record) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report(records))
    return capture.get()


def test_stages_are_timed_and_recorded(tiny_config: Pi05Config, tmp_path: Path) -> None:
    record = bench_stages(subject_of(tiny_config), CASE, repeats=3)
    assert list(record.ms) == ["vision", "prefill", "denoise", "total"]
    assert record.case == dataclasses.asdict(CASE)
    assert (record.kind, record.engine, record.error) == ("measured", "eager", 0.0)
    append_record(record, tmp_path)
    assert read_records(tmp_path) == [record]


def test_the_stages_of_a_captured_engine_are_replayed(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config)
    engine = GraphStandIn(model)
    subject = Subject(engine, model, "triton")
    record = bench_stages(subject, CASE, repeats=3)
    assert engine.replayed == [*STAGES, *STAGES] * 13  # ten warm-ups; each stage, then all three
    assert (record.engine, record.error) == ("triton", 0.0)


def test_an_engine_has_run_before_its_stages_are_replayed(
    tiny_config: Pi05Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GraphStandIn] = []

    def stand_in(model: Pi05, *_: object, **__: object) -> GraphStandIn:
        made.append(GraphStandIn(model))
        return made[-1]

    monkeypatch.setattr(engines, "make_engine", stand_in)
    subject = subject_of(tiny_config)
    assert subject.engine is made[0]
    assert made[0].runs == 1


def test_a_number_belongs_to_the_time_that_it_names(tiny_config: Pi05Config) -> None:
    record = bench_stages(subject_of(tiny_config), CASE, repeats=1)
    record = dataclasses.replace(record, numbers={"kernels": 3.0, "error vision": 0.5})
    assert (number_of(record, "kernels", "total"), number_of(record, "error", "vision")) == (3, 0.5)
    assert number_of(record, "kernels", "vision") is None
    assert number_of(record, "error", "total") is None


def test_at_a_rate_a_call_runs_whole_or_in_stages(tiny_config: Pi05Config) -> None:
    stand_in = GraphStandIn(random_model(tiny_config))
    subject = dataclasses.replace(subject_of(tiny_config), engine=stand_in, backend="triton")
    record = bench_stages(subject, CASE, repeats=3, rate_hz=200)
    assert (record.benchmark, record.numbers["rate_hz"]) == ("paced", 200)
    assert list(record.ms) == ["vision", "prefill", "denoise", "total"]
    assert stand_in.replayed == list(STAGES) * 26  # 10 to warm up and 3, apart and whole


def test_a_narrow_model_is_compared_with_itself_in_fp32(tiny_config: Pi05Config) -> None:
    record = bench_stages(subject_of(tiny_config, BF16), BF16, repeats=1)
    assert record.error is not None
    assert 1e-4 < record.error < 0.1


def test_errors_are_relative_to_the_reference(tiny_config: Pi05Config) -> None:
    model = random_model(tiny_config)
    inputs, noise = model_inputs(tiny_config, CASE, CPU)
    actions = model.sample_actions(**vars(inputs), noise=noise, num_steps=CASE.steps)[0]
    reference = reference_actions(model, CASE)
    assert torch.equal(reference, actions)
    assert relative_error(1.5 * actions, reference) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("shape", [None, (30, 40)])
def test_a_policy_is_timed_from_end_to_end(
    tiny_config: Pi05Config, shape: tuple[int, int] | None
) -> None:
    subject = subject_of(tiny_config)
    policy = random_policy(subject.engine, CASE)
    observations = random_observations(tiny_config, CASE, 2, image_shape=shape)
    record = bench_e2e(subject, policy, observations, CASE, repeats=3)
    assert list(record.ms) == ["processing", "vision", "prefill", "denoise", "total"]
    assert record.ms["total"].p50 > record.ms["denoise"].p50
    assert record.numbers["image_height"] == (28 if shape is None else 30)
    assert record.numbers["image_width"] == (28 if shape is None else 40)
    assert record.numbers["p99_over_p50"] >= 1
    assert "graphs_ms" not in record.numbers


def test_without_a_known_device_there_is_no_floor(tiny_config: Pi05Config) -> None:
    record = bench_stages(subject_of(tiny_config), CASE, repeats=1)
    assert record.floor_ms is None
    text = shown(record)
    assert f"No floor is known on {record.device}" in text
    assert "vision" in text


def test_on_a_known_device_floor_and_share_are_shown(
    tiny_config: Pi05Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment(CPU)
    on_h200 = dataclasses.replace(here, device="NVIDIA H200")
    monkeypatch.setattr(bench, "environment", lambda _: on_h200)
    record = bench_stages(subject_of(tiny_config, BF16), BF16, repeats=1)
    assert record.floor_ms is not None
    assert list(record.floor_ms) == list(record.ms)
    text = shown(record)
    assert "share" in text
    assert "0%" in text
    assert "No floor" not in text


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        report([])


def test_fake_quantisation_is_not_timed(tiny_config: Pi05Config) -> None:
    case = dataclasses.replace(CASE, precision="fp8")
    model = random_model(tiny_config, dtype="bfloat16")
    with pytest.raises(ValueError, match="its time means nothing"):
        make_subject(model, case, engine_config(case, "eager"))


def test_an_engine_must_exist(tiny_config: Pi05Config) -> None:
    with pytest.raises(ValueError, match="backend must be one of eager, compile, triton, got"):
        engine_config(CASE, "tensorrt")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp8, got 'nvfp4'"):
        engine_config(dataclasses.replace(CASE, precision="nvfp4"), "triton")


def test_observations_must_be_of_the_case(tiny_config: Pi05Config) -> None:
    subject = subject_of(tiny_config)
    policy = random_policy(subject.engine, CASE)
    with pytest.raises(ValueError, match=r"of 2 cameras and 9 prompt tokens, got none"):
        bench_e2e(subject, policy, [], CASE)
    observations = random_observations(tiny_config, CASE, 2)
    longer = dataclasses.replace(observations[0], prompt="abcdefghi")
    with pytest.raises(ValueError, match=r"got \[\(2, 9\), \(2, 11\)\]"):
        bench_e2e(subject, policy, [*observations, longer], CASE)


def test_a_random_policy_refuses_what_it_cannot_be(tiny_config: Pi05Config) -> None:
    engine = EagerEngine(random_model(tiny_config))
    with pytest.raises(ValueError, match="the model's horizon is 7, the case's 50"):
        random_policy(engine, dataclasses.replace(CASE, horizon=50))
    with pytest.raises(ValueError, match="prompt has more than 2 tokens, got 2"):
        random_policy(engine, dataclasses.replace(CASE, prompt_tokens=2))


def test_random_models_repeat_and_have_no_zero_matrix(tiny_config: Pi05Config) -> None:
    first, again, other = (random_model(tiny_config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(bool((tensor != 0).any()) for tensor in first.values())


def test_random_models_keep_the_size_of_activations() -> None:
    nano = PRESETS["nano"]
    case = Case("nano", cameras=2, prompt_tokens=20, horizon=16, steps=10, precision="fp32")
    inputs, noise = model_inputs(nano, case, CPU)
    actions = random_model(nano).sample_actions(**vars(inputs), noise=noise)
    assert 0.1 < float(actions.std()) < 10


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_stages_are_timed_on_a_gpu(backend: str) -> None:
    case = Case("nano", cameras=2, prompt_tokens=20, horizon=16, steps=2, precision="bf16")
    model = random_model(PRESETS["nano"], device="cuda", dtype="bfloat16")
    record = bench_stages(make_subject(model, case, engine_config(case, backend)), case, repeats=5)
    assert record.driver
    assert record.cuda
    assert record.error is not None
    assert record.error < 0.1
    assert record.device == torch.cuda.get_device_name()
