"""Several cores of Me-LoRA: the deal of the rows, the bound, members as adapters of their own; noise that fades in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoop, BayesLoraError, CoreEnsemble, MeLoraConfig, describe, parameter_groups, predict
from bayeslora.methods.melora.cores import Deal, starting_cores
from bayeslora.posterior import Noise
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.methods.reference import D_IN, RANK, Tiny, layers_of, seeded
from tests.oracles import melora
from tests.prediction.models import classifier, inputs
from tests.processes import run_code

CPU = torch.device("cpu")
X = torch.randn(32, 5, D_IN, generator=torch.Generator().manual_seed(7))
LABELS = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(8))


def tiny(cores: int = 3, variance: str = "none", **options: Any) -> Any:
    """`Tiny` in training mode with members apart and B away from zero."""
    settings = {"r": RANK, "lora_alpha": 6, "target_modules": ["first", "second"], "num_examples": 40}
    config = MeLoraConfig(cores=cores, variance=variance, init_weights=False, **{**settings, **options})
    return seeded(lambda: get_peft_model(Tiny(), config)).train()


def loop_of(model: nn.Module, steps: int = 4, step: int = 0, lr: float = 0.1) -> BayesLoop:
    return BayesLoop(model, torch.optim.SGD(parameter_groups(model, lr=lr)), total_steps=steps, seed=3, step=step)


def one_step(loop: BayesLoop, parts: int = 1, x: Tensor = X, labels: Tensor = LABELS) -> None:
    loop.step_begin()
    for rows, answers in zip(x.chunk(parts), labels.chunk(parts), strict=True):
        loss = nn.functional.cross_entropy(loop.model(rows).mean(1), answers)
        (loss / parts).backward()
    loop.before_optimizer_step()
    loop.optimizer.step()
    loop.step_end()
    loop.optimizer.zero_grad()


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "melora_" in name}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **kwargs: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name, **{"atol": 1e-6, "rtol": 1e-5, **kwargs})


# The deal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [2, 3, 5])
def test_the_deal_covers_members_evenly_and_is_the_same_for_any_division(cores: int) -> None:
    deal = Deal(cores)
    deal.begin_step(seed=4, step=9)
    whole = deal.begin_pass(32)
    for block in whole[: 32 // cores * cores].split(cores):
        assert sorted(block.tolist()) == list(range(cores))
    deal.begin_step(seed=4, step=9)
    parts = torch.cat([deal.begin_pass(rows) for rows in (8, 1, 13, 10)])
    assert torch.equal(parts, whole)
    others = []
    for seed, step in ((4, 10), (5, 9)):
        deal.begin_step(seed, step)
        others.append(deal.begin_pass(32))
    assert not any(torch.equal(other, whole) for other in others)


def test_ranks_have_the_rows_that_one_process_would_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    deal = Deal(3)
    deal.begin_step(0, 0)
    whole = deal.begin_pass(16)
    monkeypatch.setattr("bayeslora.methods.melora.cores._rank", lambda: (1, 2))
    deal.begin_step(0, 0)
    assert torch.equal(torch.cat([deal.begin_pass(4), deal.begin_pass(4)]), torch.cat([whole[4:8], whole[12:16]]))


def test_over_a_run_every_row_position_meets_every_member_equally_often() -> None:
    deal, counts = Deal(4), torch.zeros(8, 4)
    for step in range(400):
        deal.begin_step(1, step)
        counts[torch.arange(8), deal.begin_pass(8)] += 1
    assert (counts.sum(0) == 800).all()  # 400 steps of two rows for each member
    assert (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_training_row_is_computed_by_its_member_in_all_layers(core: str) -> None:
    model = tiny(core=core)
    loop = loop_of(model)
    loop.step_begin()
    found = model(X)
    members = model.base_model.run_state().deal.members
    assert members.bincount(minlength=3).tolist() in ([11, 11, 10], [11, 10, 11], [10, 11, 11])
    for member in range(3):
        rows = X[members == member]
        expected = rows
        for layer in layers_of(model):
            base = layer.get_base_layer()
            tensors = [layer.melora_A["default"], layer.melora_B["default"], layer.melora_M["default"][member]]
            adapter = melora.Adapter(*(t.detach() for t in tensors), torch.zeros(0), layer.scaling["default"])
            expected = torch.tanh(
                melora.forward(expected, base.weight.detach(), base.bias.detach(), adapter, [None] * len(rows))
            )
        expected = model.base_model.model.head(expected)
        torch.testing.assert_close(found[members == member], expected, atol=1e-5, rtol=1e-5)


def test_rows_that_a_layer_sees_several_times_stay_with_their_member() -> None:
    deal = Deal(3)
    members = deal.begin_pass(4)
    assert torch.equal(deal.of_rows(8), members.repeat_interleave(2))  # the choices of a question
    assert deal.of_rows(7).tolist() == [0, 1, 2, 0, 1, 2, 0]  # tokens of an expert


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_an_input_that_the_rows_of_a_batch_share_has_the_mean_core(core: str) -> None:
    """DeBERTa sends its table of relative positions, one row, through the projections of all rows."""
    found = []
    for rows in (6, 1):
        model = tiny(3, "closed_form", core=core)
        loop_of(model).step_begin()
        model(X[:rows])
        layer = layers_of(model)[0]
        with torch.no_grad():
            mean = layer.hidden("default", X[:1], None)
            found.append(torch.allclose(layer.hidden("default", X[:1], layer.noise_of("default")), mean, atol=1e-5))
    assert found == [True, False]  # a row of its own has its member


# Starts and the bound ------------------------------------------------------------------------------------------


def test_full_cores_start_as_rotations_at_the_distance_asked_for() -> None:
    cores = starting_cores(4, 8, 1.0, False, CPU)
    torch.testing.assert_close(cores @ cores.mT, torch.eye(8).expand(4, 8, 8), atol=1e-5, rtol=0)
    assert torch.equal(cores[0], torch.eye(8))
    near = starting_cores(4, 8, 0.1, False, CPU)
    # To first order C - I is skew-symmetric, with entries of deviation spread / sqrt(r).
    assert ((near[1:] - torch.eye(8)).square().sum((1, 2)) / (0.01 * 7)).mean().item() == pytest.approx(1, abs=0.35)
    assert starting_cores(1, 8, 1.0, False, CPU).shape == (8, 8) and starting_cores(1, 8, 1.0, True, CPU).shape == (8,)
    diagonal = starting_cores(4, 8, 1.0, True, CPU)
    assert (diagonal[0] == 1).all() and diagonal[1:].std() > 0.3 and (diagonal > 0).all()


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_the_divergence_is_the_mean_of_the_members_from_their_starts(core: str) -> None:
    model = tiny(4, "learned", core=core, prior_std=0.3, initial_std=0.2)
    expected = 0.0
    for index, layer in enumerate(layers_of(model)):
        moved = 0.1 * torch.randn(layer.melora_M["default"].shape, generator=torch.Generator().manual_seed(index))
        layer.melora_M["default"].data.add_(moved)
        prior = torch.eye(RANK) if core == "full" else torch.ones(RANK)
        for offset in moved:
            adapter = melora.Adapter(
                torch.zeros(0), torch.zeros(0), prior + offset, layer.melora_rho["default"][0], 1.0
            )
            expected += melora.kl(adapter, 0.3) / 4
    assert model.base_model.kl().item() == pytest.approx(expected, rel=1e-4)


def test_members_without_noise_keep_the_penalty_of_their_means() -> None:
    model = tiny(2, "none", prior_std=0.5)
    assert model.base_model.kl().item() == pytest.approx(0, abs=1e-6)
    for layer in layers_of(model):
        layer.melora_M["default"].data[1].add_(0.1)
    assert model.base_model.kl().item() == pytest.approx(2 * RANK**2 * 0.01 / (2 * 0.25) / 2, rel=1e-4)
    loop = loop_of(model)
    one_step(loop)
    assert set(loop.statistics()) >= {"kl", "posterior_std"} and "signal_to_noise" not in loop.statistics()


# Training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["none", "closed_form"])
def test_micro_batches_train_like_one_batch(variance: str) -> None:
    options = {} if variance == "none" else {"prior_std": 1e-6}  # no noise to speak of
    found = []
    for parts in (1, 4):
        model = tiny(3, variance, kl_weight=1e-9, **options)
        loop = loop_of(model)
        for _ in range(3):
            one_step(loop, parts)
        found.append(state(model))
    assert_same(*found, rtol=1e-4)
    start = state(tiny(3, variance, kl_weight=1e-9, **options))
    moved = {name.split(".")[-2] for name, value in found[0].items() if not torch.allclose(value, start[name])}
    assert moved == {"melora_A", "melora_B", "melora_M"} | ({"melora_precision"} if variance != "none" else set())


def test_deviations_are_those_of_squared_gradients_of_the_members_own_rows() -> None:
    model = tiny(3, "closed_form", prior_std=1e-5, kl_weight=0.5)
    loop = loop_of(model, lr=0.0)
    expected = [torch.zeros_like(layer.melora_M["default"]) for layer in layers_of(model)]
    one_step(loop, parts=2, x=X[:8], labels=LABELS[:8])
    deal = Deal(3)
    deal.begin_step(3, 0)
    members = deal.begin_pass(8)
    for x, label, member in zip(X, LABELS, members.tolist(), strict=False):
        with bayeslora.sampling(model, "batch", 0, [member], scale=0.0):
            loss = nn.functional.cross_entropy(model(x[None]).mean(1), label[None])
        gradients = torch.autograd.grad(loss, [layer.melora_M["default"] for layer in layers_of(model)])
        for known, gradient in zip(expected, gradients, strict=True):
            known[member] += gradient[member].square() / (members == member).sum()
    for layer, fisher in zip(layers_of(model), expected, strict=True):
        torch.testing.assert_close(layer.melora_precision["default"], 0.05 * fisher * 40 / 0.5, atol=1e-4, rtol=1e-3)
        assert (layer.melora_precision["default"].flatten(1).amax(1) > 1e-4).all()


def test_a_member_without_rows_in_a_step_keeps_its_deviations() -> None:
    model = tiny(3, "closed_form")
    loop = loop_of(model)
    one_step(loop)
    before = [layer.melora_precision["default"].clone() for layer in layers_of(model)]
    one_step(loop, x=X[:2], labels=LABELS[:2])
    seen = model.base_model.run_state().seen
    assert sorted(seen) == [False, True, True]
    for old, layer in zip(before, layers_of(model), strict=True):
        same = [torch.equal(a, b) for a, b in zip(old, layer.melora_precision["default"], strict=True)]
        assert same == [not was_seen for was_seen in seen]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise_fade_in": (0.25, 0.75), "prior_std": "evidence"}
    model = tiny(2, "closed_form", **options)
    loop = loop_of(model)
    torch.manual_seed(1)
    for _ in range(2):
        one_step(loop)
    model.save_pretrained(tmp_path)
    numbers = torch.get_rng_state()
    for _ in range(2):
        one_step(loop)
    expected = state(model)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path, is_trainable=True).train()
    resumed = loop_of(again, step=2)
    torch.set_rng_state(numbers)
    for _ in range(2):
        one_step(resumed)
    assert_same(expected, state(again), atol=0, rtol=0)
    assert any("melora_prior" in name for name in expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variance", ["none", "closed_form"])
def test_checkpointing_recomputes_rows_with_their_member(variance: str, reentrant: bool) -> None:
    config = MeLoraConfig(
        r=4, cores=3, variance=variance, target_modules=["query", "value"], init_weights=False, num_examples=40
    )
    model = seeded(lambda: get_peft_model(build_tiny_bert(), config)).train()
    ids, labels = torch.arange(4, 46).view(7, 6), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        loop = loop_of(model)
        loop.step_begin()
        for rows in (slice(0, 3), slice(3, 7)):
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(found[0][name].flatten(1).any(1).all() for name in found[0] if "melora_M" in name)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-7, rtol=1e-4, msg=name)
    losses = [model(input_ids=ids, labels=labels).loss for _ in range(2)]
    if variance == "none":
        with pytest.raises(BayesLoraError, match="2 forward passes came before one backward pass"):
            sum(losses).backward()


def test_autocast_keeps_cores_in_float32() -> None:
    model = tiny(3, "closed_form", prior_std=1e-6)
    loop = loop_of(model)
    loop.step_begin()
    exact = model(X)
    loop.step_begin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(X)
        rounded.float().square().mean().backward()
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
    for layer in layers_of(model):
        gradient = layer.melora_M["default"].grad
        assert gradient.dtype == torch.float32 and gradient.flatten(1).any(1).all()
        assert layer.take_row_gradients("default").isfinite().all()


# Noise that fades in, and a prior from the evidence ------------------------------------------------------------


def test_noise_rises_between_two_shares_of_the_steps() -> None:
    config = MeLoraConfig(noise_fade_in=(0.4, 0.65))
    assert config.noise_fade_in == [0.4, 0.65]
    assert [config.noise_at(step, 100) for step in (0, 40, 50, 65, 99)] == pytest.approx([0, 0, 0.4, 1, 1])
    jump = MeLoraConfig(noise_fade_in=[0.5, 0.5])
    assert [jump.noise_at(step, 10) for step in (4, 5)] == [0.0, 1.0]
    assert MeLoraConfig(variance="learned").noise_at(0, 10) == 1.0
    assert MeLoraConfig(noise_fade_in=(0, 0)).noise_at(0, 10) == 1.0


def test_a_pass_has_the_share_of_the_noise_that_its_step_has() -> None:
    model = tiny(1, "learned", noise_fade_in=(0.25, 0.75), initial_std=0.3)
    found = []
    for step in range(4):
        loop = loop_of(model, step=step)
        loop.step_begin()
        torch.manual_seed(0)
        layer = layers_of(model)[0]
        found.append(layer(X).detach())
        with bayeslora.posterior_mean(model):
            mean = layer(X).detach()
        found[-1] = found[-1] - mean
    assert not found[0].any() or found[0].abs().max() < 1e-5  # steps 0 and 1 have none, 2 half, 3 all
    assert found[1].abs().max() < 1e-5 < found[3].abs().max()
    torch.testing.assert_close(found[2] * 2, found[3], atol=1e-4, rtol=1e-4)


def test_the_prior_follows_its_evidence_and_is_saved(tmp_path: Path) -> None:
    model = tiny(2, "closed_form", prior_std="evidence")
    loop = loop_of(model)
    one_step(loop)
    for layer in layers_of(model):
        before = 0.25 / RANK  # 0.5 / sqrt(r), squared
        omega2 = 1 / (layer.melora_precision["default"] + 1 / before)
        offset = layer.melora_M["default"].detach() - starting_cores(2, RANK, 1.0, False, CPU)
        expected = 0.95 * before + 0.05 * (omega2 + offset.square()).mean()
        assert layer.prior("default").item() ** 2 == pytest.approx(expected.item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path)
    for one, other in zip(layers_of(model), layers_of(again), strict=True):
        assert torch.equal(one.prior("default"), other.prior("default")) and one.prior("default") != 0.5 / RANK**0.5
        assert torch.equal(one.posterior("default")[1], other.posterior("default")[1])


def test_a_prior_without_evidence_stays() -> None:
    model = tiny(1, "closed_form", prior_std="evidence", kl_weight=1.0)
    for layer in layers_of(model):
        layer.melora_B["default"].data.zero_()
    loop = loop_of(model, lr=0.0)
    one_step(loop)
    for layer in layers_of(model):
        assert layer.prior("default").item() == pytest.approx(0.5 / RANK**0.5, rel=1e-6)


# Prediction, files and exports ---------------------------------------------------------------------------------


def bert(variance: str = "none", **options: Any) -> Any:
    settings = {"r": 4, "cores": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    config = MeLoraConfig(variance=variance, init_weights=False, **{**settings, **options})
    model = get_peft_model(classifier("bert"), config)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.melora_B["default"].mul_(40)
    return model.eval()


def lora_probabilities(folder: Path, batch: dict[str, Tensor]) -> Tensor:
    plain = PeftModel.from_pretrained(classifier("bert"), folder).eval()
    with torch.no_grad():
        return torch.softmax(plain(**batch).logits.double(), dim=-1)


@pytest.mark.parametrize(("variance", "core"), [("none", "full"), ("learned", "full"), ("none", "diagonal")])
def test_members_are_plain_loras(variance: str, core: str, tmp_path: Path) -> None:
    model, batch = bert(variance, core=core), inputs()
    measured = bayeslora.export(model, tmp_path, members=True)
    assert measured["members"] == 3 and measured["max_output_error"] < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member-0", "member-1", "member-2"]
    plain = torch.stack([lora_probabilities(tmp_path / f"member-{k}", batch) for k in range(3)])
    found = predict(CoreEnsemble(model), batch, per_sample=True)
    assert found.sample_probabilities is not None and found.sample_probabilities.std(0).max() > 1e-3
    torch.testing.assert_close(found.sample_probabilities, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.probabilities, plain.mean(0), atol=1e-6, rtol=0)
    layer = layers_of(model)[0]
    a = load_file(tmp_path / "member-2" / "adapter_model.safetensors")
    core_2, factor = layer.melora_M["default"][2].detach(), layer.melora_A["default"].detach()
    expected = core_2 @ factor if core == "full" else core_2.unsqueeze(1) * factor
    torch.testing.assert_close(next(v for k, v in a.items() if k.endswith("lora_A.weight")), expected)
    drawn = predict(model, batch, samples=3, per_sample=True).sample_probabilities
    assert drawn is not None and torch.allclose(drawn, found.sample_probabilities) == (variance == "none")


def test_one_pass_is_the_mean_core_which_merges_and_exports(tmp_path: Path) -> None:
    model, batch = bert("closed_form"), inputs()
    expected = predict(model, batch).probabilities
    bayeslora.export(model, tmp_path)
    torch.testing.assert_close(lora_probabilities(tmp_path, batch), expected, atol=1e-6, rtol=0)
    layer = layers_of(model)[0]
    mean = layer.melora_M["default"].mean(0)
    torch.testing.assert_close(layer.factors("default")[0], mean @ layer.melora_A["default"])
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(torch.softmax(merged(**batch).logits.double(), -1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("antithetic", [False, True])
def test_draws_in_one_batch_are_those_of_a_pass_each_and_take_members_in_turn(antithetic: bool) -> None:
    model, batch = bert("closed_form"), inputs()
    together = predict(model, batch, samples=6, seed=2, per_sample=True, antithetic=antithetic).sample_probabilities
    assert together is not None
    layer, used = layers_of(model)[0], []
    for draw in range(6):
        with bayeslora.sampling(model, "batch", 2, [draw], antithetic), torch.no_grad():
            alone = torch.softmax(model(**batch).logits.double(), -1)
        torch.testing.assert_close(together[draw], alone, atol=1e-6, rtol=0)
        noise = Noise("batch", 2, "x", [draw], antithetic, scale=0.0)
        used += [k for k in range(3) if torch.equal(layer._draw("default", 1, layer._members("default", 1, noise),
                 noise)[0], layer.melora_M["default"][k])]  # fmt: skip
    assert used == ([0, 0, 1, 1, 2, 2] if antithetic else [0, 1, 2, 0, 1, 2])


def test_generated_sequences_keep_one_member() -> None:
    torch.manual_seed(0)
    config = MeLoraConfig(r=4, cores=3, variance="none", target_modules=["q_proj", "v_proj"], init_weights=False)
    model = get_peft_model(build_tiny_llama(), config).eval()
    for layer in layers_of(model):
        layer.melora_B["default"].data.mul_(20)
    prompts = torch.arange(4, 12).view(2, 4)
    found = bayeslora.generate(model, prompts, samples=3, max_new_tokens=6, min_new_tokens=6)
    texts = set()
    for member in range(3):
        with bayeslora.sampling(model, "batch", 0, [member]):
            alone = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, min_new_tokens=6
            )
        assert torch.equal(found.sequences[member], alone)
        texts.add(tuple(alone.flatten().tolist()))
    assert len(texts) > 1


@pytest.mark.parametrize(
    "variance",
    ["closed_form", pytest.param("none", marks=pytest.mark.slow), pytest.param("learned", marks=pytest.mark.slow)],
)
def test_a_new_process_loads_the_same_ensemble(variance: str, tmp_path: Path) -> None:
    model, batch = bert(variance), inputs()
    model.save_pretrained(tmp_path)
    shapes = {key.rsplit(".", 1)[-1]: tuple(value.shape) for key, value in
              load_file(tmp_path / "adapter_model.safetensors").items() if "melora_M" in key}  # fmt: skip
    assert set(shapes.values()) == {(3, 4, 4)}
    code = (
        "import sys, bayeslora, torch\nfrom peft import PeftModel\n"
        "from tests.prediction.models import classifier, inputs\n"
        "model = PeftModel.from_pretrained(classifier('bert'), sys.argv[1]).eval()\n"
        "found = bayeslora.predict(model, inputs(), samples=6, seed=1).probabilities\n"
        "kl = model.base_model.kl().item()\n"
        "torch.save((found, kl), 'found.pt')"
    )
    run_code(code, tmp_path, str(tmp_path))
    found, kl = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, predict(model, batch, samples=6, seed=1).probabilities, atol=1e-9, rtol=0)
    assert kl == pytest.approx(model.base_model.kl().item(), abs=1e-5)


@pytest.mark.parametrize(("variance", "numbers"), [("none", 1), ("learned", 2), ("closed_form", 1)])
def test_cores_count_their_own_numbers_in_a_plan_too(variance: str, numbers: int) -> None:
    from bayeslora.cost import plan

    model = bert(variance, cores=5, num_examples=10)
    lora = {layer.name: 4 * (layer.in_features + layer.out_features) for layer in describe(model)}
    assert {layer.name: layer.parameters - lora[layer.name] for layer in describe(model)} == dict.fromkeys(
        lora, 5 * 16 * numbers
    )
    config = MeLoraConfig(r=4, cores=5, variance=variance, target_modules=["query", "value"], task_type="SEQ_CLS")
    planned = plan(model.get_base_model().config, config)
    assert planned.parameters["adapter"] == sum(layer.parameters for layer in describe(model))
    assert [layer.parameters for layer in planned.layers] == [layer.parameters for layer in describe(model)]


def test_a_description_says_where_the_posterior_has_left_its_prior() -> None:
    model = tiny(2, "closed_form", prior_std=0.4)
    generator = np.random.default_rng(0)
    for layer in layers_of(model):
        precision = generator.uniform(0, 50, (2, RANK, RANK))
        layer.melora_precision["default"].copy_(torch.from_numpy(precision))
        ratios = 1 / np.sqrt(1 + precision * 0.16)
        name = next(path for path, found in model.base_model.named_layers().items() if found is layer)
        width = next(each for each in describe(model) if each.name == name).posterior_to_prior
        assert width is not None
        expected = [ratios.mean(), *np.quantile(ratios, [0.05, 0.5, 0.95])]
        assert [width.mean, width.low, width.median, width.high] == pytest.approx(expected, rel=1e-4)
    assert describe(tiny(2, "none"))[0].posterior_to_prior is None


# Errors --------------------------------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"cores": 0}, "cores is 0, but must be a whole number of at least 1"),
    ({"cores": 2.5}, "cores is 2.5, but must be a whole number"),
    ({"cores": 2, "core_spread": 0.0}, "core_spread is 0.0, but must be above 0"),
    ({"variance": "none"}, "variance is 'none', but with a single core nothing would be random"),
    ({"cores": 2, "noise_scope": "token"}, "noise_scope is 'token', but several cores are dealt to single rows"),
    ({"cores": 2, "noise_scope": "batch"}, "noise_scope is 'batch', but several cores"),
    ({"cores": 2, "antithetic": True}, "antithetic is True, but several cores"),
    ({"noise_fade_in": (0.6, 0.4)}, r"noise_fade_in is \(0.6, 0.4\), but must be two rising shares"),
    ({"noise_fade_in": [0.5]}, r"noise_fade_in is \[0.5\], but must be two rising shares"),
    ({"prior_std": "data"}, "prior_std is 'data', but must be a number above 0 or 'evidence'"),
    (
        {"prior_std": "evidence", "variance": "learned"},
        "prior_std is 'evidence' with variance='learned', but needs deviations that are set",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_options_that_cannot_work_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message) as caught:
        MeLoraConfig(**options)
    assert "\n" not in str(caught.value)


def test_what_an_ensemble_cannot_do_says_so(tmp_path: Path) -> None:
    model, single = bert(), bert("learned", cores=1)
    with pytest.raises(BayesLoraError, match="scope is 'token', but a token cannot choose among 3 cores"):
        with bayeslora.sampling(model, "token"):
            model(**inputs())
    with pytest.raises(BayesLoraError, match="no more than one core, but an ensemble needs two"):
        CoreEnsemble(single)
    with pytest.raises(BayesLoraError, match="samples is 2, but the ensemble's samples are its 3 cores"):
        predict(CoreEnsemble(model), inputs(), samples=2)
    with pytest.raises(BayesLoraError, match="members is True, but the adapter has no more than one core"):
        bayeslora.export(single, tmp_path, members=True)
    with pytest.raises(BayesLoraError, match="draws is 2, but members have no noise"):
        bayeslora.export(model, tmp_path, members=True, draws=2)
