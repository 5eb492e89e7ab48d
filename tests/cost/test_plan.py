"""A plan from a configuration says what the built, wrapped, trained and saved model then has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import bayeslora
from bayeslora.cost import build_for_task, count_parameters, from_config, plan, relative_bops
from bayeslora.data import packaged_model
from bayeslora.errors import BayesLoraError
from bayeslora.methods import METHODS, describe
from tests.cost.models import QKV, tiny_config

LLAMA_2 = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
CLASSES: dict[str, Any] = {"lora": peft.LoraConfig, **METHODS}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")
# Gates that are never seen fully open: a tensor at 32 bits would not be quantized at all.
NARROW = {"warmup_fraction": 0.0, "initial_bit_logits": [4.0, 4.0, -9.0, -9.0]}


def method_config(method: str, family: str = "bert", **changes: Any) -> Any:
    rank = {"init_r": 4, "target_r": 2} if method == "bayes_adalora" else {"r": 4}
    return CLASSES[method](**{**rank, "target_modules": list(QKV[family]), **changes})


def family_config(family: str, dropout: float) -> transformers.PretrainedConfig:
    config = tiny_config(family, pad_token_id=0)
    if family != "deberta-v2":
        config._attn_implementation = "sdpa"
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def kept_by_autograd(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that a real pass saves, parameters and buffers aside."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def classifier_batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(rows, tokens, dtype=torch.long), "labels": torch.zeros(rows, dtype=torch.long)}


@pytest.mark.parametrize(
    ("size", "method", "count"),
    [
        ("7b", "lora", 4_483_072),
        ("7b", "blob", 6_612_992),
        ("7b", "melora", 4_491_392),
        ("13b", "lora", 6_850_560),
        ("13b", "blob", 10_168_320),
        ("13b", "melora", 6_860_928),
    ],
)
def test_the_parameters_of_llama_2_from_a_bare_configuration(
    tmp_path: Path, size: str, method: str, count: int
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 32000, **LLAMA_2[size]}))
    # Me-LoRA's abstract counts deviations that are learned.
    learned = {"variance": "learned"} if method == "melora" else {}
    config = CLASSES[method](r=8, target_modules=["q_proj", "v_proj", "lm_head"], **learned)
    found = plan(path, config, batch_size=1, tokens=16)
    assert found.parameters["trainable"] == found.parameters["adapter"] == count
    assert (found.model, found.task_type) == ("LlamaForCausalLM", "CAUSAL_LM")
    assert len(found.layers) == 2 * LLAMA_2[size]["num_hidden_layers"] + 1
    assert found.bytes["optimizer"] == 8 * count
    assert found.bytes["activations"] is not None


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full", "lora", "melora", "blob"])
def test_activations_are_what_autograd_keeps_of_a_real_pass(family: str, dropout: float, method: str) -> None:
    config = family_config(family, dropout)
    config.architectures = [build_for_task(copy.deepcopy(config), "SEQ_CLS")[0].__class__.__name__]
    config.problem_type = "single_label_classification"
    adapter = None if method == "full" else method_config(method, family)
    planned = plan(config, adapter, batch_size=6, tokens=20).bytes["activations"]
    model = transformers.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
        model = peft.get_peft_model(model, adapter)
    assert planned is not None
    real = kept_by_autograd(model.train(), classifier_batch(6, 20))
    # A fully trained DeBERTa shares one small tensor between its layers that the fake pass does not.
    assert planned == pytest.approx(real, rel=1e-3 if (family, method) == ("deberta-v2", "full") else 0)


@pytest.mark.parametrize("family", ["bert", "albert", "llama"])
def test_activations_of_quantizers_are_near_what_a_real_pass_keeps(family: str) -> None:
    """Left out: ranges and gates. Too much: quantized weights of a first layer, whose input needs no gradient."""
    config = family_config(family, 0.1)
    adapter = method_config("blora", family, gates="paper", **NARROW)
    planned = plan(config, adapter, task_type="SEQ_CLS", batch_size=16, tokens=40).bytes["activations"]
    adapter.task_type = "SEQ_CLS"
    base = transformers.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    model = peft.get_peft_model(base, adapter).train()
    batch = classifier_batch(16, 40)
    model(**batch)  # sets the ranges; from here on gates are drawn
    assert planned == pytest.approx(kept_by_autograd(model, batch), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "blob"])
def test_activations_are_near_the_memory_that_a_step_of_minilm_allocates(method: str) -> None:
    """What the estimate leaves out, short-lived tensors, is at most a quarter on top."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(packaged_model("minilm"), num_labels=2)
    adapter = method_config(method, r=8)
    planned = plan(base.config, adapter, task_type="SEQ_CLS", batch_size=8, tokens=64).bytes["activations"]
    adapter.task_type = "SEQ_CLS"
    model = peft.get_peft_model(base, adapter).train()
    batch = classifier_batch(8, 64)
    model(**batch).loss.backward()  # gradients exist from here on
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        model(**batch).loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert planned is not None
    assert planned <= peak <= 1.25 * planned


