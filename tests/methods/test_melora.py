"""Me-LoRA: each noise scope against weights that are written out, its numbers, its start and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import bayeslora
from bayeslora import BayesLoraError, MeLoraConfig, describe, parameter_groups
from bayeslora.posterior import Noise, standard_deviation
from tests.methods.reference import D_IN, D_OUT, RANK, Tiny, layers_of, seeded
from tests.methods.variational_models import CPU, X, config, melora_adapter, noise_shape, oracle, tiny
from tests.oracles import melora

CORES = ("melora", "melora-diagonal")


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


# Deviations that are set ---------------------------------------------------------------------------------------

DIAGONAL = ("full", "diagonal")
LABELS = torch.tensor([0, 2, 1])


def _step(model: Any, loop: bayeslora.BayesLoop, parts: int = 1) -> None:
    loop.step_begin()
    for x, labels in zip(X.chunk(parts), LABELS.chunk(parts), strict=True):
        loss = torch.nn.functional.cross_entropy(model(x).mean(1), labels)
        (loss / parts).backward()
    loop.before_optimizer_step()
    loop.step_end()  # without a step of the optimizer: the means stay where they are


def _set(core: str, **options: Any) -> tuple[Any, bayeslora.BayesLoop]:
    settings = {"core": core, "variance": "closed_form", "r": RANK, "num_examples": 40, "init_weights": False}
    adapter = MeLoraConfig(**{**settings, "target_modules": ["first", "second"], **options})
    model = seeded(lambda: get_peft_model(Tiny(), adapter)).train()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1))
    return model, bayeslora.BayesLoop(model, optimizer, total_steps=10)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("core", DIAGONAL)
def test_deviations_are_those_of_squared_gradients_of_single_rows(core: str, parts: int) -> None:
    prior = 1e-5  # draws are the mean then, whose gradients autograd gives row by row
    model, loop = _set(core, prior_std=prior, kl_weight=0.5)
    layers = layers_of(model)
    expected = [torch.zeros_like(layer.melora_M["default"]) for layer in layers]
    for x, label in zip(X, LABELS, strict=True):
        with bayeslora.posterior_mean(model):
            loss = torch.nn.functional.cross_entropy(model(x[None]).mean(1), label[None])
        gradients = torch.autograd.grad(loss, [layer.melora_M["default"] for layer in layers])
        expected = [known + g.square() / len(X) for known, g in zip(expected, gradients, strict=True)]
    _step(model, loop, parts)
    for layer, fisher in zip(layers, expected, strict=True):
        precision = 0.05 * fisher * 40 / 0.5
        assert precision.max() > 1e-3
        _close(layer.melora_precision["default"], precision, rtol=1e-3)
        _close(layer.posterior("default")[1], (precision + prior**-2) ** -0.5)


def test_a_new_adapter_has_the_priors_deviation_which_follows_its_rank() -> None:
    model, loop = _set("full", init_weights=True)
    for layer in layers_of(model):
        _close(layer.posterior("default")[1], torch.full((RANK, RANK), 0.5 / RANK**0.5))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "melora_A", "melora_B", "melora_M"
    }  # fmt: skip
    _step(model, loop)  # B is zero: the data say nothing about the core
    assert loop.statistics()["posterior_to_prior"] == pytest.approx(1.0)
    assert loop.statistics()["kl"] == pytest.approx(0.0, abs=1e-4)


def test_a_skipped_step_leaves_deviations_as_they_are() -> None:
    model, loop = _set("full")
    loop.step_begin()
    torch.nn.functional.cross_entropy(model(X).mean(1), LABELS).backward()
    loop.before_optimizer_step()
    loop.restore()
    before = [layer.melora_precision["default"].clone() for layer in layers_of(model)]
    assert not any(each.any() for each in before)
    _step(model, loop)
    assert all(layer.melora_precision["default"].any() for layer in layers_of(model))


def test_a_loss_scale_does_not_reach_deviations() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, loop = _set("full", prior_std=1e-5)
        loop.step_begin()
        (scale * torch.nn.functional.cross_entropy(model(X).mean(1), LABELS)).backward()
        loop.before_optimizer_step(scale)
        loop.step_end()
        found.append([layer.melora_precision["default"] for layer in layers_of(model)])
    for one, other in zip(*found, strict=True):
        _close(one, other)


@pytest.mark.parametrize("core", DIAGONAL)
def test_set_deviations_survive_a_file(core: str, tmp_path: Any) -> None:
    model, loop = _set(core)
    _step(model, loop)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path)
    for one, other in zip(layers_of(model), layers_of(again), strict=True):
        assert torch.equal(one.posterior("default")[1], other.posterior("default")[1])
    with bayeslora.sampling(model, seed=5), bayeslora.sampling(again, seed=5):
        assert torch.equal(model.eval()(X), again.eval()(X))


def test_labelled_tokens_count_where_the_loss_is_a_mean_over_them() -> None:
    model, loop = _set("full")
    tuner = model.base_model
    loop.step_begin()
    tuner._begin_pass(tuner.model, (), {"x": X, "labels": torch.tensor([[1, -100, 2], [3, 4, -100]])})
    assert tuner.run_state().terms.sum() == 4
    tuner._begin_pass(tuner.model, (X,), {"labels": LABELS})
    assert tuner.run_state().terms.sum() == 4 + len(X)


class _Labelled(Tiny):
    """Takes the labels of a row as Transformers' models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_several_labels_a_row_are_one_likelihood() -> None:
    """The loss is a mean over 40 rows and their labels, and a row's log-likelihood the sum over its labels."""
    bce, prior = torch.nn.functional.binary_cross_entropy_with_logits, 1e-5
    adapter = MeLoraConfig(
        core="full", variance="closed_form", r=RANK, num_examples=40 * 3, init_weights=False, prior_std=prior,
        target_modules=["first", "second"],
    )  # fmt: skip
    model: Any = seeded(lambda: get_peft_model(_Labelled(), adapter)).train()
    loop = bayeslora.BayesLoop(model, torch.optim.SGD(parameter_groups(model, lr=0.1)), total_steps=10)
    layers = layers_of(model)
    expected = [torch.zeros_like(layer.melora_M["default"]) for layer in layers]
    labels = (torch.arange(len(X) * 3).view(len(X), 3) % 4 == 0).float()
    for x, y in zip(X, labels, strict=True):
        with bayeslora.posterior_mean(model):
            loss = bce(model(x[None]).mean(1), y[None], reduction="sum")
        gradients = torch.autograd.grad(loss, [layer.melora_M["default"] for layer in layers])
        expected = [known + g.square() / len(X) for known, g in zip(expected, gradients, strict=True)]
    loop.step_begin()
    bce(model(X, labels=labels).mean(1), labels).backward()
    loop.before_optimizer_step()
    loop.step_end()
    for layer, fisher in zip(layers, expected, strict=True):
        _close(layer.melora_precision["default"], 0.05 * fisher * 40, rtol=1e-3)


