"""The adapted layer: equal to the one-page reference in every phase, and what all methods share around it."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bayeslora import BayesLoop, BayesLoraError, BLoraConfig, describe, parameter_groups
from bayeslora.methods import TrainingSetup
from bayeslora.methods.blora.gated_quantizers import Quantizing
from tests.methods.reference import (
    D_IN,
    FROZEN,
    LEARN,
    RANK,
    WARM_UP,
    Tiny,
    all_widths,
    layers_of,
    oracle_forward,
    randomize,
    seeded,
    set_widths,
    tiny_model,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias": {"bias": False},
    "Conv1D": {"kind": "conv1d"},
    "mode q": {"mode": "q"},
    "mode ra": {"mode": "ra"},
    "per channel": {"per_channel": True},
    "per channel, Conv1D": {"per_channel": True, "kind": "conv1d"},
    "quantized input": {"quantize_input": True},
    "quantized input, Conv1D, per channel": {"quantize_input": True, "kind": "conv1d", "per_channel": True},
    "rank-stabilised scaling": {"use_rslora": True, "lora_alpha": 3},
    "gates of the paper": {"gates": "paper"},
    "gates of the paper, mode q": {"gates": "paper", "mode": "q"},
    "gates of the paper, quantized input, Conv1D, per channel": {
        "gates": "paper",
        "quantize_input": True,
        "kind": "conv1d",
        "per_channel": True,
    },
}
PHASES = [(WARM_UP, True), (WARM_UP, False), (LEARN, True), (LEARN, False), (FROZEN, True), (FROZEN, False)]
X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-4, "rtol": 1e-4, **kwargs})


def _states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Forward and backward against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "training"), PHASES)
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_forward_and_gradients_equal_the_reference(options: dict[str, Any], phase: Any, training: bool) -> None:
    model = tiny_model(phase, **options).train(training)
    layer = layers_of(model)[0]
    x = X.clone().requires_grad_()
    actual, expected = layer(x), oracle_forward(layer, x)
    _close(actual, expected)

    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(8))
    learned = dict(layer.named_parameters())
    if phase == FROZEN:  # widths and ranges are final
        learned = {name: p for name, p in learned.items() if "quantizers" not in name}
    elif options.get("gates") != "paper":  # evidence chooses the width and the range of the base weight
        learned = {name: p for name, p in learned.items() if "log_weight_range" not in name}
    learned = {name: p for name, p in learned.items() if p.requires_grad}
    of_ours, of_reference = (
        torch.autograd.grad(output, [x, *learned.values()], direction, allow_unused=True)
        for output in (actual, expected)
    )
    for name, one, two in zip(["x", *learned], of_ours, of_reference, strict=True):
        one = torch.zeros_like(two) if one is None and two is not None else one
        two = torch.zeros_like(one) if two is None and one is not None else two
        if one is not None:
            _close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def test_the_comparison_above_meets_open_and_closed_gates_clipping_and_rounding() -> None:
    """The random state is not a corner in which the reference and any other function agree."""
    layer = layers_of(tiny_model(LEARN))[0]
    widths = set(layer.widths("default").values())
    assert len(widths) >= 3
    plain = layer.base_layer(X)
    assert (layer(X) - plain).abs().max() > 0.1
    assert (layer.base_layer.weight.abs() > layer.blora_quantizers["default"].log_weight_range.exp()).any()


def test_warm_up_is_plain_lora() -> None:
    model = tiny_model(WARM_UP)
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.blora_rank["default"].logits.fill_(6.0)
    a, b, e = (getattr(layer, f"blora_{name}")["default"] for name in "ABE")
    _close(layer(X), layer.base_layer(X) + 6 / RANK * (X @ a.T * e) @ b.T, atol=1e-6)


def test_a_new_adapter_changes_nothing_and_its_update_grows_from_b() -> None:
    base = seeded(Tiny).eval()
    expected = base(X)
    model = get_peft_model(copy.deepcopy(base), BLoraConfig(r=4, target_modules=["first", "second"]))
    _close(model.eval()(X), expected, atol=1e-6)
    model(X).sum().backward()
    assert all(layer.blora_B["default"].grad.abs().sum() > 0 for layer in layers_of(model))


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    model = tiny_model(WARM_UP, lora_dropout=0.5)
    layer = layers_of(model)[0]
    assert not torch.equal(layer(X), layer(X))
    with torch.no_grad():
        layer.blora_B["default"].zero_()
    assert torch.equal(layer(X), layer.base_layer(X))
    assert torch.equal(model.eval()(X), model(X))


# Noise ----------------------------------------------------------------------------------------------------------


def _learning_loop(**options: Any) -> tuple[nn.Module, BayesLoop]:
    model = tiny_model(LEARN, **{"gates": "paper", **options})
    loop = BayesLoop(model, torch.optim.AdamW(parameter_groups(model, lr=1e-3)), total_steps=100)
    return model, loop


def test_all_forward_passes_of_one_step_share_one_gate_sample_and_the_next_step_has_another() -> None:
    model, loop = _learning_loop()
    loop.step_begin()
    first = model(X)
    assert torch.equal(model(X), first)
    loop.before_optimizer_step()
    assert torch.equal(model(X), first)
    loop.step_end()
    loop.step_begin()
    assert not torch.allclose(model(X), first, atol=1e-4)


def test_noise_depends_on_seed_and_step_and_not_on_the_global_generator() -> None:
    noises = []
    for seed, step, torch_seed in ((0, 3, 0), (0, 3, 1), (1, 3, 0), (0, 4, 0)):
        model = tiny_model(LEARN, gates="paper")
        torch.manual_seed(torch_seed)
        before = torch.get_rng_state()
        model.base_model.begin(TrainingSetup(total_steps=100))
        model.base_model.step_begin(step, seed)
        assert torch.equal(torch.get_rng_state(), before)
        noises.append(torch.cat([layer.blora_quantizers["default"].noise for layer in layers_of(model)]))
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2]) and not torch.equal(noises[0], noises[3])
    assert all(0 < noise.min() and noise.max() < 1 for noise in noises)
    assert len(noises[0].unique()) == noises[0].numel()  # no two gates share a number


@pytest.mark.parametrize("phase", [LEARN, FROZEN])
def test_the_quantized_input_is_not_kept_for_the_backward_pass(phase: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(phase, quantize_input=True)
    layer = layers_of(model)[0]
    set_widths(layer, **{"in": 4})
    kept: list[weakref.ref[Tensor]] = []
    quantized = Quantizing.__call__

    def noted(self: Quantizing, kind: str, tensor: Tensor) -> Tensor:
        found = quantized(self, kind, tensor)
        if kind == "in":
            kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Quantizing, "__call__", noted)
    result = layer(X.clone().requires_grad_())
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None
    result.sum().backward()
    assert layer.blora_A["default"].grad.any()


def test_an_input_that_changes_before_the_backward_pass_is_an_error() -> None:
    layer = layers_of(tiny_model(FROZEN, quantize_input=True))[0]
    set_widths(layer, **{"in": 4})
    x = X.clone()
    result = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        result.sum().backward()


@pytest.mark.parametrize("announced", [True, False], ids=["with a loop", "without a loop"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, announced: bool) -> None:
    model, loop = _learning_loop()
    if announced:
        loop.step_begin()
    else:
        for layer in layers_of(model):
            layer.blora_quantizers["default"].noise = None
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("gates" in name and value.any() for name, value in gradients[0].items())
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_really_changes_the_evaluation_widths(fused: bool) -> None:
    """Fused optimizers write without raising a parameter's version, so no cache may rely on it."""
    model = tiny_model(
        LEARN, gates="paper", bit_penalty=1.0, gate_learning_rate=0.5, warmup_fraction=0.2, freeze_fraction=0.4
    )
    for layer in layers_of(model):
        all_widths(layer, 32)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.0), fused=fused)
    loop = BayesLoop(model, optimizer, total_steps=100, step=20)
    model.eval()
    opened = model(X)
    assert {bits for layer in describe(model) for bits in layer.bits.values()} == {32}
    for _ in range(30):
        model.train()
        loop.step_begin()
        (model(X).sum() * 0).backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
        model.eval()
        model(X)
    assert {bits for layer in describe(model) for bits in layer.bits.values()} == {2}
    assert not torch.allclose(model(X), opened, atol=1e-3)
    for layer in layers_of(model):
        _close(layer(torch.ones(1, layer.in_features)), oracle_forward(layer, torch.ones(1, layer.in_features)))


