r"""LoRA cut to lower ranks after training, by the singular values of its update or by what its components are worth.

With QR decompositions $B = Q_B R_B$ and $A^\top = Q_A R_A$, the decomposition of the r × r matrix
$R_B R_A^\top = U \Sigma V^\top$ gives that of the update,

$$ s B A = (Q_B U)\, s \Sigma\, (Q_A V)^\top, $$

without a d × d matrix. The k largest singular values are the best update of rank k in the Frobenius norm (Eckart and
Young, 1936). Over several layers the largest of all singular values are the best for a mean rank.

What matters is not the update but the predictions. Given data, the components that stay are those without which the
mean loss rises least, together and to second order, and they take over what the others did:
`bayeslora.methods.blora.components` has the equations. The singular vectors stay as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import lora_layers
from bayeslora.methods.blora.components import Watch, close_together, deal, taken_over
from bayeslora.methods.blora.probe import logits_of, score_seed
from bayeslora.methods.config import KEPT_FIELDS
from bayeslora.methods.layer import device_of
from bayeslora.methods.tuner import batch_rows
from bayeslora.posthoc.plain_lora import lora_factors, only_lora, with_adapter


class _Update(NamedTuple):
    """The update of one layer: `left` (d_out, r), `values` (r,) without the scaling, `right` (r, d_in), float64."""

    left: Tensor
    values: Tensor
    right: Tensor
    scaling: float

    def part(self, kept: Tensor | slice, factors: Tensor | None = None) -> _Update:
        """Return the components that `kept` names, after each of all components is multiplied by its factor."""
        values = self.values if factors is None else self.values * factors.to(self.values)
        if isinstance(kept, Tensor):
            kept = kept.to(values.device)
        return _Update(self.left[:, kept], values[kept], self.right[kept], self.scaling)


def truncate_rank(
    model: nn.Module,
    rank: int | Mapping[str, int] | None = None,
    *,
    mean_rank: float | None = None,
    data: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Return a copy of a LoRA model with its update cut to lower ranks, without training.

    The result is an ordinary PEFT LoRA model with a `rank_pattern`, and is saved and loaded as such. Singular values
    are split equally between A and B, and every layer keeps its scaling. A layer at rank 0 has no adapter.

    Without `data`, the largest singular values stay. With `data`, one forward and backward pass without dropout finds
    the derivatives of each row's log-likelihood along all components, for labels drawn from the model's own
    predictions. Components are then chosen jointly, to change the predictions least, and the remaining ones are
    rescaled to make up for the others. The pass keeps 256 numbers per component, however many rows there are.

    Args:
        model: a PEFT model with one LoRA adapter on linear layers. It stays unchanged; its base model is copied.
        rank: maximum rank of every layer, or a dictionary from layer paths, as in `bayeslora.describe`, to ranks;
            layers that are missing from it keep their rank.
        mean_rank: mean rank over all layers, instead of `rank`. Keeps the largest singular values of the scaled
            updates, or the components chosen with `data`, so a layer may have rank 0. At least one rank is kept.
        data: a batch or batches of inputs, such as a few hundred training rows, for `mean_rank` only. Labels are not
            needed; for a language model, labels of -100 mark the tokens that do not count.
        seed: seed of the drawn labels and of the sketch. For two classes and for regression only signs are drawn.

    Raises:
        BayesLoraError: the model does not have exactly one LoRA adapter of A and B alone, the adapter's initialization
            has changed the base weights, a rank is impossible, a layer does not exist, or no rank would be left;
            `data` is given without `mean_rank`, has no rows, or shows no effect of the adapter.
    """
    name, config = only_lora(model)
    if (rank is None) == (mean_rank is None):
        raise BayesLoraError(
            f"rank is {rank!r} and mean_rank {mean_rank!r}, but exactly one must be given: give one of them"
        )
    if data is not None and mean_rank is None:
        raise BayesLoraError("data is given with rank, but chooses components for a mean rank: give mean_rank instead")
    updates = {path: _decomposed(layer, name) for path, layer in lora_layers(cast(PeftModel, model), name).items()}
    total = None if mean_rank is None else _total(updates, mean_rank)
    if total is not None and data is not None:
        columns = component_sketch(_rebuilt(model, name, config, updates), name, list(updates), data, seed)
        cut = _by_evidence(updates, total, columns)
    else:
        ranks = _by_layer(updates, rank) if total is None else _by_values(updates, total)
        cut = {path: update.part(slice(ranks[path])) for path, update in updates.items()}
    if not any(len(update.values) for update in cut.values()):
        raise BayesLoraError("every rank is 0, but at least 1 must be left: use the base model alone")
    return _rebuilt(model, name, config, cut)


def _decomposed(layer: Any, name: str) -> _Update:
    a, b = lora_factors(layer, name)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _Update(q_b @ u, values, vh @ q_a.T, float(layer.scaling[name]))


def _by_layer(updates: Mapping[str, _Update], rank: int | Mapping[str, int] | None) -> dict[str, int]:
    """Return the rank of each layer for one maximum or for given ranks."""
    largest = {path: len(update.values) for path, update in updates.items()}
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - set(largest)):
            raise BayesLoraError(
                f"rank names {unknown[0]!r}, but the adapted layers are {', '.join(sorted(largest)[:3])}, …: give "
                "paths as in bayeslora.describe(model)"
            )
        for path, value in rank.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest[path]:
                raise BayesLoraError(
                    f"the rank of {path} is {value!r}, but must be a whole number from 0 to {largest[path]}: give "
                    "such a rank"
                )
        return {**largest, **rank}
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BayesLoraError(f"rank is {rank!r}, but must be a whole number of at least 1: give a rank")
    return {path: min(rank, most) for path, most in largest.items()}


