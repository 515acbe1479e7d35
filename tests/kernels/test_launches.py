"""Which launches are worth measuring."""

from __future__ import annotations

import math

import pytest
from tests.kernels.conftest import ADA, HOPPER

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.launches import linear_launches, split_linear_launches


@pytest.mark.parametrize(
    ("m", "n", "width"), [(768, 3456, 160), (968, 2560, 160), (768, 4352, 256)]
)
def test_the_narrowest_tiles_of_one_wave(m: int, n: int, width: int) -> None:
    widths = {
        one.block_n: math.ceil(m / one.block_m) * math.ceil(n / one.block_n)
        for one in linear_launches(m, n, 1152, 2, HOPPER)
        if one.tma and one.block_m == 128
    }
    fitting = {block_n for block_n, tiles in widths.items() if tiles <= HOPPER.multiprocessors}
    assert min(fitting) == width


def test_tails_need_descriptors() -> None:
    assert all(len(one.widths) == 1 for one in linear_launches(768, 3456, 1152, 2, ADA))


@pytest.mark.parametrize("k", [2048, 4352, 16384])
def test_long_sums_of_e4m3_are_promoted_or_a_library_s(k: int) -> None:
    launches = split_linear_launches(768, 1152, k, 1, HOPPER)
    assert launches
    for launch in launches:
        short = k <= 2048 * launch.split_k
        assert launch.kernel == "library" or bool(launch.promote) != short
        assert launch.shared_bytes(1) <= HOPPER.shared_bytes