# Types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["evidence", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_and_ranges_stay_float32_when_the_model_is_cast(dtype: torch.dtype, gates: str) -> None:
    model = tiny_model(LEARN, gates=gates, per_channel=True)
    before = _states(model)
    model = model.to(dtype) if dtype == torch.bfloat16 else model.half()
    kept = [name for name in before if any(part in name for part in ("quantizers", "blora_rank", "evidence"))]
    assert len(kept) == 2 * (5 if gates == "paper" else 16)
    after = model.state_dict()
    for name in kept:
        assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name]), name
    assert all(layer.blora_A["default"].dtype == dtype for layer in layers_of(model))
    y = model(X.to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and y.isfinite().all()
    learned = "log_ranges" if gates == "evidence" else "gate_logits"
    for layer in layers_of(model):
        assert getattr(layer.blora_quantizers["default"], learned).grad.dtype == torch.float32


def test_autocast_to_bfloat16_leaves_quantizers_in_float32() -> None:
    model = tiny_model(LEARN)
    for layer in layers_of(model):
        all_widths(layer, 16)
    layer = layers_of(model)[0]
    layer.eval()
    quantizers = layer.blora_quantizers["default"]
    weight = layer.base_layer.weight
    expected = quantizers.quantized("weight", weight, quantizers.fixed())
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizers.quantized("weight", weight, quantizers.fixed())
        y = layer(X)
    assert inside.dtype == torch.float32 and torch.equal(inside, expected)
    assert not torch.equal(expected.bfloat16().float(), expected)
    exact = layer(X)
    assert (y.float() - exact).norm() / exact.norm() < 0.02


def test_autocast_trains_gates_in_float32() -> None:
    model, loop = _learning_loop()
    loop.step_begin()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).float().square().mean()
    loss.backward()
    for layer in layers_of(model):
        gradient = layer.blora_quantizers["default"].gate_logits.grad
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


