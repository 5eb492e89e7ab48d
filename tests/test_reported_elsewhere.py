"""Situations that people report of PEFT, Transformers and datasets: the right result here, or a sentence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as Lists
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    MambaConfig,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bayeslora
from bayeslora.cli.main import main
from bayeslora.cost import relative_bops
from bayeslora.data import load_files
from bayeslora.errors import BayesLoraError
from bayeslora.methods.blora.gated_quantizers import Phase
from bayeslora.methods.melora.cores import Deal
from bayeslora.methods.tuner import tuner_of
from tests.cli.conftest import review_rows, write_jsonl
from tests.conftest import build_tiny_bert, build_tiny_llama, build_tiny_tokenizer


def config(**options: Any) -> bayeslora.MeLoraConfig:
    return bayeslora.MeLoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", **options)


def trainer(model: Any, folder: Path, max_steps: int = 1) -> Trainer:
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3]] * 4, "attention_mask": [[1, 1, 1]] * 4, "labels": [0, 1] * 2})
    return Trainer(
        model, TrainingArguments(str(folder), max_steps=max_steps, report_to=[], use_cpu=True), train_dataset=rows
    )


def loaded_to_read(model: PreTrainedModel, folder: Path) -> Any:
    get_peft_model(build_tiny_bert(), config()).save_pretrained(folder)
    return PeftModel.from_pretrained(model, folder)


def frozen_by_hand(model: PreTrainedModel, folder: Path) -> Any:
    adapted = get_peft_model(model, config())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("melora" not in name)
    return adapted


@pytest.mark.parametrize(
    "make", [loaded_to_read, frozen_by_hand, lambda model, folder: get_peft_model(model, config(inference_mode=True))]
)
def test_a_frozen_adapter_is_not_trained(
    make: Callable[[PreTrainedModel, Path], Any], tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(BayesLoraError, match="the adapter's weights are frozen, .* is_trainable=True"):
        bayeslora.attach(trainer(make(tiny_bert, tmp_path), tmp_path / "out"))


def test_an_adapter_loaded_to_be_trained_is_trained(tiny_bert: PreTrainedModel, tmp_path: Path) -> None:
    loaded_to_read(tiny_bert, tmp_path)
    model = PeftModel.from_pretrained(build_tiny_bert(), tmp_path, is_trainable=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    bayeslora.attach(trainer(model, tmp_path / "out"), num_examples=4).train()
    assert any(not torch.equal(before[name], each) for name, each in model.named_parameters() if "melora" in name)


def test_adding_up_adapters_says_what_can_be_added_up(tiny_bert: PreTrainedModel) -> None:
    model: Any = get_peft_model(tiny_bert, config())
    model.add_adapter("second", config())
    with pytest.raises(BayesLoraError, match="only plain LoRA can be added up: export"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["pooler", "poler"]}, "modules_to_save names 'poler'"),
        ({"modules_to_save": ["clasifier"]}, "modules_to_save names 'clasifier'"),
    ],
)
def test_names_that_match_nothing_are_told(tiny_bert: PreTrainedModel, options: dict[str, Any], name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}, which matches nothing in the model: it has no effect"):
        get_peft_model(tiny_bert, config(**options))


@pytest.mark.parametrize("saved", [["embeddings"], ["bert.embeddings", "LayerNorm"]])
def test_modules_to_save_that_are_inside_one_another_are_refused(
    saved: list[str], tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    message = "which matches bert.embeddings and bert.embeddings.[A-Za-z_]+ inside it, .*: give bert.embeddings"
    with pytest.raises(BayesLoraError, match=message):
        get_peft_model(tiny_bert, config(modules_to_save=saved))
    model = get_peft_model(build_tiny_bert(), config(modules_to_save=["bert.embeddings"]))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build_tiny_bert(), tmp_path).peft_config["default"].modules_to_save


def test_names_that_match_are_not_told(tiny_bert: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*matches nothing")
        get_peft_model(tiny_bert, config(modules_to_save=["pooler"]))


@pytest.mark.parametrize("method", ["lora", "melora"])
def test_the_command_refuses_names_that_match_nothing(
    tmp_path: Path, tiny_bert_folder: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", review_rows(8, 0))
    files = [f"--model={tiny_bert_folder}", f"--train-file={data}", f"--eval-file={data}", "--text-column=text"]
    words = ["train", f"--method={method}", *files, "--modules-to-save=poler", f"--output-dir={tmp_path / 'out'}"]
    assert main(words) == 2
    assert (
        "--modules-to-save is 'poler', but matches nothing in the model, did you mean pooler" in capfd.readouterr().err
    )
    assert main([word.replace("poler", "embeddings") for word in words]) == 2
    assert "which matches bert.embeddings and bert.embeddings.word_embeddings inside it" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([np.int64(0), np.int64(1)], "classification", ["0", "1"]),
        ([np.bool_(True), np.bool_(False)], "classification", ["False", "True"]),
        ([np.float32(0.5), np.float32(1.5)], "regression", []),
        ([np.array(["a", "b"]), np.array(["b"])], "multi_label", ["a", "b"]),
        ([float("nan"), 0, 1], "classification", ["0", "1"]),
    ],
)
def test_values_of_numpy_are_numbers(labels: list[Any], kind: str, names: list[str]) -> None:
    rows = [{"text": "the movie", "label": label} for label in labels * 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = load_files(rows, rows, "text", "label")
    assert (task.kind, task.labels) == (kind, names)


def test_class_names_that_datasets_writes_into_parquet_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, -1]}, features=features).to_parquet(str(file))
    with pytest.warns(UserWarning, match="1 of 4 rows without a label"):
        task = load_files(file, file, "text", "label")
    assert [task.labels[number] for number in task.train_split["label"]] == ["spam", "ham", "spam"]
    tags = Features({"tokens": Lists(Value("string")), "ner_tags": Lists(ClassLabel(names=["O", "B-PER"]))})
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [0]]}
    Dataset.from_dict(rows, features=tags).to_parquet(str(file))
    task = load_files(file, file, "tokens", "ner_tags", kind="token_classification")
    assert (task.labels, task.metric) == (["B-PER", "O"], "span_f1")


@pytest.mark.parametrize("twins", [("Spam", "spam"), ("caf\u00e9", "cafe\u0301"), ("\uff11x", "1x")])
def test_labels_that_look_alike_are_told(twins: tuple[str, str]) -> None:
    rows = [{"text": "a", "label": label} for label in (*twins, "other")]
    with pytest.warns(UserWarning, match="which are read as two classes: write them the same way"):
        assert len(load_files(rows, rows, "text", "label").labels) == 3


def test_a_tokenizer_that_pads_on_the_left_changes_no_answer(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_bert().save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    data = write_jsonl(tmp_path / "data.jsonl", review_rows(16, 0))
    files = [f"--model={base}", f"--train-file={data}", f"--eval-file={data}", "--text-column=text"]
    options = ["--max-steps=8", "--learning-rate=0.02", f"--output-dir={tmp_path / 'out'}"]
    assert main(["train", "--method=lora", *files, *options]) == 0
    run = bayeslora.load(tmp_path / "out")
    texts = ["good", "the movie was good and the film was very clever too"]
    together, alone = (run.predict(texts, batch_size=size).probabilities for size in (2, 1))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert run.tokenizer.padding_side == "left"


def test_a_decoder_reads_the_last_token_before_its_tokenizers_padding(tmp_path: Path) -> None:
    base, data = tmp_path / "base", write_jsonl(tmp_path / "data.jsonl", review_rows(16, 0))
    LlamaForSequenceClassification(build_tiny_llama(pad_token_id=4).config).save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    files = [f"--model={base}", f"--train-file={data}", f"--eval-file={data}", "--text-column=text"]
    options = ["--max-steps=8", "--learning-rate=0.02", f"--output-dir={tmp_path / 'out'}"]
    assert main(["train", "--method=lora", *files, *options]) == 0
    assert main(["export", str(tmp_path / "out"), "--format=merged", f"--output-dir={tmp_path / 'merged'}"]) == 0
    texts = ["good", "the movie was good and the film was very clever too"]
    for folder in ("out", "merged"):
        together, alone = (
            bayeslora.load(tmp_path / folder).predict(texts, batch_size=n).probabilities for n in (2, 1)
        )
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_targets_of_an_unknown_model_are_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, data = tmp_path / "base", write_jsonl(tmp_path / "data.jsonl", review_rows(8, 0))
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    MPNetForSequenceClassification(MPNetConfig(**sizes, intermediate_size=64)).save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    files = [f"--model={base}", f"--train-file={data}", f"--eval-file={data}", "--text-column=text"]
    assert main(["train", "--method=melora", *files, f"--output-dir={tmp_path / 'out'}"]) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bayeslora: ")]
    assert len(told) == 1 and "the layers to adapt are not known for models of this type: name them" in told[0]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_draws_of_a_model_with_the_tokens_before_the_rows_are_those_of_each_row(rows: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    places: dict[str, Any] = {"attention_window": 8, "max_position_embeddings": 66, "initializer_range": 0.5}
    longformer = LongformerConfig(**sizes, **places, intermediate_size=64)
    model = get_peft_model(LongformerForSequenceClassification(longformer), config()).eval()
    for name, parameter in model.named_parameters():
        if "melora_A" in name or "melora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    tokens = torch.randint(5, 50, (rows, 16))
    together = bayeslora.predict(model, {"input_ids": tokens}, samples=4, per_sample=True).sample_probabilities
    alone = [bayeslora.predict(model, {"input_ids": row[None]}, samples=1, per_sample=True) for row in tokens]
    assert together is not None and float(together.std(0).max()) > 1e-4
    found = torch.cat([each.sample_probabilities for each in alone if each.sample_probabilities is not None], dim=1)
    torch.testing.assert_close(together[:1], found, atol=1e-5, rtol=0)


def test_a_head_for_the_same_labels_in_another_order_is_told(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = build_tiny_bert()
    model.config.id2label, model.config.label2id = {0: "POS", 1: "NEG"}, {"POS": 0, "NEG": 1}
    model.save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    rows: list[Any] = [{**row, "label": ("neg", "pos")[int(str(row["label"]))]} for row in review_rows(8, 0)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    files = [f"--model={base}", f"--train-file={data}", f"--eval-file={data}", "--text-column=text", "--max-steps=1"]
    with pytest.warns(UserWarning, match="has a head for POS, NEG, but the labels are neg, pos .* --labels pos,neg"):
        assert main(["train", "--method=lora", *files, f"--output-dir={tmp_path / 'one'}"]) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has a head for")
        assert main(["train", "--method=lora", *files, "--labels=pos,neg", f"--output-dir={tmp_path / 'two'}"]) == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["labels"] == ["pos", "neg"]


class StopAt(TrainerCallback):
    """Stops training as `EarlyStoppingCallback` and limits of time do."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stop", [3, 17])
