"""`attach(trainer, optimizer="ivon")` and plain LoRA: draws while a step lasts, the mean at any other time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import bayeslora
from bayeslora import IVON, BayesLoop, BayesLoraError, attach
from bayeslora.posterior import POSTERIOR_FILE, unwrapped
from tests.conftest import build_tiny_bert, build_tiny_llama

STEPS = 4
FAST = functools.partial(IVON, lr=0.05, hess_init=0.5, betas=(0.9, 0.9))


def _rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 60, (6,), generator=generator), "labels": i % 2} for i in range(16)]


def _model(config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    config = config or LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return get_peft_model(build_tiny_bert(num_hidden_layers=1), config)


def _trainer(folder: Path, model: nn.Module | None = None, callbacks: Any = (), **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    rows = _rows()
    return Trainer(
        model=model or _model(), args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks)
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Watch(TrainerCallback):
    """What the weights are, and whether they are a draw, at each event."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}

    def _note(self, name: str, kwargs: dict[str, Any]) -> None:
        self.seen.append((name, unwrapped(kwargs["optimizer"]).is_drawn))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("begin", kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("micro", kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("end", kwargs)
        self.weights[state.global_step] = _trained(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("evaluate", kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("save", kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Watch]:
    watch = Watch()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = _trainer(tmp_path_factory.mktemp("ivon"), callbacks=[watch], **options)
    assert attach(trainer, optimizer=FAST) is trainer
    trainer.train()
    return trainer, watch


def test_weights_are_drawn_for_all_micro_batches_of_a_step_and_the_mean_at_every_other_event(run: Any) -> None:
    trainer, watch = run
    assert {drawn for name, drawn in watch.seen if name in ("begin", "micro")} == {True}
    assert {drawn for name, drawn in watch.seen if name in ("end", "evaluate", "save")} == {False}
    assert [name for name, _ in watch.seen].count("begin") == STEPS
    optimizer = unwrapped(trainer.optimizer)
    assert optimizer.steps_taken == STEPS
    assert all(group["ess"] == 16 for group in optimizer.param_groups)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["posterior_std"] > 0 and entry["signal_to_noise"] > 0 for entry in logged)
    assert logged[-1]["posterior_std_variation"] > 0


def test_a_checkpoint_holds_the_mean_and_the_posterior(run: Any) -> None:
    trainer, watch = run
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    stored = load_file(folder / "adapter_model.safetensors")
    means = {n.replace(".modules_to_save", "").replace(".default", ""): v for n, v in watch.weights[2].items()}
    assert stored.keys() == means.keys() and all(torch.equal(stored[name], value) for name, value in means.items())
    deviations = load_file(folder / POSTERIOR_FILE)
    assert {name: d.shape for name, d in deviations.items()} == {name: value.shape for name, value in means.items()}


def test_a_resumed_run_ends_bit_for_bit_where_a_straight_one_does(run: Any, tmp_path: Path) -> None:
    trainer, _ = run
    resumed = attach(_trainer(tmp_path), optimizer=FAST)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    expected, found = _trained(trainer.model), _trained(resumed.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    first, second = unwrapped(trainer.optimizer), unwrapped(resumed.optimizer)
    for ours, theirs in zip(first.gaussians(), second.gaussians(), strict=True):
        assert torch.equal(ours.deviation, theirs.deviation)


def test_an_interruption_inside_a_step_leaves_the_mean(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.drawn = _trained(kwargs["model"])

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    stop = Stop()
    trainer = attach(_trainer(tmp_path, callbacks=[stop]), optimizer="ivon")
    before = _trained(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in _trained(trainer.model).items())
    assert not all(torch.equal(value, before[name]) for name, value in stop.drawn.items())


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), 5.0),
        (bayeslora.AdaLoraConfig(init_r=2, target_r=1, target_modules=["query"], task_type="SEQ_CLS"), 50.0),
    ],
    ids=["lora", "bayes_adalora"],
)
def test_a_run_in_which_no_weight_gets_far_says_so_before_it_starts(tmp_path: Path, config: Any, rate: float) -> None:
    clipped = functools.partial(IVON, hess_init=0.5, clip_radius=1e-2, weight_decay=0.0)
    warm_up = {"warmup_steps": 2, "max_steps": 2}
    short = attach(_trainer(tmp_path, _model(config), learning_rate=rate / 2, **warm_up), optimizer=clipped)
    with pytest.warns(UserWarning, match=f"by at most {rate / 200:g} in 2 steps"):
        short.train()
    far = attach(_trainer(tmp_path, _model(config), learning_rate=1.01 * rate, **warm_up), optimizer=clipped)
    far.train()  # warnings of the package are errors in the tests


def test_a_step_that_the_loss_scaler_skips_leaves_the_mean(tmp_path: Path) -> None:
    trainer = attach(_trainer(tmp_path), optimizer="ivon")
    trainer.create_optimizer()
    callback: Any = trainer.callback_handler.callbacks[0]
    arguments = (trainer.args, trainer.state, trainer.control)
    callback.on_train_begin(*arguments, optimizer=trainer.optimizer)
    before = _trained(trainer.model)
    callback.on_step_begin(*arguments)
    assert unwrapped(trainer.optimizer).is_drawn

    class Skipped:
        optimizer, step_was_skipped = trainer.optimizer, True

    callback.on_optimizer_step(*arguments, optimizer=Skipped())
    assert all(torch.equal(value, before[name]) for name, value in _trained(trainer.model).items())


def test_a_method_whose_parameters_have_rates_made_for_adam_is_refused() -> None:
    options = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "num_examples": 16}
    refused = bayeslora.MeLoraConfig(variance="learned", **options)
    model = _model(refused)
    optimizer = IVON(bayeslora.parameter_groups(model, lr=0.1), lr=0.1, ess=16)
    with pytest.raises(BayesLoraError, match="variance.*made for Adam's steps"):
        BayesLoop(model, optimizer, total_steps=4)


def test_what_attach_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="'adam'"):
        attach(_trainer(tmp_path), optimizer="adam")
    owner = _trainer(tmp_path)
    owner.optimizer = torch.optim.SGD(owner.model.parameters(), lr=0.1)
    with pytest.raises(BayesLoraError, match="drop one of them"):
        attach(owner, optimizer="ivon")
    with pytest.raises(BayesLoraError, match="mc_samples is 2"):
        attach(_trainer(tmp_path), optimizer=functools.partial(IVON, mc_samples=2)).train()
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    writer = get_peft_model(build_tiny_llama(num_hidden_layers=1), config)
    with pytest.raises(BayesLoraError, match="num_examples"):
        attach(_trainer(tmp_path, writer), optimizer="ivon").create_optimizer()
    given = attach(_trainer(tmp_path, writer), num_examples=99, optimizer="ivon").create_optimizer()
    assert given.param_groups[0]["ess"] == 99
