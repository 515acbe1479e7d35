"""Headless rendering: which OpenGL MuJoCo uses, and cheap settings for a CPU rasteriser."""

from __future__ import annotations

import ctypes.util
import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mujoco

# A view from above the far right corner: it sees the gripper, the faces of drawers, doors and
# machines that are turned to the robot, and the goal markers on the table. (azimuth°, elevation°,
# distance m, look-at m)
SCENE_VIEW = (200.0, -48.0, 1.05, (0.0, 0.68, 0.1))
WRIST_CAMERA = "gripperPOV"
CAMERAS = ("scene", "wrist")


class RenderingUnavailableError(OSError):
    """No headless OpenGL could be had; the message says which system package brings it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        super().__init__(
            f"headless OpenGL is not available ({reason}); on Debian or Ubuntu install it with "
            "'apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0', "
            "or 'apt-get install libosmesa6'"
        )

    def __reduce__(self) -> tuple[type[RenderingUnavailableError], tuple[str]]:
        # As it crosses processes it is built anew, from the reason and not from the whole message.
        return type(self), (self._reason,)


def choose_gl() -> str:
    """Set MUJOCO_GL, if the user has not, to the first headless OpenGL installed: EGL, then OSMesa.

    Must run before mujoco is imported. Raises RenderingUnavailableError.
    """
    # Several processes render side by side, so each rasterises on its own thread alone.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if "MUJOCO_GL" not in os.environ:
        for backend, libraries in (("egl", ("EGL", "OpenGL")), ("osmesa", ("OSMesa",))):
            if all(map(ctypes.util.find_library, libraries)):
                os.environ["MUJOCO_GL"] = backend
                break
        else:
            raise RenderingUnavailableError("neither libEGL with libOpenGL nor libOSMesa was found")
    return os.environ["MUJOCO_GL"]


class SceneRenderer:
    """Renders the cameras of one MuJoCo model as uint8 (size, size, 3)."""

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        import mujoco

        self._mujoco = mujoco
        # Multisampling alone makes a CPU rasteriser several times slower.
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # each GL binding raises types of its own
            raise RenderingUnavailableError(str(error)) from error
        self._scene_view = _free_camera()

    def render(self, data: mujoco.MjData, camera: str) -> NDArray[np.uint8]:
        """The image of `camera`: "scene", "wrist" or a camera of the model."""
        source = {"scene": self._scene_view, "wrist": WRIST_CAMERA}.get(camera, camera)
        self._renderer.update_scene(data, source)
        flags = self._renderer.scene.flags
        flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        image: NDArray[np.uint8] = self._renderer.render()
        return image

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()


def _free_camera() -> mujoco.MjvCamera:
    import mujoco

    azimuth, elevation, distance, lookat = SCENE_VIEW
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.azimuth, camera.elevation, camera.distance = azimuth, elevation, distance
    camera.lookat[:] = lookat
    return camera