def test_a_run_that_is_stopped_before_its_final_form_is_told(
    stop: int, tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = bayeslora.BLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    stopped = trainer(get_peft_model(tiny_bert, adapter), tmp_path, max_steps=18)
    stopped.add_callback(StopAt(stop))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bayeslora.attach(stopped).train()
    found = [str(each.message) for each in told if "training was stopped" in str(each.message)]
    wanted = f"training was stopped after {stop} of 18 steps, but B-LoRA has its final ranks and widths from step"
    assert (len(found), all(each.startswith(wanted) for each in found)) == (int(stop == 3), True)


def test_lora_of_peft_is_trained_as_before(tiny_bert: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert bayeslora.attach(trainer(model, tmp_path / "out")).train().global_step == 1


BATCH = {
    "input_ids": torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}


def plain_lora(**options: Any) -> Any:
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **options)
    return get_peft_model(build_tiny_bert(), lora).eval()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: bayeslora.attach(trainer(model, folder)),
        lambda model, folder: bayeslora.BayesLoop(
            model, torch.optim.AdamW(bayeslora.parameter_groups(model, lr=0.1)), 4, num_examples=4
        ),
        lambda model, folder: bayeslora.export(model, folder, "lora"),
        lambda model, folder: bayeslora.export(model, folder, "packed"),
    ],
)
def test_an_adapter_in_the_base_weights_is_neither_trained_nor_exported(
    call: Callable[[Any, Path], object], tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_bert, config())
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="merged into .*: call unmerge_adapter first"):
        call(model, tmp_path / "out")


