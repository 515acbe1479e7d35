"""Both tokenizer formats, Gemma's ids, and where a tokenizer is looked for."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models

from halfpi.processing.tokenizer import find_tokenizer, load_tokenizer

TEXTS = [
    "Task: put the carrot on the plate, State: 3 128 -1;\nAction: ",
    "flip the pot",
    "\n",
    "größe ☕ 拿起",
]


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No tokenizer in any cache; returns the directory that holds both caches."""
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_gemma_gives_the_ids_of_the_table(
    shared_data: Path, tmp_path: Path, gemma_ids: dict[str, list[int]]
) -> None:
    packed = shared_data / "gemma_tokenizer.json.xz"
    if not packed.exists():
        pytest.skip(f"Gemma's tokenizer is not ours to commit, and {packed} does not exist")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 0, 256_000)
    for text, ids in gemma_ids.items():
        assert tokenizer.encode(text) == ids, text


def test_the_table_holds_what_is_known_of_gemma(gemma_ids: dict[str, list[int]]) -> None:
    assert gemma_ids["\n"] == [108]
    digits = dict(zip("0123456789", gemma_ids["0 1 2 3 4 5 6 7 8 9"][::2], strict=True))
    space = gemma_ids["0 1 2 3 4 5 6 7 8 9"][1]
    expected = [digits[c] if c.isdigit() else space for c in "255 254 199"]
    assert gemma_ids["255 254 199"] == expected  # every digit is a token of its own


def test_json_gives_the_ids_of_its_library(json_tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(json_tokenizer_path)
    library = HuggingFaceTokenizer.from_file(str(json_tokenizer_path))
    assert (tokenizer.pad_id, tokenizer.bos_id) == (0, 1)
    assert tokenizer.vocab_size == library.get_vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert library.decode(ids) == text
        assert tokenizer.bos_id not in ids


def test_model_gives_the_ids_of_its_library(model_tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(model_tokenizer_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_tokenizer_path))
    assert (tokenizer.pad_id, tokenizer.bos_id) == (0, 2)
    assert tokenizer.vocab_size == library.get_piece_size()
    for text in TEXTS:
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == library.encode(text, add_bos=True)
        assert library.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("\n")) == 1


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_damaged_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tokenizer{suffix}"
    path.write_bytes(b"\xff garbage")
    with pytest.raises(ValueError, match=rf"tokenizer{suffix} is damaged"):
        load_tokenizer(path)


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json or a SentencePiece"):
        load_tokenizer(tmp_path / "tokenizer.txt")


def test_tokenizer_without_bos(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    HuggingFaceTokenizer(models.BPE()).save(str(path))
    with pytest.raises(ValueError, match="no <bos> token"):
        load_tokenizer(path)


def test_explicit_path_wins_and_is_never_replaced(empty_machine: Path) -> None:
    explicit = put(empty_machine / "mine.model")
    checkpoint = put(empty_machine / "checkpoint" / "tokenizer.json").parent
    assert find_tokenizer(explicit, checkpoint) == explicit
    with pytest.raises(ValueError, match=r"gone\.model does not exist"):
        find_tokenizer(empty_machine / "gone.model", checkpoint)


def test_search_order(empty_machine: Path) -> None:
    checkpoint = empty_machine / "checkpoint"
    snapshots = empty_machine / "hf" / "hub" / "models--google--paligemma-3b-pt-224" / "snapshots"
    last_to_first = [
        snapshots / "1a2b" / "tokenizer.json",
        empty_machine / "openpi" / "big_vision" / "paligemma_tokenizer.model",
        checkpoint / "paligemma_tokenizer.model",
        checkpoint / "tokenizer.model",
        checkpoint / "tokenizer.json",
        checkpoint / "tokenizer" / "tokenizer.json",
    ]
    for path in last_to_first:
        put(path)
        assert find_tokenizer(None, checkpoint) == path


def test_nothing_found_lists_every_place(empty_machine: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer PATH") as error:
        find_tokenizer(None, empty_machine / "checkpoint")
    for place in ("checkpoint/tokenizer.model", "openpi/big_vision", "hf/hub/models--google"):
        assert place in str(error.value)
