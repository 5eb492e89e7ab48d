"""Evidence of B-LoRA's gates equals the reference's, and gathering it leaves no trace in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeslora import BayesLoop, BLoraConfig, parameter_groups
from bayeslora.methods.blora import layer as layer_module
from bayeslora.methods.blora import probe as probe_module
from bayeslora.methods.blora.evidence import MEASURED
from bayeslora.quantization import optimal_range, quantize
from tests.methods.reference import seeded
from tests.oracles import evidence as oracle

WIDTH, RANK, ROWS, TOKENS = 10, 4, 16, 5
IDS = torch.randint(1, 40, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
KINDS = ("weight", "in", "A", "E", "B", "A_out", "E_out", "out")
ACTIVATIONS = ("in", "A_out", "E_out", "out")


class OneLayer(nn.Module):
    """Embeddings, one layer to adapt, and a nonlinear head with `outputs` logits."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.read = nn.Linear(WIDTH, outputs)

    def head(self, hidden: Tensor) -> Tensor:
        return self.read(torch.tanh(hidden).mean(-2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.layer(self.embed(input_ids))))


def adapted(outputs: int, **options: Any) -> Any:
    """A model with random factors, during the warm-up."""
    config = BLoraConfig(
        r=RANK, lora_alpha=6, target_modules=["layer"], quantize_input=True, init_weights=False, **options
    )
    model = seeded(lambda: get_peft_model(OneLayer(outputs), config)).train()
    layer = layer_of(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.blora_E["default"].copy_(torch.rand(RANK, generator=generator) + 0.5)
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.adapted_layers()[0]


def start_learning(model: Any) -> None:
    """Begin the phase in which evidence is gathered, with every tensor at 32 bits."""
    for layer in model.base_model.adapted_layers():
        layer.start_learning("default")


def gathered(model: Any, call: Callable[[], Any], passes: int = 1) -> None:
    """Gather evidence in `passes` steps, before the first decision, of a run that moves no weight."""
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0)
    total = 300 * (passes + 1)
    schedule = BayesLoop(model, optimizer, total_steps=total).tuner.run_state().schedule
    first = schedule.decisions[0] - passes
    assert set(range(first, first + passes)) <= schedule.passes
    loop = BayesLoop(model, optimizer, total_steps=total, step=first)
    start_learning(model)
    for _ in range(passes):
        loop.step_begin()
        call()
        loop.step_end()