@pytest.mark.parametrize(
    "call",
    [
        bayeslora.MCDropout,
        lambda model: bayeslora.truncate_rank(model, 1),
        lambda model: bayeslora.bayesianize(model, BATCH),
    ],
)
def test_lora_in_the_base_weights_is_not_read_beside_them(call: Callable[[Any], object]) -> None:
    model = plain_lora(lora_dropout=0.1)
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="merged into the base weights, .*: call unmerge_adapter first"):
        call(model)


def test_tokens_that_an_adapter_trains_are_not_lost_by_a_cut() -> None:
    with pytest.raises(BayesLoraError, match="has trainable_token_indices, but must be plain LoRA"):
        bayeslora.truncate_rank(plain_lora(trainable_token_indices={"word_embeddings": [5]}), 1)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (bayeslora.MeLoraConfig, "lora"),
        (bayeslora.MeLoraConfig, "packed"),
        (bayeslora.MeLoraConfig, "merged"),
        (LoraConfig, "merged"),
    ],
)
def test_one_of_several_active_adapters_is_exported_by_name(
    method: Callable[..., Any], kind: str, tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    model: Any = get_peft_model(tiny_bert, method(r=2, target_modules=["query"]))
    model.add_adapter("second", method(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(BayesLoraError, match="'second'. are active, but one is exported at a time: give adapter_name"):
        bayeslora.export(model, tmp_path / "out", kind)
    bayeslora.export(model, tmp_path / "out", kind, adapter_name="second")


def added_by_transformers(folder: Path) -> PreTrainedModel:
    model = build_tiny_bert()
    model.add_adapter(config())
    return model


def loaded_by_transformers(folder: Path) -> Any:
    model: Any = build_tiny_bert()
    get_peft_model(build_tiny_bert(), config()).save_pretrained(folder)
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("make", [added_by_transformers, loaded_by_transformers])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: bayeslora.attach(trainer(model, folder)),
        lambda model, folder: bayeslora.parameter_groups(model, lr=0.1),
        lambda model, folder: bayeslora.export(model, folder, "lora"),
        lambda model, folder: bayeslora.describe(model),
        lambda model, folder: bayeslora.shrink(model),
    ],
)
def test_an_adapter_of_transformers_own_is_refused_where_its_method_is_needed(
    make: Callable[[Path], Any], call: Callable[[Any, Path], object], tmp_path: Path
) -> None:
    with pytest.raises(BayesLoraError, match=r"Transformers has put an adapter .*: use get_peft_model\(model, config"):
        call(make(tmp_path), tmp_path / "out")


def test_an_adapter_of_transformers_own_predicts(tmp_path: Path) -> None:
    assert bayeslora.predict(loaded_by_transformers(tmp_path), BATCH, samples=2).probabilities.shape == (2, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("part", ["melora_A", "melora_M", "classifier.modules_to_save"])
def test_an_adapter_that_is_broken_gives_no_answers(
    value: float, samples: int, part: str, tiny_bert: PreTrainedModel
) -> None:
    model = get_peft_model(tiny_bert, config())
    broken = next(parameter for name, parameter in model.named_parameters() if part in name)
    torch.nn.init.constant_(broken, value)
    message = rf"not finite for 2 of 2 examples, but must be \(\S+{part}\S+ is not\): train with .* or load"
    with pytest.raises(BayesLoraError, match=message):
        bayeslora.predict(model, BATCH, samples=samples)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"answers": "mean"}])
