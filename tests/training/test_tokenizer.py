"""nano's vocabulary: every state bin a token, every text writable."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from halfpi.config import PRESETS
from halfpi.sim.tasks import TASKS
from halfpi.training.tokenizer import SPECIAL_TOKENS, number_tokens, train_tokenizer

SENTENCES = [sentence for task in TASKS.values() for sentence in task.sentences]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES, PRESETS["nano"].vocab_size)


def test_special_tokens_have_gemma_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_every_state_bin_is_one_token_of_its_own(tokenizer: Tokenizer) -> None:
    tokens = number_tokens(tokenizer)
    assert [*tokens] == [*range(256)]
    assert len(set(tokens.values())) == 256
    assert max(tokens.values()) < PRESETS["nano"].vocab_size
    for number, token in tokens.items():
        assert tokenizer.decode([token]) == f" {number}"


def test_state_bins_stay_tokens_within_a_prompt(tokenizer: Tokenizer) -> None:
    tokens = number_tokens(tokenizer)
    for bins in ((0, 255, 128, 17), (99, 100, 9, 250)):
        text = f"Task: open the door, State: {' '.join(map(str, bins))};\nAction: "
        ids = tokenizer.encode(text).ids
        numbers = {token: number for number, token in tokens.items()}
        assert [numbers[token] for token in ids if token in numbers] == [*bins]


@pytest.mark.parametrize("text", ["Öffne die Tür! 🚪", "zebra\tquilt\\x", "推门", "<eos>"])
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids
    assert max(ids) < PRESETS["nano"].vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_it_again_gives_the_same(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(SENTENCES, PRESETS["nano"].vocab_size).to_str() == tokenizer.to_str()


def test_a_vocabulary_too_small_for_the_bins_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"splits state bins \[.*; make it larger"):
        number_tokens(train_tokenizer(SENTENCES, 300))