@pytest.fixture
def ranges_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search for each range once: passes over one batch, in which no weight moves, all find the same."""
    for module, name in ((layer_module, "optimal_range"), (probe_module, "optimal_ranges")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


def remembered(search: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def found(x: Tensor, *options: Any, **more: Any) -> Any:
        key = (tuple(x.shape), x.detach().numpy().tobytes(), options, *more.items())
        if key not in known:
            known[key] = search(x, *options, **more)
        return known[key]

    return found


def reference(model: Any, kind: str) -> tuple[dict[str, list[float]], list[float]]:
    """Δ of every kind of tensor at 2, 4 and 8 bits, and of every component."""
    layer = layer_of(model)
    tensors = {name: getattr(layer, f"blora_{name}")["default"].detach().clone() for name in "AEB"}
    tensors["weight"] = layer.base_layer.weight.detach()
    base, scaling = model.base_model.model, layer.scaling["default"]
    rows = base.embed(IDS).detach()
    seen = oracle.activations(rows, tensors, scaling)
    widths = {}
    for name in KINDS:
        value = seen[name] if name in seen else tensors[name]
        errors = [quantize(value, optimal_range(value, bits), bits).detach() - value.detach() for bits in MEASURED]
        widths[name] = [oracle.delta(base.head, rows, tensors, scaling, name, error, kind) for error in errors]
    components = [
        oracle.delta(base.head, rows, tensors, scaling, "E", oracle.component(tensors, i), kind) for i in range(RANK)
    ]
    return widths, components


def assert_as_reference(model: Any, kind: str, tolerance: float) -> None:
    evidence, quantizers = layer_of(model).evidence("default"), layer_of(model).quantizers("default")
    widths, components = reference(model, kind)
    for name in KINDS:
        found = evidence.width_deltas[quantizers.kinds.index(name)]
        expected = torch.tensor(widths[name])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(evidence.rank_deltas, torch.tensor(components), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("outputs", "kind"), [(2, "classification"), (1, "regression")])
def test_evidence_of_two_classes_and_of_regression_is_exact(outputs: int, kind: str) -> None:
    model = adapted(outputs)
    gathered(model, lambda: model(input_ids=IDS))
    assert_as_reference(model, kind, 1e-5)


@pytest.mark.usefixtures("ranges_found_once")
def test_evidence_of_three_classes_is_exact_in_the_mean_over_drawn_labels() -> None:
    model = adapted(3)
    gathered(model, lambda: model(input_ids=IDS), passes=200)
    assert_as_reference(model, "classification", 0.1)


@pytest.mark.usefixtures("ranges_found_once")
@pytest.mark.parametrize("outputs", [2, 3])
def test_evidence_of_a_component_is_the_divergence_of_the_predictions_without_it(outputs: int) -> None:
    model = adapted(outputs)
    layer = layer_of(model)
    with torch.no_grad():
        layer.blora_E["default"].copy_(torch.tensor([2e-3, 1.0, 1.0, 1e-3]))
    gathered(model, lambda: model(input_ids=IDS), passes=1 if outputs == 2 else 800)
    found = layer.evidence("default").rank_deltas.tolist()
    model = model.double().eval()
    before = torch.log_softmax(model(input_ids=IDS).logits, -1)
    for index, tolerance in ((0, 0.05), (3, 0.05)):
        diagonal = layer.blora_E["default"].detach().clone()
        with torch.no_grad():
            layer.blora_E["default"][index] = 0.0
            after = torch.log_softmax(model(input_ids=IDS).logits, -1)
            layer.blora_E["default"].copy_(diagonal)
        divergence = (before.exp() * (before - after)).sum(-1).mean().item()
        assert found[index] == pytest.approx(divergence, rel=tolerance, abs=0)


def test_evidence_of_a_narrow_weight_is_the_divergence_of_the_predictions_with_it() -> None:
    model = adapted(2)
    layer = layer_of(model)
    gathered(model, lambda: model(input_ids=IDS))
    weight = layer.base_layer.weight
    found = layer.evidence("default").width_deltas[0, MEASURED.index(8)].item()
    narrow = quantize(weight, optimal_range(weight, 8), 8).detach().double()
    model = model.double().eval()
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=IDS).logits, -1)
        layer.base_layer.weight.copy_(narrow)
        after = torch.log_softmax(model(input_ids=IDS).logits, -1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert found == pytest.approx(divergence, rel=0.05)


def test_closed_components_are_measured_as_open_ones_are() -> None:
    """A component that is closed can be opened again only if its evidence is known."""
    model = adapted(2)
    layer = layer_of(model)
    layer.rank_gates("default").set_open(torch.tensor([True, False, True, False]))
    gathered(model, lambda: model(input_ids=IDS))
    assert (layer.evidence("default").rank_deltas > 0).all()


# What a pass leaves alone ---------------------------------------------------------------------------------------


def test_a_pass_leaves_gradients_parameters_random_state_and_modes_as_they_were() -> None:
    model = adapted(3, lora_dropout=0.5)
    model.base_model.model.read.eval()
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0)
    loop = BayesLoop(model, optimizer, total_steps=400)
    start_learning(model)
    step = loop.tuner.run_state().schedule.decisions[0]
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs, gradients = [], []
    for measures in (False, True):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25) if p.requires_grad else None
        torch.manual_seed(5)
        loop.tuner.step_begin(step if measures else step - 100, 0)
        logits = model(input_ids=IDS).logits
        assert bool(loop.tuner.run_state().found) == measures
        outputs.append((logits.detach(), torch.get_rng_state()))
        logits.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    for one, two in zip(*gradients, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert layer_of(model).probe is None


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model = adapted(2)
    with pytest.raises(IndexError):
        gathered(model, lambda: model(input_ids=IDS + 1000))
    assert layer_of(model).probe is None and model.training


@pytest.mark.parametrize("how", ["evaluation", "without gradients"])
def test_nothing_is_measured_outside_training(how: str) -> None:
    model = adapted(2)

    def call() -> None:
        if how == "evaluation":
            model.eval()
        with torch.no_grad() if how == "without gradients" else contextlib.nullcontext():
            model(input_ids=IDS)
        model.train()
        assert not model.base_model.run_state().found
        model(input_ids=IDS)

    gathered(model, call)


def test_micro_batches_are_pooled() -> None:
    """Weights and components of four parts have the evidence of the whole; the ranges of activations differ."""
    found = []
    for parts in (1, 4):
        model = adapted(2)
        gathered(model, lambda m=model, n=parts: [m(input_ids=part) for part in IDS.chunk(n)])
        evidence = layer_of(model).evidence("default")
        kinds = layer_of(model).quantizers("default").kinds
        rows = [kinds.index(kind) for kind in KINDS if kind not in ACTIVATIONS]
        assert evidence.terms == ROWS and evidence.passes == parts
        found.append((evidence.width_deltas[rows], evidence.rank_deltas))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


# Models ---------------------------------------------------------------------------------------------------------


def test_labels_change_nothing_where_every_row_has_one_prediction() -> None:
    found = []
    for extra in ({}, {"labels": torch.arange(ROWS) % 3}):
        model = adapted(3)
        gathered(model, lambda m=model, e=extra: m(input_ids=IDS, **e))
        found.append(layer_of(model).evidence("default").rank_deltas.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_language_model_counts_tokens(tiny_llama: PreTrainedModel, with_labels: bool) -> None:
    config = BLoraConfig(r=2, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama, config).train()
    labels = IDS.clone()
    labels[:, 0] = -100
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    given = {"labels": labels} if with_labels else {}
    gathered(model, lambda: model(input_ids=IDS, attention_mask=mask, **given))
    # Nothing follows the last token; of the row that begins with two of padding one fewer is predicted.
    expected = ROWS * (TOKENS - 1) - (0 if with_labels else 1)
    for layer in model.base_model.adapted_layers():
        assert layer.evidence("default").terms == expected
        assert (layer.evidence("default").rank_deltas > 0).all()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_relative_positions_and_shared_projections_are_measured(tiny_deberta: PreTrainedModel, rows: int) -> None:
    config = BLoraConfig(r=2, target_modules=["query_proj", "key_proj"], init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(tiny_deberta, config).train()
    gathered(model, lambda: model(input_ids=IDS[:rows], labels=torch.zeros(rows, dtype=torch.long)))
    for layer in model.base_model.adapted_layers():
        evidence = layer.evidence("default")
        assert evidence.terms == rows and evidence.passes == 1
        assert evidence.width_deltas.isfinite().all() and (evidence.rank_deltas > 0).all()


class CalledTwice(OneLayer):
    """One layer runs twice, as ALBERT's do, and another one never."""

    def __init__(self) -> None:
        super().__init__(2)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.layer(3 * torch.tanh(self.layer(self.embed(input_ids))))))


