"""`halfpi report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfpi.commands.console import notes
from halfpi.perf.latency_report import write_report

if TYPE_CHECKING:
    from halfpi.cli import Report


def report(options: Report) -> None:
    """Write the page."""
    write_report(options.records, options.output)
    notes.print(f"wrote {options.output}")
