"""The Meta-World tasks that nano knows, with the sentences that name them.

Meta-World has no language of its own: the first sentence of a task is its instruction, used in
evaluation; the others are paraphrases, drawn at random while training. `PRECISE` tasks need a grasp
or an alignment. `SHARED_SCENE` pairs tasks whose scenes look alike, so that only the sentence tells
them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A Meta-World task (without its version suffix) and the sentences that ask for it."""

    name: str
    sentences: tuple[str, ...]

    @property
    def instruction(self) -> str:
        """The sentence used in evaluation."""
        return self.sentences[0]

    @property
    def environment(self) -> str:
        """The name of the task in Meta-World."""
        return f"{self.name}-v3"


_SENTENCES: dict[str, tuple[str, ...]] = {
    "assembly": (
        "put the ring on the peg",
        "pick up the ring and place it over the peg",
        "assemble the nut onto the post",
        "slide the round nut onto the peg",
    ),
    "basketball": (
        "throw the ball through the hoop",
        "put the basketball in the basket",
        "dunk the ball into the hoop",
        "pick up the basketball and drop it through the ring",
    ),
    "button-press-topdown": (
        "press the button from above",
        "push the button down",
        "press the red button down from the top",
        "push down on the button",
    ),
    "coffee-button": (
        "press the button of the coffee machine",
        "start the coffee machine",
        "push the coffee machine button",
        "turn on the coffee maker",
    ),
    "door-close": (
        "close the door",
        "shut the door",
        "push the safe door closed",
        "swing the door shut",
    ),
    "door-open": (
        "open the door",
        "pull the door open",
        "open the safe door",
        "swing the door open by its handle",
    ),
    "drawer-close": (
        "close the drawer",
        "shut the drawer",
        "push the drawer in",
        "slide the drawer closed",
    ),
    "drawer-open": (
        "open the drawer",
        "pull the drawer out",
        "slide the drawer open",
        "pull the drawer open by its handle",
    ),
    "faucet-close": (
        "close the faucet",
        "turn the faucet off",
        "shut the tap",
        "rotate the faucet handle to close it",
    ),
    "faucet-open": (
        "open the faucet",
        "turn the faucet on",
        "open the tap",
        "rotate the faucet handle to open it",
    ),
    "hammer": (
        "hammer the nail",
        "hit the nail with the hammer",
        "drive the nail into the box",
        "pick up the hammer and hit the nail",
    ),
    "handle-press": (
        "press the handle down",
        "push the handle down",
        "push down the lever on the box",
        "press down on the handle",
    ),
    "peg-insert-side": (
        "insert the peg into the hole",
        "put the peg in the side of the box",
        "push the green peg into the hole",
        "pick up the peg and insert it sideways",
    ),
    "pick-place": (
        "pick up the puck and place it at the goal",
        "lift the puck to the goal",
        "grasp the puck and carry it to the blue marker",
        "bring the puck to the target in the air",
    ),
    "plate-slide": (
        "slide the plate into the cabinet",
        "push the plate into the goal",
        "slide the puck into the net",
        "push the plate forward into the cage",
    ),
    "push": (
        "push the puck to the goal",
        "slide the puck to the green marker",
        "move the puck across the table to the target",
        "push the red puck to the target",
    ),
    "window-close": (
        "close the window",
        "shut the window",
        "slide the window closed",
        "push the window shut by its handle",
    ),
    "window-open": (
        "open the window",
        "slide the window open",
        "push the window open",
        "open the window by its handle",
    ),
}

TASKS: dict[str, Task] = {name: Task(name, texts) for name, texts in _SENTENCES.items()}

PRECISE: tuple[str, ...] = (
    "push",
    "pick-place",
    "peg-insert-side",
    "basketball",
    "hammer",
    "assembly",
)

# Where the task starts, what its counterpart asks for is done already.
FULFILLED_AT_START: dict[str, str] = {
    "door-close": "door-open",
    "door-open": "door-close",
    "drawer-close": "drawer-open",
    "drawer-open": "drawer-close",
    "window-close": "window-open",
    "window-open": "window-close",
}

SHARED_SCENE: dict[str, str] = {
    **FULFILLED_AT_START,
    "faucet-close": "faucet-open",
    "faucet-open": "faucet-close",
}


def select(names: Iterable[str]) -> list[Task]:
    """The named tasks; "all" and "precise" are groups. Raises ValueError on an unknown name."""
    groups = {"all": tuple(TASKS), "precise": PRECISE}
    chosen: dict[str, Task] = {}
    for name in names:
        for member in groups.get(name, (name,)):
            if member not in TASKS:
                raise ValueError(
                    f"unknown task {member!r}; expected all, precise or one of {', '.join(TASKS)}"
                )
            chosen[member] = TASKS[member]
    return list(chosen.values())
