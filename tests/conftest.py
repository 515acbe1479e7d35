"""What tests of several layers share: small models whose every weight does something, openpi,
and a neighbour on a GPU. Tests that are marked `gpu` skip without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from halfpi.config import Pi05Config
from halfpi.model import Pi05

# Two cameras of four tokens, more than one key head, and no two widths equal.
TINY = Pi05Config(
    image_size=28,
    vision_width=48,
    vision_mlp=80,
    vision_depth=2,
    vision_heads=4,
    vocab_size=96,
    prefix_width=64,
    prefix_mlp=112,
    expert_width=32,
    expert_mlp=56,
    depth=3,
    q_heads=4,
    kv_heads=2,
    head_dim=10,
    action_dim=6,
    horizon=7,
    max_prompt_tokens=12,
)


@pytest.hookimpl(tryfirst=True)  # before fixtures that would need it
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# openpi-client does not say that it needs the last one.
OPENPI = ("openpi-client==0.1.2", "openpi-server==0.1.0", "numpy<2", "typing_extensions")


def install_openpi(venv: Path, python: Path) -> None:
    """Make `venv`, whose interpreter is `python`; skip the test if that cannot be done."""
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *OPENPI]
        subprocess.run(install, check=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shutil.rmtree(venv, ignore_errors=True)
        pytest.skip(f"openpi-client cannot be installed: {error}")


@pytest.fixture(scope="session")
def openpi_python() -> str:
    """The interpreter of an environment that has openpi's client and server.

    They need NumPy 1, so they are in `.venv-openpi-client`, made at the first run and kept.
    """
    venv = Path(__file__).parents[1] / ".venv-openpi-client"
    python, ready = venv / "bin" / "python", venv / ".ready"
    with FileLock(f"{venv}.lock"):  # tests run in several processes
        if not ready.exists() or ready.read_text() != " ".join(OPENPI):
            install_openpi(venv, python)
            ready.write_text(" ".join(OPENPI))
    return str(python)


@pytest.fixture
def tiny_config() -> Pi05Config:
    """An architecture small enough for thousands of calls."""
    return TINY


def build_pi05(config: Pi05Config = TINY, seed: int = 0) -> Pi05:
    """A Pi05 of `config` with every weight random.

    A new model's modulations are zero: its expert ignores the prefix, and most tests would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global one
        torch.manual_seed(seed)
        model = Pi05(config)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * fan_in**-0.5)
    return model


@pytest.fixture
def random_pi05() -> Callable[..., Pi05]:
    """`build_pi05`."""
    return build_pi05


_NEIGHBOUR = """
import torch
x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
many = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
print("at work", flush=True)
while True:
    for _ in range(4):
        x @ x
        many.fill_(1)
    torch.cuda.synchronize()
"""


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another process on the GPU, for which a kernel is stopped anywhere and goes on later.

    Blocks that wait for each other then are as far apart as they can be.
    """
    command = [sys.executable, "-c", _NEIGHBOUR]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            yield
        finally:
            process.kill()
