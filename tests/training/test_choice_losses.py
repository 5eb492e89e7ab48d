"""Methods whose loss is over the choices of a row (by cloze): their gradients of rows, N, and accumulation.

The reference reads each choice of each row alone, in plain autograd, without padding or the library's scoring.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

import bayeslora
from bayeslora import BayesLoop, BLoraConfig, MeLoraConfig, parameter_groups
from bayeslora.evaluation import choice_scoring, encode_cloze, encode_prompts
from bayeslora.evaluation.multiple_choice import ChoiceScoring
from bayeslora.methods.blora.components import BUCKETS, deal
from bayeslora.methods.blora.evidence import MEASURED
from bayeslora.methods.blora.probe import row_uniform
from bayeslora.methods.tuner import tuner_of
from bayeslora.quantization import optimal_range, quantize
from tests.conftest import build_tiny_llama, build_tiny_tokenizer
from tests.evaluation.test_choice_trainer import make_trainer
from tests.evaluation.test_cloze import worded
from tests.methods.test_blora_evidence import gathered
from tests.oracles import ivon as ivon_oracle

ROWS = 4
TARGETS = ["q_proj", "v_proj"]
TOKENIZER = build_tiny_tokenizer(causal=True)


def items(most: int, count: int = ROWS) -> Dataset:
    """Rows with exactly `most` choices of unequal length."""
    rows = [row for row in worded(20 * count, seed=3, most=most) if len(row["choices"]) == most]
    return Dataset.from_list(rows[:count])


def encoded(most: int) -> tuple[Dataset, ChoiceScoring]:
    data = encode_cloze(items(most), TOKENIZER, classes=most)
    return data, choice_scoring(data, TOKENIZER)


def adapted(config: Any) -> Any:
    """A tiny language model without dropout whose adapter has an effect."""
    torch.manual_seed(0)
    model = get_peft_model(build_tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].endswith("_B"):
                parameter.normal_(std=0.3)
    return model.train()


def blora(**options: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_weights": False, "task_type": "CAUSAL_LM"}
    model = adapted(BLoraConfig(**settings, **options))
    with torch.no_grad():
        for layer in model.base_model.adapted_layers():
            layer.blora_E["default"].uniform_(0.5, 1.5)
    return model


def choice_losses(model: Any, row: dict[str, Any]) -> Tensor:
    """Minus the log-probability of each choice of an encoded row (C,), each read alone."""
    context, scores = row["input_ids"], []
    for ids, length in zip(row["choice_ids"], row["choice_length"], strict=True):
        log_p = model(input_ids=torch.tensor([context + ids])).logits[0].log_softmax(-1)
        scores.append(sum(log_p[len(context) + i - 1, token] for i, token in enumerate(ids)) / length)
    return -torch.stack(scores).log_softmax(0)


def row_gradients(model: Any, data: Dataset, parameters: list[Tensor]) -> list[list[Tensor]]:
    """The gradient of each row's own loss, at the means, with the labels of the data."""
    found = []
    for row in data:
        with bayeslora.posterior_mean(model):
            loss = choice_losses(model, row)[row["label"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)])
    return found


def close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-7, "rtol": 1e-4, **kwargs})


# B-LoRA's evidence ----------------------------------------------------------------------------------------------


def measured(model: Any, data: Dataset, scoring: ChoiceScoring, parts: int) -> int:
    """Gather evidence in one step of `parts` micro-batches, and return that step."""
    steps = []

    def step() -> None:
        steps.append(tuner_of(model).run_state().watched_step)  # type: ignore[union-attr]
        for rows in torch.arange(len(data)).chunk(parts):
            batch = scoring.collate([data[int(row)] for row in rows])
            F.cross_entropy(scoring.logits(model, batch), batch["labels"]).backward()

    gathered(model, step)
    return steps[0]


