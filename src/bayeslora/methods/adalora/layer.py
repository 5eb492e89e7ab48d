"""The layer of AdaLoRA: its tensors, its forward pass, and what of it is deployed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora._peft import BufferDict
from bayeslora.methods.adalora.config import AdaLoraConfig
from bayeslora.methods.layer import BayesLayer, add_update


class AdaLoraLayer(BayesLayer):
    """One linear layer under AdaLoRA; the same in plain torch on one page: `tests/oracles/adalora.py`.

    Tensors of an adapter: `bayes_adalora_A` (r, d_in), `bayes_adalora_E` (r,), `bayes_adalora_B` (d_out, r).
    `adalora_mask` (r,) is 1 for the ranks that the last allocation kept and 0 for the others; absent before it.
    """

    adapter_layer_names = ("bayes_adalora_A", "bayes_adalora_E", "bayes_adalora_B")
    other_param_names = (*BayesLayer.other_param_names, "adalora_mask")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.bayes_adalora_A, self.bayes_adalora_E = nn.ParameterDict(), nn.ParameterDict()
        self.bayes_adalora_B = nn.ParameterDict()
        self.adalora_mask = BufferDict(persistent=False)
        self.register_load_state_dict_post_hook(_drop_contradicted_masks)

    def add_adapter(self, adapter_name: str, config: AdaLoraConfig, rank: int) -> None:
        self.bayes_adalora_A[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.bayes_adalora_E[adapter_name] = nn.Parameter(torch.full((rank,), float(not config.init_weights)))
        self.bayes_adalora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, rank))
        for container in (self.bayes_adalora_A, self.bayes_adalora_B):
            if rank and config.init_weights:
                nn.init.normal_(container[adapter_name], std=0.02)
            elif rank:
                nn.init.kaiming_uniform_(container[adapter_name], a=math.sqrt(5))

    def triplets(self, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A (r, d_in), E (r,) and B (d_out, r)."""
        return self.bayes_adalora_A[name], self.bayes_adalora_E[name], self.bayes_adalora_B[name]

    def diagonal(self, name: str) -> Tensor:
        """E (r,) without the ranks that were cut: they stay cut where noise is added to the weights."""
        e = self.bayes_adalora_E[name]
        return e * self.adalora_mask[name] if name in self.adalora_mask else e

    def adapted(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in adapter_names:
            a, _, b = self.triplets(name)
            hidden = F.linear(self.adapter_input(name, x, a.dtype), a * self.diagonal(name).unsqueeze(1))
            result = add_update(result, hidden, b, self.scaling[name])
        return result

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        a, _, b = self.triplets(adapter_name)
        return a.float(), self.diagonal(adapter_name).float(), b.float()

    @torch.no_grad()
    def shrink(self, adapter_name: str) -> int:
        """Cut the ranks whose entry of E is zero out of every tensor; the scaling stays."""
        keep = self.kept(adapter_name)
        self.cut(self.bayes_adalora_A, adapter_name, keep)
        self.cut(self.bayes_adalora_E, adapter_name, keep)
        self.cut(self.bayes_adalora_B, adapter_name, (slice(None), keep))
        if adapter_name in self.adalora_mask:
            del self.adalora_mask[adapter_name]
        return int(keep.sum())


class Linear(AdaLoraLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""


def _drop_contradicted_masks(layer: nn.Module, keys: Any) -> None:
    """Weights from before the last allocation, such as a best checkpoint's, still have the ranks it cut."""
    layer = cast(AdaLoraLayer, layer)
    for name in list(layer.adalora_mask):
        e, mask = layer.bayes_adalora_E[name], layer.adalora_mask[name]
        if e.shape != mask.shape or bool((e[mask == 0] != 0).any()):
            del layer.adalora_mask[name]
