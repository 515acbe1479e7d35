"""What can be set of a server; imports nothing heavy, so that a command line may read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20
_MAY_BE_ZERO = ("port", "batch_wait_ms")


@dataclass(frozen=True)
class ServeConfig:
    """How a policy is served. Raises ValueError on what cannot be."""

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 is every interface."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """One key a line, of which a client must send one; without the file nobody must."""
    tls_cert: Path | None = None
    """Certificate chain (PEM). With --tls-key, clients connect to wss:// only."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM)."""
    metadata_file: Path | None = None
    """A JSON object to greet clients with, such as {"reset_pose": [...]}."""
    deadline_s: float = 30.0
    """How long a request may take, waiting included; a call that takes this long counts as hung."""
    max_connections: int = 64
    """How many robots may be connected."""
    max_frame_bytes: int = 32 * _MIB
    """Size of one observation, as it is sent."""
    max_queued_bytes: int = 512 * _MIB
    """Size of all observations that wait for the policy."""
    max_batch: int = 8
    """Requests of different robots that may be computed in one pass; 1 takes each alone."""
    batch_wait_ms: float = 2.0
    """How long a pass may wait for robots that asked before and have not asked again."""
    max_steps: int = 100
    """Euler steps that a request may ask for."""
    write_timeout_s: float = 10.0
    """How long a client may take to receive a reply."""
    ping_interval_s: float = 20.0
    """The pause between pings of a connection."""
    ping_timeout_s: float = 20.0
    """How long a client may take to answer a ping, before it counts as gone."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name not in _MAY_BE_ZERO and not value > 0:
                raise ValueError(f"ServeConfig.{field.name} must be positive, got {value}")
        if not self.batch_wait_ms >= 0:
            raise ValueError(
                f"ServeConfig.batch_wait_ms must be at least 0, got {self.batch_wait_ms}"
            )
        if self.max_frame_bytes > self.max_queued_bytes:
            raise ValueError(
                f"ServeConfig.max_queued_bytes must be at least max_frame_bytes, "
                f"{self.max_frame_bytes}, got {self.max_queued_bytes}"
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"ServeConfig.port must be from 0 to 65535, got {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_cert and tls_key, got only one of them")
