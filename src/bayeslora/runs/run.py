"""A finished run or an export as an object, and `load`, which makes one of a folder or a hub id."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import predict_dataset
from bayeslora.export.container import looks_packed
from bayeslora.export.integer.index import is_integer_model
from bayeslora.export.integer.reader import load_integer
from bayeslora.posterior import POSTERIOR_FILE, WeightPosterior, load_posterior
from bayeslora.prediction import Prediction, check_samples
from bayeslora.runs.base import (
    AUTO_CLASSES,
    has_tokenizer,
    load_base,
    load_errors,
    load_tokenizer,
    longest_input,
    quiet_loading,
    ready,
    resolve_model,
    tokenizer_digest,
)
from bayeslora.runs.info import RUN_FILE, RunInfo, RunKind
from bayeslora.runs.plain import ADAPTER_FILE, CONFIG_FILE, adapter_config, plain_info
from bayeslora.runs.predictions import Predictions
from bayeslora.runs.record import METRICS_FILE, RunRecord, read_run
from bayeslora.runs.rows import EVALUATION, encode_for, rows_to_predict


@dataclass(frozen=True, repr=False)
class Run:
    """A model with everything that is known of it.

    ```python
    run = bayeslora.load("out")
    for row in run.predict(["A warm, clever film.", "Dull."], samples=10):
        print(row.label, row.mutual_information)
    pipeline("text-classification", model=run.model, tokenizer=run.tokenizer)
    ```

    Attributes:
        folder: it was loaded from.
        model: in evaluation mode.
        tokenizer: of the model.
        info: the content of `run.json`; what could be found out where there is none.
    """

    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    info: RunInfo

    def __repr__(self) -> str:
        classes = f", {len(self.labels)} labels" if self.labels else ""
        return f"Run({str(self.folder)!r}: {self.method} on {self.task}, {self.kind}{classes})"

    @property
    def labels(self) -> list[str]:
        """Class names by id; empty for regression and for a language model."""
        return self.info.labels

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.info.task

    @property
    def kind(self) -> RunKind:
        """`classification`, `regression`, `multiple_choice`, or `generation` for a language model without labels."""
        return self.info.kind

    @property
    def base(self) -> str:
        """Folder or hub id of the base model."""
        return self.info.model

    @property
    def method(self) -> str:
        """One of `bayeslora train --method`; `full` for every model without an adapter."""
        return self.info.method

    @property
    def config(self) -> dict[str, Any]:
        """The options it was trained with, as in `config.yaml`; empty without that file."""
        path = self.folder / "config.yaml"
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    @property
    def metrics(self) -> RunRecord | None:
        """The content of `metrics.json`; None without that file."""
        return read_run(self.folder) if (self.folder / METRICS_FILE).is_file() else None

    @functools.cached_property
    def predictor(self) -> nn.Module | WeightPosterior:
        """The model to give to `bayeslora.predict`, with the posterior that IVON has learned if the run saved one."""
        return with_posterior(self.model, self.folder)

    @quiet_loading()
    def predict(self, inputs: Any, samples: int = 0, seed: int = 0, batch_size: int = 64) -> Predictions:
        """Label texts, and say how sure each label is.

        Args:
            inputs: a text, a pair (a tuple of two strings) or a row (a dict); an iterable of them, such as a list or
                a `datasets.Dataset`; or the `pathlib.Path` of a data file. Rows have the columns that the run was
                trained on, `question` and `choices` for multiple choice; other columns are ignored.
            samples: draws of the weights; 0 uses their mean.
            seed: of the draws.
            batch_size: rows at a time; the result does not depend on it.

        Raises:
            BayesLoraError: no rows, a row of another form, or samples of a model without a posterior.
        """
        task = rows_to_predict(inputs, self.info)
        data = encode_for(task.splits[EVALUATION], task, self.tokenizer, self.info)
        return self.predict_encoded(data, samples, seed, batch_size)

    def predict_encoded(self, data: Any, samples: int = 0, seed: int = 0, batch_size: int = 64) -> Predictions:
        """`predict` for rows that `runs.rows.encode_for` has tokenized."""
        predictor = self.predictor
        check_samples(predictor, samples)
        prediction: Prediction = predict_dataset(predictor, data, self.tokenizer, batch_size, samples, seed)
        return Predictions(prediction, self.labels)


@quiet_loading()
def load(
    folder: str | os.PathLike[str],
    model: str | None = None,
    device: str | torch.device | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
) -> Run:
    """Load a finished run, an export of one, or an adapter that `save_pretrained` wrote.

    Args:
        folder: the folder, or a hub id (`owner/name`) that has its files.
        model: folder or hub id of the base model, by default the one that the run or the adapter names.
        device: to compute on, by default the GPU if one is available.
        tokenizer: the tokenizer the run was trained with, or its folder or hub id, where `folder` lacks it.

    Raises:
        BayesLoraError: nothing of the kind at `folder`, a missing or damaged file, no way to the hub, or a base model
            or tokenizer that is not the one trained with.
    """
    place = _place(folder)
    info = RunInfo.load(place) if (place / RUN_FILE).is_file() else plain_info(place, model)
    own = _tokenizer(place, info, model, tokenizer)
    if is_integer_model(place):
        loaded: nn.Module = load_integer(place)
    elif info.method == "full":
        with load_errors(f"the model in {place}"):
            loaded = AUTO_CLASSES[info.head].from_pretrained(place, dtype=getattr(torch, info.dtype))
    else:
        loaded = _adapted(place, info, own, model or info.model)
    if not info.max_length:
        info = dataclasses.replace(info, max_length=longest_input(loaded, own, None, info.head))
    if info.head == "sequence" and info.labels:
        config: Any = loaded.config
        config.id2label = dict(enumerate(info.labels))
        config.label2id = {name: index for index, name in enumerate(info.labels)}
    return Run(place, ready(loaded, device), own, info)


def with_posterior(model: nn.Module, folder: Path) -> nn.Module | WeightPosterior:
    """Return what to predict with: the model, with its weights' posterior if `folder` has one."""
    return load_posterior(model, folder) if (folder / POSTERIOR_FILE).is_file() else model


