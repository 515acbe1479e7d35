"""π0.5 between plain torch and the engine: models whose parts are exchanged one kind at a time.

Each function exchanges modules of a model in place, and the model goes on computing the same
actions. They exist for comparisons only: a kernel allocates its output here, and on a CPU its
reference in plain torch takes its place. Nothing may be masked in what such a model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from halfpi.kernels import ada_rms_norm, attention, geglu, layer_norm, linear, rms_norm
from halfpi.kernels.attention_launches import AttentionLaunch
from halfpi.kernels.spec import FP8, Device, Launch, quantised
from halfpi.kernels.tile import TileLaunch
from halfpi.kernels.tuned import best
from halfpi.model import Pi05
from halfpi.model.attention import Rotation, rotate
from halfpi.model.gemma import AdaRMSNorm, Attention, GatedMlp, RMSNorm
from halfpi.model.siglip import LayerNorm, SelfAttention
from halfpi.quant import Scales, quantise, quantised_sites


def sharing_copy(model: Pi05) -> Pi05:
    """A model of its own modules with the parameters of `model`."""
    with torch.device("meta"):
        copy = Pi05(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.requires_grad_(False).eval()


def fuse_attention(model: Pi05) -> None:
    """Attention in one kernel, in all three stages."""
    for block in _blocks(model):
        block.attn = _fused_attention(block.attn)


def quantise_linears(model: Pi05, scales: Scales) -> None:
    """Every site's linear layers in FP8, each with a pass of its own that quantises its input.

    In the expert an input has one scale for all steps, the largest.
    """
    for site in quantised_sites(model.config):
        own = scales.sites[site.name]
        for name, layer in zip(site.linears, site.layers(model), strict=True):
            model.set_submodule(name, Fp8Linear(layer, own.weight, max(own.input)))


def fuse_quantisation(model: Pi05) -> None:
    """After both of the others: what feeds an FP8 layer quantises what it writes itself."""
    for block in _blocks(model):
        if isinstance(block.attn.k, Fp8Linear):
            block.attn_norm = _quantising_norm(block.attn_norm, block.attn.k.input_scale)
        if hasattr(block.attn, "o") and isinstance(block.attn.o, Fp8Linear):
            block.attn.scale = block.attn.o.input_scale
        if hasattr(block, "mlp"):
            block.mlp = FusedMlp(block.mlp)
            block.mlp_norm = _quantising_norm(block.mlp_norm, block.mlp.input_scale)


class Fp8Linear(nn.Module):
    """`layer` with weight and input in E4M3, through the library's FP8 product.

    An input that is not E4M3 yet is quantised in a pass of its own. The output is bfloat16.
    """

    def __init__(self, layer: nn.Linear, weight_scale: float, input_scale: float) -> None:
        super().__init__()
        device = layer.weight.device
        self.weight: Tensor
        self.weight_scale: Tensor
        self.input_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", quantise(layer.weight.detach(), weight_scale))
        self.register_buffer("weight_scale", torch.tensor([weight_scale], device=device))
        self.register_buffer("input_scale", torch.tensor([input_scale], device=device))
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product for `x` (..., in) → (..., out)."""
        rows = x.flatten(0, -2)
        if rows.dtype != FP8:
            rows = quantise_pass(rows, self.input_scale)
        if rows.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.t(), self.input_scale, self.weight_scale, self.bias,
                out_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip
        else:
            sums = (rows.float() @ self.weight.float().t()) * (self.input_scale * self.weight_scale)
            out = (sums if self.bias is None else sums + self.bias).bfloat16()
        return out.view(*x.shape[:-1], -1)


class FusedSelfAttention(nn.Module):
    """SigLIP's attention in one kernel, which quantises what it writes if there is a `scale`."""

    def __init__(self, plain: SelfAttention) -> None:
        super().__init__()
        self.scale: Tensor | None = None
        self.heads: int = plain.heads
        self.q: nn.Module
        self.k: nn.Module
        self.v: nn.Module
        self.o: nn.Module
        self.q, self.k, self.v, self.o = plain.q, plain.k, plain.v, plain.o

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of `x` (b, t, d) → (b, t, d)."""
        query, keys, values = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v)
        )
        out: Tensor = self.o(_attend(query, keys, values, self.scale))
        return out


class FusedAttention(Attention):
    """Gemma's attention in one kernel, which quantises what it writes if there is a `scale`."""

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)  # the layers are there already
        self.scale: Tensor | None = None
        self.head_dim = plain.head_dim
        self.q, self.k, self.v, self.o = plain.q, plain.k, plain.v, plain.o

    def read(
        self,
        x: Tensor,
        positions: Rotation,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        bias: Tensor,  # noqa: ARG002  # nothing is masked
    ) -> Tensor:
        """What `x` (b, t, d) reads from the segments `keys` and `values` → (b, t, d)."""
        query = rotate(self.q(x).unflatten(-1, (-1, self.head_dim)), positions)
        all_keys, all_values = (
            (parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)).transpose(1, 2)
            for parts in (keys, values)
        )
        out: Tensor = self.o(_attend(query, all_keys, all_values, self.scale))
        return out


