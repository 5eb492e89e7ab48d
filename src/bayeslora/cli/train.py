"""`bayeslora train`: one method, one model, one task, one new folder.

Everything is written to `OUT.partial` and renamed to `OUT` when it is complete. An interrupted run leaves its last
checkpoint there, and `--resume` continues it exactly.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bayeslora.cli.adapt import adapt, check_options, in_one_line
from bayeslora.cli.arguments import build_plan
from bayeslora.cli.choices import encoded
from bayeslora.cli.listing import list_options
from bayeslora.cli.models import (
    BaseModel,
    Head,
    RunInfo,
    head_for,
    hush,
    load_base,
    load_run,
    load_tokenizer,
    longest_input,
    resolve_model,
)
from bayeslora.cli.progress import Clock, Interruption, ProgressBar, announce_scoring
from bayeslora.cli.results import EVALUATION, measure, rows_to_score, save_json, verify_reload
from bayeslora.data import Task, load_files, load_task
from bayeslora.errors import BayesLoraError, option
from bayeslora.evaluation import compute_metrics_for
from bayeslora.evaluation.choice_trainer import ChoiceTrainer
from bayeslora.evaluation.multiple_choice import choice_scoring
from bayeslora.export.formats import shrink
from bayeslora.methods import tuner_of
from bayeslora.optim import IVON
from bayeslora.posterior import WeightPosterior, load_posterior
from bayeslora.prediction import check_samples
from bayeslora.runs.plan import TrainPlan, first_difference, read_config
from bayeslora.training import attach

CONFIG_FILE = "config.yaml"
TRAIN = "train"
_CHECKPOINTS = "checkpoints"


@dataclass
class Session:
    """One run as it is set up: what is trained, on what, and where it is written."""

    plan: TrainPlan
    arguments: TrainingArguments
    task: Task
    tokenizer: PreTrainedTokenizerBase
    base: BaseModel
    model: nn.Module
    data: dict[str, Any]
    length: int
    head: Head
    partial: Path


def run(given: dict[str, Any]) -> int:
    """The command; `given` are the options on the command line."""
    if given.pop("list_options", False):
        print(list_options(given.get("method", "blora")))
        return 0
    plan = build_plan(given)
    return train(plan)


def train(plan: TrainPlan) -> int:
    """Train as planned; returns 0, or 130 when interrupted with a checkpoint."""
    partial = _claim(plan)
    with Interruption() as interruption, _cleaned_up(plan, partial):
        session = _prepare(plan, partial)
        checkpoints = partial / _CHECKPOINTS
        clock = Clock(partial)
        trainer = _build_trainer(session, [interruption, clock, ProgressBar(plan.options.method)])
        checkpoint = _last_checkpoint(checkpoints) if plan.options.resume else None
        with _quick_attention(session.base.model, trainer.args):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = clock.seconds
        if interruption.requested and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        metrics = _finish(session, trainer, seconds)
        clock.discard()
        if not plan.options.keep_checkpoints:
            shutil.rmtree(checkpoints, ignore_errors=True)
        os.rename(partial, plan.output_dir)
    scores = "  ".join(f"{name} {value:.4f}" for name, value in metrics["scores"].items())
    print(f"{plan.output_dir}: {scores}")
    return 0


def _claim(plan: TrainPlan) -> Path:
    """The folder to write to, made and marked as this run's; refuses what would overwrite, mix or lose a run."""
    out = plan.output_dir
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise BayesLoraError(f"output folder {out} exists; name a new one or delete it.")
    if not plan.options.resume:
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
        except FileExistsError:
            raise BayesLoraError(
                f"{partial} holds an interrupted run; continue it with --resume or delete it."
            ) from None
        (partial / CONFIG_FILE).write_text(_to_yaml(plan.record()), encoding="utf-8")
        return partial
    if not (partial / CONFIG_FILE).is_file():
        raise BayesLoraError(f"there is no interrupted run in {partial}; leave --resume out to start one.")
    difference = first_difference(read_config(str(partial / CONFIG_FILE)), json.loads(json.dumps(plan.record())))
    if difference is not None:
        name, old, new = difference
        raise BayesLoraError(
            f"{option(name)} is {new!r}, but the interrupted run in {partial} has {old!r}; "
            "resume with the same options or start a new run elsewhere."
        )
    return partial


