"""Calibration: how far the inputs of each site reach over real observations.

The plain model runs each observation once, and hooks note the largest magnitude that enters each
site, in the expert at each denoising step. Over all frames the scale covers a percentile of those
maxima. E4M3 keeps its precision over four decades, so an outlier that is covered costs little and
one that saturates may cost much: the default covers everything that was seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from halfpi.checkpoints.errors import listing
from halfpi.model import Pi05
from halfpi.quant.formats import scale_for
from halfpi.quant.scales import SMALLEST_INPUT_SCALE, Scales, SiteScales
from halfpi.quant.sites import Site, quantised_sites
from halfpi.types import Observation

# Two binades: what frames of one task and one robot differ by is well below.
DISPERSION_LIMIT = 4.0


class DispersionWarning(UserWarning):
    """Frames disagree about the range of a site.

    The largest maximum is more than `DISPERSION_LIMIT` times the median one. Either few frames are
    unlike the rest, which a lower percentile leaves out, or there are too few to know the range,
    and frames to come may saturate.
    """


def calibrate(
    model: Pi05,
    infer: Callable[[Observation], object],
    observations: Iterable[Observation],
    *,
    percentile: float = 100.0,
) -> Scales:
    """Scales of `model` from what `infer` makes it read of `observations`.

    infer: runs `model` once, in plain torch and without padding, as `Policy.infer` does on the
    eager engine. Its number of denoising steps becomes the scales'.
    percentile: in [50, 100], of the frames' maxima; larger inputs will saturate.

    Warns with `DispersionWarning`. Raises ValueError without observations, when `infer` does not
    run the whole model, or not always with as many steps, and on NaN or infinite inputs.
    """
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile must be in [50, 100], got {percentile}")
    sites = quantised_sites(model.config)
    frames: list[dict[str, Tensor]] = []
    with _recorded(model, sites) as reached:
        for observation in observations:
            infer(observation)
            frames.append(_frame(sites, reached, len(frames)))
    if not frames:
        raise ValueError("calibration needs at least one observation, got none")
    num_steps = _num_steps(sites, frames)
    maxima = {site.name: torch.stack([frame[site.name] for frame in frames]) for site in sites}
    _warn_of_dispersion(maxima)
    inputs = {name: torch.quantile(seen, percentile / 100, 0) for name, seen in maxima.items()}
    return Scales(
        num_steps=num_steps,
        frames=len(frames),
        percentile=percentile,
        sites={
            site.name: SiteScales(
                weight=_rounded(weight_scale(model, site)),
                input=tuple(map(_input_scale, inputs[site.name].tolist())),
            )
            for site in sites
        },
    )


def weight_scale(model: nn.Module, site: Site) -> float:
    """The scale of the packed weight of `site`."""
    weights = (linear.weight.detach() for linear in site.layers(model))
    return scale_for(max(float(weight.abs().amax()) for weight in weights))


def _input_scale(largest: float) -> float:
    return max(_rounded(scale_for(largest)), SMALLEST_INPUT_SCALE)


def _rounded(scale: float) -> float:
    """`scale` to seven digits, as many as fp32 has: more would only make the file larger."""
    return float(f"{scale:.6e}")


@contextmanager
def _recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[Tensor]]]:
    """Site → the largest magnitudes of its inputs, one a call, noted while the context is open."""
    reached: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reached[name].append(inputs[0].detach().abs().amax().float())

    with ExitStack() as stack:
        for site in sites:
            first = site.layers(model)[0]
            handle = first.register_forward_pre_hook(partial(note, site.name))
            stack.callback(handle.remove)
        yield reached


def _frame(
    sites: Sequence[Site], reached: dict[str, list[Tensor]], index: int
) -> dict[str, Tensor]:
    """Take the maxima (calls,) of the frame just run out of `reached`, on the CPU."""
    steps = len(reached[sites[-1].name])
    frame = {}
    for site in sites:
        calls, expected = reached[site.name], steps if site.per_step else 1
        if len(calls) != expected or not calls:
            raise ValueError(
                f"infer must run every layer of the model once a frame, and the expert once a "
                f"step; in frame {index} it ran {site.name} {len(calls)} times"
            )
        frame[site.name] = torch.stack(calls).cpu()
        calls.clear()
        if not frame[site.name].isfinite().all():
            raise ValueError(f"the input of {site.name} is NaN or infinite in frame {index}")
    return frame


def _num_steps(sites: Sequence[Site], frames: Sequence[dict[str, Tensor]]) -> int:
    name = next(site.name for site in sites if site.per_step)
    steps = sorted({len(frame[name]) for frame in frames})
    if len(steps) > 1:
        raise ValueError(f"infer must always take as many steps, got {steps}")
    return steps[0]


def _warn_of_dispersion(maxima: dict[str, Tensor]) -> None:
    ratios = sorted(((_dispersion(seen), name) for name, seen in maxima.items()), reverse=True)
    wide = [f"{name} ×{ratio:.1f}" for ratio, name in ratios if ratio > DISPERSION_LIMIT]
    if wide:
        warnings.warn(
            f"frames disagree about the range of {len(wide)} of {len(maxima)} sites by more than "
            f"×{DISPERSION_LIMIT:g} (largest against median): {listing(wide)}",
            DispersionWarning,
            stacklevel=3,
        )


def _dispersion(seen: Tensor) -> float:
    """Of maxima (frames, calls): the largest ratio of the largest to the median frame."""
    largest, median = seen.amax(0), seen.median(0).values
    return float(torch.where(largest > 0, largest / median, 1.0).amax())
