"""Train as planned into a new folder, in three phases: prepare, fit, finish.

Everything is written to `OUT.partial`, which is renamed to `OUT` when it is complete. An interrupted run leaves its
last checkpoint there, and a plan with `resume` continues it exactly.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from bayeslora.data import HoldOut, Task, labelled_tokens, load_files, load_generation, load_task
from bayeslora.data.encode import right_padded
from bayeslora.data.tasks import LABEL, TASKS, hub_dataset
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import compute_metrics_for
from bayeslora.evaluation.choice_trainer import ChoiceTrainer
from bayeslora.evaluation.multiple_choice import choice_scoring
from bayeslora.evaluation.scoring import metric_names
from bayeslora.evaluation.tagging import check_span_metrics
from bayeslora.export.formats import shrink
from bayeslora.files import check_new, file_digest, save_json
from bayeslora.methods import tuner_of
from bayeslora.methods.registry import title_of
from bayeslora.optim import IVON
from bayeslora.posterior import WeightPosterior, load_posterior
from bayeslora.prediction import check_samples
from bayeslora.runs import ranks
from bayeslora.runs.adapt import adapt, check_options, option_errors
from bayeslora.runs.base import (
    BaseModel,
    head_for,
    load_base,
    load_tokenizer,
    longest_input,
    resolve_model,
    tell_other_order,
    tokenizer_digest,
)
from bayeslora.runs.callbacks import Clock, Interruption
from bayeslora.runs.eva import initialize_eva
from bayeslora.runs.examples import Examples
from bayeslora.runs.info import Head, RunInfo
from bayeslora.runs.partial import CHECKPOINTS, can_be_resumed, claimed, complete, last_checkpoint
from bayeslora.runs.plan import TrainPlan
from bayeslora.runs.record import HISTORY_FILE, RunRecord
from bayeslora.runs.rows import EVALUATION, asked, check_asked, check_task_asked, encode_split, scored_part
from bayeslora.runs.run import load
from bayeslora.runs.score import answered, measure, measure_text, rows_to_score, verify_reload
from bayeslora.runs.text_scores import check_text_metrics
from bayeslora.training import SWAG, attach
from bayeslora.training.class_weights import class_weights, weighed_classes
from bayeslora.vocabulary import STARTS

TRAIN = "train"
_YES = ("1", "true", "yes")
_UNWRITTEN = "PytorchStreamWriter|inline_container|unexpected pos|os error 28"
"""Words in the errors of torch and safetensors where a file cannot be written."""


@dataclass
class Session:
    """A run that is ready to train: plan, model, data and output folder."""

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
    weights: list[float]  # of the classes; empty where all rows count alike


class Reporter(TrainerCallback):
    """Base class for callbacks on the Trainer's events and two more; does nothing."""

    def on_scoring(self, rows: int, samples: int) -> None:
        """Called before scoring the trained model on `rows` rows with `samples` samples of the weights."""

    def on_finished(self, folder: Path) -> None:
        """Called with the complete folder before it is renamed; write reports here."""


class TrainingInterrupted(KeyboardInterrupt):
    """Raised when a signal stopped the run; if `resumable`, `partial` holds a checkpoint to continue from."""

    def __init__(self, partial: Path, output_dir: Path, resumable: bool) -> None:
        super().__init__(f"interrupted, {'a checkpoint' if resumable else 'nothing'} was kept in {partial}")
        self.partial, self.output_dir, self.resumable = partial, output_dir, resumable