def test_evidence_of_a_layer_called_twice_is_that_of_both_calls_together() -> None:
    config = BLoraConfig(r=RANK, target_modules=["layer", "unused"], init_weights=False, quantize_input=True)
    model = seeded(lambda: get_peft_model(CalledTwice(), config)).eval()  # training holds E
    layer = layer_of(model)
    diagonal, kinds = layer.blora_E["default"], layer.quantizers("default").kinds
    weight_error = quantize(layer.weight, layer.weight_range("default", "weight", 2), 2) - layer.weight
    base = model.base_model.model
    first_inputs = base.embed(IDS).detach()
    second_inputs = 3 * torch.tanh(layer(first_inputs)).detach()
    components, weight, inputs = torch.zeros(RANK), 0.0, 0.0
    for row, first, second in zip(IDS, first_inputs, second_inputs, strict=True):
        for parameter in (layer.base_layer.weight, diagonal):
            parameter.requires_grad_()
        shifts = [torch.zeros_like(first, requires_grad=True), torch.zeros_like(first, requires_grad=True)]
        hidden = 3 * torch.tanh(layer(base.embed(row) + shifts[0]))
        logits = base.head(layer(hidden + shifts[1]))
        errors = [
            quantize(x, optimal_range(whole, 2), 2).detach() - x
            for x, whole in ((first, first_inputs), (second, second_inputs))
        ]
        for probability, loss in oracle.losses(logits, "classification"):
            wanted = [diagonal, layer.base_layer.weight, *shifts]
            by_e, by_w, *by_x = torch.autograd.grad(loss, wanted, retain_graph=True)
            components += probability * (by_e * diagonal.detach()).square() / (2 * ROWS)
            weight += float(probability * (by_w * weight_error).sum().square() / (2 * ROWS))
            along = sum((gradient * error).sum() for gradient, error in zip(by_x, errors, strict=True))
            inputs += float(probability * along.square() / (2 * ROWS))
    gathered(model.train(), lambda: model(input_ids=IDS))
    used, unused = (each.evidence("default") for each in model.base_model.adapted_layers())
    torch.testing.assert_close(used.rank_deltas, components.detach(), rtol=1e-3, atol=0)
    assert float(used.width_deltas[kinds.index("weight"), 0]) == pytest.approx(weight, rel=1e-3)
    assert float(used.width_deltas[kinds.index("in"), 0]) == pytest.approx(inputs, rel=0.01)
    widest = max(float(optimal_range(x, 2)) for x in (first_inputs, second_inputs))
    assert float(used.ranges[kinds.index("in"), 0] / used.passes) == pytest.approx(widest, rel=1e-4)
    assert used.passes == 1
    assert not unused.rank_deltas.any() and not unused.width_deltas.any() and unused.passes == 0


