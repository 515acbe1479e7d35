"""The text tokenizer, found on this machine and never downloaded.

π0.5 was trained with PaliGemma's tokenizer, which is not ours to ship. It comes in two files that
give the same ids: SentencePiece's `.model` (openpi) and Hugging Face's `tokenizer.json` (LeRobot).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

# Where a checkpoint may carry its tokenizer; LeRobot writes the first.
TOKENIZER_FILES = (
    "tokenizer/tokenizer.json",
    "tokenizer.json",
    "tokenizer.model",
    "paligemma_tokenizer.model",
)
_HUB_REPOSITORY = "models--google--paligemma-3b-pt-224"


class Tokenizer(Protocol):
    """Text to token ids; special tokens are the caller's business."""

    @property
    def bos_id(self) -> int:
        """The id that begins a prompt."""

    @property
    def pad_id(self) -> int:
        """The id that fills a prompt up; 0 where the tokenizer names none."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are; `encode` gives ids below it."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece `.model` or a Hugging Face `.json`.

    Raises ValueError if the file has another suffix, is missing or damaged, or has no BOS token.
    """
    path = Path(path)
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"tokenizer {path}: expected a tokenizer.json or a SentencePiece .model")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    return _load_json(path, data) if path.suffix == ".json" else _load_model(path, data)


def find_tokenizer(explicit: str | Path | None, checkpoint: Path | None) -> Path:
    """The tokenizer file to use.

    explicit: wins over all others; if it does not exist, that is an error, no reason to search on.
    checkpoint: its directory, searched before openpi's cache and Hugging Face's.
    Raises ValueError that lists every place searched.
    """
    if explicit is not None:
        if not Path(explicit).is_file():
            raise ValueError(f"tokenizer {explicit} does not exist")
        return Path(explicit)
    searched = []
    for path in _candidates(checkpoint):
        if path.is_file():
            return path
        searched.append(str(path))
    raise ValueError(
        "no tokenizer found; name one with --tokenizer PATH (PaliGemma's tokenizer.json or "
        f".model). Searched: {', '.join(searched)}"
    )


def _candidates(checkpoint: Path | None) -> Iterator[Path]:
    if checkpoint is not None:
        yield from (checkpoint / name for name in TOKENIZER_FILES)
    openpi_cache = os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")
    yield Path(openpi_cache).expanduser() / "big_vision" / "paligemma_tokenizer.model"
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    snapshots = hub / _HUB_REPOSITORY / "snapshots"
    yield from sorted(snapshots.glob("*/tokenizer.json"))  # the same file in every revision
    yield snapshots / "*" / "tokenizer.json"


class _JsonTokenizer:
    def __init__(self, tokenizer: tokenizers.Tokenizer, bos_id: int) -> None:
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.pad_id = tokenizer.token_to_id("<pad>") or 0
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class _SentencePieceTokenizer:
    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self.bos_id = processor.bos_id()
        self.pad_id = max(processor.pad_id(), 0)
        self.vocab_size = processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


def _load_json(path: Path, data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        tokenizer = HuggingFaceTokenizer.from_str(data.decode())
    except Exception as error:  # what the library raises
        raise ValueError(f"tokenizer {path} is damaged: {error}") from error
    bos_id = tokenizer.token_to_id("<bos>")
    if bos_id is None:
        raise ValueError(f"tokenizer {path} has no <bos> token")
    return _JsonTokenizer(tokenizer, bos_id)


def _load_model(path: Path, data: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"tokenizer {path} is damaged: {error}") from error
    if processor.bos_id() < 0:
        raise ValueError(f"tokenizer {path} has no BOS token")
    return _SentencePieceTokenizer(processor)
