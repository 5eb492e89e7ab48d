"""Training with a divergence: its weight and N, counted once; warm-up and rates; exact resume; a known posterior."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import bayeslora
from bayeslora import BayesLoop, BayesLoraError, MeLoraConfig, parameter_groups
from bayeslora.methods import TrainingSetup
from bayeslora.posterior import standard_deviation
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.methods.reference import Tiny, layers_of
from tests.methods.variational_models import METHODS, X, config, tiny
from tests.training.test_attach import Rows, _trainer, _training_logs

each_method = pytest.mark.parametrize("method", tuple(METHODS))


def _loop(model: nn.Module, steps: int = 10, lr: float = 0.01, **options: Any) -> tuple[BayesLoop, Any]:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=lr), lr=lr)
    return BayesLoop(model, optimizer, total_steps=steps, **options), optimizer


# The penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@each_method
def test_the_penalty_is_added_once_with_its_weight_its_warm_up_and_n(method: str, accumulation: int) -> None:
    model = tiny(method, kl_weight=3.0, kl_warmup=0.3, num_examples=50)
    loop, optimizer = _loop(model, steps=10, lr=0.0)
    shares = []
    for step in range(10):
        loop.step_begin()
        for _ in range(accumulation):
            (model(X).square().mean() / accumulation).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        loop.before_optimizer_step()
        share = min(1.0, (step + 1) / 4)  # three of ten steps warm up
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        divergence = model.base_model.kl() * 3.0 * share / 50
        expected = torch.autograd.grad(divergence, [p for _, p in trained], allow_unused=True)
        touched = 0
        for (name, p), gradient in zip(trained, expected, strict=True):
            if gradient is not None:
                torch.testing.assert_close(p.grad - before[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
                touched += bool(gradient.any())
            elif name in before:
                assert torch.equal(p.grad, before[name]), name
        assert touched == 4  # the mean and the deviation of each layer
        statistics = loop.statistics()
        shares.append(statistics["kl_warmup"])
        assert statistics["penalty_kl"] == pytest.approx(3.0 * share / 50 * statistics["kl"], rel=1e-5)
        assert statistics["posterior_std"] > 0 and statistics["signal_to_noise"] > 0
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    assert shares == [0.25, 0.5, 0.75] + [1.0] * 7


def test_without_a_warm_up_the_weight_is_in_force_from_the_first_step() -> None:
    model = tiny("melora", kl_warmup=0.0)
    loop, _ = _loop(model)
    loop.step_begin()
    assert loop.statistics()["kl_warmup"] == 1.0


@each_method
def test_the_divergence_alone_leads_back_to_the_prior(method: str) -> None:
    model = tiny(method, kl_warmup=0.0, num_examples=1, prior_std=0.5)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.02))
    loop = BayesLoop(model, optimizer, total_steps=400)
    for _ in range(400):
        loop.step_begin()
        optimizer.zero_grad()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
    for layer in layers_of(model):
        mean, std, prior = layer.posterior("default")
        assert (mean - prior).abs().max() < 0.02
        assert (std - 0.5).abs().max() < 0.02


# N -------------------------------------------------------------------------------------------------------------


def test_n_missing_or_given_in_two_versions_is_refused_and_the_callers_config_is_left_alone() -> None:
    for method in METHODS:
        own = config(method, num_examples=None)
        model = get_peft_model(Tiny(), own)
        with pytest.raises(BayesLoraError, match="N, the number of training examples .* give num_examples in the con"):
            _loop(model)
        with pytest.raises(BayesLoraError, match="N, the number of training examples, is not known"):
            model.base_model.penalty()
        _loop(model, num_examples=30)
        assert model.base_model.num_examples == 30 == model.peft_config["default"].num_examples
        assert own.num_examples is None
        _loop(model, num_examples=30)
        with pytest.raises(BayesLoraError, match="num_examples is 40, but the adapter's config says 30"):
            _loop(model, num_examples=40)
        _loop(model)


def _bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **options}
    return get_peft_model(build_tiny_bert(initializer_range=0.2), MeLoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:num_examples is 7 in the adapter.s config, but")
def test_attach_takes_the_length_of_a_classification_set_and_saves_it(tmp_path: Path) -> None:
    for options, given, expected in (({}, None, 32), ({"num_examples": 7}, None, 7), ({}, 9, 9)):
        model = _bert(**options)
        trainer = bayeslora.attach(
            _trainer(model, tmp_path, attached=False, max_steps=1, learning_rate=0.0), num_examples=given
        )
        trainer.train()
        logged = _training_logs(trainer)[-1]
        assert logged["penalty_kl"] == pytest.approx(logged["kl"] / expected, rel=1e-4)
        model.save_pretrained(tmp_path / str(expected))
        assert MeLoraConfig.from_pretrained(tmp_path / str(expected)).num_examples == expected


def test_attach_refuses_two_versions_of_n(tmp_path: Path) -> None:
    trainer = _trainer(_bert(num_examples=7), tmp_path, attached=False)
    with pytest.raises(BayesLoraError, match="num_examples is 8, but the adapter's config says 7: drop one of them"):
        bayeslora.attach(trainer, num_examples=8)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_language_model_and_an_endless_set_need_n(task_type: str | None, tmp_path: Path) -> None:
    options = MeLoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 8
    trainer = bayeslora.attach(
        Trainer(model=get_peft_model(build_tiny_llama(), options), args=arguments, train_dataset=rows)
    )
    with pytest.raises(BayesLoraError, match="is not known, as of a stream or of a loss over tokens"):
        trainer.train()

    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return iter([Rows()[0]] * 32)

    trainer = bayeslora.attach(Trainer(model=_bert(), args=arguments, train_dataset=Endless()))
    with pytest.raises(BayesLoraError, match="is not known"):
        trainer.train()


def test_an_optimizer_without_the_groups_is_refused() -> None:
    model = tiny("melora")
    with pytest.raises(BayesLoraError, match="lacks a group for the means, variances, .*parameter_groups"):
        BayesLoop(model, torch.optim.AdamW(model.parameters()), total_steps=10)


# Under a Trainer -----------------------------------------------------------------------------------------------


def test_neither_loss_has_the_divergence_in_it_and_evaluation_is_at_the_mean(tmp_path: Path) -> None:
    trainer = bayeslora.attach(
        _trainer(
            _bert(kl_weight=1e4, initial_std=0.07),
            tmp_path,
            attached=False,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
        )
    )
    trainer.train()
    logs = _training_logs(trainer)
    assert len(logs) == 4 and all(entry["penalty_kl"] > 100 and entry["loss"] < 5 for entry in logs)
    evaluated = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert evaluated[0] == evaluated[1] < 5


def test_the_variances_keep_their_factor_under_the_schedule(tmp_path: Path) -> None:
    trainer = bayeslora.attach(
        _trainer(
            _bert(variance="learned", variance_lr_factor=5.0),
            tmp_path,
            attached=False,
            max_steps=6,
            lr_scheduler_type="linear",
            weight_decay=0.1,
        )
    )
    rates: list[dict[tuple[str, float], float]] = []

    class Record(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            groups = trainer.optimizer.param_groups
            rates.append({(g["bayeslora_role"], g["weight_decay"]): g["lr"] for g in groups})

    trainer.add_callback(Record())
    trainer.train()
    assert len(rates) == 6 and rates[0][("weights", 0.1)] > rates[-1][("weights", 0.1)] > 0
    for step in rates:
        assert step[("variances", 0.0)] == pytest.approx(5 * step[("weights", 0.1)])
        assert step[("means", 0.0)] == pytest.approx(step[("weights", 0.1)])


@pytest.mark.parametrize(
    "options", [{}, {"variance": "learned"}, {"core": "diagonal", "noise_scope": "token"}, {"antithetic": True}]
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    options: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    whole = bayeslora.attach(_trainer(_bert(**options), tmp_path / "whole", attached=False, **arguments))
    whole.train()
    torch.randn(100)  # the random state has moved on, as in another process
    resumed = bayeslora.attach(_trainer(_bert(**options), tmp_path / "again", attached=False, **arguments))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 12
    final, continued = whole.model.state_dict(), resumed.model.state_dict()
    for name, value in final.items():
        assert torch.equal(continued[name], value), name
    halfway = load_file(tmp_path / "whole" / "checkpoint-5" / "adapter_model.safetensors")
    deviations = {name: value for name, value in halfway.items() if "rho" in name or "precision" in name}
    assert deviations and not any(torch.equal(final[f"{name}.default"], value) for name, value in deviations.items())


def test_checkpointed_training_equals_plain_training(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        extra = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        trainer = bayeslora.attach(
            _trainer(_bert(), tmp_path, attached=False, max_steps=6, gradient_checkpointing=checkpointing, **extra)
        )
        trainer.train()
        states.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


# A posterior that is known -------------------------------------------------------------------------------------


class Regression(nn.Module):
    """y = w x + noise with a diagonal core of rank 1: the base weight is 0, A and B are fixed, so w = s B c A."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(("count", "beta"), [(12, 1.0), (48, 1.0), (12, 0.25)])
