"""Tasks, tables and tokenized rows: everything between a file and a batch."""

from __future__ import annotations

from bayeslora.data.chat import encode_generation, labelled_tokens
from bayeslora.data.choices import Cloze
from bayeslora.data.completions import prompt_masked
from bayeslora.data.encode import encode, encode_texts
from bayeslora.data.few_shot import few_shot_pool
from bayeslora.data.generation import load_generation
from bayeslora.data.packaged import packaged_model, unpack_model
from bayeslora.data.tasks import TASKS, Task, hold_out, load_files, load_task, load_texts

__all__ = [
    "Cloze",
    "TASKS",
    "Task",
    "encode",
    "encode_generation",
    "encode_texts",
    "few_shot_pool",
    "hold_out",
    "labelled_tokens",
    "load_files",
    "load_generation",
    "load_task",
    "load_texts",
    "packaged_model",
    "prompt_masked",
    "unpack_model",
]
