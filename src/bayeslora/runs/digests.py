"""Digests of the files of a run that decide its predictions, so that a changed one does not pass for the run's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.files import check_readable, save_json

DIGESTS_FILE = "digests.json"
ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.onnx", "*.gguf")
_BESIDE = "adapter"
"""Folder of the adapter that is not in the weights of an export in torchao's layout."""
# Where the base model lies may change, and libraries write their versions.
_ANYWHERE = (
    "base_model_name_or_path", "_name_or_path", "name_or_path", "peft_version", "transformers_version", "revision",
)  # fmt: skip
_BLOCK, _BLOCKS = 2**20, 256


def adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        BayesLoraError: the file is missing or damaged.
    """
    path = folder / ADAPTER_CONFIG
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BayesLoraError(f"{path} is missing or damaged: train again or restore it from a copy") from error
    return dict(content)


def save_digests(folder: Path) -> None:
    """Write digests of configuration, tokenizer and all weights that are in the folder now."""
    files = [folder / name for name in (ADAPTER_CONFIG, "config.json", *_TOKENIZER)]
    for place in (folder, folder / _BESIDE):
        files += [path for kind in _WEIGHTS for path in sorted(place.glob(kind))]
    files.append(folder / _BESIDE / ADAPTER_CONFIG)
    known = {path.relative_to(folder).as_posix(): _digest(path) for path in files if path.is_file()}
    save_json(folder / DIGESTS_FILE, known)


def check_digests(folder: Path, only_config: bool = False) -> None:
    """Raise BayesLoraError if a file is not the one whose digest was saved; folders without digests are not checked.

    A missing file of the tokenizer is left to those who look for one. With `only_config` the adapter's configuration
    is checked alone, before anything is made as it says.
    """
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return
    check_readable(path)
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BayesLoraError(f"{path} is damaged: restore it from a copy, or delete it to check nothing") from error
    for name, digest in known.items():
        file = folder / (_BESIDE if Path(name).parent.name == _BESIDE else "") / Path(name).name
        if (only_config and name != ADAPTER_CONFIG) or (name in _TOKENIZER and not file.is_file()):
            continue
        if not file.is_file() or _digest(file) != digest:
            raise BayesLoraError(
                f"{file} is not the file that was saved here: restore it from a copy, or delete {DIGESTS_FILE} to "
                "load the folder as it is now"
            )


def _digest(path: Path) -> str:
    """Return a digest of a file: of what a JSON file says, or of up to 256 MiB of others, spread over them."""
    digest = hashlib.blake2b(digest_size=8)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            return ""
        kept = {name: value for name, value in content.items() if name not in _ANYWHERE}
        # PEFT writes sets, in any order.
        kept = {name: sorted(map(repr, value)) if isinstance(value, list) else value for name, value in kept.items()}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        return digest.hexdigest()
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        for place in range(0, size, _BLOCK * max(1, -(-size // (_BLOCK * _BLOCKS)))):
            stream.seek(place)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