@pytest.mark.parametrize("samples", [0, 2])
def test_a_language_model_that_is_broken_writes_nothing(samples: int, options: dict[str, Any]) -> None:
    adapter = bayeslora.MeLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(build_tiny_llama(), adapter)
    torch.nn.init.constant_(model.base_model.adapted_layers()[0].melora_B["default"], float("nan"))
    with pytest.raises(
        BayesLoraError, match=r"outputs are not finite for [248] of [248] sequences.*\S+melora_B\S+ is not"
    ):
        bayeslora.generate(model, BATCH["input_ids"], samples=samples, max_new_tokens=2, **options)


def test_a_language_model_with_one_broken_key_writes_nothing() -> None:
    """Its logits are finite in torch's attention on some processors."""
    adapter = bayeslora.MeLoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(build_tiny_llama(), adapter)
    model.base_model.adapted_layers()[0].melora_B["default"].data[0, 0] = float("nan")
    with pytest.raises(BayesLoraError, match=r"not finite"):
        bayeslora.generate(model, torch.arange(1, 5).view(1, 4), samples=0, max_new_tokens=2)


def test_padding_without_a_mask_is_padding() -> None:
    adapter = bayeslora.MeLoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build_tiny_llama(), adapter).eval()
    for name, parameter in model.named_parameters():
        if "melora_B" in name:
            torch.nn.init.normal_(parameter)
    prompts = torch.tensor([[2, 5, 9, 11], [0, 0, 7, 20]])
    masked = bayeslora.generate(model, prompts, (prompts != 0).long(), samples=3, max_new_tokens=6)
    unmasked = bayeslora.generate(model, prompts, samples=3, max_new_tokens=6)
    assert torch.equal(masked.tokens, unmasked.tokens)
    assert torch.equal(masked.mutual_information, unmasked.mutual_information)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (([[2, 5]],), r"input_ids are a list, but must be a tensor of token ids: give tokenizer\("),
        ((BATCH,), "input_ids are a dict, but must be a tensor of token ids"),
        ((torch.ones(1, 3),), "input_ids are of torch.float32, but must be a tensor of token ids"),
        ((torch.ones(2, 3).long(), torch.ones(1, 3)), r"the attention mask has shape \(1, 3\), but must be \(2, 3\)"),
    ],
)
def test_prompts_of_another_form_are_told(inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message):
        bayeslora.generate(build_tiny_llama(), *inputs, samples=0)


