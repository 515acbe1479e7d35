"""What LeRobot does to observations and actions of a "halfpi" policy: next to nothing.

Resizing, normalisation, the prompt and the way back are halfpi's, inside the policy. So actions
leave the policy in the robot's own units, absolute ones, with all of LeRobot's runtimes.
"""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    RenameObservationsProcessorStep,
    make_policy_processor_pipelines,
)

from lerobot_policy_halfpi.configuration_halfpi import HalfpiConfig


def make_halfpi_pre_post_processors(
    config: HalfpiConfig,  # noqa: ARG001 (both are what LeRobot passes)
    dataset_stats: dict[str, dict[str, Any]] | None = None,  # noqa: ARG001
) -> tuple[Any, Any]:
    """The pre- and the postprocessor. A dataset's statistics are not used: the checkpoint's are."""
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device="cpu"),  # where halfpi prepares them
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
