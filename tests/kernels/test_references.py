"""The references of kernels, on packed weights, are the model's own modules."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from halfpi.config import Pi05Config
from halfpi.model import gemma, siglip
from halfpi.model.attention import Rotation, key_bias, rotate, rotation
from halfpi.model.attention import attention as model_attention

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.ada_rms_norm import ada_rms_norm_reference
from halfpi.kernels.attention import attention_reference
from halfpi.kernels.embed import embed_reference
from halfpi.kernels.geglu import geglu_reference, interleaved
from halfpi.kernels.layer_norm import layer_norm_reference
from halfpi.kernels.linear import linear_reference
from halfpi.kernels.linear_norm import linear_norm_reference
from halfpi.kernels.patchify import patch_weight, patchify_reference
from halfpi.kernels.qkv_rope import paired, qkv_rope_reference
from halfpi.kernels.rms_norm import rms_norm_reference

M, D = 11, 32
Module = TypeVar("Module", bound=nn.Module)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: Module) -> Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rms_norm() -> None:
    norm, x = randomised(gemma.RMSNorm(D)), torch.randn(M, D)
    close(rms_norm_reference(x, 1 + norm.weight)[0], norm(x))


def test_layer_norm() -> None:
    norm, x = randomised(siglip.LayerNorm(D)), torch.randn(M, D)
    close(layer_norm_reference(x, norm.weight, norm.bias)[0], norm(x))


def test_ada_rms_norm() -> None:
    norm = gemma.AdaRMSNorm(D)
    x, modulation, before = torch.randn(M, D), torch.randn(1, 3 * D), torch.randn(1, 3 * D)
    partials, gate = torch.randn(4, M, D), before.chunk(3, -1)[2]
    residual, out = ada_rms_norm_reference(x, modulation, partials, gate)
    close(residual, torch.addcmul(x, partials.sum(0), gate))
    close(out, norm(residual, modulation)[0])


def test_norms_that_add_partial_products() -> None:
    x, partials, alpha = torch.randn(M, D), torch.randn(3, M, D), torch.tensor([0.5])
    gain, weight, bias, own = torch.randn(4, D).unbind()
    residual, out = rms_norm_reference(x, gain, partials, alpha)
    close(residual, x + 0.5 * partials.sum(0))
    close(out, rms_norm_reference(residual, gain)[0])
    residual, out = layer_norm_reference(x, weight, bias, partials, alpha, own)
    close(residual, x + 0.5 * partials.sum(0) + own)
    close(out, layer_norm_reference(residual, weight, bias)[0])


def test_attention_without_projection_biases() -> None:
    query, keys, values = (torch.randn(2, M, 4, 10) for _ in range(3))
    query_bias, key_bias_, value_bias = torch.randn(3, 4, 10).unbind()
    (theirs,) = attention_reference(query + query_bias, keys + key_bias_, values + value_bias)
    (ours,) = attention_reference(query, keys, values, bias=query_bias)
    close(ours + value_bias, theirs)


def test_attention() -> None:
    query, keys, values = (
        torch.randn(2, M, 4, 10),
        torch.randn(2, 9, 2, 10),
        torch.randn(2, 9, 2, 10),
    )
    count = torch.tensor([9, 5])
    bias = key_bias(torch.arange(9) < count[:, None])
    theirs = model_attention(query, [keys.transpose(1, 2)], [values.transpose(1, 2)], bias)
    close(attention_reference(query, keys, values, count)[0].flatten(2), theirs)


def test_qkv_rope() -> None:
    # What queries and keys are for is their product, and that has no order of dimensions.
    config = Pi05Config(q_heads=4, kv_heads=2, head_dim=10)
    module, x = randomised(gemma.Attention(config, D)), torch.randn(M, D)
    offset, capacity = 3, 20
    positions = rotation(torch.arange(capacity)[None], config.head_dim)
    own = Rotation(*(table[:, offset : offset + M] for table in positions))
    key, value = module.key_value(x[None], own)
    query = rotate(module.q(x[None]).unflatten(-1, (-1, config.head_dim)), own)

    projections = [paired(getattr(module, name).weight, config.head_dim) for name in "qk"]
    half = config.head_dim // 2
    cos, sin = positions.cos[0, :, 0, :half], positions.sin[0, :, 0, half:]
    queries, keys, values = qkv_rope_reference(
        x, torch.cat([*projections, module.v.weight]), cos, sin, 4, 2, offset
    )
    written = slice(offset, offset + M)
    close(values[written], value[0].transpose(0, 1))
    for head in range(4):
        ours = queries[:, head] @ keys[written, head // 2].T
        close(ours, query[0, :, head] @ key[0, head // 2].T)
    assert keys[:offset].isnan().all()
    assert values[offset + M :].isnan().all()


def test_geglu() -> None:
    mlp, x = randomised(gemma.GatedMlp(D, 24)), torch.randn(M, D)
    (hidden,) = geglu_reference(x, interleaved(mlp.gate.weight, mlp.up.weight))
    close(mlp.down(hidden), mlp(x))


def test_linear() -> None:
    mlp, x, residual = randomised(siglip.Mlp(D, 24)), torch.randn(M, D), torch.randn(M, D)
    fc1, fc2 = mlp.fc1, mlp.fc2
    (hidden,) = linear_reference(x, fc1.weight, bias=fc1.bias, gelu=True)
    (out,) = linear_reference(hidden, fc2.weight, bias=fc2.bias, residual=residual)
    close(out, residual + mlp(x))


def test_linear_and_norm() -> None:
    mlp, norm = randomised(siglip.Mlp(D, 24)), randomised(siglip.LayerNorm(D))
    x, residual, alpha = torch.randn(M, 24), torch.randn(M, D), torch.tensor([0.5])
    kept, out = linear_norm_reference(
        x, 2 * mlp.fc2.weight, residual, norm.weight, norm.bias, alpha, mlp.fc2.bias
    )
    close(kept, residual + mlp.fc2(x))
    close(out, norm(kept))


def test_patchify() -> None:
    conv, position = randomised(nn.Conv2d(3, D, 4, stride=4)), torch.randn(6, D)
    pixels = torch.randint(256, (2, 8, 12, 3), dtype=torch.uint8)
    images = (pixels / 127.5 - 1).movedim(-1, 1)
    (patches,) = patchify_reference(pixels, 4, 64)
    (out,) = linear_reference(
        patches, patch_weight(conv.weight, 64), bias=conv.bias, residual=position.repeat(2, 1)
    )
    close(out.reshape(2, 6, D), conv(images).flatten(2).mT + position)
    close(patchify_reference(images.movedim(1, -1), 4, 64)[0], patches)


def test_embed() -> None:
    embedding, tokens = randomised(nn.Embedding(20, D)), torch.randint(20, (5,))
    (out,) = embed_reference(tokens, embedding.weight, 2, M)
    close(out[2:7], embedding(tokens) * D**0.5)
    assert out[:2].isnan().all()
    assert out[7:].isnan().all()
