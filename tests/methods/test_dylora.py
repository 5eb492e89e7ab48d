"""DyLoRA: every rank against the reference, one rank a step for all, any rank cut out, saved and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoop, BayesLoraError, DyLoraConfig, at_rank, describe, parameter_groups, rank_curve, shrink
from tests.methods.reference import D_IN, D_OUT, Tiny, layers_of, seeded
from tests.oracles import dylora as oracle

X = torch.randn(8, D_IN, generator=torch.Generator().manual_seed(7))
Y = torch.arange(8) % 3
RANK, ALPHA = 5, 6


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


def _tiny(kind: str = "linear", **options: Any) -> nn.Module:
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["first", "second"], "init_weights": False}
    return seeded(lambda: get_peft_model(Tiny(kind), DyLoraConfig(**{**settings, **options}))).train()


def _oracle(layer: Any, rank: int, alpha: float = ALPHA) -> Tensor:
    base = layer.base_layer.weight.T if layer.is_transposed else layer.base_layer.weight
    return oracle.forward(
        X, base, layer.base_layer.bias, layer.dylora_A["default"], layer.dylora_B["default"], alpha, rank
    )


def _loop(model: nn.Module, steps: int = 10, step: int = 0, seed: int = 0) -> BayesLoop:
    return BayesLoop(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)), steps, seed=seed, step=step)


def _advance(loop: BayesLoop, accumulation: int = 1) -> int:
    loop.step_begin()
    for x, y in zip(X.chunk(accumulation), Y.chunk(accumulation), strict=True):
        (nn.functional.cross_entropy(loop.model(x), y) / accumulation).backward()
    loop.before_optimizer_step()
    loop.optimizer.step()
    loop.step_end()
    loop.optimizer.zero_grad()
    return int(loop.statistics()["sampled_rank"])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_every_rank_is_the_references_in_evaluation_merged_and_as_factors(kind: str) -> None:
    model = _tiny(kind).eval()
    layer = layers_of(model)[0]
    _close(layer(X), _oracle(layer, RANK))
    for rank in range(1, RANK + 1):
        with at_rank(model, rank):
            expected = model(X)
            _close(layer(X), _oracle(layer, rank))
            a, diagonal, b = layer.factors("default")
            assert a.shape == (rank, D_IN) and b.shape == (D_OUT, rank) and diagonal.tolist() == [1.0] * rank
            assert [each.rank for each in describe(model)] == [rank, rank]
            model.merge_adapter()
            _close(model(X), expected)
            model.unmerge_adapter()
    _close(layer(X), _oracle(layer, RANK))


def test_with_rank_stabilization_the_scale_is_alpha_over_the_root_of_the_rank() -> None:
    layer = layers_of(_tiny(use_rslora=True).eval())[0]
    layer.set_rank("default", 4)
    _close(layer(X), _oracle(layer, 4, alpha=ALPHA * 4 / 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_a_rank_trains_its_rows_and_columns_or_the_last_alone(frozen: bool) -> None:
    model = _tiny(frozen=frozen)
    for rank in (1, 3, RANK):
        for layer in layers_of(model):
            layer.sampled["default"] = rank
        model.zero_grad()
        _close(layers_of(model)[0](X), _oracle(layers_of(model)[0], rank))
        nn.functional.cross_entropy(model(X), Y).backward()
        trained = [frozen <= (j == rank - 1) and j < rank for j in range(RANK)]
        for layer in layers_of(model):
            assert [bool(row.any()) for row in layer.dylora_A["default"].grad] == trained
            assert [bool(column.any()) for column in layer.dylora_B["default"].grad.T] == trained


def test_ranks_of_steps_are_seeded_uniform_and_within_the_bounds() -> None:
    model, other = _tiny(min_rank=2), _tiny(min_rank=2)
    ranks = []
    for step in range(400):
        model.base_model.step_begin(step, seed=3)
        assert len({layer.sampled["default"] for layer in layers_of(model)}) == 1
        ranks.append(layers_of(model)[0].sampled["default"])
    assert [80 < ranks.count(rank) < 120 for rank in range(2, RANK + 1)] == [True] * (RANK - 1)
    assert set(ranks) == set(range(2, RANK + 1))
    other.base_model.step_begin(17, seed=3)
    assert layers_of(other)[0].sampled["default"] == ranks[17]
    other.base_model.step_begin(18, seed=4)
    assert [model.base_model.step_begin(s, 4) or layers_of(model)[0].sampled["default"] for s in range(400)] != ranks


def test_four_micro_batches_share_a_rank_and_train_as_one_batch_does() -> None:
    states = []
    for accumulation in (1, 4):
        model = _tiny()
        loop = _loop(model)
        drawn = [_advance(loop, accumulation) for _ in range(4)]
        states.append((drawn, model.state_dict()))
    assert states[0][0] == states[1][0] and len(set(states[0][0])) > 1
    for name, value in states[0][1].items():
        _close(states[1][1][name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_without_a_loop_each_pass_in_training_draws_its_ranks_and_evaluation_has_them_all() -> None:
    model = _tiny()
    layer = layers_of(model)[0]
    outputs = [layer(X).detach() for _ in range(30)]
    for output in outputs:
        assert min(float((output - _oracle(layer, rank)).abs().max()) for rank in range(1, RANK + 1)) < 1e-5
    assert len({round(float(output.sum()), 4) for output in outputs}) > 2
    _close(layer.eval()(X), _oracle(layer, RANK))


def test_a_new_adapter_changes_nothing_at_any_rank() -> None:
    model = _tiny(init_weights=True).eval()
    for rank in (1, RANK):
        with at_rank(model, rank):
            assert torch.equal(model(X), seeded(Tiny)(X))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"second": 20}}])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_cut_out_is_the_same_function_as_a_file_and_as_plain_lora(
    rank: int, options: dict[str, Any], tmp_path: Path
) -> None:
    model = _tiny(**options).eval()
    with at_rank(model, rank):
        expected = model(X)
        result = bayeslora.export(model, tmp_path / "lora")
    assert result["ranks"] == {"first": rank, "second": rank}
    plain = PeftModel.from_pretrained(seeded(Tiny), tmp_path / "lora").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    _close(plain(X), expected)
    assert not torch.allclose(model(X), expected)
    model.base_model.set_rank(rank)
    assert shrink(model) == {"first": rank, "second": rank}
    _close(model(X), expected)
    assert [each.parameters for each in describe(model)] == [rank * (D_IN + D_OUT), rank * 2 * D_OUT]
    model.save_pretrained(tmp_path / "cut")
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path / "cut").eval()
    _close(again(X), expected)
    assert again.peft_config["default"].r == rank


def test_layers_of_a_smaller_rank_take_part_with_what_they_have() -> None:
    model = _tiny(rank_pattern={"second": 2}).eval()
    first, second = layers_of(model)
    for rank in (1, 2, 4):
        with at_rank(model, rank):
            _close(first(X), _oracle(first, rank))
            assert [each.rank for each in describe(model)] == [rank, min(rank, 2)]
    model.train()
    loop = _loop(model)
    for _ in range(6):
        _advance(loop)


def test_the_curve_scores_every_trained_rank_in_evaluation_mode_and_leaves_the_model_as_it_was() -> None:
    model = _tiny(min_rank=2)
    expected = {}
    for rank in range(2, RANK + 1):
        with at_rank(model.eval(), rank):
            expected[rank] = float(model(X).sum())
    model.train()
    assert rank_curve(model, lambda m: float(m(X).sum())) == expected
    assert rank_curve(model, lambda m: float(m(X).sum()), ranks=[3]) == {3: expected[3]}
    assert model.training and model.base_model.rank_in_use() == RANK


def test_training_lowers_the_loss_of_every_rank() -> None:
    model = _tiny(init_weights=True)

    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(X), Y))

    before = rank_curve(model, loss)
    loop = _loop(model, steps=60)
    for _ in range(60):
        _advance(loop)
    assert all(after < 0.8 * before[rank] for rank, after in rank_curve(model, loss).items())


def test_what_cannot_work_is_one_sentence() -> None:
    for options in ({"min_rank": 0}, {"min_rank": 9}, {"eval_rank": 0}, {"eval_rank": 9}):
        with pytest.raises(BayesLoraError, match="but must be from 1 to r = 8"):
            DyLoraConfig(r=8, **options)
    with pytest.raises(
        BayesLoraError, match="min_rank 5 leaves one rank to train, r = 5: lower it, or use plain LoRA"
    ):
        _loop(_tiny(min_rank=RANK))
    model = _tiny()
    for rank in (0, 6):
        with pytest.raises(BayesLoraError, match=f"rank {rank} is not among the ranks 1 to 5 that were trained"):
            model.base_model.set_rank(rank)
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="merged into the base weights at rank 5"), at_rank(model, 2):
        pass
    lora = get_peft_model(Tiny(), LoraConfig(target_modules=["first"]))
    with pytest.raises(BayesLoraError, match="was not trained with DyLoRA"):
        rank_curve(lora, lambda m: 0.0)


def test_the_configuration_survives_a_file(tmp_path: Path) -> None:
    options = DyLoraConfig(r=6, min_rank=2, frozen=True, target_modules=["first"])
    options.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is DyLoraConfig and again.to_dict() == options.to_dict()


def test_a_chosen_rank_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = _tiny(use_rslora=True).eval()
    whole = model(X)
    model.base_model.set_rank(2)
    expected = model(X)
    assert not torch.allclose(expected, whole)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path).eval()
    _close(again(X), expected)
    assert [layer.rank for layer in describe(again)] == [2, 2]
    again.base_model.set_rank(RANK)
    _close(again(X), whole)
    assert again.peft_config["default"].eval_rank is None
    with at_rank(model, 3):
        assert model.peft_config["default"].eval_rank == 3
    assert model.peft_config["default"].eval_rank == 2