# Token scope, the only one whose draw is not a weight ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("core", CORES)
def test_a_draw_for_each_token_equals_the_reference(core: str, kind: str) -> None:
    layer = layers_of(model := tiny(core, kind))[0]
    noise = Noise("token", 3, "first").normal_per_token((3, 5, RANK), CPU)
    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    expected = melora.token_forward(X, weight.detach(), layer.base_layer.bias, melora_adapter(layer), noise)
    with bayeslora.sampling(model, "token", seed=3):
        _close(layer(X), expected)


@pytest.mark.parametrize("core", CORES)
def test_tokens_and_examples_have_the_mean_and_variance_of_drawn_weights(core: str) -> None:
    layer = layers_of(tiny(core))[0]
    adapter, base = melora_adapter(layer), layer.base_layer.weight.detach()
    x, draws = X[:1, :1], 20_000
    eps = torch.randn(draws, *noise_shape(layer))
    cores = adapter.M + adapter.omega * eps
    u = (cores @ (adapter.A @ x[0, 0])) if cores.ndim == 3 else cores * (adapter.A @ x[0, 0])
    by_weight = x[0, 0] @ base.T + layer.base_layer.bias + adapter.scaling * u @ adapter.B.T
    deviation = by_weight.std(0)
    for scope in ("token", "example"):
        layer.noise, layer.is_controlled = Noise(scope), True
        with torch.no_grad():
            drawn = layer(x.expand(draws, 1, D_IN))[:, 0]
        assert ((drawn.mean(0) - by_weight.mean(0)) / deviation).abs().max() < 0.05
        assert (drawn.var(0) / deviation**2 - 1).abs().max() < 0.1
        covariance = torch.corrcoef(drawn.T) - torch.corrcoef(by_weight.T)
        assert covariance.abs().max() < 0.08