class Shared(OneLayer):
    """The layer's input is one vector for all rows, as that of relative positions is."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        shared = self.layer(self.embed.weight[:1].unsqueeze(0))  # (1, 1, WIDTH)
        return SimpleNamespace(logits=self.head(torch.tanh(shared) * self.embed(input_ids)))


@pytest.mark.parametrize("outputs", [2, 3])
def test_a_tensor_that_all_rows_share_counts_each_row_once(outputs: int) -> None:
    """The mean over rows of the squared derivative, and not the square of the mean."""
    config = BLoraConfig(r=RANK, target_modules=["layer"], mode="ra", init_weights=False)
    model = seeded(lambda: get_peft_model(Shared(outputs), config)).train()
    gathered(model, lambda: model(input_ids=IDS), passes=301)
    layer = layer_of(model.eval())  # training holds E
    diagonal = layer.blora_E["default"]
    expected = torch.zeros(RANK)
    for row in IDS:
        logits = model(input_ids=row.unsqueeze(0)).logits[0]
        for probability, loss in oracle.losses(logits, "classification"):
            (gradient,) = torch.autograd.grad(loss, diagonal, retain_graph=True)
            expected += probability * (gradient * diagonal.detach()).square() / (2 * ROWS)
    torch.testing.assert_close(layer.evidence("default").rank_deltas, expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evidence_under_autocast_is_that_of_float32_nearly(dtype: torch.dtype) -> None:
    found = []
    for enabled in (False, True):
        model = adapted(2)

        def call(model: Any = model, enabled: bool = enabled) -> None:
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                model(input_ids=IDS)

        gathered(model, call)
        found.append(layer_of(model).evidence("default").rank_deltas.clone())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0)
