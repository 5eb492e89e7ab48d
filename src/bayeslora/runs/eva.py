"""EVA: start LoRA from the inputs of its layers (Paischer et al., 2024, arXiv:2410.07170), with PEFT's implementation.

PEFT leaves an adapter with `init_lora_weights="eva"` at a random start until it is given batches.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, initialize_lora_eva_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayeslora.data.encode import right_padded
from bayeslora.errors import BayesLoraError
from bayeslora.prediction import evaluation_mode


def initialize_eva(model: nn.Module, data: Dataset, tokenizer: Any, batch_size: int = 32, seed: int = 0) -> bool:
    """Start the adapter of `model` from training rows if it is LoRA with `init_lora_weights="eva"`.

    Ranks move between layers as `eva_config.rho` allows; a layer may lose its adapter. Batches of the encoded rows are
    drawn, in an order by `seed`, until the singular vectors have converged.

    Returns:
        Whether the adapter was one to start.

    Raises:
        BayesLoraError: rows do not have a list of tokens each, such as pairs of a question and its choices.
    """
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    if not any(getattr(config, "init_lora_weights", None) == "eva" for config in configs.values()):
        return False
    columns = [name for name in data.column_names if name in tokenizer.model_input_names]
    if "input_ids" not in columns or not isinstance(data[0]["input_ids"][0], int):
        raise BayesLoraError(
            "init_lora_weights is 'eva', but the rows are not single texts: use another start for this task"
        )
    loader: DataLoader[Any] = DataLoader(
        data.select_columns(columns),  # type: ignore[arg-type]  # a map-style data set
        batch_size=min(batch_size, len(data)),
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        drop_last=True,  # the incremental decomposition needs more tokens than components in every batch
        collate_fn=functools.partial(right_padded, tokenizer),
    )
    with evaluation_mode(model):
        initialize_lora_eva_weights(model, loader, prepare_model_inputs_fn=_tokens, show_progress_bar=False)
    return True


def _tokens(batch: dict[str, Tensor], config: Any) -> Tensor:
    """Return the places (n, 2) of the tokens that are not padding."""
    return batch["attention_mask"].bool().nonzero()
