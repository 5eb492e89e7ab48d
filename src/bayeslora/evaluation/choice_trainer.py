"""Trainer for multiple choice, with a loss over the choices of an item, for both kinds of model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import Trainer

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.items import ClassLogits, trained_logits


class ChoiceTrainer(Trainer):
    """Trainer whose loss is the mean cross entropy of `class_logits(model, batch)` against `labels`.

    Its predictions are these (n, C) logits, with minus infinity for absent choices. A `compute_loss_func` cannot do
    this: it sees neither the choices of an item nor the loss's denominator (the Trainer counts labels over
    micro-batches, which would scale a mean over items wrongly). The model stays an ordinary (PEFT) model, saved and
    loaded as usual; `bayeslora.attach` accepts this Trainer like any other.

    ```python
    scoring = choice_scoring(data["train"], tokenizer)
    trainer = ChoiceTrainer(
        class_logits=scoring.logits, data_collator=scoring.collate, model=model, args=args, train_dataset=data["train"]
    )
    bayeslora.attach(trainer, num_examples=len(data["train"]))      # one term of the loss per item
    ```

    Args:
        class_logits: function from the model and a batch to (B, C) logits, such as `LetterLogits` or `PairLogits`.

    Raises:
        BayesLoraError: label smoothing is on, which would give probability to absent choices.
    """

    def __init__(self, *args: Any, class_logits: ClassLogits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise BayesLoraError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, but absent choices must have "
                "probability 0: leave it at 0"
            )
        self.class_logits = class_logits
        # Models do not accept the mask of absent choices, and some do not accept labels.
        self.args.remove_unused_columns = False
        self.label_names = ["labels"]
        # The loss is a mean over its own batch: the Trainer divides it by the number of micro-batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean cross entropy over the items of a batch, and on request `{"logits": (B, C)}`."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        logits = trained_logits(model, self.class_logits, batch, inputs["labels"])
        labels = inputs["labels"].to(logits.device)
        if not torch.isfinite(logits.detach().gather(1, labels[:, None])).all():
            raise BayesLoraError(
                "the logit of a correct answer is not finite, but must be: train with a smaller learning rate or in "
                "float32"
            )
        loss = functional.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss
