"""What can be set of a server; imports nothing heavy, so that a command line may read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20


@dataclass(frozen=True)
class ServeConfig:
    """How a policy is served. Raises ValueError on what cannot be.

    Attributes:
        host: the address to listen on; 0.0.0.0 is every interface.
        port: the port to listen on; 0 takes a free one.
        api_key_file: one key a line. A client must send one of them; without a file nobody must.
        tls_cert: certificate chain (PEM). With tls_key, clients connect to wss:// only.
        tls_key: private key of tls_cert (PEM).
        metadata_file: a JSON object to greet clients with, such as {"reset_pose": [...]}.
        deadline_s: how long a request may take, waiting included. A call of the policy that takes
            this long counts as hung, and the policy is replaced.
        max_connections: how many robots may be connected.
        max_frame_bytes: of one observation, as it is sent.
        max_queued_bytes: of all observations that wait for the policy.
        max_steps: Euler steps that a request may ask for.
        write_timeout_s: how long a client may take to receive a reply.
        ping_interval_s: the pause between pings of a connection.
        ping_timeout_s: how long a client may take to answer a ping, before it counts as gone.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    metadata_file: Path | None = None
    deadline_s: float = 30.0
    max_connections: int = 64
    max_frame_bytes: int = 32 * _MIB
    max_queued_bytes: int = 512 * _MIB
    max_steps: int = 100
    write_timeout_s: float = 10.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name != "port" and not value > 0:
                raise ValueError(f"ServeConfig.{field.name} must be positive, got {value}")
        if self.max_frame_bytes > self.max_queued_bytes:
            raise ValueError(
                f"ServeConfig.max_queued_bytes must be at least max_frame_bytes, "
                f"{self.max_frame_bytes}, got {self.max_queued_bytes}"
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"ServeConfig.port must be from 0 to 65535, got {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_cert and tls_key, got only one of them")