# Divergence and numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_the_divergence_is_the_references_sum_over_layers(core: str) -> None:
    model = tiny(core, prior_std=0.3, kl_weight=2.0, num_examples=40)
    expected = sum(melora.kl(melora_adapter(layer), 0.3) for layer in layers_of(model))
    assert model.base_model.kl().item() == pytest.approx(expected, rel=1e-4)
    assert model.base_model.penalty()["kl"].item() == pytest.approx(2.0 / 40 * expected, rel=1e-4)


@pytest.mark.parametrize("core", CORES)
def test_at_the_start_the_means_are_at_the_prior_and_the_divergence_is_that_of_the_scales(core: str) -> None:
    model = get_peft_model(Tiny(), config(core, prior_std=0.07, initial_std=0.07))
    assert model.base_model.kl().item() == pytest.approx(0.0, abs=1e-3)
    for layer in layers_of(model):
        _close(standard_deviation(layer.melora_rho["default"]), torch.full(noise_shape(layer), 0.07))


@pytest.mark.parametrize("core", CORES)
def test_every_draw_of_a_new_adapter_is_the_base_model_and_its_gradients_are_loras(core: str) -> None:
    base = seeded(Tiny)
    expected = base(X)
    model = get_peft_model(seeded(Tiny), config(core)).train()
    lora = get_peft_model(seeded(Tiny), LoraConfig(r=RANK, lora_alpha=6, target_modules=["first", "second"]))
    for _ in range(3):
        assert torch.equal(model(X), expected)
    for ours, theirs in zip(
        layers_of(model), (lora.base_model.model.first, lora.base_model.model.second), strict=True
    ):
        ours.melora_A["default"].data.copy_(theirs.lora_A["default"].weight.data)
    with bayeslora.posterior_mean(model):
        model(X).square().sum().backward()
    lora(X).square().sum().backward()
    for ours, theirs in zip(
        layers_of(model), (lora.base_model.model.first, lora.base_model.model.second), strict=True
    ):
        gradient = theirs.lora_B["default"].weight.grad
        assert gradient.abs().max() > 0.1
        _close(ours.melora_B["default"].grad, gradient, atol=1e-4)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_parameter_count_is_the_abstracts(core: str, rank: int) -> None:
    model = get_peft_model(Tiny(), config(core, r=rank))
    first, second = describe(model)
    diagonal = core == "melora-diagonal"
    assert first.parameters == melora.parameters(D_IN, D_OUT, rank, diagonal)
    assert second.parameters == melora.parameters(D_OUT, D_OUT, rank, diagonal)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == first.parameters + second.parameters
    assert [first.rank, first.initial_rank] == [rank, rank] and set(first.bits.values()) == {32}


def test_the_published_counts_of_7b_and_13b_come_out() -> None:
    for width, layers, vocabulary, expected in ((4096, 32, 32000, 4_491_392), (5120, 40, 32000, 6_860_928)):
        count = 2 * layers * melora.parameters(width, width, 8) + melora.parameters(width, vocabulary, 8)
        assert count == expected


