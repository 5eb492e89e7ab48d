"""B-LoRA itself: its options, penalty, phases, numbers and files."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, describe, parameter_groups, shrink
from bayeslora.methods import TrainingSetup
from bayeslora.training.hooks import cost_in
from tests.methods.reference import (
    D_IN,
    D_OUT,
    FROZEN,
    LEARN,
    RANK,
    WARM_UP,
    Tiny,
    all_widths,
    layers_of,
    oracle_forward,
    seeded,
    set_widths,
    tiny_model,
    train_steps,
)
from tests.oracles import blora as oracle
from tests.processes import run_code

X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))
GATES = ("evidence", "paper")
KINDS = ["weight", "A", "E", "B", "A_out", "E_out", "out"]


# Options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is 0, but must be at least 1"),
    ({"r": -3}, "r is -3, but must be at least 1"),
    ({"mode": "x"}, "mode is 'x', but must be 'q\\+ra', 'q' or 'ra'"),
    ({"bit_weighting": "x"}, "bit_weighting is 'x', but must be 'const', 'bits' or 'bops'"),
    ({"calibration": "x"}, "calibration is 'x', but must be 'mse' or 'absmax'"),
    ({"bias": "lora_only"}, "bias is 'lora_only', but must be 'none' or 'all'"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0, but must be at least 0 and below 1"),
    ({"lora_dropout": -0.1}, "lora_dropout is -0.1, but must be at least 0 and below 1"),
    ({"lora_alpha": 1e308}, r"lora_alpha is 1e\+308, but must be at most 1e\+30"),
    ({"alpha_pattern": {"a": float("nan")}}, r"lora_alpha is nan, but must be at most 1e\+30"),
    ({"bit_penalty": -1.0}, "bit_penalty is -1.0, but must be at least 0"),
    ({"rank_penalty": -1.0}, "rank_penalty is -1.0, but must be at least 0"),
    ({"target_bops": 0.0}, "target_bops is 0.0, but must be between 0 and 1"),
    ({"target_bops": 30}, "target_bops is 30, but must be between 0 and 1"),
    ({"target_bytes": 1.5}, "target_bytes is 1.5, but must be between 0 and 1"),
    ({"target_rank": 0.0}, "target_rank is 0.0, but must be above 0 and below 8, the initial rank"),
    ({"target_rank": 4, "r": 4}, "target_rank is 4, but must be above 0 and below 4, the initial rank"),
    ({"target_rank": 2, "mode": "q"}, "target_rank is given, but mode 'q' keeps all ranks: drop it, or use 'q\\+ra'"),
    ({"target_bytes": 0.3, "mode": "ra"}, "target_bytes is given, but mode 'ra' has no bit-widths: drop it, or use"),
    ({"target_bytes": 0.3, "target_bops": 0.3}, "but widths have one price: drop one of them"),
    ({"target_bops": 0.3, "gates": "paper"}, "target_bops is given, but gates='paper' follow penalties: use gates="),
    ({"target_rank": 3, "gates": "paper"}, "target_rank is given, but gates='paper' follow penalties: use gates="),
    ({"bops_price": -1.0}, "bops_price is -1.0, but must be at least 0"),
    ({"rank_price": -1.0}, "rank_price is -1.0, but must be at least 0"),
    ({"gates": "x"}, "gates is 'x', but must be 'evidence' or 'paper'"),
    ({"target_bops": 0.3, "mode": "ra"}, "target_bops is given, but mode 'ra' has no bit-widths: drop it, or use"),
    ({"quantize_input": True, "mode": "ra"}, "quantize_input is given, but mode 'ra' has no bit-widths"),
    ({"initial_bit_logits": [1.0, 2.0]}, r"initial_bit_logits is \[1.0, 2.0\], but must be 4 numbers"),
    ({"fixed_bits": {"wieght": 8}}, "fixed_bits names 'wieght', but the kinds of tensors are weight, A, E, B"),
    ({"fixed_bits": {"A": 3}}, "fixed_bits gives A 3 bits, but widths are 2, 4, 8, 16, 32: choose one"),
    ({"fixed_bits": {"in": 8}}, "fixed_bits names in, but the input is not quantized: set quantize_input=True"),
    ({"fixed_bits": {"A": 8}, "mode": "ra"}, "fixed_bits is given, but mode 'ra' has no bit-widths"),
    (
        {"fixed_bits": dict.fromkeys(KINDS, 8), "mode": "q"},
        "names every kind of tensor, but mode 'q' must learn a width",
    ),
    ({"warmup_fraction": 0.6, "freeze_fraction": 0.4}, "must leave steps for the gates: keep their sum below 1"),
    ({"warmup_fraction": -0.1}, "warmup_fraction and freeze_fraction are -0.1 and \\S+, but must leave steps"),
    ({"freeze_fraction": 1.5}, "must leave steps"),
    ({"layers_pattern": "h"}, "layers_pattern is given alone, but belongs to layers_to_transform"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_options_that_cannot_work_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message) as caught:
        BLoraConfig(**{"target_modules": ["first"], **options})
    assert "\n" not in str(caught.value)


def test_fields_shared_with_lora_have_its_names_and_meaning() -> None:
    shared = {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.0,
        "target_modules": ["first"],
        "modules_to_save": ["head"],
        "exclude_modules": ["second"],
        "use_rslora": True,
        "bias": "none",
        "rank_pattern": {"first": 2},
        "alpha_pattern": {"first": 6},
    }
    ours = get_peft_model(seeded(Tiny), BLoraConfig(**shared))
    lora = get_peft_model(seeded(Tiny), LoraConfig(**shared))
    (layer,), theirs = layers_of(ours), lora.base_model.model.first
    assert type(layer).__name__ == type(theirs).__name__ == "Linear"
    assert layer.blora_A["default"].shape == theirs.lora_A["default"].weight.shape == (2, D_IN)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad and "lora_" not in n} for m in (ours, lora)]
    assert trained[0] == trained[1] != set()


def test_a_cut_rank_keeps_the_scaling_it_was_trained_with() -> None:
    model = get_peft_model(
        Tiny(), BLoraConfig(r=8, lora_alpha=16, target_modules=["first"], rank_pattern={"first": 3})
    )
    (layer,) = layers_of(model)
    assert layer.scaling["default"] == 2.0
    assert layer.blora_A["default"].shape == (3, D_IN)


def test_the_configuration_survives_a_file(tmp_path: Path) -> None:
    config = BLoraConfig(
        r=5, target_modules=["first"], mode="q", target_bops=0.25, initial_bit_logits=[3.0, 2.0, 1.0, 0.5],
        fixed_bits={"weight": 8},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is BLoraConfig and again.peft_type is PeftType.BLORA is PeftType("BLORA")
    assert again.to_dict() == config.to_dict()


def test_a_file_that_names_no_gates_has_those_of_the_paper(tmp_path: Path) -> None:
    config = BLoraConfig(target_modules=["first"])
    assert config.gates == "evidence"
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).gates == "evidence"
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    del saved["gates"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    assert PeftConfig.from_pretrained(tmp_path).gates == "paper"


def test_importing_twice_registers_once() -> None:
    members = list(PeftType)
    bayeslora._peft.register("blora", BLoraConfig, bayeslora.methods.BLoraModel)
    assert list(PeftType) == members and members.count("BLORA") == 1


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(Tiny(), BLoraConfig(target_modules=["nowhere"]))


# Penalty --------------------------------------------------------------------------------------------------------


def _macs(layer: Any, rank: int = RANK) -> list[int]:
    """Multiply-accumulates a token of what each quantized tensor is an operand of, written out by hand."""
    d_in, d_out = layer.in_features, layer.out_features
    return [d_in * d_out, rank * d_in, rank, rank * d_out, rank, rank * d_out, d_out * d_out]


@pytest.mark.parametrize("weighting", ["const", "bits", "bops"])
def test_the_penalty_and_its_gradient_equal_the_reference(weighting: str) -> None:
    model = tiny_model(LEARN, gates="paper", bit_weighting=weighting, bit_penalty=0.3, rank_penalty=0.7)
    terms = model.base_model.penalty()
    assert set(terms) == {"bits", "rank"}
    layers = layers_of(model)
    gates = [layer.blora_quantizers["default"].gate_logits for layer in layers]
    ranks = [layer.blora_rank["default"].logits for layer in layers]
    macs = torch.tensor([m for layer in layers for m in _macs(layer)], dtype=torch.float32)
    bits = 0.3 * oracle.bit_penalty(torch.cat(gates), oracle.bit_weights(weighting, macs))
    rank = 0.7 * sum(oracle.rank_penalty(logits) for logits in ranks)
    torch.testing.assert_close(terms["bits"], bits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["rank"], rank, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(sum(terms.values()), [*gates, *ranks])
    reference = torch.autograd.grad(bits + rank, [*gates, *ranks])
    for one, two in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_penalty_of_closed_and_of_open_gates_is_known() -> None:
    """Closed everywhere it is 0 bits and one rank a layer, open everywhere 4 terms a quantizer and all ranks."""
    model = tiny_model(LEARN, gates="paper", bit_penalty=1.0, rank_penalty=1.0)
    for logit, bits, ranks in ((-50.0, 0.0, 2.0), (50.0, 2 * 7 * 4.0, 2.0 * RANK)):
        for layer in layers_of(model):
            layer.blora_quantizers["default"].gate_logits.data.fill_(logit)
            layer.blora_rank["default"].logits.data.fill_(logit)
        terms = model.base_model.penalty()
        assert terms["bits"].item() == pytest.approx(bits, abs=1e-5)
        assert terms["rank"].item() == pytest.approx(ranks, abs=1e-5)


@pytest.mark.parametrize(("mode", "terms"), [("q", {"bits"}), ("ra", {"rank"}), ("q+ra", {"bits", "rank"})])
def test_only_what_the_mode_learns_is_penalised_and_only_while_gates_learn(mode: str, terms: set[str]) -> None:
    assert set(tiny_model(LEARN, gates="paper", mode=mode).base_model.penalty()) == terms
    assert tiny_model(WARM_UP, gates="paper", mode=mode).base_model.penalty() == {}
    assert tiny_model(FROZEN, gates="paper", mode=mode).base_model.penalty() == {}


# Learning rates and phases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["evidence", "paper"])
def test_parameter_groups_name_every_role_and_decay_only_matrices(gates: str) -> None:
    model = tiny_model(LEARN, gates=gates, modules_to_save=["head"], lora_alpha=6)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    found = {}
    for group in groups:
        for p in group["params"]:
            found[names[id(p)].replace("base_model.model.", "")] = (group["bayeslora_role"], group["weight_decay"])
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    expected = {
        "head.modules_to_save.default.weight": ("weights", 0.1),
        "head.modules_to_save.default.bias": ("weights", 0.0),
    }
    for layer in ("first", "second"):
        expected |= {
            f"{layer}.blora_A.default": ("weights", 0.1),
            f"{layer}.blora_B.default": ("weights", 0.1),
            f"{layer}.blora_E.default": ("weights", 0.0),
            f"{layer}.blora_quantizers.default.log_ranges": ("ranges", 0.0),
        }
        if gates == "paper":  # evidence sets the others, which are no parameters then
            expected |= {
                f"{layer}.blora_rank.default.logits": ("rank gates", 0.0),
                f"{layer}.blora_quantizers.default.gates": ("bit gates", 0.0),
                f"{layer}.blora_quantizers.default.log_weight_range": ("weight ranges", 0.0),
            }
    assert found == expected
    assert all(group["lr"] == 1e-3 for group in groups)


def test_parameter_groups_of_a_model_without_our_adapters_are_the_usual_two() -> None:
    groups = parameter_groups(Tiny(), lr=1.0, weight_decay=0.5)
    assert sorted((len(g["params"]), g["weight_decay"], g["bayeslora_role"]) for g in groups) == [
        (3, 0.0, "weights"),
        (3, 0.5, "weights"),
    ]


def test_phases_follow_the_fractions_and_gates_move_only_in_theirs() -> None:
    model = tiny_model(WARM_UP, gates="paper", warmup_fraction=0.2, freeze_fraction=0.3, range_learning_rate=0.25)
    tuner = model.base_model
    tuner.begin(TrainingSetup(total_steps=10))
    phases, rates = [], {role: [] for role in ("bit gates", "rank gates", "weight ranges", "ranges", "weights")}
    for step in range(10):
        phases.append(int(layers_of(model)[0].blora_progress["default"].phase))
        for role, values in rates.items():
            values.append(tuner.rate_of(role, step))
        model(X)
        tuner.step_end(step)
    assert phases == [0] * 2 + [1] * 5 + [2] * 3
    for role in ("bit gates", "rank gates"):
        assert [rate > 0 for rate in rates[role]] == [False] * 2 + [True] * 5 + [False] * 3
    for role in ("weight ranges", "ranges"):
        assert rates[role] == [0.0] * 2 + [0.25] * 5 + [0.0] * 3
    assert rates["weights"] == [None] * 10  # the optimizer's own schedule


def setup_of(model: nn.Module, total_steps: int) -> TrainingSetup:
    return TrainingSetup(total_steps, cost_of=functools.partial(cost_in, model))


def test_what_evidence_sets_is_stored_but_not_trained() -> None:
    model = tiny_model(WARM_UP, warmup_fraction=0.2, freeze_fraction=0.3, range_learning_rate=0.25)
    tuner = model.base_model
    tuner.begin(setup_of(model, 10))
    for step in range(10):
        assert tuner.rate_of("ranges", step) == (0.25 if 2 <= step < 7 else 0.0)
        assert tuner.rate_of("weights", step) is None
    assert tuner.penalty() == {} and tuner.penalty_names == ()
    ours = [name for name, p in model.named_parameters() if ".blora_" in name and p.requires_grad]
    trained = {name.rpartition(".")[2] for name in ours}
    assert trained == {"default", "log_ranges"}
    stored = {name.rpartition(".")[2] for name in get_peft_model_state_dict(model)}
    assert {"gates", "logits", "log_weight_range", "log_ranges"} <= stored


def test_evidence_needs_costs_and_says_so() -> None:
    with pytest.raises(BayesLoraError, match="TrainingSetup lacks cost_of, but gates='evidence' weigh .*: train with"):
        tiny_model(WARM_UP).base_model.begin(TrainingSetup(total_steps=100))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    ("total", "warm_up_end", "frozen_from"), [(1000, 600, 700), (80, 48, 56), (60, 35, 43), (21, 10, 17), (6, 3, 5)]
)
def test_a_short_run_leaves_the_gates_eight_steps_or_a_third(
    total: int, warm_up_end: int, frozen_from: int, gates: str
) -> None:
    model = tiny_model(WARM_UP, gates=gates)
    tuner = model.base_model
    tuner.begin(setup_of(model, total))
    assert (tuner.run_state().warm_up_end, tuner.run_state().frozen_from) == (warm_up_end, frozen_from)


@pytest.mark.parametrize("options", [{"gate_learning_rate": 1e-3}, {"gate_learning_rate": 1e-3, "mode": "ra"}])
def test_gates_that_cannot_close_are_refused_with_the_rate_that_would_do(options: dict[str, Any]) -> None:
    options = {"warmup_fraction": 0.1, "freeze_fraction": 0.4, "initial_bit_logits": [4.0, 4.0, 1.0, 0.0], **options}
    tuner = tiny_model(WARM_UP, gates="paper", **options).base_model
    with pytest.raises(
        BayesLoraError, match=r"gates cannot close: 50 steps at gate_learning_rate 0.001 .* use (\S+)"
    ) as e:
        tuner.begin(TrainingSetup(total_steps=100))
    enough = float(str(e.value).rpartition("use ")[2].split()[0])
    assert 50 * enough == pytest.approx(6.0 if options.get("mode") == "ra" else 4.0 + 0.9353, rel=0.05)
    with pytest.raises(BayesLoraError):
        tuner = tiny_model(WARM_UP, gates="paper", **{**options, "gate_learning_rate": enough * 0.9}).base_model
        tuner.begin(TrainingSetup(100))
    options = {**options, "mode": options.get("mode", "q"), "gate_learning_rate": enough * 1.1}
    tiny_model(WARM_UP, gates="paper", **options).base_model.begin(TrainingSetup(100))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_for_the_gates_is_refused(steps: int, gates: str) -> None:
    with pytest.raises(BayesLoraError, match=f"{steps} training steps leave . for the gates .* train longer"):
        tiny_model(WARM_UP, gates=gates).base_model.begin(TrainingSetup(total_steps=steps))


def test_a_fixed_width_stays_under_any_penalty_while_the_others_are_learned() -> None:
    fixed = {"weight": 8, "out": 16, "A": 2, "in": 32}
    options = {"fixed_bits": fixed, "quantize_input": True, "bit_penalty": 10.0, "warmup_fraction": 0.1}
    model = get_peft_model(Tiny(), BLoraConfig(gates="paper", target_modules=["first", "second"], **options))
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-3))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=40, num_examples=40)
    drawn: set[tuple[tuple[int, ...], ...]] = set()
    for _ in range(40):
        loop.step_begin()
        model(X).square().mean().backward()
        quantizers = layers_of(model)[0].blora_quantizers["default"]
        if quantizers.noise is not None:
            widths = dict(zip(quantizers.kinds, quantizers.sampled().widths, strict=True))
            drawn.add(tuple(widths[kind] for kind in fixed))
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    assert drawn == {tuple((bits,) for bits in fixed.values())}
    for layer in describe(model):
        assert {kind: layer.bits[kind] for kind in fixed} == fixed
        assert {layer.bits[kind] for kind in ("E", "B", "A_out", "E_out")} == {2}


def test_rank_gates_that_start_closed_are_refused() -> None:
    with pytest.raises(BayesLoraError, match="initial_rank_logit 0.5 starts r = 4 with ranks already closed"):
        tiny_model(WARM_UP, gates="paper", initial_rank_logit=0.5).base_model.begin(TrainingSetup(total_steps=100))


# Calibration ----------------------------------------------------------------------------------------------------


def _ranges(layer: Any) -> dict[str, Tensor]:
    quantizers = layer.blora_quantizers["default"]
    return dict(zip(quantizers.kinds, quantizers.ranges(), strict=True))


@pytest.mark.parametrize("driven", [True, False], ids=["at the end of the warm-up", "on the first batch"])
def test_calibration_by_the_largest_magnitude_finds_the_largest_magnitudes(driven: bool) -> None:
    """Without a loop and without a warm-up the first training batch calibrates."""
    model = tiny_model(
        WARM_UP, gates="paper", calibration="absmax", quantize_input=True, warmup_fraction=0.2 if driven else 0.0
    )
    layer = layers_of(model)[0]
    plain = oracle_forward(layer, X)
    if driven:
        model.base_model.begin(TrainingSetup(total_steps=10))
        for step, scale in enumerate((1.0, 0.5)):  # the largest of both batches counts
            model(X * scale)
            assert int(layer.blora_progress["default"].phase) == int(WARM_UP)
            model.base_model.step_end(step)
    else:
        model(X)
    assert int(layer.blora_progress["default"].phase) == int(LEARN)
    a, e, b = (getattr(layer, f"blora_{name}")["default"] for name in "AEB")
    low = X @ a.T
    expected = {
        "weight": layer.base_layer.weight,
        "in": X,
        "A": a,
        "E": e,
        "B": b,
        "A_out": low,
        "E_out": low * e * oracle.rank_gates(layer.blora_rank["default"].logits),
        "out": plain,
    }
    for kind, value in _ranges(layer).items():
        torch.testing.assert_close(value.max(), expected[kind].abs().max(), rtol=1e-4, atol=1e-6, msg=kind)


def test_evaluation_before_training_does_not_calibrate() -> None:
    model = tiny_model(WARM_UP, warmup_fraction=0.0).eval()
    model(X)
    assert all(int(layer.blora_progress["default"].phase) == int(WARM_UP) for layer in layers_of(model))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_per_channel_ranges_are_those_of_the_rows(kind: str) -> None:
    model = tiny_model(WARM_UP, kind, gates="paper", per_channel=True, calibration="absmax", warmup_fraction=0.0)
    layer = layers_of(model)[0]
    model(X)
    ranges = _ranges(layer)
    rows = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    torch.testing.assert_close(ranges["weight"], rows.abs().amax(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ranges["A"], layer.blora_A["default"].abs().amax(1), rtol=1e-4, atol=1e-6)
    assert all(ranges[name].numel() == 1 for name in ("E", "B", "A_out", "E_out", "out"))


# Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", GATES)
def test_describe_reports_ranks_widths_shapes_and_parameters(gates: str) -> None:
    model = tiny_model(FROZEN, gates=gates)
    first, second = layers_of(model)
    set_widths(first, weight=8, A=2, E=16, B=4, A_out=4, E_out=2, out=32)
    all_widths(second, 16)
    with torch.no_grad():
        first.blora_E["default"].fill_(1.0)
        # The paper's first gate has no effect, and its gates are nested.
        logits = [-9.0, 9.0, 9.0, -9.0] if gates == "paper" else [9.0, 9.0, -9.0, 9.0]
        first.blora_rank["default"].logits.copy_(torch.tensor(logits))
        second.blora_rank["default"].logits.fill_(9.0)
        second.blora_E["default"].copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    one, two = describe(model)
    learned = RANK + 7 * 4 + 7 if gates == "paper" else 6  # the other ranges than the base weight's
    trained = RANK * (D_IN + D_OUT + 1) + learned
    assert one.to_dict() == {
        "name": "first",
        "in_features": D_IN,
        "out_features": D_OUT,
        "rank": 3,
        "initial_rank": RANK,
        "parameters": trained,
        "bits": {"weight": 8, "A": 2, "E": 16, "B": 4, "A_out": 4, "E_out": 2, "out": 32},
    }
    assert two.rank == 3 and set(two.bits.values()) == {16}


@pytest.mark.parametrize("phase", [WARM_UP, LEARN])
def test_describe_counts_32_bits_until_quantization_begins(phase: Any) -> None:
    model = tiny_model(phase, quantize_input=True)
    for layer in layers_of(model):
        all_widths(layer, 4)
    widths = {bits for layer in describe(model) for bits in layer.bits.values()}
    assert widths == ({32} if phase == WARM_UP else {4})
    assert all(list(layer.bits) == [*KINDS, "in"] for layer in describe(model))


def test_a_gate_is_open_in_evaluation_only_above_the_wider_ones_threshold() -> None:
    """A closed gate of 8 bits closes the widths above it; the boundary is the logit -0.9353."""
    model = tiny_model(FROZEN)
    layer = layers_of(model)[0]
    quantizers = layer.blora_quantizers["default"]
    rows = [
        [3, -3, 3, 3],
        [-3, 3, 3, 3],
        [3, 3, 3, 3],
        [-0.9352] * 4,
        [-0.9354] * 4,
        [3, 3, -0.9354, 3],
        [3, 3, 3, -3],
    ]
    quantizers.gate_logits.data.copy_(torch.tensor(rows))
    assert list(describe(model)[0].bits.values()) == [4, 2, 32, 32, 2, 8, 16]


def test_describe_reads_plain_lora_as_32_bit_matrices(tiny_bert: PreTrainedModel) -> None:
    model = get_peft_model(tiny_bert, LoraConfig(r=3, target_modules=["query", "value"], rank_pattern={"value": 2}))
    described = describe(model)
    assert [layer.name for layer in described] == [
        f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    ]
    assert [layer.rank for layer in described] == [3, 2, 3, 2] == [layer.initial_rank for layer in described]
    assert [layer.parameters for layer in described] == [3 * 64, 2 * 64] * 2
    assert all(layer.bits == dict.fromkeys(KINDS, 32) for layer in described)


def test_describe_of_other_models() -> None:
    assert describe(Tiny()) == []
    model = tiny_model()
    with pytest.raises(BayesLoraError, match="no adapter 'nobody'"):
        describe(model, "nobody")
    with pytest.raises(BayesLoraError, match="no adapter 'nobody'"):
        describe(get_peft_model(Tiny(), LoraConfig(target_modules=["first"])), "nobody")


def test_statistics_are_means_over_layers() -> None:
    model = tiny_model(LEARN, gates="paper")
    first, second = layers_of(model)
    all_widths(first, 4)
    all_widths(second, 16)
    for layer, last_open in ((first, 1), (second, 4)):
        layer.blora_rank["default"].logits.data.copy_(torch.tensor([9.0] * last_open + [-9.0] * (RANK - last_open)))
        layer.blora_E["default"].data.fill_(1.0)
    values = model.base_model.statistics()
    assert values["phase"] == 1.0
    assert values["mean_bits"] == 10.0 and all(values[f"bits/{kind}"] == 10.0 for kind in KINDS)
    assert values["rank/first"] == 1.0 and values["rank/second"] == 4.0 and values["mean_rank"] == 2.5
    opened, closed = (1 / (1 + math.exp(-logit - 1.5986)) for logit in (3.0, -3.0))
    expected = {4: opened, 8: (opened + closed) / 2, 16: (opened + closed) / 2, 32: closed}
    for bits, probability in expected.items():
        assert values[f"gates/{bits}"] == pytest.approx(probability, abs=1e-4)


# Files ----------------------------------------------------------------------------------------------------------


def _reloaded(folder: Path, kind: str = "linear", **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), folder, **options)


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_channel": True, "quantize_input": True, "kind": "conv1d"},
        {"mode": "q"},
        {"mode": "ra"},
        {"gates": "paper"},
    ],
)
def test_a_saved_adapter_reloads_with_equal_outputs(
    options: dict[str, Any], phase: Any, shrunk: bool, tmp_path: Path
) -> None:
    model = tiny_model(phase, **options).eval()
    if shrunk:
        with torch.no_grad():
            for layer, kept in zip(layers_of(model), ([1, 0, 1, 1], [0, 0, 0, 0]), strict=True):
                layer.blora_E["default"].mul_(torch.tensor(kept))
        shrink(model)
    expected = model(X)
    model.save_pretrained(tmp_path)
    again = _reloaded(tmp_path, options.get("kind", "linear")).eval()
    torch.testing.assert_close(again(X), expected, atol=1e-6, rtol=0)
    assert [layer.to_dict() for layer in describe(again)] == [layer.to_dict() for layer in describe(model)]
    assert not any(p.requires_grad for p in again.parameters())
    assert any(
        p.requires_grad for p in _reloaded(tmp_path, options.get("kind", "linear"), is_trainable=True).parameters()
    )


@pytest.mark.parametrize("gates", GATES)
def test_a_reloaded_adapter_goes_on_training_as_the_saved_one_would(gates: str, tmp_path: Path) -> None:
    model = tiny_model(LEARN, gates=gates)
    model.save_pretrained(tmp_path)
    again = _reloaded(tmp_path, is_trainable=True).train()
    gradients = []
    for one in (model, again):
        one.base_model.begin(setup_of(one, 100))
        one.base_model.step_begin(step=20, seed=0)
        one(X).square().sum().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-6)


def test_reload_in_a_new_process_gives_equal_outputs(tmp_path: Path) -> None:
    model = tiny_model(FROZEN, modules_to_save=["head"]).eval()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.fill_(0.25)
        layers_of(model)[0].blora_E["default"][1:].zero_()
    shrink(model)
    with torch.no_grad():
        expected = model(X)
    model.save_pretrained(tmp_path)
    torch.save({"x": X, "y": expected}, tmp_path / "outputs.pt")
    code = """