def test_an_all_zero_factor_gives_finite_outputs_and_gradients() -> None:
    model = tiny_model(WARM_UP, init_weights=True)
    for layer in layers_of(model):
        with torch.no_grad():
            layer.blora_B["default"].zero_()
            layer.blora_E["default"].zero_()
        layer(torch.zeros(2, layer.in_features))
        layer.start_learning("default")
    y = model(torch.zeros(2, D_IN))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Disabling, merging and the cached weight -----------------------------------------------------------------------


@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
def test_disabling_the_adapter_gives_the_raw_base_model_bit_for_bit(phase: Any) -> None:
    base = seeded(Tiny).eval()
    model = tiny_model(phase).eval()
    adapted = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), adapted) and not torch.allclose(adapted, base(X), atol=1e-3)


def _mergeable(kind: str = "linear", **options: Any) -> nn.Module:
    """Weights at mixed widths, activations at 32 bits: what a merged weight can hold."""
    model = tiny_model(FROZEN, kind, **options).eval()
    for layer in layers_of(model):
        set_widths(layer, weight=8, A=4, E=8, B=4, A_out=32, E_out=32, out=32)
    return model


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_is_exact_and_unmerging_restores_the_base_weight_bit_for_bit(kind: str, safe: bool) -> None:
    model = _mergeable(kind)
    raw = [layer.base_layer.weight.detach().clone() for layer in layers_of(model)]
    expected = model(X)
    model.merge_adapter(safe_merge=safe)
    assert all(layer.merged for layer in layers_of(model))
    _close(model(X), expected, atol=1e-5)
    assert not any(torch.equal(a, layer.base_layer.weight) for a, layer in zip(raw, layers_of(model), strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, layer.base_layer.weight) for a, layer in zip(raw, layers_of(model), strict=True))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
