"""LeRobot's π0.5 checkpoints, 0.4 to 0.6: config.json, model.safetensors, saved processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfpi.checkpoints.contents import Assumption, Contents, file_tensors
from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.json_files import member, read_json
from halfpi.checkpoints.safetensors_io import SafetensorsFile
from halfpi.checkpoints.stats import feature_stats, length
from halfpi.checkpoints.torch_names import torch_tensors
from halfpi.config import FeatureStats, NormMode

_NORM_MODES: Mapping[str, NormMode] = {
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}
_NORM_EPS = 1e-8  # the default of LeRobot's normalize_processor.py
UNSUPPORTED = ("use_peft", "use_visual_memory", "use_proprioceptive_memory")
_MAX_EMPTY_CAMERAS = 16
_IMAGES = "observation.images."
_PADDING_UNKNOWN = Assumption(
    "saved by LeRobot 0.5.0 or earlier, which does not tell whether it was trained with the padded "
    "prompt and images of 0.4; assuming it was not. If it was, pass processing_overrides="
    '{"prompt_state_dim": 32, "resize": "interpolate-0.4"}',
    frozenset({"prompt_state_dim", "resize"}),
)

Steps = Mapping[str, Mapping[str, Any]]


def read_lerobot(root: Path) -> Contents:
    """The LeRobot checkpoint in the directory `root`.

    Raises CheckpointError for another policy type, an adapter, a memory variant, and for files that
    do not hold what LeRobot's configuration_pi05.py and processor_pi05.py write.
    """
    where = root / "config.json"
    config = read_json(where)
    if config.get("type") != "pi05":
        raise CheckpointError(f"{where} is of policy type {config.get('type')!r}, expected 'pi05'")
    for key in UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{where} has {key} set, which halfpi does not support")
    weights = root / "model.safetensors"
    tensors, unknown = torch_tensors(file_tensors(weights), weights)
    pre = _read_steps(root / "policy_preprocessor.json")
    post = _read_steps(root / "policy_postprocessor.json")
    return Contents(
        format="lerobot",
        root=root,
        tensors=tensors,
        unknown=unknown,
        stated={
            "horizon": member(config, "chunk_size", int, where),
            "max_prompt_tokens": member(config, "tokenizer_max_length", int, where),
            "time_min_period": member(config, "min_period", float, where),
            "time_max_period": member(config, "max_period", float, where),
            "image_size": _image_size(config, where),
        },
        processing={
            "cameras": _cameras(config, pre, where),
            "resize": "interpolate",
            "norm_rule": "lerobot",
            **_normalisation(root, config, pre, post),
            "robot_action_dim": _action_dim(config, where),
            "delta_mask": _delta_mask(pre, post, _action_dim(config, where), root),
        },
        # A preprocessor without this step is older than 0.5.1: 0.5.0, or 0.4, which padded.
        assumptions=(_PADDING_UNKNOWN,) if pre and "relative_actions_processor" not in pre else (),
    )


def _read_steps(path: Path) -> Steps:
    """Registry name of each step of a saved pipeline → its config, with `state_file` if any."""
    if not path.exists():
        return {}
    steps: dict[str, Mapping[str, Any]] = {}
    for step in member(read_json(path), "steps", list, path):
        match step:
            case {"registry_name": str(name), "config": dict(config), "state_file": str(file)}:
                steps[name] = {**config, "state_file": file}
            case {"registry_name": str(name), "config": dict(config)}:
                steps[name] = config
            case _:
                raise CheckpointError(f"{path} has a malformed step: {str(step)[:80]}")
    return steps


def _features(config: Mapping[str, Any], key: str, where: Path) -> dict[str, Mapping[str, Any]]:
    features = member(config, key, dict, where)
    for name, feature in features.items():
        match feature:
            case {"type": str(), "shape": [*shape]} if all(type(size) is int for size in shape):
                pass
            case _:
                raise CheckpointError(f"{where}: {key} has a malformed {name}: {str(feature)[:80]}")
    return features


def _cameras(config: Mapping[str, Any], pre: Steps, where: Path) -> tuple[str, ...]:
    """The cameras in the order of the visual features, by their names before the renaming."""
    features = _features(config, "input_features", where)
    names = [name for name, feature in features.items() if feature["type"] == "VISUAL"]
    empty_cameras = member({"empty_cameras": 0, **config}, "empty_cameras", int, where)
    if not 0 <= empty_cameras <= _MAX_EMPTY_CAMERAS:
        raise CheckpointError(
            f"{where}: empty_cameras must be 0 to {_MAX_EMPTY_CAMERAS}, got {empty_cameras}"
        )
    for index in range(empty_cameras):
        empty = f"{_IMAGES}empty_camera_{index}"
        if empty not in names:
            names.append(empty)
    step = pre.get("rename_observations_processor", {})
    rename = member({"rename_map": {}, **step}, "rename_map", dict, "rename_observations_processor")
    original = {renamed: name for name, renamed in rename.items()}
    return tuple(
        original.get(name, name).removeprefix(_IMAGES).removeprefix("observation.")
        for name in names
    )


def _image_size(config: Mapping[str, Any], where: Path) -> int:
    match config.get("image_resolution"):
        case [int(height), int(width)] if height == width:
            return height
    raise CheckpointError(
        f"{where}: image_resolution must be two equal numbers, got {config.get('image_resolution')}"
    )


def _action_dim(config: Mapping[str, Any], where: Path) -> int:
    action = _features(config, "output_features", where).get("action")
    if action is None or len(action["shape"]) != 1:
        raise CheckpointError(f"{where}: output_features must have an action of one axis")
    return int(action["shape"][0])


def _normalisation(
    root: Path, config: Mapping[str, Any], pre: Steps, post: Steps
) -> dict[str, Any]:
    """Modes, epsilon and statistics, which are None for a feature that has none saved."""
    fields: dict[str, Any] = {}
    epsilons = set()
    for name, key, kind, steps, step_name in (
        ("state", "observation.state", "STATE", pre, "normalizer_processor"),
        ("action", "action", "ACTION", post, "unnormalizer_processor"),
    ):
        step = steps.get(step_name, {})
        where = f"{root}: {step_name}"
        defaults = {"norm_map": config.get("normalization_mapping", {}), "eps": _NORM_EPS}
        modes = member({**defaults, **step}, "norm_map", dict, where)
        mode = _NORM_MODES.get(str(modes.get(kind, "IDENTITY")))
        if mode is None:
            raise CheckpointError(f"{where} has the unknown mode {modes[kind]!r} for {kind}")
        fields[f"{name}_norm"] = mode
        epsilons.add(member({**defaults, **step}, "eps", float, where))
        fields[f"{name}_stats"] = _read_stats(root, step, key)
    if len(epsilons) > 1:
        raise CheckpointError(f"{root}: the processors have different eps: {sorted(epsilons)}")
    return {**fields, "norm_eps": epsilons.pop()}


def _read_stats(root: Path, step: Mapping[str, Any], key: str) -> FeatureStats | None:
    """The statistics of feature `key`: tensors `<feature>.<statistic>` of the step's state file."""
    if "state_file" not in step:
        return None
    file = SafetensorsFile(root / step["state_file"])
    values = {
        name.removeprefix(f"{key}."): file.read(name).flatten().tolist()
        for name in file.entries
        if name.rpartition(".")[0] == key
    }
    if not values:
        return None
    where = f"{file.path}: {key}"
    stats = feature_stats(values, where)
    features = member({"features": {}, **step}, "features", dict, where)
    shape = member({key: {}, **features}, key, dict, where).get("shape")
    if shape is not None and length(stats) is not None and [length(stats)] != shape:
        raise CheckpointError(f"{where} has statistics of length {length(stats)}, expected {shape}")
    return stats


def _delta_mask(pre: Steps, post: Steps, action_dim: int, root: Path) -> tuple[bool, ...] | None:
    """Which action dimensions are relative to the state (LeRobot relative_action_processor.py).

    A dimension is absolute when its name contains an excluded joint's name, whatever the case.
    """
    if not post.get("absolute_actions_processor", {}).get("enabled"):
        return None
    relative = pre.get("relative_actions_processor")
    if relative is None:
        raise CheckpointError(
            f"{root}: absolute_actions_processor is enabled without a relative_actions_processor"
        )
    given = {name: value for name, value in relative.items() if value is not None}
    options = {"action_names": [], "exclude_joints": [], **given}
    names = member(options, "action_names", list, root)
    joints = member(options, "exclude_joints", list, root)
    excluded = [str(joint).lower() for joint in joints if joint]
    mask = [not any(joint in str(name).lower() for joint in excluded) for name in names]
    return tuple((mask + [True] * action_dim)[:action_dim])