# Groups, options, files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_variances_have_their_rate_and_only_the_two_factors_decay(core: str) -> None:
    model = tiny(core, variance_lr_factor=7.0, modules_to_save=["head"])
    names = {id(p): name.replace("base_model.model.", "") for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, lr=0.01, weight_decay=0.1):
        for p in group["params"]:
            found[names[id(p)]] = (group["bayeslora_role"], round(group["lr"], 6), group["weight_decay"])
    expected = {
        "head.modules_to_save.default.weight": ("weights", 0.01, 0.1),
        "head.modules_to_save.default.bias": ("weights", 0.01, 0.0),
    }
    for layer in ("first", "second"):
        expected |= {
            f"{layer}.melora_A.default": ("weights", 0.01, 0.1),
            f"{layer}.melora_B.default": ("weights", 0.01, 0.1),
            f"{layer}.melora_M.default": ("means", 0.01, 0.0),
            f"{layer}.melora_rho.default": ("variances", 0.07, 0.0),
        }
    assert found == expected


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"core": "x"}, "core is 'x', but must be 'full' or 'diagonal'"),
    ({"initial_std": 0.0}, "initial_std is 0.0, but must be above 0: use plain LoRA"),
    ({"prior_std": 0.0}, "prior_std is 0.0, but must be above 0"),
    ({"variance": "closed_form", "initial_std": 0.2}, "initial_std is given, but variance is 'closed_form'"),
    ({"variance": "closed_form", "noise_scope": "token"}, "noise_scope is 'token', but .* needs a core for each row"),
    (
        {"variance": "closed_form", "kl_weight": 0.0},
        "kl_weight is 0.0, but must be above 0 with variance=",
    ),
    ({"kl_weight": -1.0}, "kl_weight is -1.0, but must be at least 0"),
    ({"kl_warmup": 1.0}, "kl_warmup is 1.0, but must be at least 0 and below 1"),
    ({"num_examples": 0}, "num_examples is 0, but must be at least 1"),
    ({"noise_scope": "row"}, "noise_scope is 'row', but must be 'example', 'token' or 'batch'"),
    ({"variance_lr_factor": -1.0}, "variance_lr_factor is -1.0, but must be at least 0"),
    (
        {"noise_scope": "batch", "antithetic": True},
        "noise_scope is 'batch', but must be 'example' for antithetic noise",
    ),
    ({"r": 0}, "r is 0, but must be at least 1"),
    ({"rank_pattern": {"first": -1}}, "rank_pattern has -1 for .first., but must have whole numbers from 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_options_that_cannot_work_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message) as caught:
        MeLoraConfig(**{"target_modules": ["first"], **options})
    assert "\n" not in str(caught.value)


def test_the_configuration_survives_a_file(tmp_path: Any) -> None:
    options = config("melora-diagonal", prior_std=0.3, kl_weight=0.5, noise_scope="token", num_examples=123)
    options.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is MeLoraConfig and again.to_dict() == options.to_dict()


@pytest.mark.parametrize(
    ("options", "variance", "fade_in"),
    [
        ({}, "closed_form", [0.4, 0.66]),
        ({"cores": 3}, "closed_form", [0.4, 0.66]),
        ({"noise_fade_in": (0, 0)}, "closed_form", [0.0, 0.0]),
        ({"variance": "learned"}, "learned", None),
        ({"cores": 3, "variance": "none"}, "none", None),
        # What a closed form lacks, or would ignore, is a choice against it.
        ({"noise_scope": "token"}, "learned", None),
        ({"kl_weight": 0.0}, "learned", None),
        ({"initial_std": 0.1}, "learned", None),
        # Files from before these were the defaults.
        ({"peft_version": "0.18.0"}, "learned", None),
        ({"peft_version": "0.18.0", "initial_std": 0.35, "variance": "closed_form"}, "closed_form", None),
    ],
)
def test_variances_are_in_closed_form_unless_something_speaks_against_it(
    options: dict[str, Any], variance: str, fade_in: list[float] | None, tmp_path: Path
) -> None:
    config = MeLoraConfig(**options)
    assert (config.variance, config.noise_fade_in) == (variance, fade_in)
    config.save_pretrained(str(tmp_path))
    again: Any = MeLoraConfig.from_pretrained(str(tmp_path))
    assert (again.variance, again.noise_fade_in, again.initial_std) == (variance, fade_in, config.initial_std)


def test_gpt2_and_bert_adapt_through_all_doors(tiny_gpt2: PreTrainedModel, tiny_bert: PreTrainedModel) -> None:
    tokens = torch.arange(12).view(2, 6)
    for base, target in ((tiny_gpt2, ["c_attn"]), (tiny_bert, ["query", "key", "value"])):
        expected = base(input_ids=tokens).logits
        model = get_peft_model(base, MeLoraConfig(r=4, target_modules=target, variance="learned")).eval()
        _close(model(input_ids=tokens).logits, expected)
        for layer in layers_of(model):
            layer.melora_B["default"].data.normal_()
        model.train()
        assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
        model(input_ids=tokens).logits.sum().backward()
        layer = layers_of(model)[0]
        assert layer.melora_rho["default"].grad.abs().sum() > 0
        x = torch.randn(2, 3, layer.in_features)
        _close(layer.eval()(x), oracle(layer, x, [None, None]), atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, expected)


# Layers that run several times in a pass ------------------------------------------------------------------------


class _Twice(Tiny):
    """The second layer's output goes through it again, as through ALBERT's one block."""

    dropout = 0.3
    reentrant: bool | None = None  # of gradient checkpointing; None: without it

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).requires_grad_()
        for _ in range(2):
            if self.reentrant is None:
                hidden = self._block(hidden)
            else:
                hidden = checkpoint(self._block, hidden, use_reentrant=self.reentrant)
        return self.head(hidden)

    def _block(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.dropout(torch.tanh(2 * self.second(hidden)), self.dropout, self.training)


def _twice(adapter: Any, reentrant: bool | None = None) -> tuple[Any, bayeslora.BayesLoop]:
    model = seeded(lambda: get_peft_model(_Twice(), adapter)).train()
    model.base_model.model.reentrant = reentrant
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1))
    return model, bayeslora.BayesLoop(model, optimizer, total_steps=10)


