"""Where FP8 hybrid precision quantises: the one table for calibration, fake quantisation, packing.

A site is one matrix product of an engine: an input and the weights that read it, which share one
scale because they are packed into one matrix. Its input is what the linear layers of the plain
model read, so a norm's weight is already in it; whoever folds that weight into the matrix instead
changes both scales.

Quantised are the MLPs of SigLIP and of the prefix, which are nearly all of their work, q, k and v
of SigLIP, and the whole expert, where every byte of weights counts. The other attention projections
stay 16-bit: they cost little, and in E4M3 too they would take the actions of a random full-size
model below a cosine of 0.999. So do the patch embedding, projector and action projections, and the
time MLP and modulations, which a schedule needs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from halfpi.config import Pi05Config

Stage = Literal["vision", "prefill", "denoise"]

# Of one layer: site → the linear layers beside each other in its module.
_ATTENTION = {"attn.qkv": ("q", "k", "v"), "attn.o": ("o",)}
_SIGLIP = {**_ATTENTION, "mlp.fc1": ("fc1",), "mlp.fc2": ("fc2",)}
_GEMMA = {**_ATTENTION, "mlp.gate_up": ("gate", "up"), "mlp.down": ("down",)}
_LAST_OF_PREFIX = {"attn.kv": ("k", "v")}


@dataclass(frozen=True)
class Site:
    """One matrix product.

    name: as in "expert.layers.3.mlp.gate_up". linears: canonical names of the `nn.Linear` modules
    whose weights, stacked along the outputs in this order, are the matrix.
    """

    name: str
    stage: Stage
    linears: tuple[str, ...]

    @property
    def per_step(self) -> bool:
        """Whether its input has a scale for each denoising step: noise and data differ in range."""
        return self.stage == "denoise"

    def layers(self, model: nn.Module) -> list[nn.Linear]:
        """The modules that `linears` names in `model`."""
        return [cast("nn.Linear", model.get_submodule(name)) for name in self.linears]


def matrix_products(config: Pi05Config) -> tuple[Site, ...]:
    """The matrix products of all layers of a model, quantised or not, in the order it runs them."""
    last = config.depth - 1
    return (
        *_sites("vision", "vision", range(config.vision_depth), _SIGLIP),
        *_sites("prefix", "prefill", range(last), _GEMMA),
        *_sites("prefix", "prefill", range(last, config.depth), _LAST_OF_PREFIX),
        *_sites("expert", "denoise", range(config.depth), _GEMMA),
    )


def quantised_sites(config: Pi05Config) -> tuple[Site, ...]:
    """The products that FP8 hybrid precision quantises, in the order in which a model runs them."""
    return tuple(site for site in matrix_products(config) if _is_quantised(site))


def _is_quantised(site: Site) -> bool:
    queries = site.stage == "vision" and site.name.endswith(".attn.qkv")
    return site.stage == "denoise" or ".mlp." in site.name or queries


def _sites(
    stack: str, stage: Stage, layers: Iterable[int], of_layer: Mapping[str, tuple[str, ...]]
) -> Iterator[Site]:
    for layer in layers:
        for name, linears in of_layer.items():
            path = f"{stack}.layers.{layer}.{name}"
            module = path.rpartition(".")[0]
            yield Site(path, stage, tuple(f"{module}.{linear}" for linear in linears))