def derivatives(model: Any, data: Dataset, step: int) -> list[tuple[float, list[Tensor], list[Tensor], list[Tensor]]]:
    """By row and label that may be drawn: the label's weight, and derivatives by every E, A and B.

    With two choices all labels count by their probability; with more, the one label that is drawn in `step`.
    """
    layers = model.base_model.adapted_layers()
    tensors = [layer.get_parameter(f"blora_{part}.default") for part in "EAB" for layer in layers]
    rows = choice_scoring(data, TOKENIZER).collate(list(data))
    uniform = row_uniform((len(data), 1), rows, step, torch.device("cpu"))
    found = []
    for index, row in enumerate(data):
        losses = choice_losses(model, row)
        p = (-losses).exp().detach()
        drawn = int((p.cumsum(0) < uniform[index]).sum())
        for label in range(len(p)) if len(p) == 2 else [drawn]:
            gradients = torch.autograd.grad(losses[label], tensors, retain_graph=True)
            weight = float(p[label]) if len(p) == 2 else 1.0
            n = len(layers)
            found.append((weight, list(gradients[:n]), list(gradients[n : 2 * n]), list(gradients[2 * n :])))
    return found


@pytest.mark.parametrize(("most", "parts"), [(2, 1), (4, 2)])
def test_evidence_is_that_of_labels_drawn_among_a_rows_choices(most: int, parts: int) -> None:
    data, scoring = encoded(most)
    model = blora()
    step = measured(model, data, scoring, parts)
    model.eval()
    found = derivatives(model, data, step)
    for place, layer in enumerate(model.base_model.adapted_layers()):
        evidence, kinds = layer.evidence("default"), layer.quantizers("default").kinds
        assert float(evidence.terms) == len(data)
        e = layer.blora_E["default"].detach()
        ranks = sum(weight * (by_e[place] * e).square() for weight, by_e, _, _ in found) / (2 * len(data))
        close(evidence.rank_deltas, ranks, rtol=5e-5, atol=1e-12)
        for kind, part in (("A", 2), ("B", 3)):
            value = layer.get_parameter(f"blora_{kind}.default").detach()
            expected = []
            for bits in MEASURED:
                error = quantize(value, optimal_range(value, bits), bits) - value
                squares = [each[0] * float((each[part][place] * error).sum()) ** 2 for each in found]  # type: ignore[operator]
                expected.append(sum(squares) / (2 * len(data)))
            close(evidence.width_deltas[kinds.index(kind)], torch.tensor(expected), rtol=1e-5, atol=1e-12)
        assert float(ranks.min()) > 0


def test_draws_of_a_row_do_not_depend_on_its_batch() -> None:
    data, scoring = encoded(4)
    whole, alone = scoring.collate(list(data)), [scoring.collate([row]) for row in data]
    assert len({len(each["input_ids"][0]) for each in alone}) > 1
    draw = functools.partial(row_uniform, step=5, device=torch.device("cpu"))
    close(draw((ROWS, 1), whole), torch.cat([draw((1, 1), each) for each in alone]))


def test_evidence_by_letters_is_that_of_the_letters() -> None:
    data = encode_prompts(items(2), TOKENIZER, classes=2)
    scoring = choice_scoring(data, TOKENIZER)
    model = blora(mode="ra", target_rank=2.0)
    measured(model, data, scoring, 1)
    model.eval()
    layers = model.base_model.adapted_layers()
    diagonals = [layer.blora_E["default"] for layer in layers]
    totals = [torch.zeros_like(each) for each in diagonals]
    for row in data:
        letters = list(scoring.logits.letter_ids)  # type: ignore[attr-defined]
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1, letters].log_softmax(0)
        for each in log_p:
            gradients = torch.autograd.grad(each, diagonals, retain_graph=True)
            for total, gradient, e in zip(totals, gradients, diagonals, strict=True):
                total += each.detach().exp() * (gradient * e.detach()).square()
    for layer, total in zip(layers, totals, strict=True):
        close(layer.evidence("default").rank_deltas, total / (2 * len(data)), rtol=1e-5, atol=1e-12)


