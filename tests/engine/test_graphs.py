"""Replays that are timed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from halfpi.engine.graphs import Timed
from halfpi.types import StageTimes


def test_on_a_cpu_the_last_replay_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([1.0, 1.25, 5.0, 5.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    done: list[int] = []
    work = Timed(lambda: done.append(len(done)), torch.device("cpu"))
    assert done == []
    work()
    assert work.elapsed_ms() == 250.0
    work()
    assert work.elapsed_ms() == 500.0
    assert done == [0, 1]


@pytest.mark.gpu
def test_on_a_gpu_its_own_events_time_it() -> None:
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)

    def work() -> None:
        x.add_(1)

    replayed = Timed(work, device)
    before = int(x)
    for count in (1, 2):
        replayed()
        assert replayed.elapsed_ms() > 0
        assert int(x) == before + count


def test_what_no_stage_takes_is_processing() -> None:
    times = StageTimes(vision_ms=1.0, prefill_ms=2.0, denoise_ms=4.0).within(7.5)
    assert times == StageTimes(0.5, 1.0, 2.0, 4.0)
    assert times.total_ms == 7.5