def test_an_unquantized_adapter_merges_in_every_phase(phase: Any) -> None:
    model = tiny_model(phase, mode="ra").eval()
    expected = model(X)
    raw = [layer.base_layer.weight.detach().clone() for layer in layers_of(model)]
    model.merge_adapter(safe_merge=True)
    _close(model(X), expected, atol=1e-5)
    model.unmerge_adapter()
    for a, layer in zip(raw, layers_of(model), strict=True):
        _close(layer.base_layer.weight, a, atol=1e-6)


def test_merge_and_unload_leaves_a_plain_model_with_the_same_outputs() -> None:
    model = _mergeable()
    expected = model(X)
    plain = model.merge_and_unload()
    assert type(plain) is Tiny and type(plain.first) is nn.Linear
    _close(plain(X), expected, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_while_activations_are_quantized_and_nothing_is_half_merged(merge: str) -> None:
    model = _mergeable()
    set_widths(layers_of(model)[1], out=8)
    expected = model(X)
    with pytest.raises(BayesLoraError, match=r"quantizes activations .*'out': 8.*allow_inexact_merge"):
        getattr(model, merge)()
    assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(model(X), expected)


def test_merging_a_named_adapter_that_quantizes_activations_is_refused_before_any_layer_is_merged() -> None:
    model = _mergeable()
    set_widths(layers_of(model)[1], out=8)
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first", "second"], mode="ra"))
    model.set_adapter("other")
    with pytest.raises(BayesLoraError, match="quantizes activations"):
        model.merge_adapter(adapter_names=["default"])
    assert not any(layer.merged for layer in layers_of(model))


def test_an_inexact_merge_happens_when_it_is_asked_for() -> None:
    model = _mergeable(allow_inexact_merge=True)
    for layer in layers_of(model):
        set_widths(layer, out=8)
    raw = [layer.base_layer.weight.detach().clone() for layer in layers_of(model)]
    expected = model(X)
    model.merge_adapter()
    assert 0 < (model(X) - expected).abs().max() < 0.5
    model.unmerge_adapter()
    assert all(torch.equal(a, layer.base_layer.weight) for a, layer in zip(raw, layers_of(model), strict=True))


def test_safe_merging_refuses_a_broken_adapter() -> None:
    model = _mergeable()
    with torch.no_grad():
        layers_of(model)[0].blora_B["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)


def test_the_frozen_base_weight_is_rounded_once_and_again_after_whatever_changes_it() -> None:
    model = tiny_model(FROZEN).eval()
    layer = layers_of(model)[0]
    all_widths(layer, 4)

    def current() -> Tensor:
        layer(X)
        return layer.frozen_weight.cached[1]

    first = current()
    assert current() is first
    _close(layer(X), oracle_forward(layer, X))

    other = copy.deepcopy(model.state_dict())
    key = next(name for name in other if "first" in name and name.endswith("log_weight_range"))
    other[key] -= 0.5
    model.load_state_dict(other)
    assert not torch.equal(current(), first)
    _close(layer(X), oracle_forward(layer, X))

    other = copy.deepcopy(model.state_dict())
    other[next(name for name in other if "first" in name and name.endswith("base_layer.weight"))] *= 1.7
    model.load_state_dict(other)
    _close(layer(X), oracle_forward(layer, X))

    before = layer(X)
    model.to(torch.bfloat16)
    layer(X.bfloat16())
    assert layer.frozen_weight.cached[1].dtype == torch.bfloat16
    model.to(torch.float32)
    assert layer(X).dtype == torch.float32
    _close(layer(X), oracle_forward(layer, X))
    assert (layer(X) - before).norm() / before.norm() < 0.3

    set_widths(layer, weight=2)
    _close(layer(X), oracle_forward(layer, X))


def test_deep_copies_do_not_share_state() -> None:
    model = tiny_model(FROZEN).eval()
    expected = model(X)
    copied = copy.deepcopy(model)
    for layer in layers_of(copied):
        all_widths(layer, 2)
    assert not torch.allclose(copied(X), expected, atol=1e-3)
    assert torch.equal(model(X), expected)


# Several adapters -----------------------------------------------------------------------------------------------


def _two_adapters(**options: Any) -> nn.Module:
    model = tiny_model(FROZEN, **options)
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first"], init_weights=False, mode="q"))
    generator = torch.Generator().manual_seed(11)
    for layer in model.base_model.adapted_layers("other"):
        randomize(layer, generator, FROZEN, "other")
    return model.eval()


def test_switching_adapters_gives_each_its_own_function() -> None:
    model = _two_adapters()
    first, second = layers_of(model)
    model.set_adapter("other")
    _close(first(X), oracle_forward(first, X, "other"))
    h = torch.tanh(first(X))
    assert torch.equal(second(h), second.base_layer(h))  # this layer does not have it
    model.set_adapter("default")
    _close(first(X), oracle_forward(first, X, "default"))
    assert [layer.rank for layer in describe(model, "other")] == [2]


def test_a_mixed_batch_gives_each_row_its_own_adapter_and_the_base_where_asked() -> None:
    model = _two_adapters()
    names = ["default", "__base__", "other"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(X[row : row + 1])
        else:
            model.set_adapter(name)
            alone = model(X[row : row + 1])
        _close(mixed[row : row + 1], alone, atol=1e-5)
    with pytest.raises(ValueError, match="nowhere"):
        model(X, adapter_names=["default", "nowhere", "other"])
    with pytest.raises(ValueError, match="2 and 3"):
        model(X, adapter_names=["default", "other"])


def test_two_active_adapters_that_quantize_are_an_error() -> None:
    model = _two_adapters()
    model.base_model.set_adapter(["default", "other"])
    text = re.escape(
        "adapters ['default', 'other'] each quantize the same base weight: activate one of them at a time"
    )
    with pytest.raises(BayesLoraError, match=text):
        model(X)
    for layer in layers_of(model):
        for config in layer.configs.values():
            config.allow_inexact_merge = True
    before = [layer.weight.clone() for layer in layers_of(model)]
    for merge in (model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(BayesLoraError, match=text):
            merge(adapter_names=["default", "other"])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(model), before, strict=True))
    model.merge_adapter(["default"])
    with pytest.raises(BayesLoraError, match=text):
        model.merge_adapter(["other"])


def test_two_active_adapters_that_do_not_quantize_add_up() -> None:
    model = tiny_model(FROZEN, mode="ra").eval()
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first"], init_weights=False, mode="ra"))
    layer = layers_of(model)[0]
    parts = []
    for name in ("default", "other"):
        model.set_adapter(name)
        parts.append(layer(X) - layer.base_layer(X))
    model.base_model.set_adapter(["default", "other"])
    _close(layer(X), layer.base_layer(X) + parts[0] + parts[1], atol=1e-5)


def test_an_adapter_added_to_a_model_in_evaluation_mode_does_not_sample() -> None:
    model = tiny_model(FROZEN).eval()
    config = BLoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.5, init_weights=False)
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert torch.equal(model(X), model(X))
    assert not torch.equal(model.train()(X), model(X))


def test_a_deleted_adapter_leaves_no_tensor_behind() -> None:
    model = _two_adapters()
    model.delete_adapter("other")
    assert not any(".other" in name for name in model.state_dict())
    assert model(X).isfinite().all()


# Targets --------------------------------------------------------------------------------------------------------


def test_an_embedding_is_refused_by_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)

    with pytest.raises(BayesLoraError, match="'words' is a Embedding, but BLoraConfig adapts linear layers"):
        get_peft_model(Words(), BLoraConfig(target_modules=["words"]))


# Compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "training"), PHASES[2:])
def test_a_compiled_model_equals_the_eager_one(phase: Any, training: bool) -> None:
    model = tiny_model(phase).train(training)
    model(X)  # reads phase and widths from their tensors
    expected = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    actual = compiled(X)
    _close(actual, expected, atol=1e-5)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(actual.sum(), parameters, allow_unused=True)
    eager = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for name, one, two in zip(names, ours, eager, strict=True):
        if two is not None:
            _close(torch.zeros_like(two) if one is None else one, two, msg=lambda t, name=name: f"{name}: {t}")
