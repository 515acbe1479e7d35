"""What commands print: results to standard output, progress and notes to standard error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")

output = Console()
notes = Console(stderr=True)


def print_json(data: Any) -> None:
    """Print `data` as JSON, unwrapped."""
    output.print_json(json.dumps(data), highlight=False)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield `items` under a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=notes) as progress:
        bar = progress.add_task(description, total=total)
        for item in items:
            progress.advance(bar)
            yield item
