"""Tasks, tables and tokenized rows: everything between a file and a batch.

Its names are imported when they are first used: tables and labels need neither torch nor `datasets`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bayeslora._lazy import importer

if TYPE_CHECKING:
    from bayeslora.data.chat import encode_generation, labelled_tokens
    from bayeslora.data.choices import Cloze
    from bayeslora.data.completions import prompt_masked
    from bayeslora.data.encode import encode, encode_texts
    from bayeslora.data.encode_words import encode_words, word_collator, word_rows
    from bayeslora.data.few_shot import few_shot_pool
    from bayeslora.data.generation import load_generation
    from bayeslora.data.inspection import Inspection, inspect_file
    from bayeslora.data.packaged import packaged_model, unpack_model
    from bayeslora.data.split import HoldOut
    from bayeslora.data.tasks import TASKS, Task, hold_out, load_files, load_task, load_texts

__all__ = [
    "Cloze",
    "HoldOut",
    "Inspection",
    "TASKS",
    "Task",
    "encode",
    "encode_generation",
    "encode_texts",
    "encode_words",
    "few_shot_pool",
    "hold_out",
    "inspect_file",
    "labelled_tokens",
    "load_files",
    "load_generation",
    "load_task",
    "load_texts",
    "packaged_model",
    "prompt_masked",
    "unpack_model",
    "word_collator",
    "word_rows",
]

_MODULES = {
    "chat": ("encode_generation", "labelled_tokens"),
    "choices": ("Cloze",),
    "completions": ("prompt_masked",),
    "encode": ("encode", "encode_texts"),
    "encode_words": ("encode_words", "word_collator", "word_rows"),
    "few_shot": ("few_shot_pool",),
    "generation": ("load_generation",),
    "inspection": ("Inspection", "inspect_file"),
    "packaged": ("packaged_model", "unpack_model"),
    "split": ("HoldOut",),
    "tasks": ("TASKS", "Task", "hold_out", "load_files", "load_task", "load_texts"),
}
__getattr__ = importer(__name__, _MODULES)


class _Package(ModuleType):
    """Keep `encode` and `encode_words` the functions when the modules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name in ("encode", "encode_words") and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_module else value)


sys.modules[__name__].__class__ = _Package
