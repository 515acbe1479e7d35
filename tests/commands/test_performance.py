"""`halfpi bench`, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.commands.conftest import Halfpi, Mistake

from halfpi.perf.records import read_records


def test_stages_are_printed_recorded_and_drawn(
    halfpi: Halfpi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    arguments = ("--device", "cpu", "--repeats", 2, "--num-steps", 1)
    chart = tmp_path / "chart.svg"
    halfpi("bench", "stages", "nano", *arguments, "--results", tmp_path, "--chart", chart)
    (record,) = read_records(tmp_path)
    assert (record.benchmark, record.case["model"], record.case["steps"]) == ("stages", "nano", 1)
    assert "denoise" in capsys.readouterr().out
    assert "denoise" in chart.read_text()


def test_stages_can_be_asked_for_at_a_rate(halfpi: Halfpi, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--repeats", 1, "--num-steps", 1, "--rate-hz", 50)
    halfpi("bench", "paced", "nano", *arguments, "--results", tmp_path)
    (record,) = read_records(tmp_path)
    assert (record.benchmark, record.numbers["rate_hz"]) == ("paced", 50)


def test_end_to_end_is_recorded_for_two_sizes_of_images(halfpi: Halfpi, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--repeats", 2, "--num-steps", 1, "--precision", "bf16")
    halfpi("bench", "e2e", *arguments, "--results", tmp_path)
    sizes = [record.numbers["image_height"] for record in read_records(tmp_path)]
    assert sizes == [112, 480]


def test_cold_starts_are_of_processes_of_their_own(halfpi: Halfpi, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--repeats", 1, "--precision", "fp8", "--backend", "eager")
    size = ("--cameras", 1, "--prompt-tokens", 24)
    halfpi("bench", "cold", "nano", *arguments, *size, "--results", tmp_path)
    (record,) = read_records(tmp_path)
    assert (record.benchmark, record.case["cameras"]) == ("cold", 1)
    assert list(record.ms) == ["empty", "full"]
    parts = [record.numbers[f"{name}_s full"] for name in ("import", "load", "call")]
    assert min(parts) > 0
    assert 1000 * sum(parts) == pytest.approx(record.ms["full"].p50)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("kernels", "--kernels", "fft"), "no kernel is called fft; there are ada_rms_norm, "),
        (("kernels",), "needs a CUDA device, got cpu"),
        (("mlp",), "needs a CUDA device, got cpu"),
        (("attention",), "needs a CUDA device, got cpu"),
        (("ablation", "tiny"), "no preset is called tiny: pi05, "),
        (("cold", "tiny"), "no preset is called tiny: pi05, "),
        (("cold", "nano"), "prompt_tokens must be at most 48, got 200"),
        (("cold", "nano", "--prompt-tokens", "24"), "was started ended with status 1"),
        (("ablation", "nano", "--variants", "faster"), "variants must be of eager, "),
        (("stages", "--backend", "triton"), "backend triton needs a CUDA device, got cpu"),
        (("stages", "--precision", "fp8"), "its time means nothing"),
        (("stages", "--cameras", "0"), "Case.cameras must be an int of at least 1, got 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: tuple[str, ...], said: str, mistake: Mistake
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert said in mistake("bench", *arguments, "--device", "cpu")
