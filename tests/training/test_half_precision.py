"""Training in float16 with a loss scale, as a GPU does it, by a scaler around float32 passes; and in pure bfloat16."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import bayeslora
from tests.conftest import VOCABULARY, build_tiny_bert
from tests.methods.reference import layers_of

ROWS = 48


class Rows(Dataset):
    def __init__(self) -> None:
        self.tokens = torch.randint(5, len(VOCABULARY), (ROWS, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


class Scaled(TrainerCallback):
    """Lets the trainer scale losses, and makes the gradients of one step overflow."""

    def __init__(self, trainer: Trainer, overflow: int | None) -> None:
        self.accelerator = trainer.accelerator
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=10**6)
        head = trainer.model.base_model.model.classifier

        def poison(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad and trainer.state.global_step == overflow:
                output.register_hook(lambda gradient: gradient * float("inf"))

        if overflow is not None:
            head.register_forward_hook(poison)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.autocast = contextlib.nullcontext  # float32 passes: only the scale matters here


class Gradients(TrainerCallback):
    """Keeps the gradient of the first core before each step, without that of the loss."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.shares = model, []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        layer = layers_of(self.model)[0]
        mean, _, start = layer.posterior("default")
        penalty = (mean - start).detach() / layer.prior("default") ** 2 / ROWS
        self.shares.append(float((mean.grad * penalty).sum() / penalty.square().sum().clamp_min(1e-30)))


def _trained(
    config: Any, tmp_path: Path, *, steps: int = 24, scaled: bool = True, overflow: int | None = None, **arguments: Any
) -> tuple[PeftModel, Gradients | None]:
    torch.manual_seed(0)
    model = get_peft_model(build_tiny_bert(), config)
    settings: dict[str, Any] = {"max_steps": steps, "learning_rate": 1e-3, "save_strategy": "no", "report_to": []}
    given = TrainingArguments(tmp_path, per_device_train_batch_size=8, use_cpu=True, **{**settings, **arguments})
    trainer = bayeslora.attach(Trainer(model, given, train_dataset=Rows()))
    if scaled:
        trainer.add_callback(Scaled(trainer, overflow))
    seen = Gradients(model) if isinstance(config, bayeslora.MeLoraConfig) else None
    if seen is not None:
        trainer.add_callback(seen)
    trainer.train()
    return model, seen


def _melora(**options: Any) -> bayeslora.MeLoraConfig:
    shared: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return bayeslora.MeLoraConfig(**{**shared, "noise_fade_in": [0, 0], "kl_warmup": 0.0, **options})


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_scale_changes_neither_posterior_nor_penalty(clip: float, tmp_path: Path) -> None:
    plain, expected = _trained(_melora(), tmp_path, scaled=False, max_grad_norm=clip)
    model, found = _trained(_melora(), tmp_path, max_grad_norm=clip)
    assert found is not None and expected is not None
    torch.testing.assert_close(torch.tensor(found.shares[8:]), torch.tensor(expected.shares[8:]), rtol=0.02, atol=0.02)
    for one, other in zip(layers_of(model), layers_of(plain), strict=True):
        torch.testing.assert_close(
            one.melora_precision["default"], other.melora_precision["default"], rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize(
    "config",
    [
        _melora(),
        bayeslora.AdaLoraConfig(
            target_modules=["query"], task_type="SEQ_CLS", target_r=2, deltaT=2, importance="sensitivity"
        ),
    ],
    ids=["melora", "adalora"],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of the step that is skipped
def test_a_step_that_overflows_leaves_no_trace_in_averages(config: Any, optim: str, tmp_path: Path) -> None:
    model, _ = _trained(config, tmp_path, overflow=3, optim=optim)
    assert all(buffer.isfinite().all() for _, buffer in model.named_buffers() if buffer.is_floating_point())
    if isinstance(config, bayeslora.MeLoraConfig):
        batch = {"input_ids": Rows().tokens}
        assert bayeslora.predict(model, batch, samples=2).probabilities.isfinite().all()
        assert all(layer.melora_precision["default"].any() for layer in layers_of(model))
    else:
        assert sum(layer.rank for layer in bayeslora.describe(model)) == 2 * len(layers_of(model))
        assert all(layer.rank < 4 for layer in bayeslora.describe(model))  # not all of one layer, the first


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:.*training steps are few for B-LoRA")
def test_a_skipped_step_does_not_lose_the_rotation(tmp_path: Path) -> None:
    config = bayeslora.BLoraConfig(
        r=6, target_modules=["query", "value"], task_type="SEQ_CLS", mode="ra", target_rank=2.0
    )
    model, _ = _trained(config, tmp_path, steps=40, overflow=31, optim="adamw_torch")
    assert model.base_model.run_state().rotated_after == 32
    for layer in layers_of(model):
        columns = layer.blora_B["default"].detach()
        assert (columns.T @ columns).fill_diagonal_(0).abs().max() < 0.1 * columns.square().sum(0).max()


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("how", ["to", "not autocast"])
def test_pure_bfloat16_keeps_the_precision_in_float32(how: str, cores: int, tmp_path: Path) -> None:
    base = build_tiny_bert()
    model = (
        get_peft_model(base, _melora(cores=cores)).to(torch.bfloat16)
        if how == "to"
        else get_peft_model(base.to(torch.bfloat16), _melora(cores=cores), autocast_adapter_dtype=False)
    )
    given = TrainingArguments(tmp_path, max_steps=3, use_cpu=True, save_strategy="no", report_to=[])
    bayeslora.attach(Trainer(model, given, train_dataset=Rows())).train()
    layer = layers_of(model)[0]
    assert layer.melora_A["default"].dtype == torch.bfloat16
    assert layer.melora_precision["default"].dtype == torch.float32 and layer.melora_precision["default"].any()
