"""Cut the LoRA of a run to a mean rank, chosen on the run's training rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bayeslora.methods import describe
from bayeslora.model_card import write_card
from bayeslora.posthoc import truncate_rank
from bayeslora.runs.rows import training_batches
from bayeslora.runs.run import Run

_BATCHES = 32
_MEASURED = 8


@torch.no_grad()
def export_cut(run: Run, mean_rank: float, folder: Path, base_model_id: str | None = None) -> dict[str, Any]:
    """Write the run's LoRA at a mean rank into `folder`, as plain LoRA with a rank for each layer.

    The mean is over all adapted layers, and above 0. The configuration names `base_model_id`, a hub id, if given.

    Returns:
        `mean_rank`, `ranks` by layer (0: no adapter), `rows` of train that chose them, and of classifiers what the cut
        changes on 256 of these: `divergence`, in nats a row, and `changed`, the share of other answers.

    Raises:
        BayesLoraError: the training rows cannot be found, the adapter is not a single plain LoRA, or the rank is
            impossible.
    """
    batches = training_batches(run.info, run.tokenizer, _BATCHES, seed=0)
    with torch.enable_grad():
        cut = truncate_rank(run.model, mean_rank=mean_rank, data=batches)
    config = cut.peft_config[cut.active_adapter]
    config.base_model_name_or_path = base_model_id or config.base_model_name_or_path
    cut.save_pretrained(str(folder), save_embedding_layers=False)
    ranks = dict.fromkeys((layer.name for layer in describe(run.model)), 0)
    ranks |= {layer.name: layer.rank for layer in describe(cut)}
    rows = sum(len(batch["input_ids"]) for batch in batches)
    found: dict[str, Any] = {"mean_rank": sum(ranks.values()) / len(ranks), "ranks": ranks, "rows": rows}
    moved = _moved(run, cut, batches[:_MEASURED]) if run.info.kind == "classification" else {}
    write_card(folder, "lora", cut.get_base_model(), config, moved)
    return {**found, **moved}


def _moved(run: Run, cut: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Return how far the cut moves the run's predictions on these batches."""
    pairs = [[F.log_softmax(model(**batch).logits.float(), -1) for model in (run.model, cut)] for batch in batches]
    before, after = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
    changed = (before.argmax(-1) != after.argmax(-1)).float().mean()
    return {"divergence": float(divergence), "changed": float(changed)}
