"""The one error of this package, and how its messages list many things."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    The message names the file or tensor, what was expected and what came.
    """


def listing(things: Sequence[str]) -> str:
    """`things` for a message: the first few, and how many more there are."""
    shown = ", ".join(things[:_LISTED])
    rest = len(things) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
