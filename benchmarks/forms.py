"""What the calibration benchmark scores: how each method is trained, and every form in which its model predicts."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from harness import Training, classifier, fine_tune, language_model
from peft import LoraConfig, PeftConfig
from records import IVON_SETTINGS
from results_calibration import LANGUAGE, SAMPLES
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainerCallback, set_seed

import bayeslora
from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import choice_scoring
from bayeslora.evaluation.multiple_choice import row_lengths
from bayeslora.posterior import WeightPosterior, unwrapped
from bayeslora.posthoc import (
    IsotonicCalibration,
    LaplacePredictor,
    MCDropout,
    TemperatureScaling,
    VectorScaling,
    bayesianize,
)
from bayeslora.posthoc.temperature import predictive_nll
from bayeslora.prediction import Logits, ModelPredictor, Predictable, Predictor, labels_of, sampled_logits
from bayeslora.prediction.predictor import Sampler
from bayeslora.training import SWAG

CLOZE_BATCH = 16
BATCH = 64
CLOZE_TFB_SAMPLES = 5
"""Draws by which training-free Bayesianization finds its scale for a language model, whose passes cost the most."""
NOT_BY_CLOZE = {
    "tuned-isotonic": "its maps are one for each class, but a choice's place in its row means nothing",
    "laplace": "there is no head: the classes are texts",
}
"""Rows that a model cannot fill whose classes are texts, and why."""
ATTENTION = ["query", "key", "value"]
DECODER = ["q_proj", "v_proj"]
ALL_LINEAR = ("cola",)
SWAG_RANK = 20
RATES = (0.5, 1.0, 2.0)
"""Learning rates that are tried for LoRA, times the task's."""
CHECKS = 8
"""Times that the search looks at the held-out rows in a whole run; after three without a gain it stops."""
PATIENCE = 3
TFB_STEPS = 4
"""Bisections by which training-free Bayesianization finds its scale: to 4%."""
TFB_BATCHES = 4
"""Batches of held-out rows by which it does for a classifier, 256 rows: its search takes a dozen passes of samples."""
CORES = 4
CLOSED: dict[str, Any] = {"variance": "closed_form", "noise_fade_in": [0.4, 0.66]}
OPTIONS: dict[str, dict[str, Any]] = {
    "search": {"rates": list(RATES)},
    "swag": {"rank": SWAG_RANK},
    "ivon": {"ivon": IVON_SETTINGS["paper"], "rate": 2e3},
    "melora-closed": CLOSED,
    "melora-cores": {**CLOSED, "cores": CORES},
}
"""By method, what is not a default."""
METHODS = ("search", "tuned", "swag", "ivon", "blob", "melora-closed", "melora-cores")


@dataclass(frozen=True)
class Form:
    """One way to predict with a trained model: a row of the table.

    Attributes:
        name: of the row.
        predictor, samples: as for `bayeslora.predict`.
        passes: forward passes to predict one batch.
        numbers: of the adapter, and what the form stores beside it.
        seconds: to make it from the trained model.
    """

    name: str
    predictor: Predictable
    samples: int
    passes: int
    numbers: int
    seconds: float = 0.0


@dataclass
class Data:
    """A task's encoded rows, and batches of the held-out and of the training rows, made when asked for."""

    task: Task
    tokenizer: Any
    encoded: Mapping[str, Dataset]

    @property
    def logits(self) -> Any:
        return self._scoring.logits if self._scoring else None

    def batches(self, split: str) -> list[Mapping[str, Any]]:
        rows: Any = self.encoded[split]
        if self._scoring is None:
            return list(DataLoader(rows, BATCH, collate_fn=DataCollatorWithPadding(self.tokenizer)))
        rows = rows.select(np.argsort(row_lengths(rows)))  # next to rows of their length they are padded little
        return list(DataLoader(rows, CLOZE_BATCH, collate_fn=self._scoring.collate))

    @property
    def _scoring(self) -> Any:
        rows = self.encoded["selection"]
        return choice_scoring(rows, self.tokenizer) if "choice_mask" in rows.column_names else None


def prepared(task: Task, training: Training) -> tuple[Any, Data]:
    """The base model of a task, with a new head, and its data."""
    load: Callable[..., Any] = language_model if task.name in LANGUAGE else classifier
    base, tokenizer, encoded = load(task, training)
    return base, Data(task, tokenizer, encoded)


