r"""Measurement of the evidence: the rise of the mean loss when a gate closes, by second order, from a few batches.

Closing a gate changes a tensor x by e: $Q_b(x) - x$ for a width, minus the component for a rank. With labels drawn
from the model's own prediction the mean of $\langle \partial\ell/\partial x, e \rangle$ is zero and its variance over
rows is the Fisher information along e, so that

$$ \Delta(e) = \tfrac{1}{2}\,\mathrm{E}_{rows}\bigl[ \langle \partial\ell/\partial x, e \rangle^2 \bigr]. $$

A sum of squares has no sign to lose: a few batches give it to some per cent. The first-order term with the labels of
the data is left out: it is zero at an optimum, and its standard error over n rows, $\sqrt{2\Delta / n}$, exceeds
Δ itself for every gate in question. With those labels instead of drawn ones Δ would vanish as a model fits its rows.

One pass runs the model once, forward and backward, without dropout, and touches neither gradients nor random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.methods.blora.evidence import MEASURED, RANGED
from bayeslora.methods.tuner import predicts_next
from bayeslora.quantization import Calibration, optimal_ranges, quantize

_ODD = 0x5851F42D4C957F2D  # an odd factor with bits set throughout
_LARGEST_CHUNK = 1 << 24  # entries of the gradients of single rows that are held at once

_COMPONENTS = "components"


class Probe:
    """Findings of one pass in one layer, as sums over the pass's rows.

    A layer that runs several times in a pass (ALBERT's, DeBERTa's projections of positions) has one gate for all of
    them: a row's derivatives are summed over the calls before they are squared, and the widest range holds. Calls
    with other numbers of rows are summed apart.

    Args:
        kinds: the quantized tensors of the layer, in order; empty where only ranks are learned.
        rank: r.
        rows: the batch's rows. A tensor that is not divided by rows (relative positions) counts as one row: with drawn
            labels the square of a sum over rows is the sum of their squares on average.
        fixed: kinds whose width is given: only the ranges of activations are found.
        calibration: how the range of an activation is found.
        weight_range: from kind and bits to the range of a weight.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        rank: int,
        rows: int,
        fixed: frozenset[str],
        calibration: Calibration,
        weight_range: Callable[[str, int], Tensor],
    ) -> None:
        self.kinds, self.rows, self.fixed = tuple(kinds), rows, fixed
        self.calibration, self.weight_range = calibration, weight_range
        self.rank = rank
        self.ranges = torch.zeros(len(kinds), len(RANGED))
        self._along: dict[tuple[str, int], Tensor] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.used = False

    def _measures(self, kind: str) -> bool:
        return kind in self.kinds and kind not in self.fixed

    def _row_count(self, tensor: Tensor) -> int:
        return self.rows if tensor.shape[0] % self.rows == 0 else 1

    def _add(self, name: str, along: Tensor) -> None:
        """Add the derivatives (rows, directions) of one call along the errors of `name`."""
        key = (name, len(along))
        self._along[key] = self._along[key] + along if key in self._along else along

    def activation(self, kind: str, before: Tensor, after: Tensor) -> Tensor:
        """Measure the activation `before` where its gradient arrives at `after`, which is returned."""
        if kind not in self.kinds or not before.numel():
            return after
        index, values = self.kinds.index(kind), before.detach()
        bounds = optimal_ranges(values, RANGED, self.calibration)
        found = torch.stack([bound.float().cpu() for bound in bounds])
        self.ranges[index] = torch.maximum(self.ranges[index], found)

        def measure(gradient: Tensor) -> None:
            rows = self._row_count(gradient)
            gradient = gradient.float()
            pairs = zip(MEASURED, bounds, strict=False)
            errors = (quantize(values, bound, bits).float() - values.float() for bits, bound in pairs)
            self._add(kind, torch.stack([(error * gradient).reshape(rows, -1).sum(1) for error in errors], dim=1))

        if self._measures(kind):
            after.register_hook(measure)
        return after

    def weight(self, kind: str, weight: Tensor, inputs: Tensor, output: Tensor) -> None:
        """Measure the weight (d_out, d_in) that multiplied `inputs` (..., d_in), where its gradient meets `output`."""
        if not self._measures(kind) or not weight.numel():
            return
        values, inputs = weight.detach().float(), inputs.detach()

        def measure(gradient: Tensor) -> None:
            rows = self._row_count(gradient)
            x = inputs.float().reshape(rows, -1, values.shape[1])
            g = gradient.float().reshape(rows, -1, values.shape[0])
            errors = [quantize(values, self.weight_range(kind, bits), bits) - values for bits in MEASURED]
            directions = torch.stack([error.flatten() for error in errors], dim=1)
            step = max(1, _LARGEST_CHUNK // values.numel())
            chunks = [(g[first : first + step], x[first : first + step]) for first in range(0, rows, step)]
            self._add(kind, torch.cat([torch.bmm(g.transpose(1, 2), x).flatten(1) @ directions for g, x in chunks]))

        output.register_hook(measure)

    def diagonal(self, values: Tensor, inputs: Tensor, output: Tensor) -> None:
        """Measure the diagonal E (r,), its width and its components, where its gradient reaches `output` (..., r)."""
        if not len(values):
            return
        values, inputs = values.detach().float(), inputs.detach()

        def measure(gradient: Tensor) -> None:
            rows = self._row_count(gradient)
            products = (gradient.float() * inputs.float()).unflatten(0, (rows, -1)).flatten(1, -2).sum(1)
            self._add(_COMPONENTS, products * values)
            if self._measures("E"):
                errors = [quantize(values, self.weight_range("E", bits), bits) - values for bits in MEASURED]
                self._add("E", products @ torch.stack(errors, dim=1))

        output.register_hook(measure)

    @property
    def found(self) -> dict[str, Tensor]:
        widths, ranks = torch.zeros(len(self.kinds), len(MEASURED)), torch.zeros(self.rank)
        for (kind, _), along in self._along.items():
            squares = along.square().sum(0).cpu()
            if kind == _COMPONENTS:
                ranks += squares
            else:
                widths[self.kinds.index(kind)] += squares
        return {
            "width_sums": widths,
            "rank_sums": ranks,
            "ranges": self.ranges,
            "passes": torch.tensor(float(self.used)),
        }


def probed_forward(layer: Any, name: str, x: Tensor, probe: Probe, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of Algorithm 1, as `BLoraLayer` has it, with the tensors of `probe` measured on the way."""
    probe.used = True
    quantized = layer.current_quantization(name)
    x = x + probe.anchor.to(x.device, x.dtype)
    inputs = probe.activation("in", x, quantized("in", x))
    if quantized.replaces_weight:
        weight = quantized("weight", layer.weight)
        result = F.linear(inputs, weight.T if layer.is_transposed else weight, layer.bias)
    else:
        result = layer.base_layer(inputs, *args, **kwargs)
    if layer.has_plain_weight:
        probe.weight("weight", layer.weight.T if layer.is_transposed else layer.weight, inputs, result)

    a, e, b = layer.blora_A[name], layer.blora_E[name], layer.blora_B[name]
    branch = layer.adapter_input(name, inputs, a.dtype)
    hidden = F.linear(branch, quantized("A", a).detach())
    probe.weight("A", a, branch, hidden)
    hidden = probe.activation("A_out", hidden, quantized("A_out", hidden))
    diagonal = layer.gated(name, quantized("E", e)).detach()
    scaled = hidden * diagonal.to(hidden.dtype)
    probe.diagonal(e, hidden, scaled)
    scaled = probe.activation("E_out", scaled, quantized("E_out", scaled))
    update = F.linear(scaled, quantized("B", b).detach())
    probe.weight("B", b, scaled, update)
    result = result + (update * layer.scaling[name]).to(result.dtype)
    return probe.activation("out", result, quantized("out", result))


def score_seed(output: Any, inputs: Mapping[str, Any], model: Any, step: int) -> tuple[Tensor, Tensor, int]:
    """Return logits, the derivative of drawn negative log-likelihoods by them, and the number of terms of the loss.

    Two classes need no draw but that of a sign: their two scores differ by a factor only. Regression is a Gaussian of
    variance 1/2, whose likelihood is the squared error; several labels are Bernoulli variables. Draws depend on a
    row's tokens and on `step` alone, so that they are the same on any rank. Of a model that returns no logits the loss
    on the labels of the data is used. Logits (B, C) of choices (`RowLoss`) have a label for each row, drawn among the
    choices that it has: of minus infinity neither a label nor a derivative comes. The tokens of a language model count
    where they are labelled or are not padding.
    """
    logits = logits_of(output)
    if logits is None:
        return _score_of_data(output, inputs)
    values = logits.detach().float()
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    outputs = values.shape[-1]
    present = _present(values, inputs, predicts_next(model))
    terms = int(present.sum())
    if problem == "regression" or (outputs == 1 and problem is None):
        signs = torch.where(row_uniform(values.shape, inputs, step, values.device) < 0.5, -1.0, 1.0)
        seed = signs * (2 / outputs) ** 0.5
    elif problem == "multi_label_classification":
        probability = torch.sigmoid(values)
        drawn = (row_uniform(values.shape, inputs, step, values.device) < probability).float()
        seed = (probability - drawn) / outputs**0.5
    elif outputs == 2:
        probability = torch.softmax(values, -1)
        size = probability.prod(-1, keepdim=True).sqrt()
        size = torch.where(row_uniform(size.shape, inputs, step, values.device) < 0.5, -size, size)
        seed = torch.cat([-size, size], -1)
    else:
        probability = torch.softmax(values, -1)
        uniform = row_uniform((*values.shape[:-1], 1), inputs, step, values.device)
        cumulative = probability.cumsum(-1)
        drawn = (cumulative < uniform * cumulative[..., -1:]).sum(-1)  # never a class of probability 0 at the end
        seed = probability - F.one_hot(drawn, outputs)
    seed = seed * present.reshape(*present.shape, *[1] * (seed.ndim - present.ndim))
    return logits, seed.to(logits.dtype), max(terms, 1)


def logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Tensor) and value.ndim > 1), None)
    found = _part_of(output, "logits")
    return found if isinstance(found, Tensor) and found.numel() else None


def loss_of(output: Any) -> Tensor:
    """Return the loss that a model without logits returns.

    Raises:
        BayesLoraError: the model returns neither.
    """
    loss = _part_of(output, "loss")
    if isinstance(loss, Tensor):
        return loss
    raise BayesLoraError(
        "the model returns neither logits nor a loss, but the evidence of the gates needs one of them: train a model "
        "with a head, or use gates='paper'"
    )


def _part_of(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _score_of_data(output: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Return the loss on the labels of the data, for a model that keeps its logits to itself, and its derivative.

    The loss is a mean over its terms, so the derivative of its sum is their number.
    """
    loss, labels = loss_of(output), inputs.get("labels")
    terms = int((labels != -100).sum()) if isinstance(labels, Tensor) and not labels.is_floating_point() else 1
    return loss, torch.tensor(float(max(terms, 1))).to(loss), max(terms, 1)


def _present(logits: Tensor, inputs: Mapping[str, Any], causal: bool) -> Tensor:
    """1 where a prediction counts: every row, or every token that is not padding and has a label.

    The labels are those of the tokens themselves, also in a causal model, which has the prediction one token earlier.
    """
    if logits.ndim < 3:
        return logits.new_ones(logits.shape[:1])
    present = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    for name in ("labels", "attention_mask"):
        given = inputs.get(name)
        if isinstance(given, Tensor) and given.shape == logits.shape[:2]:
            present = (given != -100) if name == "labels" else given.bool()
            break
    if causal:
        present = F.pad(present[:, 1:], (0, 1))
    return present.to(logits.device, logits.dtype)


def row_uniform(shape: Sequence[int], inputs: Mapping[str, Any], step: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) that a row's tokens (or other inputs), the step and the position decide.

    They are a hash of the three: those of two rows are independent over steps, as the square of a sum over rows needs.
    """
    given = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == shape[0]}
    chosen = given.get("input_ids", next(iter(given.values()), None))
    rows = torch.zeros(shape[0], dtype=torch.int64)
    if chosen is not None:
        flat = chosen.detach().reshape(len(chosen), -1).cpu()
        flat = flat.float().view(torch.int32).long() if flat.is_floating_point() else flat.long()
        kept, mask = torch.ones_like(flat), given.get("attention_mask")
        if mask is not None and mask.shape == chosen.shape:
            kept = mask.reshape(flat.shape).cpu().long()  # how far a row is padded depends on its batch
        entries = _hashed(flat + (kept.cumsum(1) - 1) * _ODD) * kept
        rows = entries.sum(1)
    places = torch.arange(int(torch.Size(shape[1:]).numel()))
    mixed = _hashed(_hashed(rows.reshape(-1, 1) + step) + places)
    return ((mixed >> 20) & 0xFFFFFF).reshape(tuple(shape)).to(device, torch.float32) / 2**24


def _hashed(values: Tensor) -> Tensor:
    """Mix the bits of 64-bit integers; products wrap around."""
    for _ in range(3):
        values = (values ^ ((values >> 31) & 0x1FFFFFFFF)) * _ODD
    return values ^ ((values >> 31) & 0x1FFFFFFFF)
