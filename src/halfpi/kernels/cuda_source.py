"""CUDA C++ of the package, compiled at run time with NVRTC and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SOURCES = Path(__file__).parent / "cuda"


def cubin(name: str, defines: Mapping[str, float]) -> bytes:
    """The machine code of `name`.cu for sm_90a with `defines`.

    It is looked for in the cache directory first: $XDG_CACHE_HOME/halfpi or ~/.cache/halfpi.

    Raises ImportError naming the extra without cuda-core, RuntimeError with the compiler's log.
    """
    nvrtc = nvrtc_module()
    sources = sorted(_SOURCES.iterdir())
    key = repr((nvrtc.nvrtcVersion(), name, _options(defines))).encode()
    digest = hashlib.sha256(key + b"".join(path.read_bytes() for path in sources)).hexdigest()
    cached = _cache_directory() / f"{name}-{digest[:32]}.cubin"
    if not cached.exists():
        with _compiled(nvrtc, name, _options(defines)) as program:
            code = _output(program, nvrtc.nvrtcGetCUBIN, nvrtc.nvrtcGetCUBINSize)
        _write(cached, code)
    return cached.read_bytes()


def ptx(name: str, defines: Mapping[str, float]) -> str:
    """The same as PTX, for a look at the instructions; never cached."""
    nvrtc = nvrtc_module()
    with _compiled(nvrtc, name, _options(defines)) as program:
        return _output(program, nvrtc.nvrtcGetPTX, nvrtc.nvrtcGetPTXSize).decode()


def report(name: str, defines: Mapping[str, float]) -> str:
    """What the assembler says of registers, spills and serialised products; never cached."""
    nvrtc = nvrtc_module()
    with _compiled(nvrtc, name, [*_options(defines), b"--ptxas-options=-v"]) as program:
        return _log(nvrtc, program)


def is_available() -> bool:
    """Whether the packages that compile and launch are installed."""
    return all(find_spec(name) is not None for name in ("cuda", "cuda.core", "cuda.bindings"))


def nvrtc_module() -> Any:
    """The module `cuda.bindings.nvrtc`; raises ImportError naming the extra without it."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        message = 'the CUDA kernels need cuda-core: pip install "halfpi[hopper]"'
        raise ImportError(message) from error
    return nvrtc


def _options(defines: Mapping[str, float]) -> list[bytes]:
    macros = [f"-D{macro}={value}" for macro, value in sorted(defines.items())]
    return [option.encode() for option in ("-std=c++17", "-arch=sm_90a", *macros)]


@contextmanager
def _compiled(nvrtc: Any, name: str, options: list[bytes]) -> Iterator[Any]:
    """The compiled program."""
    headers = sorted(_SOURCES.glob("*.cuh"))
    source = (_SOURCES / f"{name}.cu").read_bytes()
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    _, program = nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), texts, names)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name}.cu does not compile: {_log(nvrtc, program)}")
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    return _output(program, nvrtc.nvrtcGetProgramLog, nvrtc.nvrtcGetProgramLogSize).decode()


def _output(program: Any, get: Callable[..., Any], get_size: Callable[..., Any]) -> bytes:
    data = bytearray(get_size(program)[1])
    get(program, data)
    return bytes(data)


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "halfpi"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