def test_a_gpu_keeps_dropout_masks_of_one_byte() -> None:
    config = family_config("bert", 0.1)
    config.attention_probs_dropout_prob = 0.0
    sizes = [
        plan(config, method_config("lora"), batch_size=6, tokens=20, device=device).bytes["activations"]
        for device in ("cpu", "cuda")
    ]
    # Twice in each of two layers, not in the frozen embeddings: a mask of 6 x 20 x 32 entries in 4 bytes, or in 1.
    assert sizes[0] is not None and sizes[1] is not None
    assert sizes[0] - sizes[1] == 4 * 6 * 20 * 32 * 3


def test_a_gpu_keeps_no_scores() -> None:
    """Without scores the memory of attention grows with the length, with them by its square."""
    config = family_config("bert", 0.0)
    config.attention_probs_dropout_prob = 0.1
    for device, grows_evenly in (("cuda", True), ("cpu", False)):
        sizes = [
            plan(config, method_config("lora"), batch_size=2, tokens=tokens, device=device).bytes["activations"]
            for tokens in (8, 16, 24)
        ]
        assert None not in sizes
        assert (sizes[2] - sizes[1] == sizes[1] - sizes[0]) is grows_evenly


@pytest.mark.parametrize("method", sorted(CLASSES))
def test_every_method_is_planned_as_it_is_then_built_and_saved(method: str, tmp_path: Path) -> None:
    config = tiny_config("bert", architectures=["BertForSequenceClassification"], num_labels=3)
    adapter = method_config(
        method, target_modules=["query", "value"], rank_pattern={"layer.0.attention.self.query": 2}
    )
    found = plan(config, adapter, batch_size=2, tokens=8)
    assert found.task_type == "SEQ_CLS"
    adapter.task_type = "SEQ_CLS"
    base = transformers.BertForSequenceClassification(copy.deepcopy(config))
    weights = sum(parameter.numel() for parameter in base.parameters())
    model = peft.get_peft_model(base, adapter)
    for name, parameter in model.named_parameters():
        if "adalora_E" in name:  # starts at zero, where a rank counts as cut; the plan is of the trained model
            torch.nn.init.ones_(parameter)
    assert found.parameters == count_parameters(model)
    assert found.bytes["weights"] == 4 * (found.parameters["total"]) > 4 * weights
    assert found.bytes["gradients"] == 4 * found.parameters["trainable"]
    assert found.relative_bops == relative_bops(model, tokens=8)
    described = describe(model)
    assert [(x.name, x.in_features, x.out_features, x.rank) for x in found.layers] == [
        (x.name, x.in_features, x.out_features, x.initial_rank if x.initial_rank < 4 else x.rank) for x in described
    ]
    assert [layer.rank for layer in found.layers] == [2, 4, 4, 4]
    model.save_pretrained(tmp_path)
    assert found.bytes["file"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors", metadata={"format": "pt"})
    assert found.bytes["file_16bit"] == (tmp_path / "half.safetensors").stat().st_size


def test_full_fine_tuning_trains_every_weight() -> None:
    found = plan(tiny_config("bert"), None, batch_size=2, tokens=8)
    assert found.parameters["trainable"] == found.parameters["total"]
    assert found.parameters["adapter"] == 0
    assert found.layers == []
    # One copy of the weights, one of gradients, two of AdamW's moments.
    assert found.bytes["weights"] == found.bytes["gradients"] == 4 * found.parameters["total"]
    assert found.bytes["optimizer"] == 8 * found.parameters["total"]


def test_a_base_in_16_bits_keeps_its_adapter_in_32() -> None:
    single, half = (
        plan(tiny_config("bert"), method_config("melora"), batch_size=2, tokens=8, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    weights = single.parameters["total"] - single.parameters["adapter"]
    assert half.parameters == single.parameters
    assert half.bytes["weights"] == 2 * weights + 4 * single.parameters["adapter"]
    assert half.bytes["gradients"] == single.bytes["gradients"]
    assert half.bytes["activations"] is not None and single.bytes["activations"] is not None
    assert half.bytes["activations"] < single.bytes["activations"]


@pytest.mark.parametrize(
    ("family", "changes", "task", "expected"),
    [
        ("bert", {}, None, ("BertModel", None)),
        ("bert", {"architectures": ["BertForMaskedLM"]}, None, ("BertForMaskedLM", None)),
        ("bert", {"architectures": ["BertForTokenClassification"]}, None, ("BertForTokenClassification", "TOKEN_CLS")),
        ("bert", {"architectures": ["BertModel"]}, "QUESTION_ANS", ("BertForQuestionAnswering", "QUESTION_ANS")),
        ("llama", {"architectures": ["LlamaModel"]}, None, ("LlamaForCausalLM", "CAUSAL_LM")),
        ("llama", {}, "SEQ_CLS", ("LlamaForSequenceClassification", "SEQ_CLS")),
        ("gpt2", {}, None, ("GPT2LMHeadModel", "CAUSAL_LM")),
    ],
)
def test_the_head_is_the_configurations_or_the_tasks(
    family: str, changes: dict[str, Any], task: str | None, expected: tuple[str, str | None]
) -> None:
    found = plan(tiny_config(family, **changes), method_config("lora", family), task_type=task, tokens=8)
    assert (found.model, found.task_type) == expected
    assert found.bytes["activations"] is not None


def test_heads_that_no_checkpoint_holds_are_trained() -> None:
    """DeBERTa's classifier comes with a pooler of its own."""
    config = tiny_config("deberta-v2", architectures=["DebertaV2Model"])
    found = plan(config, method_config("lora", "deberta-v2"), task_type="SEQ_CLS", tokens=8)
    assert found.parameters["trainable"] == found.parameters["adapter"] + (32 * 32 + 32) + (32 * 2 + 2)


def test_a_plan_changes_nothing() -> None:
    config, adapter = tiny_config("bert"), method_config("melora")
    before, random = (config.to_dict(), copy.deepcopy(adapter.to_dict())), torch.get_rng_state()
    plan(config, adapter, task_type="SEQ_CLS", batch_size=2, tokens=8)
    assert (config.to_dict(), adapter.to_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_cannot_run_without_values_is_planned_but_for_its_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = transformers.BertModel.forward

    def reading(self: nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.sum() > 0:
            return forward(self, input_ids, **kwargs)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.BertModel, "forward", reading)
    found = plan(tiny_config("bert"), method_config("lora"), tokens=8)
    assert found.bytes["activations"] is found.bytes["training"] is None
    assert found.parameters["adapter"] == 6 * 4 * 64
    assert len(found.notes) == 1 and "activations are unknown" in found.notes[0]


def test_what_cannot_be_planned_is_refused() -> None:
    config, adapter = tiny_config("bert"), method_config("lora")
    with pytest.raises(BayesLoraError, match="tokens is 41, but the model takes 40"):
        plan(config, adapter, tokens=41)
    for name in ("batch_size", "tokens"):
        with pytest.raises(BayesLoraError, match=f"{name} is 0"):
            plan(config, adapter, **{"tokens": 8, name: 0})
    with pytest.raises(BayesLoraError, match="dtype is 'int8'"):
        plan(config, adapter, tokens=8, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="device is 'tpu'"):
        plan(config, adapter, tokens=8, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="task_type is 'SEQ', but must be one of"):
        plan(config, adapter, tokens=8, task_type="SEQ")
    with pytest.raises(BayesLoraError, match="task_type is SEQ_2_SEQ_LM, but .* not have a llama model"):
        plan(tiny_config("llama"), adapter, tokens=8, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(BayesLoraError, match="LoraConfig does not fit BertModel"):
        plan(config, peft.LoraConfig(target_modules=["no_such_layer"]), tokens=8)
    with pytest.raises(BayesLoraError, match="is a Embedding"):
        plan(config, bayeslora.BLoraConfig(target_modules=["word_embeddings"]), tokens=8)
    with pytest.raises(BayesLoraError, match="does not exist"):
        from_config("/no/such/folder")