@pytest.mark.parametrize("ids", [torch.tensor([2, 5, 3]), torch.ones(0, 3).long(), torch.ones(1, 3)])
@pytest.mark.parametrize("samples", [0, 2])
def test_batches_of_another_form_are_told(ids: torch.Tensor, samples: int, tiny_bert: PreTrainedModel) -> None:
    model = get_peft_model(tiny_bert, config())
    with pytest.raises(BayesLoraError, match=r"input_ids are .*, but must be whole numbers of \(rows, tokens"):
        bayeslora.predict(model, {"input_ids": ids}, samples=samples)


def language_model(method: Callable[..., Any], **options: Any) -> Any:
    adapter = method(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return get_peft_model(build_tiny_llama(), adapter)


def state_after(folder: Path, method: Callable[..., Any], **arguments: Any) -> dict[str, torch.Tensor]:
    rows = [[2, 5 + row, 9, 3, 7 + row] for row in range(8)]
    labels = [[-100, -100, *ids[2:]] for ids in rows]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 5] * 8, "labels": labels})
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder), max_steps=30, report_to=[], use_cpu=True, optim="sgd", learning_rate=1.0, **arguments
    )
    model = language_model(method)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*few for B-LoRA")
        bayeslora.attach(Trainer(model, args, train_dataset=data), num_examples=24).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("method", [bayeslora.MeLoraConfig, bayeslora.BLoraConfig])
