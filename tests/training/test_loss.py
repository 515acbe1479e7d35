"""The loss against flow matching written out, row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import TINY
from torch import Tensor
from torch.nn import functional as F

from halfpi.model import Pi05, PrefixCache
from halfpi.training.loss import (
    AuxiliaryHead,
    Batch,
    ChunkingConfig,
    _given,
    losses,
    sample_time,
)

COPIES = 3
TARGETS = 5
CPU = torch.device("cpu")


@pytest.fixture
def model(random_pi05: Callable[..., Pi05]) -> Pi05:
    return random_pi05()


@pytest.fixture
def head() -> AuxiliaryHead:
    torch.manual_seed(1)
    return AuxiliaryHead(2 * TINY.tokens_per_image, TINY.prefix_width, TARGETS)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(2)
    b, l = 2, 9
    return Batch(
        images=torch.rand(b, 2, 3, TINY.image_size, TINY.image_size) * 2 - 1,
        image_mask=torch.tensor([[True, True], [True, False]]),
        tokens=torch.randint(TINY.vocab_size, (b, l)),
        token_mask=torch.arange(l) < torch.tensor([[l], [l - 3]]),
        actions=torch.randn(b, TINY.horizon, TINY.action_dim),
        auxiliary=torch.randn(b, TARGETS),
    )


@pytest.mark.parametrize("chunking", [ChunkingConfig(0.0), ChunkingConfig(0.6, 4)])
def test_the_loss_is_flow_matching_written_out(
    model: Pi05, head: AuxiliaryHead, batch: Batch, chunking: ChunkingConfig
) -> None:
    torch.manual_seed(3)
    result = losses(model, head, batch, COPIES, chunking)

    torch.manual_seed(3)
    rows = len(batch.actions) * COPIES
    noise = torch.randn(rows, TINY.horizon, TINY.action_dim)
    lengths = torch.randint(1, chunking.longest + 1, (rows, 1))[:, 0]
    lengths = torch.where(torch.rand(rows, 1)[:, 0] < chunking.share, lengths, 0)
    times = torch.rand(rows) ** (2 / 3) * 0.999 + 0.001
    assert bool(lengths.any()) == bool(chunking.share)

    squares: list[Tensor] = []
    image_tokens = model.vision(batch.images)
    for row in range(rows):
        of = slice(row // COPIES, row // COPIES + 1)
        prefix = model.prefill(
            image_tokens[of], batch.image_mask[of], batch.tokens[of], batch.token_mask[of]
        )
        actions, decided = batch.actions[of][0], int(lengths[row])
        time = times[row].repeat(TINY.horizon)
        time[:decided] = 0
        noisy = time[:, None] * noise[row] + (1 - time[:, None]) * actions
        velocity = model.velocity(prefix, noisy[None], time[None])[0]
        wanted = noise[row] - actions
        squares += [(velocity[i] - wanted[i]) ** 2 for i in range(decided, TINY.horizon)]
    torch.testing.assert_close(result.flow, torch.stack(squares).mean(), rtol=1e-4, atol=1e-5)
    auxiliary = F.smooth_l1_loss(head(image_tokens), batch.auxiliary)
    torch.testing.assert_close(result.auxiliary, auxiliary)


def test_given_actions_are_seen_clean_and_carry_no_loss(
    model: Pi05, head: AuxiliaryHead, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity = model.velocity
    seen: list[tuple[Tensor, Tensor]] = []
    disturbance = 0.0

    def disturbed(cache: PrefixCache, actions: Tensor, time: Tensor) -> Tensor:
        seen.append((actions, time))
        return velocity(cache, actions, time) + disturbance * (time == 0)[..., None]

    monkeypatch.setattr(model, "velocity", disturbed)
    chunking = ChunkingConfig(share=1.0, longest=4)
    flows = []
    for disturbance in (0.0, 1000.0):  # noqa: B007 (read by `disturbed`)
        torch.manual_seed(4)
        flows.append(losses(model, head, batch, COPIES, chunking).flow)
    torch.testing.assert_close(*flows)
    actions, time = seen[0]
    given = time == 0
    assert given[:, 0].all()
    assert not given[:, chunking.longest :].any()
    clean = batch.actions.repeat_interleave(COPIES, 0)
    torch.testing.assert_close(actions[given], clean[given], rtol=0, atol=0)
    assert (actions[~given] != clean[~given]).all()


def test_losses_reach_every_weight(model: Pi05, head: AuxiliaryHead, batch: Batch) -> None:
    result = losses(model, head, batch, COPIES, ChunkingConfig())
    torch.autograd.backward(result.flow + result.auxiliary)
    for name, parameter in [*model.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("attn.k.bias"):  # softmax does not see what all keys share
            assert parameter.grad.any(), name


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_and_length_of_given_actions(share: float) -> None:
    torch.manual_seed(5)
    given = _given(4000, 7, ChunkingConfig(share, 3), CPU)
    lengths = given.sum(1)
    torch.testing.assert_close(given, torch.arange(7) < lengths[:, None])
    assert float((lengths > 0).float().mean()) == pytest.approx(share, abs=0.03)
    assert set(lengths.tolist()) == {0.0: {0}, 0.4: {0, 1, 2, 3}, 1.0: {1, 2, 3}}[share]


def test_times_follow_beta() -> None:
    torch.manual_seed(6)
    count = 20_000
    times = sample_time(count, CPU)
    assert times.min() > 0
    assert times.max() <= 1
    draws = ((times.double() - 0.001) / 0.999).sort().values
    # Kolmogorov and Smirnov: 1.95 / √n is exceeded once in a thousand samples.
    empirical = torch.arange(1, count + 1) / count
    assert float((empirical - draws.clamp(min=0) ** 1.5).abs().max()) < 1.95 / count**0.5


def test_one_batch_can_be_learned(head: AuxiliaryHead, batch: Batch) -> None:
    torch.manual_seed(7)
    model = Pi05(TINY)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    history = []
    for _ in range(80):
        torch.manual_seed(8)
        result = losses(model, head, batch, COPIES, ChunkingConfig())
        optimizer.zero_grad()
        torch.autograd.backward(result.flow + result.auxiliary)
        optimizer.step()
        history.append((result.flow.item(), result.auxiliary.item()))
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < first / 2
