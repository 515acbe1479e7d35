"""The policy type "halfpi" for LeRobot: π0.5 run by halfpi. Importing it registers the type."""

from __future__ import annotations

from lerobot_policy_halfpi.configuration_halfpi import HalfpiConfig
from lerobot_policy_halfpi.modeling_halfpi import HalfpiPolicy
from lerobot_policy_halfpi.processor_halfpi import make_halfpi_pre_post_processors

__all__ = ["HalfpiConfig", "HalfpiPolicy", "make_halfpi_pre_post_processors"]
