"""Between a robot and the model: images, state, prompt and actions."""

from __future__ import annotations

from halfpi.processing.pipeline import ModelInputs, Processor
from halfpi.processing.prompt import PromptTooLongError
from halfpi.processing.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

__all__ = [
    "ModelInputs",
    "Processor",
    "PromptTooLongError",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
]
