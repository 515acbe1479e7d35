"""`halfpi serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfpi.commands.checkpoint import policy_of
from halfpi.serving.server import run_server

if TYPE_CHECKING:
    from halfpi.cli import Serve


def serve(options: Serve) -> None:
    """Serve the policy until the process is told to stop."""
    run_server(lambda: policy_of(options), options.server)
