"""Between a robot and the model: images, state, prompt and actions."""

from __future__ import annotations

from halfpi.processing.pipeline import ModelInputs, Processor, check_processing
from halfpi.processing.prompt import PromptTooLongError
from halfpi.processing.robots import ROBOTS
from halfpi.processing.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)

__all__ = [
    "ROBOTS",
    "TOKENIZER_FILES",
    "ModelInputs",
    "Processor",
    "PromptTooLongError",
    "Tokenizer",
    "check_processing",
    "find_tokenizer",
    "load_tokenizer",
]