def step_in_halves(loop: BayesLoop, trainer: Any, data: Any, scoring: Any) -> None:
    """One step of the loop on all rows, in two micro-batches."""
    loop.step_begin()
    for rows in torch.arange(len(data)).chunk(2):
        batch = scoring.collate([data[int(row)] for row in rows])
        (trainer.compute_loss(trainer.model, batch) / 2).backward()
    loop.before_optimizer_step()
    loop.step_end()


def test_the_sketch_of_components_is_that_of_gradients_of_rows_with_drawn_labels(tmp_path: Path) -> None:
    data, scoring = encoded(2)
    model = blora(mode="ra", target_rank=2.0)
    trainer = make_trainer(model, data, TOKENIZER, tmp_path)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0)
    step = BayesLoop(model, optimizer, total_steps=300).tuner.run_state().rotated_after  # type: ignore[union-attr]
    loop = BayesLoop(model, optimizer, total_steps=300, step=step)
    step_in_halves(loop, trainer, data, scoring)
    layers = model.base_model.adapted_layers()
    found = torch.cat([layer.evidence("default").rank_sketch for layer in layers], dim=1)
    model.eval()
    diagonals = [layer.blora_E["default"] for layer in layers]
    rows = []
    for row in data:
        losses = choice_losses(model, row)
        p = (-losses).exp().detach()
        # Of two choices the derivative by the difference of their logits has all of the information.
        scalar = (losses[0] - losses[1]) * p.prod().sqrt()
        gradients = torch.autograd.grad(scalar if row["label"] == 0 else -scalar, diagonals)
        rows.append(torch.cat([g * e.detach() for g, e in zip(gradients, diagonals, strict=True)]))
    dealt = deal(scoring.collate(list(data)), len(data), step)
    expected = torch.zeros(BUCKETS, len(rows[0])).index_add_(
        0, dealt.buckets, dealt.signs[:, None] * torch.stack(rows)
    )
    close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0


# Me-LoRA's deviations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_deviations_are_those_of_gradients_of_rows(core: Any, tmp_path: Path) -> None:
    data, scoring = encoded(3)
    prior = 1e-6  # draws are the mean then
    settings: dict[str, Any] = {"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "num_examples": 40}
    model = adapted(MeLoraConfig(core=core, variance="closed_form", prior_std=prior, kl_weight=0.5, **settings))
    trainer = make_trainer(model, data, TOKENIZER, tmp_path)
    loop = BayesLoop(model, torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0), total_steps=10)
    step_in_halves(loop, trainer, data, scoring)
    layers = model.base_model.adapted_layers()
    of_rows = row_gradients(model, data, [layer.melora_M["default"] for layer in layers])
    for place, layer in enumerate(layers):
        fisher = sum(gradients[place].square() for gradients in of_rows) / len(data)
        expected = 0.05 * fisher * 40 / 0.5
        assert float(expected.max()) > 0
        close(layer.melora_precision["default"], expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


# N and accumulation ---------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    """Keeps the gradients, and the weights that they were found at, of the last step."""

    def __init__(self, model: Any) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.trained.items()
        }
        self.weights = {name: p.detach().clone() for name, p in self.trained.items()}


def one_step(
    model: Any, data: Dataset, folder: Path, num_examples: int, steps: int = 1, optimizer: Any = None
) -> Seen:
    """Train steps over all rows in two micro-batches each, and return what the optimizer got in the last one."""
    trainer = make_trainer(
        model, data, TOKENIZER, folder, max_steps=steps, per_device_train_batch_size=len(data) // 2,
        gradient_accumulation_steps=2, max_grad_norm=0.0, learning_rate=1e-3, optim="sgd",
    )  # fmt: skip
    bayeslora.attach(trainer, num_examples=num_examples, optimizer=optimizer)
    seen = Seen(model)
    trainer.add_callback(seen)
    trainer.train()
    return seen


def divergence(model: Any) -> Tensor:
    """KL of Gaussians from the prior, summed over the layers' entries."""
    total = torch.zeros(())
    for layer in model.base_model.adapted_layers():
        mean, std, centre = layer.posterior("default")
        prior = torch.as_tensor(layer.prior("default") if hasattr(layer, "prior") else layer.prior_std["default"])
        total = total + (prior.log() - std.log() + (std**2 + (mean - centre) ** 2) / (2 * prior**2) - 0.5).sum()
    return total