@contextmanager
def _cleaned_up(plan: TrainPlan, partial: Path) -> Iterator[None]:
    """After a failure or an interruption, keep `OUT.partial` only where it can be resumed, and say how.

    A run that is being resumed loses nothing, whatever goes wrong.
    """
    try:
        yield
    except BaseException as error:
        kept = _last_checkpoint(partial / _CHECKPOINTS) is not None
        if not kept and not plan.options.resume:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            options = ["--config", str(partial / CONFIG_FILE), "--output-dir", str(plan.output_dir), "--resume"]
            command = shlex.join(["bayeslora", "train", *options])
            hint = f"continue with `{command}`" if kept else "nothing was kept"
            raise KeyboardInterrupt(f"interrupted; {hint}.") from error
        raise


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the trainer writes `trainer_state.json` last."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete.append((state["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return max(complete)[1] if complete else None


def _prepare(plan: TrainPlan, partial: Path) -> Session:
    hush()
    options = plan.options
    # What is read quickly and may be wrong comes first, the model last.
    check_options(plan.config_class, plan.method_options)
    arguments = _training_arguments(plan, partial / _CHECKPOINTS)
    if options.task:
        task = load_task(options.task, options.data_dir, train_split=options.train_split)
        if TRAIN not in task.splits:
            raise BayesLoraError(f"{task.name} has no training data; train on another task and evaluate on this one.")
    else:
        assert options.train_file and options.eval_file and options.text_column and options.label_column
        task = load_files(
            options.train_file,
            options.eval_file,
            options.text_column,
            options.label_column,
            test_file=options.test_file,
            labels=options.labels,
        )
    assert options.model is not None
    resolved = resolve_model(options.model)
    tokenizer = load_tokenizer(resolved, options.model)
    head = head_for(task.kind, resolved, options.model)
    set_seed(plan.seed)
    base = load_base(
        options.model,
        tokenizer,
        labels=task.labels,
        regression=task.kind == "regression",
        dtype=options.dtype,
        head=head,
    )
    model = adapt(base, plan.config_class, plan.method_options)
    if plan.ivon is None:
        check_samples(model, options.samples)
    length = longest_input(base.model, tokenizer, options.max_length, head)
    data = {
        name: encoded(split, task, tokenizer, head, length, options.few_shot) for name, split in task.splits.items()
    }
    return Session(plan, arguments, task, tokenizer, base, model, data, length, head, partial)


def _training_arguments(plan: TrainPlan, checkpoints: Path) -> TrainingArguments:
    """The Trainer's settings; raises BayesLoraError for those it refuses."""
    settings = {"dataloader_pin_memory": torch.cuda.is_available(), **plan.training_options, "disable_tqdm": True}
    if settings.get("bf16") and not _has_accelerator():
        settings.setdefault("use_cpu", True)  # without which TrainingArguments looks for a GPU
    with in_one_line("training"):
        return TrainingArguments(output_dir=str(checkpoints), **settings)


def _build_trainer(session: Session, callbacks: list[TrainerCallback]) -> Trainer:
    quiet = bool(session.plan.training_options.get("disable_tqdm"))
    with in_one_line("training"):
        trainer = _trainer_class(session)(
            model=session.model,
            args=session.arguments,
            train_dataset=session.data[TRAIN],
            eval_dataset=session.data[EVALUATION],
            processing_class=session.tokenizer,
            compute_metrics=compute_metrics_for(session.task),
            callbacks=[c for c in callbacks if not (quiet and isinstance(c, ProgressBar))],
        )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    # One term of the loss an example, whatever the model: a language model's N is not its number of tokens here.
    stated = session.plan.method_options.get("num_examples")
    ivon = session.plan.ivon
    optimizer = None if ivon is None else functools.partial(IVON, **ivon.keywords())
    return attach(trainer, len(session.data[TRAIN]) if stated is None else stated, optimizer)


