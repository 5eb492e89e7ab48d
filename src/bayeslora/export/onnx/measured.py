"""The error of a graph: its outputs in onnxruntime beside those of the model that it was written from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.agreement import compare
from bayeslora.export.formats import inputs_for, output_error, output_of
from bayeslora.export.onnx.reader import OnnxClassifier, OnnxDecoder, OnnxEncoderDecoder
from bayeslora.methods.layer import evaluation_mode


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


class Measured:
    """Rows with the outputs of the model, to compare a graph with.

    Args:
        model: in evaluation mode.
        batches: of inputs; None stands for the model's `dummy_inputs`.
        names: of the graph's inputs.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None], names: Sequence[str]) -> None:
        self.batches = list(filled_inputs(model, batches, names))
        self.outputs = [cast(Tensor, output_of(model, batch)).cpu() for batch in self.batches]
        self.is_multi_label = _config_of(model).problem_type == "multi_label_classification"

    def errors(self, folder: Path) -> dict[str, Any]:
        """Return the differences in the outputs of the graph in the folder."""
        if not self.batches:
            return {"rows": 0, **output_error(None, None)}
        graph = OnnxClassifier(folder)
        found = torch.cat([graph(**batch).logits for batch in self.batches])
        expected = torch.cat(self.outputs)
        errors = {"rows": len(found), **output_error(expected, found)}
        if expected.shape[1] > 1:
            errors |= self._changes(expected, found)
        return errors

    def _changes(self, expected: Tensor, found: Tensor) -> dict[str, float]:
        """Return the share of rows with other answers, and the mean divergence of a row in nats."""
        if self.is_multi_label:
            changed = ((expected > 0) != (found > 0)).any(1)
            before, after = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)]) for z in (expected, found))
            divergence = (before.exp() * (before - after)).sum() / len(found)
        else:
            changed = expected.argmax(1) != found.argmax(1)
            before, after = F.log_softmax(expected, 1), F.log_softmax(found, 1)
            divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
        return {"changed": float(changed.float().mean()), "divergence": float(divergence.clamp_min(0))}


class MeasuredDecoder:
    """Rows to compare the graph of a decoder on, token by token, without a cache.

    Args:
        model: in whose answers the difference is.
        batches: of inputs; None stands for the model's `dummy_inputs`.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None]) -> None:
        self.model = model
        self.batches = list(filled_inputs(model, batches, ["input_ids", "attention_mask"]))

    def errors(self, folder: Path) -> dict[str, Any]:
        """Return the differences in the next tokens of the graph in the folder."""
        graph = OnnxDecoder(folder)

        def found(row: Mapping[str, Tensor]) -> Tensor:
            return cast(Tensor, graph(**row).logits)

        def expected(row: Mapping[str, Tensor]) -> Tensor:
            return cast(Tensor, output_of(self.model, row))

        with evaluation_mode(self.model):
            return compare(expected, found, self.batches).summary()


class MeasuredEncoderDecoder:
    """Rows to compare the graphs of an encoder-decoder on, token by token of their answers.

    Args:
        model: in whose answers the difference is.
        batches: of inputs with `labels` or `decoder_input_ids`; None stands for the model's `dummy_inputs`.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None]) -> None:
        self.model = model
        self.batches = [self._answers(batch) for batch in batches]

    def _answers(self, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the answers as `compare` reads them, with the texts as `source` and `source_mask`."""
        found = inputs_for(self.model, batch) or {}
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
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

    def errors(self, folder: Path) -> dict[str, Any]:
        """Return the differences in the next tokens of the graphs in the folder."""
        graph = OnnxEncoderDecoder(folder)

        def asked(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
            names = {"input_ids": "source", "attention_mask": "source_mask", "decoder_input_ids": "input_ids"}
            return {name: row[key] for name, key in names.items()}

        def found(row: Mapping[str, Tensor]) -> Tensor:
            return cast(Tensor, graph(**asked(row)).logits)

        def expected(row: Mapping[str, Tensor]) -> Tensor:
            return cast(Tensor, output_of(self.model, asked(row)))

        with evaluation_mode(self.model):
            return compare(expected, found, self.batches).summary()


def _config_of(model: nn.Module) -> Any:
    return cast(Any, model).config