def train(plan: TrainPlan, reporter: Reporter | None = None) -> RunRecord | None:
    """Train as planned into the new folder `plan.output_dir`; return the content of its `metrics.json`.

    SIGINT and SIGTERM stop the training after the current step. Of several processes, which torchrun or
    `accelerate launch` have started, the first one writes, scores and reports; the others return None when the
    training has ended.

    Raises:
        BayesLoraError: invalid options, data or model, or the folder exists.
        TrainingInterrupted: a signal stopped the run.
    """
    out = plan.output_dir
    if not out.name:  # such as /
        check_new(out)
    partial = out.with_name(out.name + ".partial")
    training_arguments(plan, partial / CHECKPOINTS)  # joins the processes of the run, where there are several
    with Interruption() as interruption, ExitStack() as owned:
        ranks.by_first(lambda: owned.enter_context(claimed(plan)))
        try:
            return _train(plan, partial, interruption, (reporter if ranks.is_first() else None) or Reporter())
        except KeyboardInterrupt as error:
            raise TrainingInterrupted(partial, out, can_be_resumed(partial)) from error


def _train(plan: TrainPlan, partial: Path, interruption: Interruption, reporter: Reporter) -> RunRecord | None:
    session = ranks.together(lambda: prepare(plan, partial))
    clock = Clock(partial)
    with _full_disk(partial):
        trainer = fit(session, [interruption, clock, reporter])
        seconds = clock.seconds
        if interruption.requested and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        is_first = ranks.is_first()
        ranks.leave()
        if not is_first:
            return None
        record = finish(session, trainer, seconds, reporter)
    clock.discard()
    complete(partial, plan.output_dir, plan.options.keep_checkpoints)
    return record


