"""Small real tokenizers, and Gemma's ids as a table for tests that run without its tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
CORPUS = [
    "Task: put the carrot on the plate, State: 0 17 128 255 -1 3 4 56 99;\nAction: ",
    "flip the pot upright which is in the sink",
    "pick up the red cube and turn the lever vertical to front",
] * 8


class TableTokenizer:
    """Gemma's ids for the texts of a table; any other text is a KeyError."""

    bos_id = 2
    pad_id = 0
    vocab_size = 256_000

    def __init__(self, table: Mapping[str, list[int]]) -> None:
        self.table = table

    def encode(self, text: str) -> list[int]:
        return self.table[text]


@pytest.fixture(scope="session")
def gemma_ids() -> dict[str, list[int]]:
    """Text → ids, computed with the tokenizer of Gemma."""
    entries = json.loads((ROOT / "tests" / "golden" / "gemma_tokens.json").read_text())
    return {entry["text"]: entry["ids"] for entry in entries}


@pytest.fixture(scope="session")
def table_tokenizer(gemma_ids: dict[str, list[int]]) -> TableTokenizer:
    return TableTokenizer(gemma_ids)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Where data lies that is too large, or not ours, to commit."""
    return ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def json_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of a few hundred tokens; <pad> 0, <bos> 1."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def model_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with Gemma's settings: digits apart, newline a token, no prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
