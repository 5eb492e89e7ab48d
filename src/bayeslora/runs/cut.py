"""Cut the LoRA of a run to a mean rank, chosen on the run's training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bayeslora.methods import describe
from bayeslora.posthoc import truncate_rank
from bayeslora.runs.rows import training_batches
from bayeslora.runs.run import Run

_BATCHES = 32
_MEASURED = 8


@torch.no_grad()
def export_cut(run: Run, mean_rank: float, folder: Path) -> dict[str, Any]:
    """Write the run's LoRA at a mean rank into `folder`, as plain LoRA with a rank for each layer.

    Args:
        run: of plain LoRA.
        mean_rank: over all adapted layers, above 0.
        folder: for the adapter.

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
    cut.save_pretrained(str(folder), save_embedding_layers=False)
    ranks = dict.fromkeys((layer.name for layer in describe(run.model)), 0)
    ranks |= {layer.name: layer.rank for layer in describe(cut)}
    rows = sum(len(batch["input_ids"]) for batch in batches)
    found = {"mean_rank": sum(ranks.values()) / len(ranks), "ranks": ranks, "rows": rows}
    if run.info.kind != "classification":
        return found
    pairs = [
        [F.log_softmax(model(**batch).logits.float(), -1) for model in (run.model, cut)]
        for batch in batches[:_MEASURED]
    ]
    before, after = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
    changed = (before.argmax(-1) != after.argmax(-1)).float().mean()
    return {**found, "divergence": float(divergence), "changed": float(changed)}