def test_labels_that_the_trainer_keeps_from_the_model_are_those_of_its_loss(
    method: Callable[..., Any], tmp_path: Path
) -> None:
    plain = state_after(tmp_path / "plain", method)
    smoothed = state_after(tmp_path / "smoothed", method, label_smoothing_factor=1e-7)
    for name, expected in plain.items():
        most = 1e-3 * float(expected.float().norm())
        torch.testing.assert_close(
            smoothed[name], expected, rtol=0, atol=most, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_number_of_rows_is_that_of_the_run(tiny_bert: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert, config())
    first, second = trainer(model, tmp_path), trainer(model, tmp_path)
    second.train_dataset = Dataset.from_dict({name: column * 3 for name, column in first.train_dataset[:].items()})
    for given, rows in ((first, 4), (second, 12)):
        bayeslora.attach(given).train()
        assert model.peft_config["default"].num_examples == rows
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build_tiny_bert(), tmp_path / "saved", is_trainable=True)
    with pytest.warns(
        UserWarning, match="num_examples is 12 in the adapter's config, but the training loss has 4 terms"
    ):
        bayeslora.attach(trainer(loaded, tmp_path)).train()


def test_several_labels_a_row_are_as_many_terms(tmp_path: Path) -> None:
    base = build_tiny_bert(num_labels=3, problem_type="multi_label_classification")
    model = get_peft_model(base, config())
    given = trainer(model, tmp_path)
    columns = given.train_dataset[:]
    columns["labels"] = [[1.0, 0.0, 1.0]] * len(given.train_dataset)
    for problem in ("multi_label_classification", None):  # None: the first pass sets it
        base.config.problem_type = problem
        given = trainer(model, tmp_path)
        given.train_dataset = Dataset.from_dict(columns)
        bayeslora.attach(given).train()
        assert model.peft_config["default"].num_examples == 3 * len(given.train_dataset)
        model.peft_config["default"].num_examples = None


