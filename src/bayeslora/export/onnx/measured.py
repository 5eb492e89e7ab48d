"""The error of a graph: its outputs in onnxruntime beside those of the model that it was written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import inputs_for, output_error, output_of
from bayeslora.export.onnx.reader import OnnxClassifier


def filled_inputs(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None], names: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """Yield the named inputs of the batches; None stands for the model's `dummy_inputs`.

    A missing mask is 1 everywhere, and a missing type is 0.
    """
    for batch in batches:
        found = inputs_for(model, batch)
        if found is not None:
            ids = found["input_ids"]
            default = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            yield {name: found.get(name, default.get(name, ids)) for name in names}


def outputs_kept(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None], names: Sequence[str]
) -> Callable[[Path], dict[str, Any]]:
    """Return a function that measures the graph of a classifier by the outputs that the model has now.

    Args:
        model: in evaluation mode.
        batches: of inputs; None stands for the model's `dummy_inputs`.
        names: of the graph's inputs.
    """
    rows = list(filled_inputs(model, batches, names))
    outputs = [cast(Tensor, output_of(model, row)).cpu() for row in rows]

    def errors(folder: Path) -> dict[str, Any]:
        if not rows:
            return {"rows": 0, **output_error(None, None)}
        graph = OnnxClassifier(folder)
        found, expected = torch.cat([graph(**row).logits for row in rows]), torch.cat(outputs)
        measured = {"rows": len(found), **output_error(expected, found, model)}
        if cast(Any, model).config.problem_type == "multi_label_classification" and found.shape[1] > 1:
            before, after = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)]) for z in (expected, found))
            divergence = (before.exp() * (before - after)).sum() / len(found)
            measured["changed"] = float(((expected > 0) != (found > 0)).any(1).float().mean())
            measured["divergence"] = float(divergence.clamp_min(0))
        return measured

    return errors


def answers_of(model: nn.Module, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the answers of a batch as `compare` reads them, with the texts as `source` and `source_mask`.

    Args:
        model: an encoder-decoder.
        batch: inputs with `labels` or `decoder_input_ids`; None stands for the model's `dummy_inputs`.
    """
    found = inputs_for(model, batch) or {}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    answers = found.get("decoder_input_ids")
    labels = None if batch is None else batch.get("labels")
    if batch is None and answers is None:  # BART's `dummy_inputs` are a text, which is its own answer
        labels = found.get("input_ids")
    if answers is None and labels is not None:
        answers = base.prepare_decoder_input_ids_from_labels(labels=labels.to(found["input_ids"].device))
    if answers is None:
        raise BayesLoraError("a batch lacks labels, but an encoder-decoder is compared on its answers: add them")
    ids = found["input_ids"]
    mask = torch.ones_like(answers) if labels is None else (labels != -100).to(answers)
    return {
        "input_ids": answers,
        "attention_mask": mask,
        "source": ids,
        "source_mask": found.get("attention_mask", torch.ones_like(ids)),
    }


def asked(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of an encoder-decoder for a row of `answers_of`."""
    names = {"input_ids": "source", "attention_mask": "source_mask", "decoder_input_ids": "input_ids"}
    return {name: row[key] for name, key in names.items()}
