"""Load a finished run or an export from a folder or the hub, and predict with it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from bayeslora.data.encode_words import word_labels
from bayeslora.data.tasks import LABEL, Task
from bayeslora.errors import BayesLoraError, counted
from bayeslora.evaluation import dataset_logits, predict_dataset
from bayeslora.export.container import looks_packed
from bayeslora.export.integer.reader import is_integer_model, load_integer
from bayeslora.files import check_readable, parse_yaml
from bayeslora.methods import tuner_of
from bayeslora.methods.registry import find_method
from bayeslora.posterior import POSTERIOR_FILE, WeightPosterior, load_posterior
from bayeslora.prediction import Predictable, Prediction, check_one_label, check_samples
from bayeslora.runs.answer_risk import AnswerCalibration, calibrated_answers
from bayeslora.runs.answers import Answer, Sampling, answer_rows, check_generates, read_prompts
from bayeslora.runs.base import (
    AUTO_CLASSES,
    CLASS_HEADS,
    DeviceMap,
    base_of,
    check_device_map,
    check_in_memory,
    has_tokenizer,
    load_errors,
    load_tokenizer,
    longest_input,
    quiet_loading,
    ready,
    resolve_model,
    tokenizer_digest,
)
from bayeslora.runs.decisions import Calibration, calibrated, calibration_for, model_digest
from bayeslora.runs.digests import ADAPTER_CONFIG, adapter_config, check_digests
from bayeslora.runs.exports import format_for_others, load_for_others
from bayeslora.runs.info import RUN_FILE, RunInfo, RunKind, check_one_label_a_row
from bayeslora.runs.plain import ADAPTER_FILE, plain_info, with_names
from bayeslora.runs.predictions import Predictions
from bayeslora.runs.record import METRICS_FILE, RunRecord, read_run
from bayeslora.runs.rows import EVALUATION, check_not_training, encode_for, labelled_rows, rows_to_predict
from bayeslora.runs.scaling import Scaling, ScalingName, halves
from bayeslora.runs.tagging import Taggings
from bayeslora.runs.untrusted_config import check_config
from bayeslora.vocabulary import AnswerLoss, Measure


@dataclass(frozen=True, repr=False)
class Run:
    """A trained model with its tokenizer, labels and records.

    ```python
    run = bayeslora.load("out")
    for row in run.predict(["A warm, clever film.", "Dull."], samples=10):
        print(row.label, row.mutual_information)
    pipeline("text-classification", model=run.model, tokenizer=run.tokenizer)
    ```

    Attributes:
        folder: folder that the run was loaded from.
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        info: the content of `run.json`; if that is missing, what the other files say.
    """

    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    info: RunInfo

    def __repr__(self) -> str:
        classes = f", {counted(len(self.labels), 'label')}" if self.labels else ""
        return f"Run({str(self.folder)!r}: {self.method} on {self.task}, {self.kind}{classes})"

    @property
    def labels(self) -> list[str]:
        """Class names by id, or names of tags; empty for regression and generation."""
        return self.info.labels

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.info.task

    @property
    def kind(self) -> RunKind:
        """`classification`, `multi_label` (several labels a row), `regression`, `token_classification` (a tag for each
        word), `multiple_choice` or `generation`."""
        return self.info.kind

    @property
    def base(self) -> str:
        """Folder or hub id of the base model."""
        return self.info.model

    @property
    def method(self) -> str:
        """A value of `bayeslora train --method`; `full` for any model without an adapter."""
        return self.info.method

    @property
    def config(self) -> dict[str, Any]:
        """The training options in `config.yaml`; empty without that file."""
        path = self.folder / "config.yaml"
        return dict(parse_yaml(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    @property
    def metrics(self) -> RunRecord | None:
        """The content of `metrics.json`; None without that file."""
        return read_run(self.folder) if (self.folder / METRICS_FILE).is_file() else None

    @functools.cached_property
    def predictor(self) -> nn.Module | WeightPosterior:
        """The model for `bayeslora.predict`, with the posterior from IVON or SWAG if the folder holds one."""
        return with_posterior(self.model, self.folder)

    @quiet_loading()
    def predict(
        self,
        inputs: Any,
        samples: int | None = None,
        seed: int | None = None,
        batch_size: int = 64,
        *,
        coverage: float | None = None,
        risk: float | None = None,
        delta: float | None = None,
        uncalibrated: bool = False,
    ) -> Predictions | Taggings:
        """Predict labels with their uncertainty and, if asked, label sets and rows that need a person.

        If `calibrate` has saved a map of the probabilities, such as a temperature, `predict` applies it. A run that
        tags words returns `Taggings` and accepts neither `coverage` nor `risk`.

        Args:
            inputs: a text, a pair (a tuple of two strings) or a row (a dict); an iterable of these, such as a list or
                a `datasets.Dataset`; or the `pathlib.Path` of a data file. Rows have the columns used in training
                (`question` and `choices` for multiple choice); other columns are ignored. A run that tags words
                splits a text at whitespace; an iterable may also hold lists of words.
            samples: number of Monte-Carlo samples of the weights; 0 uses the mean weights. The default is 0, or the
                number that `calibrate` used if a coverage, a risk or a saved map needs it.
            seed: seed of the samples, by default 0 or the seed that `calibrate` used.
            batch_size: rows per batch; the result does not depend on it.
            coverage: also return the label set (or interval) that contains the right one with this probability.
            risk: also return `ask_a_human`, so that at most this share of the other labels is wrong.
            delta: probability that the risk is exceeded, by default 0.05; see `RiskControl`.
            uncalibrated: do not apply a saved map of the probabilities.

        Raises:
            BayesLoraError: there are 0 rows, a row does not fit the run, `samples` > 0 for a deterministic model, or
                a coverage or risk is given but `calibrate` was not called with these samples.
        """
        decides = coverage is not None or risk is not None
        if decides:
            check_one_label_a_row(self.kind, "a coverage or a risk")
        calibration, samples, seed = calibration_for(
            self.folder, samples, seed, decides=decides, uncalibrated=uncalibrated
        )
        task = rows_to_predict(inputs, self.info)
        data = encode_for(task.splits[EVALUATION], task, self.tokenizer, self.info)
        return self.predict_encoded(
            data, samples, seed, batch_size, calibration, coverage=coverage, risk=risk, delta=delta
        )

    @quiet_loading()
    def generate(
        self,
        inputs: Any,
        samples: int | None = None,
        seed: int | None = None,
        batch_size: int = 8,
        *,
        risk: float | None = None,
        delta: float | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer prompts with the mean weights; draws of the weights score each answer and generate their own.

        Args:
            inputs: a text, a row (a dict with `messages` or `prompt`) or a conversation (a list of messages with
                `role` and `content`); an iterable of these; or the `pathlib.Path` of a data file. For a run trained
                on conversations a text becomes a user message, otherwise it is the prompt. An answer at the end of a
                row is kept as the reference and not shown to the model.
            samples: number of draws of the weights; 0, the default, gives only the answer of the mean weights.
            seed: seed of the draws, by default 0.
            batch_size: prompts per batch. With a temperature, the draws' answers depend on it.
            risk: also set `ask_a_human`, so that the mean loss of the other answers is at most this. Samples, seed
                and `sampling` then default to those that `calibrate_answers` used.
            delta: probability that the risk is exceeded, by default 0.05; see `LossControl`.
            sampling: `max_new_tokens` (default 128, or less if the model has no room); `temperature` of the draws'
                answers (default 0: the most probable tokens; above 0, a deterministic run samples tokens instead of
                weights); `cluster_with`, an encoder whose embeddings group the draws' answers by meaning; and
                `similarity`, the cosine from which two answers form one group (default 0.9).

        Returns:
            An `Answer` for each row, in order.

        Raises:
            BayesLoraError: the run predicts labels, an input does not fit, a prompt is too long for the model,
                `samples` > 0 for a deterministic model without a temperature, or a risk is given but
                `calibrate_answers` was not called with these settings.
        """
        check_generates(self.info)
        given = {"samples": samples, "seed": seed, **sampling}
        return self.generate_rows(read_prompts(inputs, self.info), batch_size, risk, delta, **given)

    @quiet_loading()
    def generate_rows(
        self, rows: list[dict[str, Any]], batch_size: int, risk: float | None, delta: float | None, **given: Any
    ) -> list[Answer]:
        """Do what `generate` does for rows from `read_prompts`; `given` holds samples, seed and `sampling`."""
        calibration = None if risk is None else AnswerCalibration.load(self.folder)
        if calibration is None:
            how = Sampling(**{name: value for name, value in given.items() if value is not None})
        else:
            how = calibration.settings(self.folder, given)
            calibration.check_model(self.folder, self.model)
        answers = answer_rows(self.predictor, self.tokenizer, rows, how, batch_size)
        return answers if calibration is None or risk is None else calibration.decide(answers, risk, delta)

    @quiet_loading()
    def calibrate_answers(
        self,
        rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        batch_size: int = 8,
        *,
        measure: Measure = "probability",
        loss: AnswerLoss | None = None,
        save: bool = True,
        **sampling: Any,
    ) -> AnswerCalibration:
        """Calibrate the risk on rows with known answers, so that `generate` accepts `risk`.

        Args:
            rows: a data file, or rows (dicts), with conversations or completions that the run was not trained on.
            batch_size: prompts per batch.
            measure: uncertainty of an answer: `probability` (minus `Answer.mixture_log_probability`),
                `mutual_information` (mean over the answer's tokens) or `semantic_entropy` (of the draws' answers).
            loss: score whose difference from 1 is an answer's loss: `f1`, `exact_match` or `rouge_l`; by default the
                task's, or `f1`. The risk is the mean loss.
            save: write `risk.json` into the run's folder, replacing an earlier one.
            sampling: samples, seed and other settings, as for `generate`.

        Raises:
            BayesLoraError: the run predicts labels, the rows were used in training or do not fit the run, or the
                measure needs draws but none were asked for.
        """
        check_generates(self.info)
        given, source = _given(rows)
        options: dict[str, Any] = {"measure": measure, "loss": loss, "source": source}
        task = labelled_rows(self.info, given)
        return self.calibrate_answers_split(task, EVALUATION, batch_size, Sampling(**sampling), save=save, **options)

    def calibrate_answers_split(
        self, task: Task, split: str, batch_size: int, sampling: Sampling, *, save: bool = True, **options: Any
    ) -> AnswerCalibration:
        """Do what `calibrate_answers` does, on a split of a task."""
        check_not_training(self.info, options["source"], task, split)
        options["fingerprint"] = model_digest(self.model, self.folder)
        calibration = calibrated_answers(
            self.predictor, self.tokenizer, task, task.splits[split], batch_size, sampling, **options
        )
        if save:
            calibration.save(self.folder)
        return calibration

    def predict_encoded(
        self,
        data: Any,
        samples: int = 0,
        seed: int = 0,
        batch_size: int = 64,
        calibration: Calibration | None = None,
        **asked: float | None,
    ) -> Predictions | Taggings:
        """Do what `predict` does, on rows that `runs.rows.encode_for` has tokenized.

        Args:
            data: encoded rows.
            samples, seed, batch_size: as for `predict`; samples and seed must be those of `calibration`.
            calibration: the run's calibration, whose map of the probabilities and decisions are applied.
            asked: coverage, risk and delta, as for `predict`.
        """
        if calibration is not None:
            calibration.check_model(self.folder, self.model)
        predictor = self.predictor if calibration is None else calibration.around(self.predictor)
        check_samples(predictor, samples)
        if self.kind not in ("multi_label", "multiple_choice"):
            check_one_label(self.model)
        prediction: Prediction = predict_dataset(predictor, data, self.tokenizer, batch_size, samples, seed)
        if self.kind == "token_classification":
            return Taggings(prediction, self.labels, data)
        decided = None if calibration is None else calibration.decide(prediction, **asked)
        return Predictions(prediction, self.labels, decided)

    @quiet_loading()
    def calibrate(
        self,
        rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        samples: int = 0,
        seed: int = 0,
        batch_size: int = 64,
        *,
        score: str | None = None,
        by_class: bool = False,
        scaling: ScalingName | None = None,
        save: bool = True,
    ) -> Calibration:
        """Calibrate conformal sets and the risk on labelled rows, so that `predict` accepts `coverage` and `risk`.

        With `scaling`, a map of the probabilities is fitted on a random half of the rows (drawn with `seed`), and
        `predict` applies it from then on. The sets and the risk are calibrated on the mapped probabilities of the
        other half. Their guarantees hold, because the map does not depend on that half.

        A run that tags words gets only the map, fitted on all words.

        Args:
            rows: a data file, or rows (dicts), with the columns used in training. The run must not be trained on them.
            samples, seed: Monte-Carlo samples and seed of the predictions; `predict` then uses the same.
            batch_size: rows per batch.
            score: `lac` (the default) or `aps`, see `ConformalSets`; for regression `residual` (the default) or
                `scaled`, see `ConformalIntervals`.
            by_class: make the coverage hold for each class separately.
            scaling: `temperature` (`TemperatureScaling`), `vector` (`VectorScaling`) or `isotonic`
                (`IsotonicCalibration`), for classes; by default none, or `temperature` for a run that tags words.
            save: write `conformal.json` into the run's folder, replacing an earlier one.

        Raises:
            BayesLoraError: the rows were used in training or do not fit, or `samples` > 0 for a deterministic model.
        """
        given, source = _given(rows)
        task = labelled_rows(self.info, given)
        options = {"score": score, "by_class": by_class, "source": source}
        return self.calibrate_split(task, EVALUATION, samples, seed, batch_size, scaling=scaling, save=save, **options)

    def calibrate_split(
        self,
        task: Task,
        split: str,
        samples: int,
        seed: int,
        batch_size: int,
        *,
        scaling: ScalingName | None = None,
        save: bool = True,
        **options: Any,
    ) -> Calibration:
        """Do what `calibrate` does, on a split of a task; `options` are those of `decisions.calibrated`."""
        check_not_training(self.info, options["source"], task, split)
        words = self.kind == "token_classification"
        if words:
            scaling = scaling or "temperature"
            if given := [name for name in ("score", "by_class") if options[name]]:
                raise BayesLoraError(f"{given[0]} is given, but the run tags words: leave it out")
        else:
            check_one_label_a_row(self.kind, "calibrate")
        if scaling is not None and self.kind == "regression":
            raise BayesLoraError(f"scaling is {scaling}, but the run predicts numbers: leave it out")
        check_samples(self.predictor, samples)
        data = encode_for(task.splits[split], task, self.tokenizer, self.info)
        predictor: Predictable = self.predictor
        fitted = None
        if scaling is not None:
            first, second = (data, data) if words else (data.select(half) for half in halves(len(data), seed))
            logits = dataset_logits(predictor, first, self.tokenizer, batch_size, samples, seed)
            labels = torch.as_tensor(word_labels(first) if words else first[LABEL][:])
            fitted = Scaling.fitted(scaling, predictor, logits, labels)
            data, predictor = second, fitted.around(predictor)
        fingerprint = model_digest(self.model, self.folder)
        settings: dict[str, Any] = {"samples": samples, "seed": seed, "fingerprint": fingerprint, "scaling": fitted}
        if words:
            calibration = Calibration(None, None, [], source=options["source"], **settings)
        else:
            found = predict_dataset(predictor, data, self.tokenizer, batch_size, samples, seed)
            calibration = calibrated(found, list(data[LABEL]), self.info, **settings, **options)
        if save:
            calibration.save(self.folder)
        return calibration


