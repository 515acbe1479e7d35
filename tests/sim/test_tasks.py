"""The table of tasks agrees with Meta-World and with itself."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from halfpi.processing.prompt import clean_prompt
from halfpi.sim.rendering import RenderingUnavailableError, choose_gl
from halfpi.sim.tasks import PRECISE, SHARED_SCENE, TASKS, select


def test_meta_world_has_an_environment_and_an_expert_for_every_task() -> None:
    try:
        choose_gl()  # Meta-World imports mujoco, which loads OpenGL
    except RenderingUnavailableError as error:
        pytest.skip(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    names = {task.environment for task in TASKS.values()}
    assert names <= set(ALL_V3_ENVIRONMENTS)
    assert names <= set(ENV_POLICY_MAP)


def test_a_sentence_asks_for_one_task_only() -> None:
    counts = Counter(sentence for task in TASKS.values() for sentence in task.sentences)
    assert counts.most_common(1)[0][1] == 1


def test_every_task_has_paraphrases_that_enter_the_prompt_unchanged() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.sentences) >= 2
        assert task.instruction == task.sentences[0]
        assert [clean_prompt(sentence) for sentence in task.sentences] == [*task.sentences]


def test_sharing_a_scene_is_mutual_and_between_different_tasks() -> None:
    for task, other in SHARED_SCENE.items():
        assert task != other
        assert SHARED_SCENE[other] == task
        assert {task, other} <= set(TASKS)


def test_select_keeps_the_order_and_drops_repetitions() -> None:
    names = [task.name for task in select(["push", "door-open", "push"])]
    assert names == ["push", "door-open"]


def test_select_knows_groups() -> None:
    assert select(["all"]) == [*TASKS.values()]
    assert [task.name for task in select(["precise"])] == [*PRECISE]
    assert select(["hammer", "precise"])[0].name == "hammer"
    assert len(select(["precise", "all"])) == len(TASKS)


@pytest.mark.parametrize("name", ["", "drawer-open-v3", "Push", "PRECISE"])
def test_select_names_an_unknown_task(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown task '{name}'; expected all, precise or one of"):
        select(["push", name])