def variational(method: str) -> Any:
    own = {"variance": "closed_form"} if method == "melora" else {}
    options: dict[str, Any] = {"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "kl_warmup": 0.0, **own}
    model = adapted(bayeslora.METHODS[method](**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "melora_M" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", ["melora", "blob"])
def test_a_divergence_weighs_one_nth_of_a_rows_loss(method: str, tmp_path: Path) -> None:
    data, _ = encoded(3)
    model = variational(method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_rows = row_gradients(model, data, list(trained.values()))
    penalty = torch.autograd.grad(divergence(model), list(trained.values()), allow_unused=True)
    n = 7
    with bayeslora.posterior_mean(model):  # no noise
        seen = one_step(model, data, tmp_path, n)
    for place, name in enumerate(trained):
        mean = torch.stack([gradients[place] for gradients in of_rows]).mean(0)
        gradient = penalty[place]
        expected = mean if gradient is None else mean + gradient / n
        close(seen.gradients[name], expected, atol=1e-6, rtol=1e-3)
    assert max(float(g.abs().max()) for g in penalty if g is not None) > 0.1


def test_the_gates_penalty_is_added_once_to_the_mean_over_rows(tmp_path: Path) -> None:
    data, _ = encoded(3)
    options = {"gates": "paper", "mode": "ra", "warmup_fraction": 0.3, "freeze_fraction": 0.0, "rank_penalty": 0.01}
    seen = one_step(blora(**options), data, tmp_path, 1000, steps=3)
    gradients, weights = seen.gradients, seen.weights
    again = blora(**options)
    for layer in again.base_model.adapted_layers():
        layer.start_learning("default")
    again.load_state_dict(weights, strict=False)
    trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
    again.eval()
    of_rows = row_gradients(again, data, list(trained.values()))
    touched = 0
    for place, (name, parameter) in enumerate(trained.items()):
        expected = torch.stack([each[place] for each in of_rows]).mean(0)
        if "blora_rank" in name:
            open_all = torch.sigmoid(parameter[1:]).cumprod(0).sum() * 0.01  # the first is never left out
            (penalty,) = torch.autograd.grad(open_all, parameter)
            expected = expected + penalty
            touched += 1
        close(gradients[name], expected, atol=1e-6, rtol=1e-3)
    assert touched == len(again.base_model.adapted_layers())


@pytest.mark.filterwarnings("ignore:IVON can move")
def test_ivons_posterior_is_that_of_n_rows(tmp_path: Path) -> None:
    data, _ = encoded(3)
    kept: list[Any] = []

    def build(*args: Any, **options: Any) -> Any:
        kept.append(bayeslora.IVON(*args, **options, hess_init=0.5, betas=(0.9, 0.9)))
        return kept[0]

    config = LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    model, at_draw = adapted(config), adapted(config)
    means = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    n = 50
    seen = one_step(model, data, tmp_path, n, optimizer=build)
    at_draw.load_state_dict(seen.weights, strict=False)
    trained = {name: p for name, p in at_draw.named_parameters() if p.requires_grad}
    of_rows = row_gradients(at_draw, data, list(trained.values()))
    options = ivon_oracle.Options(1e-3, n, 0.5, (0.9, 0.9), 0.0)
    for place, name in enumerate(trained):
        expected = torch.stack([gradients[place] for gradients in of_rows]).mean(0)
        close(seen.gradients[name], expected, atol=1e-6, rtol=1e-3)
        mean, drawn = float(means[name].flatten()[1]), float(seen.weights[name].flatten()[1])
        assert mean != drawn
        after = ivon_oracle.step(ivon_oracle.Weight(mean, 0.0, 0.5), [drawn], [float(expected.flatten()[1])], options)
        _, deviation = kept[0].posterior(seen.trained[name])
        assert float(deviation.flatten()[1]) == pytest.approx(ivon_oracle.deviation(after, options), rel=1e-4)
