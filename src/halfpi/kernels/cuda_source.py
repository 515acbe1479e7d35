"""CUDA C++ of the package, compiled at run time with NVRTC and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SOURCES = Path(__file__).parent / "cuda"


def compiled(name: str, defines: Mapping[str, int], target: str = "cubin") -> bytes:
    """`name`.cu for sm_90a with `defines`, as "cubin" or "ptx".

    A cubin is looked for in the cache directory first: $XDG_CACHE_HOME/halfpi or ~/.cache/halfpi.

    Raises ImportError naming the extra without `cuda-core`.
    """
    core = cuda_core()
    sources = sorted(_SOURCES.iterdir())
    key = repr((core.__version__, name, sorted(defines.items()))).encode()
    digest = hashlib.sha256(key + b"".join(path.read_bytes() for path in sources)).hexdigest()
    cached = _cache_directory() / f"{name}-{digest[:32]}.{target}"
    if not cached.exists():
        _write(cached, _compile(core, name, defines, target))
    return cached.read_bytes()


def cuda_core() -> Any:
    """The module `cuda.core`; raises ImportError naming the extra without it."""
    try:
        import cuda.core
    except ImportError as error:
        message = 'the CUDA kernels need cuda-core: pip install "halfpi[hopper]"'
        raise ImportError(message) from error
    return cuda.core


def _compile(core: Any, name: str, defines: Mapping[str, int], target: str) -> bytes:
    options = core.ProgramOptions(
        std="c++17",
        arch="sm_90a" if target == "cubin" else "compute_90a",
        define_macro=[(macro, str(value)) for macro, value in defines.items()],
        include_path=str(_SOURCES),
    )
    source = (_SOURCES / f"{name}.cu").read_text()
    code: bytes = core.Program(source, "c++", options).compile(target).code
    return code


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "halfpi"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