def test_the_first_token_of_a_causal_model_is_no_term() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40))
    model = get_peft_model(base, bayeslora.MeLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    assert model.base_model.terms_in({"labels": ids}, 2).tolist() == [6, 6]
    assert model.base_model.terms_in({"labels": ids, "shift_labels": ids}, 2).tolist() == [7, 7]


def test_a_run_that_goes_on_without_its_optimizer_is_told(tiny_bert: PreTrainedModel, tmp_path: Path) -> None:
    for steps in (2, 3):
        run = trainer(get_peft_model(build_tiny_bert(), config()), tmp_path, max_steps=steps)
        run.args.save_only_model = True
        bayeslora.attach(run)
        if steps == 2:
            run.train()
            run.args.save_steps = 2
    with pytest.warns(
        UserWarning, match="training goes on after 2 steps without the optimizer's state, .*save_only_mod"
    ):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def preferences(kind: str, method: Callable[..., Any], folder: Path, rejected: str = "good", **options: Any) -> Any:
    """TRL's trainer of a reward, or of a model by preferences, on pairs of texts."""
    trl = pytest.importorskip("trl")
    causal = build_tiny_llama(num_labels=1)
    base = causal if kind == "DPO" else LlamaForSequenceClassification(causal.config)
    task = "CAUSAL_LM" if kind == "DPO" else "SEQ_CLS"
    adapter = method(r=2, target_modules=["q_proj", "v_proj"], task_type=task, init_weights=False, **options)
    rows = {"chosen": ["the film was good"] * 8, "rejected": ["the film was " + rejected] * 8}
    if kind == "DPO":
        rows = {"prompt": ["the film was"] * 8, "chosen": ["good"] * 8, "rejected": [rejected] * 8}
    shared: dict[str, Any] = {"max_steps": 4, "report_to": "none", "use_cpu": True, "logging_steps": 1, "bf16": False}
    arguments = getattr(trl, f"{kind}Config")(str(folder), **shared, per_device_train_batch_size=4)
    return getattr(trl, f"{kind}Trainer")(
        model=get_peft_model(base, adapter),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=build_tiny_tokenizer(causal=True),
    )


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bayeslora.MeLoraConfig, {"noise_fade_in": [0.0, 0.0]}),
        (bayeslora.MeLoraConfig, {"noise_fade_in": [0.0, 0.0], "cores": 3}),
        (bayeslora.BlobConfig, {"noise_scope": "example"}),
    ],
)
def test_two_texts_that_are_compared_share_their_draw(
    kind: str, method: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    run = bayeslora.attach(preferences(kind, method, tmp_path, **options))
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses == pytest.approx([float(np.log(2.0))] * 4, abs=1e-5)  # of two equal texts
    assert run.model.peft_config["default"].num_examples == 8  # pairs


def test_a_reference_beside_the_adapter_that_is_trained_does_not_draw(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    model: Any = get_peft_model(tiny_bert, config(init_weights=False))
    model.add_adapter("ref", config(init_weights=False))
    loop = bayeslora.BayesLoop(
        model, torch.optim.AdamW(bayeslora.parameter_groups(model, lr=0.1)), total_steps=4, num_examples=4
    )
    loop.step_begin()
    model.train().set_adapter("ref")
    drawn = [model(**BATCH).logits for _ in range(2)]
    assert torch.equal(*drawn)


def test_squared_gradients_of_pairs_are_those_of_one_pair_at_a_time(tmp_path: Path) -> None:
    found = []
    for size in (4, 1):
        torch.manual_seed(0)
        run = preferences("Reward", bayeslora.MeLoraConfig, tmp_path, "bad", noise_fade_in=[0.5, 0.6])
        run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps = size, 4 // size
        run.args.max_steps, run.args.learning_rate = 1, 0.0
        bayeslora.attach(run).train()
        layers = run.model.base_model.adapted_layers()
        found.append(torch.cat([layer.melora_precision["default"].flatten() for layer in layers]))
    assert float(found[1].max()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[1].max()))


class OwnHead(torch.nn.Module):
    """An adapted encoder with a head that is not the encoder's."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(encoder.config.hidden_size, 2)

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None
    ) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(states[:, 0])
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", [bayeslora.BLoraConfig, bayeslora.MeLoraConfig, bayeslora.AdaLoraConfig])
def test_an_adapted_model_inside_another_one_trains_and_is_logged(method: Callable[..., Any], tmp_path: Path) -> None:
    rank = {"init_r": 4, "target_r": 2, "importance": "sensitivity"} if method is bayeslora.AdaLoraConfig else {"r": 4}
    encoder = get_peft_model(build_tiny_bert().bert, method(**rank, target_modules=["query", "value"]))
    model = OwnHead(encoder)
    given = trainer(model, tmp_path, max_steps=40)
    given.args.logging_steps, given.args.remove_unused_columns = 20, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a short run
        bayeslora.attach(given).train()
    assert 0 < given.state.log_history[0]["relative_bops"] < 1
    if method is bayeslora.BLoraConfig:
        assert all(layer.evidence("default").is_decided for layer in tuner_of(encoder).adapted_layers())


def test_a_plain_lora_inside_another_model_has_the_same_cost() -> None:
    lora = LoraConfig(r=4, target_modules=["query", "value"])
    encoder = get_peft_model(build_tiny_bert().bert, lora)
    assert relative_bops(OwnHead(encoder)) == relative_bops(encoder)


def test_a_model_without_logits_is_refused_before_the_warm_up(tmp_path: Path) -> None:
    model = OwnHead(get_peft_model(build_tiny_bert().bert, bayeslora.BLoraConfig(r=4, target_modules=["query"])))
    model.forward = lambda **inputs: {"pooled": model.encoder(**inputs).last_hidden_state}  # type: ignore[method-assign]
    given = trainer(model, tmp_path, max_steps=40)
    given.args.remove_unused_columns = False
    with pytest.raises(BayesLoraError, match="the model returns neither logits nor a loss"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bayeslora.attach(given).train()
    assert given.state.global_step == 0


def test_passes_beside_the_adapted_model_are_told() -> None:
    model = get_peft_model(build_tiny_bert(), config(variance="closed_form"))
    loop = bayeslora.BayesLoop(model, torch.optim.SGD(bayeslora.parameter_groups(model, lr=1.0)), 4, num_examples=8)
    loop.optimizer.param_groups[0]["lr"] = 1.0
    ids = torch.tensor([[2, 5, 3], [2, 6, 3]])
    with pytest.raises(BayesLoraError, match="went past the adapted model, but it counts their rows"):
        for _ in range(3):
            loop.step_begin()
            model.get_base_model().forward(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
            loop.before_optimizer_step()
            loop.optimizer.step()
            loop.step_end()


def test_a_number_that_the_trainer_logs_keeps_its_name(tmp_path: Path) -> None:
    class Logging(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "kl": 7.0}, *args, **kwargs)

    plain = trainer(get_peft_model(build_tiny_bert(), config()), tmp_path)
    plain.args.logging_steps = 1
    given = Logging(plain.model, plain.args, train_dataset=plain.train_dataset)
    bayeslora.attach(given).train()
    logged = given.state.log_history[0]
    assert logged["kl"] == 7.0 and logged["bayeslora_kl"] >= 0 and logged["kl_warmup"] > 0


def test_a_pass_without_gradients_between_two_passes_of_several_cores_takes_its_rows_in_turn() -> None:
    deal = Deal(4)
    deal.begin_step(0, 0)
    for _ in range(2):
        deal.begin_pass(2)
        deal.end_pass()
    with torch.no_grad():
        assert deal.of_rows(6).tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(BayesLoraError, match="under gradient checkpointing"):
        deal.of_rows(6)


def test_a_weight_that_quanto_stores_is_counted_and_not_merged() -> None:
    model = get_peft_model(build_tiny_bert(), config())
    layer = tuner_of(model).adapted_layers()[0]
    layer.get_base_layer().weight_qtype = SimpleNamespace(bits=8)
    assert layer.base_width == 8
    with pytest.raises(BayesLoraError, match="quanto stores the base weight in 8 bits"):
        model.merge_and_unload()


@pytest.mark.parametrize("gates", ["evidence", "paper"])
def test_an_adapter_that_is_loaded_in_inference_mode_predicts_the_same(gates: str, tmp_path: Path) -> None:
    options = {"gates": gates, "target_modules": ["query"], "task_type": "SEQ_CLS", "r": 4}
    model = get_peft_model(build_tiny_bert(), bayeslora.BLoraConfig(**options))
    for layer in tuner_of(model).adapted_layers():
        layer.start_learning("default")
        for kind in layer.quantized_kinds("default"):
            layer.quantizers("default").set_width(kind, 4, torch.tensor(1.0))
        layer.progress("default").advance(Phase.FROZEN)
    model.eval().save_pretrained(tmp_path)
    ids = torch.tensor([[2, 5, 3]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
        for _ in range(2):
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_a_quantizing_adapter_is_exported_as_a_program() -> None:
    model = get_peft_model(
        build_tiny_bert(), bayeslora.BLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    )
    for layer in tuner_of(model).adapted_layers():
        layer.start_learning("default")
        layer.quantizers("default").set_width("weight", 4, layer.weight_range("default", "weight", 4))
        layer.progress("default").advance(Phase.FROZEN)
    ids = torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        program = torch.export.export(model, (), {"input_ids": ids})
        torch.testing.assert_close(program.module()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_the_projection_that_mambas_kernel_reads_past_the_adapter_is_refused() -> None:
    base = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=30))
    with pytest.raises(BayesLoraError, match="out_proj' is inside a MambaMixer, but that reads its weight past"):
        get_peft_model(base, bayeslora.MeLoraConfig(r=2, target_modules=["out_proj"]))
    get_peft_model(base, bayeslora.MeLoraConfig(r=2, target_modules=["in_proj"]))