def _place(name: str | os.PathLike[str]) -> Path:
    """Return the folder that is named, or the hub's files of that id in the cache."""
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        if (folder / "draw-0").is_dir():
            raise BayesLoraError(f"{folder} has several draws, but one model is loaded: give {folder / 'draw-0'}")
        return folder
    if folder.exists() or text.startswith((".", "~", "/")) or text.count("/") != 1 or os.sep != "/" and os.sep in text:
        raise BayesLoraError(f"{text} is not a folder, but must be one or a hub id such as owner/name: check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text))
    except Exception as error:  # the hub's clients raise a dozen unrelated types when there is no way to it
        raise BayesLoraError(
            f"{text} is not a folder, and the hub gave no such model ({type(error).__name__}): "
            "check the name, the network and your login, or give a folder"
        ) from error


def _tokenizer(
    folder: Path, info: RunInfo, model: str | None, given: PreTrainedTokenizerBase | str | os.PathLike[str] | None
) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer, or the one that is given, if its vocabulary is that of the training."""
    if isinstance(given, PreTrainedTokenizerBase):
        found, origin = given, "the tokenizer that was given"
    elif given is not None:
        found, origin = load_tokenizer(resolve_model(str(given), tokenizer_only=True), str(given)), str(given)
    elif has_tokenizer(folder):
        found, origin = load_tokenizer(str(folder), str(folder)), f"the tokenizer in {folder}"
    elif not (folder / RUN_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        # An adapter alone: PEFT leaves the tokenizer with the base model.
        name = model or info.model
        found, origin = load_tokenizer(resolve_model(name), name), f"the tokenizer of {name}"
    else:
        raise BayesLoraError(
            f"{folder} lacks the tokenizer that the run was trained with: restore it from a copy, or give load(…, "
            f"tokenizer={info.model!r}) if it is that of the base model"
        )
    digest = tokenizer_digest(found)
    if info.tokenizer_digest is not None and digest != info.tokenizer_digest:
        raise BayesLoraError(
            f"{origin} has the vocabulary {digest}, but the run was trained with {info.tokenizer_digest}: "
            "give the tokenizer of the training"
        )
    return found


def _adapted(folder: Path, info: RunInfo, tokenizer: PreTrainedTokenizerBase, name: str) -> PeftModel:
    """Return the base model with the adapter of the folder, every tensor of it in its place."""
    _check_adapter_files(folder, info)
    with torch.random.fork_rng(devices=[]):
        base = load_base(
            name,
            tokenizer,
            labels=info.labels,
            regression=info.kind == "regression",
            dtype=info.dtype,
            head=info.head,
        )
    if info.base_fingerprint and base.fingerprint != info.base_fingerprint:
        raise BayesLoraError(
            f"the adapter in {folder} was trained on {info.model}, but the weights of {name} are others: "
            "give the right one as model (--model)"
        )
    with load_errors(f"the adapter in {folder}"):
        adapted = PeftModel.from_pretrained(base.model, folder)
    _check_keys(adapted, folder)
    return adapted


def _check_adapter_files(folder: Path, info: RunInfo) -> None:
    base_name = adapter_config(folder).get("base_model_name_or_path")
    if info.base_name and base_name != info.base_name:
        raise BayesLoraError(
            f"the adapter in {folder} was made for {base_name}, but the run trained {info.base_name}: "
            "restore the run's own adapter files"
        )
    weights = folder / ADAPTER_FILE
    if not weights.is_file():
        raise BayesLoraError(f"{weights} is missing: train again or restore it from a copy")
    try:
        with safe_open(weights, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(weights)
        raise BayesLoraError(f"{weights} ({size} bytes) is damaged or cut short: restore or train it again") from error


def _check_keys(model: PeftModel, folder: Path) -> None:
    """Raise where the adapter's tensors did not all find their place: it would run untrained, silently."""
    if looks_packed(folder / ADAPTER_FILE):
        return  # compared with the model while it was loaded
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        # Embeddings are saved by PEFT's own choice, beside what an adapter trains.
        found = {key for key in file.keys() if key in wanted or "embed" not in key}
    for keys, verb in ((wanted - found, "lacks"), (found - wanted, "has no place for")):
        if keys:
            owner = ADAPTER_FILE if verb == "lacks" else "the model"
            raise BayesLoraError(
                f"the adapter in {folder} does not fit its config: {owner} {verb} {min(keys)}; restore its own files"
            )
