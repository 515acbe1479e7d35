"""Bins, cleaning and both forms of the prompt, with Gemma's ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfpi.processing.prompt import PromptTooLongError, clean_prompt, encode_prompt, state_bins
from halfpi.processing.tokenizer import Tokenizer, load_tokenizer

STATE = np.array([0.0, -1.0, 1.0, -1.1, -0.5, 0.5625, -0.945, -0.85])
WITH_STATE = "Task: pick up the red cube, State: 128 0 255 -1 64 200 7 19;\nAction: "


@pytest.mark.parametrize(
    ("value", "bin_"),
    [
        (-1e9, -1),
        (-1.0000001, -1),
        (-1.0, 0),
        (-0.9921876, 0),
        (-0.9921875, 1),  # -1 + 2/256: an edge belongs to the bin above it
        (-1e-9, 127),
        (0.0, 128),
        (0.0078124, 128),
        (0.9921875, 255),
        (1.0, 255),
        (40.0, 255),
    ],
)
def test_state_bins(value: float, bin_: int) -> None:
    assert state_bins(np.array([value])).tolist() == [bin_]


def test_the_middle_of_each_bin_gives_its_number() -> None:
    middles = -1 + (np.arange(256) + 0.5) / 128
    np.testing.assert_array_equal(state_bins(middles), np.arange(256))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("pick up", "pick up"),
        ("  pick_up\nthe_cube \n", "pick up the cube"),
        ("a\r\nb", "a\r b"),
        ("_a_", " a "),  # stripped before underscores become blanks, as in openpi
        ("\n \t", ""),
    ],
)
def test_clean_prompt(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


def test_prompt_with_state(table_tokenizer: Tokenizer, gemma_ids: dict[str, list[int]]) -> None:
    tokens, mask = encode_prompt("pick up the red cube", STATE, table_tokenizer, 200)
    ids = [2, *gemma_ids[WITH_STATE]]
    assert tokens.tolist() == ids + [0] * (200 - len(ids))
    assert mask.tolist() == [True] * len(ids) + [False] * (200 - len(ids))
    assert tokens.dtype == np.int64
    assert mask.dtype == np.bool_


def test_prompt_without_state(table_tokenizer: Tokenizer, gemma_ids: dict[str, list[int]]) -> None:
    tokens, mask = encode_prompt("pick up the red cube", None, table_tokenizer, 48)
    ids = [2, *gemma_ids["pick up the red cube"], 108]
    assert tokens[mask].tolist() == ids
    assert tokens[len(ids) :].tolist() == [0] * (48 - len(ids))


def test_sentencepiece_prompt_is_what_openpi_encodes(model_tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(model_tokenizer_path)
    tokens, mask = encode_prompt("pick up the red cube", STATE, tokenizer, 200)
    assert tokens[mask].tolist() == [2, *tokenizer.encode(WITH_STATE)]


def test_a_prompt_may_fill_the_limit_but_not_pass_it(table_tokenizer: Tokenizer) -> None:
    needed = 1 + len(table_tokenizer.encode(WITH_STATE))
    tokens, mask = encode_prompt("pick up the red cube", STATE, table_tokenizer, needed)
    assert mask.all()
    assert tokens.tolist()[1:] == table_tokenizer.encode(WITH_STATE)
    with pytest.raises(
        PromptTooLongError,
        match=f"needs {needed} tokens, but the limit is {needed - 1}; it is 5 words and 8 state "
        "values: 'pick up the red cube'",
    ):
        encode_prompt("pick up the red cube", STATE, table_tokenizer, needed - 1)


def test_a_prompt_without_state_may_also_be_too_long(table_tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptTooLongError, match="5 words and no state"):
        encode_prompt("pick up the red cube", None, table_tokenizer, 3)