@contextmanager
def _quick_attention(model: PreTrainedModel, arguments: TrainingArguments) -> Iterator[None]:
    """Attention in single steps for training in bfloat16 on a CPU: torch's fused one takes four times as long there.

    Afterwards it is the model's own again, whose other roundings can move codes of activations.
    """
    if not arguments.bf16 or arguments.device.type != "cpu":
        yield
        return
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def _trainer_class(session: Session) -> Callable[..., Trainer]:
    """The Trainer of the task's kind, which knows how its rows are collated."""
    if session.task.kind == "multiple_choice":
        scoring = choice_scoring(session.data[TRAIN], session.tokenizer)
        return functools.partial(ChoiceTrainer, class_logits=scoring.logits, data_collator=scoring.collate)
    return functools.partial(Trainer, data_collator=DataCollatorWithPadding(session.tokenizer))


def _finish(session: Session, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """Score, save, check the saved run and describe it, all in `OUT.partial`."""
    from bayeslora.report import write_model_card, write_report

    plan, task = session.plan, session.task
    # Without the autocast that training in 16 bits leaves around the forward pass: who loads the run has none.
    model = trainer.accelerator.unwrap_model(session.model, keep_fp32_wrapper=False)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise BayesLoraError("training diverged: a trained weight is not finite; lower --learning-rate.")
    posterior = _posterior(trainer) if plan.ivon is not None else None
    posterior = _cut_ranks(model, posterior)
    if posterior is not None:
        posterior.save(session.partial)
    predictor = None if posterior is None else load_posterior(model, session.partial)
    if not plan.training_options.get("disable_tqdm"):
        announce_scoring(plan.options.method, rows_to_score(session.data), plan.options.samples)
    started = time.perf_counter()
    batch_size = trainer.args.per_device_eval_batch_size
    metrics = measure(model, session.data, task, session.tokenizer, batch_size, plan.options.samples, predictor)
    metrics = {
        "method": plan.options.method,
        "task": task.name,
        "model": plan.options.model,
        "seed": plan.seed,
        "steps": trainer.state.global_step,
        **metrics,
        "seconds": {"train": seconds, "evaluate": time.perf_counter() - started},
    }
    arguments: dict[str, Any] = {} if plan.config_class is None else {"save_embedding_layers": False}
    model.save_pretrained(session.partial, **arguments)  # type: ignore[operator]
    session.tokenizer.save_pretrained(session.partial)
    _run_info(session).save(session.partial)
    probe = session.data[EVALUATION]
    verify_reload(model, probe, session.tokenizer, lambda: load_run(session.partial)[0], plan.options.dtype)
    save_json(session.partial / "metrics.json", metrics)
    save_json(session.partial / "history.json", trainer.state.log_history)
    write_report(session.partial)
    write_model_card(session.partial)
    return metrics


def _posterior(trainer: Trainer) -> WeightPosterior:
    """Return what IVON has learned; that of the best checkpoint if its weights have been loaded back."""
    assert trainer.model is not None and trainer.optimizer is not None
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        return load_posterior(trainer.model, trainer.state.best_model_checkpoint)
    return WeightPosterior.of(trainer.model, trainer.optimizer)


def _cut_ranks(model: nn.Module, posterior: WeightPosterior | None) -> WeightPosterior | None:
    """Cut the ranks that contribute nothing out of the adapter, and return its posterior without them, if any."""
    tuner = tuner_of(model)
    if tuner is None:
        return posterior
    name = tuner.active_adapters[0]
    kept = {} if posterior is None else {path: layer.kept(name) for path, layer in tuner.named_layers(name).items()}
    shrink(model)
    return None if posterior is None else posterior.cut(model, kept)


def _run_info(session: Session) -> RunInfo:
    plan, task = session.plan, session.task
    record = plan.record()
    return RunInfo(
        method=plan.options.method,
        model=record["model"],
        task=task.name,
        kind=task.kind,
        metric=task.metric,
        text_columns=list(task.text_columns),
        label_column=plan.options.label_column or task.label_column,
        labels=list(task.labels),
        max_length=session.length,
        dtype=plan.options.dtype,
        base_fingerprint=session.base.fingerprint,
        base_name=str(getattr(session.base.model, "name_or_path", "")),
        task_name=plan.options.task,
        data_dir=record.get("data_dir"),
        head=session.head,
        train_split=plan.options.train_split,
        few_shot=plan.options.few_shot,
        files={name: record[name] for name in ("train_file", "eval_file", "test_file") if name in record},
    )


def _to_yaml(record: dict[str, Any]) -> str:
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
