"""The rows of the GLUE table: how each is configured, trained and described. Their titles are in `records.py`.

All rows adapt the same layers of the same model for the same number of steps, with a scaling of 2; rsLoRA's is
16 / √8 = 5.7. EVA gives each layer a rank of its own. What differs is in `ROWS`. Learning rates other than the task's,
as multiples of it:

    full            a twentieth: a rate for adapters destroys a whole model
    pvera           10: what it trains are scales of random matrices, as in VeRA
    adalora         10: its diagonal begins at zero, between factors of small entries, and at 1e-3 stays near it
    bayes_adalora   IVON's, which takes no square root of a variance: see `IVON_RATES`

The last two were chosen on held-out training rows of SST-2, MRPC and CoLA (`results/README.md`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Training, model_folder
from peft import AdaLoraConfig, LoraConfig, MontecloraConfig, PeftConfig, PveraConfig
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.pvera.layer import PveraLayer
from records import IVON_SETTINGS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import bayeslora
from bayeslora.methods.description import LayerDescription
from bayeslora.runs.names import locate, order_matrices

Options = dict[str, Any]
RANK, INITIAL_RANK = 8, 12
NF4_BITS = 4
IVON_RATES = {"paper": 2e3, "moving": 4e5, "short": 4e5}
"""By setting, times the task's rate for Adam: at 1e-3 the paper's 2 for small tasks, and what short runs need."""


class Allocation(TrainerCallback):
    """What PEFT's AdaLoRA asks of its user in every step: after the optimizer's update, before gradients go."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)


