"""A `transformers.Trainer` with one call more: same penalty, logs, exact resume, best model, mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bayeslora
from bayeslora import AdaLoraConfig, BayesLoraError, BlobConfig, BLoraConfig, describe
from bayeslora.cost import relative_bops
from tests.conftest import VOCABULARY, build_tiny_bert
from tests.methods.reference import FROZEN, LEARN, WARM_UP, layers_of, used_by_weights
from tests.oracles import blora as oracle

KINDS = ("weight", "A", "E", "B", "A_out", "E_out", "out")
LOGGED = {
    *("loss", "learning_rate", "step", "phase", "mean_bits", "mean_rank", "relative_bops"),
    *(f"bits/{kind}" for kind in KINDS),
    *(f"rank/{name}" for name in ("query", "value")),
}


LOGGED_BY_THE_PAPER = {"penalty_bits", "penalty_rank", *(f"gates/{bits}" for bits in (4, 8, 16, 32))}


class Rows(Dataset):
    """Sentences of equal length, to be told apart by whether the first word is of the vocabulary's first half."""

    def __init__(self, length: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, len(VOCABULARY), (length, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "labels": (row[0] < len(VOCABULARY) // 2).long()}


def _model(base: PreTrainedModel | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "r": 4,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        "warmup_fraction": 0.3,
        "freeze_fraction": 0.3,
        **options,
    }
    return get_peft_model(base or build_tiny_bert(), BLoraConfig(**settings))


def _trainer(model: nn.Module, folder: Path, attached: bool = True, **options: Any) -> Trainer:
    special = {
        k: options.pop(k) for k in ("callbacks", "compute_metrics", "compute_loss_func", "optimizers") if k in options
    }
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **options,
    }
    trainer = Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=Rows(), eval_dataset=Rows(), **special
    )
    return bayeslora.attach(trainer) if attached else trainer


def _phase(model: nn.Module) -> int:
    return int(layers_of(model)[0].blora_progress["default"].phase)


def _gates(trainer: Trainer) -> str:
    return trainer.model.peft_config["default"].gates


def _training_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Training and its log -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["evidence", "paper"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, list[dict[str, float]]]:
    """One run through all phases, and what a reporter saw of it."""
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = _trainer(
        _model(gates=request.param, bit_penalty=50.0, rank_penalty=50.0),
        tmp_path_factory.mktemp("run"),
        callbacks=[Reporter()],
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    return trainer, seen


def test_attaching_returns_the_trainer_and_training_passes_through_all_phases(trained: Any) -> None:
    trainer, _ = trained
    assert [entry["phase"] for entry in _training_logs(trainer)] == [0.0] * 3 + [1.0] * 5 + [2.0] * 4
    assert _phase(trainer.model) == int(FROZEN)


def test_every_number_reaches_the_history_and_the_reporters(trained: Any) -> None:
    trainer, seen = trained
    history = _training_logs(trainer)
    assert len(history) == 12
    expected = LOGGED | LOGGED_BY_THE_PAPER if _gates(trainer) == "paper" else LOGGED
    for entry in history:
        assert expected <= set(entry)
        assert _gates(trainer) == "paper" or not LOGGED_BY_THE_PAPER & set(entry)
    learning = [entry for entry in history if "penalty_bits" in entry and entry["penalty_bits"] > 0]
    assert len(learning) == (5 if _gates(trainer) == "paper" else 0)
    assert all("penalty_rank" in entry for entry in learning)
    reported = [entry for entry in seen if "loss" in entry]
    assert len(reported) == 12
    for theirs, ours in zip(reported, history, strict=True):
        assert all(theirs[name] == ours[name] for name in expected - {"step"})
    last = history[-1]
    described = describe(trainer.model)
    assert last["mean_rank"] == sum(layer.rank for layer in described) / len(described)
    assert last["relative_bops"] == pytest.approx(relative_bops(trainer.model)["attention"])


def test_the_penalty_keys_are_in_every_line_of_the_log(trained: Any) -> None:
    """A reporter that fixes its columns on the first line must not lose them."""
    trainer, _ = trained
    names = {"penalty_bits", "penalty_rank"} if _gates(trainer) == "paper" else set()
    assert all(names <= set(entry) for entry in _training_logs(trainer))
    assert len({frozenset(entry) for entry in _training_logs(trainer)}) == 1


def test_neither_the_training_loss_nor_the_evaluation_loss_has_the_penalty_in_it(trained: Any) -> None:
    trainer, _ = trained
    largest = max(entry.get("penalty_bits", 0.0) for entry in _training_logs(trainer))
    assert largest > 1000 if _gates(trainer) == "paper" else largest == 0
    losses = [entry["loss"] for entry in _training_logs(trainer)]
    losses += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 15 and max(losses) < 5
    rows = [Rows()[i] for i in range(len(Rows()))]
    tokens, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(trainer.model.eval()(input_ids=tokens).logits, labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_lines_are_the_tasks_alone(trained: Any) -> None:
    trainer, _ = trained
    lines = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert lines and not any("penalty_bits" in entry or "mean_bits" in entry for entry in lines)


def test_it_learns(tmp_path: Path) -> None:
    base = build_tiny_bert(initializer_range=0.3)  # features that differ from word to word, as a trained model's do
    trainer = _trainer(_model(base), tmp_path, max_steps=40, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in _training_logs(trainer)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# Penalty and accumulation ---------------------------------------------------------------------------------------


class GateGradients(TrainerCallback):
    """What the optimizer is given for the gates, and what the reference says it should be, in each step."""

    def __init__(self, model: nn.Module, bits: float, ranks: float) -> None:
        self.model, self.bits, self.ranks = model, bits, ranks
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if _phase(self.model) != int(LEARN):
            return
        layers = layers_of(self.model)
        gates = [layer.blora_quantizers["default"].gate_logits for layer in layers]
        logits = [layer.blora_rank["default"].logits for layer in layers]
        penalty = self.bits * oracle.bit_penalty(torch.cat(gates), torch.ones(len(torch.cat(gates)), 4))
        penalty = penalty + self.ranks * sum(oracle.rank_penalty(row) for row in logits)
        expected = torch.autograd.grad(penalty, [*gates, *logits])
        self.pairs += [(p.grad.clone(), e) for p, e in zip([*gates, *logits], expected, strict=True)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_optimizer_gets_the_penaltys_gradient_once_and_not_clipped_with_the_tasks(
    accumulation: int, tmp_path: Path
) -> None:
    model = _model(gates="paper", bit_penalty=30.0, rank_penalty=7.0)
    spy = GateGradients(model, 30.0, 7.0)

    def no_task(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs["logits"].sum() * 0

    trainer = _trainer(
        model,
        tmp_path,
        callbacks=[spy],
        compute_loss_func=no_task,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert len(spy.pairs) == 5 * 2 * len(layers_of(model))
    for actual, expected in spy.pairs:
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert max(expected.norm() for _, expected in spy.pairs) > 1.0  # a global clip at 1 would have shown


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "paper", "calibration": "absmax"},
        # The best range of a batch of activations is not the mean of those of its parts.
        {"target_bops": 0.75, "target_rank": 2.0, "fixed_bits": dict.fromkeys(("A_out", "E_out", "out"), 32)},
    ],
    ids=["paper", "evidence"],
)
def test_accumulation_gives_the_update_of_one_batch(options: dict[str, Any], tmp_path: Path) -> None:
    states = []
    for accumulation in (1, 4):
        model = _model(init_weights=False, **options)
        trainer = _trainer(
            model,
            tmp_path,
            optim="sgd",  # Adam divides by gradients that may be no more than rounding
            learning_rate=0.1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        states.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in states[0].items():
        one, two = value, states[1][name]
        if "fixed_bits" in options:
            one, two = used_by_weights(name, one), used_by_weights(name, two)
        torch.testing.assert_close(two, one, atol=5e-5, rtol=1e-3, msg=name)


# Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "paper", "bit_weighting": "bops"},
        {},
        {"target_bops": 0.3},
        {"fixed_bits": {"weight": 4}, "group_size": 2},
    ],
    ids=["penalty", "price", "budget", "given width"],
)
def test_a_run_resumed_in_any_phase_ends_bit_for_bit_where_the_uninterrupted_one_does(
    options: dict[str, Any], tmp_path: Path
) -> None:
    schedule = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    trainer = _trainer(_model(**options), tmp_path / "whole", **schedule)
    trainer.train()
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if "target_bops" in options:
        assert relative_bops(trainer.model)["attention"] <= 0.3
    for step, phase in ((2, WARM_UP), (6, LEARN), (10, FROZEN)):
        resumed = _trainer(_model(**options), tmp_path / str(step), **schedule)
        seen: list[int] = []

        class First(TrainerCallback):
            def on_step_begin(self, *args: Any, seen: Any = seen, model: Any = resumed.model, **kwargs: Any) -> None:
                seen.append(_phase(model))

        resumed.add_callback(First())
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert seen[0] == int(phase) and len(seen) == 12 - step
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), f"resumed at {step}: {name}"
        assert _training_logs(resumed)[-1]["loss"] == _training_logs(trainer)[-1]["loss"]


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


def _scoring(scores: list[float]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics of a run whose evaluations give `scores`, one after another."""
    left = iter(scores)
    return lambda prediction: {"score": next(left)}


def test_the_best_checkpoint_of_the_frozen_phase_is_loaded_at_the_end(tmp_path: Path) -> None:
    # The best of all while gates learn; the phases begin after steps 4 and 8.
    metrics = _scoring([0.8, 0.7, 0.9, 0.3, 0.2, 0.1])
    trainer = _trainer(_model(), tmp_path, compute_metrics=metrics, save_total_limit=2, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    assert trainer.state.best_metric == 0.2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    saved = load_file(tmp_path / "checkpoint-10" / "adapter_model.safetensors")
    ours = {name.replace(".default", ""): value for name, value in trainer.model.state_dict().items()}
    compared = [name for name in saved if name in ours]
    assert len(compared) >= len(saved) - 2 and all(torch.equal(saved[name], ours[name]) for name in compared)
    assert _phase(trainer.model) == int(FROZEN)
    tokens = Rows().tokens
    again = bayeslora_reload(tmp_path / "checkpoint-10")
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.model.eval()(input_ids=tokens).logits, again(input_ids=tokens).logits, atol=1e-6, rtol=0
        )


def test_a_run_whose_lowest_loss_is_early_ends_with_the_learned_widths(tmp_path: Path) -> None:
    def worse_and_worse(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = nn.functional.cross_entropy(outputs["logits"], labels)
        return -loss if torch.is_grad_enabled() else loss  # training maximizes what evaluation reports

    options = {**BEST, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    trainer = _trainer(_model(target_bops=0.3), tmp_path, compute_loss_func=worse_and_worse, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert min(losses, key=lambda step: losses[step]) == 2
    assert _phase(trainer.model) == int(FROZEN)
    assert relative_bops(trainer.model)["attention"] <= 0.3


@pytest.mark.parametrize("step", [6, 10])
def test_a_resumed_run_has_the_same_best_checkpoint(step: int, tmp_path: Path) -> None:
    scores = [0.8, 0.7, 0.9, 0.3, 0.2, 0.1]
    _trainer(_model(), tmp_path, compute_metrics=_scoring(scores), **BEST).train()
    resumed = _trainer(_model(), tmp_path, compute_metrics=_scoring(scores[step // 2 :]), **BEST)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-10")
    assert _phase(resumed.model) == int(FROZEN)


def test_early_stopping_waits_for_the_frozen_phase(tmp_path: Path) -> None:
    trainer = _trainer(
        _model(warmup_fraction=0.1, freeze_fraction=0.5),
        tmp_path,
        compute_metrics=_scoring([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        **BEST,
    )
    trainer.train()
    assert trainer.state.global_step == 8  # the second evaluation of the frozen phase, which begins after step 6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")


def test_only_better_models_of_the_frozen_phase_are_saved_last(tmp_path: Path) -> None:
    options = {**BEST, "save_strategy": "best", "load_best_model_at_end": False, "save_total_limit": 1}
    metrics = _scoring([0.9, 0.8, 0.7, 0.1, 0.3, 0.2])
    trainer = _trainer(_model(), tmp_path, compute_metrics=metrics, **options)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]


def test_the_best_bayesian_adalora_has_its_final_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=4,
        importance="sensitivity",
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    metrics = _scoring([0.9, 0.8, 0.7, 0.2, 0.3, 0.1])  # the last allocation is after step 8
    trainer = _trainer(get_peft_model(build_tiny_bert(), config), tmp_path, compute_metrics=metrics, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    described = describe(trainer.model)
    assert sum(layer.rank for layer in described) == 2 * len(described)


def test_other_methods_may_have_their_best_model_early(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BlobConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    metrics = _scoring([0.9, 0.8, 0.7, 0.2, 0.3, 0.1])
    trainer = _trainer(get_peft_model(build_tiny_bert(), config), tmp_path, compute_metrics=metrics, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


@pytest.mark.parametrize(
    "options",
    [
        {"eval_delay": 13},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_delay": 4},
        {"eval_strategy": "no", "save_strategy": "no"},
    ],
)
def test_a_best_model_that_cannot_be_in_its_final_form_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = _trainer(_model(), tmp_path, **{**BEST, **options})
    said = "no evaluation falls in steps 9 to 12, in which B-LoRA has its final form: use .* save_steps 1, and an"
    with pytest.raises(BayesLoraError, match=said):
        trainer.train()


def bayeslora_reload(folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(build_tiny_bert(), folder).eval()


# Mixed precision, checkpointing, other optimizers ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_training_runs_and_moves_gates_and_weights(how: str, tmp_path: Path) -> None:
    model = _model()
    if how == "weights":
        model = model.to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # A bfloat16 number near 1 moves by 2^-8 or not at all.
    trainer = _trainer(model, tmp_path, bf16=how == "autocast", learning_rate=1e-2)
    trainer.train()
    assert _phase(model) == int(FROZEN)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.isfinite().all(), name
            assert not torch.equal(p, before[name]), name
    assert all(layer.blora_quantizers["default"].gate_logits.dtype == torch.float32 for layer in layers_of(model))
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in _training_logs(trainer))


def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        model = _model()
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        trainer = _trainer(model, tmp_path, gradient_checkpointing=checkpointing, **options)
        trainer.train()
        states.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_the_optimizer_is_the_one_the_arguments_ask_for_over_the_methods_groups(name: str, tmp_path: Path) -> None:
    trainer = _trainer(_model(), tmp_path, optim=name, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    plain = _trainer(build_tiny_bert(), tmp_path, attached=False, optim=name).create_optimizer()
    assert type(optimizer) is type(plain)
    roles = {
        group["bayeslora_role"]: group["weight_decay"] for group in optimizer.param_groups if not group["weight_decay"]
    }
    assert set(roles) == {"weights", "ranges"}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["bayeslora_role"] == "weights"} == {0.0, 0.1}
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trained


# What it leaves alone and what it refuses -----------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [True, False])
def test_other_models_train_as_without_it(adapted: bool, tmp_path: Path) -> None:
    losses = []
    for attached in (True, False):
        model: nn.Module = build_tiny_bert()
        if adapted:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        trainer = _trainer(model, tmp_path, attached=attached, max_steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in _training_logs(trainer)])
        assert not any("mean_bits" in entry for entry in _training_logs(trainer))
    assert losses[0] == losses[1]


def _diverging(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    return _trainer(model, folder, learning_rate=1e30, optim="sgd", max_grad_norm=0, **options)


def test_divergence_stops_the_run_at_the_next_log(tmp_path: Path) -> None:
    """The Trainer replaces a loss that is not a number in its log by 0 and trains on."""
    model = get_peft_model(build_tiny_bert(), BlobConfig(target_modules=["query"], task_type="SEQ_CLS"))
    trainer = _diverging(model, tmp_path)
    with pytest.raises(BayesLoraError, match=r"is not finite after \d+ steps, but must be \(training diverged\)"):
        trainer.train()
    assert trainer.state.global_step < 12
    unlogged = _diverging(model, tmp_path, logging_strategy="no")
    with pytest.raises(BayesLoraError, match="training diverged"):
        unlogged.train()


def test_divergence_before_the_ranges_are_calibrated_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="not finite.*training diverged"):
        _diverging(_model(), tmp_path, logging_strategy="no").train()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = _trainer(_model(), tmp_path, attached=False)
    trainer.args._n_gpu = 2
    with pytest.raises(BayesLoraError, match="2 GPUs would share one process .* start with torchrun"):
        bayeslora.attach(trainer)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(_model(), tmp_path, attached=False)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(BayesLoraError, match="DeepSpeed hides the gradients.*use DDP or FSDP2 instead"):
        bayeslora.attach(trainer)


def test_fsdp1_is_refused_for_a_method_that_needs_whole_factors_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(_model(), tmp_path, attached=False)
    trainer.is_fsdp_enabled = True
    with pytest.raises(BayesLoraError, match="FSDP1 flattens the factors, but B-LoRA rotates them: use FSDP2 or DDP"):
        bayeslora.attach(trainer)
    assert trainer.optimizer_cls_and_kwargs is None
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", True)
    assert bayeslora.attach(trainer).optimizer_cls_and_kwargs is not None


@pytest.mark.parametrize("config", [bayeslora.MeLoraConfig, AdaLoraConfig])
@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_fsdp_is_refused_for_a_method_that_computes_with_whole_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, is_fsdp2: bool
) -> None:
    model = get_peft_model(build_tiny_bert(), config(target_modules=["query"], task_type="SEQ_CLS"))
    trainer = _trainer(model, tmp_path, attached=False)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", is_fsdp2)
    with pytest.raises(BayesLoraError, match="FSDP gives each rank a part of a factor, but .* use DDP"):
        bayeslora.attach(trainer)
    assert trainer.optimizer_cls_and_kwargs is None
    monkeypatch.setattr("bayeslora.training.hooks.is_sharded", lambda model: True)
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-3))
    with pytest.raises(BayesLoraError, match="FSDP gives each rank a part of a factor"):
        bayeslora.BayesLoop(model, optimizer, total_steps=100, num_examples=10)


def test_a_callers_optimizer_without_the_groups_is_refused_and_with_them_is_kept(tmp_path: Path) -> None:
    model = _model()
    trainer = _trainer(model, tmp_path, optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(BayesLoraError, match="lacks a group for the ranges.*parameter_groups"):
        trainer.train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-3))
    trainer = _trainer(model, tmp_path, optimizers=(optimizer, None))
    trainer.train()
    assert _phase(model) == int(FROZEN)


def test_a_second_call_changes_nothing_and_with_other_arguments_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(_model(), tmp_path)
    before = list(trainer.callback_handler.callbacks), dict(vars(trainer))
    assert bayeslora.attach(trainer) is trainer
    assert (trainer.callback_handler.callbacks, vars(trainer)) == before
    with pytest.raises(BayesLoraError, match="called before with other arguments"):
        bayeslora.attach(trainer, num_examples=7)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 2, "train longer"),
        ({"gates": "paper", "gate_learning_rate": 1e-5}, 12, "cannot close"),
        ({"target_bops": 1e-3}, 12, "but the least share that these widths and ranks can reach"),
    ],
)
def test_a_run_in_which_gates_cannot_move_does_not_start(
    options: dict[str, Any], steps: int, message: str, tmp_path: Path
) -> None:
    model = _model(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BayesLoraError, match=message):
        _trainer(model, tmp_path, max_steps=steps).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_that_the_run_builds_sees_the_labels_and_the_pairs(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model_init` gives `train` a new model, with a tuner of its own."""
    monkeypatch.setitem(bayeslora.attach.__globals__, "compares_pairs", lambda trainer: rows == 2)
    seen: list[tuple[bool, int]] = []

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = bayeslora.MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        model = get_peft_model(build_tiny_bert(), config)
        tuner = model.base_model

        def see(*_: Any) -> None:
            seen.append((tuner.kept_labels is not None, tuner.rows_per_example))

        model.register_forward_pre_hook(see)
        return model

    settings = {"max_steps": 2, "label_smoothing_factor": 0.1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    trainer = Trainer(args=TrainingArguments(str(tmp_path), **settings), model_init=build, train_dataset=Rows())
    bayeslora.attach(trainer).train()
    assert seen == [(True, rows)] * 2


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (BLoraConfig, "no rank closes and no width narrows"),
        (AdaLoraConfig, "no rank is pruned"),
        (bayeslora.DyLoraConfig, "every layer draws a rank of its own"),
        (bayeslora.MeLoraConfig, "nothing is learned about the posterior but its mean"),
        (BlobConfig, "nothing is learned about the posterior but its mean"),
    ],
)
def test_a_trainer_that_was_never_attached_is_told_once(config: Any, missing: str, tmp_path: Path) -> None:
    ranks = {"init_r": 3, "target_r": 2, "importance": "sensitivity"} if config is AdaLoraConfig else {"r": 2}
    model = get_peft_model(build_tiny_bert(), config(target_modules=["query"], task_type="SEQ_CLS", **ranks))
    trainer = _trainer(model, tmp_path, attached=False, max_steps=4)
    with pytest.warns(UserWarning, match="no run has begun") as told:
        trainer.train()
    (message,) = [str(each.message) for each in told if "no run has begun" in str(each.message)]
    assert f"so {missing}: call bayeslora.attach(trainer) before trainer.train()" in message
    trainer = _trainer(model, tmp_path, max_steps=12)  # a warning would be an error
    trainer.train()


def test_a_model_saved_by_the_trainer_is_a_peft_adapter(
    trained: Any, tmp_path: Path, tiny_bert: PreTrainedModel
) -> None:
    trainer, _ = trained
    trainer.save_model(str(tmp_path))
    tokens = Rows().tokens
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(bayeslora_reload(tmp_path)(input_ids=tokens).logits, expected, atol=1e-6, rtol=0)
