"""Closed-loop evaluation: tasks × held-out episodes, in parallel, with confidence intervals.

Every episode is determined by its seed: the scene, and through `Policy.reseed` the noise. Two
settings run on the same seeds therefore differ in the setting alone, which is what a paired
comparison needs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from halfpi.config import Backend, Precision
from halfpi.policy import Policy, load_policy
from halfpi.sim.environment import MAX_STEPS, MetaWorldEnvironment
from halfpi.sim.record import HELD_OUT_SEED
from halfpi.sim.tasks import Task
from halfpi.types import ActionChunk, Observation, StageTimes

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EvalConfig:
    """How to play an episode.

    execute: actions executed of each chunk before the next call. prompt_task: ask for another task
    than the environment's. The action error is measured against the scripted expert in the first
    call of an episode and costs a simulation of the expert's chunk.
    """

    policy: str = "nano"
    num_steps: int = 10
    execute: int = 8
    max_steps: int = MAX_STEPS
    precision: Precision = "fp32"
    backend: Backend = "eager"

    def __post_init__(self) -> None:
        for name in ("num_steps", "execute", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Episode:
    """The outcome of one episode.

    steps: control steps played. action_error: mean absolute difference between the policy's first
    chunk and the expert's, in action units (full scale is 2). times: of the calls.
    """

    task: str
    prompt: str
    seed: int
    success: bool
    steps: int
    action_error: float
    times: tuple[StageTimes, ...] = field(repr=False)


def play_episode(
    policy: Policy,
    environment: MetaWorldEnvironment,
    seed: int,
    config: EvalConfig,
    prompt: str | None = None,
    watch: Callable[[Observation, ActionChunk], None] | None = None,
) -> Episode:
    """Play the episode of `seed`; `watch` is shown every observation with its chunk.

    Raises ValueError if `config` executes more actions of a chunk than the policy gives.
    """
    if config.execute > policy.horizon:
        raise ValueError(f"execute must be at most {policy.horizon}, got {config.execute}")
    environment.reset(seed)
    policy.reseed(seed)
    prompt = environment.task.instruction if prompt is None else prompt
    success, step, error = False, 0, math.nan
    times: list[StageTimes] = []
    while step < config.max_steps and not success:
        observation = environment.observe(prompt)
        chunk = policy.infer(observation)
        if watch is not None:
            watch(observation, chunk)
        times.append(chunk.times)
        if step == 0:
            expert = environment.expert_chunk(policy.horizon)
            error = float(np.abs(np.clip(chunk.actions, -1, 1) - expert).mean())
        for action in chunk.actions[: min(config.execute, config.max_steps - step)]:
            step += 1
            if environment.act(action):
                success = True
                break
    return Episode(environment.task.name, prompt, seed, success, step, error, tuple(times))


def evaluate(
    tasks: list[Task],
    episodes: int,
    config: EvalConfig,
    prompts: dict[str, str] | None = None,
    workers: int | None = None,
) -> Iterator[Episode]:
    """Play `episodes` held-out seeds of each task on all cores; yields them as they end.

    prompts: sentences to say instead of a task's own, by task name.
    """
    jobs = [
        _Job(task, HELD_OUT_SEED + index, config, (prompts or {}).get(task.name))
        for task in tasks
        for index in range(episodes)
    ]
    yield from in_parallel(_play, jobs, workers, run=min(5, max(1, episodes)))


def in_parallel(
    play: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None, run: int
) -> Iterator[Result]:
    """`play` every job in processes, by default one a core; yields results as they come.

    run: jobs in a row that go to one process; those of one task keep it on one environment.
    """
    context = multiprocessing.get_context("spawn")  # OpenGL contexts do not survive a fork
    with context.Pool(min(workers or os.cpu_count() or 1, len(jobs))) as pool:
        yield from pool.imap_unordered(play, jobs, chunksize=run)


@dataclass(frozen=True)
class _Job:
    task: Task
    seed: int
    config: EvalConfig
    prompt: str | None


class Worker:
    """What a worker process keeps between episodes: the policy, and the environment last used."""

    def __init__(self, config: EvalConfig) -> None:
        torch.set_num_threads(1)  # the processes share the cores among them
        self.policy = load_policy(
            config.policy,
            # Episodes share the GPU only where an engine needs one: simulation loads the cores.
            device="cuda" if config.backend == "triton" else "cpu",
            precision=config.precision,
            backend=config.backend,
            num_steps=config.num_steps,
        )
        self.environment: MetaWorldEnvironment | None = None

    def prepare(self, task: Task) -> MetaWorldEnvironment:
        """The environment of `task`; the one before is closed."""
        if self.environment is None or self.environment.task != task:
            if self.environment is not None:
                self.environment.close()
            size = self.policy.processor.config.image_size
            self.environment = MetaWorldEnvironment(task, size)
        return self.environment


@cache
def worker_for(config: EvalConfig) -> Worker:
    """The worker of this process for `config`."""
    return Worker(config)


def _play(job: _Job) -> Episode:
    worker = worker_for(job.config)
    return play_episode(worker.policy, worker.prepare(job.task), job.seed, job.config, job.prompt)
