"""What the benchmarks share: a fine-tuned model from a task and a configuration, and runs that can be resumed."""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from measuring import processor
from peft import PeftConfig, get_peft_model
from records import RESULTS, check_settings
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import bayeslora
from bayeslora.data import Task, encode, labelled_tokens, packaged_model, unpack_model
from bayeslora.data.chat import LABELS
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import ChoiceTrainer, choice_scoring, encode_choices
from bayeslora.methods.blora.length import phases
from bayeslora.optim import IVON
from bayeslora.posterior import unwrapped
from bayeslora.runs.eva import initialize_eva
from bayeslora.runs.train import precision_options
from bayeslora.training.hooks import posterior_statistics

LOGGING_STEPS = 20
# The base model's own dropout takes a quarter of a step on a CPU; no method has it in these benchmarks.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAINS_IN_BFLOAT16 = bool(precision_options())
"""As in the demo: a processor without instructions for bfloat16 takes two to three times as long with it."""
# torch's fused attention spends more than half of a bfloat16 training step on a CPU in its backward pass; in float32
# it is the faster one, and what Transformers takes where a model has it.
ATTENTION = {"attn_implementation": "eager"} if TRAINS_IN_BFLOAT16 else {}


@dataclass(frozen=True)
class Training:
    """How long and how fast, the same for every method that is compared."""

    steps: int
    learning_rate: float = 1e-3
    batch_size: int = 32
    max_length: int = 128


def model_folder(model: str) -> Path:
    """Where a named packaged encoder, or a folder, lies."""
    return packaged_model(model) if model == "minilm" else Path(model)


def classifier(
    task: Task, training: Training, model: str = "minilm", **loading: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """An encoder with a new head (of one output for a regression), its tokenizer, and the encoded splits.

    Args:
        task: decides the head.
        training: says how long texts may be.
        model: `"minilm"`, the packaged encoder, or a model folder.
        loading: for `from_pretrained`, such as a quantization.
    """
    folder = model_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=max(1, len(task.labels)))
    for name, value in NO_DROPOUT.items():
        if hasattr(config, name):
            setattr(config, name, value)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, config=config, **ATTENTION, **loading)
    return loaded, tokenizer, encode(task, tokenizer, training.max_length)


