"""The protocol: what runs when, and that clocks tell milliseconds."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from halfpi.perf.timing import captured, measure, measure_short, percentiles, rotation


def test_variants_are_interleaved_and_inputs_count_up() -> None:
    ran: list[tuple[str, int]] = []

    def note(name: str, index: int) -> None:
        ran.append((name, index))

    calls = {name: partial(note, name) for name in ("a", "b")}
    timed = measure(calls, "host", repeats=3, warm_ups=2)
    assert list(timed) == ["a", "b"]
    assert ran == [(name, index) for index in range(5) for name in ("a", "b")]


def test_warm_ups_do_not_count() -> None:
    timed = measure(
        {"work": lambda index: time.sleep(0.05 if index < 2 else 0)}, "host", repeats=5, warm_ups=2
    )
    p99 = timed["work"].p99
    assert p99 is not None
    assert p99 < 40


def test_the_host_clock_is_in_milliseconds() -> None:
    times = measure({"nap": lambda _: time.sleep(0.02)}, "host", repeats=3, warm_ups=0)["nap"]
    assert 19 < times.p50 < 200


def test_a_call_of_several_runs_gives_the_time_of_one() -> None:
    nap = {"nap": lambda _: time.sleep(0.02)}
    times = measure(nap, "host", repeats=3, warm_ups=0, runs=10)["nap"]
    assert 1.9 < times.p50 < 20


def test_on_a_cpu_short_work_runs_as_it_is() -> None:
    indices: list[int] = []
    times = measure_short({"note": indices.append}, torch.device("cpu"), repeats=5)
    assert indices == list(range(15))
    assert list(times) == ["note"]
    assert rotation(torch.device("cpu"), 10**9) == 2


def test_calls_at_a_rate_rest_in_between() -> None:
    began: list[float] = []
    start = time.perf_counter()
    timed = measure(
        {"note": lambda _: began.append(time.perf_counter())},
        "host",
        repeats=4,
        warm_ups=1,
        rate_hz=50,
    )
    assert all(at - start >= index / 50 for index, at in enumerate(began))
    assert timed["note"].p50 < 19
    with pytest.raises(ValueError, match="rate_hz must be positive, got 0"):
        measure({"note": print}, "host", repeats=1, rate_hz=0)


def test_percentiles_are_interpolated() -> None:
    times = percentiles([float(value) for value in range(101)])
    assert (times.p50, times.p90, times.p99) == (50.0, 90.0, 99.0)
    assert percentiles([1.0, 2.0]).p50 == 1.5


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to measure: 0 calls, 5 repeats"):
        measure({}, "host", repeats=5)
    with pytest.raises(ValueError, match="nothing to measure: 1 calls, 0 repeats"):
        measure({"work": print}, "host", repeats=0)


CUDA = torch.device("cuda")


@pytest.mark.gpu
def test_graphs_rotate_their_inputs_and_are_timed_on_the_device() -> None:
    inputs = torch.arange(1.0, 4.0, device="cuda")
    out = torch.zeros((), device="cuda")
    call = captured(lambda index: out.copy_(inputs[index] * 2), inputs=3)
    for index in range(6):
        call(index)
        assert out.item() == 2 * (index % 3 + 1)
    short = measure_short({"copy": lambda index: out.copy_(inputs[index % 3])}, CUDA, repeats=20)
    assert 0 < short["copy"].p50 < 1
    assert rotation(CUDA, 10**12) == 2
    assert rotation(CUDA, 1) == 64
    large = torch.randn(4096, 4096, device="cuda")
    product = captured(lambda _: large @ large, inputs=1)
    times = measure({"small": call, "large": product}, "cuda", repeats=20)
    assert times["small"].p50 < times["large"].p50
