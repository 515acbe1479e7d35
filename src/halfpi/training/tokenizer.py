"""nano's own tokenizer: byte-level BPE that knows every state bin as one token.

Gemma's tokenizer may not be shipped, and splits numbers into digits. A vocabulary of our own keeps
the prompt of a four-dimensional state near twenty tokens; bytes as the base alphabet mean that any
instruction can be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")  # ids 0, 1, 2, as in Gemma
STATE_BINS = range(-1, 256)


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` from the sentences of all tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = "".join(f" {number}" for number in STATE_BINS)
    texts = [f"Task: {sentence}, State:{numbers};\nAction: " for sentence in sentences]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def number_tokens(tokenizer: Tokenizer) -> Mapping[int, int]:
    """The token id of each state bin, as it stands in a prompt after a blank.

    Raises ValueError if the vocabulary was too small to hold one of them whole.
    """
    ids = {number: tokenizer.encode(f" {number}").ids for number in STATE_BINS if number >= 0}
    split = [number for number, pieces in ids.items() if len(pieces) != 1]
    if split:
        raise ValueError(f"the vocabulary splits state bins {split}; make it larger")
    return {number: pieces[0] for number, pieces in ids.items()}
