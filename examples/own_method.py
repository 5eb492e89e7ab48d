"""A method of your own: SoRA, a low-rank adapter whose gates an L1 penalty closes (arXiv:2311.11696).

    python examples/own_method.py
    python examples/own_method.py --model FOLDER_OR_HUB_ID --task mrpc --data_dir FOLDER --steps 500

    y = W0 x + b + s B diag(g) A x,     loss + lambda sum |g|

The paper takes a proximal step on g; here the penalty is part of the loss, and small gates are set to zero. The code
before `main` is all that a method needs; docs/own-method.md explains it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bayeslora
from bayeslora.data import encode, load_task, packaged_model
from bayeslora.evaluation import compute_metrics_for
from bayeslora.methods import AdapterConfig, BayesLayer, BayesTuner, add_update


@dataclass
class SoraConfig(AdapterConfig):
    sparsity: float = field(default=1e-3, metadata={"help": "lambda, the weight of the gates' L1 norm."})
    threshold: float = field(default=0.02, metadata={"help": "A gate of smaller magnitude is set to zero."})


class SoraLayer(BayesLayer):
    adapter_layer_names = ("sora_A", "sora_gate", "sora_B")

    def __init__(self, base_layer: nn.Module, **kwargs: object) -> None:
        super().__init__(base_layer, **kwargs)
        self.sora_A, self.sora_gate, self.sora_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

    def add_adapter(self, adapter_name: str, config: SoraConfig, rank: int) -> None:
        self.sora_A[adapter_name], self.sora_B[adapter_name] = self.initial_factors(config, rank)
        self.sora_gate[adapter_name] = nn.Parameter(torch.full((rank,), 0.1))

    def adapted(self, x: Tensor, adapter_names: list[str], *args: object, **kwargs: object) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in adapter_names:
            a, gate, b = self.sora_A[name], self.sora_gate[name], self.sora_B[name]
            hidden = F.linear(self.adapter_input(name, x, a.dtype), a) * gate
            result = add_update(result, hidden, b, self.scaling[name])
        return result

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.sora_A[adapter_name], self.sora_gate[adapter_name], self.sora_B[adapter_name]
        return parts[0].float(), parts[1].float(), parts[2].float()

    def shrink(self, adapter_name: str) -> int:
        keep = self.kept(adapter_name)
        self.cut(self.sora_A, adapter_name, keep)
        self.cut(self.sora_gate, adapter_name, keep)
        self.cut(self.sora_B, adapter_name, (slice(None), keep))
        return int(keep.sum())


class SoraModel(BayesTuner):
    title = "SoRA"
    prefix = "sora_"
    tuner_layer_cls = linear_class = SoraLayer
    penalty_names = ("sparsity",)

    def gates(self) -> list[nn.Parameter]:
        name = self.training_adapter()
        return [layer.sora_gate[name] for layer in self.adapted_layers(name)]

    def penalty(self) -> dict[str, Tensor]:
        weight = self.peft_config[self.training_adapter()].sparsity
        return {"sparsity": weight * torch.cat(self.gates()).abs().sum()}

    def role_of(self, parameter_name: str) -> str:
        return "gates" if ".sora_gate." in parameter_name else "weights"  # with a group of their own: no decay

    @torch.no_grad()
    def step_end(self, step: int) -> None:
        threshold = self.peft_config[self.training_adapter()].threshold
        for gate in self.gates():
            gate[gate.abs() < threshold] = 0


bayeslora.register_method("sora", SoraConfig, SoraModel)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the packaged MiniLM)")
    parser.add_argument("--task", default="rotten_tomatoes", help="a task that `bayeslora train --task` knows")
    parser.add_argument("--data_dir", help="folder with <task>/<split>.jsonl")
    parser.add_argument("--output_dir", default="runs/examples/own_method", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--sparsity", type=float, default=1e-3, help="weight of the gates' L1 norm")
    options = parser.parse_args(arguments)
    set_seed(0)

    folder = options.model or packaged_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = load_task(options.task, options.data_dir)
    data = encode(task, tokenizer, max_length=64)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))
    targets = ["query", "key", "value"]
    config = SoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS", sparsity=options.sparsity)
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_for(task),
    )
    bayeslora.attach(trainer).train()
    layers = bayeslora.describe(trainer.model)
    result = {**trainer.evaluate(), "mean_rank": sum(layer.rank for layer in layers) / len(layers)}
    bayeslora.shrink(trainer.model)
    trainer.model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(result)
    return result


if __name__ == "__main__":
    main()