import sys, torch, bayeslora
from peft import PeftModel
from tests.methods.reference import Tiny, seeded
folder = sys.argv[1]
model = PeftModel.from_pretrained(seeded(Tiny), folder).eval()
saved = torch.load(folder + "/outputs.pt")
print("largest difference", (model(saved["x"]) - saved["y"]).abs().max().item())
"""
    assert float(run_code(code, tmp_path, str(tmp_path)).rpartition("difference ")[2]) <= 1e-6


def test_saved_files_hold_the_adapter_and_not_the_base_or_the_noise(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny_model(LEARN)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= sum(t.numel() for t in saved.values())
    assert not any("base_layer" in name or "noise" in name or name.endswith("weight") for name in saved)
    assert all("blora_" in name for name in saved)


def test_rank_zero_works_forward_backward_saved_and_reloaded(tmp_path: Path) -> None:
    for index, phase in enumerate((WARM_UP, LEARN, FROZEN)):
        model = tiny_model(phase, rank_pattern={"first": 0})
        first = layers_of(model)[0]
        assert first.blora_A["default"].shape == (0, D_IN)
        torch.testing.assert_close(first(X), oracle_forward_without_update(first), atol=1e-5, rtol=1e-5)
        model(X).sum().backward()
        model.eval()
        assert [layer.rank for layer in describe(model)][0] == 0
        expected = model(X)
        model.save_pretrained(tmp_path / str(index))
        torch.testing.assert_close(_reloaded(tmp_path / str(index)).eval()(X), expected, atol=1e-6, rtol=0)


def oracle_forward_without_update(layer: Any) -> Tensor:
    """Algorithm 1 with an update of zero: one rank whose factors are zero stands for none."""
    from tests.methods.reference import oracle_quantizers

    quantizers = {k: q for k, q in oracle_quantizers(layer).items() if k in ("weight", "out")}
    zero_a, zero_b = torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1)
    base = layer.base_layer
    return oracle.forward(X, base.weight, base.bias, zero_a, torch.zeros(1), zero_b, 1.0, None, quantizers)


@pytest.mark.parametrize("gates", GATES)
def test_rank_zero_trains_through_all_phases(gates: str) -> None:
    model = tiny_model(WARM_UP, gates=gates, rank_pattern={"first": 0}, warmup_fraction=0.25, freeze_fraction=0.25)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=8)
    train_steps(model, optimizer, loop, X, 8)
    assert int(layers_of(model)[0].blora_progress["default"].phase) == int(FROZEN)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert all(math.isfinite(value) for value in loop.statistics().values())


def test_gpt2_and_bert_adapt_through_all_doors(tiny_gpt2: PreTrainedModel, tiny_bert: PreTrainedModel) -> None:
    tokens = torch.arange(12).view(2, 6)
    for base, target in ((tiny_gpt2, ["c_attn"]), (tiny_bert, ["query", "key", "value"])):
        expected = base(input_ids=tokens).logits
        model = get_peft_model(base, BLoraConfig(r=4, target_modules=target, warmup_fraction=0.0)).eval()
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
        model.train()
        model(input_ids=tokens).logits.sum().backward()
        for layer in layers_of(model):
            x = torch.randn(2, 3, layer.in_features)
            layer.blora_quantizers["default"].draw(torch.rand(7, 4))
            torch.testing.assert_close(layer(x), oracle_forward(layer, x), atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("first", [{"per_channel": True}, {"group_size": 2}, {"calibration": "absmax"}, {}])
@pytest.mark.parametrize("second", [{}, {"per_channel": True}])
def test_each_adapter_has_the_base_weights_ranges_of_its_own_settings(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = tiny_model(**first)
    alone = [layer.weight_range("default", "weight", 4).clone() for layer in layers_of(tiny_model(**second))]
    [layer.weight_range("default", "weight", 4) for layer in layers_of(model)]
    model.add_adapter("b", BLoraConfig(r=RANK, target_modules=["first", "second"], **second))
    found = [layer.weight_range("b", "weight", 4) for layer in layers_of(model)]
    assert all(map(torch.equal, found, alone))
    with torch.no_grad():
        layers_of(model)[0].weight.mul_(2)
    torch.testing.assert_close(layers_of(model)[0].weight_range("b", "weight", 4), 2 * alone[0])
