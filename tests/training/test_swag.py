"""SWAG beside numpy's moments, in a Trainer, at resume, and in files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import bayeslora
from bayeslora import SWAG, BayesLoraError, ModelPredictor, WeightPosterior, load_posterior, predict, save_posterior
from bayeslora.posterior.iterates import IterateMoments
from bayeslora.training.swag import SWAG_FILE, trained_weights
from tests.conftest import build_tiny_bert
from tests.training.test_attach import Rows

BATCH = {"input_ids": torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(2))}


class Iterates(TrainerCallback):
    """Keeps the weights after every step, and the learning rate of every step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen, self.rates = model, [], []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(torch.cat([p.detach().double().flatten() for p in trained_weights(self.model)]))


def lora(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return get_peft_model(build_tiny_bert(num_hidden_layers=1), config).to(dtype)


def trainer_of(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    settings = {
        "max_steps": 16, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1, "seed": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, SWAG, Iterates, Trainer]:
    model = lora()
    swag, seen = SWAG(model, start=0.5, every=2, rank=3), Iterates(model)
    trainer = trainer_of(model, tmp_path_factory.mktemp("run"), swag, seen)
    trainer.train()
    return model, swag, seen, trainer


def flat(values: list[Any], name: str, dims: int = 0) -> np.ndarray:
    return torch.cat([getattr(each, name).flatten(dims) for each in values], dim=dims).double().numpy()


def test_moments_and_covariance_of_a_regressions_iterates_are_numpys() -> None:
    """Stochastic gradient descent on a linear regression with an offset that would swamp a naive E[x^2] - E[x]^2."""
    generator = np.random.default_rng(0)
    x, noise = generator.normal(size=(200, 3)), generator.normal(size=200)
    y, w, iterates = x @ [10.0, -20.0, 30.0] + noise, np.array([10.0, -20.0, 30.0]), []
    moments = IterateMoments(rank=5)
    for step in range(30):
        rows = slice(5 * step, 5 * step + 5)
        w = w - 1e-3 * x[rows].T @ (x[rows] @ w - y[rows])
        iterates.append(w.astype(np.float32).astype(np.float64))
        moments.add(torch.tensor(w))
    seen = np.stack(iterates)
    np.testing.assert_allclose(moments.mean.numpy(), seen.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.variance().numpy(), seen.var(0), rtol=1e-3)
    deviations = moments.deviations().double().numpy()
    np.testing.assert_allclose(deviations, seen[-5:] - seen.mean(0), rtol=0, atol=5e-6)
    moments = IterateMoments(rank=30)
    for each in seen:
        moments.add(torch.tensor(each))
    deviations = moments.deviations().double().numpy()
    np.testing.assert_allclose(deviations.T @ deviations / 29, np.cov(seen.T), rtol=5e-3, atol=1e-9)


def test_the_posterior_is_that_of_the_last_iterates(trained: tuple[nn.Module, SWAG, Iterates, Trainer]) -> None:
    model, swag, seen, _ = trained
    assert swag.count == 4
    iterates = torch.stack([seen.seen[step - 1] for step in (10, 12, 14, 16)]).numpy()
    found = swag.gaussians()
    np.testing.assert_allclose(flat(found, "mean"), iterates.mean(0), atol=1e-7)
    np.testing.assert_allclose(flat(found, "deviation"), iterates.std(0) / 2**0.5, rtol=1e-3, atol=1e-7)
    expected = (iterates[1:] - iterates.mean(0)) / (2 * (3 - 1)) ** 0.5
    np.testing.assert_allclose(flat(found, "columns", 1), expected, atol=1e-7)
    now = torch.cat([p.detach().double().flatten() for p in trained_weights(model)])
    np.testing.assert_allclose(now.numpy(), iterates.mean(0), atol=1e-7)


def test_draws_have_the_covariance_of_both_terms() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    swag = SWAG(model, rank=4, scale=2.0)
    swag._parameters = list(model.parameters())
    seen = torch.randn(4, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 0.0], [0.2, 0.0, 0.5]])
    for each in seen:
        swag._moments.add(each)
    draws = []
    for draw in range(1500):
        with swag.sampled(seed=3, draw=draw):
            draws.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    found = torch.stack(draws).double()
    covariance = 4 * (0.5 * torch.diag(seen.double().var(0, correction=0)) + 0.5 * seen.double().T.cov())
    torch.testing.assert_close(found.mean(0), seen.double().mean(0), rtol=0, atol=0.12)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.1, atol=0.1)


