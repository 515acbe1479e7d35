"""What packing adds to the weights of a model."""

from __future__ import annotations

import pytest
import torch
from tests.engine.conftest import random_model

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.engine.packing import HIDDEN_ALIGN, Packer

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_activations_of_siglip_are_whole_lines(dtype: torch.dtype) -> None:
    model = random_model()
    hidden, width = model.config.vision_mlp, model.config.vision_width
    padded = -(-hidden // HIDDEN_ALIGN) * HIDDEN_ALIGN
    assert padded > hidden
    layer = Packer(model, CPU, dtype, None).vision().layers[0]
    fc1, fc2 = layer.fc1, layer.fc2
    assert fc1.weight.shape == (padded, width)
    assert fc2.weight.shape == (width, padded)
    assert fc1.bias is not None
    assert fc1.bias.dtype == fc1.weight.dtype == fc2.weight.dtype == dtype
    # What is added is GELU(0) = 0 and meets zeros.
    for tensor in (fc1.weight[hidden:], fc1.bias[hidden:], fc2.weight[:, hidden:]):
        assert tensor.count_nonzero() == 0
    plain = dict(model.vision.layers[0].named_parameters())
    torch.testing.assert_close(fc1.weight[:hidden], plain["mlp.fc1.weight"].to(dtype))
    torch.testing.assert_close(fc2.weight[:, :hidden], plain["mlp.fc2.weight"].to(dtype))