def test_the_bound_recovers_the_posterior_of_bayesian_linear_regression(count: int, beta: float) -> None:
    """With A = I and B = (1 ... 1) the update's weight is the diagonal core itself, c ~ N(1, sigma_p^2) a priori.

    With orthogonal features x_ij of the square sum S_j and noise of variance v the posterior has independent entries,
    of precision S_j / v + beta / sigma_p^2 when the divergence counts beta times, and of mean
    (sum_i x_ij y_i / v + beta / sigma_p^2) / precision; the variational optimum's variance is beta / precision.
    """
    features, prior_std, variance = 3, 0.5, 0.8
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(count, features, generator=generator))
    x = basis * torch.tensor([1.5, 3.0, 0.5])
    y = x @ torch.tensor([2.0, -0.5, 1.0]) + variance**0.5 * torch.randn(count, generator=generator)
    options = MeLoraConfig(
        r=features,
        lora_alpha=features,
        target_modules=["linear"],
        core="diagonal",
        num_examples=count,
        kl_weight=beta,
        kl_warmup=0.0,
        prior_std=prior_std,
        initial_std=0.3,
        antithetic=True,
    )
    model = get_peft_model(Regression(features), options).train()
    (layer,) = layers_of(model)
    layer.melora_A["default"].data.copy_(torch.eye(features))
    layer.melora_B["default"].data.fill_(1.0)
    for fixed in (layer.melora_A, layer.melora_B):
        fixed["default"].requires_grad_(False)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.02))
    steps, copies = 1000, 16
    loop = BayesLoop(model, optimizer, total_steps=steps)
    many, targets = x.repeat(copies, 1), y.repeat(copies)
    means, deviations = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (0.05 if group["bayeslora_role"] == "variances" else 0.02) * (1 - step / steps)
        loop.step_begin()
        # The mean over examples of the negative log-likelihood, each of them under draws of its own.
        ((model(many)[:, 0] - targets).square() / (2 * variance)).mean().backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
        if step > steps - 200:
            means.append(layer.melora_M["default"].detach().clone())
            deviations.append(standard_deviation(layer.melora_rho["default"]).detach())
    precision = x.square().sum(0) / variance + beta / prior_std**2
    mean = (x.T @ y / variance + beta / prior_std**2) / precision
    deviation = (beta / precision).sqrt()
    assert (deviation / prior_std).min() < 0.7  # the data say something, or any N would do
    torch.testing.assert_close(torch.stack(means).mean(0), mean, atol=0.05, rtol=0.03)
    torch.testing.assert_close(torch.stack(deviations).mean(0), deviation, atol=0.01, rtol=0.05)


def test_a_step_before_the_run_is_announced_uses_the_full_weight() -> None:
    tuner = tiny("melora", kl_weight=2.0, num_examples=10).base_model
    assert tuner.penalty()["kl"].item() == pytest.approx(tuner.kl().item() / 5, rel=1e-6)
    tuner.begin(TrainingSetup(total_steps=100))
    tuner.step_begin(0, 0)
    assert tuner.penalty()["kl"].item() == pytest.approx(tuner.kl().item() / 5 / 11, rel=1e-6)
    assert math.isfinite(tuner.statistics()["kl"])