TWICE: dict[str, Any] = {"r": RANK, "num_examples": 40, "target_modules": ["second"], "init_weights": False}


@pytest.mark.parametrize(
    "adapter",
    [
        MeLoraConfig(**TWICE, prior_std=0.5),
        MeLoraConfig(**TWICE, prior_std=0.5, cores=2, variance="closed_form"),
        MeLoraConfig(**TWICE, noise_scope="batch", variance="learned"),
        bayeslora.BlobConfig(**TWICE, noise_scope="example"),
    ],
)
def test_a_layer_that_runs_twice_has_one_draw_in_a_pass(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loop = _twice(adapter)
    drawn: list[Tensor] = []
    normal = Noise.normal
    monkeypatch.setattr(Noise, "normal", lambda *args: drawn.append(normal(*args)) or drawn[-1])
    for _ in range(2):
        loop.step_begin()
        for layer in layers_of(model):
            layer._fresh["default"].scale = 1.0
        model(X).square().mean().backward()
        loop.before_optimizer_step()
        loop.step_end()
    one, again, other, last = drawn
    assert torch.equal(one, again) and torch.equal(other, last)
    assert one.any() and not torch.equal(one, other)


def test_deviations_of_a_layer_that_runs_twice_are_of_both_calls_together() -> None:
    """A row's gradient by the core is the sum over the calls, squared after it."""
    prior = 1e-5  # draws are the mean then
    model, loop = _twice(MeLoraConfig(**TWICE, prior_std=prior))
    model.base_model.model.dropout = 0.0
    (layer,) = layers_of(model)
    fisher = torch.zeros_like(layer.melora_M["default"])
    for x, label in zip(X, LABELS, strict=True):
        with bayeslora.posterior_mean(model):
            loss = torch.nn.functional.cross_entropy(model(x[None]).mean(1), label[None])
        (gradient,) = torch.autograd.grad(loss, [layer.melora_M["default"]])
        fisher += gradient.square() / len(X)
    _step(model, loop)
    assert (0.05 * fisher * 40).max() > 1e-3
    _close(layer.melora_precision["default"], 0.05 * fisher * 40, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cores", [1, 2])
def test_checkpointing_a_layer_that_runs_twice_changes_nothing(cores: int, reentrant: bool) -> None:
    found = []
    for checkpointed in (None, reentrant):
        model, loop = _twice(MeLoraConfig(**TWICE, prior_std=0.5, cores=cores, variance="closed_form"), checkpointed)
        (layer,) = layers_of(model)
        loop.step_begin()
        layer.set_noise("default", 1.0)
        torch.manual_seed(3)
        torch.nn.functional.cross_entropy(model(X).mean(1), LABELS).backward()
        loop.before_optimizer_step()
        loop.step_end()
        found.append([layer.melora_precision["default"], layer.melora_A["default"].grad])
    assert found[0][0].any()
    for one, other in zip(*found, strict=True):
        _close(one, other)