class FusedMlp(nn.Module):
    """The MLP `plain` of FP8 layers: one kernel up to the hidden activations, in E4M3."""

    def __init__(self, plain: Any) -> None:
        """`plain`: a `GatedMlp` or a `Mlp`."""
        super().__init__()
        self.gated = isinstance(plain, GatedMlp)
        first = plain.gate if self.gated else plain.fc1
        self.last = plain.down if self.gated else plain.fc2
        self.weight: Tensor
        self.alpha: Tensor
        self.input_scale: Tensor
        self.bias: Tensor | None
        weight = _interleaved(first.weight, plain.up.weight) if self.gated else first.weight
        self.register_buffer("weight", weight)
        self.register_buffer("input_scale", first.input_scale)
        self.register_buffer("alpha", first.input_scale * first.weight_scale)
        self.register_buffer("bias", None if first.bias is None else first.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., d), E4M3, → (..., d), bfloat16."""
        rows = x.flatten(0, -2)
        inputs: dict[str, Any] = {"x": rows, "weight": self.weight, "alpha": self.alpha}
        sizes = {"m": rows.shape[0], "n": self.weight.shape[0], "k": rows.shape[1]}
        if self.gated:
            sizes["n"] //= 2
            run = partial(_run, geglu, sizes, inputs)
        else:
            run = partial(_run, linear, sizes, inputs | {"bias": self.bias, "gelu": True})
        out: Tensor = self.last(run((rows.shape[0], sizes["n"]), self.last.input_scale))
        return out.view(*x.shape[:-1], -1)


class QuantisingNorm(nn.Module):
    """RMSNorm or LayerNorm that writes E4M3 with `scale`."""

    def __init__(self, plain: RMSNorm | LayerNorm, scale: Tensor) -> None:
        super().__init__()
        self.file: ModuleType
        if isinstance(plain, RMSNorm):
            self.file, self.weights = rms_norm, {"gain": 1 + plain.weight}
        else:
            self.file, self.weights = layer_norm, {"weight": plain.weight, "bias": plain.bias}
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., d)."""
        rows = x.flatten(0, -2)
        sizes = {"m": rows.shape[0], "d": rows.shape[1]}
        inputs = {"x": rows, **self.weights}
        return _run(self.file, sizes, inputs, rows.shape, self.scale).view(x.shape)


class QuantisingAdaNorm(AdaRMSNorm):
    """AdaRMSNorm that writes E4M3 with `scale`."""

    def __init__(self, plain: AdaRMSNorm, scale: Tensor) -> None:
        nn.Module.__init__(self)  # the layer is there already
        self.dense = plain.dense
        self.scale = scale

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `x` (b, h, d) → (normed, gate); modulation: fp32 (1, h or 1, 3d)."""
        rows = x.flatten(0, -2)
        inputs = {"residual": rows, "modulation": modulation.flatten(0, -2)}
        sizes = {"m": rows.shape[0], "d": rows.shape[1], "splits": 0}
        normed = _run(ada_rms_norm, sizes, inputs, rows.shape, self.scale).view(x.shape)
        return normed, modulation.chunk(3, -1)[2].to(x.dtype)


def quantise_pass(x: Tensor, scale: Tensor) -> Tensor:
    """`x` in E4M3: one kernel that reads it all and writes it again."""
    return (_compiled_pass() if x.is_cuda else quantised)(x, FP8, scale)


@cache
def _compiled_pass() -> Callable[..., Tensor]:
    return torch.compile(quantised, dynamic=True)


def _blocks(model: Pi05) -> Iterator[Any]:
    for stack in (model.vision, model.prefix, model.expert):
        yield from stack.layers


def _fused_attention(plain: Any) -> nn.Module:
    """As `plain`, which may be only the keys and values of the prefix's last layer."""
    if isinstance(plain, SelfAttention):
        return FusedSelfAttention(plain)
    return FusedAttention(plain) if isinstance(plain, Attention) else plain


def _quantising_norm(plain: Any, scale: Tensor) -> nn.Module:
    kind = QuantisingAdaNorm if isinstance(plain, AdaRMSNorm) else QuantisingNorm
    return kind(plain, scale)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """As `geglu.interleaved`, for E4M3, which torch does not stack."""
    bytes_ = (weight.view(torch.uint8) for weight in (gate, up))
    return geglu.interleaved(*bytes_).view(FP8)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: Tensor | None) -> Tensor:
    """Attention of `query` (b, t, q, k) → (b, t, q·k), E4M3 if there is a `scale`."""
    sizes = dict(zip("btqk", query.shape, strict=True))
    sizes |= {"s": keys.shape[1], "kv": keys.shape[2], "missing": 0}
    inputs = {"query": query, "keys": keys, "values": values}
    return _run(attention, sizes, inputs, query.shape, scale).flatten(2)


def _run(
    file: ModuleType,
    sizes: dict[str, int],
    inputs: dict[str, Any],
    shape: Sequence[int],
    scale: Tensor | None,
) -> Tensor:
    """The operation of a kernel `file` on `inputs` → `shape`, E4M3 if there is a `scale`."""
    name, first = file.SPEC.name, next(iter(inputs.values()))
    wide = torch.bfloat16 if first.dtype == FP8 else first.dtype
    out_dtype = wide if scale is None else FP8
    if not first.is_cuda:
        values = {key: _widened(value) for key, value in inputs.items()}
        return quantised(getattr(file, f"{name}_reference")(**values)[0], out_dtype, scale)
    launch = best(name, sizes, first.dtype, out_dtype, Device.of(first.device))
    out = torch.empty(*shape, dtype=out_dtype, device=first.device)
    workspace = _workspace(launch, inputs, shape, first.device)
    getattr(file, name)(**inputs, out=out, launch=launch, scale=scale, **workspace)
    return out


def _workspace(
    launch: Launch, inputs: dict[str, Any], shape: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """What a launch that splits its work wants beside the output."""
    empty = partial(torch.empty, device=device)
    if isinstance(launch, TileLaunch) and launch.split_k > 1:
        return {"partials": empty(launch.split_k, shape[0], inputs["weight"].shape[0])}
    if isinstance(launch, AttentionLaunch) and launch.splits > 1:
        partials = empty(launch.splits, *shape)
        return {"partials": partials, "log_sums": empty(launch.splits, *shape[:-1])}
    return {}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == FP8 else value
