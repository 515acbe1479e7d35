"""The prompt: instruction and state as the tokens that the model was trained on.

Sources: openpi models/tokenizer.py (PaligemmaTokenizer.tokenize); LeRobot processor_pi05.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfpi.processing.normalize import Floats
from halfpi.processing.tokenizer import Tokenizer

_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


class PromptTooLongError(ValueError):
    """A prompt needs more tokens than the model was trained with.

    openpi and LeRobot cut the end off, which is the state and the cue for the actions, and go on.
    """


def clean_prompt(text: str) -> str:
    """`text` as it enters the prompt: one line, no underscores, no blanks around it."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: Floats) -> NDArray[np.int64]:
    """The bin of each normalised state value: 256 of them over [-1, 1); -1 below, 255 above.

    state: float (state_dim,). 0.0 falls into bin 128.
    """
    bins: NDArray[np.int64] = np.digitize(state, _BIN_EDGES) - 1
    return bins


def encode_prompt(
    instruction: str, state: Floats | None, tokenizer: Tokenizer, max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of the prompt, padded on the right, and their mask; both (max_tokens,).

    The mask is True on the real ones.
    instruction: already cleaned. state: float (state_dim,), normalised; None for models that were
    trained without the state in the prompt (`discrete_state_input=False`, as pi05_libero).
    Raises PromptTooLongError when the prompt does not fit.
    """
    ids = [tokenizer.bos_id, *_body(instruction, state, tokenizer)]
    if len(ids) > max_tokens:
        values = "no state" if state is None else f"{len(state)} state values"
        raise PromptTooLongError(
            f"the prompt needs {len(ids)} tokens, but the limit is {max_tokens}; it is "
            f"{len(instruction.split())} words and {values}: {instruction!r}"
        )
    tokens = np.full(max_tokens, tokenizer.pad_id, dtype=np.int64)
    tokens[: len(ids)] = ids
    return tokens, np.arange(max_tokens) < len(ids)


def _body(instruction: str, state: Floats | None, tokenizer: Tokenizer) -> list[int]:
    if state is None:
        # Encoded by itself the newline stays one token whatever comes before it.
        return tokenizer.encode(instruction) + tokenizer.encode("\n")
    bins = " ".join(map(str, state_bins(state)))
    return tokenizer.encode(f"Task: {instruction}, State: {bins};\nAction: ")