def configuration(method: str, task: str, options: dict[str, Any], training: Training, rows: int) -> PeftConfig:
    """The adapter's; BLoB follows its published schedule, whose cycle depends on the number of training `rows`.

    It is at most half of the run: of a longer one BLoB would only see the beginning, where its divergence weighs
    nothing.
    """
    shared: dict[str, Any] = {"r": 8, "lora_alpha": 16}
    if task in LANGUAGE:
        shared |= {"target_modules": DECODER, "task_type": "CAUSAL_LM"}
    else:
        linear = [*ATTENTION, "dense"] if task in ALL_LINEAR else ATTENTION
        shared |= {"target_modules": linear, "task_type": "SEQ_CLS"}
    kind = method.partition("-")[0]
    if kind in ("lora", "tuned", "swag", "ivon"):
        return LoraConfig(lora_dropout=0.1, **shared)
    if method == "melora":  # an earlier row: the default of its time
        shared["variance"] = "learned"
    if kind == "blob":
        cycle = int(100 * rows ** (math.pi / 8) / training.batch_size)
        shared |= {"kl_schedule": "blob", "kl_cycle": max(1, min(cycle, training.steps // 2))}
    return bayeslora.METHODS[kind](**{**shared, **options})


class BestSoFar(TrainerCallback):
    """Early stopping on held-out rows: keeps the step at which their likelihood is best."""

    def __init__(self, model: nn.Module, data: Data, every: int) -> None:
        self.model, self.data, self.every = model, data, max(1, every)
        self.batches = data.batches("selection")
        self.best, self.step, self.stale = math.inf, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        outputs = sampled_logits(ModelPredictor(self.model), self.batches, 0, logits=self.data.logits)
        nll = predictive_nll(outputs, labels_of(self.batches))
        self.stale += 1
        if nll < self.best:
            self.best, self.step, self.stale = nll, state.global_step, 0
        control.should_training_stop = self.stale >= PATIENCE


@dataclass
class Trained:
    """A trained model, its data, what is known of the training, and a posterior that the model itself lacks.

    `left_out` are the rows that it cannot fill, and why, once its forms have been asked for.
    """

    model: Any
    data: Data
    facts: dict[str, Any]
    posterior: Any = None
    left_out: dict[str, str] = field(default_factory=dict)


def search(task: Task, training: Training, seed: int, rates: Sequence[float]) -> list[dict[str, Any]]:
    """For each rate, as a multiple of the task's, the step at which LoRA is best on the held-out rows, and its NLL."""
    found = []
    for factor in rates:
        set_seed(seed)
        base, data = prepared(task, training)
        own = dataclasses.replace(training, learning_rate=factor * training.learning_rate)
        config = configuration("tuned", task.name, {}, own, len(data.encoded["train"]))
        kept: list[BestSoFar] = []

        def watch(model: nn.Module, data: Data = data, kept: list[BestSoFar] = kept) -> BestSoFar:
            kept.append(BestSoFar(model, data, training.steps // CHECKS))
            return kept[0]

        _, facts = fine_tune(base, data.tokenizer, data.encoded["train"], config, own, seed, callback=watch)
        (best,) = kept
        one = {"learning_rate": own.learning_rate, "step": best.step, "nll": best.best, "seconds": facts["seconds"]}
        found.append(one)
    return found


def trained(method: str, task: Task, training: Training, seed: int, options: dict[str, Any]) -> Trained:
    """Train one method once."""
    set_seed(seed)
    base, data = prepared(task, training)
    kept: list[Any] = []
    if method == "swag":

        def collect(model: nn.Module) -> SWAG:
            kept.append(SWAG(model, **options))
            return kept[0]

        more: dict[str, Any] = {"callback": collect}
    elif method == "ivon":
        training = dataclasses.replace(training, learning_rate=options["rate"] * training.learning_rate)
        more = {"ivon": options["ivon"], "callback": lambda model: KeptPosterior(model, kept)}
    else:
        more = {}
    config = configuration(method, task.name, options, training, len(data.encoded["train"]))
    model, facts = fine_tune(base, data.tokenizer, data.encoded["train"], config, training, seed, **more)
    return Trained(model, data, facts, kept[-1] if kept else None)


class KeptPosterior(TrainerCallback):
    """Keeps the posterior that an IVON has learned."""

    def __init__(self, model: nn.Module, kept: list[Any]) -> None:
        self.model, self.kept = model, kept

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(WeightPosterior.of(self.model, unwrapped(kwargs["optimizer"])))


def forms(method: str, run: Trained, without_tfb: bool = False) -> Iterator[Form]:
    """Every row that one trained model fills; the last ones may use the model up.

    `without_tfb` leaves out training-free Bayesianization, whose search takes longer than training.
    """
    model, numbers = run.model, int(run.facts["parameters"]["adapter"])
    kind = method.partition("-")[0]
    if kind in ("swag", "ivon"):
        yield Form(f"{method}-mean", model, 0, 1, numbers)
        stored = numbers * (2 if kind == "ivon" else SWAG_RANK + 2)
        yield Form(method, ModelPredictor(model, run.posterior), SAMPLES, SAMPLES, stored)
    elif kind in ("lora", "tuned"):
        yield from _forms_of_lora(method, run, numbers, without_tfb)
    elif method == "melora-cores":
        # Every core is drawn once: as many passes as members.
        predictor = Remembering(model)
        yield Form(method, predictor, CORES, CORES, numbers)
        yield from _fitted(f"{method}-temperature", TemperatureScaling, run, numbers, CORES, predictor)
        yield Form(f"{method}-means", bayeslora.CoreEnsemble(model), 0, CORES, numbers)
    else:
        predictor = Remembering(model)
        yield Form(f"{method}-mean", model, 0, 1, numbers)
        yield Form(method, predictor, SAMPLES, SAMPLES, numbers)
        if method == "melora-closed":
            yield from _fitted(f"{method}-temperature", TemperatureScaling, run, numbers, SAMPLES, predictor)


def _forms_of_lora(method: str, run: Trained, numbers: int, without_tfb: bool) -> Iterator[Form]:
    """Rows of a LoRA; an older run (`lora`) has three of them, under names without its own."""
    model, data = run.model, run.data
    yield Form(method, model, 0, 1, numbers)
    prefix = "tuned-" if method == "tuned" else ""
    yield from _fitted(f"{prefix}temperature", TemperatureScaling, run, numbers, 0)
    yield Form(f"{prefix}dropout", MCDropout(model), SAMPLES, SAMPLES, numbers)
    if method == "lora":
        return
    is_language = data.task.name in LANGUAGE
    yield from _fitted(f"{prefix}vector", VectorScaling, run, numbers, 0)
    if is_language:
        run.left_out |= NOT_BY_CLOZE
    else:
        yield from _fitted(f"{prefix}isotonic", IsotonicCalibration, run, numbers, 0)
        start = time.perf_counter()
        laplace = LaplacePredictor(model, probit=True).fit(data.batches("train"))
        curvature: Any = laplace._curvature
        parts = (curvature.eigenvalues, curvature.left, curvature.right, curvature.whole)
        stored = numbers + sum(part.numel() for part in parts if part is not None)
        yield Form("laplace", laplace, 0, 1, stored, time.perf_counter() - start)
    if without_tfb:
        run.left_out["tfb"] = "not asked for (--without-tfb): other seeds have it"
        return
    start = time.perf_counter()
    try:
        samples = CLOZE_TFB_SAMPLES if is_language else SAMPLES
        batches = data.batches("selection") if is_language else data.batches("selection")[:TFB_BATCHES]
        noisy = bayesianize(copy.deepcopy(model), batches, samples=samples, steps=TFB_STEPS, logits=data.logits)
    except BayesLoraError as error:
        run.left_out["tfb"] = str(error)
        return
    stored = bayeslora.cost.count_parameters(noisy)["adapter"]
    yield Form("tfb", noisy, SAMPLES, SAMPLES, stored, time.perf_counter() - start)


class Remembering(ModelPredictor):
    """Keeps the logits of each batch, so that a row with a temperature does not compute again what that without has.

    The rows of a batch tell the batches of one benchmark apart, as far as they are shown.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.kept: dict[tuple[Any, ...], Tensor] = {}

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        draw = super().sampler(samples, seed, antithetic, read)

        def remembered(batch: Mapping[str, Tensor]) -> Tensor:
            shown = tuple(batch[name].cpu().numpy().tobytes() for name in ("input_ids", "attention_mask"))
            key = (samples, seed, antithetic, *shown)
            if key not in self.kept:
                self.kept[key] = draw(batch)
            return self.kept[key]

        return remembered


def _fitted(
    name: str, kind: Callable[[Any], Any], run: Trained, numbers: int, samples: int, predictor: Predictor | None = None
) -> Iterator[Form]:
    """The row of a calibrator, unless the held-out rows do not determine it: a model that knows nothing of them."""
    start = time.perf_counter()
    try:
        fitted = kind(predictor or run.model).fit(run.data.batches("selection"), samples, logits=run.data.logits)
    except BayesLoraError as error:
        run.left_out[name] = str(error)
        return
    yield Form(name, fitted, samples, max(1, samples), numbers, time.perf_counter() - start)
