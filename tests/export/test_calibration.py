"""Static grids of inputs: those with which the layer's output is nearest to what it was."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from bayeslora import BLoraConfig
from bayeslora.export.calibration import CODES, LayerInputs, inputs_of_plain_layers
from bayeslora.quantization import FLOOR
from tests.conftest import build_tiny_bert


def _seen(rows: Tensor, weight: Tensor) -> LayerInputs:
    found = LayerInputs(weight)
    found.add(rows)
    return found


def _error(rows: Tensor, weight: Tensor, lowest: float, highest: float) -> float:
    """The error of the product, by a list of all values of the grid."""
    step = (highest - lowest) / CODES
    zero_point = round(-lowest / step)
    values = (torch.arange(CODES + 1) - zero_point) * step
    rounded = values[(rows[..., None] - values).abs().argmin(-1)]
    return float(((rounded - rows) @ weight.T).square().mean())


@pytest.fixture
def rows() -> Tensor:
    """Inputs with one column that is thirty times as large as the others, on one side of 0."""
    found = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    found[:, 3] = found[:, 3].abs() * 30
    return found


def test_a_grid_reaches_for_a_large_column_only_if_the_weight_reads_it(rows: Tensor) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    lowest, highest = _seen(rows, weight).best_ends()
    assert highest > 0.8 * rows.max() and -6 < lowest < -2
    weight[:, 3] = 0
    assert _seen(rows, weight).best_ends()[1] < 0.4 * rows.max()
    assert _seen(rows, weight).best_range() < 0.4 * rows.max()


def test_the_ends_are_better_than_those_of_all_values_and_than_symmetric_ones(rows: Tensor) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight[:, 3] *= 0.1
    seen = _seen(rows, weight)
    best, bound = _error(rows, weight, *seen.best_ends()), seen.best_range()
    assert best <= _error(rows, weight, float(rows.min()), float(rows.max())) * (1 + 1e-5)
    assert best < 0.5 * _error(rows, weight, -bound, bound)
    assert _error(rows, weight, -bound, bound) <= _error(rows, weight, -float(rows.max()), float(rows.max()))


def test_zeros_have_a_grid() -> None:
    seen = _seen(torch.zeros(4, 5), torch.ones(3, 5))
    assert seen.best_ends() == (0.0, 0.0) and seen.best_range() == FLOOR


def test_padding_and_layers_with_an_adapter_do_not_count() -> None:
    config = BLoraConfig(r=2, target_modules=["query", "key", "value"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(num_hidden_layers=1), config).eval()
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = inputs_of_plain_layers(model, [{"input_ids": ids, "attention_mask": mask}])
    path = "bert.encoder.layer.0.intermediate.dense"
    assert len(torch.cat(found[path].rows)) == 12 + 5 and not any("query" in each for each in found)
    others = ids.clone()
    others[1, 5:] = 3
    again = inputs_of_plain_layers(model, [{"input_ids": others, "attention_mask": mask}])
    torch.testing.assert_close(torch.cat(again[path].rows), torch.cat(found[path].rows))
    assert not any(isinstance(module, nn.Linear) and module._forward_pre_hooks for module in model.modules())
