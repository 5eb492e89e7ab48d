"""Read GGUF folders back into Transformers: the weights that llama.cpp computes with, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, one_line
from bayeslora.export.gguf.architectures import ROPE_FACTORS, Names, architecture_of
from bayeslora.export.gguf.blocks import Array

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


@torch.no_grad()
def load_gguf(folder: Path, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """Return the model of a folder that `export` wrote with `format="gguf"`, with its adapter added to the weights.

    Args:
        folder: with `model.gguf`, `config.json` and perhaps `adapter.gguf`.
        base: model to add the adapter to where the folder has an adapter alone; its weights are replaced.

    Raises:
        BayesLoraError: files that are missing or damaged, or do not belong together.
    """
    if (folder / MODEL_FILE).is_file():
        config = AutoConfig.from_pretrained(folder)
        base = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    elif base is None:
        raise BayesLoraError(f"{folder} has an adapter alone, but a base is needed: give one")
    names = Names(architecture_of(base), base.config)
    if (folder / MODEL_FILE).is_file():
        _fill(base, names, _tensors(folder / MODEL_FILE))
    if (folder / ADAPTER_FILE).is_file():
        _add(base, names, _tensors(folder / ADAPTER_FILE), _alpha(folder / ADAPTER_FILE))
    return base.eval()


def _reader(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the reader raises what it meets
        raise BayesLoraError(f"{file} cannot be read ({one_line(error)}): export it again") from error


def _tensors(file: Path) -> dict[str, Array]:
    """Return the tensors by name, in float32."""
    found = _reader(file).tensors
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float32) for each in found}


def _alpha(file: Path) -> float:
    field = _reader(file).get_field(gguf.Keys.Adapter.LORA_ALPHA)
    if field is None:
        raise BayesLoraError(f"{file} lacks {gguf.Keys.Adapter.LORA_ALPHA}, but needs it: export it again")
    return float(field.contents())


def _fill(model: PreTrainedModel, names: Names, tensors: dict[str, Array]) -> None:
    tensors.pop(ROPE_FACTORS, None)
    for path, parameter in model.named_parameters():
        name = names.of(path)
        if name not in tensors:
            raise BayesLoraError(f"the file lacks {name}, but config.json names a model with it: export it again")
        parameter.copy_(_in_model(tensors.pop(name), names, model, path))
    if tensors:
        raise BayesLoraError(f"the file has {min(tensors)}, but the model in config.json lacks it: export it again")


def _add(model: PreTrainedModel, names: Names, tensors: dict[str, Array], alpha: float) -> None:
    for path, parameter in list(model.named_parameters()):
        name = names.of(path)
        if f"{name}.lora_a" not in tensors:
            continue
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        update = _in_model(b @ a * np.float32(alpha / len(a)), names, model, path)
        parameter.data = parameter.data + update.to(parameter.device, parameter.dtype)
    if tensors:
        raise BayesLoraError(f"the adapter has {min(tensors)}, but the model lacks that layer: export it again")


def _in_model(values: Array, names: Names, model: nn.Module, path: str) -> Tensor:
    """Return the values in the order and layout that the model has at `path`."""
    back: Any = np.empty_like(values)
    back[names.order(names.of(path), len(values))] = values
    tensor, owner = torch.from_numpy(back), model.get_submodule(path.rpartition(".")[0])
    return tensor.T if isinstance(owner, Conv1D) and tensor.ndim == 2 else tensor