@contextmanager
def _full_disk(partial: Path) -> Iterator[None]:
    """Turn the errors that torch and safetensors raise where they cannot write into a BayesLoraError."""
    try:
        yield
    except BayesLoraError:
        raise
    except (RuntimeError, SafetensorError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and not re.search(_UNWRITTEN, str(error)):
            raise
        raise BayesLoraError(
            f"the disk is full, but {partial} needs more space: free some and continue with --resume"
        ) from error


def precision_options() -> dict[str, Any]:
    """Return the training options for bfloat16 if the hardware computes in it, which takes two thirds of the time."""
    if torch.cuda.is_available():
        return {"bf16": True} if torch.cuda.is_bf16_supported(including_emulation=False) else {}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return {"bf16": True} if capabilities.get("amx_bf16") else {}


def prepare(plan: TrainPlan, partial: Path) -> Session:
    """Load data, tokenizer and model, and add the adapter; all errors of the input are raised here."""
    options = plan.options
    # Check what is quick to read first, and load the model last.
    check_options(plan.config_class, plan.method_options)
    arguments = training_arguments(plan, partial / CHECKPOINTS)
    if options.swag is not None and plan.ivon is not None:
        raise BayesLoraError("--swag and --optim ivon are given, but a run has one posterior: leave one of them out")
    task = _load_data(plan)
    check_text_metrics(task)
    check_span_metrics(task.labels if task.kind == "token_classification" else ())
    assert options.model is not None
    resolved = resolve_model(options.model)
    tokenizer = load_tokenizer(resolved, options.model, of_words=task.kind == "token_classification")
    head = head_for(task.kind, resolved, options.model, task.scoring)
    check_asked(head, options.scoring, options.normalization)
    set_seed(plan.seed)
    base = load_base(options.model, tokenizer, labels=task.labels, kind=task.kind, dtype=options.dtype, head=head)
    tell_other_order(options.model, task.labels, head, base.fresh)
    model = adapt(base, plan.config_class, plan.method_options)
    if not plan.has_weight_posterior:
        check_samples(model, options.samples)
    length = longest_input(base.model, tokenizer, options.max_length, head)
    data = {
        name: encode_split(split, task, tokenizer, head, length, options.few_shot)
        for name, split in task.splits.items()
    }
    initialize_eva(model, data[TRAIN], tokenizer, arguments.per_device_train_batch_size, plan.seed)
    weights = _class_weights(plan, task)
    return Session(plan, arguments, task, tokenizer, base, model, data, length, head, partial, weights)


def _class_weights(plan: TrainPlan, task: Task) -> list[float]:
    """Return the weights that `--class-weights` asks for; [] without it."""
    asked_for = plan.options.class_weights
    if not asked_for:
        return []
    if task.kind != "classification":
        raise BayesLoraError(f"--class-weights is given, but the task is {task.kind}, without classes: leave it out")
    counts = Counter(task.train_split[LABEL])
    return class_weights(asked_for, task.labels, [counts[number] for number in range(len(task.labels))])


def _load_data(plan: TrainPlan) -> Task:
    options = plan.options
    if options.task is None or options.task in TASKS:  # otherwise load_task tells
        names = ("scoring", "normalization", "few_shot")
        check_task_asked(options.task, {name: getattr(options, name) for name in names})
    if options.task:
        task = load_task(options.task, options.data_dir, train_split=options.train_split)
        if TRAIN not in task.splits:
            raise BayesLoraError(f"--task is {task.name}, but it lacks training data: train on another task")
        return asked(task, options.scoring, options.normalization)
    assert options.train_file
    if options.text_column is None:
        return load_generation(options.train_file, options.eval_file, test_file=options.test_file)
    if not options.label_column:
        raise BayesLoraError("--label-column is empty, but must be a column's name: leave it out for the column label")
    share = options.eval_fraction
    return load_files(
        options.train_file,
        options.eval_file,
        options.text_column,
        options.label_column,
        test_file=options.test_file,
        labels=options.labels,
        kind=options.kind,
        held_out=None if share is None else HoldOut(share, options.group_column, options.split_seed or 0),
    )


def fit(session: Session, callbacks: list[TrainerCallback]) -> Trainer:
    """Train, from the last checkpoint if the plan resumes; return the Trainer after its last step."""
    _check_against_rows(session.arguments, session.task, len(session.data[TRAIN]))
    columns = session.plan.options.swag
    swag = [] if columns is None else [SWAG(session.model, rank=columns)]
    trainer = _build_trainer(session, [*callbacks, *swag])
    build = trainer.create_optimizer

    def checked(*args: Any, **kwargs: Any) -> Any:
        with option_errors("training"):
            return build(*args, **kwargs)

    trainer.create_optimizer = checked  # type: ignore[method-assign]
    resume = session.plan.options.resume
    checkpoint = ranks.by_first(lambda: last_checkpoint(session.partial)) if resume else None
    with _quick_attention(session.base.model, trainer.args), weighed_classes(session.model, session.weights):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def _check_against_rows(arguments: TrainingArguments, task: Task, rows: int) -> None:
    """Raise `BayesLoraError` for a score that no evaluation gives, or if no batch can be filled."""
    if arguments.metric_for_best_model is not None:
        name = arguments.metric_for_best_model.removeprefix("eval_")
        known = ["loss", *([] if task.kind == "generation" else metric_names(task))]
        if name not in known:
            raise BayesLoraError(
                f"--metric-for-best-model is {name}, but an evaluation gives {', '.join(known)}: name one of them"
            )
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        raise BayesLoraError(
            f"--dataloader-drop-last leaves all {rows} training rows out, because a batch has {batch}: "
            "leave it out, or make --per-device-train-batch-size smaller"
        )


def training_arguments(plan: TrainPlan, checkpoints: Path) -> TrainingArguments:
    """Return the `TrainingArguments`; raise BayesLoraError for those it refuses."""
    settings = {"dataloader_pin_memory": torch.cuda.is_available(), **plan.training_options, "disable_tqdm": True}
    if settings.get("deepspeed") is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _YES:
        raise BayesLoraError(
            "DeepSpeed is asked for, but hides the gradients that methods need: leave it out, and start the "
            "command with torchrun for several processes"
        )
    if settings.get("fsdp") or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _YES:
        raise BayesLoraError(
            "FSDP is asked for, but the command trains whole copies of the model: leave it out, or use "
            "bayeslora.attach in a script of your own"
        )
    if settings.get("bf16") and not getattr(torch, "accelerator", torch.cuda).is_available():
        settings.setdefault("use_cpu", True)  # otherwise TrainingArguments looks for a GPU
    with option_errors("training"):
        arguments = TrainingArguments(output_dir=str(checkpoints), **settings)
        _try_out(arguments)
    return arguments


def _try_out(arguments: TrainingArguments) -> None:
    """Make the reporters, loader, optimizer and schedule once, so that what they refuse is told before any work."""
    for reporter in get_reporting_integration_callbacks(arguments.report_to):
        reporter()
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs the package liger-kernel")
    DataLoader(
        cast("Dataset[int]", [0]),
        num_workers=arguments.dataloader_num_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent_workers=arguments.dataloader_persistent_workers,
        multiprocessing_context=getattr(arguments, "dataloader_multiprocessing_context", None),
    )
    layer = nn.Linear(1, 1)
    if arguments.torch_compile:
        torch.compile(layer, backend=arguments.torch_compile_backend or "inductor", mode=arguments.torch_compile_mode)
    with suppress(ValueError, TypeError, NotImplementedError):  # from those that look for layers of the real model
        Trainer.get_optimizer_cls_and_kwargs(arguments, cast(PreTrainedModel, layer))
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD(layer.parameters(), lr=arguments.learning_rate),
        num_warmup_steps=1,
        num_training_steps=10**6,
        scheduler_specific_kwargs=cast("dict[str, Any]", arguments.lr_scheduler_kwargs or {}),
    )