def language_model(
    task: Task, training: Training
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """The packaged language model, its tokenizer, and the splits encoded as the task is answered, such as by cloze."""
    model, tokenizer = packaged_language_model()
    encoded = {
        name: encode_choices(split, task, tokenizer, max_length=training.max_length)
        for name, split in task.splits.items()
    }
    return model, tokenizer, encoded


def packaged_language_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    folder = unpack_model("smollm2", Path(tempfile.gettempdir()) / "bayeslora-smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **ATTENTION)
    return model, AutoTokenizer.from_pretrained(folder)


def fine_tune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    config: PeftConfig | None,
    training: Training,
    seed: int,
    *,
    ivon: Mapping[str, Any] | None = None,
    callback: Callable[[nn.Module], TrainerCallback] | None = None,
    mixin: type | None = None,
    warm_up: Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The adapted and trained model, with what is known of the training.

    That is `seconds`, `processor_seconds`, `parameters`, `peak_memory_bytes`, `machine` and the trainer's `history`.

    `seconds` of the training are the clock's, `processor_seconds` what this process computed in them on all its
    threads: beside other work the second is the steadier measure.
    `peak_memory_bytes` is the largest resident size of this process until the end of training, libraries and data
    included: it is a run's own where each has a process of its own (`once`).

    Args:
        base: a model with its head.
        tokenizer: pads the batches.
        data: encoded rows.
        config: the adapter's; None trains the whole model.
        training: how long and how fast.
        seed: of the data's order; the head and the adapter start from torch's present state.
        ivon: options of IVON, which trains instead of AdamW, at `training.learning_rate`; adds `posterior`.
        callback: makes one for the adapted model, for methods that have to be called in each step.
        mixin: a class to put before the Trainer's.
        warm_up: a checkpoint of the end of B-LoRA's warm-up to resume from; written where there is none. The clocks
            then show the rest of the run, and `resumed_from` its first step.
    """
    model: nn.Module = base if config is None else get_peft_model(base, config)
    initialize_eva(model, data, tokenizer, training.batch_size, seed)
    parameters = bayeslora.cost.count_parameters(model)
    causal = "choice_mask" in data.column_names
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=training.steps,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            warmup_steps=round(0.06 * training.steps),
            # Clipping would scale what IVON estimates the Hessian from; it has a bound on the step instead.
            max_grad_norm=1.0 if ivon is None else 0.0,
            bf16=TRAINS_IN_BFLOAT16,
            train_sampling_strategy="group_by_length",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            logging_steps=LOGGING_STEPS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=not causal,
        )
        kind: type[Trainer] = ChoiceTrainer if causal else Trainer
        if mixin is not None:
            kind = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})
        if causal:
            scoring = choice_scoring(data, tokenizer)
            options: dict[str, Any] = {"data_collator": scoring.collate, "class_logits": scoring.logits}
        elif LABELS in data.column_names:
            options = {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
        else:
            options = {"data_collator": DataCollatorWithPadding(tokenizer)}
        callbacks = [] if callback is None else [callback(model)]
        begin = 0
        if warm_up is not None:
            begin, _ = phases(config, training.steps)
            callbacks.append(SharedWarmUp(begin, warm_up))
        resumed = warm_up is not None and warm_up.exists()
        trainer = kind(model=model, args=arguments, train_dataset=data, callbacks=callbacks, **options)
        terms = labelled_tokens(data) if LABELS in data.column_names else len(data)
        examples = terms if ivon is not None or bayeslora.methods.has_posterior(model) else None
        factory = None if ivon is None else functools.partial(IVON, **ivon)
        bayeslora.attach(trainer, num_examples=examples, optimizer=factory)
        start, computed = time.perf_counter(), time.process_time()
        trainer.train(str(warm_up) if resumed else None)
        seconds, computed = time.perf_counter() - start, time.process_time() - computed
    clocks = {"seconds": seconds, "processor_seconds": computed}
    found = {**clocks, "peak_memory_bytes": peak_memory(), "parameters": parameters, "machine": machine()}
    if resumed:
        found["resumed_from"] = begin
    if ivon is not None:
        found["posterior"] = posterior_statistics(unwrapped(trainer.optimizer))
    return model, {**found, "history": trainer.state.log_history}


class SharedWarmUp(TrainerCallback):
    """A checkpoint after one step, from which another run goes on with the rows in the order of a run of its own.

    When an epoch begins, the sampler that groups rows by length draws from torch's global generator. A checkpoint
    holds the generator's state at its step, but not at the beginning of its epoch, which is kept beside it.
    """

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder
        self.file = folder / "epoch_rng_state.pt"
        self.begun = torch.load(self.file, weights_only=True) if folder.exists() else None
        self.resumes = self.begun is not None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumes:
            torch.set_rng_state(self.begun)
            self.resumes = False
        elif state.global_step < self.step:
            self.begun = torch.get_rng_state()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_save or state.global_step == self.step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the checkpoint where the others look for it, at once: the run may be interrupted later."""
        if state.global_step == self.step and not self.folder.exists():
            partial = self.folder.with_name(f"{self.folder.name}.partial")
            shutil.copytree(Path(str(args.output_dir)) / f"checkpoint-{self.step}", partial, dirs_exist_ok=True)
            torch.save(self.begun, partial / self.file.name)
            partial.rename(self.folder)


def peak_memory() -> int:
    """Bytes: the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine() -> dict[str, Any]:
    """On what, and in which precision, a model was trained: seconds of two machines do not compare."""
    return {**processor(), "precision": "bfloat16" if TRAINS_IN_BFLOAT16 else "float32"}


def training_arithmetic(model: nn.Module) -> torch.autocast:
    """The arithmetic of training around predictions: a half to two thirds of the time, where there is one."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=TRAINS_IN_BFLOAT16)


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bayeslora": bayeslora.__version__,
        "python": platform.python_version(),
    }


def once(path: Path, run: Callable[[], dict[str, Any]]) -> None:
    """Do `run` and write its result to `path`, unless that has been done, or another process is at it.

    A claim is a lock that ends with its process, however that ends, so that the next one takes the run up.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    with open(lock, "w") as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            if path.exists():
                return
            found = {**run(), "versions": versions()}
            beside = path.with_name(path.name + ".partial")
            beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            beside.rename(path)
        finally:
            lock.unlink(missing_ok=True)


def encoder_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark that trains an encoder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="minilm", metavar="minilm|FOLDER", help="the packaged encoder or a folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all results")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command's options, with torch on as many threads as they say."""
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def run_missing(
    parser: argparse.ArgumentParser, jobs: Mapping[Path, Any], run: Callable[[Any], dict[str, Any]]
) -> None:
    """`once` for each job, in a process of its own; a file that records other settings stops before the first.

    What this library refuses, such as a folder without the data, ends the program with the one line that says it.
    """
    try:
        for path, job in jobs.items():
            check_settings(path, job.settings)
        for path, job in jobs.items():
            once(path, functools.partial(in_own_process, run, job))
    except BayesLoraError as error:
        parser.error(str(error))


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function(*arguments)` in a fresh process, whose peak of memory is then that of this one call.

    The process ends with this one. What the function raises is raised here.
    """
    spawned = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=_follow_parent, initargs=(threads,)) as pool:
        return pool.submit(function, *arguments).result()


def _follow_parent(threads: int) -> None:
    torch.set_num_threads(threads)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
