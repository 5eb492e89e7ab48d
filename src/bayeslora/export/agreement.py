r"""Measure the distance of an export's answers from those of the model that it was written from.

At each position $i$ with an answer (a row of a classifier, a token of a language model) let $p_i$ be the model's
distribution and $q_i$ the export's. The divergence is the mean of
$\mathrm{KL}(p_i \| q_i) = \sum_c p_i(c) (\log p_i(c) - \log q_i(c))$ in nats, and an answer has changed if
$\arg\max p_i \ne \arg\max q_i$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import inputs_for, output_of
from bayeslora.methods.layer import device_of, evaluation_mode

Outputs = Callable[[dict[str, Tensor]], Tensor]
"""Returns the logits, (rows, classes) or (rows, tokens, words), of a batch of inputs."""

MOST_DIVERGENCE = 0.01
"""Largest mean divergence, in nats, of an export that is written without being asked to allow an error."""
_AT_ONCE = 1 << 24  # logits in memory at a time, besides those of one row


@dataclass
class Agreement:
    """Sums over the positions seen so far.

    Attributes:
        rows: number of rows.
        positions: number of positions with an answer.
        changes: number of positions with another answer.
        total_divergence: sum of the divergences, in nats.
        max_divergence: of one position.
        max_output_error: largest difference of two logits.
        max_output: largest logit of the model, by magnitude.
        tokens: number of tokens that a language model predicts in the rows.
        loss_before: sum of the model's negative log-likelihoods of these tokens, in nats.
        loss_after: the same for the export.
    """

    rows: int = 0
    positions: int = 0
    changes: int = 0
    total_divergence: float = 0.0
    max_divergence: float = 0.0
    max_output_error: float = 0.0
    max_output: float = 0.0
    tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0

    def add(self, expected: Tensor, found: Tensor, targets: Tensor | None = None) -> None:
        """Add positions.

        Args:
            expected: logits (n, classes) of the model.
            found: logits of the export.
            targets: (n,) the tokens that follow, -1 where none does; None for a classifier.
        """
        step = max(1, _AT_ONCE // expected.shape[1])
        for start in range(0, len(expected), step):
            part = slice(start, start + step)
            self._add(expected[part].float(), found[part].float(), None if targets is None else targets[part])

    def _add(self, expected: Tensor, found: Tensor, targets: Tensor | None) -> None:
        self.positions += len(expected)
        self.max_output_error = max(self.max_output_error, float((found - expected).abs().max()))
        self.max_output = max(self.max_output, float(expected.abs().max()))
        self.changes += int((expected.argmax(1) != found.argmax(1)).sum())
        before, after = F.log_softmax(expected, 1), F.log_softmax(found, 1)
        divergences = F.kl_div(after, before, reduction="none", log_target=True).sum(1).clamp_min(0)
        self.total_divergence += float(divergences.sum())
        self.max_divergence = max(self.max_divergence, float(divergences.max()))
        if targets is not None:
            follows = targets >= 0
            ids = targets[follows].unsqueeze(1)
            self.tokens += len(ids)
            self.loss_before -= float(before[follows].gather(1, ids).sum())
            self.loss_after -= float(after[follows].gather(1, ids).sum())

    def summary(self) -> dict[str, Any]:
        """Return the measurements as the exports do; those that nothing was measured for are None."""
        if not self.positions:
            return {"rows": 0, "max_output_error": None, "max_output": None, "changed": None, "divergence": None}
        found: dict[str, Any] = {
            "rows": self.rows,
            "max_output_error": self.max_output_error,
            "max_output": self.max_output,
            "changed": self.changes / self.positions,
            "divergence": self.total_divergence / self.positions,
            "max_divergence": self.max_divergence,
        }
        if self.tokens:
            found["loss_before"] = self.loss_before / self.tokens
            found["loss_after"] = self.loss_after / self.tokens
        return found


@torch.no_grad()
def compare(expected: Outputs, found: Outputs, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Return the agreement of two models on `batches` of inputs, one row at a time.

    A language model, and a classifier of tokens, have an answer at every position that the `attention_mask` shows; an
    encoder-decoder at those of its decoder.
    """
    agreement = Agreement()
    for batch in batches:
        for number in range(len(batch["input_ids"])):
            row = {name: values[number : number + 1] for name, values in batch.items()}
            before, after = expected(row).cpu(), found(row).cpu()
            agreement.rows += 1
            if before.ndim == 2:
                agreement.add(before, after)
                continue
            of = "decoder_" if "decoder_input_ids" in row else ""
            ids = row[of + "input_ids"][0].cpu()
            shown = row.get(of + "attention_mask", torch.ones_like(ids)[None])[0].cpu().bool()
            ids = ids[shown]
            targets = torch.cat([ids[1:], ids.new_full((1,), -1)])
            is_text = before.shape[-1] > ids.max()  # and not classes of tokens
            agreement.add(before[0][shown], after[0][shown], targets if is_text else None)
    return agreement


def difference(model: nn.Module, loaded: nn.Module, batches: Iterable[Mapping[str, Tensor] | None]) -> dict[str, Any]:
    """Return the measured difference of an export, loaded again, from its model, as `Agreement.summary` does.

    Args:
        model: that was exported, left in its mode.
        loaded: moved to its device.
        batches: of inputs, None for the model's `dummy_inputs`.
    """
    given = list(batches)
    inputs = [each for batch in given if (each := inputs_for(model, batch)) is not None]
    loaded.to(device_of(model))
    return compared(model, loaded, inputs) | ({"dummy_inputs": True} if given == [None] else {})


def compared(
    model: nn.Module,
    loaded: nn.Module,
    rows: Iterable[Mapping[str, Tensor]],
    inputs_of: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> dict[str, Any]:
    """Return the summary of the agreement of two models, which read what `inputs_of` makes of a row."""

    def outputs_of(network: nn.Module) -> Outputs:
        return lambda row: cast(Tensor, output_of(network, inputs_of(row)))

    with evaluation_mode(model):
        return compare(outputs_of(model), outputs_of(loaded), rows).summary()


def check_divergence(measured: Mapping[str, Any], form: str, answers: str = "next tokens", reason: str = "") -> None:
    """Raise `BayesLoraError` if an export, such as `the graph`, diverges by more than `MOST_DIVERGENCE`."""
    if measured["divergence"] is not None and not measured["divergence"] <= MOST_DIVERGENCE:
        raise BayesLoraError(
            f"{form} diverges by {measured['divergence']:.2g} nats from the model and changes "
            f"{measured['changed']:.1%} of the {answers}{reason}, but {MOST_DIVERGENCE} nats is the most: allow and "
            "measure the error with allow_error=True, or export another format"
        )