def _total(updates: Mapping[str, _Update], mean_rank: float) -> int:
    """Return the number of components for a mean rank."""
    most = sum(len(update.values) for update in updates.values())
    total = round(mean_rank * len(updates)) if 0 < mean_rank < float("inf") else 0
    if not 1 <= total <= most:
        raise BayesLoraError(
            f"mean_rank is {mean_rank!r}, but must be above 0, and at most {most / len(updates):g} for this "
            "adapter: give such a mean"
        )
    return total


def _by_values(updates: Mapping[str, _Update], total: int) -> dict[str, int]:
    """Return the ranks with which the `total` largest singular values over all layers are kept."""
    values = [(float(v) * abs(u.scaling), path) for path, u in updates.items() for v in u.values]
    kept = [path for _, path in sorted(values, key=lambda each: -each[0])[:total]]
    return {path: kept.count(path) for path in updates}


def _by_evidence(updates: Mapping[str, _Update], total: int, columns: Tensor) -> dict[str, _Update]:
    """Return the `total` components that are worth the most together, rescaled to take over from the others.

    Args:
        updates: by layer.
        total: number of components to keep.
        columns: (m, K) for all components, in the order of the layers.
    """
    is_open, _ = close_together(columns, limit=total)
    factors = taken_over(columns, torch.ones_like(is_open), is_open)
    sizes = [len(update.values) for update in updates.values()]
    parts = zip(updates.items(), is_open.split(sizes), factors.split(sizes), strict=True)
    return {path: update.part(kept, factor) for (path, update), kept, factor in parts}


def component_sketch(
    model: PeftModel, name: str, paths: list[str], data: Mapping[str, Any] | Iterable[Mapping[str, Any]], seed: int
) -> Tensor:
    r"""Return the sketch (m, K) of the rows' derivatives along the components of all layers, float64.

    Args:
        model: with A of each layer such that its r outputs are those of the components.
        name: of its adapter.
        paths: of the adapted layers, in order.
        data: a batch or batches.
        seed: as for `truncate_rank`.
    """
    layers = lora_layers(model, name)
    inner = [cast(nn.Linear, layers[path].lora_A[name]) for path in paths]
    watches = [Watch(each.out_features, each.weight.device) for each in inner]
    with ExitStack() as hooks:
        for each, watch in zip(inner, watches, strict=True):
            each.weight.requires_grad_()
            hooks.enter_context(each.register_forward_hook(functools.partial(_watch, watch)))
        for index, batch in enumerate([data] if isinstance(data, Mapping) else data):
            _show(model, [each.weight for each in inner], watches, batch, seed * 1_000_003 + index)
    columns = torch.cat([watch.sketch for watch in watches], dim=1).cpu().double()
    if not columns.any() or not columns.isfinite().all():
        raise BayesLoraError(
            "the data show no finite effect of the adapter on the predictions, but the cut goes by that: give batches "
            "of inputs, such as training rows"
        )
    return columns


def _show(model: PeftModel, weights: list[Tensor], watches: list[Watch], batch: Mapping[str, Any], step: int) -> None:
    """Show the derivatives of one batch, for labels that the model draws in `step`, to the watches."""
    device = device_of(model)
    given = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
    dealt = deal(given, batch_rows((), given), -1 - step)  # not the numbers that draw the labels
    for watch in watches:
        watch.dealt = dealt
    with torch.enable_grad():
        output = model(**{key: value for key, value in given.items() if key != "labels"})
        if logits_of(output) is None:
            raise BayesLoraError("the model returns no logits, but data need them: give a model with a head")
        logits, drawn, _ = score_seed(output, given, model.get_base_model(), step)
        torch.autograd.grad(logits, weights, drawn, allow_unused=True)


def _watch(watch: Watch, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add the derivatives by a factor 1 of each component, between A and B."""
    watch.diagonal(output.new_ones(output.shape[-1]), output, output)


def _rebuilt(model: nn.Module, name: str, config: Any, updates: Mapping[str, _Update]) -> PeftModel:
    """Return a copy of `model` in which A and B of every layer are those of its update; one of rank 0 has none."""
    matrices = {}
    left = {path: update for path, update in updates.items() if len(update.values)}
    for path, update in left.items():
        roots, signs = update.values.abs().sqrt(), update.values.sign()
        matrices[f"{path}.lora_A.weight"] = (roots.unsqueeze(1) * update.right).float().contiguous()
        matrices[f"{path}.lora_B.weight"] = (update.left * (roots * signs)).float().contiguous()
    return with_adapter(copy.deepcopy(model), name, _config(config, left, len(updates)), matrices)


def _config(config: Any, updates: Mapping[str, _Update], layers: int) -> LoraConfig:
    """Return the configuration with the ranks and scalings of these updates, which are all or some of the `layers`."""
    ranks = {path: len(update.values) for path, update in updates.items()}
    shared = {field: getattr(config, field) for field in KEPT_FIELDS}
    if len(ranks) < layers:  # full paths, because names such as `query` would match the other layers too
        shared |= {"target_modules": sorted(ranks), **dict.fromkeys(("exclude_modules", "layers_to_transform"))}
        shared["layers_pattern"] = None
    largest = max(ranks.values())
    alphas = {p: updates[p].scaling * (k**0.5 if config.use_rslora else k) for p, k in ranks.items()}
    rounded = {p: round(a) if abs(a - round(a)) < 1e-9 * abs(a) else a for p, a in alphas.items()}
    alpha = rounded[max(ranks, key=lambda path: ranks[path])]
    return LoraConfig(
        **shared,
        r=largest,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float scales just as well
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        rank_pattern={path: k for path, k in ranks.items() if k != largest},
        alpha_pattern={path: a for path, a in rounded.items() if a != alpha},  # type: ignore[misc]
    )
