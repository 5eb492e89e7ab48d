"""Deep ensembles (Lakshminarayanan et al., 2017, arXiv:1612.01474): independently trained members, averaged.

Members are saved adapters on one base model, each with its own trained head, or whole models. Their probabilities are
averaged, not their logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.variational import posterior_mean
from bayeslora.prediction import Logits, Sampler


class DeepEnsemble:
    """Predictor that averages over an ensemble; `samples` must be the number of members, or 0 for all of them.

    Variational members predict at their posterior means.

    Args:
        members: whole models, or one PEFT model whose adapters are the members.
        adapters: names of the member adapters of that model; None takes all of its adapters.

    Raises:
        BayesLoraError: there are fewer than two members, or adapters are missing from the model.
    """

    def __init__(self, members: Sequence[nn.Module] | PeftModel, adapters: Sequence[str] | None = None) -> None:
        self._peft = members if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList) else None
        if self._peft is not None:
            known = list(getattr(self._peft, "peft_config", {}))
            self._adapters = known if adapters is None else list(adapters)
            if missing := [name for name in self._adapters if name not in known]:
                raise BayesLoraError(
                    f"the adapter {missing[0]!r} was given, but the model has {', '.join(known) or 'none'}: load it "
                    "with load_adapter, or use DeepEnsemble.from_folders"
                )
            self.model: nn.Module = self._peft
            self.size = len(self._adapters)
        else:
            self.model = nn.ModuleList(members)
            self.size = len(self.model)
        if self.size < 2:
            raise BayesLoraError(f"the ensemble has {counted(self.size, 'member')}, but needs at least 2: add others")

    @classmethod
    def from_folders(cls, base: nn.Module, folders: Sequence[str | Path]) -> DeepEnsemble:
        """Load saved PEFT adapters of one kind into one base model as an ensemble.

        Raises:
            BayesLoraError: there are fewer than two folders, or one lacks an adapter for this model.
        """
        if len(folders) < 2:
            raise BayesLoraError(
                f"the ensemble has {counted(len(folders), 'member')}, but needs at least 2: add others"
            )
        names = [f"member{index}" for index in range(len(folders))]
        model: Any = None
        for name, folder in zip(names, folders, strict=True):
            try:
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
                else:
                    model.load_adapter(str(folder), adapter_name=name)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = str(error).split("\n")[0].rstrip(".")
                raise BayesLoraError(
                    f"{folder} was given, but lacks an adapter for this model ({reason}): give folders that "
                    "save_pretrained wrote"
                ) from error
        return cls(model.eval(), names)

    def check_samples(self, samples: int) -> None:
        if samples not in (0, self.size):
            raise BayesLoraError(
                f"samples is {samples}, but the ensemble's samples are its {counted(self.size, 'member')}: give "
                f"samples={self.size}, or 0 for the same"
            )

    def sampler(self, samples: int, seed: int, antithetic: bool, read: Logits) -> Sampler:
        def members(batch: Mapping[str, Tensor]) -> Tensor:
            with posterior_mean(self.model):
                return torch.stack(list(self._outputs(batch, read)))

        return members

    def _outputs(self, batch: Mapping[str, Tensor], read: Logits) -> Iterator[Tensor]:
        if self._peft is None:
            for member in self.model.children():
                yield read(member, batch)
            return
        with _adapters_restored(self._peft):
            for name in self._adapters:
                self._peft.set_adapter(name)  # type: ignore[operator]  # switches heads, too
                yield read(self._peft, batch)


@contextmanager
def _adapters_restored(model: Any) -> Iterator[None]:
    """Restore the active adapter and every parameter's `requires_grad` afterwards, since PEFT changes both."""
    active = model.active_adapter
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