def _build_trainer(session: Session, callbacks: list[TrainerCallback]) -> Trainer:
    with option_errors("training"):
        trainer = _trainer_class(session)(
            model=session.model,
            args=session.arguments,
            train_dataset=session.data[TRAIN],
            eval_dataset=session.data[EVALUATION],
            processing_class=session.tokenizer,
            # Of a language model only the loss: the logits of all tokens would not fit in memory.
            compute_metrics=None if session.task.kind == "generation" else compute_metrics_for(session.task),
            callbacks=callbacks,
        )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    stated, terms = session.plan.method_options.get("num_examples"), _terms(session)
    if stated not in (None, terms):
        warnings.warn(
            f"--num-examples is {stated}, but the loss of the training rows has {terms} terms: leave it out to count",
            stacklevel=2,
        )
    ivon = session.plan.ivon
    optimizer = None if ivon is None else functools.partial(IVON, **ivon.keywords())
    return attach(trainer, terms if stated is None else stated, optimizer)


def _terms(session: Session) -> int:
    """Return N, the terms that the loss is a mean of: labelled tokens, or labels of rows that have several.

    Labelled tokens are those of answers, or the first ones of words with a tag. Otherwise it is a mean over examples,
    also of a language model on multiple choice.
    """
    data, task = session.data[TRAIN], session.task
    if task.kind == "generation":
        return labelled_tokens(data)
    if task.kind == "token_classification":
        return sum(map(len, data[STARTS]))
    return len(data) * len(task.labels) if task.kind == "multi_label" else len(data)