def _given(rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> tuple[Path | list[dict[str, Any]], str]:
    """Return labelled rows for `labelled_rows`, and what a calibration calls them."""
    if isinstance(rows, (str, os.PathLike)):
        return Path(rows), str(rows)
    found = [dict(row) for row in rows]
    return found, counted(len(found), "row")


@quiet_loading()
def load(
    folder: str | os.PathLike[str],
    model: str | None = None,
    device: str | torch.device | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    device_map: DeviceMap | None = None,
    labels: Sequence[str] | Mapping[int, str] | None = None,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
) -> Run:
    """Load a finished run, an export of one, or an adapter that `save_pretrained` wrote.

    Args:
        folder: folder of the run, export or adapter, or a hub id (`owner/name`) of its files.
        model: folder or hub id of the base model; by default the one named by the run or the adapter.
        device: device to compute on, by default the GPU if one is available.
        tokenizer: the tokenizer that the run was trained with, or its folder or hub id, if `folder` lacks it.
        device_map: places the model on several devices, instead of `device`, as in Transformers: `"auto"`,
            `"balanced"`, `"balanced_low_0"`, `"sequential"`, a device, or a dictionary of the base model's modules.
        labels: class names in the order of their ids, or by id, if `folder` lacks `run.json`; by default those in the
            configuration of the base model or export if it has as many classes, otherwise `LABEL_0`, `LABEL_1`, ….
        text_columns: name of the text column in your files, or two for pairs, if `folder` lacks `run.json`; by
            default `text`, or `text_a` and `text_b`, and `tokens` for a model that tags words.
        label_column: name of the label column in your files if `folder` lacks `run.json`, by default `label`.

    Raises:
        BayesLoraError: `folder` holds nothing that can be loaded, a file is missing or damaged, the hub cannot be
            reached, the base model or tokenizer is not the one used in training, the tokenizer has no vocabulary or
            less than half of the model's, names do not fit the model or `run.json`, or the device map leaves weights
            outside all devices.
    """
    if device is not None and device_map is not None:
        raise BayesLoraError(f"device is {device} and device_map {device_map}, but one of them places the model")
    check_device_map(device_map)
    place = _place(folder)
    info = RunInfo.load(place) if (place / RUN_FILE).is_file() else plain_info(place, model)
    info = with_names(info, place, {"labels": labels, "text_columns": text_columns, "label_column": label_column})
    own = _tokenizer(place, info, model, tokenizer)
    loaded = _model(place, info, own, model, device_map)
    config: Any = loaded.config
    if info.tokenizer_digest is None and 2 * len(own) < (getattr(config, "vocab_size", None) or 0):
        raise BayesLoraError(
            f"the tokenizer has {counted(len(own), 'token')}, but the model knows {config.vocab_size:,}: give "
            "load(…, tokenizer=…) the folder or hub id of the model that was fine-tuned"
        )
    if not info.max_length:
        length = longest_input(loaded, own, None, info.head)
        info = dataclasses.replace(info, max_length=length, tokenizer_digest=tokenizer_digest(own))
    if info.head in CLASS_HEADS and info.labels:
        config.id2label = dict(enumerate(info.labels))
        config.label2id = {name: index for index, name in enumerate(info.labels)}
    return Run(place, ready(loaded, device), own, info)


def _model(
    place: Path, info: RunInfo, tokenizer: PreTrainedTokenizerBase, name: str | None, device_map: DeviceMap | None
) -> nn.Module:
    """Return the model of a run, an export or an adapter; `name` is its base model where that was given."""
    form = "integer" if is_integer_model(place) else format_for_others(place)
    if form is None and info.method != "full":
        return _adapted(place, info, tokenizer, name or info.model, device_map)
    if form is not None and device_map is not None:
        raise BayesLoraError(
            f"device_map is {device_map}, but {place} has the format {form}, which is on one device: leave it out"
        )
    if form is not None:
        check_digests(place)
        return load_integer(place) if form == "integer" else load_for_others(form, place, info, tokenizer, name)
    with load_errors(f"the model in {place}"):
        loaded: nn.Module = AUTO_CLASSES[info.head].from_pretrained(
            place, dtype=getattr(torch, info.dtype), device_map=device_map
        )
        check_in_memory(loaded, place)
    check_digests(place)
    return loaded


def with_posterior(model: nn.Module, folder: Path) -> nn.Module | WeightPosterior:
    """Return the model, with the posterior of its weights if `folder` has one."""
    return load_posterior(model, folder) if (folder / POSTERIOR_FILE).is_file() else model


def _place(name: str | os.PathLike[str]) -> Path:
    """Return the folder `name`, or the cached files of that hub id."""
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        for several in ("draw", "member"):
            if (first := folder / f"{several}-0").is_dir():
                raise BayesLoraError(f"{folder} has several {several}s, but load takes one model: give {first}")
        return folder
    if folder.exists() or text.startswith((".", "~", "/")) or text.count("/") != 1 or os.sep != "/" and os.sep in text:
        raise BayesLoraError(f"{text} is not a folder, but must be one or a hub id such as owner/name: check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text))
    except Exception as error:  # the hub's client raises many unrelated types when it fails
        raise BayesLoraError(
            f"{text} is not a folder, and cannot be downloaded from the hub ({type(error).__name__}): "
            "check the name, the network and your login, or give a folder"
        ) from error


def _tokenizer(
    folder: Path, info: RunInfo, model: str | None, given: PreTrainedTokenizerBase | str | os.PathLike[str] | None
) -> PreTrainedTokenizerBase:
    """Return the given tokenizer or that of the run, after checking that its vocabulary is that of the training."""
    read = functools.partial(load_tokenizer, of_words=info.head == "words")
    if isinstance(given, PreTrainedTokenizerBase):
        found, origin = given, "the tokenizer that was given"
    elif given is not None:
        found, origin = read(resolve_model(str(given), tokenizer_only=True), str(given)), str(given)
    elif has_tokenizer(folder):
        found, origin = read(str(folder), str(folder)), f"the tokenizer in {folder}"
    elif not (folder / RUN_FILE).is_file() and (folder / ADAPTER_CONFIG).is_file():
        # An adapter alone: PEFT leaves the tokenizer with the base model.
        name = model or info.model
        found, origin = read(resolve_model(name), name), f"the tokenizer of {name}"
    else:
        base = "" if info.model == str(folder) else f", {info.model}"
        raise BayesLoraError(
            f"{folder} lacks the tokenizer that the model was trained with: save it there, or give load(…, "
            f"tokenizer=…) the folder or hub id of the model that was fine-tuned{base}"
        )
    if info.tokenizer_digest is not None and (digest := tokenizer_digest(found)) != info.tokenizer_digest:
        raise BayesLoraError(
            f"{origin} has the vocabulary {digest}, but the run was trained with {info.tokenizer_digest}: "
            "give the tokenizer of the training"
        )
    return found


def _adapted(
    folder: Path, info: RunInfo, tokenizer: PreTrainedTokenizerBase, name: str, device_map: DeviceMap | None
) -> PeftModel:
    """Return the base model with the adapter of the folder; raise unless all its tensors fit."""
    _check_adapter_files(folder, info)
    check_digests(folder, only_config=True)
    with torch.random.fork_rng(devices=[]):
        base = base_of(info, name, tokenizer, device_map)
    if info.base_fingerprint and base.fingerprint != info.base_fingerprint:
        raise BayesLoraError(
            f"the adapter in {folder} was trained on {info.model}, but the weights of {name} differ: "
            "give the one of the training as model=…"
        )
    find_method(info.method)
    with load_errors(f"the adapter in {folder}"):
        adapted = PeftModel.from_pretrained(base.model, folder)
    _check_keys(adapted, folder)
    check_digests(folder)
    return adapted


def _check_adapter_files(folder: Path, info: RunInfo) -> None:
    base_name = adapter_config(folder).get("base_model_name_or_path")
    if info.base_name and base_name != info.base_name:
        raise BayesLoraError(
            f"the adapter in {folder} was made for {base_name}, but the run trained {info.base_name}: "
            "restore the adapter files of the run"
        )
    weights = folder / ADAPTER_FILE
    if not weights.is_file():
        raise BayesLoraError(f"{weights} is missing: train again or restore it from a copy")
    check_readable(weights)  # safetensors calls it damaged
    try:
        with safe_open(weights, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(weights)
        raise BayesLoraError(f"{weights} ({size} bytes) is damaged or cut short: restore or train it again") from error
    check_config(folder, adapter_config(folder), weights)


def _check_keys(model: PeftModel, folder: Path) -> None:
    """Raise BayesLoraError if tensors of the adapter are missing or unused; PEFT would run it untrained."""
    if looks_packed(folder / ADAPTER_FILE):
        return  # already compared with the model while loading
    tuner = tuner_of(model)
    optional = () if tuner is None else tuner.linear_class.optional_state
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        # PEFT may save embeddings in addition to what an adapter trains.
        found = {key for key in file.keys() if key in wanted or "embed" not in key}
    for keys, has in ((wanted - found, "lacks"), (found - wanted, "has")):
        if keys := {key for key in keys if not any(part in key for part in optional)}:
            raise BayesLoraError(
                f"{folder / ADAPTER_FILE} {has} {min(keys)}, but must hold the tensors that its config names: "
                "restore the adapter files of the run"
            )
