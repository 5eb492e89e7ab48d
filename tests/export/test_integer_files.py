"""Integer models whose files were cut short, changed or made to do harm are refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from bayeslora import BayesLoraError, BLoraConfig, export, load_integer
from bayeslora.export.container import CHECKSUM_KEY, DTYPES, INDEX_KEY, checksum
from bayeslora.export.integer.reader import INDEX_FILE, WEIGHTS_FILE, seal
from tests.conftest import build_tiny_llama
from tests.export.test_hostile_files import (
    VALUES,
    _anywhere,
    _cut,
    _flipped,
    _grown,
    _joined,
    _other_header,
    _split,
    json_equal,
)
from tests.methods.reference import FROZEN, layers_of, randomize

FAST, SLOW = 60, 2_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real integer model: per-channel ranges, quantized inputs, a tied head."""
    base = build_tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    config = BLoraConfig(r=2, target_modules=["q_proj"], quantize_input=True, per_channel=True, init_weights=False)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
    path = tmp_path_factory.mktemp("integer") / "model"
    export(model.eval(), path, format="integer")
    return path


def _sealed(weights: bytes, text: str) -> bytes:
    """The tensors' file with what it would say about another index: the work of an attacker, not of chance."""
    header, data = _split(weights)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            part = bytearray(data[entry["data_offsets"][0] : entry["data_offsets"][1]])
            tensors[name] = torch.frombuffer(part, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    header["__metadata__"].update({INDEX_KEY: seal(text), CHECKSUM_KEY: checksum(seal(text), tensors)})
    return _joined(header, data)


Files = tuple[bytes, bytes]


def _in_weights(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Files, random.Random], Files]:
    return lambda files, generator: (files[0], change(files[1], generator))


def _in_index(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Files, random.Random], Files]:
    return lambda files, generator: (change(files[0], generator), files[1])


def _other_index(files: Files, generator: random.Random) -> Files:
    text = json.dumps(_anywhere(json.loads(files[0]), generator.choice(VALUES), generator))
    return text.encode(), _sealed(files[1], text)


ACCIDENTS = [_in_weights(change) for change in (_flipped, _cut, _grown, _other_header)]
ACCIDENTS += [_in_index(change) for change in (_flipped, _cut, _grown)]


def _changed(folder: Path, target: Path, seed: int) -> bool:
    """Write a mutation of `folder` to `target`; whether it is one that must be refused."""
    generator = random.Random(seed)
    files = (folder / INDEX_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
    forged = seed % 2 == 1
    change = _other_index if forged else generator.choice(ACCIDENTS)
    changed = change(files, generator)
    for name, data in zip((INDEX_FILE, WEIGHTS_FILE), changed, strict=True):
        (target / name).write_bytes(data)
    return not forged and (changed[0] != files[0] or not _mean_the_same(changed[1], files[1]))


def _mean_the_same(first: bytes, second: bytes) -> bool:
    return len(first) >= 8 and json_equal(first, second)


def _check(folder: Path, target: Path, seed: int) -> None:
    must_fail = _changed(folder, target, seed)
    try:
        load_integer(target)
    except BayesLoraError as error:
        assert "\n" not in str(error) and "packed" not in str(error)
        assert len(str(error)) < 400
    else:
        assert not must_fail


@pytest.mark.parametrize(
    "block", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]
)
def test_mutated_files_are_refused_in_one_sentence(block: int, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    for seed in range(block):
        _check(folder, tmp_path, seed)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("version",), 2, "update bayeslora"),
        (("architecture",), "BertTokenizer", "does not have"),
        (("architecture",), "BertModel", "does not describe a BertModel|has no layer|missing|in the model"),
        (("linear", "model.layers.0.self_attn.q_proj", "bits", "weight"), 3, "widths other than"),
        (("linear", "model.layers.0.self_attn.q_proj", "ranges", "in"), -1.0, "not finite, positive"),
        (
            ("linear", "model.layers.0.self_attn.q_proj", "shape"),
            [2**30, 2**30],
            "bytes that its widths ask for|in the",
        ),
        (("linear", "model.layers.0.self_attn.q_proj", "rank"), -1, "rank -1"),
        (("linear", "lm_head", "tied_to"), "model.norm", "does not share codes of an embedding of its shape"),
        (("shared",), {"model.norm.weight": "../../etc/passwd"}, "is missing"),
    ],
)
def test_a_forged_index_is_refused(path: tuple[str, ...], value: Any, said: str, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / INDEX_FILE).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    text = json.dumps(content)
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    (tmp_path / WEIGHTS_FILE).write_bytes(_sealed((folder / WEIGHTS_FILE).read_bytes(), text))
    with pytest.raises(BayesLoraError, match=said):
        load_integer(tmp_path)


def test_loading_an_integer_model_imports_neither_peft_nor_what_trains(folder: Path) -> None:
    code = (
        f"import sys, torch, bayeslora\nmodel = bayeslora.load_integer({str(folder)!r})\n"
        "model(torch.arange(8)[None])\n"
        "unwanted = {'peft', 'transformers.trainer', 'datasets', 'bayeslora.methods', 'bayeslora.export.formats'}\n"
        "print(unwanted & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_files_that_are_missing_or_of_another_export_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="does not hold integer.json"):
        load_integer(tmp_path)
    for name in (INDEX_FILE, WEIGHTS_FILE):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(BayesLoraError, match=r"does not hold config.json"):
        load_integer(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    load_integer(tmp_path)
    text = (tmp_path / INDEX_FILE).read_text()
    (tmp_path / INDEX_FILE).write_text(text.replace("\n", "\n ", 1))
    with pytest.raises(BayesLoraError, match="do not belong together"):
        load_integer(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(BayesLoraError, match="dtype is torch.float16, but must be"):
        load_integer(tmp_path, dtype=torch.float16)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(BayesLoraError):
        load_integer(tmp_path)