@contextmanager
def _quick_attention(model: PreTrainedModel, arguments: TrainingArguments) -> Iterator[None]:
    """Use eager attention for training in bfloat16 on a CPU, where torch's fused kernel takes four times as long.

    The original is restored afterwards: it rounds differently, which can change codes of activations.
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


def _trainer_class(session: Session) -> Callable[..., Trainer]:
    """Return the Trainer class with the data collator for the kind of task."""
    if session.task.kind == "multiple_choice":
        scoring = choice_scoring(session.data[TRAIN], session.tokenizer)
        return functools.partial(ChoiceTrainer, class_logits=scoring.logits, data_collator=scoring.collate)
    if session.task.kind == "generation":
        return functools.partial(Trainer, data_collator=DataCollatorForSeq2Seq(session.tokenizer))
    if session.task.kind == "token_classification":
        return functools.partial(Trainer, data_collator=DataCollatorForTokenClassification(session.tokenizer))
    return functools.partial(Trainer, data_collator=functools.partial(right_padded, session.tokenizer))


def finish(session: Session, trainer: Trainer, seconds: float, reporter: Reporter) -> RunRecord:
    """Score and save the model in `OUT.partial`, check the saved copy and report; return the record."""
    plan, partial = session.plan, session.partial
    # Remove the autocast that training in 16 bits leaves around the forward pass: a loaded run does not have it.
    model = trainer.accelerator.unwrap_model(session.model, keep_fp32_wrapper=False)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise BayesLoraError("a trained weight is not finite, but must be (training diverged): lower --learning-rate")
    posterior = _cut_ranks(model, _posterior(trainer) if plan.has_weight_posterior else None)
    if posterior is not None:
        posterior.save(partial)
    reporter.on_scoring(rows_to_score(session.data), plan.options.samples)
    record, examples = _record(session, trainer, model, seconds)
    arguments: dict[str, Any] = {} if plan.config_class is None else {"save_embedding_layers": False}
    model.save_pretrained(partial, **arguments)
    session.tokenizer.save_pretrained(partial)
    _run_info(session).save(partial)
    probe = session.data[EVALUATION]
    verify_reload(model, probe, session.tokenizer, lambda: load(partial).model, plan.options.dtype)
    record.save(partial)
    if examples is not None:
        examples.save(partial)
    save_json(partial / HISTORY_FILE, trainer.state.log_history)
    reporter.on_finished(partial)
    return record


def _record(session: Session, trainer: Trainer, model: nn.Module, seconds: float) -> tuple[RunRecord, Examples | None]:
    plan, task = session.plan, session.task
    predictor = load_posterior(model, session.partial) if plan.has_weight_posterior else None
    started = time.perf_counter()
    batch_size = trainer.args.per_device_eval_batch_size
    of_rows = (session.data, task, session.tokenizer, batch_size, plan.options.samples)
    examples: Examples | None = None
    if task.kind == "generation":
        measured = measure_text(model, predictor or model, *of_rows)
    else:
        measured, examples = measure(model, *of_rows, predictor, plan.options.report_rows)
    record = RunRecord.from_dict(
        {
            "method": plan.options.method,
            "title": title_of(plan.options.method),
            "task": task.name,
            "dataset": hub_dataset(plan.options.task),
            "split": scored_part(_run_info(session)),
            "model": plan.options.model,
            **answered(_run_info(session)),
            "seed": plan.seed,
            "steps": trainer.state.global_step,
            "class_weights": dict(zip(task.labels, session.weights, strict=False)),
            **measured,
            "seconds": {"train": seconds, "evaluate": time.perf_counter() - started},
        }
    )
    return record, examples if plan.options.report_rows else None


def _posterior(trainer: Trainer) -> WeightPosterior:
    """Return the posterior of SWAG or IVON, from the best checkpoint if the Trainer has loaded its weights."""
    assert trainer.model is not None and trainer.optimizer is not None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SWAG):
            return WeightPosterior.of(trainer.model, callback)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        return load_posterior(trainer.model, trainer.state.best_model_checkpoint)
    return WeightPosterior.of(trainer.model, trainer.optimizer)


def _cut_ranks(model: nn.Module, posterior: WeightPosterior | None) -> WeightPosterior | None:
    """Remove ranks that contribute nothing from the adapter; return its posterior without them, if any."""
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
        label_numbers=task.label_numbers,
        max_length=session.length,
        dtype=plan.options.dtype,
        base_fingerprint=session.base.fingerprint,
        base_name=str(getattr(session.base.model, "name_or_path", "")),
        task_name=plan.options.task,
        data_dir=record.get("data_dir"),
        head=session.head,
        context=task.cloze.context if session.head == "cloze" else "",
        normalization=task.cloze.normalization if session.head == "cloze" else "none",
        train_split=plan.options.train_split,
        few_shot=plan.options.few_shot,
        tokenizer_digest=tokenizer_digest(session.tokenizer),
        files={name: record[name] for name in ("train_file", "eval_file", "test_file") if name in record},
        evaluation_rows=task.evaluation_rows,
        train_digest=file_digest(record["train_file"]) if task.evaluation_rows else None,
    )