def nf4() -> Options:
    """A base model in 4 bits, but for its head."""
    skipped = ["classifier", "pooler", "score", "lm_head"]
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
    }


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        build: from the shared options and the number of steps to the adapter's configuration; None without one.
        rate: times the task's learning rate, where IVON does not train.
        ivon: a name in `IVON_SETTINGS`, where IVON trains.
        samples: scored with so many samples, too.
        loading: options for `from_pretrained`.
        callback: makes one for the adapted model.
        mixin: a class to put before the Trainer's.
    """

    build: Callable[[Options, int], PeftConfig | None]
    rate: float = 1.0
    ivon: str | None = None
    samples: int = 0
    loading: Callable[[], Options] = dict
    callback: Callable[[nn.Module], TrainerCallback] | None = None
    mixin: type | None = None


def lora(rank: int, **options: Any) -> Callable[[Options, int], PeftConfig]:
    return lambda shared, steps: LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, **options, **shared})


def ours(method: str, **options: Any) -> Callable[[Options, int], PeftConfig]:
    return lambda shared, steps: bayeslora.METHODS[method](**{"r": RANK, "lora_alpha": 2 * RANK, **options, **shared})


def falling_ranks(kind: type[PeftConfig], rank: int = RANK) -> Callable[[Options, int], PeftConfig]:
    """AdaLoRA of either library on the same schedule, to a mean rank of `rank`."""

    def build(shared: Options, steps: int) -> PeftConfig:
        schedule = {"tinit": steps // 10, "tfinal": 4 * steps // 10, "deltaT": 10}
        if kind is AdaLoraConfig:
            schedule["total_step"] = steps
        ranks = {"init_r": INITIAL_RANK, "target_r": rank, "lora_alpha": 2 * INITIAL_RANK}
        return kind(**{**ranks, **schedule, **shared})

    return build


PAPER: Options = {"gates": "paper", "rotate": False}
QUANTIZED: Options = {"quantize_input": True, "per_channel": True}
"""What a cost below 6% needs: products without a 32-bit operand, and one range a channel of W0."""

ROWS = {
    "full": Row(lambda shared, steps: None, rate=0.05),
    "lora-r1": Row(lora(1)),
    "lora-r2": Row(lora(2)),
    "lora": Row(lora(RANK)),
    "rslora": Row(lora(RANK, use_rslora=True)),
    "eva": Row(lora(RANK, init_lora_weights="eva")),
    "lora-nf4": Row(lora(RANK), loading=nf4),
    "adalora": Row(falling_ranks(AdaLoraConfig), rate=10, callback=Allocation),
    "adalora-r2": Row(falling_ranks(AdaLoraConfig, 2), rate=10, callback=Allocation),
    "bayes_adalora": Row(falling_ranks(bayeslora.AdaLoraConfig), ivon="short"),
    "dylora": Row(ours("dylora")),
    "blora-q": Row(ours("blora", mode="q", **PAPER)),
    "blora-ra": Row(ours("blora", mode="ra", **PAPER)),
    "blora-q+ra": Row(ours("blora", mode="q+ra", **PAPER)),
    "rotated-ra": Row(ours("blora", mode="ra", gates="paper", rotate=True)),
    "evidence-q": Row(ours("blora", mode="q", **QUANTIZED)),
    "evidence-ra": Row(ours("blora", mode="ra", target_rank=1.5)),
    "evidence-ra-r1": Row(ours("blora", mode="ra", target_rank=1.0)),
    "evidence-q+ra": Row(ours("blora", mode="q+ra", **QUANTIZED)),
    "melora": Row(ours("melora", variance="learned"), samples=10),
    "melora-closed": Row(ours("melora"), samples=10),
    "monteclora": Row(lora(RANK, monteclora_config=MontecloraConfig()), mixin=MontecloraTrainerMixin),
    # PEFT's default rank: two vectors a layer are trained, on random matrices that all layers share.
    "pvera": Row(lambda shared, steps: PveraConfig(**{"r": 256, **shared}), rate=10),
}


def training_of(row: Row, training: Training, changes: Mapping[str, Any], setting: str | None = None) -> Training:
    """A task's training at the row's learning rate, with `changes` of its fields; `setting` as in `optimizer_of`."""
    rate = IVON_RATES[setting or row.ivon] if row.ivon else row.rate
    own = replace(training, learning_rate=rate * training.learning_rate)
    fields = {field.name for field in dataclasses.fields(Training)}
    return replace(own, **{name: value for name, value in changes.items() if name in fields})


def optimizer_of(row: Row, setting: str | None = None) -> Options:
    """What a file records of the optimizer; `setting` is one of IVON's instead of the row's."""
    if row.ivon is None:
        return {"name": "adamw"}
    return {"name": "ivon", **IVON_SETTINGS[setting or row.ivon]}


def adapter_options(config: PeftConfig | None) -> Options | None:
    """What a file records of an adapter: every option of its method, defaults included, for those change."""
    if config is None:
        return None
    shared = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules"}
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in shared}
    return dict(json.loads(json.dumps({"peft_type": config.peft_type, **own}, default=_plain, sort_keys=True)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def target_modules(model: str, all_linear: bool) -> list[str]:
    """Ends of the names of the query, key and value projections of an encoder, or of all linear layers of its blocks.

    Of MiniLM's names `dense` is also that of the pooler before the head, which is adapted with them.
    """
    with torch.device("meta"):
        built = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model_folder(model)))
    places = [locate(name) for name, module in built.named_modules() if isinstance(module, nn.Linear)]
    chosen = [
        place.matrix
        for place in places
        if place.index is not None and (all_linear or place.role in ("q", "k", "v", "qkv"))
    ]
    return list(dict.fromkeys(matrix.rpartition(".")[2] for matrix in order_matrices(chosen)))


def describe(model: nn.Module) -> list[LayerDescription]:
    """`bayeslora.describe`, which knows PEFT's LoRA, with what PEFT's other adapters are at evaluation.

    AdaLoRA's rank is the number of entries of E that are left; a base weight in NF4 has 4 bits; PVeRA at its mean
    multiplies by a matrix of its full rank.
    """
    modules = dict(getattr(getattr(model, "base_model", model), "model", model).named_modules())
    found = []
    for layer in bayeslora.describe(model):
        module = modules[layer.name]
        if isinstance(module, AdaLoraLayer):
            (name,) = module.active_adapters
            layer = replace(layer, rank=int((module.lora_E[name] != 0).sum()))
        if type(getattr(module, "base_layer", None)).__name__ == "Linear4bit":
            layer = replace(layer, bits={**layer.bits, "weight": NF4_BITS})
        found.append(layer)
    for path, module in modules.items():
        if isinstance(module, PveraLayer):
            (name,) = module.active_adapters
            trained = module.pvera_lambda_b[name].numel() + module.pvera_lambda_d[name].numel()
            rank = module.r[name]
            found.append(LayerDescription(path, module.in_features, module.out_features, rank, rank, trained))
    return found