def test_the_rate_is_held_and_logged(trained: tuple[nn.Module, SWAG, Iterates, Trainer], tmp_path: Path) -> None:
    rates = trained[2].rates
    assert rates[0] > rates[8] > 0 and rates[8:] == [rates[8]] * 8
    logged = [log["learning_rate"] for log in trained[3].state.log_history if "learning_rate" in log]
    assert logged[10] == rates[8]
    model = lora()
    seen = Iterates(model)
    trainer_of(model, tmp_path, SWAG(model, hold_rate=False), seen).train()
    assert len(set(seen.rates)) == 16


@pytest.mark.slow
def test_a_saved_posterior_gives_the_same_draws_in_a_new_process(
    trained: tuple[nn.Module, SWAG, Iterates, Trainer], tmp_path: Path
) -> None:
    model, swag, _, _ = trained
    here = predict(model, BATCH, samples=3, seed=5, optimizer=swag)
    assert here.mutual_information.min() > 0
    model.save_pretrained(str(tmp_path))
    save_posterior(model, swag, tmp_path)
    torch.save(BATCH, tmp_path / "batch.pt")
    code = f"""
import json, torch, bayeslora
from peft import PeftModel
from tests.conftest import build_tiny_bert
torch.manual_seed(0)
model = PeftModel.from_pretrained(build_tiny_bert(num_hidden_layers=1), {str(tmp_path)!r}).eval()
batch = torch.load({str(tmp_path / "batch.pt")!r})
found = bayeslora.predict(bayeslora.load_posterior(model, {str(tmp_path)!r}), batch, samples=3, seed=5)
print(json.dumps(found.probabilities.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    there = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    torch.testing.assert_close(there, here.probabilities, rtol=0, atol=1e-12)


def test_the_mean_is_the_prediction_without_samples_and_any_predictor_goes_around_it(
    trained: tuple[nn.Module, SWAG, Iterates, Trainer],
) -> None:
    model, swag, _, _ = trained
    assert torch.equal(predict(model, BATCH, optimizer=swag).logits, predict(model, BATCH).logits)
    scaled = bayeslora.TemperatureScaling(ModelPredictor(model, swag), 2.0)
    assert predict(scaled, BATCH, samples=2).mutual_information.max() > 0


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_resumed_run_has_the_posterior_of_a_whole_one(
    trained: tuple[nn.Module, SWAG, Iterates, Trainer], step: int, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == step

    saving = {"save_strategy": "steps", "save_steps": 4}
    model = lora()
    trainer_of(model, tmp_path, SWAG(model, start=0.5, every=2, rank=3), Stop(), **saving).train()
    assert (tmp_path / f"checkpoint-{step}" / SWAG_FILE).exists() == (step > 8)
    model = lora()
    swag = SWAG(model, start=0.5, every=2, rank=3)
    trainer_of(model, tmp_path, swag, **saving).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for one, other in zip(swag.gaussians(), trained[1].gaussians(), strict=True):
        assert all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("mean", "deviation", "columns"))


def test_moments_of_16_bit_weights_are_finer_than_the_weights(tmp_path: Path) -> None:
    model = lora(torch.bfloat16)
    swag, seen = SWAG(model, start=0.25, rank=4), Iterates(model)
    trainer_of(model, tmp_path, swag, seen, learning_rate=5e-2).train()
    iterates = torch.stack(seen.seen[6::3])
    means = flat(swag.gaussians(), "mean")
    assert swag.gaussians()[0].mean.dtype == torch.float32
    np.testing.assert_allclose(means, iterates.mean(0).numpy(), rtol=1e-6, atol=1e-7)
    assert (means != torch.tensor(means).bfloat16().double().numpy()).any()
    posterior = WeightPosterior.of(model, swag)
    posterior.save(tmp_path)
    again = load_posterior(model, tmp_path)
    for one, other in zip(again.gaussians(), swag.gaussians(), strict=True):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.columns, other.columns)


def test_columns_follow_ranks_that_are_cut() -> None:
    def model(rank: int) -> nn.Module:
        return nn.ModuleDict({"one": nn.Linear(rank, 5, bias=False)})

    deviations, columns = {"one.weight": torch.rand(5, 4)}, {"one.weight": torch.rand(3, 5, 4)}
    posterior = WeightPosterior(model(4), [("one.weight", 20)], deviations, columns)
    cut = posterior.cut(model(2), {"one": torch.tensor([True, False, False, True])})
    assert torch.equal(cut.columns["one.weight"], columns["one.weight"][:, :, [0, 3]])
    with pytest.raises(BayesLoraError, match="columns of shape"):
        WeightPosterior(model(4), [("one.weight", 20)], deviations, {"one.weight": torch.rand(3, 5, 2)})


def test_gates_and_deviations_are_left_out() -> None:
    config = bayeslora.MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(num_hidden_layers=1), config)
    chosen = {id(parameter) for parameter in trained_weights(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert any("melora_M" in name for name in names) and any("classifier" in name for name in names)
    assert not any("melora_rho" in name for name in names)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = lora()
    for options, text in (({"start": 1.0}, "start is 1.0"), ({"rank": 1}, "rank is 1"), ({"every": 0}, "every is 0")):
        with pytest.raises(BayesLoraError, match=text):
            SWAG(model, **options)
    with pytest.raises(BayesLoraError, match="has 0 iterates, but a posterior needs at least 2"):
        predict(model, BATCH, samples=2, optimizer=SWAG(model))
    with pytest.raises(BayesLoraError, match="would collect 1 iterate in the last 4 of 16 steps"):
        trainer_of(model, tmp_path, SWAG(model, every=3)).train()
    with pytest.raises(BayesLoraError, match="the Trainer divides or replaces"):
        trainer_of(model, tmp_path, SWAG(lora())).train()
    trainer = trainer_of(model, tmp_path, SWAG(model))
    trainer.args.load_best_model_at_end = True
    with pytest.raises(BayesLoraError, match="load_best_model_at_end is True"):
        trainer.train()


def blora(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = bayeslora.BLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", **options)
    return get_peft_model(build_tiny_bert(num_hidden_layers=1), config)


def test_iterates_in_two_bases_are_refused_before_training(tmp_path: Path) -> None:
    """Ranks alone are rotated after 0.9 of the steps, and decided after the last."""
    model = blora(mode="ra", target_rank=2.0)
    seen = Iterates(model)
    trainer = trainer_of(model, tmp_path, SWAG(model), seen, max_steps=40)
    text = (
        "SWAG averages the weights from step 31, but B-LoRA changes their basis or ranks up to step 40: end that "
        "sooner (freeze_fraction=0.3, for AdaLoRA tfinal), or raise start"
    )
    with pytest.raises(BayesLoraError, match=re.escape(text)):
        bayeslora.attach(trainer).train()
    assert not seen.seen


@pytest.mark.filterwarnings("ignore:.* training steps are few for B-LoRA")
@pytest.mark.parametrize(
    "options", [{"mode": "ra", "target_rank": 2.0, "freeze_fraction": 0.3}, {"target_bytes": 0.3}]
)
def test_iterates_of_the_final_form_are_averaged(options: dict[str, Any], tmp_path: Path) -> None:
    model = blora(**options)
    swag, seen = SWAG(model), Iterates(model)
    bayeslora.attach(trainer_of(model, tmp_path, swag, seen, max_steps=40)).train()
    np.testing.assert_allclose(flat(swag.gaussians(), "mean"), torch.stack(seen.seen[30:]).mean(0), atol=1e-6)


def test_a_checkpoint_without_its_moments_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16}
    model = lora()
    trainer_of(model, tmp_path, SWAG(model, start=0.0), **saving).train()
    file, other = tmp_path / "checkpoint-8" / SWAG_FILE, tmp_path / "checkpoint-16" / SWAG_FILE
    shutil.copy(other, file)
    for text in ("belongs to other weights", "cannot be read"):
        model = lora()
        trainer = trainer_of(model, tmp_path, SWAG(model, start=0.0), **saving)
        with pytest.raises(BayesLoraError, match=text):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        file.unlink(missing_ok=True)
